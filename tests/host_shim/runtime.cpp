// The fake CUDA runtime's state: a log of calls as lines of text, and failures on request.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"

namespace {

constexpr int kDevices = 4;
std::mutex g_mutex;
std::string g_log, g_answer;
std::map<std::string, int> g_failures;
int g_device = 0;

void note(const std::string& line) { g_log += line + "\n"; }

cudaError_t failure(const char* call) {
  const auto found = g_failures.find(call);
  return found == g_failures.end() ? cudaSuccess : static_cast<cudaError_t>(found->second);
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  *device = g_device;
  return failure("cudaGetDevice");
}

cudaError_t cudaSetDevice(int device) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  note("device " + std::to_string(device));
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  if (const cudaError_t error = failure("cudaSetDevice")) return error;
  g_device = device;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return failure("cudaGetLastError");
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return failure("cudaRuntimeGetVersion");
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return failure("cudaDriverGetVersion");
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
  }
  return "unrecognized error code";
}

void shim::log_launch(const void* kernel, unsigned blocks, unsigned threads, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  Dl_info info = {};
  dladdr(kernel, &info);
  const std::ptrdiff_t offset =
      static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  note("launch " + std::to_string(blocks) + " blocks of " + std::to_string(threads) +
       " on device " + std::to_string(g_device) + " stream " +
       std::to_string(reinterpret_cast<std::uintptr_t>(stream)) + " kernel " +
       std::to_string(offset));
}

// For the tests, through ctypes.
#define SHIM_API extern "C" __attribute__((visibility("default")))

// The log so far, which is then empty.
SHIM_API const char* shim_take_log() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_answer.swap(g_log);
  g_log.clear();
  return g_answer.c_str();
}

// From now on `call` returns `error`; 0 lets it succeed again.
SHIM_API void shim_fail(const char* call, int error) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (error)
    g_failures[call] = error;
  else
    g_failures.erase(call);
}

SHIM_API int shim_device() { return g_device; }
