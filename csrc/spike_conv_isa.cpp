// Compiled once per SIMD level with that level's flags and -DSNN_ISA=<namespace>.
#include "spike_conv_cpu.h"
#include "spike_conv_narrow.h"

namespace snn {
namespace SNN_ISA {

void spike_conv(const SpikeConv& p, const SpikeBranch* branches, i64 n, const SpikeUnit& unit,
                void* scratch) {
  if (p.lanes == 16) return NarrowUnit<16>(p, branches, n, unit, scratch).run();
  if (p.lanes == 32) return NarrowUnit<32>(p, branches, n, unit, scratch).run();
  SpikeConvUnit(p, branches, n, unit, scratch).run();
}

}  // namespace SNN_ISA
}  // namespace snn
