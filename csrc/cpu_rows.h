// How the CPU kernels reach memory: vectors, conversions, and rows read and written kLanes neurons
// at a time, whether they are contiguous, in segments, of 16 bits or too many for the caches.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels_cpu_api.h"
#include "neuron.h"

namespace snn {
namespace SNN_ISA {

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

// ---- vectors, for what a compiler does not find by itself

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class S>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef i32 mask __attribute__((vector_size(kVectorBytes)));
  static constexpr i32 kMagnitude = 0x7fffffff;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef i64 mask __attribute__((vector_size(kVectorBytes)));
  static constexpr i64 kMagnitude = 0x7fffffffffffffff;
};
template <class S>
using Vec = typename Vector<S>::type;
template <class S>
using Mask = typename Vector<S>::mask;

template <class S>
SNN_HD Vec<S> load(const S* from) {
  Vec<S> v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class S>
SNN_HD void store(S* to, Vec<S> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// 1 / d for d >= 1, to about one unit in the last place; 0 beyond 2^126. Divisions would bound the
// backward pass in the caches. Only slopes of surrogates may be rounded like this.
SNN_HD Vec<float> reciprocal(Vec<float> d) {
#if defined(__AVX512F__)
  // min keeps infinity away from 0 * inf, and NaN (the second operand) as it is. The forms with a
  // mask say the same; g++ 12 warns inside its own headers about the others.
  const __m512 a = _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(__FLT_MAX__), (__m512)d);
  const __m512 r = _mm512_maskz_rcp14_ps(0xffff, a);
  return (Vec<float>)_mm512_fmadd_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(1.0f)), r);
#elif defined(__AVX2__)
  const Vec<float> a = (Vec<float>)_mm256_min_ps(_mm256_set1_ps(__FLT_MAX__), (__m256)d);
  Vec<float> r = (Vec<float>)_mm256_rcp_ps((__m256)a);
  r = r + r * (1.0f - a * r);
  return r + r * (1.0f - a * r);
#else
  return 1.0f / d;
#endif
}

SNN_HD Vec<double> reciprocal(Vec<double> d) { return 1.0 / d; }

// ---- conversions of kLanes numbers

inline void widen_lanes(i32 dtype, const u16* from, float* to) {
  if (dtype == kBFloat16) {
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) to[i] = widen(bf16{from[i]});
    return;
  }
#if defined(__AVX512F__)
  for (i64 i = 0; i < kLanes; i += 16)
    _mm512_storeu_ps(to + i,
                     _mm512_maskz_cvtph_ps(
                         0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif defined(__F16C__)
  for (i64 i = 0; i < kLanes; i += 8)
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#else
#pragma omp simd
  for (i64 i = 0; i < kLanes; ++i) to[i] = widen(f16{from[i]});
#endif
}

inline void narrow_lanes(i32 dtype, const float* from, u16* to) {
  if (dtype == kBFloat16) {
#pragma omp simd
    for (i64 i = 0; i < kLanes; ++i) to[i] = Narrow<bf16>::from(from[i]).bits;
    return;
  }
#if defined(__AVX512F__)
  for (i64 i = 0; i < kLanes; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(from + i),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  for (i64 i = 0; i < kLanes; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#else
#pragma omp simd
  for (i64 i = 0; i < kLanes; ++i) to[i] = Narrow<f16>::from(from[i]).bits;
#endif
}

// ---- stores past the caches

// Whole cache lines bypass the caches; what is before and after them does not.
inline void stream(void* to, const void* from, i64 bytes) {
  char* d = static_cast<char*>(to);
  const char* s = static_cast<const char*>(from);
#if defined(__SSE2__)
  const i64 head = least(bytes, i64(-reinterpret_cast<u64>(d) & 63));
  if (head) {
    __builtin_memcpy(d, s, head);
    d += head, s += head, bytes -= head;
  }
  for (; bytes >= 64; d += 64, s += 64, bytes -= 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(d), _mm512_loadu_si512(s));
#elif defined(__AVX__)
    for (i64 i = 0; i < 64; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(d + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + i)));
#else
    for (i64 i = 0; i < 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(d + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i)));
#endif
  }
#endif
  if (bytes) __builtin_memcpy(d, s, bytes);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- operands

// What n neurons from lo on read of an operand.
template <class T>
inline void gather(T* out, const Operand& o, T number, i64 lo, i64 n) {
  const T* data = static_cast<const T*>(o.data);
  if (!data || o.count == 1) {
    const T value = data ? data[0] : number;
    for (i64 i = 0; i < n; ++i) out[i] = value;
    return;
  }
  i64 element = lo / o.inner % o.count, within = lo % o.inner;
  for (i64 i = 0; i < n;) {
    if (o.inner == 1) {
      const i64 run = least(o.count - element, n - i);
      __builtin_memcpy(out + i, data + element, run * sizeof(T));
      i += run;
      element = 0;
      continue;
    }
    const i64 run = least(o.inner - within, n - i);
    const T value = data[element];
    for (i64 k = 0; k < run; ++k) out[i + k] = value;
    i += run;
    within = 0;
    if (++element == o.count) element = 0;
  }
}

// An operand's values for a block of neurons. One number is kept once: L1 is small.
template <class T>
class Values {
 public:
  // n is rounded up to whole loops; past the last neuron the walk wraps around, inside the array.
  void read(const Operand& o, T number, i64 lo, i64 n) {
    const bool shared = !o.data || o.count == 1;
    mask_ = shared ? 0 : -1;
    gather(at_, o, number, lo, shared ? kLanes : (n + kLanes - 1) / kLanes * kLanes);
  }

  // The values of the kLanes neurons from `at` in the block on.
  const T* lanes(i64 at) const { return at_ + (at & mask_); }

 private:
  i64 mask_;
  alignas(64) T at_[kBlock];
};

// ---- rows

// Where neuron n of step t lies, and what a segment is.
struct Places {
  i64 step, outer, inner;
  bool contiguous;

  Places(const Rows& rows, i64 inner, i64 N)
      : step(rows.step),
        outer(rows.outer),
        inner(inner),
        contiguous(inner >= N || rows.outer == inner) {}

  i64 of(i64 t, i64 n) const { return t * step + (contiguous ? n : n / inner * outer + n % inner); }

  // Whether n neurons from lo on lie side by side.
  bool whole(i64 lo, i64 n) const { return contiguous || lo % inner + n <= inner; }

  // Calls copy(offset of neuron i, i, length) for every run of neurons that lie side by side.
  template <class Copy>
  void runs(i64 t, i64 lo, i64 n, Copy copy) const {
    if (contiguous) return copy(t * step + lo, i64(0), n);
    i64 segment = lo / inner, within = lo % inner;
    for (i64 i = 0; i < n;) {
      const i64 run = least(inner - within, n - i);
      copy(t * step + segment * outer + within, i, run);
      i += run;
      within = 0;
      ++segment;
    }
  }
};

// memcpy whose call would cost more than copying the few elements of a short run.
template <class T>
inline void copy_run(T* to, const T* from, i64 n) {
  if (n >= 16)
    __builtin_memcpy(to, from, n * sizeof(T));
  else
    for (i64 i = 0; i < n; ++i) to[i] = from[i];
}

// Rows that are read, in the state type. The last, partial loop is padded with zeros.
template <class S>
class Input {
 public:
  Input(const void* data, const Rows& rows, i64 inner, i64 N, i32 dtype)
      : data_(static_cast<const char*>(data)),
        places_(rows, inner, N),
        dtype_(dtype),
        bytes_(element_bytes(dtype)),
        held_from_(-1),
        direct_(bytes_ == sizeof(S) && places_.contiguous) {}

  // One row for all steps is staged once per block, unless it can be read where it lies.
  void begin(i64 lo, i64 n) {
    held_from_ = -1;
    if (!data_ || places_.step != 0 || direct_) return;
    for (i64 i = 0; i < n; i += kLanes) {
      const S* row = stage(0, lo + i, least(kLanes, n - i), held_ + i);
      if (row != held_ + i) __builtin_memcpy(held_ + i, row, kLanes * sizeof(S));
    }
    held_from_ = lo;
  }

  // kLanes numbers, in place or in `buffer`.
  const S* read(i64 t, i64 lo, i64 n, S* buffer) const {
    if (direct_ && n == kLanes) return reinterpret_cast<const S*>(data_) + t * places_.step + lo;
    if (held_from_ >= 0) return held_ + (lo - held_from_);
    return stage(t, lo, n, buffer);
  }

  // Inlined by force: g++ takes a function that only prefetches for one without effect and drops
  // it.
  __attribute__((always_inline)) void prefetch(i64 t, i64 lo) const {
    const char* row = data_ + places_.of(t, lo) * bytes_;
    // Into L2: L1 is slower (measured).
    for (i64 i = 0; i < kLanes * bytes_; i += 64) __builtin_prefetch(row + i, 0, 2);
  }

  bool moves() const { return data_ && places_.step != 0; }

 private:
  __attribute__((noinline)) const S* stage(i64 t, i64 lo, i64 n, S* buffer) const {
    const bool whole = n == kLanes && places_.whole(lo, n);
    if (bytes_ == sizeof(S)) {
      const S* data = reinterpret_cast<const S*>(data_);
      if (whole) return data + places_.of(t, lo);
      pad(buffer, n);
      places_.runs(t, lo, n, [&](i64 at, i64 i, i64 run) { copy_run(buffer + i, data + at, run); });
      return buffer;
    }
    if constexpr (sizeof(S) == 4) {
      const u16* data = reinterpret_cast<const u16*>(data_);
      if (whole) {
        widen_lanes(dtype_, data + places_.of(t, lo), buffer);
        return buffer;
      }
      u16 raw[kLanes];
      pad(raw, n);
      places_.runs(t, lo, n, [&](i64 at, i64 i, i64 run) { copy_run(raw + i, data + at, run); });
      widen_lanes(dtype_, raw, buffer);
    }
    return buffer;
  }

  template <class T>
  static void pad(T* buffer, i64 n) {
    for (i64 i = n; i < kLanes; ++i) buffer[i] = T(0);
  }

  const char* data_;
  Places places_;
  i32 dtype_;
  i64 bytes_;
  i64 held_from_;
  bool direct_;
  alignas(64) S held_[kBlock];
};

// Rows that are written, elements of any width, kLanes at a time.
class Output {
 public:
  Output(void* data, const Rows& rows, i64 inner, i64 N, i64 bytes, bool streaming)
      : data_(static_cast<char*>(data)),
        places_(rows, inner, N),
        bytes_(bytes),
        streaming_(streaming) {}

  explicit operator bool() const { return data_ != nullptr; }

  // Where a loop may write: in place, or in `buffer`.
  void* place(i64 t, i64 lo, i64 n, void* buffer) const {
    return !streaming_ && n == kLanes && places_.whole(lo, n) ? data_ + places_.of(t, lo) * bytes_
                                                              : static_cast<char*>(buffer);
  }

  // Takes what was written to `buffer`; nothing is left to do for a loop that wrote in place.
  void take(i64 t, i64 lo, i64 n, const void* buffer) const {
    if (streaming_ && places_.contiguous)
      return stream(data_ + (t * places_.step + lo) * bytes_, buffer, n * bytes_);
    const char* from = static_cast<const char*>(buffer);
    places_.runs(t, lo, n, [&](i64 at, i64 i, i64 run) {
      if (streaming_)
        stream(data_ + at * bytes_, from + i * bytes_, run * bytes_);
      else
        __builtin_memcpy(data_ + at * bytes_, from + i * bytes_, run * bytes_);
    });
  }

  // The same for numbers of the state type, which rows of 16 bits hold rounded.
  template <class S>
  void put(i64 t, i64 lo, i64 n, const S* buffer, i32 dtype) const {
    if constexpr (sizeof(S) == 4)
      if (bytes_ == 2) {
        u16 raw[kLanes];
        narrow_lanes(dtype, buffer, raw);
        return take(t, lo, n, raw);
      }
    take(t, lo, n, buffer);
  }

 private:
  char* data_;
  Places places_;
  i64 bytes_;
  bool streaming_;
};

// Arrays of one element per neuron.
template <class T>
inline void write(void* to, const T* from, i64 lo, i64 n, bool streaming = false) {
  if (!to) return;
  if (streaming)
    stream(static_cast<T*>(to) + lo, from, n * i64(sizeof(T)));
  else
    __builtin_memcpy(static_cast<T*>(to) + lo, from, n * sizeof(T));
}

// Packed bits of n neurons, narrowed to the words that hold them.
inline void write_words(void* to, i32 word_bytes, i64 lo, i64 n, const u32* bits) {
  if (word_bytes == 4) return write(to, bits, lo, n);
  if (word_bytes == 2) {
    u16* out = static_cast<u16*>(to) + lo;
    for (i64 i = 0; i < n; ++i) out[i] = u16(bits[i]);
  } else {
    u8* out = static_cast<u8*>(to) + lo;
    for (i64 i = 0; i < n; ++i) out[i] = u8(bits[i]);
  }
}

inline void read_words(const void* from, i32 word_bytes, i64 lo, i64 n, u32* bits) {
  if (word_bytes == 4) {
    __builtin_memcpy(bits, static_cast<const u32*>(from) + lo, n * 4);
  } else if (word_bytes == 2) {
    const u16* in = static_cast<const u16*>(from) + lo;
    for (i64 i = 0; i < n; ++i) bits[i] = in[i];
  } else {
    const u8* in = static_cast<const u8*>(from) + lo;
    for (i64 i = 0; i < n; ++i) bits[i] = in[i];
  }
}

}  // namespace SNN_ISA
}  // namespace snn
