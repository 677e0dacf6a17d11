// Makes a device current and restores what was current before.
#pragma once
#include <cuda_runtime.h>

namespace snn {
namespace {

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

}  // namespace
}  // namespace snn
