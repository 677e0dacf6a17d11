// The small kernels by name, and what maps_isa.cpp offers of them once per SIMD level.
#pragma once
#include "maps.h"

// Every small kernel and its struct.
#define SNN_MAPS(MAP)                    \
  MAP(qcfs, QcfsParams)                  \
  MAP(qcfs_backward, QcfsParams)         \
  MAP(cumulative_max_pool, PoolParams)   \
  MAP(dsr_backward, DsrParams)           \
  MAP(sums, SumsParams)                  \
  MAP(mmse_errors, MmseParams)           \
  MAP(histogram_update, HistogramParams) \
  MAP(ttfs_encode, TtfsParams)           \
  MAP(ttfs_decode, TtfsParams)           \
  MAP(bit_planes, PlanesParams)          \
  MAP(unpack_bits, BitsParams)           \
  MAP(popcount, BitsParams)              \
  MAP(pack_bits, BitsParams)

namespace snn {

constexpr i64 kMapBlock = 128;  // elements whose intermediate values stay in L1

// The SIMD level in use (bind_cpu.cpp).
const char* isa_name();

#define SNN_DECLARE(name, Params) void name(const Params& p, i64 first, i64 last);
namespace baseline {
SNN_MAPS(SNN_DECLARE)
}
namespace avx2 {
SNN_MAPS(SNN_DECLARE)
}
namespace avx512 {
SNN_MAPS(SNN_DECLARE)
}
#undef SNN_DECLARE

}  // namespace snn
