// Picks the kernel instance, guards the device, launches, reports. The same choice is made in
// Python for NVRTC (kernels/nvrtc.py); a test compares the two.
#include <cuda_runtime.h>

#include "kernels.cuh"
#include "launch.h"

// The tests compile this file with g++ and define their own SNN_LAUNCH.
#ifndef SNN_LAUNCH
#define SNN_LAUNCH(kernel, blocks, stream, p) kernel<<<blocks, kThreads, 0, stream>>>(p)
#endif

namespace snn {
namespace {

// Makes `device` current for the launch and restores what was current before.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      switched_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (switched_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int error() const { return int(error_); }

 private:
  cudaError_t error_;
  int previous_ = 0;
  bool switched_ = false;
};

template <class Params>
int launch(void (*kernel)(Params), const Params& p, int device, void* stream) {
  if (!kernel) return kNoSuchKernel;
  DeviceGuard guard(device);
  if (guard.error()) return guard.error();
  const i64 threads = (p.N + p.vec - 1) / p.vec, blocks = (threads + kThreads - 1) / kThreads;
  if (blocks == 0) return 0;
  SNN_LAUNCH(kernel, unsigned(blocks), static_cast<cudaStream_t>(stream), p);
  return int(cudaGetLastError());
}

typedef void (*Forward)(IFForward);
typedef void (*Backward)(IFBackward);

template <class X, int SPIKE_BYTES, int VEC, bool CONSTANT>
Forward pick_uniform(const IFForward& p) {
  const bool uniform = p.threshold.count == 1 && p.amplitude.count == 1;
  return uniform ? if_forward<X, SPIKE_BYTES, VEC, CONSTANT, true>
                 : if_forward<X, SPIKE_BYTES, VEC, CONSTANT, false>;
}

template <class X, int SPIKE_BYTES, int VEC>
Forward pick_constant(const IFForward& p) {
  return p.x_stride == 0 ? pick_uniform<X, SPIKE_BYTES, VEC, true>(p)
                         : pick_uniform<X, SPIKE_BYTES, VEC, false>(p);
}

template <class X, int SPIKE_BYTES>
Forward pick_vec(const IFForward& p) {
  if (p.vec == 1) return pick_constant<X, SPIKE_BYTES, 1>(p);
  if (p.vec == 16 / int(sizeof(X))) return pick_constant<X, SPIKE_BYTES, 16 / sizeof(X)>(p);
  return nullptr;
}

template <class X>
Forward pick_forward(const IFForward& p) {
  if (p.options & kSmooth)
    return p.vec == 1 && sizeof(X) == 8 ? if_forward_general<double, true> : nullptr;
  if (p.options || p.v_seq || p.charge_seq)
    return p.vec == 1 ? if_forward_general<X, false> : nullptr;
  if (p.spike_bytes == 1) return pick_vec<X, 1>(p);
  if (p.spike_bytes == int(sizeof(X))) return pick_vec<X, sizeof(X)>(p);
  return nullptr;
}

template <class X, int KIND>
Backward pick_backward_vec(const IFBackward& p) {
  // 16 bytes of state: kChunk membranes for each of 8 halves would spill.
  constexpr int kVec = 16 / sizeof(State<X>);
  if (p.vec == 1) return if_backward<X, KIND, 1>;
  if (p.vec == kVec) return if_backward<X, KIND, kVec>;
  return nullptr;
}

template <class X>
Backward pick_backward(const IFBackward& p) {
  const bool plain = (p.options & ~kDetachReset) == 0 && p.x_stride != 0 && !p.grad_v_seq &&
                     !p.grad_charge_seq && !p.grad_threshold && !p.grad_amplitude;
  if (p.options & kSmooth)
    return p.vec == 1 && sizeof(X) == 8 ? if_backward_general<double, true> : nullptr;
  if (!plain) return p.vec == 1 ? if_backward_general<X, false> : nullptr;
  switch (p.surrogate) {
    case kATan:
      return pick_backward_vec<X, kATan>(p);
    case kSigmoid:
      return pick_backward_vec<X, kSigmoid>(p);
    case kTriangle:
      return pick_backward_vec<X, kTriangle>(p);
    case kRectangle:
      return pick_backward_vec<X, kRectangle>(p);
    default:
      return nullptr;
  }
}

}  // namespace

int launch_if_forward(const IFForward& p, int device, void* stream) {
  switch (p.dtype) {
    case kFloat32:
      return launch(pick_forward<float>(p), p, device, stream);
    case kFloat64:
      return launch(pick_forward<double>(p), p, device, stream);
    case kFloat16:
      return launch(pick_forward<f16>(p), p, device, stream);
    case kBFloat16:
      return launch(pick_forward<bf16>(p), p, device, stream);
    default:
      return kNoSuchKernel;
  }
}

int launch_if_backward(const IFBackward& p, int device, void* stream) {
  switch (p.dtype) {
    case kFloat32:
      return launch(pick_backward<float>(p), p, device, stream);
    case kFloat64:
      return launch(pick_backward<double>(p), p, device, stream);
    case kFloat16:
      return launch(pick_backward<f16>(p), p, device, stream);
    case kBFloat16:
      return launch(pick_backward<bf16>(p), p, device, stream);
    default:
      return kNoSuchKernel;
  }
}

int cuda_versions(int* runtime, int* driver) {
  const cudaError_t error = cudaRuntimeGetVersion(runtime);
  return error == cudaSuccess ? int(cudaDriverGetVersion(driver)) : int(error);
}

const char* error_string(int error) {
  return error == kNoSuchKernel ? "no kernel was compiled for these parameters"
                                : cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace snn
