// Backward. Nothing of the forward pass is needed but x: membranes at every kSteps-th step are
// saved, then each chunk of steps, last first, is run again and walked back.
#pragma once
#include "cpu_forward.h"

namespace snn {
namespace SNN_ISA {

// ---- plain
//
// Where a step is run again, the slope of its surrogate is kept, up to the division (see
// reciprocal), which waits for the way back. Slopes are not negative: the sign bit says s.

template <int KIND, class S>
SNN_HD S slope_before_division(S u, S alpha) {
  if (KIND == kATan) {
    const S c = S(2) / alpha, z = S(1.5707963267948966) * alpha;
    return c + (c * (z * z)) * (u * u);
  }
  if (KIND == kSigmoid) return exp_nonpositive(-absolute(alpha * u));
  return surrogate_derivative<KIND>(u, alpha);
}

template <int KIND, class S>
SNN_HD Vec<S> slope_divided(Vec<S> before, S alpha) {
  if (KIND == kATan) return reciprocal(before);
  if (KIND == kSigmoid) {
    const Vec<S> d = reciprocal(S(1) + before);
    return alpha * before * d * d;
  }
  return before;
}

template <class S>
struct BackwardBlock {
  alignas(64) S v[kBlock];
  alignas(64) S carry[kBlock];
  alignas(64) S grad_threshold[kBlock];
  alignas(64) S grad_amplitude[kBlock];
  alignas(64) S sum[kBlock];  // of grad_x over t
  alignas(64) u32 window[kBlock];
  alignas(64) u32 words[kBlock];
  Values<S> threshold, amplitude;
};

// STEPS steps again; rows of slopes are `stride` apart.
template <int KIND, int STEPS, class S>
inline void again_lanes(const S* const* rows, const S* threshold, S alpha, S* v, S* slopes,
                        i64 stride) {
  const S* x[STEPS];
  S* slope[STEPS];
  for (int k = 0; k < STEPS; ++k) x[k] = rows[k], slope[k] = slopes + k * stride;
#pragma omp simd
  for (i64 i = 0; i < kLanes; ++i) {
    const S theta = threshold[i];
    S a = v[i];
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k) {
      const S m = a + x[k][i];
      const bool s = fires(m, theta, false);
      a = reset_by_subtraction(m, theta, s);
      const S d = slope_before_division<KIND>(m - theta, alpha);
      slope[k][i] = s ? -d : d;
    }
    v[i] = a;
  }
}

// From charges that were kept.
template <int KIND, class S>
inline void charged_lanes(const S* charge, const S* threshold, S alpha, S* slope) {
#pragma omp simd
  for (i64 i = 0; i < kLanes; ++i) {
    const S theta = threshold[i], m = charge[i];
    const S d = slope_before_division<KIND>(m - theta, alpha);
    slope[i] = fires(m, theta, false) ? -d : d;
  }
}

// From bits: the rectangle's slope is alpha or 0.
template <class S>
inline void window_lanes(const u32* window, const u32* words, u32 bit, S alpha, S* slope) {
#pragma omp simd
  for (i64 i = 0; i < kLanes; ++i) {
    const S d = select((window[i] & bit) != 0, alpha);
    slope[i] = (words[i] & bit) != 0 ? -d : d;
  }
}

// STEPS steps back, the first of `slopes`, `grads` and `outs` the latest. `attached` is 0 to detach
// the reset. PARAMETERS: gradients of threshold and amplitude too, the latter without grad_scale.
template <int KIND, bool PARAMETERS, int STEPS, class S>
inline void back_lanes(BackwardBlock<S>& b, i64 at, const S* slopes, i64 stride,
                       const S* const* grads, S grad_scale, S alpha, S attached, S* const* outs) {
  constexpr i64 kWide = kVectorBytes / sizeof(S);
  const S *threshold = b.threshold.lanes(at), *amplitude = b.amplitude.lanes(at);
  const S* g[STEPS];
  S* out[STEPS];
  for (int k = 0; k < STEPS; ++k) g[k] = grads[k], out[k] = outs[k];
  for (i64 i = 0; i < kLanes; i += kWide) {
    const Vec<S> theta = load(threshold + i) * attached;
    const Vec<S> weight = load(amplitude + i) * grad_scale;
    Vec<S> carry = load(b.carry + at + i), grad_threshold, grad_amplitude;
    if (PARAMETERS) {
      grad_threshold = load(b.grad_threshold + at + i);
      grad_amplitude = load(b.grad_amplitude + at + i);
    }
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k) {
      const Mask<S> kept = (Mask<S>)load(slopes - k * stride + i);
      const Vec<S> before = (Vec<S>)(kept & Vector<S>::kMagnitude);
      const Vec<S> grad = load(g[k] + i);
      const Vec<S> grad_u = (weight * grad - carry * theta) * slope_divided<KIND, S>(before, alpha);
      if (PARAMETERS) {
        const Mask<S> s = kept < 0;
        grad_threshold -= grad_u + (Vec<S>)((Mask<S>)carry & s);
        grad_amplitude += (Vec<S>)((Mask<S>)grad & s);
      }
      carry = grad_u + carry;
      store(out[k] + i, carry);
    }
    store(b.carry + at + i, carry);
    if (PARAMETERS) {
      store(b.grad_threshold + at + i, grad_threshold);
      store(b.grad_amplitude + at + i, grad_amplitude);
    }
  }
}

// How many of `left` steps the loops take at once.
SNN_HD int steps_at_once(i64 left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

template <class S, int KIND>
class Backward {
 public:
  Backward(const IFBackward& p, bool streaming, void* scratch)
      : p_(p),
        x_(p.x, p.x_rows, p.inner, p.N, p.dtype),
        charges_(p.charges, p.out_rows, p.inner, p.N, sizeof(S) == 8 ? kFloat64 : kFloat32),
        grads_(p.grad_spikes, p.grad_rows, p.inner, p.N, p.dtype),
        grad_x_(p.grad_x_rows.step ? p.grad_x : nullptr, p.grad_x_rows, p.inner, p.N,
                element_bytes(p.dtype), streaming),
        block_(backward_block(p)),
        chunks_((p.T + kSteps - 1) / kSteps),
        fetch_(streaming),
        summed_(p.grad_x && !p.grad_x_rows.step),
        slopes_(static_cast<S*>(scratch)),
        saved_(slopes_ + least(p.T, kSteps) * block_) {}

  i64 block() const { return block_; }

  // `last`: where the range ends, for prefetching what comes after this block.
  void run(i64 lo, i64 n, i64 last) {
    const bool parameters = p_.grad_threshold || p_.grad_amplitude;
    const i64 whole = (n + kLanes - 1) / kLanes * kLanes;
    lo_ = lo, n_ = n, next_ = lo + block_ < last ? lo + block_ : -1;
    b_.threshold.read(p_.threshold, S(p_.threshold.value), lo, n);
    b_.amplitude.read(p_.amplitude, S(p_.amplitude.value), lo, n);
    gather(b_.v, p_.v_init, S(p_.v_init.value), lo, whole);
    __builtin_memset(b_.carry, 0, whole * sizeof(S));
    if (p_.grad_v) __builtin_memcpy(b_.carry, static_cast<const S*>(p_.grad_v) + lo, n * sizeof(S));
    if (parameters) {
      __builtin_memset(b_.grad_threshold, 0, whole * sizeof(S));
      __builtin_memset(b_.grad_amplitude, 0, whole * sizeof(S));
    }
    if (summed_) __builtin_memset(b_.sum, 0, whole * sizeof(S));
    x_.begin(lo, n);
    grads_.begin(lo, n);

    const bool recomputes = !p_.window && !p_.charges;
    for (i64 c = 0; recomputes && c + 1 < chunks_; ++c) {
      for (i64 k = 0; k < kSteps; k += 4) again<4>(c * kSteps + k, k);
      __builtin_memcpy(saved_ + c * block_, b_.v, whole * sizeof(S));
    }
    for (i64 c = chunks_ - 1; c >= 0; --c) {
      const i64 t0 = c * kSteps, steps = least(kSteps, p_.T - t0);
      if (p_.window) {
        word_ = -1;
        for (i64 k = 0; k < steps; ++k) from_window(t0 + k, k);
      } else if (p_.charges) {
        for (i64 k = 0; k < steps; ++k) from_charges(t0 + k, k);
      } else {
        if (c)
          __builtin_memcpy(b_.v, saved_ + (c - 1) * block_, whole * sizeof(S));
        else if (chunks_ > 1)
          gather(b_.v, p_.v_init, S(p_.v_init.value), lo, whole);
        for (i64 k = 0; k < steps;) k += again_some(t0 + k, k, steps - k);
      }
      for (i64 left = steps; left > 0;)
        left -= parameters ? back_some<true>(t0 + left - 1, left)
                           : back_some<false>(t0 + left - 1, left);
    }
    if (summed_) {
      const Output sums(p_.grad_x, p_.grad_x_rows, p_.inner, p_.N, element_bytes(p_.dtype), false);
      for (i64 i = 0; i < n; i += kLanes)
        sums.put(0, lo + i, least(kLanes, n - i), b_.sum + i, p_.dtype);
    }
    if (p_.grad_amplitude && p_.grad_scale != 1)
      for (i64 i = 0; i < n; ++i) b_.grad_amplitude[i] *= S(p_.grad_scale);
    write(p_.grad_v_init, b_.carry, lo, n);
    write(p_.grad_threshold, b_.grad_threshold, lo, n);
    write(p_.grad_amplitude, b_.grad_amplitude, lo, n);
  }

 private:
  int again_some(i64 t, i64 k, i64 left) {
    switch (steps_at_once(left)) {
      case 4:
        return again<4>(t, k);
      case 2:
        return again<2>(t, k);
      default:
        return again<1>(t, k);
    }
  }

  // STEPS steps from t on again, their slopes to the rows from k on.
  template <int STEPS>
  int again(i64 t, i64 k) {
    alignas(64) S buffer[STEPS][kLanes];
    const S* rows[STEPS];
    for (i64 i = 0; i < n_; i += kLanes) {
      if (fetch_) fetch_forward(x_, t, STEPS, i);
      for (int j = 0; j < STEPS; ++j)
        rows[j] = x_.read(t + j, lo_ + i, least(kLanes, n_ - i), buffer[j]);
      again_lanes<KIND, STEPS>(rows, b_.threshold.lanes(i), S(p_.alpha), b_.v + i,
                               slopes_ + k * block_ + i, block_);
    }
    return STEPS;
  }

  void from_charges(i64 t, i64 k) {
    alignas(64) S buffer[kLanes];
    for (i64 i = 0; i < n_; i += kLanes) {
      if (fetch_) fetch_forward(charges_, t, 1, i);
      const S* charges = charges_.read(t, lo_ + i, least(kLanes, n_ - i), buffer);
      charged_lanes<KIND>(charges, b_.threshold.lanes(i), S(p_.alpha), slopes_ + k * block_ + i);
    }
  }

  void from_window(i64 t, i64 k) {
    const i64 word = t / kWordSteps;
    if (word != word_) {
      word_ = word;
      read_words(p_.window, p_.word_bytes, word * p_.N + lo_, n_, b_.window);
      if (p_.words)
        read_words(p_.words, p_.word_bytes, word * p_.N + lo_, n_, b_.words);
      else
        __builtin_memset(b_.words, 0, n_ * 4);
    }
    const u32 bit = 1u << t % kWordSteps;
    for (i64 i = 0; i < n_; i += kLanes)
      window_lanes(b_.window + i, b_.words + i, bit, S(p_.alpha), slopes_ + k * block_ + i);
  }

  // The rows after the `steps` from t on; after the last ones come the first on the way back.
  SNN_HD void fetch_forward(const Input<S>& rows, i64 t, int steps, i64 i) const {
    t += steps;
    if (t < p_.T && rows.moves()) {
      for (i64 k = t; k < least(t + 4, p_.T); ++k) rows.prefetch(k, lo_ + i);
    } else if (t == p_.T && grads_.moves()) {
      for (i64 k = t - steps; k < t; ++k) grads_.prefetch(k, lo_ + i);
    }
  }

  // The rows before the `steps` up to t; at the first one, those of the next block.
  SNN_HD void fetch_back(i64 t, int steps, i64 i) const {
    t -= steps;
    if (t >= 0 && grads_.moves()) {
      for (i64 k = t; k > t - 4 && k >= 0; --k) grads_.prefetch(k, lo_ + i);
    } else if (t < 0 && next_ >= 0 && x_.moves()) {
      for (i64 k = 0; k < least(4, p_.T); ++k) x_.prefetch(k, next_ + i);
    }
  }

  template <bool PARAMETERS>
  int back_some(i64 t, i64 left) {
    switch (steps_at_once(left)) {
      case 4:
        return back<PARAMETERS, 4>(t, left - 1);
      case 2:
        return back<PARAMETERS, 2>(t, left - 1);
      default:
        return back<PARAMETERS, 1>(t, left - 1);
    }
  }

  // STEPS steps back from t, whose slopes are row k.
  template <bool PARAMETERS, int STEPS>
  int back(i64 t, i64 k) {
    alignas(64) S in[STEPS][kLanes];
    alignas(64) S out[STEPS][kLanes];
    const S* grads[STEPS];
    S* outs[STEPS];
    if (!p_.grad_spikes) __builtin_memset(in, 0, sizeof in);
    const S attached = p_.options & kDetachReset ? S(0) : S(1);
    const bool in_place = grad_x_ && element_bytes(p_.dtype) == sizeof(S);
    for (i64 i = 0; i < n_; i += kLanes) {
      const i64 lo = lo_ + i, lanes = least(kLanes, n_ - i);
      if (fetch_) fetch_back(t, STEPS, i);
      for (int j = 0; j < STEPS; ++j) {
        grads[j] = p_.grad_spikes ? grads_.read(t - j, lo, lanes, in[j]) : in[j];
        outs[j] = in_place ? static_cast<S*>(grad_x_.place(t - j, lo, lanes, out[j])) : out[j];
      }
      back_lanes<KIND, PARAMETERS, STEPS>(b_, i, slopes_ + k * block_ + i, block_, grads,
                                          S(p_.grad_scale), S(p_.alpha), attached, outs);
      for (int j = 0; j < STEPS; ++j)
        if (grad_x_ && outs[j] == out[j]) grad_x_.put(t - j, lo, lanes, out[j], p_.dtype);
      if (summed_)
        for (int j = 0; j < STEPS; ++j)
          for (i64 l = 0; l < kLanes; ++l) b_.sum[i + l] += out[j][l];
    }
    return STEPS;
  }

  const IFBackward& p_;
  Input<S> x_, charges_, grads_;
  Output grad_x_;
  i64 block_, chunks_;
  bool fetch_, summed_;
  S *slopes_, *saved_;
  i64 lo_, n_, next_, word_;
  BackwardBlock<S> b_;
};

template <class S, int KIND>
void backward_range(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  Backward<S, KIND> block(p, streaming, scratch);
  for (i64 lo = first; lo < last; lo += block.block())
    block.run(lo, least(block.block(), last - lo), last);
  if (streaming) stream_fence();
}

template <class S>
void backward_kind(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  switch (p.surrogate) {
    case kATan:
      return backward_range<S, kATan>(p, first, last, streaming, scratch);
    case kSigmoid:
      return backward_range<S, kSigmoid>(p, first, last, streaming, scratch);
    case kTriangle:
      return backward_range<S, kTriangle>(p, first, last, streaming, scratch);
    default:
      return backward_range<S, kRectangle>(p, first, last, streaming, scratch);
  }
}

void backward(const IFBackward& p, i64 first, i64 last, bool streaming, void* scratch) {
  if (p.dtype == kFloat64) return backward_kind<double>(p, first, last, streaming, scratch);
  backward_kind<float>(p, first, last, streaming, scratch);
}

// ---- general

template <class S, bool SMOOTH>
class BackwardGeneral {
 public:
  BackwardGeneral(const IFBackwardGeneral& p, bool streaming, void* scratch)
      : p_(p),
        x_(p.base.x, p.base.x_rows, p.base.inner, p.base.N, p.base.dtype),
        grads_(p.base.grad_spikes, p.base.grad_rows, p.base.inner, p.base.N, p.base.dtype),
        grad_v_seq_(p.grad_v_seq, p.base.out_rows, p.base.inner, p.base.N, kState),
        grad_charge_seq_(p.grad_charge_seq, p.base.out_rows, p.base.inner, p.base.N, kState),
        grad_x_(p.base.grad_x_rows.step ? p.base.grad_x : nullptr, p.base.grad_x_rows, p.base.inner,
                p.base.N, element_bytes(p.base.dtype), streaming),
        streaming_(streaming),
        charges_(static_cast<S*>(scratch)),
        saved_(charges_ + least(p.base.T, kSteps) * kLanes) {
    b_.v_reset = S(p.v_reset), b_.alpha = S(p.base.alpha);
    b_.scale = S(p.surrogate_scale), b_.v_min = p.v_min, b_.max_spikes = S(p.max_spikes),
    b_.margin = S(0);
    b_.count_low = b_.count_high = 0;
    b_.options = p.base.options, b_.surrogate = p.base.surrogate;
  }

  void run(i64 lo, i64 n) {
    const IFBackward& p = p_.base;
    lo_ = lo, n_ = n;
    gather(start_, p.v_init, S(p.v_init.value), lo, kLanes);
    gather(b_.threshold, p.threshold, S(p.threshold.value), lo, kLanes);
    const Operand& level = p.options & kFireLevel ? p_.fire_level : p.threshold;
    gather(b_.level, level, S(level.value), lo, kLanes);
    gather(amplitude_, p.amplitude, S(p.amplitude.value), lo, kLanes);
    b_.currents.read(p_.input_scale, p_.bias, p_.beta, lo);
    g_ = Sums{};
    if (p.grad_v) __builtin_memcpy(g_.carry, static_cast<const S*>(p.grad_v) + lo, n * sizeof(S));
    x_.begin(lo, n);
    grads_.begin(lo, n);
    __builtin_memset(b_.guard, 0, sizeof b_.guard);
    __builtin_memcpy(b_.v, start_, sizeof b_.v);

    const i64 chunks = (p.T + kSteps - 1) / kSteps;
    for (i64 c = 0; c + 1 < chunks; ++c) {
      for (i64 t = c * kSteps; t < (c + 1) * kSteps; ++t) again(t, charges_);
      __builtin_memcpy(saved_ + c * kLanes, b_.v, sizeof b_.v);
    }
    for (i64 c = chunks - 1; c >= 0; --c) {
      const i64 t0 = c * kSteps, steps = least(kSteps, p.T - t0);
      const S* start = c ? saved_ + (c - 1) * kLanes : start_;
      __builtin_memcpy(b_.v, start, sizeof b_.v);
      for (i64 k = 0; k < steps; ++k) again(t0 + k, charges_ + k * kLanes);
      for (i64 k = steps - 1; k >= 0; --k) {
        if (k)
          before(charges_ + (k - 1) * kLanes);
        else
          __builtin_memcpy(b_.v, start, sizeof b_.v);
        back(t0 + k, charges_ + k * kLanes);
      }
    }
    if (p.grad_x && !p.grad_x_rows.step) {
      const Output sums(p.grad_x, p.grad_x_rows, p.inner, p.N, element_bytes(p.dtype), false);
      sums.put(0, lo, n, g_.x, p.dtype);
    }
    write(p.grad_v_init, g_.carry, lo, n);
    write(p.grad_threshold, g_.threshold, lo, n);
    write(p.grad_amplitude, g_.amplitude, lo, n);
    write(p_.grad_input_scale, g_.scale, lo, n);
    write(p_.grad_beta, g_.beta, lo, n);
    write(p_.grad_bias, g_.bias, lo, n);
    write(p_.grad_fire_level, g_.level, lo, n);
  }

 private:
  static constexpr i32 kState = sizeof(S) == 8 ? kFloat64 : kFloat32;

  void again(i64 t, S* charges) {
    alignas(64) S buffer[kLanes];
    alignas(64) S current[kLanes];
    if (streaming_ && x_.moves()) x_.prefetch(t, lo_ + kAhead);
    b_.step(b_.currents.from(x_.read(t, lo_, n_, buffer), b_.options, current));
    __builtin_memcpy(charges, b_.charge, sizeof b_.charge);
  }

  // Membranes before a step, from the charges of the one before it.
  void before(const S* charges) {
    if (!(b_.options & (kBeta | kResetDelay))) return;
    __builtin_memcpy(b_.charge, charges, sizeof b_.charge);
    b_.fire();
    b_.reset();
  }

  template <int KIND>
  void slope_lanes(const S* charge) {
    const S alpha = b_.alpha, scale = b_.scale;
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i)
      slope_[i] = surrogate_slope<KIND>(charge[i], b_.level[i], alpha, scale);
  }

  void slopes(const S* charge) {
    switch (b_.surrogate) {
      case kATan:
        return slope_lanes<kATan>(charge);
      case kSigmoid:
        return slope_lanes<kSigmoid>(charge);
      case kTriangle:
        return slope_lanes<kTriangle>(charge);
      case kSuperSpike:
        return slope_lanes<kSuperSpike>(charge);
      case kExponential:
        return slope_lanes<kExponential>(charge);
      case kErf:
        return slope_lanes<kErf>(charge);
      case kPeriodicExponential:
        return slope_lanes<kPeriodicExponential>(charge);
      default:
        return slope_lanes<kRectangle>(charge);
    }
  }

  // What the clipping stopped has no gradient.
  void pass(const S* charge) {
    const bool hard = (b_.options & kHardReset) != 0;
    for (i64 i = 0; i < kLanes; ++i) {
      const S m = charge[i], k = b_.k[i];
      const S v = hard ? b_.template neuron<kHardReset>(i).reset(m, k)
                       : b_.template neuron<0>(i).reset(m, k);
      g_.carry[i] = select(b_.template neuron<0>(i).above(v), g_.carry[i]);
    }
  }

  // OPTIONS are constants: g++ vectorises this loop without branches only.
  template <i32 OPTIONS>
  void adjoint_lanes(const S* charge, const S* grad_out, const S* grad_charge) {
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) {
      const Neuron<S, SMOOTH> neuron = b_.template neuron<OPTIONS>(i);
      Adjoint<S> a = {g_.carry[i], S(0), g_.threshold[i], g_.level[i], g_.amplitude[i], g_.beta[i]};
      a.step(neuron, b_.v[i], charge[i], b_.k[i], grad_out[i], amplitude_[i], grad_charge[i],
             slope_[i]);
      g_.carry[i] = a.carry;
      g_.current[i] = a.grad_current;
      g_.threshold[i] = a.grad_threshold;
      g_.level[i] = a.grad_fire_level;
      g_.amplitude[i] = a.grad_amplitude;
      g_.beta[i] = a.grad_beta;
    }
  }

  // Turns the options, one after the other, into constants.
  template <i32 OPTIONS>
  void adjoint(const S* charge, const S* grad_out, const S* grad_charge) {
    adjoint_lanes<OPTIONS>(charge, grad_out, grad_charge);
  }

  template <i32 OPTIONS, i32 OPTION, i32... REST>
  void adjoint(const S* charge, const S* grad_out, const S* grad_charge) {
    if (b_.options & OPTION)
      adjoint<OPTIONS | OPTION, REST...>(charge, grad_out, grad_charge);
    else
      adjoint<OPTIONS, REST...>(charge, grad_out, grad_charge);
  }

  void back(i64 t, const S* charge) {
    const IFBackward& p = p_.base;
    alignas(64) S grad_out[kLanes] = {};
    alignas(64) S grad_charge[kLanes] = {};
    alignas(64) S buffer[kLanes];
    if (p_.grad_v_seq) {
      const S* g = grad_v_seq_.read(t, lo_, n_, buffer);
      for (i64 i = 0; i < kLanes; ++i) g_.carry[i] += g[i];
    }
    if (p.grad_spikes) {
      if (streaming_ && grads_.moves()) grads_.prefetch(t, lo_ + kAhead);
      const S* g = grads_.read(t, lo_, n_, buffer);
      const S scale = S(p.grad_scale);
      for (i64 i = 0; i < kLanes; ++i) grad_out[i] = g[i] * scale;
    }
    if (p_.grad_charge_seq) {
      const S* g = grad_charge_seq_.read(t, lo_, n_, buffer);
      if (g != grad_charge) __builtin_memcpy(grad_charge, g, sizeof grad_charge);
    }
    slopes(charge);
    __builtin_memcpy(b_.charge, charge, sizeof b_.charge);
    b_.fire();
    if (b_.options & kClip) pass(charge);
    if (b_.options & kResetDelay)
      adjoint<kResetDelay | kDetachReset, kStrict, kBeta, kFireLevel>(charge, grad_out,
                                                                      grad_charge);
    else
      adjoint<0, kHardReset, kDetachReset, kBeta, kFireLevel>(charge, grad_out, grad_charge);
    const S* grad_x = g_.current;
    if (b_.options & kBias)
      for (i64 i = 0; i < kLanes; ++i) g_.bias[i] += g_.current[i];
    if (b_.options & kInputScale) {
      const S* x = x_.read(t, lo_, n_, buffer);
      for (i64 i = 0; i < kLanes; ++i) {
        g_.scale[i] += g_.current[i] * x[i];
        grad_out[i] = g_.current[i] * b_.currents.scale[i];
      }
      grad_x = grad_out;
    }
    if (grad_x_)
      grad_x_.put(t, lo_, n_, grad_x, p.dtype);
    else if (p.grad_x)
      for (i64 i = 0; i < kLanes; ++i) g_.x[i] += grad_x[i];
  }

  struct Sums {
    alignas(64) S carry[kLanes];
    alignas(64) S current[kLanes];
    alignas(64) S threshold[kLanes];
    alignas(64) S level[kLanes];
    alignas(64) S amplitude[kLanes];
    alignas(64) S beta[kLanes];
    alignas(64) S bias[kLanes];
    alignas(64) S scale[kLanes];
    alignas(64) S x[kLanes];
  };

  const IFBackwardGeneral& p_;
  Input<S> x_, grads_, grad_v_seq_, grad_charge_seq_;
  Output grad_x_;
  bool streaming_;
  S *charges_, *saved_;
  Lanes<S, SMOOTH> b_;
  Sums g_;
  alignas(64) S start_[kLanes];
  alignas(64) S amplitude_[kLanes];
  alignas(64) S slope_[kLanes];
  i64 lo_, n_;
};

template <class S, bool SMOOTH>
void general_back(const IFBackwardGeneral& p, i64 first, i64 last, bool streaming, void* scratch) {
  BackwardGeneral<S, SMOOTH> block(p, streaming, scratch);
  for (i64 lo = first; lo < last; lo += kLanes) block.run(lo, least(kLanes, last - lo));
  if (streaming) stream_fence();
}

void backward_general(const IFBackwardGeneral& p, i64 first, i64 last, bool streaming,
                      void* scratch) {
  if (p.base.dtype != kFloat64)
    return general_back<float, false>(p, first, last, streaming, scratch);
  if (p.base.options & kSmooth)
    return general_back<double, true>(p, first, last, streaming, scratch);
  general_back<double, false>(p, first, last, streaming, scratch);
}

}  // namespace SNN_ISA
}  // namespace snn
