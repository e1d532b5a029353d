// SPDX-License-Identifier: Apache-2.0
// Preloaded into a test's process: knows the memory that PyTorch allocates on the CPU, and keeps it while it is told to, so that no address is
// used for two things.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>

extern "C" void* __libc_memalign(size_t alignment, size_t size);
extern "C" void __libc_free(void* block);

namespace {

struct Block {
  uintptr_t start;
  size_t size;
  bool let_go;
};

constexpr size_t MOST = 1 << 16;
Block blocks[MOST];    // a hash table of addresses
uint32_t order[MOST];  // its used places, as they were taken
size_t count = 0;
bool holding = false, poisoning = false;
std::mutex lock;

size_t place_of(uintptr_t start) {
  size_t place = (start >> 6) * 0x9e3779b97f4a7c15u >> 48;
  while (blocks[place].start != 0 && blocks[place].start != start) place = (place + 1) % MOST;
  return place;
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int posix_memalign(void** out, size_t alignment, size_t size) {
  *out = __libc_memalign(alignment, size);
  if (*out == nullptr) return 12;
  const std::lock_guard<std::mutex> guard(lock);
  if (!holding) return 0;
  if (count >= MOST / 2) std::abort();
  if (poisoning) std::memset(*out, 0xff, size);
  const size_t place = place_of(reinterpret_cast<uintptr_t>(*out));
  blocks[place] = {reinterpret_cast<uintptr_t>(*out), size, false};
  order[count++] = uint32_t(place);
  return 0;
}

EXPORTED void free(void* block) {
  if (holding && block != nullptr) {
    const std::lock_guard<std::mutex> guard(lock);
    Block& known = blocks[place_of(reinterpret_cast<uintptr_t>(block))];
    if (holding && known.start != 0) {
      known.let_go = true;
      return;
    }
  }
  __libc_free(block);
}

// Begins to keep what is allocated, filled with bytes 0xff where `poison`, or ends it and lets everything go.
EXPORTED void fe_memory_hold(int on, int poison) {
  const std::lock_guard<std::mutex> guard(lock);
  holding = on, poisoning = poison;
  for (size_t i = 0; i < count; ++i) {
    Block& block = blocks[order[i]];
    if (block.let_go) __libc_free(reinterpret_cast<void*>(block.start));
    block = {};
  }
  count = 0;
}

// How many blocks there are; the start and size of each, in the order of their allocation.
EXPORTED size_t fe_memory_count() {
  return count;
}
EXPORTED uintptr_t fe_memory_start(size_t number) {
  return blocks[order[number]].start;
}
EXPORTED size_t fe_memory_size(size_t number) {
  return blocks[order[number]].size;
}
