// The CPU extension: one function per kernel, a params struct as bytes in, SIMD level and threads
// chosen here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "bind.h"
#include "kernels_cpu_api.h"
#include "maps_cpu_api.h"
#include "threads.h"

namespace py = pybind11;
using namespace snn;

namespace {

struct Isa {
  const char* name;
  void (*forward)(const IFForward&, i64, i64, bool);
  void (*general)(const IFGeneral&, i64, i64, bool);
  void (*backward)(const IFBackward&, i64, i64, bool, void*);
  void (*backward_general)(const IFBackwardGeneral&, i64, i64, bool, void*);
};

// Below this many neuron-steps a parallel region costs more than it saves.
constexpr i64 kParallelSteps = 256 * 1024;
// Above this many bytes read and written, stores that bypass the caches win.
constexpr i64 kStreamBytes = 20 * 1024 * 1024;

const Isa kIsas[] = {
#define SNN_ISA_ENTRY(ISA) {#ISA, ISA::forward, ISA::general, ISA::backward, ISA::backward_general}
#if defined(SNN_X86)
    SNN_ISA_ENTRY(avx512),
    SNN_ISA_ENTRY(avx2),
#endif
    SNN_ISA_ENTRY(baseline),
#undef SNN_ISA_ENTRY
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

// Calls read it once, without the GIL.
std::atomic<const Isa*> g_isa{[] {
  for (const Isa& isa : kIsas)
    if (supported(isa.name)) return &isa;
  return &kIsas[0];
}()};

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

void check(const Operand& o) {
  require(!o.data || (o.inner >= 1 && o.count >= 1),
          "an operand's inner and count must be positive");
}

void check_shape(const void* x, i64 T, i64 N, i64 inner, i32 dtype) {
  require(dtype >= kFloat32 && dtype <= kBFloat16, "dtype code out of range");
  require(T >= 0 && N >= 0, "T and N must not be negative");
  require(!N || inner >= 1, "inner must be positive");
  require(x || !T || !N, "x is missing");
}

void check_words(const void* words, i32 bytes, i64 T) {
  require(!words || bytes == 4 || (bytes == 2 && T <= 16) || (bytes == 1 && T <= 8),
          "word_bytes must be 1 (T <= 8), 2 (T <= 16) or 4");
}

void check(const IFForward& p) {
  check_shape(p.x, p.T, p.N, p.inner, p.dtype);
  require(!p.spikes || p.spike_bytes == 1 || p.spike_bytes == element_bytes(p.dtype),
          "spike_bytes must be 1 or the size of an element of x");
  check_words(p.words, p.word_bytes, p.T);
  check_words(p.window, p.word_bytes, p.T);
  check(p.v_init), check(p.threshold), check(p.amplitude);
}

void check(const IFGeneral& p) {
  const i64 T = p.base.T;
  check(p.base);
  check(p.input_scale), check(p.beta), check(p.bias), check(p.fire_level);
  require(!(p.options & kSmooth) ||
              (p.base.dtype == kFloat64 && (!p.base.spikes || p.base.spike_bytes == 8)),
          "smooth spikes are float64");
  require(p.surrogate >= kATan && p.surrogate <= kPeriodicExponential,
          "surrogate code out of range");
  require(!(p.options & kMask) || p.mask || !p.base.N, "mask is missing");
  require(p.max_spikes >= 0, "max_spikes must not be negative");
  require(p.iterations >= 0, "iterations must not be negative");
  if (p.options & (kProbeMask | kProbeShift))
    require(p.probe >= 0 && p.probe <= T, "probe must be one of the T steps");
  require(!(p.options & kParallel) || (!p.v_seq && !p.charge_seq),
          "the parallel neuron has no traces");
  if (!p.counts) return;
  require(p.count_times >= 0 && p.count_times <= kCountTimes, "count_times out of range");
  const i64 emitted = T - (p.options & kProbeMask ? p.probe : 0);
  for (i32 j = 0; j < p.count_times; ++j)
    require(p.count_at[j] >= (j ? p.count_at[j - 1] : 0) && p.count_at[j] <= emitted,
            "count_at must be ascending steps");
}

void check(const IFBackward& p, bool general) {
  check_shape(p.x || (!general && (p.charges || p.window)) ? &p : nullptr, p.T, p.N, p.inner,
              p.dtype);
  require(p.T >= 1, "a backward pass needs at least one step");
  require(p.surrogate >= kATan && p.surrogate <= (general ? kPeriodicExponential : kRectangle),
          "surrogate code out of range");
  check(p.v_init), check(p.threshold), check(p.amplitude);
  if (general) {
    require(!(p.options & kSmooth) || p.dtype == kFloat64, "smooth spikes are float64");
    return;
  }
  require(!(p.options & ~kDetachReset), "the plain backward pass has no such option");
  check_words(p.window, p.word_bytes, p.T);
  if (!p.window) return;
  check_words(p.words, p.word_bytes, p.T);
  require(p.surrogate == kRectangle, "a window is of the rectangle surrogate");
  require(p.words || !(p.grad_threshold || p.grad_amplitude), "words are missing");
}

// Calls run(first, last, scratch) over all neurons, split over threads where that pays. Neurons
// share nothing, so results do not depend on the split.
template <class Run>
void over_neurons(i64 T, i64 N, i64 scratch_bytes, Run run) {
  const i64 loops = (N + kLanes - 1) / kLanes;
  if (!loops) return;
  const i64 threads = T * N >= kParallelSteps ? std::min<i64>(max_threads(), loops) : 1;
  scratch_bytes = (scratch_bytes + 63) / 64 * 64;
  const std::unique_ptr<char, void (*)(void*)> scratch(
      scratch_bytes ? static_cast<char*>(std::aligned_alloc(64, threads * scratch_bytes)) : nullptr,
      std::free);
  if (scratch_bytes && !scratch) throw std::bad_alloc();
  const auto part = [&](i64 thread, i64 all) {
    const i64 first = loops * thread / all * kLanes;
    const i64 last = std::min(N, loops * (thread + 1) / all * kLanes);
    if (first < last) run(first, last, scratch.get() + thread * scratch_bytes);
  };
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    part(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  part(0, 1);
}

// Bytes of rows that a forward pass reads and writes.
i64 rows_bytes(const IFForward& p) {
  return p.T * p.N *
         ((p.x_rows.step ? element_bytes(p.dtype) : 0) + (p.spikes ? p.spike_bytes : 0));
}

void if_forward(const py::bytes& bytes) {
  const IFForward p = unpack<IFForward>(bytes);
  check(p);
  const bool streaming = rows_bytes(p) > kStreamBytes;
  const Isa& isa = *g_isa.load();
  py::gil_scoped_release nogil;
  over_neurons(p.T, p.N, 0,
               [&](i64 first, i64 last, void*) { isa.forward(p, first, last, streaming); });
}

void if_general(const py::bytes& bytes) {
  const IFGeneral p = unpack<IFGeneral>(bytes);
  check(p);
  const i64 traces = i64(p.v_seq != nullptr) + i64(p.charge_seq != nullptr);
  const bool streaming =
      rows_bytes(p.base) + traces * p.base.T * p.base.N * state_bytes(p.base.dtype) > kStreamBytes;
  const Isa& isa = *g_isa.load();
  py::gil_scoped_release nogil;
  over_neurons(p.base.T, p.base.N, 0,
               [&](i64 first, i64 last, void*) { isa.general(p, first, last, streaming); });
}

void if_backward(const py::bytes& bytes) {
  const IFBackward p = unpack<IFBackward>(bytes);
  check(p, false);
  const bool streaming = 3 * p.T * p.N * element_bytes(p.dtype) > kStreamBytes;
  const Isa& isa = *g_isa.load();
  py::gil_scoped_release nogil;
  over_neurons(p.T, p.N, backward_scratch_bytes(p), [&](i64 first, i64 last, void* scratch) {
    isa.backward(p, first, last, streaming, scratch);
  });
}

void if_backward_general(const py::bytes& bytes) {
  const IFBackwardGeneral p = unpack<IFBackwardGeneral>(bytes);
  check(p.base, true);
  check(p.input_scale), check(p.beta), check(p.bias), check(p.fire_level);
  require(p.max_spikes >= 0, "max_spikes must not be negative");
  const bool streaming = 3 * p.base.T * p.base.N * element_bytes(p.base.dtype) > kStreamBytes;
  const Isa& isa = *g_isa.load();
  py::gil_scoped_release nogil;
  over_neurons(p.base.T, p.base.N, backward_scratch_bytes(p.base),
               [&](i64 first, i64 last, void* scratch) {
                 isa.backward_general(p, first, last, streaming, scratch);
               });
}

}  // namespace

const char* snn::isa_name() { return g_isa.load()->name; }
void bind_maps(py::module_& m);
void bind_spike_conv(py::module_& m);

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "snnkernels CPU kernels";
  m.def("if_forward", &if_forward);
  m.def("if_general", &if_general);
  m.def("if_backward", &if_backward);
  m.def("if_backward_general", &if_backward_general);
  m.def("isa", [] { return std::string(isa_name()); }, "The SIMD level in use.");
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
  m.def("threads", &max_threads);
  m.def("before_fork", &Fork::before, "Ends OpenMP's threads, which a child would wait for.");
  m.def("after_fork_in_child", &Fork::in_child);
  m.attr("LAYOUT") = layout();
  bind_maps(m);
  bind_spike_conv(m);
}
