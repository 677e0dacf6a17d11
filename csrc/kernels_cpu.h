// The CPU kernels: a block of neurons keeps its membranes in L1 while t runs inside, so every
// current is read once and every spike written once. Compiled once per SIMD level (cpu_isa.cpp,
// SNN_ISA names the namespace); nothing here may depend on anything but our headers, or an inline
// function compiled for AVX-512 could be the one the linker keeps for everybody.
#pragma once
#include "cpu_rows.h"
#include "cpu_forward.h"
#include "cpu_backward.h"
