// What cpu_isa.cpp offers once per SIMD level and bind_cpu.cpp chooses from at run time.
#pragma once
#include "params.h"

namespace snn {

constexpr i64 kBlock = 128;  // neurons whose state stays close while t runs
constexpr i64 kSteps = 64;   // steps whose membranes the backward pass keeps at a time

// Bytes of scratch one thread of the backward pass needs; the caller aligns it to 64 bytes.
inline i64 backward_scratch_bytes(const IFBackward& p) {
  const i64 rows = kSteps + (p.T + kSteps - 1) / kSteps;
  return rows * kBlock * (p.dtype == kFloat64 ? 8 : 4);
}

#define SNN_DECLARE(ISA)                                                                  \
  namespace ISA {                                                                         \
  void forward(const IFForward& p, i64 first, i64 last, bool streaming);                  \
  void backward(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch); \
  }
SNN_DECLARE(baseline)
SNN_DECLARE(avx2)
SNN_DECLARE(avx512)
#undef SNN_DECLARE

}  // namespace snn
