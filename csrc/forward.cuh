// Forward, plain: soft reset, fire at >=.
#pragma once
#include "gpu.cuh"

namespace snn {

// What a kernel writes besides the final membrane. kSpikes: spikes of the type of x. kByte: 1-byte
// spikes, count. kWords: packed spikes, count. kSpikesCount: spikes, count. kTraining: window,
// spikes, packed spikes, count.
enum Output : i32 { kSpikes = 0, kByte = 1, kWords = 2, kSpikesCount = 3, kTraining = 4 };

// The registers of a thread. EACH: a threshold and an amplitude for each of its neurons, otherwise
// one for all. WORD: bits of a neuron's packed steps, side by side in a register; 32 where T is
// known at run time only.
template <class X, int OUT, int VEC, bool EACH, int WORD = 32>
struct Lanes {
  typedef State<X> S;
  typedef Bits<OUT == kByte ? 1 : int(sizeof(X))> B;
  enum {
    kHasSpikes = OUT != kWords,
    kHasWords = OUT == kWords || OUT == kTraining,
    kHasWindow = OUT == kTraining,
    // Words are counted when they are full, other spikes one by one.
    kCounts = OUT == kByte || OUT == kSpikesCount,
    kParams = EACH ? VEC : 1,
    kIn = VEC == 1 ? 1 : 32 / WORD  // neurons whose bits share a register
  };

  S v[VEC], threshold[kParams];
  Pack<B, kParams> amplitude;
  u32 words[kHasWords ? VEC / kIn : 1], window[kHasWindow ? VEC : 1];
  i32 count[VEC];
  S alpha;

  __device__ __forceinline__ Lanes(const IFForward& p, i64 n) {
    Cursor<S, VEC> v_init(p.v_init, n);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      v[i] = v_init.next(S(p.v_init.value));
      count[i] = 0;
      if constexpr (kHasWords) words[i / kIn] = 0;
      if constexpr (kHasWindow) window[i] = 0;
    }
    if constexpr (EACH) {
      Cursor<S, VEC> th(p.threshold, n);
      Cursor<B, VEC> amp(p.amplitude, n);
      SNN_UNROLL
      for (int i = 0; i < VEC; ++i) {
        threshold[i] = th.next(S(p.threshold.value));
        if constexpr (kHasSpikes) put(amplitude, i, true, amp.next(B(p.amplitude_bits)));
      }
    } else {
      threshold[0] = read<S>(p.threshold, n);
      if constexpr (kHasSpikes)
        put(amplitude, 0, true, read_bits<B>(p.amplitude, n, p.amplitude_bits));
    }
    if constexpr (kHasWindow) alpha = S(p.alpha);
  }

  __device__ __forceinline__ void charge(const Pack<X, VEC>& x) {
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) v[i] += widen_at(x, i);
  }

  // bit: of this step in its word.
  __device__ __forceinline__ void fire(u32 bit, Pack<B, VEC>& spikes) {
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      const S th = threshold[EACH ? i : 0];
      if constexpr (kHasWindow)
        window[i] |= select(surrogate_derivative<kRectangle>(v[i] - th, alpha) != S(0), bit);
      const bool s = fires(v[i], th, false);
      // The bits of reset_by_subtraction: m - 0 is m.
      v[i] = s ? v[i] - th : v[i];
      if constexpr (kHasWords) {
        words[i / kIn] |= select(s, bit << (i % kIn * WORD));
        keep(words[i / kIn]);
      }
      if constexpr (kCounts) count[i] += s;
      if constexpr (kHasSpikes) put(spikes, i, s, element_of(amplitude, EACH ? i : 0));
    }
  }

  static __device__ __forceinline__ B element_of(const Pack<B, kParams>& pack, int i) {
    if constexpr (sizeof(B) >= 4) return pack.at[i];
    constexpr int kIn = sizeof(B) >= 4 ? 1 : 4 / sizeof(B);
    return B(pack.words[i / kIn] >> (8 * sizeof(B) * (i % kIn)));
  }

  // Stores the words of the steps up to and with t and starts new ones.
  __device__ __forceinline__ void flush(const IFForward& p, i64 n, i64 t, i32 word_bytes) {
    const i64 at = t / kWordSteps * p.N + n;
    if constexpr (kHasWords) {
      if constexpr (kIn > 1) {
        if (p.words) store_side_by_side<Bits<WORD / 8>, VEC>(p.words, at, words);
      } else {
        if (p.words) store_words<VEC>(p.words, at, word_bytes, words);
      }
    }
    if constexpr (kHasWindow) store_words<VEC>(p.window, at, word_bytes, window);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) {
      if constexpr (kHasWords) {
        count[i] += ones(kIn == 1 ? words[i]
                                  : words[i / kIn] >> (i % kIn * WORD) & ((1u << WORD % 32) - 1u));
      }
      if constexpr (kHasWindow) window[i] = 0;
    }
    if constexpr (kHasWords) {
      SNN_UNROLL
      for (int i = 0; i < VEC / kIn; ++i) words[i] = 0;
    }
  }

  __device__ __forceinline__ void finish(const IFForward& p, i64 n) {
    if constexpr (kHasWords || kCounts) {
      if (p.count) store_all<i32, VEC>(p.count, n, count);
    }
    if (p.v) store_all<S, VEC>(p.v, n, v);
  }
};

// Blocks that a multiprocessor should hold, where the compiler left alone uses more registers than
// it needs or spills to use fewer; 0 leaves it alone. Which holds depends on the architecture.
#if defined(__CUDA_ARCH__)
enum { kArch = __CUDA_ARCH__ };
#else
enum { kArch = 0 };
#endif

// sm_75 has room for 4 blocks of 256 threads.
template <int BLOCKS>
constexpr int kRoomFor = kArch && kArch < 800 && BLOCKS > 4 ? 4 : BLOCKS;

template <class X, int OUT, int VEC, bool EACH>
constexpr int kBlocks = VEC == 1                           ? 0
                        : EACH                             ? (OUT == kSpikesCount ? 2 : 0)
                        : sizeof(X) == 4 && OUT == kSpikes ? kRoomFor < (kArch < 1000) ? 6 : 5 >
                        : sizeof(X) == 8 && OUT != kSpikes ? 1
                                                           : 0;

template <class X, int OUT, int VEC, int T>
constexpr int kBlocksOfSteps =
    VEC == 1                 ? T == 32 ? kRoomFor<5> : 1
    : sizeof(X) == 4         ? kRoomFor < (kArch >= 1000 && OUT == kWords) ? 5 : 6 >
    : OUT == kWords&& T == 8 ? kRoomFor<6>
    : OUT == kWords && T >= 16 && kArch < 900 ? 4
                                              : kRoomFor<5>;

// Any T, any output, any form of parameters.
template <class X, int OUT, int VEC, bool EACH>
__global__ void __launch_bounds__(kThreads, kBlocks<X, OUT, VEC, EACH>) if_forward(IFForward p) {
  typedef Lanes<X, OUT, VEC, EACH> L;
  typedef typename L::B B;
  const i64 n = global_thread() * VEC;
  if (n >= p.N) return;
  L lanes(p, n);
  const Place place(n, p.inner, p.N);
  const X* x = static_cast<const X*>(p.x) + place.in(p.x_rows);
  B* spikes = static_cast<B*>(p.spikes) + (L::kHasSpikes ? place.in(p.out_rows) : 0);
  const bool constant = p.x_rows.step == 0;
  const bool stores = OUT == kSpikes || (L::kHasSpikes && p.spikes);

  // Slot t % kLoadsInFlight holds step t's row; it is loaded again as soon as it has been used.
  Pack<X, VEC> ring[kLoadsInFlight];
  SNN_UNROLL
  for (int k = 0; k < kLoadsInFlight; ++k) {
    if (k < p.T) ring[k] = load<X, VEC>(x);
    advance(x, p.x_rows.step);
  }
  u32 bit = 1;
  i32 left = i32(p.T);

  while (left > 0) {
    // Two kinds of rounds: one with all steps there and all rows of the next, one that checks.
    const bool full = left >= 2 * kLoadsInFlight;
    if (full) {
      SNN_UNROLL
      for (int k = 0; k < kLoadsInFlight; ++k) {
        Pack<B, VEC> out = {};
        lanes.charge(ring[k]);
        if (!constant) ring[k] = load<X, VEC>(x);
        advance(x, p.x_rows.step);
        lanes.fire(bit << k, out);
        if (stores) store<B, VEC>(spikes, out);
        if constexpr (L::kHasSpikes) advance(spikes, p.out_rows.step);
      }
    } else {
      SNN_UNROLL
      for (int k = 0; k < kLoadsInFlight; ++k) {
        if (k >= left) break;
        Pack<B, VEC> out = {};
        lanes.charge(ring[k]);
        if (!constant && k + kLoadsInFlight < left) ring[k] = load<X, VEC>(x);
        advance(x, p.x_rows.step);
        lanes.fire(bit << k, out);
        if (stores) store<B, VEC>(spikes, out);
        if constexpr (L::kHasSpikes) advance(spikes, p.out_rows.step);
      }
    }
    left -= kLoadsInFlight;
    if constexpr (L::kHasWords) {
      bit <<= kLoadsInFlight;
      if (bit == 0 || left <= 0) {
        lanes.flush(p, n, p.T - (left > 0 ? left : 0) - 1, p.word_bytes);
        bit = 1;
      }
    }
  }
  lanes.finish(p, n);
}

// T known: all steps unrolled. VEC 1 is the form for few neurons, whose time is the latency of the
// loads: all of them are in flight.
template <class X, int OUT, int VEC, int T>
__global__ void __launch_bounds__(kThreads, kBlocksOfSteps<X, OUT, VEC, T>)
    if_forward_steps(IFForward p) {
  constexpr int kWord = T <= 8 ? 8 : T <= 16 ? 16 : 32;
  typedef Lanes<X, OUT, VEC, false, kWord> L;
  typedef typename L::B B;
  constexpr int kRing = VEC == 1 || T < kLoadsInFlight ? T : int(kLoadsInFlight);
  const i64 n = global_thread() * VEC;
  if (n >= p.N) return;
  L lanes(p, n);
  const Place place(n, p.inner, p.N);
  const X* x = static_cast<const X*>(p.x) + place.in(p.x_rows);
  B* spikes = static_cast<B*>(p.spikes) + (L::kHasSpikes ? place.in(p.out_rows) : 0);
  const bool constant = p.x_rows.step == 0;

  Pack<X, VEC> ring[kRing];
  SNN_UNROLL
  for (int k = 0; k < kRing; ++k) {
    ring[k] = load<X, VEC>(x);
    advance(x, p.x_rows.step);
  }
  SNN_UNROLL
  for (int t = 0; t < T; ++t) {
    Pack<B, VEC> out = {};
    lanes.charge(ring[t % kRing]);
    if (t + kRing < T) {
      if (!constant) ring[t % kRing] = load<X, VEC>(x);
      advance(x, p.x_rows.step);
    }
    lanes.fire(1u << t, out);
    if constexpr (L::kHasSpikes) {
      store<B, VEC>(spikes, out);
      advance(spikes, p.out_rows.step);
    }
  }
  if constexpr (L::kHasWords) lanes.flush(p, n, 0, kWord / 8);
  lanes.finish(p, n);
}

}  // namespace snn
