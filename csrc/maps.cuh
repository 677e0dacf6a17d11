// The small kernels on GPUs: one thread an output element (or a share of a sum), no thread talks to
// another; a histogram's counts meet in integer atomics, whose order does not show.
#pragma once
#include "gpu.cuh"
#include "maps.h"

namespace snn {

// What a map's elements share; kernels without one leave it out.
template <class Map>
__global__ void __launch_bounds__(kThreads) shared_map(typename Map::Params p) {
  const i64 i = global_thread();
  if (i < p.N) Map::at(p, i, read<typename Map::S>(p.threshold, i));
}

template <class Map>
__global__ void __launch_bounds__(kThreads) map(typename Map::Params p) {
  const i64 i = global_thread();
  if (i < p.N) Map::at(p, i);
}

__device__ __forceinline__ void add_one(i64* to) {
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<u64*>(to), u64(1));
#else
  ++*to;
#endif
}

// Windows up to SIZE wide and high keep the sums of their currents in registers; 0: up to
// kPoolTaps in local memory.
enum { kPoolTaps = 64 };

template <class X, int SIZE>
struct Pool {
  typedef PoolParams Params;
  typedef State<X> S;
  static constexpr int kTaps = SIZE ? SIZE * SIZE : kPoolTaps;

  // Where a window lies, and what it is asked of its taps.
  struct Window {
    i64 oh, ow, h0, w0;

    __device__ __forceinline__ bool inside(const Params& p, int i, int j) const {
      const i64 h = h0 + i * i64(p.dh), w = w0 + j * i64(p.dw);
      return h >= 0 && h < p.H && w >= 0 && w < p.W;
    }
    __device__ __forceinline__ bool owns(const Params& p, int i, int j) const {
      return (oh < p.owner_mh || i + p.owner_jh >= p.kh) &&
             (ow < p.owner_mw || j + p.owner_jw >= p.kw);
    }
  };

  // Calls run(i, j, tap) for the taps of the window.
  template <class Run>
  static __device__ __forceinline__ void taps(const Params& p, Run run) {
    if constexpr (SIZE) {
      SNN_UNROLL
      for (int i = 0; i < SIZE; ++i) {
        SNN_UNROLL
        for (int j = 0; j < SIZE; ++j) run(i, j, i * SIZE + j);
      }
    } else {
      SNN_KEEP_LOOP
      for (int i = 0; i < p.kh; ++i) {
        SNN_KEEP_LOOP
        for (int j = 0; j < p.kw; ++j) run(i, j, i * p.kw + j);
      }
    }
  }

  static __device__ __forceinline__ void at(const Params& p, i64 n) {
    const i64 row = divide(n, p.OW), plane = divide(row, p.OH);
    Window window;
    window.ow = n - row * p.OW;
    window.oh = row - plane * p.OH;
    window.h0 = window.oh * p.sh - p.ph;
    window.w0 = window.ow * p.sw - p.pw;
    const i64 start = (plane * p.H + window.h0) * p.W + window.w0;
    // Small windows note once which taps are inside: asked anew at every step they would spill.
    u32 mask = 0;
    if constexpr (SIZE)
      taps(p, [&](int i, int j, int k) {
        if (i < p.kh && j < p.kw && window.inside(p, i, j)) mask |= u32(1) << k;
      });
    S sums[kTaps];
    taps(p, [&](int i, int j, int k) {
      sums[k] = S(-0.0);  // which changes nothing it is added to
      if (!p.total_in || (SIZE ? !(mask >> k & 1) : !window.inside(p, i, j))) return;
      sums[k] = load_at<S>(p.total_in, start + i * (p.dh * p.W) + j * i64(p.dw));
    });
    S before = p.peak_in ? load_at<S>(p.peak_in, n) : S(0);
    const X* x = static_cast<const X*>(p.x) + start;
    for (i64 t = 0; t < p.T; ++t, x += p.planes * p.H * p.W) {
      S most = lowest<S>();
      taps(p, [&](int i, int j, int k) {
        if (SIZE ? !(mask >> k & 1) : !window.inside(p, i, j)) return;
        const i64 offset = i * (p.dh * p.W) + j * i64(p.dw);
        sums[k] = sums[k] + widen(x[offset]);
        most = larger(most, sums[k]);
      });
      store_at<X>(p.out, t * p.N + n, Narrow<X>::from(most - before));
      before = most;
    }
    if (!p.T) return;
    if (p.peak) store_at<S>(p.peak, n, before);
    if (!p.total) return;
    taps(p, [&](int i, int j, int k) {
      if (SIZE ? !(mask >> k & 1) : !window.inside(p, i, j)) return;
      const i64 offset = i * (p.dh * p.W) + j * i64(p.dw);
      if (window.owns(p, i, j)) store_at<S>(p.total, start + offset, sums[k]);
    });
  }
};

// The threshold is read behind the loop: before it, float64 would spill.
template <class X>
struct Dsr {
  typedef DsrParams Params;
  typedef State<X> S;
  static __device__ __forceinline__ void at(const Params& p, i64 i) {
    const X *x = static_cast<const X*>(p.x) + i, *g = static_cast<const X*>(p.grad) + i;
    const S* weights = static_cast<const S*>(p.weights);
    S mean = S(0), grad = S(0);
    for (i64 t = 0; t < p.T; ++t, x += p.N, g += p.N) {
      const S a = weights ? weights[t] * widen(*x) : widen(*x);
      const S b = weights ? weights[t] * widen(*g) : widen(*g);
      mean = t ? mean + a : a;
      grad = t ? grad + b : b;
    }
    DsrFinish<X>::at(p, i, read<S>(p.threshold, i), mean, grad);
  }
};

template <class S>
struct Sums {
  typedef SumsParams Params;
  static __device__ __forceinline__ void at(const Params& p, i64 n) {
    const i64 row = divide(n, p.segments), first = (n - row * p.segments) * p.length;
    const i64 last = first + p.length < p.each ? first + p.length : p.each;
    double lanes[kMapLanes] = {};
    i64 outer = divide(first, p.inner), within = first - outer * p.inner;
    i64 at = (outer * p.rows + row) * p.inner + within;
    for (i64 j = first; j < last; j += kMapLanes) {
      SNN_UNROLL
      for (int lane = 0; lane < kMapLanes; ++lane)
        if (j + lane < last) {
          lanes[lane] += double(load_at<S>(p.values, at));
          ++at;
          if (++within == p.inner) {
            within = 0;
            at += (p.rows - 1) * p.inner;
          }
        }
    }
    p.out[n] = fold(lanes);
  }
};

template <class X>
struct Mmse {
  typedef MmseParams Params;
  typedef State<X> S;
  static __device__ __forceinline__ void at(const Params& p, i64 n) {
    // Neighbours differ in the candidate: they read the same values.
    const i64 q = divide(n, p.K), k = n - q * p.K;
    const i64 channel = divide(q, p.segments), segment = q - channel * p.segments;
    const i64 first = segment * p.length;
    const i64 last = first + p.length < p.each ? first + p.length : p.each;
    const S threshold = load_at<S>(p.candidates, channel * p.K + k), T = S(p.T);
    const S step = threshold / T, fraction = S(p.fraction);
    const X* values = static_cast<const X*>(p.values) + channel * p.each;
    double lanes[kMapLanes] = {};
    for (i64 j = first; j < last; j += kMapLanes) {
      SNN_UNROLL
      for (int lane = 0; lane < kMapLanes; ++lane)
        if (j + lane < last)
          lanes[lane] += squared_distance(widen(values[j + lane]), threshold, step, T, fraction);
    }
    p.out[(channel * p.K + k) * p.segments + segment] = fold(lanes);
  }
};

// Counts only: sums would need atomics on floats, whose order shows.
template <class X>
struct Histogram {
  typedef HistogramParams Params;
  static __device__ __forceinline__ void at(const Params& p, i64 i) {
    const double value = double(widen(load_at<X>(p.values, i)));
    if (!(value > 0)) return;
    const i64 channel = divide(i, p.each);
    add_one(p.counts + channel * p.bins + bin_of(value, p.scale[channel], p.bins));
  }
};

template <class X>
struct TtfsEncode {
  typedef TtfsParams Params;
  typedef State<X> S;
  static __device__ __forceinline__ void at(const Params& p, i64 i, S threshold) {
    const S T = S(p.T), a = ttfs_shifted(widen(load_at<X>(p.from, i)), threshold, T, p.round != 0);
    S found = S(0);
    for (i32 bit = highest_bit(i32(p.T)); bit; bit /= 2)
      found = ttfs_search(a, threshold, T, found, S(bit));
    const i32 t = i32(p.T) - i32(found);
    if (p.bytes == 1)
      store_at<u8>(p.to, i, u8(t));
    else
      store_at<u16>(p.to, i, u16(t));
  }
};

template <class X>
struct BitPlanes {
  typedef PlanesParams Params;
  typedef State<X> S;
  static __device__ __forceinline__ void at(const Params& p, i64 i, S threshold) {
    const S unit = threshold / S(p.largest);
    S rest = widen(load_at<X>(p.x, i)) + unit / S(2);
    u32 q = 0;
    for (i64 t = 0; t < p.T; ++t) {
      const bool set = plane(rest, unit * S(u32(1) << (p.T - 1 - t)));
      q = q << 1 | u32(set);
      if (p.planes) p.planes[t * p.N + i] = u8(set);
    }
    store_word(p.q, i, p.bytes, q);
  }
};

template <int BYTES>
struct Unpack {
  typedef BitsParams Params;
  static __device__ __forceinline__ void at(const Params& p, i64 i) {
    typedef Bits<BYTES> B;
    const B amplitude = p.amplitude.data ? load_at<B>(p.amplitude.data, element(p.amplitude, i))
                                         : B(p.amplitude_bits);
    const i32 bits = p.word_bytes * 8;
    for (i64 w = 0, t = 0; w < p.W; ++w) {
      u32 word = word_at(p.words, w * p.N + i, p.word_bytes);
      for (i32 bit = 0; bit < bits && t < p.T; ++bit, ++t, word >>= 1)
        store_at<B>(p.spikes, t * p.N + i, word & 1 ? amplitude : B(0));
    }
  }
};

// INT is there because a kernel's name needs brackets.
template <class INT>
struct Popcount {
  typedef BitsParams Params;
  static __device__ __forceinline__ void at(const Params& p, i64 i) {
    INT count = 0;
    for (i64 w = 0; w < p.W; ++w) count += ones(word_at(p.words, w * p.N + i, p.word_bytes));
    p.counts[i] = count;
  }
};

template <int BYTES>
struct PackBits {
  typedef BitsParams Params;
  static __device__ __forceinline__ void at(const Params& p, i64 i) {
    const i32 bits = p.word_bytes * 8;
    for (i64 w = 0, t = 0; w < p.W; ++w) {
      u32 word = 0;
      for (i32 bit = 0; bit < bits && t < p.T; ++bit, ++t)
        word |= u32(nonzero(load_at<Bits<BYTES>>(p.spikes, t * p.N + i))) << bit;
      store_word(p.words, w * p.N + i, p.word_bytes, word);
    }
  }
};

}  // namespace snn
