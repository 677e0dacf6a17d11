// Backward, plain: soft reset, fire at >=. Two sources of membranes:
//
// if_backward       keeps nothing but x: a first walk leaves the membrane at every kChunk-th step
// in
//                   scratch, then each chunk, last first, is recomputed into registers and walked
//                   back. With `charges` the chunks are loaded instead.
// if_backward_bits  the rectangle surrogate: one bit per step from the forward pass is all it
// needs.
#pragma once
#include "gpu.cuh"

namespace snn {

// What both keep per neuron.
template <class X, int VEC>
struct Adjoints {
  typedef State<X> S;
  S threshold[VEC], amplitude[VEC], carry[VEC], grad_threshold[VEC], grad_amplitude[VEC];
  S grad_scale;
  bool detach, learns;

  __device__ __forceinline__ Adjoints(const IFBackward& p, i64 n)
      : grad_scale(S(p.grad_scale)),
        detach((p.options & kDetachReset) != 0),
        learns(p.grad_threshold || p.grad_amplitude) {
    Cursor<S, VEC> th(p.threshold, n), amp(p.amplitude, n);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      threshold[i] = th.next(S(p.threshold.value));
      amplitude[i] = amp.next(S(p.amplitude.value)) * grad_scale;
      // Nothing comes in through the spikes, whatever they weigh.
      if (!p.grad_spikes) amplitude[i] = S(0);
      carry[i] = p.grad_v ? static_cast<const S*>(p.grad_v)[n + i] : S(0);
      grad_threshold[i] = grad_amplitude[i] = S(0);
    }
  }

  // `spike` is looked at only if `learns`.
  __device__ __forceinline__ void step(int i, S grad, S slope, bool spike) {
    const S through_reset = detach ? S(0) : carry[i] * threshold[i];
    const S grad_u = (amplitude[i] * grad - through_reset) * slope;
    if (learns) {
      grad_threshold[i] -= grad_u + select(spike, carry[i]);
      grad_amplitude[i] += select(spike, grad * grad_scale);
    }
    carry[i] = grad_u + carry[i];
  }

  __device__ __forceinline__ void finish(const IFBackward& p, i64 n) {
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      if (p.grad_v_init) static_cast<S*>(p.grad_v_init)[n + i] = carry[i];
      if (p.grad_threshold) static_cast<S*>(p.grad_threshold)[n + i] = grad_threshold[i];
      if (p.grad_amplitude) static_cast<S*>(p.grad_amplitude)[n + i] = grad_amplitude[i];
    }
  }
};

// The rows of an array, last first, 32 bytes of them in flight: slot t % kSlots holds row t until
// it is taken. Zeros where there is no array.
template <class X, int VEC>
struct Backwards {
  enum { kSlots = sizeof(X) * VEC == 16 ? 2 : 4 };
  Pack<X, VEC> ring[kSlots];
  const X* row;
  i64 step;
  bool streams;

  __device__ __forceinline__ Backwards(const void* data, i64 at, i64 step_of_rows, i64 T)
      : step(step_of_rows), streams(data && step != 0) {
    const X* start = static_cast<const X*>(data) + at;
    SNN_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      const i64 t = T - 1 - ((T - 1 - k) & (kSlots - 1));
      SNN_UNROLL
      for (int i = 0; i < int(sizeof(ring[k]) / 4); ++i) ring[k].words[i] = 0;
      if (data && t >= 0) ring[k] = load<X, VEC>(start + t * step);
    }
    row = start + (T - 1 - kSlots) * step;
  }

  // Row t, where t % kSlots is k % kSlots. `more`: t >= kSlots.
  __device__ __forceinline__ Pack<X, VEC> take(int k, bool more) {
    const Pack<X, VEC> taken = ring[k % kSlots];
    if (streams && more) ring[k % kSlots] = load<X, VEC>(row);
    advance(row, -step);
    return taken;
  }
};

// One chunk: membranes before each reset into `charge`; `v` moves on. Always kChunk steps, for a
// branch per step costs 20 registers: those beyond `steps` read the last row again and mean
// nothing.
template <class X, int VEC, bool LAST>
__device__ __forceinline__ void recompute(const X* x, i64 step, int steps,
                                          const State<X>* threshold, State<X>* v,
                                          State<X> (*charge)[VEC]) {
  typedef State<X> S;
  Pack<X, VEC> loaded[kChunk];
  SNN_UNROLL
  for (int k = 0; k < kChunk; ++k) {
    loaded[k] = load<X, VEC, LAST>(x);
    advance(x, k + 1 < steps ? step : 0);
  }
  SNN_UNROLL
  for (int k = 0; k < kChunk; ++k) {
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      const S m = v[i] + widen_at(loaded[k], i);
      charge[k][i] = m;
      v[i] = fires(m, threshold[i], false) ? m - threshold[i] : m;
    }
  }
}

template <class X, int KIND, int VEC>
__global__ void __launch_bounds__(kThreads) if_backward(IFBackward p) {
  typedef State<X> S;
  const i64 n = global_thread() * VEC;
  if (n >= p.N) return;
  Adjoints<X, VEC> adjoint(p, n);
  const Place place(n, p.inner, p.N);
  if (p.T <= 0) return adjoint.finish(p, n);
  const i64 last = (p.T - 1) / kChunk;
  i32 steps = i32(p.T - last * kChunk);  // of chunk c

  S v[VEC], charge[kChunk][VEC];
  const X* x = static_cast<const X*>(p.x) + place.in(p.x_rows);
  S* scratch = static_cast<S*>(p.scratch) + n;
  if (!p.charges) {
    Cursor<S, VEC> v_init(p.v_init, n);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) v[i] = v_init.next(S(p.v_init.value));
    SNN_KEEP_LOOP
    for (i64 c = 0; c < last; ++c) {
      recompute<X, VEC, false>(x, p.x_rows.step, kChunk, adjoint.threshold, v, charge);
      store_all<S, VEC>(scratch, c * p.N, v);
      x += kChunk * p.x_rows.step;
    }
  }

  Backwards<X, VEC> grads(p.grad_spikes, place.in(p.grad_rows), p.grad_rows.step, p.T);
  X* grad_x = static_cast<X*>(p.grad_x) + place.in(p.grad_x_rows) + (p.T - 1) * p.grad_x_rows.step;
  SNN_KEEP_LOOP
  for (i64 c = last; c >= 0; --c, steps = kChunk) {
    if (p.charges) {
      const S* row =
          static_cast<const S*>(p.charges) + place.in(p.out_rows) + c * kChunk * p.out_rows.step;
      SNN_UNROLL
      for (int k = 0; k < kChunk; ++k) {
        const Pack<S, VEC> loaded = load<S, VEC>(row);
        SNN_UNROLL
        for (int i = 0; i < VEC; ++i) charge[k][i] = loaded.at[i];
        advance(row, k + 1 < steps ? p.out_rows.step : 0);
      }
    } else {
      // The walk left v at the start of the last chunk.
      if (c < last) {
        x -= kChunk * p.x_rows.step;
        if (c) {
          const Pack<S, VEC> start = load<S, VEC>(scratch + (c - 1) * p.N);
          SNN_UNROLL
          for (int i = 0; i < VEC; ++i) v[i] = start.at[i];
        } else {
          Cursor<S, VEC> v_init(p.v_init, n);
          SNN_UNROLL
          for (int i = 0; i < VEC; ++i) v[i] = v_init.next(S(p.v_init.value));
        }
      }
      recompute<X, VEC, true>(x, p.x_rows.step, steps, adjoint.threshold, v, charge);
    }
    // Entered at the chunk's last step, for the same reason.
    const auto back = [&](int k) {
      const Pack<X, VEC> grad = grads.take(k, c > 0 || k >= grads.kSlots);
      SNN_UNROLL
      for (int i = 0; i < VEC; ++i) {
        const S th = adjoint.threshold[i], m = charge[k][i];
        const S slope = surrogate_derivative<KIND>(m - th, S(p.alpha));
        adjoint.step(i, widen_at(grad, i), slope, fires(m, th, false));
      }
      if (p.grad_x) store<X, VEC>(grad_x, narrow<X, VEC>(adjoint.carry));
      advance(grad_x, -p.grad_x_rows.step);
    };
    // clang-format off
    switch (steps) {
      default: back(7); [[fallthrough]];
      case 7: back(6); [[fallthrough]];
      case 6: back(5); [[fallthrough]];
      case 5: back(4); [[fallthrough]];
      case 4: back(3); [[fallthrough]];
      case 3: back(2); [[fallthrough]];
      case 2: back(1); [[fallthrough]];
      case 1: back(0);
    }
    // clang-format on
  }
  adjoint.finish(p, n);
}

template <class X, int VEC>
__global__ void __launch_bounds__(kThreads) if_backward_bits(IFBackward p) {
  typedef State<X> S;
  const i64 n = global_thread() * VEC;
  if (n >= p.N) return;
  Adjoints<X, VEC> adjoint(p, n);
  const Place place(n, p.inner, p.N);
  Backwards<X, VEC> grads(p.grad_spikes, place.in(p.grad_rows), p.grad_rows.step, p.T);
  X* grad_x = static_cast<X*>(p.grad_x) + place.in(p.grad_x_rows) + (p.T - 1) * p.grad_x_rows.step;
  const S alpha = S(p.alpha);

  u32 window[VEC], words[VEC];
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i) words[i] = 0;
  SNN_KEEP_LOOP
  for (i64 w = (p.T + kWordSteps - 1) / kWordSteps - 1; w >= 0; --w) {
    const i64 left = p.T - w * kWordSteps;
    const i32 steps = left < kWordSteps ? i32(left) : i32(kWordSteps);
    load_words<VEC>(p.window, w * p.N + n, p.word_bytes, window);
    if (adjoint.learns) load_words<VEC>(p.words, w * p.N + n, p.word_bytes, words);
    SNN_KEEP_LOOP
    for (i32 t0 = (steps - 1) / kLoadsInFlight * kLoadsInFlight; t0 >= 0; t0 -= kLoadsInFlight) {
      SNN_UNROLL
      for (int k = kLoadsInFlight - 1; k >= 0; --k) {
        if (t0 + k >= steps) continue;
        const u32 bit = 1u << (t0 + k);
        const Pack<X, VEC> grad = grads.take(k, w > 0 || t0 > 0 || k >= grads.kSlots);
        SNN_UNROLL
        for (int i = 0; i < VEC; ++i)
          adjoint.step(i, widen_at(grad, i), select((window[i] & bit) != 0, alpha),
                       (words[i] & bit) != 0);
        if (p.grad_x) store<X, VEC>(grad_x, narrow<X, VEC>(adjoint.carry));
        advance(grad_x, -p.grad_x_rows.step);
      }
    }
  }
  adjoint.finish(p, n);
}

}  // namespace snn
