// Convolution of spikes with the neurons behind it: the structs that tell the kernel what to do.
//
// Spikes lie as words of 64 channels, [B, H, W, T, words]: bit c % 64 of word c / 64 is channel c.
// Output channels go in panels of 64: one panel of one position and step is one word.
// snnkernels/kernels/spike_conv.py mirrors the structs; a test compares the layouts.
#pragma once
#include "params.h"

namespace snn {

constexpr i64 kPanel = 64;
constexpr i32 kSpikeTimes = 16;  // numbers of steps after which counts are kept

// How a branch reaches its output channels.
enum SpikeBranchKind {
  kAnyToAny = 0,      // any to any: weights [panels, taps, planes, channels, 64]; few lanes below
  kEachToItself = 1,  // each channel to itself: weights [panels, taps, 64]
};

// One linear map of spikes; a layer's current is the sum of its branches.
struct SpikeBranch {
  const u64* words;     // [B, H, W, T, row_words]
  const void* weights;  // as kind says: float, or i16 where `scale` is given
  const float* scale;   // [panels, 64]: what one unit of an i16 weighs; null: float weights
  i64 H, W, row_words;
  i64 first_word, used_words;  // the channels it reads: 64 a word; at most 16384
  i64 first_panel, panels;     // the output channels it adds to
  i32 kh, kw, sh, sw, ph, pw, dh, dw;
  i32 pool_h, pool_w, pool_sh, pool_sw;  // windows whose spikes are added before; 1: none
  i32 kind;
  i32 either;  // a window has a spike where any of its positions has: not a sum
  // Sums of a window as binary digits: a digit of 1, 2, 4 adds a row of weights times as much. 1:
  // every spike adds the row itself.
  i32 planes;
  // Output channels computed of a panel: 64, or fewer of the only panel. Few: weights are
  // [kh, planes, channels, kw, lanes] with the last column of the kernel first.
  i32 lanes;
  i32 sixteens;  // of a single word: groups of 16 channels that are there
  i32 pad;
};

struct SpikeConv {
  const float* bias;     // [panels * 64]; may be null
  const float* current;  // [B, OH, OW, panels * 64], the same at every step; may be null
  const float*
      threshold;        // [panels * 64], or [OH / pool, OW / pool, panels * 64]; null: no neurons
  const float* v_init;  // likewise
  u64* spikes;          // [B, OH / pool, OW / pool, T, panels]; may be null
  i32* counts;          // [times, B, OH / pool, OW / pool, panels * 64]; may be null
  float* currents;      // [T, B, OH / pool, OW / pool, panels * 64]; may be null
  i64 B, T, OH, OW, panels;
  i64 threshold_position,
      v_init_position;  // elements from one position to the next; 0: one for all
  i32 pool;             // side of the windows of a cumulative max-pool before the neurons; 1: none
  i32 strict;           // fire above the threshold, not at it
  i32 times;
  i32 lanes;  // as its branches'; those that go each to itself are as with 64
  // Thresholds, starts and membranes are i32; currents must be whole numbers below 2^24.
  i32 integers;
  i32 pad;
  i64 count_at[kSpikeTimes];  // ascending, at most T
};

}  // namespace snn
