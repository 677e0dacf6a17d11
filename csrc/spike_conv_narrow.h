// Few output channels: a row of outputs and a step at a time.
//
// The lists of a position and step are short, and beginning one costs more than what it names. All
// spikes of an input row and step are one list instead. Each is added to the outputs of the row
// that it reaches: its weights for the columns of the kernel lie together, and so do those outputs.
#pragma once
#include "spike_conv_cpu.h"

namespace snn {
namespace SNN_ISA {

// As many of N elements of a type as a vector holds.
template <class W, int N>
struct Lanes {
  static constexpr int bytes =
      N * int(sizeof(W)) < kVectorBytes ? N * int(sizeof(W)) : kVectorBytes;
  static constexpr int size = bytes / int(sizeof(W));
  typedef W Vector __attribute__((vector_size(bytes)));
};

// sums[column + tap * spread][N] += weights[row][tap][N] for the (column, row) of a list.
template <class W, int N>
inline void add_around(W* sums, const W* weights, const u16* list, i64 n, i64 rows, int taps,
                       i64 spread) {
  typedef typename Lanes<W, N>::Vector V;
  constexpr int L = Lanes<W, N>::size;
  const u64 inverse = ((u64(1) << 32) + u64(rows) - 1) / u64(rows);
  for (i64 i = 0; i < n; ++i) {
    // Exact: an element is below 2^16.
    const i64 column = i64(list[i] * inverse >> 32);
    const W* w = weights + (list[i] - column * rows) * taps * N;
    W* to = sums + column * N;
    for (int j = 0; j < taps; ++j, w += N, to += spread * N)
      for (int r = 0; r < N; r += L) {
        V a, b;
        __builtin_memcpy(&a, to + r, sizeof a);
        __builtin_memcpy(&b, w + r, sizeof b);
        a += b;
        __builtin_memcpy(to + r, &a, sizeof a);
      }
  }
}

template <int N>
class NarrowUnit {
 public:
  NarrowUnit(const SpikeConv& p, const SpikeBranch* branches, i64 n, const SpikeUnit& unit,
             void* scratch)
      : p_(p), branches_(branches), n_(n), unit_(unit) {
    const i64 places = state_places(p, unit.r1 - unit.r0, 1);
    float* at = static_cast<float*>(scratch);
    for (i64 i = 0; i < n; ++i)
      if (in_place(branches[i])) in_place_ = i;
    const i64 row = narrow_columns(p, branches, n) * N;
    constant_ = at;
    sums_of_all_ = at + row;
    sums_ = at + 2 * row;
    const i64 first = in_place_ < 0 ? 0 : begins(branches[in_place_]);
    current_ = sums_of_all_ + first * N;
    columns_ = in_place_ < 0 ? p.OW : reached_columns(branches[in_place_]);
    __builtin_memset(constant_, 0, columns_ * N * sizeof(float));
    constant_ += first * N;
    at += 3 * row;
    v_ = at;
    counts_ = reinterpret_cast<i32*>(at + places * N);
    rows_ = reinterpret_cast<char*>(at + 2 * places * N);
  }

  void run() {
    for (i64 t0 = 0; t0 < p_.T; t0 += kSpikeSteps) {
      const i64 left = p_.T - t0, steps = left < kSpikeSteps ? left : kSpikeSteps;
      for (i64 i = 0; i < n_; ++i) kept_rows_of(rows_, p_, branches_, i).forget();
      for (i64 r = unit_.r0; r < unit_.r1; ++r) row(r, t0, steps);
    }
  }

 private:
  // Where in a branch's sums those of output 0 are: where the last column of its window begins.
  static i64 begins(const SpikeBranch& b) { return i64(b.kw - 1) * b.dw - b.pw; }

  // Whether its sums can be those of all branches: all outputs are among them, in their order.
  static bool in_place(const SpikeBranch& b) {
    return b.kind == kAnyToAny && !b.scale && b.sw == 1 && begins(b) >= 0;
  }

  void row(i64 r, i64 t0, i64 steps) {
    const i64 place = p_.T > kSpikeSteps ? (r - unit_.r0) * p_.OW : 0;
    begin(r, t0, place);
    for (i64 i = 0; i < n_; ++i) {
      const SpikeBranch& b = branches_[i];
      if (b.kind == kEachToItself) continue;
      KeptRows rows = kept_rows_of(rows_, p_, branches_, i);
      for (i64 k = 0; k < b.kh; ++k) {
        const i64 sy = r * b.sh - b.ph + k * b.dh;
        if (sy >= 0 && sy < source_rows(b)) read_row(rows, p_, b, unit_.b, sy, t0, steps);
      }
    }
    for (i64 t = 0; t < steps; ++t) {
      const i64 first = sums_of_all_ - current_;
      __builtin_memcpy(sums_of_all_, constant_ + first, columns_ * N * sizeof(float));
      for (i64 i = 0; i < n_; ++i) {
        const SpikeBranch& b = branches_[i];
        if (b.kind == kEachToItself)
          for (i64 x = 0; x < p_.OW; ++x)
            mask<N>(current_ + x * N, p_, b, 0, unit_.b, r, x, t0 + t, 1);
        else if (b.scale)
          scatter<i16>(i, r, t);
        else
          scatter<float>(i, r, t);
      }
      if (p_.currents) give(r, t0 + t);
      if (!p_.threshold) continue;
      const auto run =
          p_.integers ? p_.strict ? &NarrowUnit::fire<true, i32> : &NarrowUnit::fire<false, i32>
          : p_.strict ? &NarrowUnit::fire<true, float>
                      : &NarrowUnit::fire<false, float>;
      (this->*run)(r, t0 + t, place);
    }
  }

  // What is the same at all steps; before the first also the state.
  void begin(i64 r, i64 t0, i64 place) {
    for (i64 x = 0; x < p_.OW; ++x) {
      const float* more =
          p_.current ? p_.current + ((unit_.b * p_.OH + r) * p_.OW + x) * kPanel : nullptr;
      for (i64 c = 0; c < N; ++c) {
        const float bias = p_.bias ? p_.bias[c] : 0.0f;
        constant_[x * N + c] = more ? p_.bias ? bias + more[c] : more[c] : bias;
      }
      if (t0 || !p_.threshold) continue;
      __builtin_memcpy(v_ + (place + x) * N, p_.v_init + (r * p_.OW + x) * p_.v_init_position,
                       N * sizeof(float));
      __builtin_memset(counts_ + (place + x) * N, 0, N * sizeof(i32));
    }
  }

  template <class W>
  void scatter(i64 i, i64 r, i64 t) {
    const SpikeBranch& b = branches_[i];
    const KeptRows kept = kept_rows_of(rows_, p_, branches_, i);
    const i64 columns = source_columns(b), reached = reached_columns(b), rows = rows_of_tap(b);
    W* sums = reinterpret_cast<W*>(i == in_place_ ? sums_of_all_ : sums_);
    if (i != in_place_) __builtin_memset(sums, 0, reached * N * sizeof(W));
    for (i64 k = 0; k < b.kh; ++k) {
      const i64 sy = r * b.sh - b.ph + k * b.dh;
      if (sy < 0 || sy >= source_rows(b)) continue;
      const i32* starts = kept.starts_of(sy) + t * columns;
      const u16* list = kept.list_of(sy) + starts[0];
      const i64 n = starts[columns] - starts[0];
      const W* weights = static_cast<const W*>(b.weights) + k * rows * b.kw * N;
      if (b.kw == 3)
        add_around<W, N>(sums, weights, list, n, rows, 3, b.dw);
      else if (b.kw == 1)
        add_around<W, N>(sums, weights, list, n, rows, 1, 1);
      else
        add_around<W, N>(sums, weights, list, n, rows, b.kw, b.dw);
    }
    if (i == in_place_) return;
    for (i64 x = 0; x < p_.OW; ++x) {
      const i64 at = x * b.sw + begins(b);
      if (at < 0 || at >= reached) continue;
      float* to = current_ + x * N;
      const W* from = sums + at * N;
#pragma omp simd
      for (int c = 0; c < N; ++c) to[c] += b.scale ? float(from[c]) * b.scale[c] : float(from[c]);
    }
  }

  // Channels that are only padding get what all steps get.
  void give(i64 r, i64 t) {
    for (i64 x = 0; x < p_.OW; ++x) {
      const i64 at = ((unit_.b * p_.OH + r) * p_.OW + x) * kPanel;
      float* to = p_.currents + t * p_.B * p_.OH * p_.OW * kPanel + at;
      __builtin_memcpy(to, current_ + x * N, N * sizeof(float));
      for (i64 c = N; c < kPanel; ++c) {
        const float bias = p_.bias ? p_.bias[c] : 0.0f;
        to[c] = p_.current ? bias + p_.current[at + c] : bias;
      }
    }
  }

  template <bool STRICT, class M>
  void fire(i64 r, i64 t, i64 place) {
    constexpr int R = N / kFloats;
    const i64 first = (unit_.b * p_.OH + r) * p_.OW;
    i32 which = -1;
    for (i32 i = 0; p_.counts && i < p_.times; ++i)
      if (p_.count_at[i] == t + 1) which = i;
    Neurons<M> theta[R];
    for (int j = 0; j < R; ++j) theta[j] = (Neurons<M>)load(p_.threshold + j * kFloats);
    for (i64 x = 0; x < p_.OW; ++x) {
      if (p_.threshold_position) {
        const float* here = p_.threshold + (r * p_.OW + x) * p_.threshold_position;
        for (int j = 0; j < R; ++j) theta[j] = (Neurons<M>)load(here + j * kFloats);
      }
      float* v = v_ + (place + x) * N;
      i32* counts = counts_ + (place + x) * N;
      u64 word = 0;
      for (int j = 0; j < R; ++j) {
        const Neurons<M> m = (Neurons<M>)load(v + j * kFloats) +
                             currents_of<M>(load(current_ + x * N + j * kFloats));
        const Mask<float> fired = STRICT ? m > theta[j] : m >= theta[j];
        store(v + j * kFloats, (Vec<float>)(m - (Neurons<M>)((Mask<float>)theta[j] & fired)));
        word |= bits_of(fired) << (j * kFloats);
        if (p_.counts) {
          Mask<float> count;
          __builtin_memcpy(&count, counts + j * kFloats, sizeof count);
          count -= fired;
          __builtin_memcpy(counts + j * kFloats, &count, sizeof count);
        }
      }
      if (p_.spikes) p_.spikes[(first + x) * p_.T + t] = word;
      if (which < 0) continue;
      i32* to = p_.counts + (i64(which) * p_.B * p_.OH * p_.OW + first + x) * kPanel;
      __builtin_memcpy(to, counts, N * sizeof(i32));
      __builtin_memset(to + N, 0, (kPanel - N) * sizeof(i32));
    }
  }

  const SpikeConv& p_;
  const SpikeBranch* branches_;
  const i64 n_;
  const SpikeUnit& unit_;
  i64 in_place_ = -1;  // the branch that adds to the sums of all
  i64 columns_;        // of those sums
  // Rows of [N]: what is the same at all steps, and the currents, from output 0 on; the sums of all
  // branches, which may begin before output 0; those of one.
  float *constant_, *current_, *sums_of_all_, *sums_;
  float* v_;     // [places, N]
  i32* counts_;  // [places, N]
  char* rows_;
};

}  // namespace SNN_ISA
}  // namespace snn
