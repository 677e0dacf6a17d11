// The CPU extension: one function per kernel, a params struct as bytes in, SIMD level and threads
// chosen here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind.h"
#include "kernels_cpu_api.h"
#include "maps_cpu_api.h"

namespace py = pybind11;
using namespace snn;

namespace {

struct Isa {
  const char* name;
  void (*forward)(const IFForward&, i64, i64, bool);
  void (*backward)(const IFBackward&, i64, i64, bool, void*);
};

// Below this many neuron-steps a parallel region costs more than it saves.
constexpr i64 kParallelSteps = 256 * 1024;
// Above this many bytes of rows, stores that bypass the caches win.
constexpr i64 kStreamBytes = 20 * 1024 * 1024;

const Isa kIsas[] = {
#if defined(SNN_X86)
    {"avx512", avx512::forward, avx512::backward},
    {"avx2", avx2::forward, avx2::backward},
#endif
    {"baseline", baseline::forward, baseline::backward},
};

bool supported(const std::string& name) {
#if defined(SNN_X86)
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
  return name == "baseline";
}

const Isa* g_isa = [] {
  for (const Isa& isa : kIsas)
    if (supported(isa.name)) return &isa;
  return &kIsas[0];
}();

void check(i32 dtype, i64 T, i64 N) {
  if (dtype < kFloat32 || dtype > kBFloat16) throw std::invalid_argument("dtype code out of range");
  if (T < 0 || N < 0) throw std::invalid_argument("T and N must not be negative");
}

i64 element_size(i32 dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

bool streamable(const void* rows, i64 row_bytes) {
  return reinterpret_cast<std::uintptr_t>(rows) % 64 == 0 && row_bytes % 64 == 0;
}

// Calls run(first, last) over all blocks, split over threads where that pays. Blocks share nothing,
// so results do not depend on the split.
template <class Run>
void over_blocks(i64 T, i64 N, Run run) {
  const i64 blocks = (N + kBlock - 1) / kBlock;
  if (!blocks) return;
#if defined(_OPENMP)
  const i64 threads = std::min<i64>(omp_get_max_threads(), blocks);
  if (threads > 1 && T * N >= kParallelSteps) {
    const i64 each = (blocks + threads - 1) / threads;
#pragma omp parallel num_threads(int(threads))
    {
      const i64 first = omp_get_thread_num() * each, last = std::min(blocks, first + each);
      if (first < last) run(first, last);
    }
    return;
  }
#endif
  run(0, blocks);
}

void if_forward(const py::bytes& bytes) {
  const IFForward p = unpack<IFForward>(bytes);
  check(p.dtype, p.T, p.N);
  const bool streaming = p.spikes &&
                         p.T * p.N * (element_size(p.dtype) + p.spike_bytes) > kStreamBytes &&
                         streamable(p.spikes, p.N * p.spike_bytes);
  py::gil_scoped_release nogil;
  over_blocks(p.T, p.N, [&](i64 first, i64 last) { g_isa->forward(p, first, last, streaming); });
}

void if_backward(const py::bytes& bytes) {
  const IFBackward p = unpack<IFBackward>(bytes);
  check(p.dtype, p.T, p.N);
  if (p.T < 1) throw std::invalid_argument("if_backward: T must be at least 1");
  const i64 size = element_size(p.dtype);
  const bool streaming =
      p.grad_x && 3 * p.T * p.N * size > kStreamBytes && streamable(p.grad_x, p.N * size);
  py::gil_scoped_release nogil;
  over_blocks(p.T, p.N, [&](i64 first, i64 last) {
    void* scratch = std::aligned_alloc(64, std::size_t(backward_scratch_bytes(p)));
    if (!scratch) std::abort();
    g_isa->backward(p, first, last, streaming, scratch);
    std::free(scratch);
  });
}

}  // namespace

const char* snn::isa_name() { return g_isa->name; }
void bind_maps(py::module_& m);

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "snnkernels CPU kernels";
  m.def("if_forward", &if_forward);
  m.def("if_backward", &if_backward);
  m.def("isa", [] { return std::string(g_isa->name); }, "The SIMD level in use.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const Isa& isa : kIsas)
          if (supported(isa.name)) names.append(isa.name);
        return names;
      },
      "SIMD levels this processor can run, best first.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (const Isa& isa : kIsas)
          if (name == isa.name && supported(name)) {
            g_isa = &isa;
            return;
          }
        throw std::invalid_argument("set_isa: '" + name + "' is not one of isas()");
      },
      "For tests: run another SIMD level.");
  m.def("threads", [] {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
  });
  m.attr("LAYOUT") = layout();
  bind_maps(m);
}
