// Convolution of spikes on CPUs, with the neurons behind it.
//
// A weight is added where there is a spike; where there is none nothing is done, and few neurons
// fire at a step. The spikes of an input position and step become a list of channels, once for all
// windows they are in. For a tap of the window and a panel of 64 output channels the rows of
// weights that a list names are added to 64 sums in registers. All steps of a tap follow each
// other: a neuron that fires finds its row of weights in L1, where its last spike left it. The
// currents of the steps stay in L1 as well, and the neurons run on them there: a compare of 64
// membranes is the next layer's word.
//
// As in kernels_cpu.h nothing here may depend on anything but our headers.
#pragma once
#include "spike_lists.h"

namespace snn {
namespace SNN_ISA {

constexpr int kFloats = kVectorBytes / 4;

// Bytes of weights of an output channel and a row of taps that are read in one loop: those of the
// inputs that fire at all then fit in L1, for 64 output channels.
constexpr i64 kTogether = 1536;
typedef short i16;
typedef i16 Shorts __attribute__((vector_size(kVectorBytes)));

// Sums of one pass over a list: all 64 where the registers suffice.
constexpr int kInPass = kVectorBytes == 16 ? kPanel / 2 : kPanel;

// Membranes of a vector of neurons, and what they are given.
template <class M>
struct NeuronsOf {
  typedef Vec<float> type;
};
template <>
struct NeuronsOf<i32> {
  typedef Mask<float> type;
};
template <class M>
using Neurons = typename NeuronsOf<M>::type;

template <class M>
inline Neurons<M> currents_of(Vec<float> x) {
  return __builtin_convertvector(x, Neurons<M>);
}

// acc[64] += the rows of `weights` that a list names.
inline void add_rows(float* acc, const float* weights, const u16* list, i64 n) {
  constexpr int R = kInPass / kFloats;
  for (int j = 0; j < kPanel; j += kInPass) {
    Vec<float> sums[R];
    for (int r = 0; r < R; ++r) sums[r] = load(acc + j + r * kFloats);
    for (i64 i = 0; i < n; ++i) {
      const float* row = weights + i64(list[i]) * kPanel + j;
      for (int r = 0; r < R; ++r) sums[r] += load(row + r * kFloats);
    }
    for (int r = 0; r < R; ++r) store(acc + j + r * kFloats, sums[r]);
  }
}

inline void add_rows(i16* acc, const i16* weights, const u16* list, i64 n) {
  constexpr int L = kVectorBytes / 2, R = kPanel / L;
  Shorts sums[R];
  __builtin_memcpy(sums, acc, sizeof sums);
  for (i64 i = 0; i < n; ++i) {
    const i16* row = weights + i64(list[i]) * kPanel;
    for (int r = 0; r < R; ++r) {
      Shorts w;
      __builtin_memcpy(&w, row + r * L, sizeof w);
      sums[r] += w;
    }
  }
  __builtin_memcpy(acc, sums, sizeof sums);
}

// acc[N] += weights[N] where the bit is set.
template <int N>
inline void add_where(float* acc, const float* weights, u64 bits) {
  for (int j = 0; j < N; j += kFloats) {
#if defined(__AVX512F__)
    const __m512 a = (__m512)load(acc + j), w = (__m512)load(weights + j);
    store(acc + j, (Vec<float>)_mm512_mask_add_ps(a, __mmask16(bits >> j), a, w));
#else
    Mask<float> chosen;
    for (int r = 0; r < kFloats; ++r) chosen[r] = -i32(bits >> (j + r) & 1);
    const Vec<float> w = (Vec<float>)((Mask<float>)load(weights + j) & chosen);
    store(acc + j, load(acc + j) + w);
#endif
  }
}

// The signs of a vector's elements.
inline u64 bits_of(Mask<float> mask) {
#if defined(__AVX512F__)
  return u64(_mm512_movepi32_mask((__m512i)mask));
#elif defined(__AVX2__)
  return u64(u32(_mm256_movemask_ps((__m256)mask)));
#elif defined(__SSE2__)
  return u64(u32(_mm_movemask_ps((__m128)mask)));
#else
  u64 bits = 0;
  for (int r = 0; r < kFloats; ++r) bits |= u64(mask[r] & 1) << r;
  return bits;
#endif
}

// What one thread works in.
struct SpikeScratch {
  float* currents;  // [steps, 64]
  float* maxima;    // [steps, 64]
  i16* sums;        // [steps, 64]
  float* state;     // [places, state_floats]
  i32* counts;      // [places, 64]
  char* branches;
};

// Calls run(weights of the tap, input row, input column) for the taps that lie in the map.
template <class Run>
inline void taps(const SpikeBranch& b, i64 y, i64 x, Run run) {
  const i64 rows = source_rows(b), columns = source_columns(b);
  for (i64 i = 0; i < b.kh; ++i) {
    const i64 sy = y * b.sh - b.ph + i * b.dh;
    if (sy < 0 || sy >= rows) continue;
    for (i64 j = 0; j < b.kw; ++j) {
      const i64 sx = x * b.sw - b.pw + j * b.dw;
      if (sx >= 0 && sx < columns) run(i * b.kw + j, sy, sx);
    }
  }
}

// The taps of a row of the window at once where their weights fit in L1 together: the lists of
// neighbouring columns follow each other, so that one loop adds the spikes of all.
template <class W>
inline bool together(const SpikeBranch& b) {
  return placed(b) && b.dw == 1 && b.kw * b.used_words * kPanel * i64(sizeof(W)) <= kTogether;
}

template <class W>
inline void gather(W* sums, const KeptRows& kept, const SpikeBranch& b, i64 panel, i64 y, i64 x,
                   i64 steps) {
  const i64 channels = rows_of_tap(b), rows = source_rows(b), columns = source_columns(b);
  const W* weights = static_cast<const W*>(b.weights) + panel * b.kh * b.kw * channels * kPanel;
  const i64 x0 = x * b.sw - b.pw, at_once = together<W>(b) ? b.kw : 1;
  for (i64 i = 0; i < b.kh; ++i) {
    const i64 sy = y * b.sh - b.ph + i * b.dh;
    if (sy < 0 || sy >= rows) continue;
    const i32* starts = kept.starts_of(sy);
    const u16* list = kept.list_of(sy);
    for (i64 j = 0; j < b.kw; j += at_once) {
      const i64 tap = x0 + j * b.dw, low = tap < 0 ? 0 : tap;
      const i64 high = tap + at_once < columns ? tap + at_once : columns;
      if (low >= high) continue;
      // A list counts channels from the first column on, weights from the first tap on.
      const i64 column = placed(b) ? tap : 0;
      const W* origin = weights + ((i * b.kw + j) - column) * channels * kPanel;
      for (i64 t = 0; t < steps; ++t) {
        const i64 begin = starts[t * columns + low], n = starts[t * columns + high] - begin;
        if (n) add_rows(sums + t * kPanel, origin, list + begin, n);
      }
    }
  }
}

template <int N>
inline void mask(float* currents, const SpikeConv& p, const SpikeBranch& b, i64 panel, i64 image,
                 i64 y, i64 x, i64 t0, i64 steps) {
  const float* weights = static_cast<const float*>(b.weights) + panel * b.kh * b.kw * kPanel;
  const i64 column = p.T * b.row_words, row = b.W * column;
  taps(b, y, x, [&](i64 tap, i64 sy, i64 sx) {
    const u64* corner = b.words + (image * b.H + sy * b.pool_sh) * row + sx * b.pool_sw * column +
                        t0 * b.row_words + b.first_word + panel;
    for (i64 t = 0; t < steps; ++t) {
      const u64* here = corner + t * b.row_words;
      u64 any = 0;
      for (i64 i = 0; i < b.pool_h; ++i)
        for (i64 j = 0; j < b.pool_w; ++j) {
          const u64 word = here[i * row + j * column];
          if (b.either)
            any |= word;
          else if (word)
            add_where<N>(currents + t * N, weights + tap * kPanel, word);
        }
      if (any) add_where<N>(currents + t * N, weights + tap * kPanel, any);
    }
  });
}

class SpikeConvUnit {
 public:
  SpikeConvUnit(const SpikeConv& p, const SpikeBranch* branches, i64 n, const SpikeUnit& unit,
                void* scratch)
      : p_(p), branches_(branches), n_(n), unit_(unit), columns_(p.OW / p.pool) {
    const i64 steps = spike_steps(p);
    const i64 places = state_places(p, unit.r1 - unit.r0, unit.p1 - unit.p0);
    char* at = static_cast<char*>(scratch);
    const auto take = [&at](i64 bytes) {
      char* here = at;
      at += bytes;
      return here;
    };
    s_.currents = reinterpret_cast<float*>(take(steps * kPanel * i64(sizeof(float))));
    s_.maxima = reinterpret_cast<float*>(take(steps * kPanel * i64(sizeof(float))));
    s_.sums = reinterpret_cast<i16*>(take(steps * kPanel * i64(sizeof(i16))));
    s_.state = reinterpret_cast<float*>(take(places * state_floats(p) * i64(sizeof(float))));
    s_.counts = reinterpret_cast<i32*>(take(places * kPanel * i64(sizeof(i32))));
    s_.branches = at;
  }

  void run() {
    for (i64 t0 = 0; t0 < p_.T; t0 += kSpikeSteps) {
      const i64 left = p_.T - t0, steps = left < kSpikeSteps ? left : kSpikeSteps;
      for (i64 i = 0; i < n_; ++i) kept_rows_of(s_.branches, p_, branches_, i).forget();
      for (i64 r = unit_.r0; r < unit_.r1; ++r)
        for (i64 panel = unit_.p0; panel < unit_.p1; ++panel)
          for (i64 x = 0; x < columns_; ++x) position(r, x, panel, t0, steps);
    }
  }

 private:
  // The currents of one position before any pool.
  void convolve(i64 y, i64 x, i64 panel, i64 t0, i64 steps) {
    const i64 first = panel * kPanel;
    alignas(64) float start[kPanel];
    for (i64 c = 0; c < kPanel; ++c) start[c] = p_.bias ? p_.bias[first + c] : 0.0f;
    if (p_.current) {
      const float* here =
          p_.current + ((unit_.b * p_.OH + y) * p_.OW + x) * p_.panels * kPanel + first;
      for (i64 c = 0; c < kPanel; ++c) start[c] = p_.bias ? start[c] + here[c] : here[c];
    }
    for (i64 t = 0; t < steps; ++t) __builtin_memcpy(s_.currents + t * kPanel, start, sizeof start);
    for (i64 i = 0; i < n_; ++i) {
      const SpikeBranch& b = branches_[i];
      const i64 of_branch = panel - b.first_panel;
      if (of_branch < 0 || of_branch >= b.panels) continue;
      if (b.kind == kEachToItself) {
        mask<kPanel>(s_.currents, p_, b, of_branch, unit_.b, y, x, t0, steps);
        continue;
      }
      KeptRows rows = kept_rows_of(s_.branches, p_, branches_, i);
      for (i64 k = 0; k < b.kh; ++k) {
        const i64 sy = y * b.sh - b.ph + k * b.dh;
        if (sy >= 0 && sy < source_rows(b)) read_row(rows, p_, b, unit_.b, sy, t0, steps);
      }
      if (!b.scale) {
        gather(s_.currents, rows, b, of_branch, y, x, steps);
        continue;
      }
      __builtin_memset(s_.sums, 0, steps * kPanel * sizeof(i16));
      gather(s_.sums, rows, b, of_branch, y, x, steps);
      const float* scale = b.scale + of_branch * kPanel;
      for (i64 t = 0; t < steps; ++t)
#pragma omp simd
        for (i64 c = 0; c < kPanel; ++c)
          s_.currents[t * kPanel + c] += float(s_.sums[t * kPanel + c]) * scale[c];
    }
  }

  // The increments of the largest running sum of a window; `sums` are the window's, then their
  // maximum.
  void pool(i64 r, i64 column, i64 panel, i64 t0, i64 steps, float* sums) {
    const i64 side = p_.pool;
    for (i64 i = 0; i < side; ++i)
      for (i64 j = 0; j < side; ++j) {
        convolve(r * side + i, column * side + j, panel, t0, steps);
        float* sum = sums + (i * side + j) * kPanel;
        const bool first = i + j == 0;
        for (i64 t = 0; t < steps; ++t) {
          float* most = s_.maxima + t * kPanel;
          const float* x = s_.currents + t * kPanel;
#pragma omp simd
          for (i64 c = 0; c < kPanel; ++c) {
            const float now = sum[c] + x[c];
            sum[c] = now;
            most[c] = first || now > most[c] || now != now ? now : most[c];
          }
        }
      }
    float* before = sums + side * side * kPanel;
    for (i64 t = 0; t < steps; ++t)
#pragma omp simd
      for (i64 c = 0; c < kPanel; ++c) {
        const float now = s_.maxima[t * kPanel + c];
        s_.currents[t * kPanel + c] = now - before[c];
        before[c] = now;
      }
  }

  void position(i64 r, i64 x, i64 panel, i64 t0, i64 steps) {
    const i64 panels = unit_.p1 - unit_.p0;
    const i64 place =
        p_.T > kSpikeSteps ? ((r - unit_.r0) * columns_ + x) * panels + panel - unit_.p0 : 0;
    float* v = s_.state + place * state_floats(p_);
    if (p_.pool > 1) {
      if (!t0) __builtin_memset(v + kPanel, 0, (state_floats(p_) - kPanel) * sizeof(float));
      pool(r, x, panel, t0, steps, v + kPanel);
    } else {
      convolve(r, x, panel, t0, steps);
    }
    const i64 rows = p_.OH / p_.pool, at = (unit_.b * rows + r) * columns_ + x;
    if (p_.currents) {
      const i64 step = p_.B * rows * columns_ * p_.panels * kPanel;
      float* to = p_.currents + t0 * step + (at * p_.panels + panel) * kPanel;
      for (i64 t = 0; t < steps; ++t)
        __builtin_memcpy(to + t * step, s_.currents + t * kPanel, kPanel * sizeof(float));
    }
    if (!p_.threshold) return;
    const i64 first = panel * kPanel, here = r * columns_ + x;
    if (!t0)
      __builtin_memcpy(v, p_.v_init + here * p_.v_init_position + first, kPanel * sizeof(float));
    const float* threshold = p_.threshold + here * p_.threshold_position + first;
    u64* words = p_.spikes ? p_.spikes + (at * p_.T + t0) * p_.panels + panel : nullptr;
    const auto run =
        p_.integers ? p_.strict ? &SpikeConvUnit::fire<true, i32> : &SpikeConvUnit::fire<false, i32>
        : p_.strict ? &SpikeConvUnit::fire<true, float>
                    : &SpikeConvUnit::fire<false, float>;
    (this->*run)(v, threshold, words, place, at, panel, t0, steps);
  }

  // M: of membranes and thresholds.
  template <bool STRICT, class M>
  void fire(float* v, const float* threshold, u64* words, i64 place, i64 at, i64 panel, i64 t0,
            i64 steps) {
    constexpr int R = kInPass / kFloats;
    i32* counts = s_.counts + place * kPanel;
    if (p_.counts && !t0) __builtin_memset(counts, 0, kPanel * sizeof(i32));
    if (words && kInPass < kPanel)
      for (i64 t = 0; t < steps; ++t) words[t * p_.panels] = 0;
    for (int j = 0; j < kPanel; j += kInPass) {
      Neurons<M> m[R], theta[R];
      Mask<float> count[R] = {};
      for (int r = 0; r < R; ++r) {
        m[r] = (Neurons<M>)(load(v + j + r * kFloats));
        theta[r] = (Neurons<M>)(load(threshold + j + r * kFloats));
        if (p_.counts) __builtin_memcpy(&count[r], counts + j + r * kFloats, sizeof count[r]);
      }
      i32 next = 0;
      while (p_.counts && next < p_.times && p_.count_at[next] <= t0) ++next;
      for (i64 t = 0; t < steps; ++t) {
        const float* x = s_.currents + t * kPanel + j;
        u64 word = 0;
        for (int r = 0; r < R; ++r) {
          m[r] += currents_of<M>(load(x + r * kFloats));
          const Mask<float> fired = STRICT ? m[r] > theta[r] : m[r] >= theta[r];
          m[r] -= (Neurons<M>)((Mask<float>)theta[r] & fired);
          word |= bits_of(fired) << (r * kFloats);
          if (p_.counts) count[r] -= fired;
        }
        if (words)
          words[t * p_.panels] = kInPass < kPanel ? words[t * p_.panels] | word << j : word;
        for (; p_.counts && next < p_.times && p_.count_at[next] == t0 + t + 1; ++next) {
          const i64 positions = p_.B * (p_.OH / p_.pool) * columns_;
          i32* to = p_.counts + ((next * positions + at) * p_.panels + panel) * kPanel + j;
          for (int r = 0; r < R; ++r)
            __builtin_memcpy(to + r * kFloats, &count[r], sizeof count[r]);
        }
      }
      for (int r = 0; r < R; ++r) {
        store(v + j + r * kFloats, (Vec<float>)m[r]);
        if (p_.counts) __builtin_memcpy(counts + j + r * kFloats, &count[r], sizeof count[r]);
      }
    }
  }

  const SpikeConv& p_;
  const SpikeBranch* branches_;
  const i64 n_;
  const SpikeUnit& unit_;
  const i64 columns_;
  SpikeScratch s_;
};

}  // namespace SNN_ISA
}  // namespace snn
