// Launchers of the compiled CUDA extension. Each returns a cudaError_t as int, 0 for success, or
// kNoSuchKernel for parameters outside the closed list of instances, or kTooManyNeurons.
#pragma once
#include "params.h"

namespace snn {

enum { kNoSuchKernel = -1, kTooManyNeurons = -2 };

int launch_if_forward(const IFForward& p, int device, void* stream);
int launch_if_general(const IFGeneral& p, int device, void* stream);
int launch_if_backward(const IFBackward& p, int device, void* stream);
int launch_if_backward_general(const IFBackwardGeneral& p, int device, void* stream);
const char* error_string(int error);

// CUDA versions of the runtime linked in and of the driver (0: no driver), such as 13000.
int cuda_versions(int* runtime, int* driver);

}  // namespace snn
