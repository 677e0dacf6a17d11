// The convolution of spikes in the CPU extension: checks, units of work, threads, SIMD level.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind.h"
#include "maps_cpu_api.h"
#include "spike_conv_api.h"
#include "threads.h"

namespace py = pybind11;
using namespace snn;

namespace {

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

void check(const SpikeConv& p) {
  require(p.B >= 0 && p.T >= 0 && p.OH >= 1 && p.OW >= 1 && p.panels >= 1, "sizes out of range");
  require(p.pool >= 1 && p.pool <= p.OH && p.pool <= p.OW, "pool out of range");
  require(!p.threshold == !p.v_init, "threshold and v_init come together");
  require(p.threshold || (!p.spikes && !p.counts), "spikes need neurons");
  require(p.times >= 0 && p.times <= kSpikeTimes, "times out of range");
  require(p.lanes == kPanel || ((p.lanes == 16 || p.lanes == 32) && p.panels == 1 && p.pool == 1),
          "lanes out of range");
  for (i32 i = 0; i < p.times; ++i)
    require(p.count_at[i] > (i ? p.count_at[i - 1] : 0) && p.count_at[i] <= p.T,
            "count_at must be rising steps");
}

void check(const SpikeConv& p, const SpikeBranch& b) {
  require(b.words && b.weights, "words or weights are missing");
  require(b.H >= 1 && b.W >= 1 && b.first_word >= 0 && b.used_words >= 1 &&
              b.first_word + b.used_words <= b.row_words &&
              (b.kind == kEachToItself || b.used_words <= 256),
          "channels out of range");
  require(b.sixteens >= 1 && b.sixteens <= 4, "sixteens out of range");
  require(b.first_panel >= 0 && b.panels >= 1 && b.first_panel + b.panels <= p.panels,
          "panels out of range");
  require(b.kind == kAnyToAny || (b.kind == kEachToItself && !b.scale && b.panels <= b.used_words),
          "kind out of range");
  require(b.kh >= 1 && b.kw >= 1 && b.sh >= 1 && b.sw >= 1 && b.ph >= 0 && b.pw >= 0 && b.dh >= 1 &&
              b.dw >= 1,
          "kernel out of range");
  require(b.planes == 1 || (b.planes <= 3 && b.planes > 1 && b.kind == kAnyToAny && !b.either &&
                            i64(b.pool_h) * b.pool_w < i64(1) << b.planes),
          "planes out of range");
  require(b.pool_h >= 1 && b.pool_w >= 1 && b.pool_sh >= 1 && b.pool_sw >= 1 && b.pool_h <= b.H &&
              b.pool_w <= b.W,
          "pool of a branch out of range");
  const i64 rows = source_rows(b) + 2 * b.ph - i64(b.kh - 1) * b.dh - 1;
  const i64 columns = source_columns(b) + 2 * b.pw - i64(b.kw - 1) * b.dw - 1;
  require(rows >= 0 && columns >= 0 && rows / b.sh + 1 == p.OH && columns / b.sw + 1 == p.OW,
          "a branch does not give OH x OW positions");
  require(b.kind == kEachToItself || b.lanes == p.lanes, "a branch has other lanes than the layer");
  require(b.kind == kEachToItself || p.lanes == kPanel || placed(b),
          "too many channels and columns for few lanes");
  require(b.kind == kEachToItself || row_spikes(p, b) <= INT32_MAX, "too many spikes in a row");
}

// Rows of the map split into bands, panels into groups where there are few rows: units that share
// nothing, so results depend neither on the split nor on the threads.
struct Split {
  i64 rows, band, bands, group, groups, units;
};

Split split(const SpikeConv& p, i64 threads) {
  Split s;
  s.rows = p.OH / p.pool;
  const i64 wanted = threads * (threads > 1 ? 4 : 1), all = std::max<i64>(1, p.B * s.rows);
  s.band = std::max<i64>(1, std::min(s.rows, all / wanted));
  s.bands = (s.rows + s.band - 1) / s.band;
  const i64 parts = threads == 1 ? 1 : std::max<i64>(1, 2 * threads / (p.B * s.bands + 1));
  s.group = (p.panels + std::min(parts, p.panels) - 1) / std::min(parts, p.panels);
  s.groups = (p.panels + s.group - 1) / s.group;
  s.units = p.B * s.bands * s.groups;
  return s;
}

SpikeUnit unit(const SpikeConv& p, const Split& s, i64 i) {
  const i64 group = i % s.groups, band = i / s.groups % s.bands, b = i / s.groups / s.bands;
  return {b, band * s.band, std::min(s.rows, (band + 1) * s.band), group * s.group,
          std::min(p.panels, (group + 1) * s.group)};
}

void run_spike_conv(const py::bytes& bytes, const py::bytes& branch_bytes) {
  const SpikeConv p = unpack<SpikeConv>(bytes);
  const std::string raw = branch_bytes;
  require(raw.size() % sizeof(SpikeBranch) == 0, "branches: not a whole number of structs");
  std::vector<SpikeBranch> branches(raw.size() / sizeof(SpikeBranch));
  if (!raw.empty()) std::memcpy(branches.data(), raw.data(), raw.size());
  check(p);
  if (!p.B || !p.T) return;
  for (const SpikeBranch& b : branches) check(p, b);
  const std::string isa = isa_name();
#if defined(SNN_X86)
  const auto run = isa == "avx512" ? avx512::spike_conv
                   : isa == "avx2" ? avx2::spike_conv
                                   : baseline::spike_conv;
#else
  const auto run = baseline::spike_conv;
#endif
  py::gil_scoped_release nogil;
  const i64 most = max_threads();
  const Split s = split(p, most);
  const i64 threads = std::min(most, s.units);
  const i64 n = i64(branches.size());
  const i64 bytes_each =
      round_up(spike_scratch_bytes(p, branches.data(), n, s.band, s.group), 4096);
  const std::unique_ptr<char, void (*)(void*)> scratch(
      static_cast<char*>(std::aligned_alloc(4096, threads * bytes_each)), std::free);
  if (!scratch) throw std::bad_alloc();
  std::atomic<i64> next{0};
  const auto work = [&](i64 thread) {
    for (i64 i; (i = next.fetch_add(1)) < s.units;)
      run(p, branches.data(), n, unit(p, s, i), scratch.get() + thread * bytes_each);
  };
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    work(omp_get_thread_num());
    return;
  }
#endif
  work(0);
}

py::dict spike_layout() {
  py::dict all;
#define F(f) fields[#f] = offsetof(Struct, f)
  {
    typedef SpikeBranch Struct;
    py::dict fields;
    all["SpikeBranch"] = fields;
    fields[""] = sizeof(Struct);
    F(words), F(weights), F(scale), F(H), F(W), F(row_words), F(first_word), F(used_words);
    F(first_panel), F(panels), F(kh), F(kw), F(sh), F(sw), F(ph), F(pw), F(dh), F(dw), F(pool_h);
    F(pool_w), F(pool_sh), F(pool_sw), F(kind), F(either), F(planes), F(lanes), F(sixteens), F(pad);
  }
  {
    typedef SpikeConv Struct;
    py::dict fields;
    all["SpikeConv"] = fields;
    fields[""] = sizeof(Struct);
    F(bias), F(current), F(threshold), F(v_init), F(spikes), F(counts), F(currents), F(B), F(T);
    F(OH), F(OW), F(panels), F(threshold_position), F(v_init_position), F(pool), F(strict);
    F(times), F(lanes), F(integers), F(pad), F(count_at);
  }
#undef F
  return all;
}

}  // namespace

void bind_spike_conv(py::module_& m) {
  m.def("spike_conv", &run_spike_conv);
  m.attr("SPIKE_LAYOUT") = spike_layout();
}
