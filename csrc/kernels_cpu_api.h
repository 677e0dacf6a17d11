// What cpu_isa.cpp offers once per SIMD level and bind_cpu.cpp chooses from at run time.
#pragma once
#include "params.h"

namespace snn {

// Neurons of one loop whose length the compiler knows; threads split the neurons at its multiples.
constexpr i64 kLanes = 128;
// Neurons whose state stays in L1 while t runs: rows long enough for the hardware's prefetchers.
constexpr i64 kBlock = 2048;
// Steps whose slopes the backward pass keeps at a time, and the bytes it likes to keep them in.
constexpr i64 kSteps = 64;
constexpr i64 kScratchBytes = 64 * 1024;

SNN_HD i64 state_bytes(i32 dtype) { return dtype == kFloat64 ? 8 : 4; }
SNN_HD i64 element_bytes(i32 dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Neurons the plain backward pass takes at a time.
SNN_HD i64 backward_block(const IFBackward& p) {
  const i64 steps = p.T < kSteps ? p.T : kSteps;
  const i64 fit = kScratchBytes / (steps * state_bytes(p.dtype)) / kLanes * kLanes;
  return fit < kLanes ? kLanes : fit < kBlock ? fit : kBlock;
}

// Bytes of scratch one thread of a backward pass needs: a chunk of steps, and the membranes at the
// start of every chunk but the first. The caller aligns it to 64 bytes.
SNN_HD i64 backward_scratch_bytes(const IFBackward& p) {
  const i64 rows = (p.T < kSteps ? p.T : kSteps) + (p.T + kSteps - 1) / kSteps;
  return rows * backward_block(p) * state_bytes(p.dtype);
}

// All run neurons first..last - 1, `first` a multiple of kLanes. `streaming`: the rows do not fit
// in the caches.
#define SNN_DECLARE(ISA)                                                                  \
  namespace ISA {                                                                         \
  void forward(const IFForward& p, i64 first, i64 last, bool streaming);                  \
  void general(const IFGeneral& p, i64 first, i64 last, bool streaming);                  \
  void backward(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch); \
  void backward_general(const IFBackwardGeneral& p, i64 first, i64 last, bool streaming,  \
                        void* scratch);                                                   \
  }
SNN_DECLARE(baseline)
SNN_DECLARE(avx2)
SNN_DECLARE(avx512)
#undef SNN_DECLARE

}  // namespace snn
