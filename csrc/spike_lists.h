// The spikes of a map's rows as lists of the channels that fire.
#pragma once
#include "cpu_rows.h"
#include "spike_conv_api.h"

namespace snn {
namespace SNN_ISA {

#if defined(__AVX512F__)
// Appends those of 16 values that are chosen; returns how many.
inline i64 append(u16* to, __mmask16 chosen, __m512i values) {
  const __m512i packed = _mm512_maskz_compress_epi32(chosen, values);
  const __m256i narrow = _mm512_maskz_cvtepi32_epi16(0xffff, packed);
  __builtin_memcpy(to, &narrow, sizeof narrow);
  return __builtin_popcount(u32(chosen));
}

// first, first + step, ...
inline __m512i progression(i64 first, i64 step) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(i32(step))),
                          _mm512_set1_epi32(i32(first)));
}
#endif

// Appends the channels of the bits of a word; returns how many.
inline i64 expand(u16* to, u64 word, i64 channel) {
#if defined(__AVX512F__)
  i64 n = 0;
  for (int j = 0; j < kPanel; j += 16)
    n += append(to + n, __mmask16(word >> j), progression(channel + j, 1));
  return n;
#else
  i64 n = 0;
  for (; word; word &= word - 1) to[n++] = u16(channel + __builtin_ctzll(word));
  return n;
#endif
}

// The rows of one branch's input that windows need now, as lists of channels.
struct KeptRows {
  i64* which;  // [kept] the row in each place; -1: none
  char* rows;  // [kept] of row_bytes
  i64 kept, bytes, starts;

  const i32* starts_of(i64 row) const {
    return reinterpret_cast<const i32*>(rows + row % kept * bytes);
  }
  const u16* list_of(i64 row) const {
    return reinterpret_cast<const u16*>(rows + row % kept * bytes + starts);
  }
  void forget() const {
    for (i64 j = 0; j < kept; ++j) which[j] = -1;
  }
};

// Those of branch i, in the scratch of all.
inline KeptRows kept_rows_of(char* at, const SpikeConv& p, const SpikeBranch* branches, i64 i) {
  for (i64 j = 0; j < i; ++j) at += branch_bytes(p, branches[j]);
  const SpikeBranch& b = branches[i];
  const i64 kept = kept_rows(p, b);
  return {reinterpret_cast<i64*>(at), at + round_up(kept * i64(sizeof(i64)), 64), kept,
          row_bytes(p, b), starts_bytes(p, b)};
}

// The rows of weights that the spikes of a window of positions add at one step, counted from
// `first`; returns how many.
inline i64 collect(u16* to, const SpikeBranch& b, const u64* corner, i64 T, i64 first) {
  const i64 column = T * b.row_words, row = b.W * column;
  i64 n = 0;
#if defined(__AVX512F__)
  // Whether any of a few channels fires cannot be foreseen: no branch.
  if (b.sixteens < 4 && b.pool_h == 1 && b.pool_w == 1) {
    for (i32 j = 0; j < b.sixteens; ++j)
      n += append(to + n, __mmask16(corner[0] >> (16 * j)), progression(first + 16 * j, 1));
    return n;
  }
#endif
  if (b.either) {
    for (i64 q = 0; q < b.used_words; ++q) {
      u64 word = 0;
      for (i64 y = 0; y < b.pool_h; ++y)
        for (i64 x = 0; x < b.pool_w; ++x) word |= corner[y * row + x * column + q];
      if (word) n += expand(to + n, word, first + q * kPanel);
    }
    return n;
  }
  if (b.planes > 1) {
    // Counts of up to 7, a digit a word, for 64 channels at once.
    for (i64 q = 0; q < b.used_words; ++q) {
      u64 ones = 0, twos = 0, fours = 0;
      for (i64 y = 0; y < b.pool_h; ++y)
        for (i64 x = 0; x < b.pool_w; ++x) {
          const u64 word = corner[y * row + x * column + q];
          const u64 carry = ones & word;
          ones ^= word;
          fours ^= twos & carry;
          twos ^= carry;
        }
      const u64 digits[] = {ones, twos, fours};
      for (i64 d = 0; d < b.planes; ++d)
        if (digits[d]) n += expand(to + n, digits[d], first + (d * b.used_words + q) * kPanel);
    }
    return n;
  }
  for (i64 y = 0; y < b.pool_h; ++y)
    for (i64 x = 0; x < b.pool_w; ++x)
      for (i64 q = 0; q < b.used_words; ++q) {
        const u64 word = corner[y * row + x * column + q];
        if (word) n += expand(to + n, word, first + q * kPanel);
      }
  return n;
}

#if defined(__AVX512F__)
// Appends the spikes of a row at one step, channel by channel: neighbours in the list then mostly
// add to outputs apart, and need not wait for each other. `words` is the first column's.
inline i64 collect_row(u16* to, const SpikeBranch& b, const u64* words, i64 T) {
  const i64 columns = source_columns(b), channels = rows_of_tap(b);
  const i64 column = b.pool_sw * T * b.row_words;  // a window of one may have a stride
  i64 n = 0;
  for (i64 q = 0; q < b.used_words; ++q)
    for (i64 s = 0; s < (b.used_words > 1 ? 4 : b.sixteens); ++s)
      for (i64 x0 = 0; x0 < columns; x0 += 16) {
        const i64 left = columns - x0 < 16 ? columns - x0 : 16;
        alignas(64) i32 bits[16] = {};
        for (i64 x = 0; x < left; ++x)
          bits[x] = i32(words[(x0 + x) * column + q] >> (16 * s) & 0xffff);
        const __m512i all = _mm512_load_si512(bits), one = _mm512_set1_epi32(1);
        __m512i at = progression(x0 * channels + q * kPanel + s * 16, channels), bit = one;
        for (int c = 0; c < 16; ++c) {
          n += append(to + n, _mm512_test_epi32_mask(all, bit), at);
          at = _mm512_add_epi32(at, one);
          bit = _mm512_add_epi32(bit, bit);
        }
      }
  return n;
}
#endif

inline void read_row(KeptRows& kept, const SpikeConv& p, const SpikeBranch& b, i64 image, i64 row,
                     i64 t0, i64 steps) {
  i64& which = kept.which[row % kept.kept];
  if (which == row) return;
  which = row;
  i32* starts = const_cast<i32*>(kept.starts_of(row));
  u16* list = const_cast<u16*>(kept.list_of(row));
  const i64 columns = source_columns(b), channels = placed(b) ? rows_of_tap(b) : 0;
  const u64* words =
      b.words + ((image * b.H + row * b.pool_sh) * b.W * p.T + t0) * b.row_words + b.first_word;
  i64 n = 0;
#if defined(__AVX512F__)
  if (p.lanes < kPanel && b.pool_h == 1 && b.pool_w == 1) {
    for (i64 t = 0; t < steps; ++t, starts += columns) {
      *starts = i32(n);
      n += collect_row(list + n, b, words + t * b.row_words, p.T);
    }
    *starts = i32(n);
    return;
  }
#endif
  for (i64 t = 0; t < steps; ++t)
    for (i64 x = 0; x < columns; ++x) {
      *starts++ = i32(n);
      n += collect(list + n, b, words + (x * b.pool_sw * p.T + t) * b.row_words, p.T, x * channels);
    }
  *starts = i32(n);
}

}  // namespace SNN_ISA
}  // namespace snn
