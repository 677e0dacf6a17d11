// Number types shared by every compiler that sees these kernels: g++ and clang (CPU, tests), nvcc,
// NVRTC. Nothing is included: NVRTC has no header path.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define SNN_HD __host__ __device__ __forceinline__
#else
#define SNN_HD inline __attribute__((always_inline))
#endif

namespace snn {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "integer widths");

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

// A neuron's membrane, threshold and gradients live in the state type of its input.
template <class X>
struct StateOf {
  typedef float type;
};
template <>
struct StateOf<double> {
  typedef double type;
};
template <class X>
using State = typename StateOf<X>::type;

// An output element is selected by its bits, so only its width matters.
template <int BYTES>
struct BitsOf;
template <>
struct BitsOf<1> {
  typedef u8 type;
};
template <>
struct BitsOf<2> {
  typedef u16 type;
};
template <>
struct BitsOf<4> {
  typedef u32 type;
};
template <>
struct BitsOf<8> {
  typedef u64 type;
};
template <int BYTES>
using Bits = typename BitsOf<BYTES>::type;

SNN_HD u32 to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  u32 u;
  __builtin_memcpy(&u, &f, 4);
  return u;
#endif
}

SNN_HD float from_bits(u32 u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
#endif
}

SNN_HD float widen(float x) { return x; }
SNN_HD double widen(double x) { return x; }
SNN_HD float widen(bf16 x) { return from_bits(u32(x.bits) << 16); }

SNN_HD float widen(f16 x) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
#else
  // Branch-free so that it vectorises: shift into float position, correct the exponent bias by an
  // exact multiplication (2^112, also right for subnormals), restore infinities and NaN.
  const float scaled = from_bits(u32(x.bits & 0x7fffu) << 13) * 0x1p112f;
  const u32 special = scaled >= 65536.0f ? 0x7f800000u : 0u;
  return from_bits(to_bits(scaled) | special | (u32(x.bits & 0x8000u) << 16));
#endif
}

template <class X>
struct Narrow;

template <>
struct Narrow<float> {
  static SNN_HD float from(float f) { return f; }
};
template <>
struct Narrow<double> {
  static SNN_HD double from(double f) { return f; }
};

// Round to nearest even; NaN stays NaN.
template <>
struct Narrow<bf16> {
  static SNN_HD bf16 from(float f) {
    const u32 u = to_bits(f);
    const u32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{u16(f != f ? 0x7fc0u : rounded)};
  }
};

template <>
struct Narrow<f16> {
  static SNN_HD f16 from(float f) {
#if defined(__CUDA_ARCH__)
    f16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
    return h;
#else
    const u32 u = to_bits(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const u32 normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Adding 1/2 aligns the last bit of a subnormal half (2^-24) with the last bit of the sum.
    const u32 subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
    u32 h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? 0x7c00u : h;
    h = magnitude > 0x7f800000u ? 0x7e00u : h;
    return f16{u16(sign | h)};
#endif
  }
};

SNN_HD float absolute(float x) { return x < 0 ? -x : x; }
SNN_HD double absolute(double x) { return x < 0 ? -x : x; }

// How many bits are set; on CPUs in arithmetic that vectorises.
SNN_HD i32 ones(u32 word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  word = word - ((word >> 1) & 0x55555555u);
  word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
  return i32((((word + (word >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
#endif
}

// Exact for every argument; NaN and infinities pass through.
SNN_HD float floor_of(float x) {
#if defined(__CUDA_ARCH__)
  return floorf(x);
#else
  return __builtin_floorf(x);
#endif
}

SNN_HD double floor_of(double x) {
#if defined(__CUDA_ARCH__)
  return floor(x);
#else
  return __builtin_floor(x);
#endif
}

SNN_HD double arctan(double x) {
#if defined(__CUDA_ARCH__)
  return atan(x);
#else
  return __builtin_atan(x);
#endif
}

SNN_HD double error_function(double x) {
#if defined(__CUDA_ARCH__)
  return erf(x);
#else
  return __builtin_erf(x);
#endif
}

// exp(x) for x <= 0.
SNN_HD double exp_nonpositive(double x) {
#if defined(__CUDA_ARCH__)
  return exp(x);
#else
  return __builtin_exp(x);
#endif
}

SNN_HD float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  // Own polynomial (Cephes' reduction, about 2 ulp) because libm's expf does not vectorise here.
  // The int conversion truncates towards zero, which is ceil for x <= 0: no floor needed.
  const float y = x < -87.0f ? -87.0f : x;
  const i32 k = i32(y * 1.44269504f - 0.5f);
  const float n = float(k);
  const float r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits(u32(k + 127) << 23);
#endif
}

}  // namespace snn
