// Compiled once per SIMD level with that level's flags and -DSNN_ISA=<namespace>.
#include "maps_cpu.h"
