// Launchers of the small kernels; errors as in launch.h.
#pragma once
#include "maps_cpu_api.h"

namespace snn {

#define SNN_DECLARE(name, Params) int launch_##name(const Params& p, int device, void* stream);
SNN_MAPS(SNN_DECLARE)
#undef SNN_DECLARE

}  // namespace snn
