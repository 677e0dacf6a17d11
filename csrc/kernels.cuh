// The GPU kernels: a thread owns VEC consecutive neurons and runs all T steps with their membranes
// in registers. No thread talks to another, so the same source runs on a CPU in the tests.
//
// Rows are N elements apart. VEC > 1 asks for N % VEC == 0 and 16-byte aligned rows (the planner's
// duty); then nothing has a tail. Each list of instances is closed: see launch.cu and nvrtc.py.
#pragma once
#include "neuron.h"

namespace snn {

enum { kThreads = 256, kLoadsInFlight = 4 };

#if defined(__CUDA_ARCH__)
#define SNN_UNROLL _Pragma("unroll")
#define SNN_KEEP_LOOP _Pragma("unroll 1")
#else
#define SNN_UNROLL
#define SNN_KEEP_LOOP
#endif

__device__ __forceinline__ i64 global_thread() { return i64(blockIdx.x) * kThreads + threadIdx.x; }

// VEC elements that travel as one memory transaction.
template <class T, int VEC>
union Pack {
  u32 words[(sizeof(T) * VEC + 3) / 4];
  T at[VEC];
};

// LAST: nobody reads it again, so the caches evict it first. `volatile` keeps the loads in the
// order written, so that kLoadsInFlight of them are issued before the first is used.
template <class T, int VEC, bool LAST = true>
__device__ __forceinline__ Pack<T, VEC> load(const T* p) {
  Pack<T, VEC> r;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(r) == 16 && VEC > 1 && LAST) {
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
                 : "l"(p));
  } else if constexpr (sizeof(r) == 16 && VEC > 1) {
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
                 : "l"(p));
  } else if constexpr (sizeof(r) == 8 && VEC > 1 && LAST) {
    asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];"
                 : "=r"(r.words[0]), "=r"(r.words[1])
                 : "l"(p));
  } else if constexpr (sizeof(r) == 8 && VEC > 1) {
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(r.words[0]), "=r"(r.words[1]) : "l"(p));
  } else
#endif
  {
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) r.at[i] = p[i];
  }
  return r;
}

template <class T, int VEC>
__device__ __forceinline__ void store(T* p, const Pack<T, VEC>& r) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) * VEC == 16 && VEC > 1) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(r.words[0]), "r"(r.words[1]),
                 "r"(r.words[2]), "r"(r.words[3])
                 : "memory");
  } else if constexpr (sizeof(T) * VEC == 8 && VEC > 1) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(r.words[0]), "r"(r.words[1])
                 : "memory");
  } else if constexpr (sizeof(T) * VEC == 4 && VEC > 1) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(r.words[0]) : "memory");
  } else
#endif
  {
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) p[i] = r.at[i];
  }
}

// a / b for a >= 0, b > 0. 64-bit division is a subroutine call whose saved registers spill, so the
// rare case (beyond 2^32 neurons) subtracts shifted divisors instead.
__device__ __forceinline__ i64 divide(i64 a, i64 b) {
  if (!(u64(a | b) >> 32)) return i64(u32(a) / u32(b));
  u64 rest = 0, quotient = 0;
  SNN_KEEP_LOOP
  for (int bit = 63; bit >= 0; --bit) {
    rest = rest << 1 | (u64(a) >> bit & 1);
    quotient <<= 1;
    if (rest >= u64(b)) {
      rest -= u64(b);
      quotient |= 1;
    }
  }
  return i64(quotient);
}

// The element of an operand's array that neuron n reads.
__device__ __forceinline__ i64 element(const Operand& o, i64 n) {
  if (o.count == 1) return 0;
  const i64 q = divide(n, o.inner);
  return q - divide(q, o.count) * o.count;
}

template <class S>
__device__ __forceinline__ S read(const Operand& o, i64 n) {
  return o.data ? static_cast<const S*>(o.data)[element(o, n)] : S(o.value);
}

// Walks the elements of an Operand that consecutive neurons read; two divisions at the start only.
template <class T>
struct Cursor {
  const T* data;
  i64 inner, count, i, r;

  __device__ __forceinline__ Cursor(const Operand& o, i64 n)
      : data(static_cast<const T*>(o.data)), inner(o.inner), count(o.count), i(0), r(0) {
    if (!data || count == 1) return;
    const i64 q = divide(n, inner);
    r = n - q * inner;
    i = q - divide(q, count) * count;
  }

  __device__ __forceinline__ T next(T number) {
    if (!data) return number;
    const T value = data[i];
    if (++r >= inner) {
      r = 0;
      if (++i >= count) i = 0;
    }
    return value;
  }
};

template <class S>
__device__ __forceinline__ S first(const Operand& o) {
  return o.data ? *static_cast<const S*>(o.data) : S(o.value);
}

template <class B>
__device__ __forceinline__ B first_bits(const Operand& o, u64 number) {
  return o.data ? *static_cast<const B*>(o.data) : B(number);
}

// ---- forward, plain: soft reset, fire at >=, no traces -----------------------------------------

// UNIFORM: threshold and amplitude are the same for all neurons. CONSTANT: x is [N].
template <class X, int SPIKE_BYTES, int VEC, bool CONSTANT, bool UNIFORM>
__global__ void __launch_bounds__(kThreads) if_forward(IFForward p) {
  typedef State<X> S;
  typedef Bits<SPIKE_BYTES> B;
  const i64 n = global_thread() * VEC;
  if (n >= p.N) return;

  S v[VEC], threshold[UNIFORM ? 1 : VEC];
  B amplitude[UNIFORM ? 1 : VEC];
  i32 count[VEC];
  Cursor<S> v_init(p.v_init, n);
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i) {
    v[i] = v_init.next(S(p.v_init.value));
    count[i] = 0;
  }
  if constexpr (UNIFORM) {
    threshold[0] = first<S>(p.threshold);
    amplitude[0] = first_bits<B>(p.amplitude, p.amplitude_bits);
  } else {
    Cursor<S> th(p.threshold, n);
    Cursor<B> amp(p.amplitude, n);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      threshold[i] = th.next(S(p.threshold.value));
      amplitude[i] = amp.next(B(p.amplitude_bits));
    }
  }

  const X* x = static_cast<const X*>(p.x) + n;
  B* spikes = p.spikes ? static_cast<B*>(p.spikes) + n : nullptr;
  Pack<X, VEC> loaded[CONSTANT ? 1 : kLoadsInFlight];
  if constexpr (CONSTANT) loaded[0] = load<X, VEC>(x);

  for (i64 t0 = 0; t0 < p.T; t0 += kLoadsInFlight) {
    if constexpr (!CONSTANT) {
      SNN_UNROLL
      for (int k = 0; k < kLoadsInFlight; ++k)
        if (t0 + k < p.T) loaded[k] = load<X, VEC>(x + (t0 + k) * p.N);
    }
    SNN_UNROLL
    for (int k = 0; k < kLoadsInFlight; ++k) {
      if (t0 + k >= p.T) break;
      Pack<B, VEC> out;
      SNN_UNROLL
      for (int i = 0; i < VEC; ++i) {
        const S th = threshold[UNIFORM ? 0 : i];
        const S m = v[i] + widen(loaded[CONSTANT ? 0 : k].at[i]);
        const bool s = fires(m, th, false);
        v[i] = reset_by_subtraction(m, th, s);
        count[i] += s;
        out.at[i] = select(s, amplitude[UNIFORM ? 0 : i]);
      }
      if (spikes) store<B, VEC>(spikes + (t0 + k) * p.N, out);
    }
  }
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i) {
    if (p.count) p.count[n + i] = count[i];
    if (p.v) static_cast<S*>(p.v)[n + i] = v[i];
  }
}

// ---- forward, general: every option, one neuron per thread --------------------------------------

__device__ __forceinline__ void store_spike(void* spikes, i64 at, i32 bytes, u64 bits) {
  switch (bytes) {
    case 1:
      static_cast<u8*>(spikes)[at] = u8(bits);
      break;
    case 2:
      static_cast<u16*>(spikes)[at] = u16(bits);
      break;
    case 4:
      static_cast<u32*>(spikes)[at] = u32(bits);
      break;
    default:
      static_cast<u64*>(spikes)[at] = bits;
  }
}

__device__ __forceinline__ u64 amplitude_of(const IFForward& p, i64 n) {
  if (!p.amplitude.data) return p.amplitude_bits;
  const i64 at = element(p.amplitude, n);
  switch (p.spike_bytes) {
    case 1:
      return static_cast<const u8*>(p.amplitude.data)[at];
    case 2:
      return static_cast<const u16*>(p.amplitude.data)[at];
    case 4:
      return static_cast<const u32*>(p.amplitude.data)[at];
    default:
      return static_cast<const u64*>(p.amplitude.data)[at];
  }
}

__device__ __forceinline__ double double_from_bits(u64 bits) {
  union {
    u64 u;
    double d;
  } r;
  r.u = bits;
  return r.d;
}

__device__ __forceinline__ u64 bits_from_double(double d) {
  union {
    double d;
    u64 u;
  } r;
  r.d = d;
  return r.u;
}

template <class X, bool SMOOTH, class Params>
__device__ __forceinline__ Neuron<State<X>, SMOOTH> neuron_of(const Params& p, i64 n) {
  typedef State<X> S;
  Neuron<S, SMOOTH> neuron;
  neuron.threshold = read<S>(p.threshold, n);
  neuron.v_reset = S(p.v_reset);
  neuron.alpha = S(p.alpha);
  neuron.options = p.options;
  neuron.surrogate = p.surrogate;
  return neuron;
}

template <class X, bool SMOOTH>
__global__ void __launch_bounds__(kThreads) if_forward_general(IFForward p) {
  typedef State<X> S;
  const i64 n = global_thread();
  if (n >= p.N) return;
  const Neuron<S, SMOOTH> neuron = neuron_of<X, SMOOTH>(p, n);
  const u64 amplitude = amplitude_of(p, n);
  const bool scaled = (p.options & kInputScale) != 0;
  const S scale = read<S>(p.input_scale, n);
  S v = read<S>(p.v_init, n);
  i32 count = 0;
  SNN_KEEP_LOOP
  for (i64 t = 0; t < p.T; ++t) {
    S current = widen(static_cast<const X*>(p.x)[t * p.x_stride + n]);
    if (scaled) current = current * scale;
    S charge;
    const S s = neuron.step(v, current, &charge);
    count += s != S(0);
    const i64 at = t * p.N + n;
    if (p.spikes) {
      const u64 bits =
          SMOOTH ? bits_from_double(double_from_bits(amplitude) * s) : select(s != S(0), amplitude);
      store_spike(p.spikes, at, p.spike_bytes, bits);
    }
    if (p.v_seq) static_cast<S*>(p.v_seq)[at] = v;
    if (p.charge_seq) static_cast<S*>(p.charge_seq)[at] = charge;
  }
  if (p.count) p.count[n] = count;
  if (p.v) static_cast<S*>(p.v)[n] = v;
}

// ---- backward
//
// Keeps nothing but x: a first walk leaves the membrane at every kChunk-th step in scratch, then
// each chunk, last first, is recomputed into registers and walked back.

// Plain: soft reset, fire at >=, x is [T, N], gradients for x and v_init.
template <class X, int KIND, int VEC>
__global__ void __launch_bounds__(kThreads) if_backward(IFBackward p) {
  typedef State<X> S;
  const i64 n = global_thread() * VEC;
  if (n >= p.N) return;
  const bool detach = (p.options & kDetachReset) != 0;
  const X* x = static_cast<const X*>(p.x) + n;
  const X* grad_spikes = p.grad_spikes ? static_cast<const X*>(p.grad_spikes) + n : nullptr;
  X* grad_x = p.grad_x ? static_cast<X*>(p.grad_x) + n : nullptr;
  S* scratch = static_cast<S*>(p.scratch) + n;

  S v[VEC], v_init[VEC], threshold[VEC], amplitude[VEC], carry[VEC];
  Cursor<S> init(p.v_init, n), th(p.threshold, n), amp(p.amplitude, n);
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i) {
    v[i] = v_init[i] = init.next(S(p.v_init.value));
    threshold[i] = th.next(S(p.threshold.value));
    amplitude[i] = amp.next(S(p.amplitude.value)) * S(p.grad_scale);
    carry[i] = p.grad_v ? static_cast<const S*>(p.grad_v)[n + i] : S(0);
  }

  const i64 last_chunk = (p.T - 1) / kChunk;
  for (i64 c = 0; c < last_chunk; ++c) {
    Pack<X, VEC> loaded[kChunk];
    SNN_UNROLL
    for (int k = 0; k < kChunk; ++k) loaded[k] = load<X, VEC, false>(x + (c * kChunk + k) * p.N);
    SNN_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      SNN_UNROLL
      for (int i = 0; i < VEC; ++i) {
        const S m = v[i] + widen(loaded[k].at[i]);
        v[i] = reset_by_subtraction(m, threshold[i], fires(m, threshold[i], false));
      }
    }
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) scratch[c * p.N + i] = v[i];
  }

  for (i64 c = last_chunk; c >= 0; --c) {
    const i64 t0 = c * kChunk;
    S charge[kChunk][VEC];
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) v[i] = c ? scratch[(c - 1) * p.N + i] : v_init[i];
    SNN_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      if (t0 + k >= p.T) break;
      const Pack<X, VEC> loaded = load<X, VEC>(x + (t0 + k) * p.N);
      SNN_UNROLL
      for (int i = 0; i < VEC; ++i) {
        const S m = v[i] + widen(loaded.at[i]);
        charge[k][i] = m;
        v[i] = reset_by_subtraction(m, threshold[i], fires(m, threshold[i], false));
      }
    }
    SNN_UNROLL
    for (int k = kChunk - 1; k >= 0; --k) {
      if (t0 + k >= p.T) continue;
      Pack<X, VEC> grad, out;
      if (grad_spikes) grad = load<X, VEC>(grad_spikes + (t0 + k) * p.grad_stride);
      SNN_UNROLL
      for (int i = 0; i < VEC; ++i) {
        const S g = grad_spikes ? amplitude[i] * widen(grad.at[i]) : S(0);
        const S through_reset = detach ? S(0) : carry[i] * threshold[i];
        const S slope = surrogate_derivative<KIND>(charge[k][i] - threshold[i], S(p.alpha));
        carry[i] = (g - through_reset) * slope + carry[i];
        out.at[i] = Narrow<X>::from(carry[i]);
      }
      if (grad_x) store<X, VEC>(grad_x + (t0 + k) * p.N, out);
    }
  }
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i)
    if (p.grad_v_init) static_cast<S*>(p.grad_v_init)[n + i] = carry[i];
}

// SMOOTH: the differentiable twin of neuron.h, double only.
template <class X, bool SMOOTH>
__global__ void __launch_bounds__(kThreads) if_backward_general(IFBackward p) {
  typedef State<X> S;
  const i64 n = global_thread();
  if (n >= p.N) return;
  const Neuron<S, SMOOTH> neuron = neuron_of<X, SMOOTH>(p, n);
  const S amplitude = read<S>(p.amplitude, n);
  const bool scaled = (p.options & kInputScale) != 0;
  const S scale = read<S>(p.input_scale, n);
  const S v_init = read<S>(p.v_init, n);
  const X* x = static_cast<const X*>(p.x) + n;
  S* scratch = static_cast<S*>(p.scratch) + n;

  const i64 last_chunk = (p.T - 1) / kChunk;
  S v = v_init;
  for (i64 t = 0; t < last_chunk * kChunk; ++t) {
    S current = widen(x[t * p.x_stride]), charge;
    if (scaled) current = current * scale;
    neuron.step(v, current, &charge);
    if (t % kChunk == kChunk - 1) scratch[t / kChunk * p.N] = v;
  }

  Adjoint<S> adjoint = {p.grad_v ? static_cast<const S*>(p.grad_v)[n] : S(0), S(0), S(0)};
  S grad_constant = S(0), grad_scale = S(0);
  for (i64 c = last_chunk; c >= 0; --c) {
    const i64 t0 = c * kChunk;
    S charges[kChunk];
    v = c ? scratch[(c - 1) * p.N] : v_init;
    SNN_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      if (t0 + k >= p.T) break;
      S current = widen(x[(t0 + k) * p.x_stride]);
      if (scaled) current = current * scale;
      neuron.step(v, current, &charges[k]);
    }
    SNN_UNROLL
    for (int k = kChunk - 1; k >= 0; --k) {
      if (t0 + k >= p.T) continue;
      const i64 t = t0 + k, at = t * p.N + n;
      const S grad_out =
          p.grad_spikes
              ? widen(static_cast<const X*>(p.grad_spikes)[t * p.grad_stride + n]) * S(p.grad_scale)
              : S(0);
      const S grad_charge = p.grad_charge_seq ? static_cast<const S*>(p.grad_charge_seq)[at] : S(0);
      if (p.grad_v_seq) adjoint.carry += static_cast<const S*>(p.grad_v_seq)[at];
      const S slope =
          surrogate_derivative(neuron.surrogate, charges[k] - neuron.threshold, neuron.alpha);
      adjoint.step(neuron, charges[k], grad_out, amplitude, grad_charge, slope);
      const S grad_current = adjoint.carry;
      if (scaled) grad_scale += grad_current * widen(x[t * p.x_stride]);
      const S grad_x = scaled ? grad_current * scale : grad_current;
      if (p.x_stride == 0)
        grad_constant += grad_x;
      else if (p.grad_x)
        static_cast<X*>(p.grad_x)[at] = Narrow<X>::from(grad_x);
    }
  }
  if (p.grad_x && p.x_stride == 0) static_cast<X*>(p.grad_x)[n] = Narrow<X>::from(grad_constant);
  if (p.grad_v_init) static_cast<S*>(p.grad_v_init)[n] = adjoint.carry;
  if (p.grad_threshold) static_cast<S*>(p.grad_threshold)[n] = adjoint.grad_threshold;
  if (p.grad_amplitude) static_cast<S*>(p.grad_amplitude)[n] = adjoint.grad_amplitude;
  if (p.grad_input_scale) static_cast<S*>(p.grad_input_scale)[n] = grad_scale;
}

}  // namespace snn
