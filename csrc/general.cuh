// Every option and every output, one neuron per thread: branches that are the same for all threads.
#pragma once
#include "gpu.cuh"

namespace snn {

template <class S, bool SMOOTH>
__device__ __forceinline__ void set(Neuron<S, SMOOTH>& neuron, const Operand& threshold,
                                    const Operand& fire_level, const Operand& beta, i32 options,
                                    double alpha, double scale, double v_reset, double v_min,
                                    i32 max_spikes, i64 n) {
  neuron.threshold = read<S>(threshold, n);
  neuron.fire_level = options & kFireLevel ? read<S>(fire_level, n) : neuron.threshold;
  neuron.beta = options & kBeta ? read<S>(beta, n) : S(1);
  neuron.v_reset = S(v_reset);
  neuron.alpha = S(alpha);
  neuron.scale = S(scale);
  neuron.v_min = v_min;
  neuron.max_spikes = S(max_spikes);
  neuron.options = options;
}

// What enters a neuron in a step.
template <class X>
struct Current {
  State<X> scale, bias;
  bool scaled, biased;

  __device__ __forceinline__ Current(const Operand& input_scale, const Operand& bias_, i32 options,
                                     i64 n)
      : scale(0), bias(0), scaled((options & kInputScale) != 0), biased((options & kBias) != 0) {
    if (scaled) scale = read<State<X>>(input_scale, n);
    if (biased) bias = read<State<X>>(bias_, n);
  }

  __device__ __forceinline__ State<X> operator()(State<X> x) const {
    if (scaled) x = x * scale;
    if (biased) x = x + bias;
    return x;
  }
};

template <class X>
union Element {
  Bits<sizeof(X)> bits;
  X x;
  __device__ __forceinline__ Element() {}
};

// Where the spikes of a neuron go.
template <class X, bool SMOOTH>
struct Emitter {
  typedef State<X> S;
  const IFGeneral& p;
  const i64 n;
  Element<X> amplitude;
  i64 at;  // of this step in arrays of rows out_rows
  u32 word;
  i32 count;
  i32 next;  // of count_at
  bool silent;

  __device__ __forceinline__ Emitter(const IFGeneral& given, i64 neuron, const Place& place)
      : p(given), n(neuron), at(place.in(p.base.out_rows)), word(0), count(0), next(0) {
    typedef Bits<sizeof(X)> B;
    // 1-byte spikes weigh 1; their bits are the number's.
    amplitude.bits = p.base.spike_bytes == int(sizeof(X))
                         ? read_bits<B>(p.base.amplitude, n, p.base.amplitude_bits)
                         : B(p.base.amplitude_bits);
    silent = (p.options & kMask) && p.mask[n] == 0;
  }

  // k spikes at step t, which is the `since`-th whose counts are reported (0: not yet).
  __device__ __forceinline__ void emit(i64 t, i64 since, S k) {
    if (silent) k = S(0);
    count += SMOOTH ? i32(k != S(0)) : i32(k);
    while (since && next < p.count_times && p.count_at[next] == since) {
      if (p.counts) p.counts[next * p.base.N + n] = count;
      ++next;
    }
    if (p.base.spikes) {
      if (p.base.spike_bytes == 1) {
        const bool weighted = (p.options & (kBurst | kSigned)) != 0;
        static_cast<u8*>(p.base.spikes)[at] =
            u8(weighted ? u32(i32(k)) : select(k != S(0), u32(p.base.amplitude_bits)));
      } else {
        Element<X> out;
        if (SMOOTH || (k != S(0) && k != S(1)))
          out.x = Narrow<X>::from(SMOOTH ? widen(amplitude.x) * k : k * widen(amplitude.x));
        else
          out.bits = select(k != S(0), amplitude.bits);
        static_cast<Bits<sizeof(X)>*>(p.base.spikes)[at] = out.bits;
      }
    }
    if (p.base.words) pack(p.base.words, word, t, k != S(0));
  }

  __device__ __forceinline__ void pack(void* words, u32& bits, i64 t, bool bit) const {
    bits |= select(bit, 1u << (t % kWordSteps));
    if (t % kWordSteps == kWordSteps - 1 || t == p.base.T - 1) {
      store_words<1>(words, t / kWordSteps * p.base.N + n, p.base.word_bytes, &bits);
      bits = 0;
    }
  }

  __device__ __forceinline__ void advance_row() { at += p.base.out_rows.step; }
};

template <class X, bool SMOOTH>
__global__ void __launch_bounds__(kThreads, sizeof(X) < 8 ? 0
                                            : SMOOTH      ? 2
                                                          : 3) if_general(const IFGeneral p) {
  typedef State<X> S;
  const i64 n = global_thread(), T = p.base.T;
  if (n >= p.base.N) return;
  const Place place(n, p.base.inner, p.base.N);
  Neuron<S, SMOOTH> neuron;
  set(neuron, p.base.threshold, p.fire_level, p.beta, p.options, p.base.alpha, p.surrogate_scale,
      p.v_reset, p.v_min, p.max_spikes, n);
  neuron.margin = S(p.margin);
  neuron.surrogate = p.surrogate;
  neuron.count_low = p.count_low;
  neuron.count_high = p.count_high;
  const Current<X> current(p.input_scale, p.bias, p.options, n);
  const X* const x = static_cast<const X*>(p.base.x) + place.in(p.base.x_rows);
  const i64 x_step = p.base.x_rows.step;
  S start = read<S>(p.base.v_init, n);
  Emitter<X, SMOOTH> out(p, n, place);

  if (p.options & kParallel) {
    S total = start;
    SNN_KEEP_LOOP
    for (i64 t = 0; t < T; ++t) total += current(widen(x[t * x_step]));
    const S k = parallel_count(total, neuron.threshold, S(T));
    SNN_KEEP_LOOP
    for (i64 t = 0; t < T; ++t) {
      out.emit(t, t + 1, select(S(t) < k, S(1)));
      out.advance_row();
    }
    if (p.base.v) static_cast<S*>(p.base.v)[n] = total - select(k != S(0), k * neuron.threshold);
    if (p.base.count) p.base.count[n] = out.count;
    return;
  }

  if (p.options & kProbeShift) {
    SNN_KEEP_LOOP
    for (i32 i = 0; i < p.iterations; ++i) {
      OffsetProbe<S> probe;
      probe.start();
      S v = start;
      SNN_KEEP_LOOP
      for (i64 t = 0; t < p.probe; ++t) {
        const S m = neuron.charge(v, current(widen(x[t * x_step])));
        const S k = neuron.spikes(m, 0);
        v = neuron.reset(m, k);
        probe.see(m, k != S(0));
      }
      // Read again: kept, it would take a register of every step.
      const S v_init = read<S>(p.base.v_init, n);
      start =
          probe.shifted(start, v_init, v, neuron.threshold, S(1.0 - p.margin), S(1.0 + p.margin));
    }
  }

  S v = start;
  i32 guard = 0;
  u32 window = 0;
  bool probing = (p.options & kProbeMask) != 0;
  const bool was_probing = probing;
  i64 t = 0;
  SNN_KEEP_LOOP
  for (;;) {
    const i64 end = probing && p.probe < T ? i64(p.probe) : T;
    // A ring that moves instead of turning: four loads in flight without unrolling.
    X ring[kLoadsInFlight];
    SNN_UNROLL
    for (int k = 0; k < kLoadsInFlight; ++k)
      if (t + k < end) ring[k] = load<X, 1>(x + (t + k) * x_step).at[0];
    SNN_KEEP_LOOP
    for (; t < end; ++t) {
      const S m = neuron.charge(v, current(widen(ring[0])));
      SNN_UNROLL
      for (int k = 0; k + 1 < kLoadsInFlight; ++k) ring[k] = ring[k + 1];
      if (t + kLoadsInFlight < end)
        ring[kLoadsInFlight - 1] = load<X, 1>(x + (t + kLoadsInFlight) * x_step).at[0];
      const S k = neuron.spikes(m, guard);
      guard += i32(k);
      v = neuron.after(m, k);
      out.emit(t, probing ? 0 : was_probing ? t + 1 - p.probe : t + 1, k);
      if (p.charge_seq) static_cast<S*>(p.charge_seq)[out.at] = m;
      if (p.v_seq) static_cast<S*>(p.v_seq)[out.at] = v;
      if (p.base.window)
        out.pack(p.base.window, window, t,
                 surrogate_derivative<kRectangle>(m - neuron.fire_level, neuron.alpha) != S(0));
      out.advance_row();
    }
    if (!probing || t >= T) break;
    probing = false;
    if (!(v / neuron.threshold > S(p.margin))) out.silent = true;
    v = start;
    guard = out.count = 0;
  }
  if (p.base.v) static_cast<S*>(p.base.v)[n] = v;
  if (p.base.count) p.base.count[n] = out.count;
}

// As if_backward; the gradient of every operand as well. SMOOTH: the differentiable twin, double.
template <class X, bool SMOOTH>
__global__ void __launch_bounds__(kThreads, sizeof(X) == 8 ? 1 : 2)
    if_backward_general(const IFBackwardGeneral p) {
  typedef State<X> S;
  const IFBackward& b = p.base;
  const i64 n = global_thread();
  if (n >= b.N) return;
  const Place place(n, b.inner, b.N);
  Neuron<S, SMOOTH> neuron;
  set(neuron, b.threshold, p.fire_level, p.beta, b.options, b.alpha, p.surrogate_scale, p.v_reset,
      p.v_min, p.max_spikes, n);
  neuron.margin = S(0);
  neuron.surrogate = b.surrogate;
  neuron.count_low = neuron.count_high = 0;
  const Current<X> current(p.input_scale, p.bias, b.options, n);
  const S amplitude = read<S>(b.amplitude, n), v_init = read<S>(b.v_init, n);
  const X* const x = static_cast<const X*>(b.x) + place.in(b.x_rows);
  const X* const grad_spikes = static_cast<const X*>(b.grad_spikes) + place.in(b.grad_rows);
  X* const grad_x = static_cast<X*>(b.grad_x) + place.in(b.grad_x_rows);
  const i64 row = place.in(b.out_rows);
  const i64 last = (b.T - 1) / kChunk;

  S v = v_init;
  SNN_KEEP_LOOP
  for (i64 t = 0; t < last * kChunk; ++t) {
    const S m = neuron.charge(v, current(widen(x[t * b.x_rows.step])));
    v = neuron.after(m, neuron.spikes(m, 0));
    if (t % kChunk == kChunk - 1) static_cast<S*>(b.scratch)[t / kChunk * b.N + n] = v;
  }

  Adjoint<S> adjoint = {};
  adjoint.carry = b.grad_v ? static_cast<const S*>(b.grad_v)[n] : S(0);
  S grad_constant = S(0), grad_scale = S(0), grad_bias = S(0);
  SNN_KEEP_LOOP
  for (i64 c = last; c >= 0; --c) {
    const i64 t0 = c * kChunk;
    const S start = c ? static_cast<S*>(b.scratch)[(c - 1) * b.N + n] : v_init;
    S charges[kChunk];
    v = start;
    SNN_UNROLL
    for (int k = 0; k < kChunk; ++k) {
      if (t0 + k >= b.T) break;
      charges[k] = neuron.charge(v, current(widen(x[(t0 + k) * b.x_rows.step])));
      v = neuron.after(charges[k], neuron.spikes(charges[k], 0));
    }
    SNN_UNROLL
    for (int k = kChunk - 1; k >= 0; --k) {
      if (t0 + k >= b.T) continue;
      const i64 t = t0 + k, at = row + t * b.out_rows.step;
      const S m = charges[k];
      const S grad_out =
          b.grad_spikes ? widen(grad_spikes[t * b.grad_rows.step]) * S(b.grad_scale) : S(0);
      const S grad_charge = p.grad_charge_seq ? static_cast<const S*>(p.grad_charge_seq)[at] : S(0);
      if (p.grad_v_seq) adjoint.carry += static_cast<const S*>(p.grad_v_seq)[at];
      S before = start;
      if (k && (b.options & (kBeta | kResetDelay)))
        before = neuron.after(charges[k ? k - 1 : 0], neuron.spikes(charges[k ? k - 1 : 0], 0));
      const S slope =
          surrogate_slope(neuron.surrogate, m, neuron.fire_level, neuron.alpha, neuron.scale);
      const S spikes = neuron.spikes(m, 0);
      if (b.options & kClip)
        adjoint.carry = select(neuron.above(neuron.reset(m, spikes)), adjoint.carry);
      adjoint.step(neuron, before, m, spikes, grad_out, amplitude, grad_charge, slope);
      grad_bias += adjoint.grad_current;
      if (current.scaled) grad_scale += adjoint.grad_current * widen(x[t * b.x_rows.step]);
      const S grad = current.scaled ? adjoint.grad_current * current.scale : adjoint.grad_current;
      if (b.grad_x_rows.step == 0)
        grad_constant += grad;
      else if (b.grad_x)
        grad_x[t * b.grad_x_rows.step] = Narrow<X>::from(grad);
    }
  }
  if (b.grad_x && b.grad_x_rows.step == 0) *grad_x = Narrow<X>::from(grad_constant);
  const auto put_sum = [n](void* to, S sum) {
    if (to) static_cast<S*>(to)[n] = sum;
  };
  put_sum(b.grad_v_init, adjoint.carry);
  put_sum(b.grad_threshold, adjoint.grad_threshold);
  put_sum(b.grad_amplitude, adjoint.grad_amplitude);
  put_sum(p.grad_input_scale, grad_scale);
  put_sum(p.grad_beta, adjoint.grad_beta);
  put_sum(p.grad_bias, grad_bias);
  put_sum(p.grad_fire_level, adjoint.grad_fire_level);
}

}  // namespace snn
