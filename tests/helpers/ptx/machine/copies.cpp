// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies: cp.async of a lane, bulk copies of tensor tiles, and the barriers (mbarrier) that these complete.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace ptx {

// ---- cp.async: a copy may land at any time before its wait. Memory holds NaN until then.

void Machine::copy(Warp& w, const Instruction& i, uint32_t mask) {
  const int size = static_cast<int>(i.operands.at(2).value);
  if (size != 4 && size != 8 && size != 16) throw Unsupported(i.text);
  std::array<uint64_t, kLanes> to_lane{}, from_lane{};
  uint32_t written = 0, read = 0;
  each(mask, [&](int lane) {
    uint64_t bytes = size;
    if (i.operands.size() > 3) {
      const Operand& last = i.operands[3];
      const bool ignored = last.kind == Kind::reg && program_->widths[last.reg] == 1;  // a predicate: whether to write zeros
      bytes = !ignored ? operand(w, last, lane, 32) : predicate(w, last, lane) ? 0 : size;
      must_be_defined(w, lane, "size of a copy");
    }
    if (bytes > static_cast<uint64_t>(size)) {
      note("out of bounds", where(w, lane) + "cp.async of " + std::to_string(bytes) + " of " + std::to_string(size) + " bytes");
      return;
    }
    uint64_t to = address(w, i.operands[0], lane), from = address(w, i.operands[1], lane);
    Region *target = nullptr, *source = nullptr;
    Space shared = Space::shared, global = Space::global;
    if (!resolve(w, shared, to, size, lane, target, "cp.async")) return;
    CopyGroup::Copy pending{to, size, lane, {}};
    if (bytes) {
      if (!resolve(w, global, from, bytes, lane, source, "cp.async", size)) return;
      undefined_ = !check_read(w, *source, from, bytes, Access{w.agent, w.clock, static_cast<uint8_t>(lane), Strength::weak, false});
      must_be_defined(w, lane, "source of a copy");
      std::memcpy(pending.data.data(), source->data + (from - source->base), bytes);
      from_lane[lane] = from, read |= 1u << lane;
    }
    check_write(w, *target, to, size, Access{w.agent, kPending, static_cast<uint8_t>(lane), Strength::weak, false}, nullptr);
    std::memset(target->data + to, 0xff, size);
    w.open_copies[lane].copies.push_back(pending);
    to_lane[lane] = to, written |= 1u << lane;
  });
  if (written) count_shared(to_lane, written, size);
  if (read) count_global(from_lane, read, size);
}

void Machine::copy_wait(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int lane) {
    size_t keep = 0;
    if (i.modifier == "all") {
      w.copies[lane].push_back(std::move(w.open_copies[lane]));
      w.open_copies[lane] = CopyGroup{};
    } else {
      keep = i.operands.at(0).value;
    }
    while (w.copies[lane].size() > keep) {
      for (const auto& c : w.copies[lane].front().copies) {
        Region& shared = w.block->shared;
        std::memcpy(shared.data + c.to, c.data.data(), c.bytes);
        for (uint64_t cell = c.to / 2; cell < (c.to + c.bytes) / 2; ++cell) {
          Access& writer = shared.cells[cell].writer;
          if (writer.agent == w.agent && writer.clock == kPending && writer.lane == lane) writer.clock = w.clock;
        }
      }
      w.copies[lane].pop_front();
    }
  });
}

// ---- tiles by the copy engine

void Machine::bulk_tensor(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int lane) {
    Block& b = *w.block;
    uint64_t to = address(w, i.operands.at(0), lane) & 0xffffffff;
    const Operand& source = i.operands.at(1);
    uint64_t at = address(w, source, lane);
    uint64_t number = 0;
    if (at < kParamWindow || at - kParamWindow + 128 > launch_->parameters.size() || at % 64) {
      note("out of bounds", where(w, lane) + "tensor map outside of the parameters or misaligned");
      throw Stop{};
    }
    std::memcpy(&number, launch_->parameters.data() + (at - kParamWindow), 8);
    if (number >= launch_->maps.size()) throw Unsupported("a tensor map that is not one of the launch's");
    const TensorMap& map = launch_->maps[number];
    const int rank = static_cast<int>(map.extents.size());
    if (static_cast<int>(source.parts.size()) != rank) throw Unsupported("coordinates of a tensor of other dimensions: " + i.text);
    std::vector<int64_t> corner;
    for (int d = 0; d < rank; ++d) corner.push_back(sign_extended(operand(w, source.parts.at(d), lane, 32), 32));
    must_be_defined(w, lane, "coordinates of a copy");
    uint64_t barrier = address(w, i.operands.at(2), lane) & 0xffffffff;
    if (!b.barriers.count(barrier)) {
      note("mbarrier", where(w, lane) + "a copy completes an mbarrier that was not initialised");
      throw Stop{};
    }
    const uint64_t row_bytes = uint64_t{map.box[0]} * map.element;
    uint64_t rows = 1;
    for (int d = 1; d < rank; ++d) rows *= map.box[d];
    const uint64_t alignment = map.swizzle ? uint64_t{8} * map.swizzle : 128;
    if (map.swizzle && row_bytes < static_cast<uint64_t>(map.swizzle)) throw Unsupported("a box narrower than its swizzle: " + i.text);
    if (to % alignment || row_bytes % 16 || (map.swizzle && row_bytes > static_cast<uint64_t>(map.swizzle)) || map.base % 16) {
      note("misaligned", where(w, lane) + "tile copied to shared memory at " + std::to_string(to));
      throw Stop{};
    }
    if (to + rows * row_bytes > b.shared.size) {
      note("out of bounds", where(w, lane) + "tile of " + std::to_string(rows * row_bytes) + " bytes copied to " + std::to_string(to) +
                                " of " + std::to_string(b.shared.size));
      throw Stop{};
    }
    BulkCopy copy{barrier, to, map.swizzle, pc_, std::vector<uint8_t>(rows * row_bytes)};
    check_read(w, b.shared, barrier, 8, Access{w.agent, w.clock, static_cast<uint8_t>(lane), Strength::in_block, false});
    check_write(w, b.shared, to, rows * row_bytes, Access{b.engine, kPending, static_cast<uint8_t>(lane), Strength::weak, true}, nullptr);
    std::memset(b.shared.data + to, 0xff, rows * row_bytes);
    costs_[pc_].wavefronts += rows * row_bytes / 128;
    costs_[pc_].ideal_wavefronts += rows * row_bytes / 128;
    for (uint64_t row = 0; row < rows; ++row) {
      uint64_t rest = row, from = map.base;
      bool inside = true;
      for (int d = 1; d < rank; ++d) {
        int64_t index = corner[d] + static_cast<int64_t>(rest % map.box[d]);
        rest /= map.box[d];
        inside = inside && index >= 0 && index < static_cast<int64_t>(map.extents[d]);
        from += static_cast<uint64_t>(index) * map.strides[d - 1];
      }
      int64_t first = std::max<int64_t>(0, -corner[0]);
      int64_t last = std::min<int64_t>(map.box[0], static_cast<int64_t>(map.extents[0]) - corner[0]);
      if (inside && first < last) {
        uint64_t start = from + static_cast<uint64_t>(corner[0] + first) * map.element,
                 count = static_cast<uint64_t>(last - first) * map.element;
        Region* region = find(start, count);
        if (!region) {
          note("out of bounds", where(w, lane) + "tensor map leads outside every tensor");
          throw Stop{};
        }
        undefined_ = !check_read(w, *region, start, count, Access{w.agent, w.clock, static_cast<uint8_t>(lane), Strength::weak, true});
        must_be_defined(w, lane, "source of a copy");
        std::memcpy(copy.bytes.data() + row * row_bytes + first * map.element, region->data + (start - region->base), count);
        for (uint64_t s = start / kSector; s <= (start + count - 1) / kSector; ++s) {
          ++costs_[pc_].sectors;
          uint64_t local = s - region->base / kSector;
          if (!region->touched[local]) region->touched[local] = true, ++costs_[pc_].fresh_sectors;
        }
      }
    }
    b.bulk.push_back(std::move(copy));
  });
}

// One of the block's copies in flight arrives, any of them.
bool Machine::land(Block& b) {
  if (b.bulk.empty()) return false;
  size_t which = random_() % b.bulk.size();
  BulkCopy copy = std::move(b.bulk[which]);
  b.bulk.erase(b.bulk.begin() + which);
  ++b.engine_clock;
  for (uint64_t at = copy.to; at < copy.to + copy.bytes.size(); at += 16) {
    // Pieces of 16 bytes change places within their 128 bytes, by higher bits of the address.
    uint64_t place = copy.swizzle ? at ^ ((at >> 7 & (copy.swizzle / 16 - 1)) << 4) : at;
    std::memcpy(b.shared.data + place, copy.bytes.data() + (at - copy.to), 16);
    for (uint64_t cell = at / 2; cell < (at + 16) / 2; ++cell) {
      Access& writer = b.shared.cells[cell].writer;
      if (writer.agent == b.engine && writer.clock == kPending) writer.clock = b.engine_clock;
    }
  }
  auto found = b.barriers.find(copy.barrier);
  pc_ = copy.instruction;
  if (found == b.barriers.end()) {
    note("mbarrier", "block " + std::to_string(b.index) + ": a copy completes an mbarrier that was invalidated");
    return true;
  }
  Barrier& barrier = found->second;
  View mine;
  mine.seen.ticks.resize(agents_);
  mine.seen.ticks[b.engine].all = b.engine_clock + 1;
  barrier.arriving.join(mine);
  barrier.bytes -= static_cast<int64_t>(copy.bytes.size());
  complete(barrier);
  return true;
}

// ---- mbarrier

void Machine::complete(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  barrier.done.join(barrier.arriving);
  barrier.arriving = View{};
}

void Machine::mbarrier(Warp& w, const Instruction& i, uint32_t mask) {
  Block& b = *w.block;
  const size_t which = i.operands.at(0).kind == Kind::address ? 0 : 1;
  uint32_t passed = 0;
  View got;
  each(mask, [&](int lane) {
    uint64_t at = address(w, i.operands.at(which), lane);
    Space space = Space::shared;
    Region* region = nullptr;
    if (!resolve(w, space, at, 8, lane, region, "mbarrier")) throw Stop{};
    Access weak{w.agent, w.clock, static_cast<uint8_t>(lane), Strength::weak, false}, strong = weak;
    strong.strong = Strength::in_block;
    if (i.op == Op::mbarrier_init) {
      check_write(w, *region, at, 8, weak, nullptr);
      std::memset(region->data + at, 0, 8);
      if (b.barriers.count(at)) note("mbarrier", where(w, lane) + "initialised twice without being invalidated");
      Barrier barrier;
      barrier.expected = barrier.pending = static_cast<uint32_t>(operand(w, i.operands.at(1), lane, 32));
      must_be_defined(w, lane, "count of an mbarrier");
      if (barrier.expected == 0) note("mbarrier", where(w, lane) + "initialised with a count of 0");
      b.barriers[at] = barrier;
      return;
    }
    auto found = b.barriers.find(at);
    if (found == b.barriers.end()) {
      note("mbarrier", where(w, lane) + "used without being initialised");
      throw Stop{};
    }
    Barrier& barrier = found->second;
    if (i.op == Op::mbarrier_inval) {
      check_write(w, *region, at, 8, weak, nullptr);
      for (const auto& copy : b.bulk)
        if (copy.barrier == at) note("mbarrier", where(w, lane) + "invalidated while a copy is to complete it");
      b.barriers.erase(found);
      return;
    }
    check_read(w, *region, at, 8, strong);
    if (i.op == Op::mbarrier_arrive) {
      const uint64_t number = i.operands.size() > which + 1 ? operand(w, i.operands[which + 1], lane, 32) : 1;
      must_be_defined(w, lane, "count of an arrival");
      if (i.modifier == "expect_tx") barrier.bytes += static_cast<int64_t>(number);
      const auto count = static_cast<uint32_t>(i.modifier == "expect_tx" ? 1 : number);
      if (count > barrier.pending) {
        note("mbarrier", where(w, lane) + "more arrivals than its count in one phase");
        throw Stop{};
      }
      barrier.pending -= count;
      barrier.arriving.join(published(w, lane, 1u << lane));
      complete(barrier);
      return;
    }
    uint64_t parity = operand(w, i.operands.at(2), lane, 32) & 1;
    must_be_defined(w, lane, "parity");
    bool done = (barrier.phase & 1) != parity;
    set(w, i.operands[0], lane, done);
    if (done) {
      passed |= 1u << lane;
      got.join(barrier.done);
    }
  });
  if (i.op == Op::mbarrier_arrive) ++w.clock;
  if (passed) acquire(w, passed, got);
}

}  // namespace ptx
