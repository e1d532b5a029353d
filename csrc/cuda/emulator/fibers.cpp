// SPDX-License-Identifier: Apache-2.0
// Fibers, barriers and asynchronous copies of the emulator.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "emulator.h"

namespace fe::cuda {
namespace emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 1 << 20;  // variables have margins there

// AddressSanitizer has to know on which stack a thread runs: announced before a switch, confirmed after it.
void leaving(void** kept, const void* stack, size_t size) {
  __sanitizer_start_switch_fiber(kept, stack, size);
}
void arrived(void* kept, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(kept, from, size);
}
// Frames that were left for good have margins that a later function would run into.
void forget_frames(const void* stack) {
  __asan_unpoison_memory_region(stack, STACK);
}
#else
constexpr size_t STACK = 128 << 10;

void leaving(void**, const void*, size_t) {}
void arrived(void*, const void**, size_t*) {}
void forget_frames(const void*) {}
#endif
constexpr char CANARY = 0x5a;
constexpr size_t MARGIN = 256;  // bytes behind shared memory that no one may write
constexpr size_t MOST_SHARED = 99 << 10;
constexpr size_t RESIDENT = 2;           // blocks that run side by side
constexpr int PATIENCE = 64 * RESIDENT;  // turns in which every block only waits for others

enum class State { ready, at_block, at_warp, elsewhere, done };  // elsewhere: waits for another block

struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

struct Fiber {
  ucontext_t start;
  void* jump[5];
  void* kept = nullptr;  // of AddressSanitizer
  char* stack;
  bool started = false;
  State state;
  Place place;
  Together together;
  void* argument;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;
};

struct Stacks {
  char* memory = nullptr;
  size_t count = 0;

  char* of(size_t fiber) { return memory + fiber * STACK; }
  void reserve(size_t n) {
    if (n <= count) return;
    if (memory) munmap(memory, count * STACK);
    void* got = mmap(nullptr, n * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    memory = static_cast<char*>(got), count = n;
  }
  ~Stacks() {
    if (memory) munmap(memory, count * STACK);
  }
};

// A place for a block that runs: its threads and its shared memory.
struct Slot {
  std::vector<Fiber*> fibers;
  std::vector<char> storage;
  char* shared = nullptr;
};

struct Machine {
  Stacks stacks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* running = nullptr;
  ucontext_t scheduler_context;
  void* scheduler[5];
  void* kept = nullptr;  // of AddressSanitizer, with the stack of the scheduler
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  Slot slots[RESIDENT];
  char* shared = nullptr;  // of the running block
  size_t shared_size = 0;
  const std::function<void()>* kernel = nullptr;
  std::string failure;
  std::mt19937 random{0x5eed};
};

thread_local Machine machine;
thread_local std::string last_failure;

struct Failed {};

// Leaves the running fiber for the scheduler; comes back when it is resumed.
__attribute__((noinline)) void leave() {
  Fiber* fiber = machine.running;
  leaving(fiber->state == State::done ? nullptr : &fiber->kept, machine.scheduler_stack, machine.scheduler_size);
  if (__builtin_setjmp(fiber->jump) == 0) __builtin_longjmp(machine.scheduler, 1);
  arrived(machine.running->kept, nullptr, nullptr);
}

void body() {
  arrived(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
  try {
    (*machine.kernel)();
    finish_copies(0);  // they land even when no one waits
  } catch (const Failed&) {
  }
  machine.running->state = State::done;
  leave();
}

__attribute__((noinline)) void resume(Fiber* fiber) {
  machine.running = fiber;
  leaving(&machine.kept, fiber->stack, STACK);
  if (__builtin_setjmp(machine.scheduler) == 0) {
    if (fiber->started) __builtin_longjmp(fiber->jump, 1);
    fiber->started = true;
    swapcontext(&machine.scheduler_context, &fiber->start);
  }
  arrived(machine.kept, nullptr, nullptr);
}

void prepare(Fiber& fiber, size_t index, const Place& place) {
  fiber.stack = machine.stacks.of(index);
  if (fiber.started && fiber.state != State::done) forget_frames(fiber.stack);
  fiber.started = false;
  fiber.state = State::ready;
  fiber.place = place;
  fiber.groups.clear(), fiber.open.clear();
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack;
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, body, 0);
}

void note(const std::string& what) {
  if (machine.failure.empty()) machine.failure = what;
}

// Runs 32 threads until they are done or all wait at a barrier of the block.
void run_warp(Fiber* const* lanes, int count, std::vector<int>& order) {
  std::shuffle(order.begin(), order.begin() + count, machine.random);
  while (machine.failure.empty()) {
    for (int i = 0; i < count; ++i) {
      Fiber* fiber = lanes[order[i]];
      if (fiber->state == State::ready) resume(fiber);
      if (!machine.failure.empty()) return;
    }
    const Together together = lanes[0]->together;
    int at_warp = 0;
    for (int i = 0; i < count; ++i) at_warp += lanes[i]->state == State::at_warp;
    for (int i = 0; i < count; ++i)
      if (lanes[i]->state == State::elsewhere) return;
    if (at_warp == 0) return;
    if (at_warp < count) return note("some threads of a warp wait for the warp, others for the block, or have ended");
    void* arguments[32];
    for (int i = 0; i < count; ++i) {
      if (lanes[i]->together != together) return note("threads of a warp wait at different instructions");
      arguments[i] = lanes[i]->argument;
    }
    together(arguments);
    for (int i = 0; i < count; ++i) lanes[i]->state = State::ready;
  }
}

enum class Turn { advanced, waited, ended };

int count(const std::vector<Fiber*>& fibers, State state) {
  return int(std::count_if(fibers.begin(), fibers.end(), [state](const Fiber* fiber) { return fiber->state == state; }));
}

// Runs a block until its threads are done, all wait at a barrier, or one waits for another block.
Turn run_block(Slot& slot) {
  const auto& fibers = slot.fibers;
  const int threads = int(fibers.size()), before = count(fibers, State::ready);
  std::vector<int> order(threads / 32), lanes(32);
  std::iota(order.begin(), order.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  machine.shared = slot.shared;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (int w : order) {
    run_warp(fibers.data() + 32 * w, 32, lanes);
    if (!machine.failure.empty()) return Turn::ended;
  }
  if (const int waiting = count(fibers, State::elsewhere)) {
    for (Fiber* fiber : fibers)
      if (fiber->state == State::elsewhere) fiber->state = State::ready;
    return waiting < before ? Turn::advanced : Turn::waited;
  }
  const int done = count(fibers, State::done);
  if (done == threads) return Turn::ended;
  if (done) note("some threads of a block wait at a barrier, others have ended");
  for (Fiber* fiber : fibers) fiber->state = State::ready;
  return Turn::advanced;
}

void check_canary(const Slot& slot) {
  for (size_t i = 0; i < MARGIN; ++i)
    if (slot.shared[machine.shared_size + i] != CANARY) return note("a write past the end of shared memory");
}

// Threads at their beginning, shared memory as NaN.
void start(Slot& slot, size_t first_fiber, Place place) {
  slot.storage.resize(machine.shared_size + MARGIN + 128);
  slot.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(slot.storage.data()) + 127) / 128 * 128);
  std::memset(slot.shared, 0xff, machine.shared_size);  // NaN in every format
  std::memset(slot.shared + machine.shared_size, CANARY, MARGIN);
  slot.fibers.clear();
  for (place.thread = 0; place.thread < place.threads; ++place.thread) {
    Fiber* fiber = machine.fibers[first_fiber + place.thread].get();
    prepare(*fiber, first_fiber + place.thread, place);
    slot.fibers.push_back(fiber);
  }
}

}  // namespace

Place& place() {
  return machine.running->place;
}
char* block_memory() {
  return machine.shared;
}
size_t block_memory_size() {
  return machine.shared_size;
}

void wait_for_block() {
  machine.running->state = State::at_block;
  leave();
}

void wait_for_another_block() {
  machine.running->state = State::elsewhere;
  leave();
}

void wait_for_warp(Together together, void* argument) {
  machine.running->together = together;
  machine.running->argument = argument;
  machine.running->state = State::at_warp;
  leave();
}

void fail(const char* format, ...) {
  char text[256];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  const Place& p = place();
  char where[128];
  snprintf(where, sizeof where, " (thread %d of block %u, %u, %u)", p.thread, p.block[0], p.block[1], p.block[2]);
  note(std::string(text) + where);
  throw Failed();
}

void copy_later(void* to, const void* from, int bytes, int size) {
  machine.running->open.push_back({to, from, bytes, size});
}
void commit_copies() {
  Fiber& fiber = *machine.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
void finish_copies(int but) {
  auto& groups = machine.running->groups;
  while (int(groups.size()) > but) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

std::function<void(const Handed&)>& taker() {
  static auto* take = new std::function<void(const Handed&)>;  // never destroyed: Python is gone by the time static objects are
  return *take;
}

cudaError_t run(dim3 grid, int threads, size_t shared, const std::function<void()>& kernel) {
  last_failure.clear();
  if (threads % 32 || threads < 32 || threads > 1024 || shared > MOST_SHARED || grid.y > 65535 || grid.z > 65535) {
    last_failure = "no such launch: " + std::to_string(threads) + " threads, " + std::to_string(shared) + " bytes of shared memory, grid " +
                   std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z);
    return cudaErrorInvalidConfiguration;
  }
  Machine& m = machine;
  m.stacks.reserve(RESIDENT * threads);
  while (m.fibers.size() < RESIDENT * threads) m.fibers.push_back(std::make_unique<Fiber>());
  m.kernel = &kernel;
  m.failure.clear();
  m.shared_size = shared;
  std::vector<size_t> blocks(size_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  std::vector<size_t> free(RESIDENT), live;  // slots
  std::iota(free.begin(), free.end(), 0);
  int waited = 0;
  while (m.failure.empty() && (!blocks.empty() || !live.empty())) {
    for (; !blocks.empty() && !free.empty(); blocks.pop_back(), free.pop_back()) {
      const size_t block = blocks.back();
      const unsigned x = unsigned(block % grid.x), y = unsigned(block / grid.x % grid.y), z = unsigned(block / grid.x / grid.y);
      start(m.slots[free.back()], free.back() * threads, {0, threads, {x, y, z}, {grid.x, grid.y, grid.z}});
      live.push_back(free.back());
    }
    const size_t which = m.random() % live.size();
    Slot& slot = m.slots[live[which]];
    const Turn turn = run_block(slot);
    waited = turn == Turn::waited ? waited + 1 : 0;
    if (waited > PATIENCE) note("every block that runs waits for a block that has not started");
    if (turn != Turn::ended || !m.failure.empty()) continue;
    check_canary(slot);
    free.push_back(live[which]);
    live.erase(live.begin() + which);
  }
  if (m.failure.empty()) return cudaSuccess;
  last_failure = m.failure;
  return cudaErrorLaunchFailure;
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t) {
  return emulator::last_failure.c_str();
}

}  // namespace fe::cuda
