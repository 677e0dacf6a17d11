// Picks the kernel instance, guards the device, launches, reports. The same choice is made in
// Python for NVRTC (kernels/nvrtc.py); a test compares the two.
#include <cuda_runtime.h>

#include "device_guard.h"
#include "kernels.cuh"
#include "launch.h"

// The tests compile this file with g++ and define their own SNN_LAUNCH.
#ifndef SNN_LAUNCH
#define SNN_LAUNCH(kernel, blocks, stream, p) kernel<<<blocks, kThreads, 0, stream>>>(p)
#endif

namespace snn {
namespace {

template <class Params>
int launch(void (*kernel)(Params), const Params& p, i64 N, i32 vec, int device, void* stream) {
  if (!kernel) return kNoSuchKernel;
  DeviceGuard guard(device);
  if (guard.error()) return guard.error();
  const i64 threads = (N + vec - 1) / vec, blocks = (threads + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return kTooManyNeurons;
  SNN_LAUNCH(kernel, unsigned(blocks), static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

typedef void (*Forward)(IFForward);
typedef void (*General)(IFGeneral);
typedef void (*Backward)(IFBackward);
typedef void (*BackwardGeneral)(IFBackwardGeneral);

// Whether one element of the operand serves all neurons of any thread.
bool is_shared(const Operand& o, i32 vec) { return o.count == 1 || o.inner % vec == 0; }

template <class X, int OUT, int VEC>
Forward pick_steps(i64 T) {
  if constexpr (sizeof(X) < 8 && (OUT == kSpikes || OUT == kWords)) {
    switch (T) {
      case 8:
        return if_forward_steps<X, OUT, VEC, 8>;
      case 16:
        return if_forward_steps<X, OUT, VEC, 16>;
      case 32:
        return if_forward_steps<X, OUT, VEC, 32>;
    }
    if constexpr (VEC > 1) {
      switch (T) {
        case 1:
          return if_forward_steps<X, OUT, VEC, 1>;
        case 2:
          return if_forward_steps<X, OUT, VEC, 2>;
        case 4:
          return if_forward_steps<X, OUT, VEC, 4>;
      }
    }
  }
  return nullptr;
}

template <class X, int OUT>
Forward pick_form(const IFForward& p) {
  constexpr int kVec = 16 / sizeof(X);
  if (p.vec == 1) {
    const Forward steps = pick_steps<X, OUT, 1>(p.T);
    return steps ? steps : if_forward<X, OUT, 1, OUT == kTraining>;
  }
  if (p.vec != kVec) return nullptr;
  const bool shared =
      is_shared(p.threshold, kVec) && (OUT == kWords || is_shared(p.amplitude, kVec));
  if constexpr (OUT != kTraining) {
    if (shared) {
      const Forward steps = pick_steps<X, OUT, kVec>(p.T);
      return steps ? steps : if_forward<X, OUT, kVec, false>;
    }
  }
  return if_forward<X, OUT, kVec, true>;
}

// Whether one of the plain instances computes these outputs.
bool is_plain(const IFForward& p, i32 x_bytes) {
  const bool native = !p.spikes || p.spike_bytes == x_bytes;
  if (p.T > 0x7fffffff) return false;
  if (p.window) return native;
  return !p.spikes || (!p.words && (native || p.spike_bytes == 1));
}

template <class X>
Forward pick_forward(const IFForward& p) {
  if (p.window) return pick_form<X, kTraining>(p);
  if (!p.spikes) return pick_form<X, kWords>(p);
  if (p.spike_bytes == 1) return pick_form<X, kByte>(p);
  return p.count ? pick_form<X, kSpikesCount>(p) : pick_form<X, kSpikes>(p);
}

template <class X>
General pick_general(const IFGeneral& p) {
  if (p.base.spikes && p.base.spike_bytes != 1 && p.base.spike_bytes != int(sizeof(X)))
    return nullptr;
  if (!(p.options & kSmooth)) return if_general<X, false>;
  return sizeof(X) == 8 ? if_general<double, true> : nullptr;
}

template <class X, int VEC>
Backward pick_surrogate(const IFBackward& p) {
  if (p.window) return if_backward_bits<X, VEC>;
  switch (p.surrogate) {
    case kATan:
      return if_backward<X, kATan, VEC>;
    case kSigmoid:
      return if_backward<X, kSigmoid, VEC>;
    case kTriangle:
      return if_backward<X, kTriangle, VEC>;
    case kRectangle:
      return if_backward<X, kRectangle, VEC>;
    default:
      return nullptr;
  }
}

// A gradient summed over the steps of a constant current is the general kernel's.
bool is_plain(const IFBackward& p) { return !p.grad_x || p.grad_x_rows.step != 0; }

template <class X>
Backward pick_backward(const IFBackward& p) {
  // 16 bytes of state: kChunk membranes for each of 8 halves would spill.
  constexpr int kVec = 16 / sizeof(State<X>);
  if (p.options & ~kDetachReset) return nullptr;
  if (p.vec == 1) return pick_surrogate<X, 1>(p);
  if (p.vec == kVec) return pick_surrogate<X, kVec>(p);
  return nullptr;
}

template <class X>
BackwardGeneral pick_backward_general(const IFBackwardGeneral& p) {
  if (!p.base.x) return nullptr;
  if (!(p.base.options & kSmooth)) return if_backward_general<X, false>;
  return sizeof(X) == 8 ? if_backward_general<double, true> : nullptr;
}

// pick<X>(p) for the X of `dtype`; null where there is no such type.
#define SNN_PICK(pick, dtype, p)            \
  ((dtype) == kFloat32    ? pick<float>(p)  \
   : (dtype) == kFloat64  ? pick<double>(p) \
   : (dtype) == kFloat16  ? pick<f16>(p)    \
   : (dtype) == kBFloat16 ? pick<bf16>(p)   \
                          : nullptr)

i32 element_bytes(i32 dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

}  // namespace

int launch_if_forward(const IFForward& p, int device, void* stream) {
  if (!is_plain(p, element_bytes(p.dtype))) {
    IFGeneral general = {};
    general.base = p;
    return launch_if_general(general, device, stream);
  }
  return launch(SNN_PICK(pick_forward, p.dtype, p), p, p.N, p.vec, device, stream);
}

int launch_if_general(const IFGeneral& p, int device, void* stream) {
  return launch(SNN_PICK(pick_general, p.base.dtype, p), p, p.base.N, 1, device, stream);
}

int launch_if_backward(const IFBackward& p, int device, void* stream) {
  if (!is_plain(p)) {
    IFBackwardGeneral general = {};
    general.base = p;
    general.surrogate_scale = 1;
    return launch_if_backward_general(general, device, stream);
  }
  return launch(SNN_PICK(pick_backward, p.dtype, p), p, p.N, p.vec, device, stream);
}

int launch_if_backward_general(const IFBackwardGeneral& p, int device, void* stream) {
  return launch(SNN_PICK(pick_backward_general, p.base.dtype, p), p, p.base.N, 1, device, stream);
}

int cuda_versions(int* runtime, int* driver) {
  const cudaError_t error = cudaRuntimeGetVersion(runtime);
  return error == cudaSuccess ? int(cudaDriverGetVersion(driver)) : int(error);
}

const char* error_string(int error) {
  switch (error) {
    case kNoSuchKernel:
      return "no kernel was compiled for these parameters";
    case kTooManyNeurons:
      return "more neurons than one launch can cover";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(error));
  }
}

}  // namespace snn
