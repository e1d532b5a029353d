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

// Whether this block is the last of `count` to arrive; what the others stored before they arrived is then visible. The counter is left at 0
// for the next launch. All threads call it; `flag` is one word of shared memory.
FE_DEVICE bool last_to_arrive(uint32_t* counter, uint32_t count, uint32_t* flag) {
  fence();
  sync_block();
  if (thread() == 0) {
    const bool last = atomic_add(counter, 1) == count - 1;
    if (last) *counter = 0;
    *flag = last;
  }
  sync_block();
  const bool last = *flag;
  fence();
  sync_block();  // the flag may be written again
  return last;
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
