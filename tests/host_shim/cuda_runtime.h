// Just enough of a CUDA runtime to compile csrc/launch.cu with a C++ compiler and run its kernels
// on the CPU: a launch loops over every block and thread. What was asked of the runtime is logged
// (runtime.cpp), and calls can be made to fail.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct ShimIndex {
  unsigned x, y, z;
};
inline thread_local ShimIndex blockIdx, threadIdx;

enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719, cudaErrorInvalidDevice = 101 };
typedef struct ShimStream* cudaStream_t;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetLastError();
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
const char* cudaGetErrorString(cudaError_t error);

namespace shim {

void log_launch(const void* kernel, unsigned blocks, unsigned threads, cudaStream_t stream);

template <class Params>
void launch(void (*kernel)(Params), unsigned blocks, unsigned threads, cudaStream_t stream,
            const Params& p) {
  log_launch(reinterpret_cast<const void*>(kernel), blocks, threads, stream);
  for (unsigned block = 0; block < blocks; ++block)
    for (unsigned thread = 0; thread < threads; ++thread) {
      blockIdx.x = block;
      threadIdx.x = thread;
      kernel(p);
    }
}

}  // namespace shim

#define SNN_LAUNCH(kernel, blocks, stream, p) ::shim::launch(kernel, blocks, kThreads, stream, p)
