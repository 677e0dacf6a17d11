// What a kernel is told. These structs travel by value and are the whole interface between Python
// and every kernel; snnkernels/kernels/params.py mirrors them and a test compares the layouts.
#pragma once
#include "numeric.h"

namespace snn {

enum DType : i32 { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

enum Surrogate : i32 { kATan = 0, kSigmoid = 1, kTriangle = 2, kRectangle = 3 };

enum Option : i32 {
  kStrict = 1,       // fire at m > threshold instead of m >= threshold
  kHardReset = 2,    // v = v_reset after a spike
  kInputScale = 4,   // m = v + round(x * input_scale)
  kDetachReset = 8,  // no gradient through the spike in the reset
  kSmooth = 16,      // spikes are the surrogate's primitive: the differentiable twin, for tests
};

// A value of every neuron: one number, or an array that neurons share. Neuron n reads element
// (n / inner) % count, which covers scalar, per channel, per position and full.
struct Operand {
  const void* data;  // null: `value` holds. Otherwise the state type (amplitude: see below)
  i64 inner;
  i64 count;
  double value;
};

struct IFForward {
  const void* x;     // [T, N], or [N] when x_stride is 0 (constant current)
  void* spikes;      // [T, N] of spike_bytes each; may be null
  i32* count;        // [N]; may be null
  void* v;           // [N] final membrane, state type; may be null
  void* v_seq;       // [T, N] membrane after reset, state type; may be null
  void* charge_seq;  // [T, N] membrane before reset, state type; may be null
  Operand v_init;
  Operand threshold;
  Operand amplitude;  // data: elements of the spikes' type; the number is amplitude_bits
  Operand input_scale;
  i64 T;
  i64 N;
  i64 x_stride;
  double v_reset;
  double alpha;  // of the surrogate, read only with kSmooth
  u64 amplitude_bits;
  i32 dtype;
  i32 spike_bytes;
  i32 options;
  i32 surrogate;  // read only with kSmooth
  i32 vec;        // GPU: neurons per thread, 1 or 16 bytes' worth of x
  i32 pad;
};

struct IFBackward {
  const void* x;                // as in the forward pass
  const void* grad_spikes;      // [T, N], or [N] when grad_stride is 0; type of x; may be null
  const void* grad_v;           // [N] state type; may be null
  const void* grad_v_seq;       // [T, N] state type; may be null
  const void* grad_charge_seq;  // [T, N] state type; may be null
  void* grad_x;                 // [T, N] type of x; [N] when x_stride is 0; may be null
  // One value per neuron, state type; each may be null. Sums over channels follow outside.
  void* grad_v_init;
  void* grad_threshold;
  void* grad_amplitude;
  void* grad_input_scale;
  void* scratch;  // GPU: membranes at the chunk starts, [ceil(T / kChunk) - 1, N] state type
  Operand v_init;
  Operand threshold;
  Operand amplitude;  // state type here, already rounded to the spikes' type
  Operand input_scale;
  i64 T;
  i64 N;
  i64 x_stride;
  i64 grad_stride;
  double v_reset;
  double alpha;
  double grad_scale;  // multiplies grad_spikes: 1 / T for a rate
  i32 dtype;
  i32 options;
  i32 surrogate;
  i32 vec;  // GPU: neurons per thread, 1 or 16 bytes' worth of state
};

// Steps whose membranes the GPU backward holds in registers.
enum { kChunk = 8 };

}  // namespace snn
