// What spike_conv_isa.cpp offers once per SIMD level, and the scratch that it needs.
#pragma once
#include "spike_conv.h"

namespace snn {

constexpr i64 kSpikeSteps = 32;  // steps whose currents stay in L1

// Output rows r0..r1-1 (of the pooled map) of one image, panels p0..p1-1.
struct SpikeUnit {
  i64 b, r0, r1, p0, p1;
};

SNN_HD i64 spike_steps(const SpikeConv& p) { return p.T < kSpikeSteps ? p.T : kSpikeSteps; }
SNN_HD i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Rows and columns of what a branch convolves: its map, pooled.
SNN_HD i64 source_rows(const SpikeBranch& b) { return (b.H - b.pool_h) / b.pool_sh + 1; }
SNN_HD i64 source_columns(const SpikeBranch& b) { return (b.W - b.pool_w) / b.pool_sw + 1; }

// A row of a branch's input is kept while the windows that need it pass: those of all rows of a
// max-pool's window, between which the positions go back and forth.
SNN_HD i64 kept_rows(const SpikeConv& p, const SpikeBranch& b) {
  return i64(p.pool - 1) * b.sh + i64(b.kh - 1) * b.dh + 1;
}

// Rows of weights of one tap.
SNN_HD i64 rows_of_tap(const SpikeBranch& b) { return b.planes * b.used_words * kPanel; }

// Whether lists count channels from the first column on, so that they say the column as well.
SNN_HD bool placed(const SpikeBranch& b) { return source_columns(b) * rows_of_tap(b) <= 65536; }

// Most spikes of one position and step.
SNN_HD i64 most_spikes(const SpikeBranch& b) {
  return rows_of_tap(b) * (b.either || b.planes > 1 ? 1 : i64(b.pool_h) * b.pool_w);
}

// Most spikes of one kept row.
SNN_HD i64 row_spikes(const SpikeConv& p, const SpikeBranch& b) {
  return source_columns(b) * spike_steps(p) * most_spikes(b);
}

// Bytes of one kept row: how many spikes precede each (step, column), then their channels. Vector
// stores may write a little behind.
SNN_HD i64 starts_bytes(const SpikeConv& p, const SpikeBranch& b) {
  return round_up((source_columns(b) * spike_steps(p) + 1) * i64(sizeof(i32)), 64);
}
SNN_HD i64 row_bytes(const SpikeConv& p, const SpikeBranch& b) {
  if (b.kind == kEachToItself) return 0;
  return starts_bytes(p, b) + round_up(row_spikes(p, b) * i64(sizeof(u16)) + 128, 64);
}
SNN_HD i64 branch_bytes(const SpikeConv& p, const SpikeBranch& b) {
  return round_up(kept_rows(p, b) * i64(sizeof(i64)), 64) + kept_rows(p, b) * row_bytes(p, b);
}

// Floats that a position and panel carries from one chunk of steps to the next: the membranes; the
// running sums under a max-pool, and their maximum.
SNN_HD i64 state_floats(const SpikeConv& p) {
  if (p.lanes < kPanel) return p.lanes;
  return kPanel * (p.pool > 1 ? 2 + i64(p.pool) * p.pool : 1);
}

SNN_HD i64 counts_of(const SpikeConv& p) { return p.lanes < kPanel ? p.lanes : kPanel; }

// Places whose state is kept: where all steps are one chunk only those that are computed at a time.
SNN_HD i64 state_places(const SpikeConv& p, i64 rows, i64 panels) {
  if (p.T > kSpikeSteps) return rows * (p.OW / p.pool) * panels;
  return p.lanes < kPanel ? p.OW : 1;
}

// Few lanes: columns that spikes of a row add to, before stride and padding choose among them.
SNN_HD i64 reached_columns(const SpikeBranch& b) {
  return source_columns(b) + i64(b.kw - 1) * b.dw;
}

// Few lanes: most columns of a row of sums.
SNN_HD i64 narrow_columns(const SpikeConv& p, const SpikeBranch* branches, i64 n) {
  i64 most = p.OW;
  for (i64 i = 0; i < n; ++i)
    if (reached_columns(branches[i]) > most) most = reached_columns(branches[i]);
  return most;
}

// Bytes of scratch of one thread, all parts aligned to 64 bytes: currents, maxima and integer sums
// of the steps of a chunk, or three rows; state and counts; the branches' rows.
SNN_HD i64 spike_scratch_bytes(const SpikeConv& p, const SpikeBranch* branches, i64 n, i64 rows,
                               i64 panels) {
  const i64 steps = spike_steps(p);
  i64 bytes = p.lanes < kPanel ? 3 * narrow_columns(p, branches, n) * p.lanes * i64(sizeof(float))
                               : steps * kPanel * i64(2 * sizeof(float) + sizeof(u16));
  bytes += state_places(p, rows, panels) * (state_floats(p) + counts_of(p)) * i64(sizeof(float));
  for (i64 i = 0; i < n; ++i) bytes += branch_bytes(p, branches[i]);
  return bytes;
}

#define SNN_DECLARE(ISA)                                                                         \
  namespace ISA {                                                                                \
  void spike_conv(const SpikeConv& p, const SpikeBranch* branches, i64 n, const SpikeUnit& unit, \
                  void* scratch);                                                                \
  }
SNN_DECLARE(baseline)
SNN_DECLARE(avx2)
SNN_DECLARE(avx512)
#undef SNN_DECLARE

}  // namespace snn
