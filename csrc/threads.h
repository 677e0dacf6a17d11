// How many threads a kernel of the CPU extension may take, and what a fork needs.
#pragma once

#include <atomic>

#if defined(_OPENMP)
#include <dlfcn.h>
#include <omp.h>
#endif

namespace snn {

// libgomp keeps its threads between parallel regions and does not notice a fork: the child, which
// has none of them, would wait for them for ever. So they end before a fork; the next parallel
// region, of parent and child, starts new ones.
struct Fork {
  // Atomic: forks and kernels in several threads, without the GIL.
  inline static std::atomic<bool> lost{false};        // threads were still there at the last fork
  inline static std::atomic<bool> one_thread{false};  // this process lacks threads that were lost

  // Ends the threads that the calling thread's parallel regions run on, torch's own included.
  static void before() {
#if defined(_OPENMP)
    Dl_info info = {};
    if (!dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) || !info.dli_fname) return;
    void* runtime = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    if (!runtime) return;
    // The runtimes of LLVM and Intel notice a fork by themselves.
    if (!dlsym(runtime, "__kmpc_fork_call")) {
      const auto pause = reinterpret_cast<int (*)(int)>(dlsym(runtime, "omp_pause_resource_all"));
      lost = !pause || pause(1) != 0;  // omp_pause_soft
    }
    dlclose(runtime);
#endif
  }

  static void in_child() {
    if (lost) one_thread = true;
  }
};

// Threads that a parallel region may have.
inline int max_threads() {
#if defined(_OPENMP)
  if (!Fork::one_thread) return omp_get_max_threads();
#endif
  return 1;
}

}  // namespace snn
