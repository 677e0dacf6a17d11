// The CPU kernels: a block of kBlock neurons keeps its membranes in registers or L1 while t runs
// inside, so every current is read once and every spike written once. Compiled once per SIMD level
// (cpu_isa.cpp, SNN_ISA names the namespace); nothing here may depend on anything but our headers,
// or an inline function compiled for AVX-512 could be the one the linker keeps for everybody.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels_cpu_api.h"
#include "neuron.h"

namespace snn {
namespace SNN_ISA {

// Blocks ahead whose rows are prefetched into L2; into L1 is slower (measured, docs in
// CONTRIBUTING).
constexpr i64 kPrefetchBlocks = 4;

inline void prefetch(const void* row, i64 bytes) {
  for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// Stores past the caches; `to` is 64-byte aligned and bytes a multiple of 64.
inline void stream(void* to, const void* from, i64 bytes) {
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
#if defined(__AVX512F__)
  for (i64 i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(d + i), _mm512_loadu_si512(s + i));
#elif defined(__AVX__)
  for (i64 i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(d + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i)));
#elif defined(__SSE2__)
  for (i64 i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(d + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
#else
  __builtin_memcpy(d, s, bytes);
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Copies what neurons lo .. lo + n - 1 read of an operand.
template <class T>
inline void gather(T* out, const Operand& o, T number, i64 lo, i64 n) {
  const T* data = static_cast<const T*>(o.data);
  if (!data || o.count == 1) {
    const T value = data ? data[0] : number;
    for (i64 i = 0; i < n; ++i) out[i] = value;
    return;
  }
  i64 element = lo / o.inner % o.count, within = lo % o.inner;
  for (i64 i = 0; i < n; ++i) {
    out[i] = data[element];
    if (++within == o.inner) {
      within = 0;
      if (++element == o.count) element = 0;
    }
  }
}

// ---- forward
// -------------------------------------------------------------------------------------

// A full block of the plain neuron. SPIKE_BYTES 0: counts only. STREAM: spikes bypass the caches.
template <class X, int SPIKE_BYTES, bool CONSTANT, bool UNIFORM, bool STREAM>
void forward_plain(const IFForward& p, i64 lo, bool fetch) {
  typedef State<X> S;
  typedef Bits<SPIKE_BYTES ? SPIKE_BYTES : 1> B;
  alignas(64) S v[kBlock], constant[CONSTANT ? kBlock : 1];
  alignas(64) S threshold[UNIFORM ? 1 : kBlock];
  alignas(64) B amplitude[UNIFORM ? 1 : kBlock], row[STREAM ? kBlock : 1];
  alignas(64) i32 count[SPIKE_BYTES ? 1 : kBlock];
  gather(v, p.v_init, S(p.v_init.value), lo, kBlock);
  gather(threshold, p.threshold, S(p.threshold.value), lo, UNIFORM ? 1 : kBlock);
  gather(amplitude, p.amplitude, B(p.amplitude_bits), lo, UNIFORM ? 1 : kBlock);
  if (!SPIKE_BYTES)
    for (int i = 0; i < kBlock; ++i) count[i] = 0;
  const X* x = static_cast<const X*>(p.x) + lo;
  if (CONSTANT)
    for (int i = 0; i < kBlock; ++i) constant[i] = widen(x[i]);
  const S th = threshold[0];
  const B amp = amplitude[0];

  for (i64 t = 0; t < p.T; ++t) {
    if (!CONSTANT && fetch) prefetch(x + kPrefetchBlocks * kBlock, kBlock * sizeof(X));
    B* spikes = SPIKE_BYTES ? static_cast<B*>(p.spikes) + t * p.N + lo : nullptr;
    B* out = STREAM ? row : spikes;
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) {
      const S theta = UNIFORM ? th : threshold[i];
      const S m = v[i] + (CONSTANT ? constant[i] : widen(x[i]));
      const bool s = fires(m, theta, false);
      v[i] = reset_by_subtraction(m, theta, s);
      if (SPIKE_BYTES)
        out[i] = select(s, UNIFORM ? amp : amplitude[i]);
      else
        count[i] += s;
    }
    if (STREAM) stream(spikes, row, kBlock * sizeof(B));
    if (!CONSTANT) x += p.x_stride;
  }
  if (!SPIKE_BYTES)
    for (int i = 0; i < kBlock; ++i) p.count[lo + i] = count[i];
  if (p.v) {
    S* last = static_cast<S*>(p.v) + lo;
    for (int i = 0; i < kBlock; ++i) last[i] = v[i];
  }
}

// One row of the general neuron: charges and spikes (0, 1; the primitive when SMOOTH) of n neurons.
template <class X, bool SMOOTH>
inline void step_row(const X* x, const State<X>* scale, const State<X>* threshold, i32 options,
                     State<X> v_reset, i32 surrogate, State<X> alpha, i64 n, State<X>* v,
                     State<X>* charge, State<X>* spike) {
  typedef State<X> S;
  if (options & kInputScale) {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) charge[i] = widen(x[i]) * scale[i];
#pragma omp simd
    for (i64 i = 0; i < n; ++i) charge[i] = v[i] + charge[i];
  } else {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) charge[i] = v[i] + widen(x[i]);
  }
  if constexpr (SMOOTH) {
    for (i64 i = 0; i < n; ++i) {
      const Neuron<S, true> neuron = {threshold[i], v_reset, alpha, options, surrogate};
      spike[i] = neuron.spike(charge[i]);
      v[i] = options & kHardReset ? charge[i] * (S(1) - spike[i]) + v_reset * spike[i]
                                  : charge[i] - threshold[i] * spike[i];
    }
    return;
  }
  const bool strict = (options & kStrict) != 0, hard = (options & kHardReset) != 0;
  if (strict) {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) spike[i] = select(charge[i] > threshold[i], S(1));
  } else {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) spike[i] = select(charge[i] >= threshold[i], S(1));
  }
  if (hard) {
#pragma omp simd
    for (i64 i = 0; i < n; ++i) v[i] = spike[i] != S(0) ? v_reset : charge[i];
  } else {
#pragma omp simd
    for (i64 i = 0; i < n; ++i)
      v[i] = reset_by_subtraction(charge[i], threshold[i], spike[i] != S(0));
  }
}

// Amplitudes of a block, in whatever width the spikes have.
union Amplitudes {
  u8 b1[kBlock];
  u16 b2[kBlock];
  u32 b4[kBlock];
  u64 b8[kBlock];
  double real[kBlock];
};

template <class B, class S>
inline void write_spikes(const IFForward& p, const B* amp, const S* spike, i64 at, i64 n) {
  B* out = static_cast<B*>(p.spikes) + at;
#pragma omp simd
  for (i64 i = 0; i < n; ++i) out[i] = select(spike[i] != S(0), amp[i]);
}

// n <= kBlock neurons of the general neuron: every option, every output.
template <class X, bool SMOOTH>
void forward_general(const IFForward& p, i64 lo, i64 n) {
  typedef State<X> S;
  alignas(64) S v[kBlock], threshold[kBlock], scale[kBlock], charge[kBlock], spike[kBlock];
  alignas(64) Amplitudes amplitude;
  alignas(64) i32 count[kBlock];
  gather(v, p.v_init, S(p.v_init.value), lo, n);
  gather(threshold, p.threshold, S(p.threshold.value), lo, n);
  gather(scale, p.input_scale, S(p.input_scale.value), lo, n);
  switch (p.spike_bytes) {
    case 1:
      gather(amplitude.b1, p.amplitude, u8(p.amplitude_bits), lo, n);
      break;
    case 2:
      gather(amplitude.b2, p.amplitude, u16(p.amplitude_bits), lo, n);
      break;
    case 4:
      gather(amplitude.b4, p.amplitude, u32(p.amplitude_bits), lo, n);
      break;
    default:
      gather(amplitude.b8, p.amplitude, p.amplitude_bits, lo, n);
  }
  for (i64 i = 0; i < n; ++i) count[i] = 0;

  for (i64 t = 0; t < p.T; ++t) {
    const X* x = static_cast<const X*>(p.x) + t * p.x_stride + lo;
    step_row<X, SMOOTH>(x, scale, threshold, p.options, S(p.v_reset), p.surrogate, S(p.alpha), n, v,
                        charge, spike);
    const i64 at = t * p.N + lo;
    if (p.spikes) {
      if constexpr (SMOOTH) {
        double* out = static_cast<double*>(p.spikes) + at;
        for (i64 i = 0; i < n; ++i) out[i] = amplitude.real[i] * spike[i];
      } else if (p.spike_bytes == 1) {
        write_spikes(p, amplitude.b1, spike, at, n);
      } else if (p.spike_bytes == 2) {
        write_spikes(p, amplitude.b2, spike, at, n);
      } else if (p.spike_bytes == 4) {
        write_spikes(p, amplitude.b4, spike, at, n);
      } else {
        write_spikes(p, amplitude.b8, spike, at, n);
      }
    }
    for (i64 i = 0; i < n; ++i) count[i] += spike[i] != S(0);
    if (p.v_seq) __builtin_memcpy(static_cast<S*>(p.v_seq) + at, v, n * sizeof(S));
    if (p.charge_seq) __builtin_memcpy(static_cast<S*>(p.charge_seq) + at, charge, n * sizeof(S));
  }
  if (p.count) __builtin_memcpy(p.count + lo, count, n * sizeof(i32));
  if (p.v) __builtin_memcpy(static_cast<S*>(p.v) + lo, v, n * sizeof(S));
}

typedef void (*ForwardBlock)(const IFForward&, i64 lo, bool fetch);

template <class X, int SPIKE_BYTES, bool STREAM>
ForwardBlock pick_plain(const IFForward& p) {
  const bool uniform = p.threshold.count == 1 && p.amplitude.count == 1;
  if (p.x_stride == 0)
    return uniform ? forward_plain<X, SPIKE_BYTES, true, true, STREAM>
                   : forward_plain<X, SPIKE_BYTES, true, false, STREAM>;
  return uniform ? forward_plain<X, SPIKE_BYTES, false, true, STREAM>
                 : forward_plain<X, SPIKE_BYTES, false, false, STREAM>;
}

template <class X>
void forward_range(const IFForward& p, i64 first, i64 last, bool streaming) {
  const bool plain = !p.options && !p.v_seq && !p.charge_seq && (!p.spikes != !p.count) &&
                     (!p.spikes || p.spike_bytes == 1 || p.spike_bytes == int(sizeof(X)));
  ForwardBlock block = nullptr;
  if (plain && !p.spikes)
    block = pick_plain<X, 0, false>(p);
  else if (plain && p.spike_bytes == 1)
    block = streaming ? pick_plain<X, 1, true>(p) : pick_plain<X, 1, false>(p);
  else if (plain)
    block = streaming ? pick_plain<X, sizeof(X), true>(p) : pick_plain<X, sizeof(X), false>(p);

  for (i64 b = first; b < last; ++b) {
    const i64 lo = b * kBlock, n = p.N - lo < kBlock ? p.N - lo : kBlock;
    if (block && n == kBlock)
      block(p, lo, streaming && b + kPrefetchBlocks < last);
    else if (sizeof(X) == 8 && p.options & kSmooth)
      forward_general<double, true>(p, lo, n);
    else
      forward_general<X, false>(p, lo, n);
  }
  if (streaming) stream_fence();
}

// ---- backward
// ------------------------------------------------------------------------------------ Keeps
// nothing but x: membranes at every kSteps-th step go to scratch, then each chunk of steps, last
// first, is recomputed into scratch and walked back.

template <class X>
struct BackwardBlock {
  typedef State<X> S;
  alignas(64) S v[kBlock];
  alignas(64) S v_init[kBlock];
  alignas(64) S threshold[kBlock];
  alignas(64) S scale[kBlock];
  alignas(64) S amplitude[kBlock];
  alignas(64) S carry[kBlock];
  alignas(64) S grad_threshold[kBlock];
  alignas(64) S grad_amplitude[kBlock];
  alignas(64) S grad_scale[kBlock];
  alignas(64) S grad_constant[kBlock];
  alignas(64) S spike[kBlock];
  alignas(64) X row[kBlock];
};

// One row back, plain: soft reset, gradients for x and v_init. Returns through out.
template <class X, int KIND>
inline void plain_row(const IFBackward& p, i64 t, i64 lo, i64 n, const State<X>* charge,
                      BackwardBlock<X>& b, X* out) {
  typedef State<X> S;
  const S alpha = S(p.alpha);
  const X* grad = static_cast<const X*>(p.grad_spikes) + t * p.grad_stride + lo;
  const S attached = p.options & kDetachReset ? S(0) : S(1);
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const S slope = surrogate_derivative<KIND>(charge[i] - b.threshold[i], alpha);
    const S through_reset = attached * (b.carry[i] * b.threshold[i]);
    const S carry = (b.amplitude[i] * widen(grad[i]) - through_reset) * slope + b.carry[i];
    b.carry[i] = carry;
    out[i] = Narrow<X>::from(carry);
  }
}

// One row back, general: every option, every gradient.
template <class X, int KIND, bool SMOOTH>
inline void general_row(const IFBackward& p, i64 t, i64 lo, i64 n, const State<X>* charge,
                        BackwardBlock<X>& b) {
  typedef State<X> S;
  const i64 at = t * p.N + lo;
  const X* grad = static_cast<const X*>(p.grad_spikes) + t * p.grad_stride + lo;
  const S* grad_charge = static_cast<const S*>(p.grad_charge_seq) + at;
  const S rate = S(p.grad_scale);
  if (p.grad_v_seq) {
    const S* g = static_cast<const S*>(p.grad_v_seq) + at;
    for (i64 i = 0; i < n; ++i) b.carry[i] += g[i];
  }
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const Neuron<S, SMOOTH> neuron = {b.threshold[i], S(p.v_reset), S(p.alpha), p.options, KIND};
    Adjoint<S> adjoint = {b.carry[i], b.grad_threshold[i], b.grad_amplitude[i]};
    const S slope = surrogate_derivative<KIND>(charge[i] - b.threshold[i], S(p.alpha));
    adjoint.step(neuron, charge[i], p.grad_spikes ? widen(grad[i]) * rate : S(0), b.amplitude[i],
                 p.grad_charge_seq ? grad_charge[i] : S(0), slope);
    b.carry[i] = adjoint.carry;
    b.grad_threshold[i] = adjoint.grad_threshold;
    b.grad_amplitude[i] = adjoint.grad_amplitude;
  }
  const X* x = static_cast<const X*>(p.x) + t * p.x_stride + lo;
  const bool scaled = (p.options & kInputScale) != 0;
  if (scaled)
    for (i64 i = 0; i < n; ++i) b.grad_scale[i] += b.carry[i] * widen(x[i]);
  if (p.x_stride == 0) {
    for (i64 i = 0; i < n; ++i) b.grad_constant[i] += scaled ? b.carry[i] * b.scale[i] : b.carry[i];
  } else if (p.grad_x) {
    X* out = static_cast<X*>(p.grad_x) + at;
    for (i64 i = 0; i < n; ++i)
      out[i] = Narrow<X>::from(scaled ? b.carry[i] * b.scale[i] : b.carry[i]);
  }
}

template <class S>
inline void copy_out(void* to, const S* from, i64 lo, i64 n) {
  if (to) __builtin_memcpy(static_cast<S*>(to) + lo, from, n * sizeof(S));
}

template <class X, int KIND, bool SMOOTH>
void backward_block(const IFBackward& p, i64 lo, i64 n, bool plain, bool streaming, bool fetch,
                    void* scratch) {
  typedef State<X> S;
  BackwardBlock<X> b;
  gather(b.v_init, p.v_init, S(p.v_init.value), lo, n);
  gather(b.threshold, p.threshold, S(p.threshold.value), lo, n);
  gather(b.scale, p.input_scale, S(p.input_scale.value), lo, n);
  gather(b.amplitude, p.amplitude, S(p.amplitude.value), lo, n);
  if (plain)
    for (i64 i = 0; i < n; ++i) b.amplitude[i] *= S(p.grad_scale);
  for (i64 i = 0; i < n; ++i) {
    b.v[i] = b.v_init[i];
    b.carry[i] = p.grad_v ? static_cast<const S*>(p.grad_v)[lo + i] : S(0);
    b.grad_threshold[i] = b.grad_amplitude[i] = b.grad_scale[i] = b.grad_constant[i] = S(0);
  }

  S* charge = static_cast<S*>(scratch);  // [kSteps, kBlock], then membranes [chunks, kBlock]
  S* saved = charge + kSteps * kBlock;
  const i64 chunks = (p.T + kSteps - 1) / kSteps;
  const X* x = static_cast<const X*>(p.x) + lo;
  const i64 ahead = kPrefetchBlocks * kBlock;
  for (i64 c = 0; c + 1 < chunks; ++c) {
    for (i64 t = c * kSteps; t < (c + 1) * kSteps; ++t)
      step_row<X, SMOOTH>(x + t * p.x_stride, b.scale, b.threshold, p.options, S(p.v_reset), KIND,
                          S(p.alpha), n, b.v, charge, b.spike);
    __builtin_memcpy(saved + c * kBlock, b.v, n * sizeof(S));
  }
  for (i64 c = chunks - 1; c >= 0; --c) {
    const i64 t0 = c * kSteps, steps = p.T - t0 < kSteps ? p.T - t0 : kSteps;
    __builtin_memcpy(b.v, c ? saved + (c - 1) * kBlock : b.v_init, n * sizeof(S));
    for (i64 k = 0; k < steps; ++k) {
      const X* row = x + (t0 + k) * p.x_stride;
      if (fetch) prefetch(row + ahead, kBlock * sizeof(X));
      if (plain) {
        S* h = charge + k * kBlock;
#pragma omp simd
        for (i64 i = 0; i < n; ++i) {
          const S m = b.v[i] + widen(row[i]);
          h[i] = m;
          b.v[i] = reset_by_subtraction(m, b.threshold[i], fires(m, b.threshold[i], false));
        }
      } else {
        step_row<X, SMOOTH>(row, b.scale, b.threshold, p.options, S(p.v_reset), KIND, S(p.alpha), n,
                            b.v, charge + k * kBlock, b.spike);
      }
    }
    for (i64 k = steps - 1; k >= 0; --k) {
      const i64 t = t0 + k;
      if (!plain) {
        general_row<X, KIND, SMOOTH>(p, t, lo, n, charge + k * kBlock, b);
        continue;
      }
      X* out = static_cast<X*>(p.grad_x) + t * p.N + lo;
      if (fetch)
        prefetch(static_cast<const X*>(p.grad_spikes) + t * p.grad_stride + lo + ahead,
                 kBlock * sizeof(X));
      plain_row<X, KIND>(p, t, lo, n, charge + k * kBlock, b, streaming ? b.row : out);
      if (streaming) stream(out, b.row, kBlock * sizeof(X));
    }
  }
  if (p.grad_x && p.x_stride == 0)
    for (i64 i = 0; i < n; ++i)
      static_cast<X*>(p.grad_x)[lo + i] = Narrow<X>::from(b.grad_constant[i]);
  copy_out(p.grad_v_init, b.carry, lo, n);
  copy_out(p.grad_threshold, b.grad_threshold, lo, n);
  copy_out(p.grad_amplitude, b.grad_amplitude, lo, n);
  copy_out(p.grad_input_scale, b.grad_scale, lo, n);
}

template <class X, int KIND>
void backward_range(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  const bool plain = (p.options & ~kDetachReset) == 0 && p.x_stride != 0 && p.grad_spikes &&
                     p.grad_x && !p.grad_v_seq && !p.grad_charge_seq && !p.grad_threshold &&
                     !p.grad_amplitude;
  for (i64 b = first; b < last; ++b) {
    const i64 lo = b * kBlock, n = p.N - lo < kBlock ? p.N - lo : kBlock;
    const bool full = n == kBlock, fetch = streaming && b + kPrefetchBlocks < last;
    if (sizeof(X) == 8 && p.options & kSmooth)
      backward_block<double, KIND, true>(p, lo, n, false, false, false, scratch);
    else
      backward_block<X, KIND, false>(p, lo, n, plain, plain && full && streaming, fetch, scratch);
  }
  if (streaming) stream_fence();
}

template <class X>
void backward_kind(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  switch (p.surrogate) {
    case kATan:
      return backward_range<X, kATan>(p, first, last, streaming, scratch);
    case kSigmoid:
      return backward_range<X, kSigmoid>(p, first, last, streaming, scratch);
    case kTriangle:
      return backward_range<X, kTriangle>(p, first, last, streaming, scratch);
    default:
      return backward_range<X, kRectangle>(p, first, last, streaming, scratch);
  }
}

void forward(const IFForward& p, i64 first, i64 last, bool streaming) {
  switch (p.dtype) {
    case kFloat32:
      return forward_range<float>(p, first, last, streaming);
    case kFloat64:
      return forward_range<double>(p, first, last, streaming);
    case kFloat16:
      return forward_range<f16>(p, first, last, streaming);
    default:
      return forward_range<bf16>(p, first, last, streaming);
  }
}

void backward(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  switch (p.dtype) {
    case kFloat32:
      return backward_kind<float>(p, first, last, streaming, scratch);
    case kFloat64:
      return backward_kind<double>(p, first, last, streaming, scratch);
    case kFloat16:
      return backward_kind<f16>(p, first, last, streaming, scratch);
    default:
      return backward_kind<bf16>(p, first, last, streaming, scratch);
  }
}

}  // namespace SNN_ISA
}  // namespace snn
