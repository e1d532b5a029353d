// SPDX-License-Identifier: Apache-2.0
// The machine: a grid of blocks of warps of 32 lanes that execute a Program, one instruction of one warp at a time, in
// an order chosen at random, with every access to memory checked.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "order.h"
#include "program.h"

namespace ptx {

inline constexpr uint64_t kSharedWindow = uint64_t{1} << 60, kParamWindow = uint64_t{2} << 60;
inline constexpr int kLanes = 32, kSector = 32, kBanks = 32;

template <class F>
inline void for_lanes(uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// A named piece of memory with its history.
struct Region {
  std::string name;
  uint64_t base = 0, size = 0;
  uint8_t* data = nullptr;
  std::vector<Cell> cells;
  std::vector<std::vector<Access>> pool;
  std::vector<int32_t> spare;
  std::vector<bool> touched;  // sectors, for the bytes from DRAM
  bool contains(uint64_t address, uint64_t bytes) const { return address >= base && address + bytes <= base + size; }
  bool initialised(uint64_t address, uint64_t bytes) const {
    bool all = true;
    for (uint64_t c = (address - base) / 2; c <= (address - base + bytes - 1) / 2; ++c) all = all && cells[c].initialised;
    return all;
  }
  void forget(uint64_t address, uint64_t bytes) {
    for (uint64_t c = (address - base) / 2; c <= (address - base + bytes - 1) / 2; ++c) cells[c].initialised = false;
  }
};

struct Finding {
  std::string kind, detail;
  int instruction = 0, count = 0;
};

struct Cost {  // of one instruction, over all warps
  uint64_t executed = 0, lanes = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;  // of shared memory
  uint64_t sectors = 0, fresh_sectors = 0;        // of global memory: asked for, and for the first time in this launch
};

// The fields of a CUtensorMap that tiled copies use.
struct TensorMap {
  uint64_t base = 0;
  std::vector<uint64_t> extents, strides;  // innermost first; strides in bytes, of the dimensions after the first
  std::vector<uint32_t> box;
  int element = 0, swizzle = 0;  // bytes; rows of 32, 64 or 128 bytes that are swizzled, or 0
  bool nan_fill = false;
};

struct Scoped {  // by how far it reaches
  View in_block, everywhere;
};

struct Synchronised {  // what a location that is accessed by atomics and ordered accesses passes on
  View everywhere;
  std::map<uint32_t, View> in_block;
};

struct Barrier {  // mbarrier
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  View arriving, done;
};

struct CopyGroup {
  struct Copy {
    uint64_t to;
    int bytes, lane;
    std::array<uint8_t, 16> data;
  };
  std::vector<Copy> copies;
};

struct BulkCopy {
  uint64_t barrier, to;
  int swizzle, instruction;
  std::vector<uint8_t> bytes;  // of the tile, row after row
};

struct Product {               // a warp-group product in flight, as one warp sees it
  std::vector<int> registers;  // the accumulators, then those of A
  size_t accumulators = 0;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;  // of shared memory that it reads
  uint32_t group = 0;
  int n = 0;
};

struct Block;
struct Warp {
  Block* block = nullptr;
  int index = 0;       // in the block
  uint32_t agent = 0;  // in the grid
  uint32_t live = 0;
  std::array<int, kLanes> pc{};
  bool converged = true;
  std::vector<uint64_t> values;      // register * 32 + lane
  std::vector<uint32_t> written;     // lanes, by register
  std::vector<uint32_t> generic_at;  // by register: serial of its last ordinary write
  std::vector<uint8_t> in_flight;    // by register: products that use it
  uint32_t serial = 1, fenced = 0;   // of ordinary writes, and of the last wgmma.fence
  uint32_t clock = 1, synced = 1;
  View view;
  std::vector<std::pair<uint32_t, View>> acquired;  // by lanes, until all of the warp synchronise
  std::array<Scoped, kLanes> before_fence;          // of relaxed reads: become acquired by a fence
  std::array<Scoped, kLanes> fences;                // what relaxed writes of a lane publish since its last fences
  std::array<CopyGroup, kLanes> open_copies;
  std::array<std::deque<CopyGroup>, kLanes> copies;
  std::deque<Product> products;
  uint32_t open_group = 0;  // of products
  int waiting = -1;         // number of a block barrier
  bool at_product = false;  // waits for the other warps of its group
};

struct Block {
  uint32_t index = 0;
  std::array<uint32_t, 3> at{};
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<uint8_t> storage;
  Region shared;
  std::map<uint64_t, Barrier> barriers;
  std::vector<BulkCopy> bulk;
  uint32_t engine = 0, engine_clock = 0;
  std::map<int, std::pair<int, View>> arrived;  // at block barriers without waiting: warps and what they published
  int alive = 0;
};

struct Launch {
  std::array<uint32_t, 3> grid{1, 1, 1};
  int threads = 32, shared = 0, resident = 8;
  std::vector<uint8_t> parameters;
  std::vector<TensorMap> maps;
  uint64_t seed = 0, limit = 200'000'000;
  bool shuffled = true;  // blocks start in any order
};

struct Result {
  std::vector<Finding> findings;
  std::vector<Cost> costs;
  uint64_t steps = 0;
};

class Machine {
 public:
  void add(uint64_t address, uint64_t size, const std::string& name, bool initialised);
  void initialise(uint64_t address, uint64_t size);
  Result run(const Program& program, const Launch& launch);

 private:
  struct Stop {};  // a finding after which nothing sensible follows

  // machine.cpp: blocks and warps
  void start(uint32_t index);
  bool step(Warp& w);
  bool choose(Warp& w, uint32_t& mask, int& pc);
  void advance(Warp& w, uint32_t mask, int pc);
  void retire(Warp& w, uint32_t mask);
  bool runnable(const Warp& w) const { return w.live && w.waiting < 0; }
  void try_release(Block& b, int barrier);
  std::string where(const Warp& w, int lane) const;
  void note(const std::string& kind, const std::string& detail, int instruction = -1);

  // execute.cpp: one instruction
  void execute(Warp& w, const Instruction& i, uint32_t mask, int pc);
  uint64_t operand(Warp& w, const Operand& o, int lane, int bits);
  uint64_t special(const Warp& w, int which, int lane) const;
  void set(Warp& w, const Operand& o, int lane, uint64_t value);
  bool predicate(Warp& w, const Operand& o, int lane);
  void touch(Warp& w, int reg);
  template <class F>
  void each(uint32_t mask, F&& f) {  // f(lane), with nothing undefined read yet
    for_lanes(mask, [&](int lane) {
      undefined_ = false;
      f(lane);
    });
  }
  void must_be_defined(const Warp& w, int lane, const char* what);
  void move(Warp& w, const Instruction& i, uint32_t mask);
  void compare(Warp& w, const Instruction& i, uint32_t mask);
  void check_members(Warp& w, const Instruction& i, uint32_t mask);
  void shuffle(Warp& w, const Instruction& i, uint32_t mask);
  void vote(Warp& w, const Instruction& i, uint32_t mask);
  void branch(Warp& w, const Instruction& i, uint32_t mask, int pc);

  // access.cpp: memory
  uint64_t address(Warp& w, const Operand& o, int lane);
  Region* find(uint64_t address, uint64_t bytes);
  bool resolve(Warp& w, Space& space, uint64_t& address, uint64_t bytes, int lane, Region*& region, const char* what,
               uint64_t alignment = 0);
  bool ordered(const Access& before, const Access& now, const Warp& w, bool data) const;
  bool check_read(Warp& w, Region& r, uint64_t address, uint64_t bytes, const Access& now);
  void check_write(Warp& w, Region& r, uint64_t address, uint64_t bytes, const Access& now, const uint8_t* value, bool idempotent = true,
                   bool defined = true);
  void reads_again(Access& known, const Access& now, const Warp& w) const;
  void conflict(const char* what, const Access& before, const Access& now, const Region& r, uint64_t address);
  void load(Warp& w, const Instruction& i, uint32_t mask);
  void store(Warp& w, const Instruction& i, uint32_t mask);
  void atomic(Warp& w, const Instruction& i, uint32_t mask);
  View published(const Warp& w, int lane, uint32_t lanes) const;
  void acquire(Warp& w, uint32_t lanes, const View& view);
  void pass_on(Warp& w, uint64_t address, Order order, Scope scope, int lane, bool writes, bool reads, bool replaces);
  void fence(Warp& w, const Instruction& i, uint32_t mask);
  void proxy_fence(Warp& w, uint32_t mask);
  void synchronise(Warp& w);
  void count_shared(const std::array<uint64_t, kLanes>& at, uint32_t mask, int bytes);
  void count_global(const std::array<uint64_t, kLanes>& at, uint32_t mask, int bytes);
  uint8_t* shared_bytes(Warp& w, uint64_t address, int bytes, int lane, const char* what);

  // copies.cpp: asynchronous copies and their barriers
  void copy(Warp& w, const Instruction& i, uint32_t mask);
  void copy_wait(Warp& w, const Instruction& i, uint32_t mask);
  void bulk_tensor(Warp& w, const Instruction& i, uint32_t mask);
  bool land(Block& b);
  void mbarrier(Warp& w, const Instruction& i, uint32_t mask);
  void complete(Barrier& barrier);

  // matrix.cpp
  void ldmatrix(Warp& w, const Instruction& i);
  void stmatrix(Warp& w, const Instruction& i);
  void movmatrix(Warp& w, const Instruction& i);
  void mma(Warp& w, const Instruction& i);
  void wgmma(Block& b, int group, const Instruction& i);
  void wgmma_wait(Warp& w, const Instruction& i);
  void wgmma_register(Warp& w, int reg, bool accumulates, const Instruction& i);
  void over(Warp& w, Region& r, uint64_t address, uint64_t bytes, uint32_t clock);

  const Program* program_ = nullptr;
  const Launch* launch_ = nullptr;
  std::map<uint64_t, std::unique_ptr<Region>> regions_;  // by their ends
  std::unordered_map<uint64_t, Synchronised> synchronised_;
  View fences_in_order_;  // what the sc fences of the launch so far pass on
  std::map<std::pair<std::string, int>, Finding> findings_;
  std::vector<Cost> costs_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::mt19937_64 random_;
  uint32_t agents_ = 0, warps_per_block_ = 0, n_blocks_ = 0;
  int pc_ = 0;
  bool undefined_ = false;  // the lane's operands so far include something never written
  Region* last_ = nullptr;
};

}  // namespace ptx
