// Shared by the two bindings of the small kernels: the layout of their structs.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>

#include "maps_cpu_api.h"

namespace snn {

// {struct: {field: offset}, with "" for the size}.
inline pybind11::dict map_layout() {
  pybind11::dict all;
#define SNN_STRUCT(S) \
  all[#S] = fields;   \
  fields[""] = sizeof(Struct)
#define F(f) fields[#f] = offsetof(Struct, f)
  {
    typedef QcfsParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(QcfsParams);
    F(x), F(grad), F(out), F(grad_threshold), F(threshold), F(N), F(levels), F(phase), F(dtype);
    F(clip_first);
  }
  {
    typedef PoolParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(PoolParams);
    F(x), F(out), F(total_in), F(total), F(peak_in), F(peak), F(N), F(T), F(planes), F(H), F(W);
    F(OH), F(OW), F(kh), F(kw), F(sh), F(sw), F(ph), F(pw), F(dh), F(dw), F(owner_mh), F(owner_jh);
    F(owner_mw), F(owner_jw), F(dtype), F(size);
  }
  {
    typedef DsrParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(DsrParams);
    F(x), F(grad), F(weights), F(grad_x), F(grad_threshold), F(threshold), F(N), F(T), F(tau);
    F(dt), F(divisor), F(dtype), F(pad);
  }
  {
    typedef SumsParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(SumsParams);
    F(values), F(out), F(N), F(rows), F(inner), F(each), F(length), F(segments), F(dtype), F(pad);
  }
  {
    typedef MmseParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(MmseParams);
    F(values), F(candidates), F(out), F(N), F(channels), F(each), F(K), F(length), F(segments);
    F(T), F(fraction), F(dtype), F(pad);
  }
  {
    typedef HistogramParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(HistogramParams);
    F(values), F(counts), F(sums), F(scale), F(scratch), F(N), F(channels), F(each), F(bins);
    F(dtype), F(pad);
  }
  {
    typedef TtfsParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(TtfsParams);
    F(from), F(to), F(threshold), F(N), F(T), F(dtype), F(bytes), F(round), F(pad);
  }
  {
    typedef PlanesParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(PlanesParams);
    F(x), F(q), F(planes), F(threshold), F(N), F(T), F(largest), F(dtype), F(bytes);
  }
  {
    typedef BitsParams Struct;
    pybind11::dict fields;
    SNN_STRUCT(BitsParams);
    F(words), F(spikes), F(counts), F(amplitude), F(N), F(T), F(W), F(amplitude_bits);
    F(word_bytes), F(spike_bytes);
  }
#undef F
#undef SNN_STRUCT
  return all;
}

}  // namespace snn
