// SPDX-License-Identifier: Apache-2.0
// Kernels with a defect each, and the same without it: `defects NAME` prints what the emulator says of the launch, then what the kernel left.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "reduce.cuh"

using namespace fe::cuda;

namespace {

constexpr int THREADS = 128, BLOCKS = 8;

struct Params {
  float* out;  // [BLOCKS, THREADS]
  const float* in;
  int* order;  // of blocks, as they ran
  int* count;
  bool broken;
};

float* numbers() {
  return reinterpret_cast<float*>(shared_memory());
}
void leave(const Params& p, float value) {
  p.out[block_x() * THREADS + thread()] = value;
}

// Reads what another warp wrote.
void barrier(const Params p) {
  numbers()[thread()] = 1.f;
  if (!p.broken) sync_block();
  leave(p, numbers()[(thread() + 64) % THREADS]);
}
// Reads what another lane wrote.
void warp_barrier(const Params p) {
  numbers()[thread()] = 1.f;
  if (!p.broken) sync_warp();
  leave(p, numbers()[thread() ^ 7]);
}
void uninitialised(const Params p) {
  if (!p.broken) numbers()[thread()] = 1.f;
  leave(p, numbers()[thread()]);
}
void asynchronous(const Params p) {
  copy_async(numbers() + 4 * thread(), p.in + 4 * thread(), 16);
  copy_async_commit();
  if (!p.broken) copy_async_wait<0>();
  leave(p, numbers()[4 * thread() + 3]);
}
// Waits for the older of two copies and reads the younger.
void younger(const Params p) {
  for (int i = 0; i < 2; ++i) {
    copy_async(numbers() + 4 * (2 * thread() + i), p.in + 4 * thread(), 16);
    copy_async_commit();
  }
  copy_async_wait<1>();
  leave(p, numbers()[4 * (2 * thread() + p.broken)]);
}
void alignment(const Params p) {
  const Words words = load_words(p.in + 4 * thread() + (p.broken && thread() == 5));
  leave(p, float_of(words.w[0]));
}
void past_the_end(const Params p) {
  if (thread() == 0) numbers()[p.broken ? 8 * THREADS : 0] = 1.f;
  leave(p, 1.f);
}
void copy_outside(const Params p) {
  copy_async(numbers() + 4 * thread() + (p.broken ? 8 * THREADS : 0), p.in, 16);
  copy_async_commit();
  copy_async_wait<0>();
  leave(p, numbers()[4 * thread()]);
}
// Gives an instruction that reads global memory an address in shared memory.
void other_memory(const Params p) {
  numbers()[thread()] = 1.f;
  sync_block();
  leave(p, load_shared_by_blocks(p.broken ? numbers() + thread() : p.in));
}
void early_end(const Params p) {
  leave(p, 1.f);
  if (p.broken && warp() == 1) return;
  sync_block();
}
void divergence(const Params p) {
  leave(p, 1.f);
  if (p.broken && lane() < 3) return;
  shuffle_xor(1.f, 1);
}
void different_instructions(const Params p) {
  leave(p, 1.f);
  if (p.broken && lane() % 2) {
    transpose_8x8(1);
  } else {
    shuffle_xor(1.f, 1);
  }
}
// Waits for the blocks before it: by index, or by ticket those that have started.
void turns(const Params p) {
  auto *counter = reinterpret_cast<uint32_t*>(p.count), *lock = counter + 1;
  const uint32_t turn = p.broken ? block_x() : draw_ticket(counter, BLOCKS, reinterpret_cast<uint32_t*>(numbers()));
  take_turn(lock, turn);
  if (thread() == 0) p.order[*lock] = int(turn);
  pass_turn(lock, turn, BLOCKS);
  leave(p, 1.f);
}
void order_of_blocks(const Params p) {
  if (thread() == 0) p.order[(*p.count)++] = block_x();
  leave(p, 1.f);
}

const std::map<std::string, void (*)(Params)> KERNELS = {
    {"barrier", barrier},
    {"warp_barrier", warp_barrier},
    {"uninitialised", uninitialised},
    {"asynchronous", asynchronous},
    {"younger", younger},
    {"alignment", alignment},
    {"past_the_end", past_the_end},
    {"copy_outside", copy_outside},
    {"other_memory", other_memory},
    {"early_end", early_end},
    {"divergence", divergence},
    {"different_instructions", different_instructions},
    {"turns", turns},
    {"order_of_blocks", order_of_blocks},
};

// One product of whole numbers by the matrix units, with operands where the PTX manual has them (9.7.14.5), less the sum; prints the largest
// difference. `low` is added to one operand: what tf32 has no bits for.
struct ProductParams {
  float* left;   // [16, K]
  float* right;  // [K, 8]
  float* sums;   // [16, 8]
  bool halves;
};

void product(const ProductParams p) {
  const int g = lane() / 4, t = lane() % 4, k = p.halves ? 16 : 8;
  float c[4] = {};
  uint32_t a[4], b[2];
  const auto left = [&](int row, int column) { return p.left[row * k + column]; };
  const auto right = [&](int row, int column) { return p.right[row * 8 + column]; };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i % 2);
    a[i] = p.halves ? pack<bf16>(left(row, 2 * t + i / 2 * 8), left(row, 2 * t + 1 + i / 2 * 8)) : bits_of(left(row, t + i / 2 * 4));
  }
  for (int i = 0; i < 2; ++i)
    b[i] = p.halves ? pack<bf16>(right(2 * t + 8 * i, g), right(2 * t + 1 + 8 * i, g)) : bits_of(right(t + 4 * i, g));
  if (p.halves) {
    mma_bf16(c, a, b);
  } else {
    mma_tf32(c, a, b);
  }
  for (int i = 0; i < 4; ++i) p.sums[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

int multiply(bool halves, float low) {
  const int k = halves ? 16 : 8;
  std::vector<float> left(16 * k), right(k * 8), sums(16 * 8, NAN);
  for (size_t i = 0; i < left.size(); ++i) left[i] = float(int(i * 37 % 23) - 11);
  for (size_t i = 0; i < right.size(); ++i) right[i] = float(int(i * 53 % 19) - 9);
  std::vector<float> exact(16 * 8);
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column)
      for (int i = 0; i < k; ++i) exact[row * 8 + column] += left[row * k + i] * right[i * 8 + column];
  for (float& number : left) number *= 1.f + low;
  const cudaError_t status = launch(product, {dim3(1), 32}, ProductParams{left.data(), right.data(), sums.data(), halves});
  float largest = 0.f;
  for (size_t i = 0; i < sums.size(); ++i) largest = std::fmax(largest, std::isnan(sums[i]) ? INFINITY : std::fabs(sums[i] - exact[i]));
  std::printf("%s\n%g\n", status == cudaSuccess ? "fine" : cudaGetErrorString(status), largest);
  return 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string name = words[1];
  const bool broken = count > 2 && std::strcmp(words[2], "broken") == 0;
  if (name == "tf32" || name == "bf16") return multiply(name == "bf16", broken ? 0.51f / 1024 : 0.f);
  if (name == "launch") {
    const size_t shared = broken ? (99 << 10) + 16 : 99 << 10;
    float out[BLOCKS * THREADS], in[4 * THREADS + 4] = {};
    const cudaError_t status = launch(KERNELS.at("early_end"), {dim3(BLOCKS), THREADS, shared}, Params{out, in, nullptr, nullptr, false});
    std::printf("%s\n", status == cudaSuccess ? "fine" : cudaGetErrorString(status));
    return 0;
  }
  alignas(16) static float in[4 * THREADS + 4];
  for (float& number : in) number = 1.f;
  std::vector<float> out(BLOCKS * THREADS, 0.f);
  int order[BLOCKS], counts[2] = {};  // a counter and a lock
  const Launch how{dim3(BLOCKS), THREADS, 4 * 8 * THREADS};
  const cudaError_t status = launch(KERNELS.at(name), how, Params{out.data(), in, order, counts, broken});
  int wrong = 0, sorted = 1;
  for (float value : out) wrong += !(value == 1.f);
  for (int i = 1; i < BLOCKS; ++i) sorted = sorted && order[i - 1] < order[i];
  if (name == "turns") wrong += !sorted || counts[0] || counts[1];
  std::printf("%s\n%d\n", status == cudaSuccess ? "fine" : cudaGetErrorString(status), name == "order_of_blocks" ? !sorted : wrong);
  return 0;
}
