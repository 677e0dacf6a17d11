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

// What the block of neurons that starts at lo reads of an operand. Past the last neuron the walk
// wraps around, which stays inside the array.
template <class T>
inline void gather(T* out, const Operand& o, T number, i64 lo) {
  const T* data = static_cast<const T*>(o.data);
  if (!data || o.count == 1) {
    const T value = data ? data[0] : number;
    for (i64 i = 0; i < kBlock; ++i) out[i] = value;
    return;
  }
  i64 element = lo / o.inner % o.count, within = lo % o.inner;
  for (i64 i = 0; i < kBlock; ++i) {
    out[i] = data[element];
    if (++within == o.inner) {
      within = 0;
      if (++element == o.count) element = 0;
    }
  }
}

// Loops run over whole blocks, whose length the compiler knows: the rows of the last, partial block
// are read through a padded copy and written back from one.
template <class T>
struct Row {
  alignas(64) T at[kBlock] = {};

  const T* read(const T* row, i64 n) {
    if (n == kBlock) return row;
    __builtin_memcpy(at, row, n * sizeof(T));
    return at;
  }
};

template <class T>
inline void write(void* to, const T* from, i64 lo, i64 n) {
  if (to) __builtin_memcpy(static_cast<T*>(to) + lo, from, n * sizeof(T));
}

// ---- forward

// The plain neuron. SPIKE_BYTES 0: counts only. STREAM: spikes of full blocks bypass the caches.
template <class X, int SPIKE_BYTES, bool CONSTANT, bool UNIFORM, bool STREAM>
void forward_plain(const IFForward& p, i64 lo, i64 n, bool fetch) {
  typedef State<X> S;
  typedef Bits<SPIKE_BYTES ? SPIKE_BYTES : 1> B;
  alignas(64) S v[kBlock], threshold[kBlock], constant[kBlock];
  alignas(64) B amplitude[kBlock], buffer[kBlock];
  alignas(64) i32 count[kBlock];
  Row<X> padded;
  gather(v, p.v_init, S(p.v_init.value), lo);
  gather(threshold, p.threshold, S(p.threshold.value), lo);
  gather(amplitude, p.amplitude, B(p.amplitude_bits), lo);
  if (!SPIKE_BYTES)
    for (i64 i = 0; i < kBlock; ++i) count[i] = 0;
  const X* x = static_cast<const X*>(p.x) + lo;
  if (CONSTANT) {
    const X* row = padded.read(x, n);
    for (i64 i = 0; i < kBlock; ++i) constant[i] = widen(row[i]);
  }
  const S th = threshold[0];
  const B amp = amplitude[0];
  const bool full = n == kBlock;

  for (i64 t = 0; t < p.T; ++t) {
    if (!CONSTANT && fetch) prefetch(x + kPrefetchBlocks * kBlock, kBlock * sizeof(X));
    const X* row = CONSTANT ? x : padded.read(x, n);
    B* spikes = SPIKE_BYTES ? static_cast<B*>(p.spikes) + t * p.N + lo : nullptr;
    B* out = STREAM || !full ? buffer : spikes;
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) {
      const S theta = UNIFORM ? th : threshold[i];
      const S m = v[i] + (CONSTANT ? constant[i] : widen(row[i]));
      const bool s = fires(m, theta, false);
      v[i] = reset_by_subtraction(m, theta, s);
      if (SPIKE_BYTES)
        out[i] = select(s, UNIFORM ? amp : amplitude[i]);
      else
        count[i] += s;
    }
    if (SPIKE_BYTES && STREAM && full)
      stream(spikes, buffer, kBlock * sizeof(B));
    else if (SPIKE_BYTES && !full)
      __builtin_memcpy(spikes, buffer, n * sizeof(B));
    if (!CONSTANT) x += p.x_stride;
  }
  if (!SPIKE_BYTES) write(p.count, count, lo, n);
  write(p.v, v, lo, n);
}

// One row of the general neuron: charges and spikes (0, 1; the primitive when SMOOTH) of a block.
template <class X, bool SMOOTH>
inline void step_row(const X* x, const State<X>* scale, const State<X>* threshold, i32 options,
                     State<X> v_reset, i32 surrogate, State<X> alpha, State<X>* v, State<X>* charge,
                     State<X>* spike) {
  typedef State<X> S;
  if (options & kInputScale) {
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) charge[i] = widen(x[i]) * scale[i];
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) charge[i] = v[i] + charge[i];
  } else {
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) charge[i] = v[i] + widen(x[i]);
  }
  if constexpr (SMOOTH) {
    for (i64 i = 0; i < kBlock; ++i) {
      const Neuron<S, true> neuron = {threshold[i], v_reset, alpha, options, surrogate};
      spike[i] = neuron.spike(charge[i]);
      v[i] = options & kHardReset ? charge[i] * (S(1) - spike[i]) + v_reset * spike[i]
                                  : charge[i] - threshold[i] * spike[i];
    }
    return;
  }
  if (options & kStrict) {
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) spike[i] = select(charge[i] > threshold[i], S(1));
  } else {
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) spike[i] = select(charge[i] >= threshold[i], S(1));
  }
  if (options & kHardReset) {
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i) v[i] = spike[i] != S(0) ? v_reset : charge[i];
  } else {
#pragma omp simd
    for (i64 i = 0; i < kBlock; ++i)
      v[i] = reset_by_subtraction(charge[i], threshold[i], spike[i] != S(0));
  }
}

// A row of spikes, or the amplitudes of a block, in whatever width the spikes have.
union Elements {
  u8 b1[kBlock];
  u16 b2[kBlock];
  u32 b4[kBlock];
  u64 b8[kBlock];
  double real[kBlock];
};

template <class B, class S>
inline void spike_row(B* out, const B* amplitude, const S* spike) {
#pragma omp simd
  for (i64 i = 0; i < kBlock; ++i) out[i] = select(spike[i] != S(0), amplitude[i]);
}

// The general neuron: every option, every output.
template <class X, bool SMOOTH>
void forward_general(const IFForward& p, i64 lo, i64 n) {
  typedef State<X> S;
  alignas(64) S v[kBlock], threshold[kBlock], scale[kBlock], charge[kBlock], spike[kBlock];
  alignas(64) Elements amplitude, out;
  alignas(64) i32 count[kBlock] = {};
  Row<X> padded;
  gather(v, p.v_init, S(p.v_init.value), lo);
  gather(threshold, p.threshold, S(p.threshold.value), lo);
  gather(scale, p.input_scale, S(p.input_scale.value), lo);
  switch (p.spike_bytes) {
    case 1:
      gather(amplitude.b1, p.amplitude, u8(p.amplitude_bits), lo);
      break;
    case 2:
      gather(amplitude.b2, p.amplitude, u16(p.amplitude_bits), lo);
      break;
    case 4:
      gather(amplitude.b4, p.amplitude, u32(p.amplitude_bits), lo);
      break;
    default:
      gather(amplitude.b8, p.amplitude, p.amplitude_bits, lo);
  }

  for (i64 t = 0; t < p.T; ++t) {
    const X* x = padded.read(static_cast<const X*>(p.x) + t * p.x_stride + lo, n);
    step_row<X, SMOOTH>(x, scale, threshold, p.options, S(p.v_reset), p.surrogate, S(p.alpha), v,
                        charge, spike);
    const i64 at = t * p.N + lo;
    if (p.spikes) {
      if constexpr (SMOOTH)
        for (i64 i = 0; i < kBlock; ++i) out.real[i] = amplitude.real[i] * spike[i];
      else if (p.spike_bytes == 1)
        spike_row(out.b1, amplitude.b1, spike);
      else if (p.spike_bytes == 2)
        spike_row(out.b2, amplitude.b2, spike);
      else if (p.spike_bytes == 4)
        spike_row(out.b4, amplitude.b4, spike);
      else
        spike_row(out.b8, amplitude.b8, spike);
      write(p.spikes, out.b1, at * p.spike_bytes, n * p.spike_bytes);
    }
    for (i64 i = 0; i < kBlock; ++i) count[i] += spike[i] != S(0);
    write(p.v_seq, v, at, n);
    write(p.charge_seq, charge, at, n);
  }
  write(p.count, count, lo, n);
  write(p.v, v, lo, n);
}

typedef void (*ForwardBlock)(const IFForward&, i64 lo, i64 n, bool fetch);

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
    if (block)
      block(p, lo, n, streaming && b + kPrefetchBlocks < last);
    else if (sizeof(X) == 8 && p.options & kSmooth)
      forward_general<double, true>(p, lo, n);
    else
      forward_general<X, false>(p, lo, n);
  }
  if (streaming) stream_fence();
}

// ---- backward
//
// Keeps nothing but x: membranes at every kSteps-th step go to scratch, then each chunk of steps,
// last first, is recomputed into scratch and walked back.

template <class X>
struct BackwardBlock {
  typedef State<X> S;
  alignas(64) S v[kBlock];
  alignas(64) S v_init[kBlock];
  alignas(64) S threshold[kBlock];
  alignas(64) S scale[kBlock];
  alignas(64) S amplitude[kBlock];
  alignas(64) S spike[kBlock];
  alignas(64) S carry[kBlock] = {};
  alignas(64) S grad_threshold[kBlock] = {};
  alignas(64) S grad_amplitude[kBlock] = {};
  alignas(64) S grad_scale[kBlock] = {};
  alignas(64) S grad_constant[kBlock] = {};
  alignas(64) X out[kBlock];
  Row<X> x, grad;
  Row<S> trace;

  BackwardBlock(const IFBackward& p, i64 lo, i64 n) {
    gather(v_init, p.v_init, S(p.v_init.value), lo);
    gather(threshold, p.threshold, S(p.threshold.value), lo);
    gather(scale, p.input_scale, S(p.input_scale.value), lo);
    gather(amplitude, p.amplitude, S(p.amplitude.value), lo);
    __builtin_memcpy(v, v_init, sizeof v);
    if (p.grad_v) __builtin_memcpy(carry, static_cast<const S*>(p.grad_v) + lo, n * sizeof(S));
  }
};

// One row forward again, plain.
template <class X>
inline void plain_charge(const X* x, const State<X>* threshold, State<X>* v, State<X>* charge) {
  typedef State<X> S;
#pragma omp simd
  for (i64 i = 0; i < kBlock; ++i) {
    const S m = v[i] + widen(x[i]);
    charge[i] = m;
    v[i] = reset_by_subtraction(m, threshold[i], fires(m, threshold[i], false));
  }
}

// One row back, plain: soft reset, gradients for x and v_init. `attached` is 0 to detach the reset.
template <class X, int KIND>
inline void plain_row(const X* grad, const State<X>* charge, const State<X>* threshold,
                      const State<X>* amplitude, State<X> alpha, State<X> attached,
                      State<X>* carries, X* out) {
  typedef State<X> S;
#pragma omp simd
  for (i64 i = 0; i < kBlock; ++i) {
    const S slope = surrogate_derivative<KIND>(charge[i] - threshold[i], alpha);
    const S through_reset = attached * (carries[i] * threshold[i]);
    const S carry = (amplitude[i] * widen(grad[i]) - through_reset) * slope + carries[i];
    carries[i] = carry;
    out[i] = Narrow<X>::from(carry);
  }
}

// One row back, general: every option, every gradient.
template <class X, int KIND, bool SMOOTH>
inline void general_row(const IFBackward& p, i64 t, i64 lo, i64 n, const State<X>* charge,
                        BackwardBlock<X>& b) {
  typedef State<X> S;
  const i64 at = t * p.N + lo;
  alignas(64) S grad_out[kBlock], grad_charge[kBlock];
  if (p.grad_v_seq) {
    const S* g = b.trace.read(static_cast<const S*>(p.grad_v_seq) + at, n);
    for (i64 i = 0; i < kBlock; ++i) b.carry[i] += g[i];
  }
  if (p.grad_spikes) {
    const X* g = b.grad.read(static_cast<const X*>(p.grad_spikes) + t * p.grad_stride + lo, n);
    for (i64 i = 0; i < kBlock; ++i) grad_out[i] = widen(g[i]) * S(p.grad_scale);
  } else {
    for (i64 i = 0; i < kBlock; ++i) grad_out[i] = S(0);
  }
  if (p.grad_charge_seq) {
    const S* g = b.trace.read(static_cast<const S*>(p.grad_charge_seq) + at, n);
    for (i64 i = 0; i < kBlock; ++i) grad_charge[i] = g[i];
  } else {
    for (i64 i = 0; i < kBlock; ++i) grad_charge[i] = S(0);
  }
  const S v_reset = S(p.v_reset), alpha = S(p.alpha);
  const i32 options = p.options;
#pragma omp simd
  for (i64 i = 0; i < kBlock; ++i) {
    const Neuron<S, SMOOTH> neuron = {b.threshold[i], v_reset, alpha, options, KIND};
    Adjoint<S> adjoint = {b.carry[i], b.grad_threshold[i], b.grad_amplitude[i]};
    const S slope = surrogate_derivative<KIND>(charge[i] - b.threshold[i], alpha);
    adjoint.step(neuron, charge[i], grad_out[i], b.amplitude[i], grad_charge[i], slope);
    b.carry[i] = adjoint.carry;
    b.grad_threshold[i] = adjoint.grad_threshold;
    b.grad_amplitude[i] = adjoint.grad_amplitude;
  }
  const S* grad_x = b.carry;
  if (options & kInputScale) {
    const X* x = b.x.read(static_cast<const X*>(p.x) + t * p.x_stride + lo, n);
    for (i64 i = 0; i < kBlock; ++i) {
      b.grad_scale[i] += b.carry[i] * widen(x[i]);
      grad_out[i] = b.carry[i] * b.scale[i];
    }
    grad_x = grad_out;
  }
  if (p.x_stride == 0) {
    for (i64 i = 0; i < kBlock; ++i) b.grad_constant[i] += grad_x[i];
  } else {
    for (i64 i = 0; i < kBlock; ++i) b.out[i] = Narrow<X>::from(grad_x[i]);
    write(p.grad_x, b.out, at, n);
  }
}

template <class X, int KIND, bool SMOOTH>
void backward_block(const IFBackward& p, i64 lo, i64 n, bool plain, bool streaming, bool fetch,
                    void* scratch) {
  typedef State<X> S;
  BackwardBlock<X> b(p, lo, n);
  if (plain)
    for (i64 i = 0; i < kBlock; ++i) b.amplitude[i] *= S(p.grad_scale);
  const S alpha = S(p.alpha), attached = S(p.options & kDetachReset ? 0 : 1);
  S* charge = static_cast<S*>(scratch);  // [kSteps, kBlock], then membranes [chunks, kBlock]
  S* saved = charge + kSteps * kBlock;
  const i64 chunks = (p.T + kSteps - 1) / kSteps, ahead = kPrefetchBlocks * kBlock;
  const bool full = n == kBlock;
  const X* x = static_cast<const X*>(p.x) + lo;
  const auto forward = [&](i64 t, S* charges) {
    const X* row = x + t * p.x_stride;
    if (fetch) prefetch(row + ahead, kBlock * sizeof(X));
    row = b.x.read(row, n);
    if (plain)
      plain_charge<X>(row, b.threshold, b.v, charges);
    else
      step_row<X, SMOOTH>(row, b.scale, b.threshold, p.options, S(p.v_reset), KIND, alpha, b.v,
                          charges, b.spike);
  };

  for (i64 c = 0; c + 1 < chunks; ++c) {
    for (i64 t = c * kSteps; t < (c + 1) * kSteps; ++t) forward(t, charge);
    __builtin_memcpy(saved + c * kBlock, b.v, sizeof b.v);
  }
  for (i64 c = chunks - 1; c >= 0; --c) {
    const i64 t0 = c * kSteps, steps = p.T - t0 < kSteps ? p.T - t0 : kSteps;
    __builtin_memcpy(b.v, c ? saved + (c - 1) * kBlock : b.v_init, sizeof b.v);
    for (i64 k = 0; k < steps; ++k) forward(t0 + k, charge + k * kBlock);
    for (i64 k = steps - 1; k >= 0; --k) {
      const i64 t = t0 + k;
      if (!plain) {
        general_row<X, KIND, SMOOTH>(p, t, lo, n, charge + k * kBlock, b);
        continue;
      }
      const X* grad = static_cast<const X*>(p.grad_spikes) + t * p.grad_stride + lo;
      X* grad_x = static_cast<X*>(p.grad_x) + t * p.N + lo;
      if (fetch) prefetch(grad + ahead, kBlock * sizeof(X));
      plain_row<X, KIND>(b.grad.read(grad, n), charge + k * kBlock, b.threshold, b.amplitude, alpha,
                         attached, b.carry, streaming || !full ? b.out : grad_x);
      if (streaming && full)
        stream(grad_x, b.out, kBlock * sizeof(X));
      else if (!full)
        __builtin_memcpy(grad_x, b.out, n * sizeof(X));
    }
  }
  if (p.x_stride == 0) {
    for (i64 i = 0; i < kBlock; ++i) b.out[i] = Narrow<X>::from(b.grad_constant[i]);
    write(p.grad_x, b.out, lo, n);
  }
  write(p.grad_v_init, b.carry, lo, n);
  write(p.grad_threshold, b.grad_threshold, lo, n);
  write(p.grad_amplitude, b.grad_amplitude, lo, n);
  write(p.grad_input_scale, b.grad_scale, lo, n);
}

template <class X, int KIND>
void backward_range(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  const bool plain = (p.options & ~kDetachReset) == 0 && p.x_stride != 0 && p.grad_spikes &&
                     p.grad_x && !p.grad_v_seq && !p.grad_charge_seq && !p.grad_threshold &&
                     !p.grad_amplitude;
  for (i64 b = first; b < last; ++b) {
    const i64 lo = b * kBlock, n = p.N - lo < kBlock ? p.N - lo : kBlock;
    const bool fetch = streaming && b + kPrefetchBlocks < last;
    if (sizeof(X) == 8 && p.options & kSmooth)
      backward_block<double, KIND, true>(p, lo, n, false, false, false, scratch);
    else
      backward_block<X, KIND, false>(p, lo, n, plain, streaming, fetch, scratch);
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
