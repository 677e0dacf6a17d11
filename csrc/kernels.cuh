// The GPU kernels.
#pragma once
#include "backward.cuh"
#include "forward.cuh"
#include "general.cuh"
