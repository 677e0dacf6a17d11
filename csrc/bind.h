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

// {struct: {field: offset}, with "" for the size}.
inline pybind11::dict layout() {
  pybind11::dict operand, forward, backward, all;
#define SNN_OFFSET(d, S, f) d[#f] = offsetof(S, f)
  operand[""] = sizeof(Operand);
  SNN_OFFSET(operand, Operand, data);
  SNN_OFFSET(operand, Operand, inner);
  SNN_OFFSET(operand, Operand, count);
  SNN_OFFSET(operand, Operand, value);
  forward[""] = sizeof(IFForward);
#define F(f) SNN_OFFSET(forward, IFForward, f)
  F(x), F(spikes), F(count), F(v), F(v_seq), F(charge_seq), F(v_init), F(threshold), F(amplitude);
  F(input_scale), F(T), F(N), F(x_stride), F(v_reset), F(alpha), F(amplitude_bits), F(dtype);
  F(spike_bytes), F(options), F(surrogate), F(vec), F(pad);
#undef F
  backward[""] = sizeof(IFBackward);
#define F(f) SNN_OFFSET(backward, IFBackward, f)
  F(x), F(grad_spikes), F(grad_v), F(grad_v_seq), F(grad_charge_seq), F(grad_x), F(grad_v_init);
  F(grad_threshold), F(grad_amplitude), F(grad_input_scale), F(scratch), F(v_init), F(threshold);
  F(amplitude), F(input_scale), F(T), F(N), F(x_stride), F(grad_stride), F(v_reset), F(alpha);
  F(grad_scale), F(dtype), F(options), F(surrogate), F(vec);
#undef F
#undef SNN_OFFSET
  all["Operand"] = operand;
  all["IFForward"] = forward;
  all["IFBackward"] = backward;
  return all;
}

}  // namespace snn
