// The small kernels of the CPU extension: one entry, `map(name, params)`; SIMD level and threads
// chosen here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind.h"
#include "bind_maps.h"
#include "threads.h"

namespace py = pybind11;
using namespace snn;

namespace {

// Below this many elements a parallel region costs more than it saves.
constexpr i64 kParallelElements = 256 * 1024;

// How a call splits: units that share nothing, in pieces of `granule`, of so many elements in all.
struct Work {
  i64 units, elements, granule;
};

Work work(const QcfsParams& p) { return {p.N, p.N, kMapBlock}; }
Work work(const PoolParams& p) { return {p.planes, p.T * p.planes * p.H * p.W, 1}; }
Work work(const DsrParams& p) { return {p.N, 2 * p.T * p.N, kMapBlock}; }
Work work(const SumsParams& p) { return {p.N, p.rows * p.each, 1}; }
Work work(const MmseParams& p) { return {p.N, p.channels * p.each * p.K, 1}; }
Work work(const HistogramParams& p) { return {p.channels, p.N, 1}; }
Work work(const TtfsParams& p) { return {p.N, p.N, kMapBlock}; }
Work work(const PlanesParams& p) { return {p.N, p.T * p.N, kMapBlock}; }
Work work(const BitsParams& p) { return {p.N, p.T * p.N, kMapBlock}; }

template <class Params>
void over_units(void (*run)(const Params&, i64, i64), const Params& p) {
  const Work w = work(p);
  if (w.units < 0 || w.elements < 0) throw std::invalid_argument("sizes must not be negative");
  if (!w.units) return;
  py::gil_scoped_release nogil;
#if defined(_OPENMP)
  const i64 pieces = (w.units + w.granule - 1) / w.granule;
  const i64 threads = std::min<i64>(max_threads(), pieces);
  if (threads > 1 && w.elements >= kParallelElements) {
    const i64 each = (pieces + threads - 1) / threads * w.granule;
#pragma omp parallel num_threads(int(threads))
    {
      const i64 first = omp_get_thread_num() * each, last = std::min(w.units, first + each);
      if (first < last) run(p, first, last);
    }
    return;
  }
#endif
  run(p, 0, w.units);
}

void run_map(const std::string& name, const py::bytes& bytes) {
  const std::string isa = isa_name();
#if defined(SNN_X86)
#define SNN_PICK(map) (isa == "avx512" ? avx512::map : isa == "avx2" ? avx2::map : baseline::map)
#else
#define SNN_PICK(map) baseline::map
#endif
#define SNN_RUN(map, Params) \
  if (name == #map) return over_units<Params>(SNN_PICK(map), unpack<Params>(bytes));
  SNN_MAPS(SNN_RUN)
#undef SNN_RUN
#undef SNN_PICK
  throw std::invalid_argument("map: '" + name + "' is unknown");
}

}  // namespace

void bind_maps(py::module_& m) {
  m.def("map", &run_map);
  m.attr("MAP_LAYOUT") = map_layout();
}
