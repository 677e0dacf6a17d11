// Picks the instance of a small kernel, guards the device, launches. The same choice is made in
// Python for NVRTC (kernels/maps_params.py); a test compares the two.
#include <cuda_runtime.h>

#include "device_guard.h"
#include "launch.h"
#include "maps.cuh"
#include "maps_launch.h"

// The tests compile this file with g++ and define their own SNN_LAUNCH.
#ifndef SNN_LAUNCH
#define SNN_LAUNCH(kernel, blocks, stream, p) kernel<<<blocks, kThreads, 0, stream>>>(p)
#endif

namespace snn {
namespace {

template <class Params>
int launch(void (*kernel)(Params), const Params& p, int device, void* stream) {
  if (!kernel) return kNoSuchKernel;
  DeviceGuard guard(device);
  if (guard.error()) return guard.error();
  const i64 blocks = (p.N + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return kTooManyNeurons;
  SNN_LAUNCH(kernel, unsigned(blocks), static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

// The instance of Kernels<X>::get for a dtype code.
template <template <class> class Kernels, class Params>
void (*by_dtype(const Params& p))(Params) {
  switch (p.dtype) {
    case kFloat32:
      return Kernels<float>::get(p);
    case kFloat64:
      return Kernels<double>::get(p);
    case kFloat16:
      return Kernels<f16>::get(p);
    case kBFloat16:
      return Kernels<bf16>::get(p);
    default:
      return nullptr;
  }
}

template <class X>
struct PoolKernels {
  static void (*get(const PoolParams& p))(PoolParams) {
    switch (p.size) {
      case 2:
        return map<Pool<X, 2>>;
      case 3:
        return map<Pool<X, 3>>;
      case 0:
        return p.kh * p.kw <= kPoolTaps ? map<Pool<X, 0>> : nullptr;
      default:
        return nullptr;
    }
  }
};

}  // namespace

#define SNN_BY_DTYPE(name, Params, kernel, Map)                          \
  namespace {                                                            \
  template <class X>                                                     \
  struct Map##Kernels {                                                  \
    static void (*get(const Params&))(Params) { return kernel<Map<X>>; } \
  };                                                                     \
  }                                                                      \
  int launch_##name(const Params& p, int device, void* stream) {         \
    return launch(by_dtype<Map##Kernels>(p), p, device, stream);         \
  }
SNN_BY_DTYPE(qcfs, QcfsParams, shared_map, Qcfs)
SNN_BY_DTYPE(qcfs_backward, QcfsParams, shared_map, QcfsBackward)
SNN_BY_DTYPE(dsr_backward, DsrParams, map, Dsr)
SNN_BY_DTYPE(mmse_errors, MmseParams, map, Mmse)
SNN_BY_DTYPE(histogram_update, HistogramParams, map, Histogram)
SNN_BY_DTYPE(ttfs_encode, TtfsParams, shared_map, TtfsEncode)
SNN_BY_DTYPE(ttfs_decode, TtfsParams, shared_map, TtfsDecode)
SNN_BY_DTYPE(bit_planes, PlanesParams, shared_map, BitPlanes)
#undef SNN_BY_DTYPE

int launch_cumulative_max_pool(const PoolParams& p, int device, void* stream) {
  return launch(by_dtype<PoolKernels>(p), p, device, stream);
}

int launch_sums(const SumsParams& p, int device, void* stream) {
  void (*kernel)(SumsParams) = p.dtype == kFloat32   ? map<Sums<float>>
                               : p.dtype == kFloat64 ? map<Sums<double>>
                                                     : nullptr;
  return launch(kernel, p, device, stream);
}

int launch_popcount(const BitsParams& p, int device, void* stream) {
  return launch<BitsParams>(map<Popcount<i32>>, p, device, stream);
}

#define SNN_BY_BYTES(name, Map)                                      \
  int launch_##name(const BitsParams& p, int device, void* stream) { \
    switch (p.spike_bytes) {                                         \
      case 1:                                                        \
        return launch<BitsParams>(map<Map<1>>, p, device, stream);   \
      case 2:                                                        \
        return launch<BitsParams>(map<Map<2>>, p, device, stream);   \
      case 4:                                                        \
        return launch<BitsParams>(map<Map<4>>, p, device, stream);   \
      case 8:                                                        \
        return launch<BitsParams>(map<Map<8>>, p, device, stream);   \
      default:                                                       \
        return kNoSuchKernel;                                        \
    }                                                                \
  }
SNN_BY_BYTES(unpack_bits, Unpack)
SNN_BY_BYTES(pack_bits, PackBits)
#undef SNN_BY_BYTES

}  // namespace snn
