// Compiled once per SIMD level with that level's flags and -DSNN_ISA=<namespace>.
#include "spike_conv_cpu.h"
