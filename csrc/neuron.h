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

// d spike / d u at u = m - theta. The four have area 1; alpha is 1 / width.
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
  return absolute(u) * alpha < S(0.5) ? alpha : S(0);
}

template <class S>
SNN_HD S surrogate_derivative(i32 kind, S u, S alpha) {
  switch (kind) {
    case kATan:
      return surrogate_derivative<kATan>(u, alpha);
    case kSigmoid:
      return surrogate_derivative<kSigmoid>(u, alpha);
    case kTriangle:
      return surrogate_derivative<kTriangle>(u, alpha);
    default:
      return surrogate_derivative<kRectangle>(u, alpha);
  }
}

// The primitive of the derivative above: the spike of the smooth twin that gradcheck can follow.
SNN_HD double surrogate_primitive(i32 kind, double u, double alpha) {
  const double z = alpha * u;
  switch (kind) {
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

// One step of the general neuron: every option, spikes as numbers so that the smooth twin fits.
template <class S, bool SMOOTH>
struct Neuron {
  S threshold, v_reset, alpha;
  i32 options, surrogate;

  // Returns the spike (0 or 1, or the primitive for the smooth twin); v becomes the membrane after
  // the step and *charge the membrane before reset.
  SNN_HD S step(S& v, S current, S* charge) const {
    const S m = v + current;
    *charge = m;
    if constexpr (SMOOTH) {
      const S s = S(surrogate_primitive(surrogate, double(m - threshold), double(alpha)));
      v = options & kHardReset ? m * (S(1) - s) + v_reset * s : m - threshold * s;
      return s;
    } else {
      const bool s = fires(m, threshold, (options & kStrict) != 0);
      v = options & kHardReset ? (s ? v_reset : m) : reset_by_subtraction(m, threshold, s);
      return select(s, S(1));
    }
  }

  SNN_HD S spike(S charge) const {
    if constexpr (SMOOTH)
      return S(surrogate_primitive(surrogate, double(charge - threshold), double(alpha)));
    else
      return select(fires(charge, threshold, (options & kStrict) != 0), S(1));
  }
};

// The adjoint of Neuron::step. `carry` is d loss / d v after the step and becomes d loss / d v
// before it, which is also d loss / d current.
template <class S>
struct Adjoint {
  S carry, grad_threshold, grad_amplitude;

  template <bool SMOOTH>
  SNN_HD void step(const Neuron<S, SMOOTH>& n, S charge, S grad_out, S amplitude, S grad_charge,
                   S slope) {
    const S s = n.spike(charge);
    const bool hard = (n.options & kHardReset) != 0;
    const S through_reset = n.options & kDetachReset ? S(0)
                            : hard                   ? carry * (n.v_reset - charge)
                                                     : -(carry * n.threshold);
    const S grad_u = (amplitude * grad_out + through_reset) * slope;
    grad_amplitude += s * grad_out;
    grad_threshold -= grad_u + (hard ? S(0) : carry * s);
    carry = grad_u + (hard ? carry * (S(1) - s) : carry) + grad_charge;
  }
};

}  // namespace snn
