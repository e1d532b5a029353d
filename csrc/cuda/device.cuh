// SPDX-License-Identifier: Apache-2.0
// What kernels may use of the device: one name per instruction. nvcc compiles the instructions; with FE_EMULATED a C++ compiler compiles the
// same kernels against emulator/emulator.h, which runs them on the CPU.
#pragma once
#ifdef FE_EMULATED
#include "emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "numbers.h"

#define FE_DEVICE __device__ __forceinline__
#define FE_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FE_PARAMETER const __grid_constant__  // indexed in place, not copied to local memory
#define FE_UNROLL _Pragma("unroll")

namespace fe::cuda {

// ---- where a thread is
FE_DEVICE int thread() {
  return threadIdx.x;
}
FE_DEVICE int lane() {
  return threadIdx.x & 31;
}
FE_DEVICE int warp() {
  return threadIdx.x >> 5;
}
FE_DEVICE int threads() {
  return blockDim.x;
}
FE_DEVICE int block_x() {
  return blockIdx.x;
}
FE_DEVICE int block_y() {
  return blockIdx.y;
}
FE_DEVICE int block_z() {
  return blockIdx.z;
}
FE_DEVICE int blocks_x() {
  return gridDim.x;
}

// The block's shared memory; kernels lay it out themselves.
FE_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char fe_shared[];
  return fe_shared;
}

// ---- order between threads
FE_DEVICE void sync_block() {
  __syncthreads();
}
FE_DEVICE void sync_warp() {
  __syncwarp();
}
// Stores of this thread come before its next atomic, as others see it.
FE_DEVICE void fence() {
  __threadfence();
}
FE_DEVICE uint32_t atomic_add(uint32_t* address, uint32_t value) {
  return atomicAdd(address, value);
}
FE_DEVICE uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
FE_DEVICE void store_release(uint32_t* address, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
// For the time of a wait for another block.
FE_DEVICE void let_others_run() {
  __nanosleep(32);
}
FE_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- numbers
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
FE_DEVICE float to_float(float value) {
  return value;
}
FE_DEVICE float to_float(bf16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}
FE_DEVICE float to_float(f16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
template <class T>
FE_DEVICE T from_float(float value);
template <>
FE_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
FE_DEVICE bf16 from_float<bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
FE_DEVICE f16 from_float<f16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
FE_DEVICE uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
FE_DEVICE float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}
// Two numbers in one register, the first in the low half.
template <class T>
FE_DEVICE uint32_t pack(float low, float high);
template <>
FE_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
FE_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
// The nearest tf32 number, ties away from zero, once the matrix units have cut off the 13 bits that tf32 lacks.
FE_DEVICE uint32_t round_tf32(float value) {
  uint32_t word = __float_as_uint(value);
  asm("{\n.reg .pred finite;\nsetp.lt.f32 finite, %1, 0f7F800000;\n@finite add.u32 %0, %0, 0x1000;\n}" : "+r"(word) : "f"(fabsf(value)));
  return word;
}
// The compiler takes the number for another one: it neither computes it again nor computes anything from it ahead of time.
FE_DEVICE void opaque(float& value) {
  asm volatile("" : "+f"(value));
}
FE_DEVICE void opaque(int& value) {
  asm volatile("" : "+r"(value));
}
// High 32 bits of the unsigned product.
FE_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return __umulhi(a, b);
}

// ---- memory
struct alignas(16) Words {  // one 16-byte access
  uint32_t w[4];
};
FE_DEVICE Words words_of(uint4 v) {
  return {{v.x, v.y, v.z, v.w}};
}
// 16 bytes of memory that no one writes during the launch.
FE_DEVICE Words load_words(const void* address) {
  return words_of(__ldg(static_cast<const uint4*>(address)));
}
// The same, read once: does not displace what is read again.
FE_DEVICE Words load_words_once(const void* address) {
  return words_of(__ldcs(static_cast<const uint4*>(address)));
}
FE_DEVICE void store_words(void* address, Words v) {
  *static_cast<uint4*>(address) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
// 16 bytes of the block's shared memory.
FE_DEVICE Words load_shared_words(const void* address) {
  return words_of(*static_cast<const uint4*>(address));
}
// Past the first-level cache, which does not see what other multiprocessors write.
FE_DEVICE float load_shared_by_blocks(const float* address) {
  return __ldcg(address);
}
FE_DEVICE uint32_t shared_address(const void* address) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(address));
}
// Starts a copy of 16 bytes to shared memory, of which the first `bytes` come from `source` and the others are zero.
FE_DEVICE void copy_async(void* shared, const void* source, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(bytes) : "memory");
}
// The same for 4 bytes, or zeros where there are none.
FE_DEVICE void copy_async_word(void* shared, const void* source, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(source), "r"(there ? 4 : 0) : "memory");
}
FE_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most N of this thread's committed groups are under way.
template <int N>
FE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- matrix units; layouts in fragments.cuh
// Four 8 x 8 matrices of 16-bit numbers, transposed; lane i gives the address of row i % 8 of matrix i / 8.
FE_DEVICE void load_transposed_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}
// An 8 x 8 matrix of 16-bit numbers spread over the warp (lane 4 i + j holds row i, columns 2 j and 2 j + 1), transposed.
FE_DEVICE uint32_t transpose_8x8(uint32_t value) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(value));
  return to;
}
FE_DEVICE void mma_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FE_DEVICE void mma_bf16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FE_DEVICE void mma_f16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- launches
struct Launch {
  dim3 grid;
  int threads;
  size_t shared = 0;  // bytes
  cudaStream_t stream = nullptr;
};

constexpr size_t SHARED_WITHOUT_ASKING = 48 << 10;

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), const Launch& how, const A&... arguments) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;
  if (how.shared > SHARED_WITHOUT_ASKING) {
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(how.shared));
    if (status != cudaSuccess) return status;
  }
  kernel<<<how.grid, how.threads, how.shared, how.stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace fe::cuda
#endif

namespace fe::cuda {

FE_DEVICE float load_number(const void* data, Dtype dtype, int64_t index) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<const float*>(data)[index];
    case Dtype::bf16:
      return to_float(static_cast<const bf16*>(data)[index]);
    default:
      return to_float(static_cast<const f16*>(data)[index]);
  }
}

FE_DEVICE void store_number(void* data, Dtype dtype, int64_t index, float value) {
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(data)[index] = value;
      return;
    case Dtype::bf16:
      static_cast<bf16*>(data)[index] = from_float<bf16>(value);
      return;
    default:
      static_cast<f16*>(data)[index] = from_float<f16>(value);
  }
}

// Two neighbours in one access of 8 bytes.
struct alignas(8) Pair {
  float low, high;
};
FE_DEVICE Pair load_pair(const float* address) {
  return *reinterpret_cast<const Pair*>(address);
}
FE_DEVICE void store_pair(float* address, float low, float high) {
  *reinterpret_cast<Pair*>(address) = {low, high};
}

// The 4 or 8 numbers of a 16-byte access, as floats.
template <class T>
struct Wide {
  static constexpr int COUNT = 16 / sizeof(T);
};
FE_DEVICE void unpack(Words v, float (&to)[4], float) {
  FE_UNROLL for (int i = 0; i < 4; ++i) to[i] = float_of(v.w[i]);
}
FE_DEVICE void unpack(Words v, float (&to)[8], bf16) {
  FE_UNROLL for (int i = 0; i < 4; ++i) {
    to[2 * i] = float_of(v.w[i] << 16);
    to[2 * i + 1] = float_of(v.w[i] & 0xffff0000u);
  }
}
FE_DEVICE void unpack(Words v, float (&to)[8], f16) {
  FE_UNROLL for (int i = 0; i < 4; ++i) {
    to[2 * i] = to_float(f16{uint16_t(v.w[i])});
    to[2 * i + 1] = to_float(f16{uint16_t(v.w[i] >> 16)});
  }
}

// Consecutive numbers as words of memory: one per word, or two of 16 bits.
template <class T, int N>
FE_DEVICE void to_words(const float (&v)[N], uint32_t* words) {
  if constexpr (sizeof(T) == 4) {
    FE_UNROLL for (int i = 0; i < N; ++i) words[i] = bits_of(v[i]);
  } else {
    FE_UNROLL for (int i = 0; i < N / 2; ++i) words[i] = pack<T>(v[2 * i], v[2 * i + 1]);
  }
}
template <class T>
FE_DEVICE Words unit_of(const float (&v)[Wide<T>::COUNT]) {
  Words unit;
  to_words<T>(v, unit.w);
  return unit;
}

}  // namespace fe::cuda
