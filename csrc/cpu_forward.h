// Forward: the plain neuron, and the general one with every option.
#pragma once
#include "cpu_rows.h"

namespace snn {
namespace SNN_ISA {

// ---- plain

// What is computed besides the spikes' elements.
enum Extra : int { kNothing = 0, kCount = 1, kWords = 2, kEverything = 3 };

// State of a block of plain neurons. Elements of spikes are BYTES wide; 0: none are written.
template <class S, int BYTES>
struct PlainBlock {
  typedef Bits<BYTES ? BYTES : 1> Element;
  alignas(64) S v[kBlock];
  alignas(64) i32 count[kBlock];
  alignas(64) u32 words[kBlock];
  alignas(64) u32 window[kBlock];
  Values<S> threshold;
  Values<Element> amplitude;
};

// STEPS steps of kLanes neurons, the first of which are those at `at` in the block.
template <class S, int BYTES, int EXTRA, int STEPS>
inline void plain_steps(PlainBlock<S, BYTES>& b, i64 at, const S* const* rows, void* const* outs,
                        u32 first_bit, S alpha) {
  typedef typename PlainBlock<S, BYTES>::Element Element;
  S* v = b.v + at;
  const S* threshold = b.threshold.lanes(at);
  const Element* amplitude = b.amplitude.lanes(BYTES ? at : 0);
  i32* count = b.count + at;
  u32 *words = b.words + at, *window = b.window + at;
  const S* x[STEPS];
  Element* out[STEPS];
  for (int k = 0; k < STEPS; ++k) {
    x[k] = rows[k];
    out[k] = static_cast<Element*>(outs[k]);
  }
#pragma omp simd
  for (i64 i = 0; i < kLanes; ++i) {
    const S theta = threshold[i];
    const Element weight = BYTES ? amplitude[i] : Element(0);  // read whether or not s
    S a = v[i];
    i32 fired = 0;
    u32 bits = 0, near = 0;
#pragma GCC unroll 4
    for (int k = 0; k < STEPS; ++k) {
      const S m = a + x[k][i];
      const bool s = fires(m, theta, false);
      a = reset_by_subtraction(m, theta, s);
      if (BYTES) out[k][i] = select(s, weight);
      if (EXTRA & kCount) fired += select(s, 1);
      if (EXTRA & kWords) bits |= select(s, first_bit << k);
      if (EXTRA == kEverything)
        near |= select(absolute(m - theta) * alpha < S(0.5), first_bit << k);
    }
    v[i] = a;
    if (EXTRA & kCount) count[i] += fired;
    if (EXTRA & kWords) words[i] |= bits;
    if (EXTRA == kEverything) window[i] |= near;
  }
}

template <class S, int BYTES, int EXTRA>
void forward_plain(const IFForward& p, i64 first, i64 last, bool streaming) {
  typedef typename PlainBlock<S, BYTES>::Element Element;
  Input<S> x(p.x, p.x_rows, p.inner, p.N, p.dtype);
  const Output spikes(p.spikes, p.out_rows, p.inner, p.N, BYTES, streaming);
  const bool fetch = streaming && x.moves();
  PlainBlock<S, BYTES> b;
  alignas(64) S in[4][kLanes];
  alignas(64) Element out[4][kLanes];

  for (i64 lo = first; lo < last; lo += kBlock) {
    const i64 n = least(kBlock, last - lo);
    gather(b.v, p.v_init, S(p.v_init.value), lo, (n + kLanes - 1) / kLanes * kLanes);
    b.threshold.read(p.threshold, S(p.threshold.value), lo, n);
    if (BYTES) b.amplitude.read(p.amplitude, Element(p.amplitude_bits), lo, n);
    if (EXTRA & kCount) __builtin_memset(b.count, 0, n * 4);
    x.begin(lo, n);

    for (i64 t = 0; t < p.T;) {
      const i64 left = p.T - t, bit = t % kWordSteps;
      const int steps = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (EXTRA & kWords && bit == 0) __builtin_memset(b.words, 0, n * 4);
      if (EXTRA == kEverything && bit == 0) __builtin_memset(b.window, 0, n * 4);
      // What comes next: rows of this block, or the first ones of the next.
      const bool again = left > steps;
      const i64 next = again ? t + steps : 0, ahead = again ? 0 : kBlock;
      const int rows_ahead = int(least(4, p.T - next));
      for (i64 c = 0; c < n; c += kLanes) {
        const i64 at = lo + c, lanes = least(kLanes, n - c);
        if (fetch && at + ahead < last)
          for (int k = 0; k < rows_ahead; ++k) x.prefetch(next + k, at + ahead);
        const S* rows[4];
        void* outs[4] = {};
        for (int k = 0; k < steps; ++k) {
          rows[k] = x.read(t + k, at, lanes, in[k]);
          if (BYTES) outs[k] = spikes.place(t + k, at, lanes, out[k]);
        }
        if (steps == 4)
          plain_steps<S, BYTES, EXTRA, 4>(b, c, rows, outs, 1u << bit, S(p.alpha));
        else if (steps == 2)
          plain_steps<S, BYTES, EXTRA, 2>(b, c, rows, outs, 1u << bit, S(p.alpha));
        else
          plain_steps<S, BYTES, EXTRA, 1>(b, c, rows, outs, 1u << bit, S(p.alpha));
        if (BYTES)
          for (int k = 0; k < steps; ++k)
            if (outs[k] == out[k]) spikes.take(t + k, at, lanes, out[k]);
      }
      if (bit + steps == kWordSteps || left == steps) {
        const i64 word = t / kWordSteps * p.N + lo;
        if (EXTRA & kWords && p.words) write_words(p.words, p.word_bytes, word, n, b.words);
        if (EXTRA == kEverything && p.window)
          write_words(p.window, p.word_bytes, word, n, b.window);
      }
      t += steps;
    }
    if (EXTRA & kCount) write(p.count, b.count, lo, n, streaming);
    write(p.v, b.v, lo, n, streaming);
  }
  if (streaming) stream_fence();
}

template <class S, int BYTES>
void forward_extra(const IFForward& p, i64 first, i64 last, bool streaming) {
  const int asked = (p.count ? kCount : 0) | (p.words ? kWords : 0) | (p.window ? kEverything : 0);
  if (BYTES) {
    if (!asked) return forward_plain<S, BYTES, kNothing>(p, first, last, streaming);
  } else {
    if (asked == kWords) return forward_plain<S, BYTES, kWords>(p, first, last, streaming);
    if (!(asked & kWords)) return forward_plain<S, BYTES, kCount>(p, first, last, streaming);
  }
  forward_plain<S, BYTES, kEverything>(p, first, last, streaming);
}

template <class S>
void forward_bytes(const IFForward& p, i64 first, i64 last, bool streaming) {
  if (!p.spikes) return forward_extra<S, 0>(p, first, last, streaming);
  if (p.spike_bytes == 1) return forward_extra<S, 1>(p, first, last, streaming);
  if constexpr (sizeof(S) == 4)
    if (p.spike_bytes == 2) return forward_extra<S, 2>(p, first, last, streaming);
  forward_extra<S, sizeof(S)>(p, first, last, streaming);
}

void forward(const IFForward& p, i64 first, i64 last, bool streaming) {
  if (p.dtype == kFloat64) return forward_bytes<double>(p, first, last, streaming);
  forward_bytes<float>(p, first, last, streaming);
}

// ---- general

// Neurons ahead whose rows are prefetched: here all steps of kLanes neurons come first.
constexpr i64 kAhead = 4 * kLanes;

// A row of spikes, or the amplitudes of a block, in whatever width the spikes have.
union Elements {
  u8 b1[kLanes];
  u16 b2[kLanes];
  u32 b4[kLanes];
  u64 b8[kLanes];
  float single[kLanes];
  double real[kLanes];
};

inline void gather_elements(Elements& out, i32 bytes, const Operand& o, u64 number, i64 lo) {
  switch (bytes) {
    case 1:
      return gather(out.b1, o, u8(number), lo, kLanes);
    case 2:
      return gather(out.b2, o, u16(number), lo, kLanes);
    case 4:
      return gather(out.b4, o, u32(number), lo, kLanes);
    default:
      return gather(out.b8, o, number, lo, kLanes);
  }
}

// What the charge of kLanes general neurons needs, forward and backward.
template <class S>
struct Currents {
  alignas(64) S scale[kLanes];
  alignas(64) S bias[kLanes];
  alignas(64) S beta[kLanes];

  void read(const Operand& input_scale, const Operand& bias_, const Operand& beta_, i64 lo) {
    gather(scale, input_scale, S(input_scale.value), lo, kLanes);
    gather(bias, bias_, S(bias_.value), lo, kLanes);
    gather(beta, beta_, S(beta_.value), lo, kLanes);
  }

  // The currents of x: in `buffer`, or x itself.
  const S* from(const S* x, i32 options, S* buffer) const {
    if (options & kInputScale) {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) buffer[i] = x[i] * scale[i];
      x = buffer;
    }
    if (options & kBias) {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) buffer[i] = x[i] + bias[i];
      x = buffer;
    }
    return x;
  }
};

// kLanes general neurons. Options that change a loop are constants inside it.
template <class S, bool SMOOTH>
struct Lanes {
  alignas(64) S v[kLanes];
  alignas(64) S threshold[kLanes];
  alignas(64) S level[kLanes];
  alignas(64) S charge[kLanes];
  alignas(64) S k[kLanes];  // spikes of the last step
  alignas(64) i32 guard[kLanes];
  Currents<S> currents;
  S v_reset, alpha, margin, max_spikes, scale;
  double v_min;
  i32 options, surrogate, count_low, count_high;

  template <i32 OPTIONS>
  SNN_HD Neuron<S, SMOOTH> neuron(i64 i) const {
    return {threshold[i], level[i], currents.beta[i], v_reset,   alpha,     margin,    max_spikes,
            scale,        v_min,    OPTIONS,          surrogate, count_low, count_high};
  }

  template <i32 OPTIONS>
  void charge_lanes(const S* current) {
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) charge[i] = neuron<OPTIONS>(i).charge(v[i], current[i]);
  }

  template <i32 OPTIONS>
  void spike_lanes() {
    if constexpr (SMOOTH) {
      for (i64 i = 0; i < kLanes; ++i) k[i] = neuron<OPTIONS>(i).spike(charge[i]);
    } else {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) k[i] = neuron<OPTIONS>(i).spikes(charge[i], guard[i]);
    }
  }

  template <i32 OPTIONS>
  void reset_lanes() {
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) v[i] = neuron<OPTIONS>(i).reset(charge[i], k[i]);
  }

  void step(const S* current) {
    if (options & kResetDelay)
      charge_delayed(current);
    else if (options & kBeta)
      charge_lanes<kBeta>(current);
    else
      charge_lanes<0>(current);
    fire();
    reset();
    if (options & kSigned) {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) guard[i] += i32(k[i]);
    }
  }

  void charge_delayed(const S* current) {
    switch (options & (kBeta | kStrict)) {
      case kBeta | kStrict:
        return charge_lanes<kResetDelay | kBeta | kStrict>(current);
      case kBeta:
        return charge_lanes<kResetDelay | kBeta>(current);
      case kStrict:
        return charge_lanes<kResetDelay | kStrict>(current);
      default:
        return charge_lanes<kResetDelay>(current);
    }
  }

  void reset() {
    if (options & kResetDelay)
      reset_lanes<kResetDelay>();
    else if (options & kHardReset)
      reset_lanes<kHardReset>();
    else
      reset_lanes<0>();
    if (!(options & kClip)) return;
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) v[i] = neuron<0>(i).clip(v[i]);
  }

  void fire() {
    if (options & kBurst)
      spike_lanes<kBurst>();
    else if (options & kSigned)
      spike_lanes<kSigned>();
    else if (options & kStrict)
      spike_lanes<kStrict>();
    else
      spike_lanes<0>();
  }
};

template <class S, bool SMOOTH>
class General {
 public:
  General(const IFGeneral& p, bool streaming)
      : p_(p),
        streaming_(streaming),
        x_(p.base.x, p.base.x_rows, p.base.inner, p.base.N, p.base.dtype),
        spikes_(p.base.spikes, p.base.out_rows, p.base.inner, p.base.N, p.base.spike_bytes,
                streaming),
        v_seq_(p.v_seq, p.base.out_rows, p.base.inner, p.base.N, sizeof(S), streaming),
        charge_seq_(p.charge_seq, p.base.out_rows, p.base.inner, p.base.N, sizeof(S), streaming) {
    b_.v_reset = S(p.v_reset), b_.alpha = S(p.base.alpha), b_.margin = S(p.margin);
    b_.max_spikes = S(p.max_spikes), b_.scale = S(p.surrogate_scale), b_.v_min = p.v_min;
    b_.options = p.options, b_.surrogate = p.surrogate;
    b_.count_low = p.count_low, b_.count_high = p.count_high;
  }

  void run(i64 lo, i64 n) {
    const IFForward& p = p_.base;
    lo_ = lo, n_ = n;
    gather(start_, p.v_init, S(p.v_init.value), lo, kLanes);
    gather(b_.threshold, p.threshold, S(p.threshold.value), lo, kLanes);
    const Operand& level = p_.options & kFireLevel ? p_.fire_level : p.threshold;
    gather(b_.level, level, S(level.value), lo, kLanes);
    b_.currents.read(p_.input_scale, p_.bias, p_.beta, lo);
    if (p.spikes) gather_amplitude();
    for (i64 i = 0; i < kLanes; ++i) silent_[i] = false;
    if (p_.options & kMask)
      for (i64 i = 0; i < n; ++i) silent_[i] = p_.mask[lo + i] == 0;
    x_.begin(lo, n);
    if (p_.options & kProbeShift) shift();
    restart();
    emitted_ = next_ = 0;
    report();
    if (p_.options & kParallel)
      parallel();
    else
      sequential();
    write(p.count, count_, lo, n);
    write(p.v, b_.v, lo, n);
  }

 private:
  void gather_amplitude() {
    const IFForward& p = p_.base;
    gather_elements(amplitude_, p.spike_bytes, p.amplitude, p.amplitude_bits, lo_);
    if (!(p_.options & (kBurst | kSigned)) || p.spike_bytes == 1) return;
    if constexpr (sizeof(S) == 8) {
      __builtin_memcpy(weight_, amplitude_.real, sizeof weight_);
    } else {
      if (p.spike_bytes == 2)
        widen_lanes(p.dtype, amplitude_.b2, weight_);
      else
        __builtin_memcpy(weight_, amplitude_.single, sizeof weight_);
    }
  }

  void restart() {
    __builtin_memcpy(b_.v, start_, sizeof start_);
    __builtin_memset(b_.guard, 0, sizeof b_.guard);
    __builtin_memset(count_, 0, sizeof count_);
  }

  const S* current(i64 t) {
    if (streaming_ && x_.moves()) x_.prefetch(t, lo_ + kAhead);
    return b_.currents.from(x_.read(t, lo_, n_, read_), p_.options, current_);
  }

  void step(i64 t) { b_.step(current(t)); }

  void sequential() {
    // Probe steps report no counts.
    if (p_.options & kProbeMask && p_.probe > 0) next_ = p_.count_times;
    for (i64 t = 0; t < p_.base.T; ++t) {
      step(t);
      emit(t);
      v_seq_row(t);
      if (p_.options & kProbeMask && t + 1 == p_.probe) {
        for (i64 i = 0; i < kLanes; ++i) silent_[i] |= !(b_.v[i] / b_.threshold[i] > S(p_.margin));
        restart();
        emitted_ = next_ = 0;
        report();
      }
    }
  }

  void v_seq_row(i64 t) {
    if (v_seq_) v_seq_.take(t, lo_, n_, b_.v);
    if (charge_seq_) charge_seq_.take(t, lo_, n_, b_.charge);
  }

  // COS: runs of the probe steps, each from where the one before moved the initial membrane.
  void shift() {
    const S below = S(1.0 - p_.margin), above = S(1.0 + p_.margin);
    OffsetProbe<S> probes[kLanes];
    S v_init[kLanes];
    for (i64 i = 0; i < kLanes; ++i) v_init[i] = start_[i];
    for (i32 r = 0; r < p_.iterations; ++r) {
      restart();
      for (i64 i = 0; i < kLanes; ++i) probes[i].start();
      for (i64 t = 0; t < p_.probe; ++t) {
        step(t);
        __builtin_memset(b_.guard, 0, sizeof b_.guard);
        for (i64 i = 0; i < kLanes; ++i) probes[i].see(b_.charge[i], b_.k[i] != S(0));
      }
      for (i64 i = 0; i < kLanes; ++i)
        start_[i] = probes[i].shifted(start_[i], v_init[i], b_.v[i], b_.threshold[i], below, above);
    }
  }

  void parallel() {
    const i64 T = p_.base.T;
    alignas(64) S fires[kLanes];
    for (i64 t = 0; t < T; ++t) {
      const S* x = current(t);
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) b_.v[i] += x[i];
    }
    for (i64 i = 0; i < kLanes; ++i) {
      fires[i] = parallel_count(b_.v[i], b_.threshold[i], S(T));
      b_.charge[i] = b_.v[i];
      b_.v[i] -= select(fires[i] != S(0), fires[i] * b_.threshold[i]);
    }
    for (i64 t = 0; t < T; ++t) {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) b_.k[i] = select(S(t) < fires[i], S(1));
      emit(t);
    }
  }

  // Spikes, counts and packed bits of step t.
  void emit(i64 t) {
    const IFForward& p = p_.base;
    alignas(64) S audible[kLanes];
    const S* k = b_.k;
    if (p_.options & (kMask | kProbeMask)) {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) {
        const S spikes = b_.k[i];
        audible[i] = silent_[i] ? S(0) : spikes;
      }
      k = audible;
    }
    if (spikes_) emit_elements(t, k);
    if constexpr (SMOOTH) {
      for (i64 i = 0; i < kLanes; ++i) count_[i] += k[i] != S(0);
    } else {
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) count_[i] += i32(k[i]);
    }
    ++emitted_;
    report();
    if (!p.words && !p.window) return;
    const i64 bit = t % kWordSteps;
    if (bit == 0) {
      __builtin_memset(words_, 0, sizeof words_);
      __builtin_memset(window_, 0, sizeof window_);
    }
    const S alpha = b_.alpha;
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) {
      words_[i] |= select(k[i] != S(0), 1u << bit);
      window_[i] |= select(absolute(b_.charge[i] - b_.level[i]) * alpha < S(0.5), 1u << bit);
    }
    if (bit + 1 < kWordSteps && t + 1 < p.T) return;
    const i64 word = t / kWordSteps * p.N + lo_;
    if (p.words) write_words(p.words, p.word_bytes, word, n_, words_);
    if (p.window) write_words(p.window, p.word_bytes, word, n_, window_);
  }

  template <class B>
  void selected(B* out, const B* amplitude, const S* k) const {
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) {
      const B weight = amplitude[i];
      out[i] = select(k[i] != S(0), weight);
    }
  }

  void emit_elements(i64 t, const S* k) {
    const i32 bytes = p_.base.spike_bytes;
    Elements out;
    if constexpr (SMOOTH) {
      for (i64 i = 0; i < kLanes; ++i) out.real[i] = amplitude_.real[i] * k[i];
    } else if (!(p_.options & (kBurst | kSigned))) {
      if (bytes == 1)
        selected(out.b1, amplitude_.b1, k);
      else if (bytes == 2)
        selected(out.b2, amplitude_.b2, k);
      else if (bytes == 4)
        selected(out.b4, amplitude_.b4, k);
      else
        selected(out.b8, amplitude_.b8, k);
    } else if (bytes == 1) {
      for (i64 i = 0; i < kLanes; ++i) out.b1[i] = u8(i32(k[i]));
    } else {
      alignas(64) S weighed[kLanes];
#pragma omp simd
      for (i64 i = 0; i < kLanes; ++i) weighed[i] = select(k[i] != S(0), k[i] * weight_[i]);
      return spikes_.put(t, lo_, n_, weighed, p_.base.dtype);
    }
    spikes_.take(t, lo_, n_, &out);
  }

  // The counts asked for after as many steps as have been emitted.
  void report() {
    for (; p_.counts && next_ < p_.count_times && p_.count_at[next_] == emitted_; ++next_)
      write(p_.counts, count_, next_ * p_.base.N + lo_, n_);
  }

  const IFGeneral& p_;
  bool streaming_;
  Input<S> x_;
  Output spikes_, v_seq_, charge_seq_;
  Lanes<S, SMOOTH> b_;
  alignas(64) S start_[kLanes];
  alignas(64) S read_[kLanes];
  alignas(64) S current_[kLanes];
  alignas(64) S weight_[kLanes];
  alignas(64) i32 count_[kLanes];
  alignas(64) u32 words_[kLanes];
  alignas(64) u32 window_[kLanes];
  alignas(64) Elements amplitude_;
  alignas(64) i32 silent_[kLanes];
  i64 lo_, n_, emitted_;
  i32 next_;
};

template <class S, bool SMOOTH>
void general_range(const IFGeneral& p, i64 first, i64 last, bool streaming) {
  General<S, SMOOTH> block(p, streaming);
  for (i64 lo = first; lo < last; lo += kLanes) block.run(lo, least(kLanes, last - lo));
  if (streaming) stream_fence();
}

void general(const IFGeneral& p, i64 first, i64 last, bool streaming) {
  if (p.base.dtype != kFloat64) return general_range<float, false>(p, first, last, streaming);
  if (p.options & kSmooth) return general_range<double, true>(p, first, last, streaming);
  general_range<double, false>(p, first, last, streaming);
}

}  // namespace SNN_ISA
}  // namespace snn
