// What the GPU kernels share: memory transactions, where a neuron's data lies, packed elements.
//
// A thread owns VEC consecutive neurons and runs all T steps with their membranes in registers. No
// thread talks to another, so the same source runs on a CPU in the tests. VEC > 1 asks for whole
// and aligned groups everywhere (kernels/plan.py); then nothing has a tail. The instances are a
// closed list: see launch.cu and kernels/nvrtc.py.
#pragma once
#include "neuron.h"

namespace snn {

enum { kThreads = 256, kLoadsInFlight = 4 };

#if defined(__CUDA_ARCH__)
#define SNN_UNROLL _Pragma("unroll")
#define SNN_KEEP_LOOP _Pragma("unroll 1")
#else
#define SNN_UNROLL
#define SNN_KEEP_LOOP
#endif

__device__ __forceinline__ i64 global_thread() { return i64(blockIdx.x) * kThreads + threadIdx.x; }

// Has the value ready here. Otherwise the compiler gathers the bits of many steps in one tree of
// ORs, or has the addresses of many rows at once, and the registers run out.
__device__ __forceinline__ void keep(u32& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#else
  (void)value;
#endif
}

template <class T>
__device__ __forceinline__ void advance(T*& p, i64 step) {
  p += step;
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(p));
#endif
}

// VEC elements that travel together.
template <class T, int VEC>
union Pack {
  u32 words[(sizeof(T) * VEC + 3) / 4];
  T at[VEC];
};

// LAST: nobody reads it again, so the caches evict it first. `volatile` keeps loads and stores in
// the order written, so that the loads of a ring are issued before what came first is used.
template <class T, int VEC, bool LAST = true>
__device__ __forceinline__ Pack<T, VEC> load(const T* p) {
  Pack<T, VEC> r;
  constexpr int kBytes = sizeof(T) * VEC;
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16, "");
  if constexpr (kBytes < 4) r.words[0] = 0;
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes == 16 && LAST) {
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
                 : "l"(p));
  } else if constexpr (kBytes == 16) {
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r.words[0]), "=r"(r.words[1]), "=r"(r.words[2]), "=r"(r.words[3])
                 : "l"(p));
  } else if constexpr (kBytes == 8 && LAST) {
    asm volatile("ld.global.cs.v2.u32 {%0,%1}, [%2];"
                 : "=r"(r.words[0]), "=r"(r.words[1])
                 : "l"(p));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(r.words[0]), "=r"(r.words[1]) : "l"(p));
  } else if constexpr (kBytes == 4 && LAST) {
    asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(r.words[0]) : "l"(p));
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(r.words[0]) : "l"(p));
  } else if constexpr (kBytes == 2) {
    u16 half;
    if constexpr (LAST)
      asm volatile("ld.global.cs.u16 %0, [%1];" : "=h"(half) : "l"(p));
    else
      asm volatile("ld.global.u16 %0, [%1];" : "=h"(half) : "l"(p));
    r.words[0] = half;
  } else {
    asm volatile("ld.global.u8 %0, [%1];" : "=r"(r.words[0]) : "l"(p));
  }
#else
  __builtin_memcpy(&r, p, kBytes);
#endif
  return r;
}

// Not evicted first: the next layer wants the spikes in the cache.
template <class T, int VEC>
__device__ __forceinline__ void store(T* p, const Pack<T, VEC>& r) {
  constexpr int kBytes = sizeof(T) * VEC;
  static_assert(kBytes == 1 || kBytes == 2 || kBytes % 4 == 0, "");
#if defined(__CUDA_ARCH__)
  if constexpr (kBytes >= 16) {
    SNN_UNROLL
    for (int i = 0; i < kBytes / 4; i += 4)
      asm volatile(
          "st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(reinterpret_cast<char*>(p) + 4 * i),
          "r"(r.words[i]), "r"(r.words[i + 1]), "r"(r.words[i + 2]), "r"(r.words[i + 3])
          : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" ::"l"(p), "r"(r.words[0]), "r"(r.words[1])
                 : "memory");
  } else if constexpr (kBytes == 4) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(r.words[0]) : "memory");
  } else if constexpr (kBytes == 2) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(p), "h"(u16(r.words[0])) : "memory");
  } else {
    asm volatile("st.global.u8 [%0], %1;" ::"l"(p), "r"(r.words[0]) : "memory");
  }
#else
  __builtin_memcpy(p, &r, kBytes);
#endif
}

// ---- elements of a pack, as 32-bit words: what the compiler makes of at[i] costs more -----------

template <class X>
constexpr bool kIsBrain = false;
template <>
constexpr bool kIsBrain<bf16> = true;

template <class X, int VEC>
__device__ __forceinline__ State<X> widen_at(const Pack<X, VEC>& r, int i) {
  if constexpr (sizeof(X) >= 4) {
    return widen(r.at[i]);
  } else {
    const u32 word = r.words[i / 2];
    if constexpr (kIsBrain<X>)
      return from_bits(i % 2 ? word & 0xffff0000u : word << 16);
    else
      return widen(X{u16(i % 2 ? word >> 16 : word)});
  }
}

// Element i becomes `value` where `flag`, else 0. i ascends.
template <class B, int VEC>
__device__ __forceinline__ void put(Pack<B, VEC>& r, int i, bool flag, B value) {
  if constexpr (sizeof(B) >= 4) {
    r.at[i] = select(flag, value);
  } else {
    constexpr int kIn = 4 / sizeof(B);
    const u32 part = select(flag, u32(value) << (8 * sizeof(B) * (i % kIn)));
    r.words[i / kIn] = i % kIn ? r.words[i / kIn] | part : part;
  }
}

// All elements at once, rounded to nearest even.
template <class X, int VEC>
__device__ __forceinline__ Pack<X, VEC> narrow(const State<X>* values) {
  Pack<X, VEC> r = {};
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    if constexpr (sizeof(X) == 2 && VEC > 1) {
      if (i % 2) continue;
      if constexpr (kIsBrain<X>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
            : "=r"(r.words[i / 2])
            : "f"(values[i + 1]), "f"(values[i]));
      else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;"
            : "=r"(r.words[i / 2])
            : "f"(values[i + 1]), "f"(values[i]));
    } else
#endif
    {
      const X x = Narrow<X>::from(values[i]);
      if constexpr (sizeof(X) == 2)
        r.words[i / 2] = i % 2 ? r.words[i / 2] | u32(x.bits) << 16 : u32(x.bits);
      else
        r.at[i] = x;
    }
  }
  return r;
}

// ---- where a neuron's data lies
// ------------------------------------------------------------------

// a / b for a >= 0, b > 0. 64-bit division is a subroutine call whose saved registers spill, so the
// rare case (beyond 2^32 neurons) subtracts shifted divisors instead.
__device__ __forceinline__ i64 divide(i64 a, i64 b) {
  if (!(u64(a | b) >> 32)) return i64(u32(a) / u32(b));
  u64 rest = 0, quotient = 0;
  SNN_KEEP_LOOP
  for (int bit = 63; bit >= 0; --bit) {
    rest = rest << 1 | (u64(a) >> bit & 1);
    quotient <<= 1;
    if (rest >= u64(b)) {
      rest -= u64(b);
      quotient |= 1;
    }
  }
  return i64(quotient);
}

// A neuron's place in the rows of a call.
struct Place {
  i64 group, within;

  __device__ __forceinline__ Place(i64 n, i64 inner, i64 N) : group(0), within(n) {
    if (inner != N) {
      group = divide(n, inner);
      within = n - group * inner;
    }
  }

  __device__ __forceinline__ i64 in(const Rows& rows) const { return group * rows.outer + within; }
};

// The element of an operand's array that neuron n reads.
__device__ __forceinline__ i64 element(const Operand& o, i64 n) {
  if (o.count == 1) return 0;
  const i64 q = divide(n, o.inner);
  return q - divide(q, o.count) * o.count;
}

template <class S>
__device__ __forceinline__ S read(const Operand& o, i64 n) {
  return o.data ? static_cast<const S*>(o.data)[element(o, n)] : S(o.value);
}

template <class B>
__device__ __forceinline__ B read_bits(const Operand& o, i64 n, u64 number) {
  return o.data ? static_cast<const B*>(o.data)[element(o, n)] : B(number);
}

// Walks the elements of an Operand that VEC consecutive neurons read: two divisions at the start
// only, and no more than VEC matters of any length.
template <class T, int VEC>
struct Cursor {
  const T* at;
  const T* data;
  i32 run, runs, to_next, to_wrap;

  static __device__ __forceinline__ i32 clamp(i64 length) {
    return i32(length < VEC ? length : VEC);
  }

  __device__ __forceinline__ Cursor(const Operand& o, i64 n)
      : at(static_cast<const T*>(o.data)), data(at), run(VEC), runs(1), to_next(VEC), to_wrap(1) {
    if (!data || o.count == 1) return;
    const i64 q = divide(n, o.inner), i = q - divide(q, o.count) * o.count;
    at += i;
    run = clamp(o.inner);
    runs = clamp(o.count);
    to_next = clamp((q + 1) * o.inner - n);
    to_wrap = clamp(o.count - i);
  }

  __device__ __forceinline__ T next(T number) {
    if (!data) return number;
    const T value = *at;
    if (--to_next == 0) {
      to_next = run;
      ++at;
      if (--to_wrap == 0) {
        to_wrap = runs;
        at = data;
      }
    }
    return value;
  }
};

// One word of packed steps of each of VEC neurons, side by side as memory has them.
template <class W, int VEC>
__device__ __forceinline__ void store_side_by_side(void* words, i64 at, const u32* bits) {
  Pack<W, VEC> r = {};
  SNN_UNROLL
  for (int i = 0; i < VEC * int(sizeof(W)) / 4; ++i) r.words[i] = bits[i];
  store<W, VEC>(static_cast<W*>(words) + at, r);
}

// One word of packed steps of each of VEC neurons.
template <int VEC>
__device__ __forceinline__ void store_words(void* words, i64 at, i32 bytes, const u32* bits) {
  if (bytes == 1) {
    Pack<u8, VEC> r = {};
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i)
      r.words[i / 4] = i % 4 ? r.words[i / 4] | bits[i] << (8 * (i % 4)) : bits[i];
    store<u8, VEC>(static_cast<u8*>(words) + at, r);
  } else if (bytes == 2) {
    Pack<u16, VEC> r = {};
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) r.words[i / 2] = i % 2 ? r.words[i / 2] | bits[i] << 16 : bits[i];
    store<u16, VEC>(static_cast<u16*>(words) + at, r);
  } else {
    Pack<u32, VEC> r;
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) r.words[i] = bits[i];
    store<u32, VEC>(static_cast<u32*>(words) + at, r);
  }
}

template <int VEC>
__device__ __forceinline__ void load_words(const void* words, i64 at, i32 bytes, u32* bits) {
  if (bytes == 1) {
    const Pack<u8, VEC> r = load<u8, VEC>(static_cast<const u8*>(words) + at);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) bits[i] = r.words[i / 4] >> (8 * (i % 4)) & 0xffu;
  } else if (bytes == 2) {
    const Pack<u16, VEC> r = load<u16, VEC>(static_cast<const u16*>(words) + at);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) bits[i] = r.words[i / 2] >> (16 * (i % 2)) & 0xffffu;
  } else {
    const Pack<u32, VEC> r = load<u32, VEC>(static_cast<const u32*>(words) + at);
    SNN_UNROLL
    for (int i = 0; i < VEC; ++i) bits[i] = r.words[i];
  }
}

template <class T, int VEC>
__device__ __forceinline__ void store_all(void* p, i64 n, const T* values) {
  Pack<T, VEC> r;
  SNN_UNROLL
  for (int i = 0; i < VEC; ++i) r.at[i] = values[i];
  store<T, VEC>(static_cast<T*>(p) + n, r);
}

}  // namespace snn
