// The small kernels: each turns tensors into tensors with every output element on its own. Here is
// what one element computes, and the structs that tell a kernel what to do.
//
// As for the neuron, every back end runs these lines in this order and rounds nowhere else.
// snnkernels/kernels/maps_params.py mirrors the structs; a test compares the layouts.
#pragma once
#include "params.h"

namespace snn {

// Arithmetic in the state type unless said otherwise; an Operand's data is of the state type.

struct QcfsParams {
  const void* x;         // [N]
  const void* grad;      // [N] type of x; backward only
  void* out;             // [N] type of x: the activation, or the gradient of x
  void* grad_threshold;  // [N] state type, each element's share; backward only, may be null
  Operand threshold;     // rounded to the type of x
  i64 N;
  double levels;
  double phase;
  i32 dtype;
  i32 clip_first;  // gradient convention
};

struct PoolParams {
  const void* x;         // [T, planes, H, W]
  void* out;             // [T, planes, OH, OW] type of x
  const void* total_in;  // [planes, H, W] running sums before the first step; may be null
  void* total;           // the same after the last; null on GPUs when not asked for
  const void* peak_in;   // [planes, OH, OW] maxima before the first step; may be null
  void* peak;            // the same after the last; may be null
  i64 N;                 // planes * OH * OW
  i64 T, planes, H, W, OH, OW;
  i32 kh, kw, sh, sw, ph, pw, dh, dw;  // window, stride, padding, dilation
  // A window of which tap (i, j) is also in the window `m` before it owns no running sum there.
  i32 owner_mh, owner_jh, owner_mw, owner_jw;
  i32 dtype;
  i32 size;  // GPU: windows up to 2 or 3 wide and high keep their sums in registers; 0: any
};

struct DsrParams {
  const void* x;         // [T, N]
  const void* grad;      // [T, N] type of x
  const void* weights;   // [T] state type, sum 1; null: all the same
  void* grad_x;          // [N] type of x, the same at every step
  void* grad_threshold;  // [N] state type: the summed gradient where the mean is above the bound
  Operand threshold;
  i64 N, T;
  double tau, dt;  // read only with weights
  double divisor;  // of the gradient of x: T, or tau * T
  i32 dtype;
  i32 pad;
};

// Sums of rows in a fixed order: kMapLanes sums side by side over each segment, then the lanes.
enum { kMapLanes = 8 };

struct SumsParams {
  const void*
      values;   // state type; element j of row r is at (j / inner * rows + r) * inner + j % inner
  double* out;  // [rows, segments]
  i64 N;        // rows * segments
  i64 rows, inner, each, length, segments;  // `each` elements a row, `length` a segment
  i32 dtype;
  i32 pad;
};

struct MmseParams {
  const void* values;      // [channels, each]
  const void* candidates;  // [channels, K] state type
  double* out;             // [channels, K, segments]
  i64 N;                   // channels * segments * K
  i64 channels, each, K, length, segments;
  double T, fraction;
  i32 dtype;
  i32 pad;
};

struct HistogramParams {
  const void* values;   // [channels, each]
  i64* counts;          // [channels, bins], added to
  double* sums;         // the same; CPU only
  const double* scale;  // [channels], bins per unit
  double* scratch;      // CPU: [channels, bins] zeros
  i64 N;                // channels * each
  i64 channels, each, bins;
  i32 dtype;
  i32 pad;
};

struct TtfsParams {
  const void* from;  // [N]: values, or times of `bytes` each
  void* to;          // [N]: times, or values
  Operand threshold;
  i64 N;
  double T;
  i32 dtype;  // of the values
  i32 bytes;  // of a time: 1 or 2
  i32 round;
  i32 pad;
};

struct PlanesParams {
  const void* x;  // [N]
  void* q;        // [N] of `bytes` each
  u8* planes;     // [T, N]; may be null
  Operand threshold;
  i64 N, T;
  double largest;  // 2^T - 1
  i32 dtype;
  i32 bytes;
};

struct BitsParams {
  void* words;        // [W, N] of word_bytes each; step t is bit t % bits of word t / bits
  void* spikes;       // [T, N] of spike_bytes each; may be null
  i32* counts;        // [N]; popcount only
  Operand amplitude;  // data: elements of the spikes' type; the number is amplitude_bits
  i64 N, T, W;
  u64 amplitude_bits;
  i32 word_bytes;
  i32 spike_bytes;
};

SNN_HD float floored(float x) {
#if defined(__CUDA_ARCH__)
  return floorf(x);
#else
  return __builtin_floorf(x);
#endif
}

SNN_HD double floored(double x) {
#if defined(__CUDA_ARCH__)
  return floor(x);
#else
  return __builtin_floor(x);
#endif
}

// Rounded to X and back.
template <class X>
SNN_HD State<X> as(State<X> value) {
  return widen(Narrow<X>::from(value));
}

// NaN and -0.0 pass.
template <class S>
SNN_HD S clipped(S x, S high) {
  return x < S(0) ? S(0) : (x > high ? high : x);
}

template <class T>
SNN_HD T load_at(const void* data, i64 i) {
  return static_cast<const T*>(data)[i];
}

template <class T>
SNN_HD void store_at(void* data, i64 i, T value) {
  static_cast<T*>(data)[i] = value;
}

// ---- qcfs: threshold * clip(floor(x L / threshold + phase) / L, 0, 1), rounded to X at every step

template <class X>
SNN_HD State<X> qcfs_quotient(State<X> x, State<X> threshold, State<X> levels, State<X> phase) {
  return as<X>(floored(as<X>(as<X>(as<X>(x * levels) / threshold) + phase)) / levels);
}

template <class X>
struct Qcfs {
  typedef QcfsParams Params;
  typedef State<X> S;
  static SNN_HD void at(const Params& p, i64 i, S threshold) {
    const S q = qcfs_quotient<X>(widen(load_at<X>(p.x, i)), threshold, S(p.levels), S(p.phase));
    store_at<X>(p.out, i, Narrow<X>::from(threshold * clipped(q, S(1))));
  }
};

// Straight through the floor. clip_first: as if x / threshold were clipped and then quantised.
template <class X>
struct QcfsBackward {
  typedef QcfsParams Params;
  typedef State<X> S;
  static SNN_HD void at(const Params& p, i64 i, S threshold) {
    const S x = widen(load_at<X>(p.x, i)), grad = widen(load_at<X>(p.grad, i));
    const S q = qcfs_quotient<X>(x, threshold, S(p.levels), S(p.phase));
    const S ratio = x / threshold, u = p.clip_first ? as<X>(ratio) : q;
    const bool inside = (u >= S(0)) & (u <= S(1));
    const S c = clipped(q, S(1));
    store_at<X>(p.out, i, Narrow<X>::from(inside ? grad : S(0)));
    if (p.grad_threshold) store_at<S>(p.grad_threshold, i, grad * (inside ? c - ratio : c));
  }
};

// ---- cumulative max-pool

// The first of equal values stays, a NaN stays: the order of torch's max_pool2d.
template <class S>
SNN_HD S larger(S most, S value) {
  return (value > most) | (value != value) ? value : most;
}

template <class S>
SNN_HD S lowest() {
  return S(from_bits(0xff800000u));  // -infinity: NVRTC knows no builtin for it
}

// ---- dsr: gradients from means over time

template <class X>
struct DsrFinish {
  typedef State<X> S;
  static SNN_HD void at(const DsrParams& p, i64 i, S threshold, S x, S grad) {
    // One division for both kinds: of the mean, or of the bound.
    const S quotient = (p.weights ? S(p.tau) * threshold : x) / S(p.weights ? p.dt : double(p.T));
    const S mean = p.weights ? x : quotient, bound = p.weights ? quotient : threshold;
    if (p.weights) grad = S(p.T) * grad;
    const bool inside =
        p.weights ? (mean > S(0)) & (mean < bound) : (mean >= S(0)) & (mean <= bound);
    store_at<S>(p.grad_threshold, i, mean > bound ? grad : S(0));
    store_at<X>(p.grad_x, i, Narrow<X>::from((inside ? grad : S(0)) / S(p.divisor)));
  }
};

// ---- sums in a fixed order

SNN_HD double fold(const double* lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) +
         ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// ---- mmse: squared distance to the staircase of a candidate threshold

template <class S>
SNN_HD double squared_distance(S a, S threshold, S step, S T, S fraction) {
  const S rest = a - step * clipped(floored(a * T / threshold + fraction), T);
  return double(rest) * double(rest);
}

// ---- histogram

// Never outside the table, whatever the value.
SNN_HD i64 bin_of(double value, double scale, i64 bins) {
  const double place = value * scale;
  return place < double(bins - 1) ? (place > 0 ? i64(place) : 0) : bins - 1;
}

// ---- time to first spike: the first t of 0..T-1 with a >= threshold (T - t) / T

template <class S>
SNN_HD S ttfs_level(S threshold, S remaining, S T) {
  return threshold * remaining / T;
}

// One bit of the search for the most steps remaining whose level `a` reaches; 0: no spike. Levels
// never decrease, so this is the first time.
template <class S>
SNN_HD S ttfs_search(S a, S threshold, S T, S found, S bit) {
  const S tried = found + bit;
  return (tried <= T) & (a >= ttfs_level(threshold, tried, T)) ? tried : found;
}

template <class S>
SNN_HD S ttfs_shifted(S a, S threshold, S T, bool round) {
  return round ? a + threshold / (S(2) * T) : a;
}

// The highest power of two up to T.
SNN_HD i32 highest_bit(i32 T) {
  i32 bit = 1;
  while (bit <= T / 2) bit *= 2;
  return bit;
}

template <class X>
struct TtfsDecode {
  typedef TtfsParams Params;
  typedef State<X> S;
  static SNN_HD void at(const Params& p, i64 i, S threshold) {
    const i32 T = i32(p.T);
    const i32 t = p.bytes == 1 ? i32(load_at<u8>(p.from, i)) : i32(load_at<u16>(p.from, i));
    const S remaining = S(t < T ? T - t : 0);
    store_at<X>(p.to, i, Narrow<X>::from(ttfs_level(threshold, remaining, S(p.T))));
  }
};

// ---- bit planes

// One plane: whether the rest reaches h, and what remains.
template <class S>
SNN_HD bool plane(S& rest, S h) {
  const bool set = rest >= h;
  rest = rest - (set ? h : S(0));
  return set;
}

// ---- bits

SNN_HD u32 word_at(const void* words, i64 i, i32 bytes) {
  if (bytes == 1) return load_at<u8>(words, i);
  if (bytes == 2) return load_at<u16>(words, i);
  return load_at<u32>(words, i);
}

SNN_HD void store_word(void* words, i64 i, i32 bytes, u32 word) {
  if (bytes == 1)
    store_at<u8>(words, i, u8(word));
  else if (bytes == 2)
    store_at<u16>(words, i, u16(word));
  else
    store_at<u32>(words, i, word);
}

// Of one byte: an integer. Otherwise a float, whose sign does not count.
template <class B>
SNN_HD bool nonzero(B bits) {
  return sizeof(B) == 1 ? bits != 0 : B(bits << 1) != 0;
}

}  // namespace snn
