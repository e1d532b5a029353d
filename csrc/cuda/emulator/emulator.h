// SPDX-License-Identifier: Apache-2.0
// The device layer on the CPU: two blocks run side by side, each thread of a block as a fiber of its own.
//
// Threads run until they wait: at a barrier, or at an instruction of a whole warp. The order in which they resume changes from wait to wait,
// so that a missing barrier shows. Shared memory starts as NaN; asynchronous copies arrive only when they are waited for; addresses of
// 16-byte accesses are checked; threads of a warp or block that wait at different places are an error. Blocks start in a random order, and
// one that waits for a block that has not started is an error. The matrix units cut tf32 operands off to 11 significant bits, as hardware does. Not seen: races between blocks,
// and the cost of anything.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "../numbers.h"
#include "runtime.h"

#define FE_DEVICE inline
#define FE_KERNEL(threads, blocks) void
#define FE_PARAMETER const
#define FE_UNROLL

namespace fe::cuda {

using std::max;
using std::min;

namespace emulator {

struct Place {
  int thread, threads;
  unsigned block[3], blocks[3];
};
Place& place();        // of the running thread
char* block_memory();  // shared memory of the running block
size_t block_memory_size();
void wait_for_block();
void wait_for_another_block();  // returns when other blocks have had a chance to run
// Waits until all threads of the warp are here; one of them then calls `together` with the arguments of all 32 lanes.
using Together = void (*)(void* const* arguments);
void wait_for_warp(Together together, void* argument);
[[noreturn]] void fail(const char* format, ...);
void copy_later(void* to, const void* from, int bytes, int size);  // zeros behind the bytes
void commit_copies();
void finish_copies(int but);

cudaError_t run(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel);

// A launch, for who takes launches over to run the kernel by other means than fibers.
struct Handed {
  const void* kernel;
  dim3 grid;
  int threads;
  size_t shared;
  std::vector<std::string> arguments;  // their bytes
};
std::function<void(const Handed&)>& taker();  // empty: none

// fp16 as in c10, without its headers in kernels.
float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

inline void aligned(const void* address, int size = 16) {
  if (reinterpret_cast<uintptr_t>(address) % size) fail("%d-byte access at %p, which is not a multiple of %d", size, address, size);
}
inline void in_shared(const void* address, size_t bytes) {
  const char* first = block_memory();
  const char* at = static_cast<const char*>(address);
  if (at < first || at + bytes > first + block_memory_size())
    fail("access %td bytes into %zu bytes of shared memory", at - first, block_memory_size());
}
// Instructions that address global memory alone.
inline void in_global(const void* address) {
  const char* first = block_memory();
  const char* at = static_cast<const char*>(address);
  if (at >= first && at < first + block_memory_size()) fail("access to global memory at %td bytes of shared memory", at - first);
}

void multiply_tf32(void* const* arguments);
void multiply_bf16(void* const* arguments);
void multiply_f16(void* const* arguments);
void transpose_from_memory(void* const* arguments);
void transpose_registers(void* const* arguments);
void exchange(void* const* arguments);
void nothing(void* const* arguments);

struct Product {
  float* c;
  const uint32_t *a, *b;
};
struct Rows {
  uint32_t* to;
  const void* row;
};
struct Register {
  uint32_t value, result;
  int mask;
};

}  // namespace emulator

inline int thread() {
  return emulator::place().thread;
}
inline int lane() {
  return thread() % 32;
}
inline int warp() {
  return thread() / 32;
}
inline int threads() {
  return emulator::place().threads;
}
inline int block_x() {
  return int(emulator::place().block[0]);
}
inline int block_y() {
  return int(emulator::place().block[1]);
}
inline int block_z() {
  return int(emulator::place().block[2]);
}
inline int blocks_x() {
  return int(emulator::place().blocks[0]);
}
inline char* shared_memory() {
  return emulator::block_memory();
}

inline void sync_block() {
  emulator::wait_for_block();
}
inline void sync_warp() {
  emulator::wait_for_warp(emulator::nothing, nullptr);
}
inline void fence() {}
inline uint32_t atomic_add(uint32_t* address, uint32_t value) {
  const uint32_t before = *address;
  *address += value;
  return before;
}
inline uint32_t load_acquire(const uint32_t* address) {
  return *address;
}
inline void let_others_run() {
  emulator::wait_for_another_block();
}
inline void store_release(uint32_t* address, uint32_t value) {
  *address = value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float shuffle_xor(float value, int mask) {
  emulator::Register r{bits_of(value), 0, mask};
  emulator::wait_for_warp(emulator::exchange, &r);
  return float_of(r.result);
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
inline float to_float(float value) {
  return value;
}
inline float to_float(bf16 value) {
  return float_of(uint32_t(value.bits) << 16);
}
inline float to_float(f16 value) {
  return emulator::half_to_float(value.bits);
}
template <class T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float value) {
  return {emulator::float_to_half(value)};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}
inline uint32_t round_tf32(float value) {
  return bits_of(value) + (std::isfinite(value) ? 0x1000 : 0);
}
inline void opaque(float&) {}
inline void opaque(int&) {}
inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return uint32_t(uint64_t(a) * b >> 32);
}

struct alignas(16) Words {
  uint32_t w[4];
};
inline Words load_words(const void* address) {
  emulator::aligned(address);
  emulator::in_global(address);
  return *static_cast<const Words*>(address);
}
inline Words load_words_once(const void* address) {
  return load_words(address);
}
inline void store_words(void* address, Words v) {
  emulator::aligned(address);
  *static_cast<Words*>(address) = v;
}
inline Words load_shared_words(const void* address) {
  emulator::aligned(address);
  emulator::in_shared(address, 16);
  return *static_cast<const Words*>(address);
}
inline float load_shared_by_blocks(const float* address) {
  emulator::in_global(address);
  return *address;
}
template <int SIZE = 16>
void copy_async(void* shared, const void* source, int bytes) {
  emulator::aligned(shared, SIZE);
  emulator::aligned(source, SIZE);
  emulator::in_shared(shared, SIZE);
  if (bytes != 0) emulator::in_global(source);  // a copy of nothing reads nothing, wherever it points
  if (bytes < 0 || bytes > SIZE) emulator::fail("a copy of %d of %d bytes", bytes, SIZE);
  emulator::copy_later(shared, source, bytes, SIZE);
}
inline void copy_async_word(void* shared, const void* source, bool there) {
  copy_async<4>(shared, source, there ? 4 : 0);
}
inline void copy_async_commit() {
  emulator::commit_copies();
}
template <int N>
void copy_async_wait() {
  emulator::finish_copies(N);
}

inline void load_transposed_x4(uint32_t (&to)[4], const void* row) {
  emulator::aligned(row);
  emulator::in_shared(row, 16);
  emulator::Rows rows{to, row};
  emulator::wait_for_warp(emulator::transpose_from_memory, &rows);
}
inline uint32_t transpose_8x8(uint32_t value) {
  emulator::Register r{value, 0, 0};
  emulator::wait_for_warp(emulator::transpose_registers, &r);
  return r.result;
}
inline void mma_tf32(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  emulator::Product p{c, a, b};
  emulator::wait_for_warp(emulator::multiply_tf32, &p);
}
inline void mma_bf16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  emulator::Product p{c, a, b};
  emulator::wait_for_warp(emulator::multiply_bf16, &p);
}
inline void mma_f16(float (&c)[4], const uint32_t* a, const uint32_t* b) {
  emulator::Product p{c, a, b};
  emulator::wait_for_warp(emulator::multiply_f16, &p);
}

struct Launch {
  dim3 grid;
  int threads;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
};

template <class... P>
cudaError_t launch(void (*kernel)(P...), const Launch& how, const std::type_identity_t<P>&... arguments) {
  if (how.grid.x == 0 || how.grid.y == 0 || how.grid.z == 0) return cudaSuccess;
  if (const auto& take = emulator::taker()) {
    take({reinterpret_cast<const void*>(kernel),
          how.grid,
          how.threads,
          how.shared,
          {std::string(reinterpret_cast<const char*>(&arguments), sizeof arguments)...}});
    return cudaSuccess;
  }
  return emulator::run(how.grid, how.threads, how.shared, [&] { kernel(arguments...); });
}

}  // namespace fe::cuda
