// What a kernel is told. These structs travel by value and are the whole interface between Python
// and every kernel; snnkernels/kernels/params.py mirrors them and a test compares the layouts.
#pragma once
#include "numeric.h"

namespace snn {

enum DType : i32 { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// The first four have kernels of their own in the plain neuron; the general one knows all.
enum Surrogate : i32 {
  kATan = 0,
  kSigmoid = 1,
  kTriangle = 2,
  kRectangle = 3,
  kSuperSpike = 4,
  kExponential = 5,
  kErf = 6,
  kPeriodicExponential = 7,
};

enum Option : i32 {
  kStrict = 1,          // fire at m > level instead of m >= level
  kHardReset = 2,       // v = v_reset after a spike
  kInputScale = 4,      // current = round(x * input_scale)
  kDetachReset = 8,     // no gradient through the spike in the reset
  kSmooth = 16,         // spikes are the surrogate's primitive: the differentiable twin, for tests
  kBeta = 32,           // leak: m = round(beta * v) + current
  kBias = 64,           // current = round(current + bias)
  kFireLevel = 128,     // fire at fire_level; the threshold is what a spike subtracts
  kBurst = 256,         // up to max_spikes spikes a step
  kSigned = 512,        // spikes of -1 as well, guarded by the running count
  kMask = 1024,         // a neuron whose mask is 0 emits nothing
  kProbeMask = 2048,    // SRP: `probe` steps first, whose last membrane masks the rest
  kProbeShift = 4096,   // COS: the first `probe` steps are run beforehand and move v_init
  kParallel = 8192,     // count = clip(floor((v_init + sum x) / threshold), 0, T), spikes first
  kResetDelay = 16384,  // what a spike subtracts is subtracted after the next charge
  kClip = 32768,        // v = max(v - v_min, 0) + v_min after the reset, each rounded
};

// Times at which one run can report counts.
enum { kCountTimes = 16 };
// Steps whose membranes the GPU backward holds in registers.
enum { kChunk = 8 };
// Steps in a word of packed spikes.
enum { kWordSteps = 32 };

// A value of every neuron: one number, or an array that neurons share. Neuron n reads element
// (n / inner) % count, which covers scalar, per channel, per position and full.
struct Operand {
  const void* data;  // null: `value` holds. Otherwise the state type (amplitude: see below)
  i64 inner;
  i64 count;
  double value;
};

// Where the rows of an array [T, N] lie: step t of neuron n is element
// t * step + (n / inner) * outer + n % inner, with `inner` shared by all arrays of a call.
// step 0: one row for all steps. inner == N: rows are contiguous and `outer` is not read.
struct Rows {
  i64 step;
  i64 outer;
};

// The plain neuron: reset by subtraction, fire at >=. Arrays [N] are dense, neuron by neuron;
// words and window are [ceil(T / kWordSteps), N], dense, of word_bytes each (1 for T <= 8, 2 for
// T <= 16, else 4), bit t % kWordSteps of word t / kWordSteps for step t.
struct IFForward {
  const void* x;  // rows x_rows
  void* spikes;   // rows out_rows, spike_bytes each; may be null
  void* words;    // the spikes, packed; may be null
  void* window;   // whether the rectangle surrogate's slope is not 0, packed; may be null
  i32* count;     // [N]; may be null
  void* v;        // [N] final membrane, state type; may be null
  Operand v_init;
  Operand threshold;
  Operand amplitude;  // data: elements of the spikes' type; the number is amplitude_bits
  i64 T;
  i64 N;
  i64 inner;
  Rows x_rows;
  Rows out_rows;
  double alpha;  // of the surrogate, read with window and kSmooth
  u64 amplitude_bits;
  i32 dtype;
  i32 spike_bytes;
  i32 word_bytes;
  i32 vec;  // GPU: neurons per thread, 1 or 16 bytes' worth of x
};

// Every option and every output.
struct IFGeneral {
  IFForward base;
  i32* counts;       // [count_times, N]: counts after count_at[j] steps; may be null
  void* v_seq;       // rows out_rows, membrane after reset, state type; may be null
  void* charge_seq;  // rows out_rows, membrane before reset, state type; may be null
  const u8* mask;    // [N], read with kMask
  Operand input_scale;
  Operand beta;
  Operand bias;
  Operand fire_level;
  double v_reset;
  double margin;           // kSigned, kProbeMask, kProbeShift: see neuron.h
  double surrogate_scale;  // read with kSmooth
  double v_min;            // read with kClip
  i32 options;
  i32 surrogate;  // read with kSmooth
  i32 max_spikes;
  i32 probe;
  i32 iterations;
  i32 count_low;  // kSigned: the running count stays within [count_low, count_high]
  i32 count_high;
  i32 count_times;
  i32 count_at[kCountTimes];  // ascending
};

// One of x (membranes are recomputed), charges and window says where the membranes come from.
struct IFBackward {
  const void* x;            // rows x_rows; null with charges or window, unless needed otherwise
  const void* charges;      // rows out_rows: charge_seq of the forward pass; may be null
  const void* window;       // as written by the forward pass (rectangle surrogate); may be null
  const void* words;        // with window, and only where grad_threshold or grad_amplitude is asked
  const void* grad_spikes;  // rows grad_rows; type of x; may be null
  const void* grad_v;       // [N] state type; may be null
  void* grad_x;             // rows grad_x_rows, type of x (step 0: summed over t); may be null
  // One value per neuron, state type; each may be null. Sums over channels follow outside.
  void* grad_v_init;
  void* grad_threshold;
  void* grad_amplitude;
  void* scratch;  // GPU: membranes at the chunk starts, [ceil(T / kChunk) - 1, N] state type
  Operand v_init;
  Operand threshold;
  Operand amplitude;  // state type here, already rounded to the spikes' type
  i64 T;
  i64 N;
  i64 inner;
  Rows x_rows;
  Rows out_rows;
  Rows grad_rows;
  Rows grad_x_rows;
  double alpha;
  double grad_scale;  // multiplies grad_spikes: 1 / T for a rate
  i32 dtype;
  i32 word_bytes;
  i32 options;  // only kDetachReset in the plain backward
  i32 surrogate;
  i32 vec;  // GPU: neurons per thread, 1 or 16 bytes' worth of state
  i32 pad;
};

struct IFBackwardGeneral {
  IFBackward base;
  const void* grad_v_seq;       // rows out_rows, state type; may be null
  const void* grad_charge_seq;  // rows out_rows, state type; may be null
  void* grad_input_scale;       // [N] state type, like those below; may be null
  void* grad_beta;
  void* grad_bias;
  void* grad_fire_level;
  Operand input_scale;
  Operand beta;
  Operand bias;
  Operand fire_level;
  double v_reset;
  double surrogate_scale;  // multiplies the surrogate's derivative
  double v_min;            // read with kClip
  i32 max_spikes;          // read with kBurst
  i32 pad;
};

}  // namespace snn
