// One integrate-and-fire neuron, one time step, and the adjoint of that step.
//
//   m = v + x          charge: one rounded addition
//   s = m >= theta     fire
//   v = m - theta * s  reset by subtraction
//
// Every back end runs these lines in this order and rounds nowhere else, so spikes and membranes
// are the same bits everywhere. Compile with contraction off and without flushing subnormals.
#pragma once
#include "params.h"

namespace snn {

// `flag ? a : 0` keeps -0.0, infinities and NaN of m intact in m - select(...).
template <class S>
SNN_HD S select(bool flag, S a) {
  return flag ? a : S(0);
}

template <class S>
SNN_HD bool fires(S m, S threshold, bool strict) {
  return strict ? m > threshold : m >= threshold;
}

template <class S>
SNN_HD S reset_by_subtraction(S m, S threshold, bool spike) {
  return m - select(spike, threshold);
}

// d spike / d u at u = m - theta; alpha is 1 / width. Area 1, but SuperSpike has height 1.
template <int KIND, class S>
SNN_HD S surrogate_derivative(S u, S alpha) {
  if (KIND == kATan) {
    const S z = S(1.5707963267948966) * alpha * u;
    return S(0.5) * alpha / (S(1) + z * z);
  }
  if (KIND == kSigmoid) {
    const S e = exp_nonpositive(-absolute(alpha * u));
    const S d = S(1) / (S(1) + e);
    return alpha * e * d * d;
  }
  if (KIND == kTriangle) {
    const S height = S(1) - alpha * absolute(u);
    return alpha * (height > S(0) ? height : S(0));
  }
  if (KIND == kSuperSpike) {
    const S d = S(1) + alpha * absolute(u);
    return S(1) / (d * d);
  }
  if (KIND == kExponential) return S(0.5) * alpha * exp_nonpositive(-(alpha * absolute(u)));
  if (KIND == kErf) {
    const S z = alpha * u;
    return S(0.5641895835477563) * alpha * exp_nonpositive(-(z * z));
  }
  return absolute(u) * alpha < S(0.5) ? alpha : S(0);
}

// How steep a spike is at membrane m. The periodic exponential is a peak of height 1 at every
// multiple of the level: between two of them its exponent runs twice as fast as m.
template <int KIND, class S>
SNN_HD S surrogate_slope(S m, S level, S alpha, S scale) {
  const S u = m - level;
  if (KIND == kPeriodicExponential) {
    const S phase = u / level + S(0.5);
    const S beyond = level * (S(2) * (phase - floor_of(phase)) - S(1));
    const S z = u < S(0) ? u : beyond;
    return scale * exp_nonpositive(-(alpha * absolute(z)));
  }
  return scale * surrogate_derivative<KIND>(u, alpha);
}

template <class S>
SNN_HD S surrogate_slope(i32 kind, S m, S level, S alpha, S scale) {
  switch (kind) {
    case kATan:
      return surrogate_slope<kATan>(m, level, alpha, scale);
    case kSigmoid:
      return surrogate_slope<kSigmoid>(m, level, alpha, scale);
    case kTriangle:
      return surrogate_slope<kTriangle>(m, level, alpha, scale);
    case kSuperSpike:
      return surrogate_slope<kSuperSpike>(m, level, alpha, scale);
    case kExponential:
      return surrogate_slope<kExponential>(m, level, alpha, scale);
    case kErf:
      return surrogate_slope<kErf>(m, level, alpha, scale);
    case kPeriodicExponential:
      return surrogate_slope<kPeriodicExponential>(m, level, alpha, scale);
    default:
      return surrogate_slope<kRectangle>(m, level, alpha, scale);
  }
}

// The primitive of the slope, scale 1: the spike of the smooth twin that gradcheck can follow.
SNN_HD double surrogate_primitive(i32 kind, double u, double level, double alpha) {
  const double z = alpha * u;
  switch (kind) {
    case kSuperSpike:
      return (1.0 + z / (1.0 + absolute(z))) / alpha;
    case kExponential: {
      const double e = 0.5 * exp_nonpositive(-absolute(z));
      return z >= 0 ? 1.0 - e : e;
    }
    case kErf:
      return 0.5 + 0.5 * error_function(z);
    case kPeriodicExponential: {
      if (u < 0) return exp_nonpositive(z) / alpha;
      const double n = floor_of(u / level + 0.5), r = u - n * level;
      const double side = (1.0 - exp_nonpositive(-2.0 * alpha * absolute(r))) / (2.0 * alpha);
      const double period = (1.0 - exp_nonpositive(-alpha * level)) / alpha;
      return 1.0 / alpha + n * period + (r < 0 ? -side : side);
    }
    case kATan:
      return 0.3183098861837907 * arctan(1.5707963267948966 * z) + 0.5;
    case kSigmoid: {
      const double e = exp_nonpositive(-absolute(z));
      return z >= 0 ? 1.0 / (1.0 + e) : e / (1.0 + e);
    }
    case kTriangle: {
      const double side = 1.0 - (absolute(z) < 1.0 ? absolute(z) : 1.0);
      return z >= 0 ? 1.0 - 0.5 * side * side : 0.5 * side * side;
    }
    default:
      return z <= -0.5 ? 0.0 : (z >= 0.5 ? 1.0 : z + 0.5);
  }
}

// ---- the general neuron: every option ----------------------------------------------------------
//
//   current = x, * input_scale, + bias       each rounded
//   m = v + current                          beta: round(beta * v) + current
//   m = m - theta                            reset delay: where v, not reset yet, has fired
//   fire at m >= fire_level (the threshold unless given)
//
// Burst:  k = min(floor(m / theta), max_spikes) spikes where m >= theta, v = m - round(k * theta).
// Signed: +1 where m >= theta and the running count is below count_high; otherwise -1 where
//         m <= -margin (m < 0 if margin is 0) and it is above count_low.
// k spikes weigh round(k * amplitude). Bursts have gradients: dk/dm is the surrogate's slope,
// whatever k is.

template <class S, bool SMOOTH>
struct Neuron {
  S threshold, fire_level, beta, v_reset, alpha, margin, max_spikes, scale;
  double v_min;
  i32 options, surrogate, count_low, count_high;

  SNN_HD S charge(S v, S current) const {
    const S m = (options & kBeta ? beta * v : v) + current;
    if constexpr (SMOOTH)
      return options & kResetDelay ? m - threshold * spike(v) : m;
    else
      return options & kResetDelay ? m - select(delayed(v), threshold) : m;
  }

  // Whether a membrane that is not reset yet has fired.
  SNN_HD bool delayed(S v) const { return fires(v, fire_level, (options & kStrict) != 0); }

  // The spike (0 or 1; the primitive for the smooth twin) of a neuron that neither bursts nor is
  // signed.
  SNN_HD S spike(S m) const {
    if constexpr (SMOOTH)
      return scale * S(surrogate_primitive(surrogate, double(m - fire_level), double(fire_level),
                                           double(alpha)));
    else
      return select(fires(m, fire_level, (options & kStrict) != 0), S(1));
  }

  // How many spikes, signed; `count` is the sum of those before.
  SNN_HD S spikes(S m, i32 count) const {
    if (!SMOOTH && (options & kBurst)) {
      const S k = floor_of(m / threshold);
      return select(m >= threshold, k < max_spikes ? k : max_spikes);
    }
    if (!SMOOTH && (options & kSigned)) {
      const bool plus = m >= threshold && count < count_high;
      const bool low = margin > S(0) ? m <= -margin : m < S(0);
      return plus ? S(1) : select(low && count > count_low, S(-1));
    }
    return spike(m);
  }

  SNN_HD S reset(S m, S k) const {
    if (options & kResetDelay) return m;
    if constexpr (SMOOTH)
      return options & kHardReset ? m * (S(1) - k) + v_reset * k : m - threshold * k;
    if (options & kHardReset) return k != S(0) ? v_reset : m;
    return m - select(k != S(0), k * threshold);
  }

  // Whether the clipping lets a change of the membrane v through.
  SNN_HD bool above(S v) const { return v - S(v_min) > S(0); }

  SNN_HD S clip(S v) const {
    const S d = v - S(v_min);
    return (d < S(0) ? S(0) : d) + S(v_min);
  }

  // The membrane after a step, clipped where that is asked for.
  SNN_HD S after(S m, S k) const {
    const S v = reset(m, k);
    return options & kClip ? clip(v) : v;
  }
};

// What the probe steps of COS (Hao et al., ICLR 2023) see of a neuron, and where they move its
// initial membrane: so that it loses a spike it fired too many, or gains one it lacks.
template <class S>
struct OffsetProbe {
  S least_fired, most_silent;
  i32 count;
  bool any_silent;

  SNN_HD void start() {
    count = 0;
    any_silent = false;
    least_fired = most_silent = S(0);
  }

  SNN_HD void see(S m, bool spike) {
    if (spike) {
      least_fired = count == 0 || m < least_fired ? m : least_fired;
      ++count;
    } else {
      most_silent = !any_silent || m > most_silent ? m : most_silent;
      any_silent = true;
    }
  }

  // start: of the probe steps, moved from v_init before where the probe is repeated. What they left
  // beyond v_init says whether the count is right: a move alone must not ask for the next one.
  SNN_HD S shifted(S start, S v_init, S v_last, S threshold, S below, S above) const {
    const S residual = v_last - (start - v_init);
    if (residual < S(0) && count > 0) {
      const S need = least_fired - below * threshold;
      return start - (need > threshold ? need : threshold);
    }
    if (residual >= threshold && any_silent) {
      const S need = above * threshold - most_silent;
      return start + (need > threshold ? need : threshold);
    }
    return start;
  }
};

// Spikes of the parallel neuron: `total` is v_init plus the sum of all currents.
template <class S>
SNN_HD S parallel_count(S total, S threshold, S steps) {
  const S k = floor_of(total / threshold);
  return select(k > S(0), k < steps ? k : steps);
}

// The adjoint of a step. `carry` is d loss / d v after the step and becomes d loss / d v before it;
// `grad_current` is d loss / d current.
template <class S>
struct Adjoint {
  S carry, grad_current, grad_threshold, grad_fire_level, grad_amplitude, grad_beta;

  // v: the membrane before the step; s spikes at m, where they are as steep as `slope`.
  template <bool SMOOTH>
  SNN_HD void step(const Neuron<S, SMOOTH>& n, S v, S m, S s, S grad_out, S amplitude,
                   S grad_charge, S slope) {
    const bool hard = (n.options & kHardReset) != 0;
    const bool delay = (n.options & kResetDelay) != 0;
    const S through_reset = n.options & kDetachReset ? S(0)
                            : hard                   ? carry * (n.v_reset - m)
                                                     : -(carry * n.threshold);
    const S grad_u = (amplitude * grad_out + through_reset) * slope;
    const S subtracted = hard || delay ? S(0) : carry * s;
    grad_amplitude += s * grad_out;
    if (n.options & kFireLevel) {
      grad_threshold -= subtracted;
      grad_fire_level -= grad_u;
    } else {
      grad_threshold -= grad_u + subtracted;
    }
    // Of a burst one spike is enough to reset.
    const S resets = !SMOOTH && s > S(1) ? S(1) : s;
    grad_current = grad_u + (hard ? carry * (S(1) - resets) : carry) + grad_charge;
    carry = grad_current;
    if (delay) {
      if constexpr (SMOOTH)
        grad_threshold -= grad_current * n.spike(v);
      else
        grad_threshold -= select(n.delayed(v), grad_current);
    }
    if (n.options & kBeta) {
      grad_beta += grad_current * v;
      carry = grad_current * n.beta;
    }
  }
};

}  // namespace snn
