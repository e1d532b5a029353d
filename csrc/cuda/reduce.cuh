// SPDX-License-Identifier: Apache-2.0
// Sums in a fixed order, and finding the last of several blocks.
#pragma once
#include "device.cuh"

namespace fe::cuda {

// Sum over the block, the same bits in every thread; `scratch` holds 32 floats of shared memory. All threads call it.
FE_DEVICE float block_sum(float value, float* scratch) {
  FE_UNROLL for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane() == 0) scratch[warp()] = value;
  sync_block();
  float total = 0.f;
  for (int i = 0; i < threads() / 32; ++i) total += scratch[i];
  sync_block();
  return total;
}

// Where a block says that it is done, and how many do; a null counter: nowhere.
struct Arrival {
  uint32_t* counter;
  int count;
};

// Whether this block is the last to arrive at each counter; what the others stored before they arrived is then visible. Counters are left at
// 0 for the next launch. All threads call it; `flags`: N words of shared memory. The counters are reached at the same time, by a thread each.
template <int N>
FE_DEVICE void last_to_arrive(const Arrival (&arrivals)[N], bool (&last)[N], uint32_t* flags) {
  fence();
  sync_block();
  if (thread() < N) {
    Arrival own = arrivals[0];
    FE_UNROLL for (int i = 1; i < N; ++i) {
      if (thread() == i) own = arrivals[i];
    }
    const bool is_last = own.counter != nullptr && atomic_add(own.counter, 1) == uint32_t(own.count) - 1;
    if (is_last) *own.counter = 0;
    flags[thread()] = is_last;
  }
  sync_block();
  FE_UNROLL for (int i = 0; i < N; ++i) last[i] = flags[i];
  fence();
  sync_block();  // the flags may be written again
}
FE_DEVICE bool last_to_arrive(uint32_t* counter, int count, uint32_t* flag) {
  const Arrival arrivals[1] = {{counter, count}};
  bool last[1];
  last_to_arrive(arrivals, last, flag);
  return last[0];
}

// How many of `count` blocks have started before this one. A device starts blocks in any order: one that waits for others may wait only for
// lower tickets, whose blocks run. The counter is left at 0 for the next launch. All threads call it; `word` is one word of shared memory.
FE_DEVICE uint32_t draw_ticket(uint32_t* counter, uint32_t count, uint32_t* word) {
  if (thread() == 0) {
    *word = atomic_add(counter, 1);
    if (*word == count - 1) *counter = 0;
  }
  sync_block();
  const uint32_t ticket = *word;
  sync_block();  // the word may be written again
  return ticket;
}

// Waits until `turn` blocks have called `pass_turn` on the lock: `count` blocks add to the same memory in the order of their turns. Blocks of
// earlier turns have lower tickets. The lock is left at 0 for the next launch.
FE_DEVICE void take_turn(const uint32_t* lock, uint32_t turn) {
  if (thread() == 0)
    while (load_acquire(lock) != turn) let_others_run();
  sync_block();
}
FE_DEVICE void pass_turn(uint32_t* lock, uint32_t turn, uint32_t count) {
  fence();
  sync_block();
  if (thread() == 0) store_release(lock, turn + 1 == count ? 0 : turn + 1);
}

}  // namespace fe::cuda
