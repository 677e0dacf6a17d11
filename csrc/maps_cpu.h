// The small kernels on CPUs. A call runs a range of units: elements, or what is said at the kernel;
// units share nothing. As in kernels_cpu.h nothing here may depend on anything but our headers.
//
// Params are copied first: a byte written could otherwise change them, as far as a compiler knows.
#pragma once
#include "maps_cpu_api.h"

namespace snn {
namespace SNN_ISA {

// What the n elements from lo on read of an operand.
template <class T>
inline void gather(T* out, const Operand& o, T number, i64 lo, i64 n) {
  const T* data = static_cast<const T*>(o.data);
  if (!data || o.count == 1) {
    const T value = data ? data[0] : number;
    for (i64 i = 0; i < n; ++i) out[i] = value;
    return;
  }
  i64 element = lo / o.inner % o.count, within = lo % o.inner;
  for (i64 i = 0; i < n; ++i) {
    out[i] = data[element];
    if (++within == o.inner) {
      within = 0;
      if (++element == o.count) element = 0;
    }
  }
}

inline i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

// Calls run(lo, n) for the blocks of a range.
template <i64 BLOCK = kMapBlock, class Run>
inline void blocks(i64 first, i64 last, Run run) {
  for (i64 lo = first; lo < last; lo += BLOCK) run(lo, smaller(BLOCK, last - lo));
}

// Maps whose elements need nothing but their threshold.
template <class Map>
void elements(const typename Map::Params& given, i64 first, i64 last) {
  typedef typename Map::S S;
  const typename Map::Params p = given;
  if (!p.threshold.data || p.threshold.count == 1) {
    const S threshold = p.threshold.data ? load_at<S>(p.threshold.data, 0) : S(p.threshold.value);
#pragma omp simd
    for (i64 i = first; i < last; ++i) Map::at(p, i, threshold);
    return;
  }
  blocks(first, last, [&](i64 lo, i64 n) {
    alignas(64) S threshold[kMapBlock];
    gather(threshold, p.threshold, S(0), lo, n);
#pragma omp simd
    for (i64 i = 0; i < n; ++i) Map::at(p, lo + i, threshold[i]);
  });
}

// Calls Kernel<X>::run for the type of a dtype code.
template <template <class> class Kernel, class Params>
inline void by_dtype(const Params& p, i64 first, i64 last) {
  switch (p.dtype) {
    case kFloat32:
      return Kernel<float>::run(p, first, last);
    case kFloat64:
      return Kernel<double>::run(p, first, last);
    case kFloat16:
      return Kernel<f16>::run(p, first, last);
    default:
      return Kernel<bf16>::run(p, first, last);
  }
}

#define SNN_ELEMENTS(name, Map)                                                                    \
  template <class X>                                                                               \
  struct Map##Elements {                                                                           \
    static void run(const typename Map<X>::Params& p, i64 a, i64 b) { elements<Map<X>>(p, a, b); } \
  };                                                                                               \
  void name(const typename Map<float>::Params& p, i64 first, i64 last) {                           \
    by_dtype<Map##Elements>(p, first, last);                                                       \
  }
SNN_ELEMENTS(qcfs, Qcfs)
SNN_ELEMENTS(qcfs_backward, QcfsBackward)
SNN_ELEMENTS(ttfs_decode, TtfsDecode)
#undef SNN_ELEMENTS

// ---- cumulative max-pool: units are planes, whose running sums stay in cache

// One tap of a window for the outputs lo..hi of a block: their currents are STRIDE (0: any) apart.
template <class S, int STRIDE>
inline void pool_tap(const S* row, i64 stride, i64 lo, i64 hi, S* most) {
  const i64 step = STRIDE ? STRIDE : stride;
#pragma omp simd
  for (i64 o = lo; o < hi; ++o) most[o] = larger(most[o], row[o * step]);
}

template <class S>
inline void pool_taps(const PoolParams& p, const S* total, i64 oh, i64 first, i64 n, S* most) {
  for (i64 o = 0; o < n; ++o) most[o] = lowest<S>();
  for (i64 i = 0; i < p.kh; ++i) {
    const i64 h = oh * p.sh - p.ph + i * p.dh;
    if (h < 0 || h >= p.H) continue;
    for (i64 j = 0; j < p.kw; ++j) {
      // Output o of the block looks at column w + o * stride.
      const i64 w = first * p.sw - p.pw + j * p.dw;
      const i64 lo = w < 0 ? (-w + p.sw - 1) / p.sw : 0;
      const i64 hi = w >= p.W ? 0 : smaller(n, (p.W - 1 - w) / p.sw + 1);
      const S* row = total + h * p.W + w;
      if (p.sw == 1)
        pool_tap<S, 1>(row, 1, lo, hi, most);
      else if (p.sw == 2)
        pool_tap<S, 2>(row, 2, lo, hi, most);
      else
        pool_tap<S, 0>(row, p.sw, lo, hi, most);
    }
  }
}

template <class X>
struct PoolPlanes {
  static void run(const PoolParams& given, i64 first, i64 last) {
    typedef State<X> S;
    const PoolParams p = given;
    const i64 in = p.H * p.W, out = p.OH * p.OW;
    alignas(64) S most[kMapBlock];
    for (i64 plane = first; plane < last; ++plane) {
      S* total = static_cast<S*>(p.total) + plane * in;
      S* peak = static_cast<S*>(p.peak) + plane * out;
      const S* peak_in = p.peak_in ? static_cast<const S*>(p.peak_in) + plane * out : nullptr;
      for (i64 i = 0; i < out; ++i) peak[i] = peak_in ? peak_in[i] : S(0);
      for (i64 t = 0; t < p.T; ++t) {
        const X* x = static_cast<const X*>(p.x) + (t * p.planes + plane) * in;
        X* to = static_cast<X*>(p.out) + (t * p.planes + plane) * out;
        if (t == 0 && !p.total_in) {
#pragma omp simd
          for (i64 i = 0; i < in; ++i) total[i] = widen(x[i]);
        } else {
          const S* sums = t ? total : static_cast<const S*>(p.total_in) + plane * in;
#pragma omp simd
          for (i64 i = 0; i < in; ++i) total[i] = sums[i] + widen(x[i]);
        }
        for (i64 oh = 0; oh < p.OH; ++oh)
          blocks(0, p.OW, [&](i64 lo, i64 n) {
            pool_taps(p, total, oh, lo, n, most);
            S* before = peak + oh * p.OW + lo;
            X* row = to + oh * p.OW + lo;
#pragma omp simd
            for (i64 o = 0; o < n; ++o) {
              row[o] = Narrow<X>::from(most[o] - before[o]);
              before[o] = most[o];
            }
          });
      }
    }
  }
};

void cumulative_max_pool(const PoolParams& p, i64 first, i64 last) {
  by_dtype<PoolPlanes>(p, first, last);
}

// ---- dsr

// Pieces of two rows a step: long ones, for the sake of the prefetchers.
constexpr i64 kRow = 8 * kMapBlock;

template <class X>
struct DsrElements {
  static void run(const DsrParams& given, i64 first, i64 last) {
    typedef State<X> S;
    const DsrParams p = given;
    const S* weights = static_cast<const S*>(p.weights);
    blocks<kRow>(first, last, [&](i64 lo, i64 n) {
      alignas(64) S threshold[kRow], mean[kRow], grad[kRow];
      gather(threshold, p.threshold, S(p.threshold.value), lo, n);
      const X *x = static_cast<const X*>(p.x) + lo, *g = static_cast<const X*>(p.grad) + lo;
      // The first row is copied, not added to 0: -0.0 stays.
      const S first_weight = weights ? weights[0] : S(1);
#pragma omp simd
      for (i64 i = 0; i < n; ++i) {
        mean[i] = first_weight * widen(x[i]);
        grad[i] = first_weight * widen(g[i]);
      }
      for (i64 t = 1; t < p.T; ++t) {
        x += p.N, g += p.N;
        if (weights) {
          const S weight = weights[t];
#pragma omp simd
          for (i64 i = 0; i < n; ++i) {
            mean[i] += weight * widen(x[i]);
            grad[i] += weight * widen(g[i]);
          }
        } else {
#pragma omp simd
          for (i64 i = 0; i < n; ++i) {
            mean[i] += widen(x[i]);
            grad[i] += widen(g[i]);
          }
        }
      }
#pragma omp simd
      for (i64 i = 0; i < n; ++i) DsrFinish<X>::at(p, lo + i, threshold[i], mean[i], grad[i]);
    });
  }
};

void dsr_backward(const DsrParams& p, i64 first, i64 last) {
  by_dtype<DsrElements>(p, first, last);
}

// ---- sums in a fixed order: units are (row, segment)

template <class S>
inline void sums_of(const SumsParams& given, i64 first, i64 last) {
  const SumsParams p = given;
  alignas(64) S block[kMapBlock];
  for (i64 unit = first; unit < last; ++unit) {
    const i64 row = unit / p.segments, start = unit % p.segments * p.length;
    const i64 stop = smaller(start + p.length, p.each);
    double lanes[kMapLanes] = {};
    for (i64 lo = start; lo < stop; lo += kMapBlock) {
      const i64 n = smaller(kMapBlock, stop - lo);
      for (i64 done = 0; done < n;) {
        const i64 outer = (lo + done) / p.inner, within = (lo + done) % p.inner;
        const i64 take = smaller(p.inner - within, n - done);
        const S* from = static_cast<const S*>(p.values) + (outer * p.rows + row) * p.inner + within;
        for (i64 i = 0; i < take; ++i) block[done + i] = from[i];
        done += take;
      }
      for (i64 i = n; i < kMapBlock; ++i) block[i] = S(0);
      for (i64 i = 0; i < kMapBlock; i += kMapLanes)
#pragma omp simd
        for (i64 lane = 0; lane < kMapLanes; ++lane) lanes[lane] += double(block[i + lane]);
    }
    p.out[unit] = fold(lanes);
  }
}

void sums(const SumsParams& p, i64 first, i64 last) {
  if (p.dtype == kFloat64)
    sums_of<double>(p, first, last);
  else
    sums_of<float>(p, first, last);
}

// ---- mmse: units are (channel, segment, candidate)

template <class X>
struct MmseUnits {
  static void run(const MmseParams& given, i64 first, i64 last) {
    typedef State<X> S;
    const MmseParams p = given;
    const S T = S(p.T), fraction = S(p.fraction);
    for (i64 unit = first; unit < last; ++unit) {
      const i64 k = unit % p.K, row = unit / p.K, channel = row / p.segments;
      const i64 segment = row % p.segments, start = segment * p.length;
      const i64 n = smaller(p.length, p.each - start);
      const S threshold = load_at<S>(p.candidates, channel * p.K + k), step = threshold / T;
      const X* values = static_cast<const X*>(p.values) + channel * p.each + start;
      double lanes[kMapLanes] = {};
      const i64 whole = n / kMapLanes * kMapLanes;
      for (i64 i = 0; i < whole; i += kMapLanes)
#pragma omp simd
        for (i64 lane = 0; lane < kMapLanes; ++lane)
          lanes[lane] += squared_distance(widen(values[i + lane]), threshold, step, T, fraction);
      for (i64 i = whole; i < n; ++i)
        lanes[i - whole] += squared_distance(widen(values[i]), threshold, step, T, fraction);
      p.out[(channel * p.K + k) * p.segments + segment] = fold(lanes);
    }
  }
};

void mmse_errors(const MmseParams& p, i64 first, i64 last) { by_dtype<MmseUnits>(p, first, last); }

// ---- histogram: units are channels, so that a bin's sum runs over its values in order

template <class X>
struct HistogramChannels {
  static void run(const HistogramParams& given, i64 first, i64 last) {
    const HistogramParams p = given;
    for (i64 channel = first; channel < last; ++channel) {
      const X* values = static_cast<const X*>(p.values) + channel * p.each;
      i64* counts = p.counts + channel * p.bins;
      double *sums = p.sums + channel * p.bins, *fresh = p.scratch + channel * p.bins;
      const double scale = p.scale[channel];
      blocks(0, p.each, [&](i64 lo, i64 n) {
        // Without branches up to the scatter: half the values are 0, in no order.
        alignas(64) double value[kMapBlock], positive[kMapBlock];
        alignas(64) i64 place[kMapBlock], bin[kMapBlock];
#pragma omp simd
        for (i64 i = 0; i < n; ++i) {
          value[i] = double(widen(values[lo + i]));
          place[i] = bin_of(value[i], scale, p.bins);
        }
        i64 found = 0;
        for (i64 i = 0; i < n; ++i) {
          positive[found] = value[i];
          bin[found] = place[i];
          found += value[i] > 0;
        }
        for (i64 i = 0; i < found; ++i) {
          ++counts[bin[i]];
          fresh[bin[i]] += positive[i];
        }
      });
      for (i64 bin = 0; bin < p.bins; ++bin) sums[bin] += fresh[bin];
    }
  }
};

void histogram_update(const HistogramParams& p, i64 first, i64 last) {
  by_dtype<HistogramChannels>(p, first, last);
}

// ---- time to first spike

template <class B, class S>
inline void store_times(void* to, const S* found, i32 T, i64 lo, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) store_at<B>(to, lo + i, B(T - i32(found[i])));
}

template <class X>
struct TtfsElements {
  static void run(const TtfsParams& given, i64 first, i64 last) {
    typedef State<X> S;
    const TtfsParams p = given;
    const S T = S(p.T);
    blocks(first, last, [&](i64 lo, i64 n) {
      alignas(64) S threshold[kMapBlock], a[kMapBlock], found[kMapBlock];
      gather(threshold, p.threshold, S(p.threshold.value), lo, n);
      const X* x = static_cast<const X*>(p.from) + lo;
#pragma omp simd
      for (i64 i = 0; i < n; ++i) {
        a[i] = ttfs_shifted(widen(x[i]), threshold[i], T, p.round != 0);
        found[i] = S(0);
      }
      for (i32 bit = highest_bit(i32(p.T)); bit; bit /= 2) {
#pragma omp simd
        for (i64 i = 0; i < n; ++i) found[i] = ttfs_search(a[i], threshold[i], T, found[i], S(bit));
      }
      if (p.bytes == 1)
        store_times<u8>(p.to, found, i32(p.T), lo, n);
      else
        store_times<u16>(p.to, found, i32(p.T), lo, n);
    });
  }
};

void ttfs_encode(const TtfsParams& p, i64 first, i64 last) {
  by_dtype<TtfsElements>(p, first, last);
}

// ---- bit planes

template <class B>
inline void store_words(void* to, const u32* words, i64 lo, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) store_at<B>(to, lo + i, B(words[i]));
}

inline void store_words(void* to, const u32* words, i32 bytes, i64 lo, i64 n) {
  if (bytes == 1)
    store_words<u8>(to, words, lo, n);
  else if (bytes == 2)
    store_words<u16>(to, words, lo, n);
  else
    store_words<u32>(to, words, lo, n);
}

template <class X>
struct BitPlaneElements {
  static void run(const PlanesParams& given, i64 first, i64 last) {
    typedef State<X> S;
    const PlanesParams p = given;
    blocks(first, last, [&](i64 lo, i64 n) {
      alignas(64) S unit[kMapBlock], rest[kMapBlock];
      alignas(64) u32 q[kMapBlock];
      gather(unit, p.threshold, S(p.threshold.value), lo, n);
      const X* x = static_cast<const X*>(p.x) + lo;
#pragma omp simd
      for (i64 i = 0; i < n; ++i) {
        unit[i] = unit[i] / S(p.largest);
        rest[i] = widen(x[i]) + unit[i] / S(2);
        q[i] = 0;
      }
      for (i64 t = 0; t < p.T; ++t) {
        const S weight = S(u32(1) << (p.T - 1 - t));
#pragma omp simd
        for (i64 i = 0; i < n; ++i) q[i] = q[i] << 1 | u32(plane(rest[i], unit[i] * weight));
        if (p.planes)
          for (i64 i = 0; i < n; ++i) p.planes[t * p.N + lo + i] = u8(q[i] & 1);
      }
      store_words(p.q, q, p.bytes, lo, n);
    });
  }
};

void bit_planes(const PlanesParams& p, i64 first, i64 last) {
  by_dtype<BitPlaneElements>(p, first, last);
}

// ---- bits

template <class W>
inline void load_words(const void* from, u32* words, i64 lo, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) words[i] = load_at<W>(from, lo + i);
}

inline void load_words(const void* from, u32* words, i32 bytes, i64 lo, i64 n) {
  if (bytes == 1)
    load_words<u8>(from, words, lo, n);
  else if (bytes == 2)
    load_words<u16>(from, words, lo, n);
  else
    load_words<u32>(from, words, lo, n);
}

template <class B>
void unpack_to(const BitsParams& given, i64 first, i64 last) {
  const BitsParams p = given;
  blocks(first, last, [&](i64 lo, i64 n) {
    alignas(64) B amplitude[kMapBlock];
    alignas(64) u32 words[kMapBlock];
    gather(amplitude, p.amplitude, B(p.amplitude_bits), lo, n);
    const i32 bits = p.word_bytes * 8;
    for (i64 t = 0; t < p.T; ++t) {
      if (t % bits == 0) load_words(p.words, words, p.word_bytes, t / bits * p.N + lo, n);
      const u32 mask = u32(1) << (t % bits);
      B* out = static_cast<B*>(p.spikes) + t * p.N + lo;
#pragma omp simd
      for (i64 i = 0; i < n; ++i) out[i] = words[i] & mask ? amplitude[i] : B(0);
    }
  });
}

void unpack_bits(const BitsParams& p, i64 first, i64 last) {
  switch (p.spike_bytes) {
    case 1:
      return unpack_to<u8>(p, first, last);
    case 2:
      return unpack_to<u16>(p, first, last);
    case 4:
      return unpack_to<u32>(p, first, last);
    default:
      return unpack_to<u64>(p, first, last);
  }
}

void popcount(const BitsParams& given, i64 first, i64 last) {
  const BitsParams p = given;
  blocks(first, last, [&](i64 lo, i64 n) {
    alignas(64) u32 words[kMapBlock];
    alignas(64) i32 counts[kMapBlock] = {};
    for (i64 w = 0; w < p.W; ++w) {
      load_words(p.words, words, p.word_bytes, w * p.N + lo, n);
#pragma omp simd
      for (i64 i = 0; i < n; ++i) counts[i] += ones(words[i]);
    }
    for (i64 i = 0; i < n; ++i) p.counts[lo + i] = counts[i];
  });
}

template <class B>
void pack_from(const BitsParams& given, i64 first, i64 last) {
  const BitsParams p = given;
  blocks(first, last, [&](i64 lo, i64 n) {
    alignas(64) u32 words[kMapBlock] = {};
    const i32 bits = p.word_bytes * 8;
    for (i64 t = 0; t < p.T; ++t) {
      const B* spikes = static_cast<const B*>(p.spikes) + t * p.N + lo;
      const i32 bit = i32(t % bits);
#pragma omp simd
      for (i64 i = 0; i < n; ++i) words[i] |= u32(nonzero(spikes[i])) << bit;
      if (bit + 1 < bits && t + 1 < p.T) continue;
      store_words(p.words, words, p.word_bytes, t / bits * p.N + lo, n);
      for (i64 i = 0; i < n; ++i) words[i] = 0;
    }
  });
}

void pack_bits(const BitsParams& p, i64 first, i64 last) {
  switch (p.spike_bytes) {
    case 1:
      return pack_from<u8>(p, first, last);
    case 2:
      return pack_from<u16>(p, first, last);
    case 4:
      return pack_from<u32>(p, first, last);
    default:
      return pack_from<u64>(p, first, last);
  }
}

}  // namespace SNN_ISA
}  // namespace snn
