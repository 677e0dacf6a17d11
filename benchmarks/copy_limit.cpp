// The fastest copy this machine can do, which no kernel that reads and writes as much can beat.
// Compiled when a benchmark runs (limits.py): copies `bytes` with `threads` threads, by
// non-temporal stores (which read no line before writing it) or by plain ones.
#include <immintrin.h>
#include <omp.h>

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr size_t kVector = 64;
inline void stream(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
constexpr size_t kVector = 32;
inline void stream(char* to, const char* from) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#else
constexpr size_t kVector = 16;
inline void stream(char* to, const char* from) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to),
                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

void copy_streaming(char* to, const char* from, size_t n) {
  // Streaming stores want aligned addresses: the ends go through memcpy.
  size_t head = (kVector - reinterpret_cast<uintptr_t>(to) % kVector) % kVector;
  if (head > n) head = n;
  std::memcpy(to, from, head);
  size_t i = head;
  for (; i + 4 * kVector <= n; i += 4 * kVector)
    for (size_t j = 0; j < 4; ++j) stream(to + i + j * kVector, from + i + j * kVector);
  std::memcpy(to + i, from + i, n - i);
  _mm_sfence();
}

}  // namespace

extern "C" void copy_limit(char* to, const char* from, int64_t bytes, int streaming, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t pages = (bytes + 4095) / 4096, many = omp_get_num_threads();
    const int64_t each = (pages + many - 1) / many * 4096, begin = each * omp_get_thread_num();
    const int64_t n = begin >= bytes ? 0 : begin + each < bytes ? each : bytes - begin;
    if (n > 0 && streaming) copy_streaming(to + begin, from + begin, size_t(n));
    if (n > 0 && !streaming) std::memcpy(to + begin, from + begin, size_t(n));
  }
}
