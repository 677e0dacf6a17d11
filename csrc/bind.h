// Shared by the two bindings: the params structs as bytes, and their layout for the Python mirror.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace snn {

template <class Params>
Params unpack(const pybind11::bytes& bytes) {
  static_assert(std::is_trivially_copyable<Params>::value, "params travel as bytes");
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(bytes.ptr(), &data, &size)) throw pybind11::error_already_set();
  if (size != Py_ssize_t(sizeof(Params)))
    throw std::invalid_argument("params: " + std::to_string(size) + " bytes, expected " +
                                std::to_string(sizeof(Params)));
  Params p;
  std::memcpy(&p, data, sizeof p);
  return p;
}

// {struct: {field: offset}, with "" for the size}. A nested struct is one field, itself listed.
inline pybind11::dict layout() {
  pybind11::dict all, fields;
#define BEGIN(S)                 \
  {                              \
    typedef S Struct;            \
    fields = pybind11::dict();   \
    fields[""] = sizeof(Struct); \
    all[#S] = fields;
#define F(f) fields[#f] = offsetof(Struct, f)
#define END }
  // clang-format off
  BEGIN(Operand)
    F(data); F(inner); F(count); F(value);
  END
  BEGIN(Rows)
    F(step); F(outer);
  END
  BEGIN(IFForward)
    F(x); F(spikes); F(words); F(window); F(count); F(v); F(v_init); F(threshold); F(amplitude);
    F(T); F(N); F(inner); F(x_rows); F(out_rows); F(alpha); F(amplitude_bits); F(dtype);
    F(spike_bytes); F(word_bytes); F(vec);
  END
  BEGIN(IFGeneral)
    F(base); F(counts); F(v_seq); F(charge_seq); F(mask); F(input_scale); F(beta); F(bias);
    F(fire_level); F(v_reset); F(margin); F(surrogate_scale); F(v_min); F(options); F(surrogate); F(max_spikes); F(probe);
    F(iterations); F(count_low); F(count_high); F(count_times); F(count_at);
  END
  BEGIN(IFBackward)
    F(x); F(charges); F(window); F(words); F(grad_spikes); F(grad_v); F(grad_x); F(grad_v_init);
    F(grad_threshold); F(grad_amplitude); F(scratch); F(v_init); F(threshold); F(amplitude); F(T);
    F(N); F(inner); F(x_rows); F(out_rows); F(grad_rows); F(grad_x_rows); F(alpha); F(grad_scale);
    F(dtype); F(word_bytes); F(options); F(surrogate); F(vec); F(pad);
  END
  BEGIN(IFBackwardGeneral)
    F(base); F(grad_v_seq); F(grad_charge_seq); F(grad_input_scale); F(grad_beta); F(grad_bias);
    F(grad_fire_level); F(input_scale); F(beta); F(bias); F(fire_level); F(v_reset);
    F(surrogate_scale); F(v_min); F(max_spikes); F(pad);
  END
  return all;
  // clang-format on
#undef BEGIN
#undef F
#undef END
}

}  // namespace snn
