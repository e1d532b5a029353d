// SPDX-License-Identifier: Apache-2.0
// Memory: bounds, alignment, what was never written, and the order of accesses.
#include <algorithm>
#include <cstdio>
#include <sstream>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace ptx {

void Machine::add(uint64_t address, uint64_t size, const std::string& name, bool initialised) {
  auto region = std::make_unique<Region>();
  uint64_t base = address, end = address + size;
  // Overlapping tensors, such as views of one, are one region: accesses through one meet those through another.
  std::vector<std::unique_ptr<Region>> parts;
  for (auto next = regions_.upper_bound(address); next != regions_.end() && next->second->base < end;) {
    base = std::min(base, next->second->base);
    end = std::max(end, next->first);
    parts.push_back(std::move(next->second));
    next = regions_.erase(next);
  }
  region->name = parts.empty() ? name : parts[0]->name;
  region->base = base;
  region->size = end - base;
  region->data = reinterpret_cast<uint8_t*>(base);
  region->cells.resize((region->size + 1) / 2 + 1);
  region->touched.resize(region->size / kSector + 2);
  for (uint64_t c = (address - base) / 2; c < (address - base + size + 1) / 2; ++c) region->cells[c].initialised = initialised;
  for (const auto& part : parts)  // what was known already stays as it is
    for (uint64_t c = 0; 2 * c < part->size; ++c) region->cells[(part->base - base) / 2 + c].initialised = part->cells[c].initialised;
  regions_[end] = std::move(region);
  last_ = nullptr;
}

void Machine::initialise(uint64_t address, uint64_t size) {
  if (Region* region = find(address, size))
    for (uint64_t c = (address - region->base) / 2; c <= (address - region->base + size - 1) / 2; ++c) region->cells[c].initialised = true;
}

Region* Machine::find(uint64_t address, uint64_t bytes) {
  if (last_ && last_->contains(address, bytes)) return last_;
  auto found = regions_.lower_bound(address + bytes);  // the first that ends there or later
  if (found == regions_.end() || !found->second->contains(address, bytes)) return nullptr;
  return last_ = found->second.get();
}

uint64_t Machine::address(Warp& w, const Operand& o, int lane) {
  if (o.reg < 0) return o.value;
  const bool before = undefined_;
  undefined_ = false;
  uint64_t base = operand(w, Operand{Kind::reg, false, o.reg, 0, {}}, lane, program_->widths[o.reg]);
  must_be_defined(w, lane, "address");
  undefined_ = before;
  return base + o.value;
}

// Finds the region of an access, reports and returns false if there is none or it is misaligned.
bool Machine::resolve(Warp& w, Space& space, uint64_t& address, uint64_t bytes, int lane, Region*& region, const char* what,
                      uint64_t alignment) {
  if (space == Space::generic) {
    space = address >= kParamWindow ? Space::param : address >= kSharedWindow ? Space::shared : Space::global;
    if (space == Space::shared) address -= kSharedWindow;
    if (space == Space::param) address -= kParamWindow;
  }
  char text[160];
  if (address % (alignment ? alignment : bytes)) {
    std::snprintf(text, sizeof text, "%s of %d bytes at %#llx", what, int(bytes), static_cast<unsigned long long>(address));
    note("misaligned", where(w, lane) + text);
    return false;
  }
  if (space == Space::shared) {
    region = &w.block->shared;
    address &= 0xffffffff;
    if (address + bytes <= region->size) return true;
    std::snprintf(text, sizeof text, "%s of shared memory at %llu, of %llu bytes", what, static_cast<unsigned long long>(address),
                  static_cast<unsigned long long>(region->size));
  } else {
    region = find(address, bytes);
    if (region) return true;
    auto next = regions_.lower_bound(address);
    std::snprintf(text, sizeof text, "%s of %d bytes at %#llx, outside every tensor (next: %s)", what, int(bytes),
                  static_cast<unsigned long long>(address), next == regions_.end() ? "none" : next->second->name.c_str());
  }
  note("out of bounds", where(w, lane) + text);
  return false;
}

// ---- order

// Whether `before` is visible to `now`, an access of warp `w` or of what it started. `data`: `before` was a write.
bool Machine::ordered(const Access& before, const Access& now, const Warp& w, bool data) const {
  if (before.agent == kNobody) return true;
  const Strength strength = std::min(before.strong, now.strong);
  if (strength == Strength::everywhere || (strength == Strength::in_block && before.agent / warps_per_block_ == w.block->index))
    return true;
  if (before.clock == kPending) return false;
  bool through_proxy = data && now.async && !before.async;
  if (before.agent == w.agent && !through_proxy && (before.clock < w.synced || (before.lane == now.lane && now.lane != kManyLanes)))
    return true;
  const auto covers = [&](const View& view) {
    return (through_proxy ? view.proxied : view.seen).covers(before.agent, before.clock, before.lane);
  };
  if (covers(w.view)) return true;
  for (const auto& [lanes, view] : w.acquired)
    if ((now.lane == kManyLanes ? lanes == w.live : (lanes >> now.lane & 1)) && covers(view)) return true;
  return false;
}

void Machine::conflict(const char* what, const Access& before, const Access& now, const Region& r, uint64_t address) {
  std::ostringstream text;
  const auto who = [&](const Access& access) {
    std::ostringstream name;
    if (access.agent >= n_blocks_ * warps_per_block_)
      name << "copy engine of block " << access.agent - n_blocks_ * warps_per_block_;
    else
      name << "block " << access.agent / warps_per_block_ << " warp " << access.agent % warps_per_block_;
    if (access.lane != kManyLanes) name << " lane " << int(access.lane);
    return name.str();
  };
  text << what << " by " << who(now) << " of " << r.name << " byte " << address - r.base << ", after " << who(before)
       << (before.clock == kPending ? " whose access is not over" : "");
  note(before.clock == kPending ? "too early" : "race", text.str());
}

// Notes a read by an agent of which an earlier read is known. That one still counts unless the new one follows it.
void Machine::reads_again(Access& known, const Access& now, const Warp& w) const {
  if (known.clock == kPending) return;
  if (now.clock == kPending || known.lane == now.lane || ordered(known, now, w, false)) {
    known = now;
    return;
  }
  known.clock = std::max(known.clock, now.clock);
  known.lane = kManyLanes;
  known.strong = std::min(known.strong, now.strong);
}

// Returns whether all of it was written.
bool Machine::check_read(Warp& w, Region& r, uint64_t address, uint64_t bytes, const Access& now) {
  bool initialised = true, told = false;
  uint64_t first = (address - r.base) / 2, last = (address - r.base + bytes - 1) / 2;
  for (uint64_t c = first; c <= last; ++c) {
    Cell& cell = r.cells[c];
    initialised = initialised && cell.initialised;
    if (!told && !ordered(cell.writer, now, w, true)) {
      conflict("read", cell.writer, now, r, address);
      told = true;
    }
    if (cell.reader.agent == now.agent) {
      reads_again(cell.reader, now, w);
    } else if (cell.reader.agent == kNobody || (cell.more < 0 && ordered(cell.reader, now, w, false))) {
      cell.reader = now;
    } else {
      if (cell.more < 0) {
        if (r.spare.empty()) {
          r.spare.push_back(static_cast<int32_t>(r.pool.size()));
          r.pool.emplace_back();
        }
        cell.more = r.spare.back();
        r.spare.pop_back();
        r.pool[cell.more].clear();
      }
      auto& others = r.pool[cell.more];
      auto same = std::find_if(others.begin(), others.end(), [&](const Access& a) { return a.agent == now.agent; });
      if (same == others.end())
        others.push_back(now);
      else
        reads_again(*same, now, w);
    }
  }
  return initialised;
}

// `value` is what will be written, null if that is not known yet. Writing what is there already hurts nobody.
void Machine::check_write(Warp& w, Region& r, uint64_t address, uint64_t bytes, const Access& now, const uint8_t* value, bool idempotent,
                          bool defined) {
  bool told = false;
  bool same = idempotent && value && std::memcmp(r.data + (address - r.base), value, bytes) == 0;
  uint64_t first = (address - r.base) / 2, last = (address - r.base + bytes - 1) / 2;
  for (uint64_t c = first; c <= last; ++c) {
    Cell& cell = r.cells[c];
    const Access* bad = nullptr;
    if (!told && !ordered(cell.writer, now, w, true)) bad = &cell.writer;
    if (!told && !bad && !ordered(cell.reader, now, w, false)) bad = &cell.reader;
    if (!told && !bad && cell.more >= 0)
      for (const auto& other : r.pool[cell.more])
        if (!ordered(other, now, w, false)) bad = &other;
    if (bad && !(same && cell.initialised && bad->clock != kPending)) {
      conflict(bad == &cell.writer ? "write" : "write after a read", *bad, now, r, address);
      told = true;
    }
    if (cell.more >= 0) r.spare.push_back(cell.more);
    cell.more = -1;
    cell.reader = Access{};
    cell.writer = now;
    cell.initialised = defined;
  }
}

// What others may see of a warp through a release of `lane` (kManyLanes: of all its lanes together).
View Machine::published(const Warp& w, int lane, uint32_t lanes) const {
  View view = w.view;
  for (const auto& [of, more] : w.acquired)
    if (lane == kManyLanes || (of >> lane & 1)) view.join(more);
  view.seen.ticks[w.agent].join(Tick{w.synced, w.clock, lanes});
  return view;
}

void Machine::acquire(Warp& w, uint32_t lanes, const View& view) {
  if (view.empty()) return;
  if (lanes == w.live)
    w.view.join(view);
  else
    w.acquired.emplace_back(lanes, view);
}

// All lanes of a warp see what each of them did and saw.
void Machine::synchronise(Warp& w) {
  for (const auto& [lanes, view] : w.acquired) w.view.join(view);
  w.acquired.clear();
  w.synced = ++w.clock;
  w.view.seen.ticks[w.agent].join(Tick{w.synced, 0, 0});
}

// A strong access of `address`: takes over what was released there and publishes what this lane saw.
void Machine::pass_on(Warp& w, uint64_t address, Order order, Scope scope, int lane, bool writes, bool reads, bool replaces) {
  auto& place = synchronised_[address];
  const uint32_t me = w.block->index;
  const bool far = scope == Scope::gpu;
  if (reads) {
    Scoped got;
    if (auto found = place.in_block.find(me); found != place.in_block.end()) got.in_block = found->second;
    if (far) got.everywhere = place.everywhere;
    if (order == Order::acquire || order == Order::acq_rel) {
      acquire(w, 1u << lane, got.in_block);
      acquire(w, 1u << lane, got.everywhere);
    } else {
      w.before_fence[lane].in_block.join(got.in_block);
      w.before_fence[lane].everywhere.join(got.everywhere);
    }
  }
  if (writes) {
    if (replaces) place = Synchronised{};
    Scoped given = w.fences[lane];
    if (order == Order::release || order == Order::acq_rel) given.in_block = given.everywhere = published(w, lane, 1u << lane);
    if (!given.in_block.empty()) {
      place.in_block[me].join(given.in_block);
      if (far) place.everywhere.join(given.everywhere);
      ++w.clock;  // later writes of this lane are not part of it
    }
  }
}

void Machine::fence(Warp& w, const Instruction& i, uint32_t mask) {
  const bool far = i.scope == Scope::gpu;
  for_lanes(mask, [&](int lane) {
    acquire(w, 1u << lane, std::exchange(w.before_fence[lane].in_block, View{}));
    if (far) acquire(w, 1u << lane, std::exchange(w.before_fence[lane].everywhere, View{}));
  });
  const bool in_order = far && i.modifier == "sc";  // of all such fences: each synchronises with the later ones
  if (in_order) acquire(w, mask, fences_in_order_);
  for_lanes(mask, [&](int lane) {
    w.fences[lane].in_block = published(w, lane, 1u << lane);
    if (far) w.fences[lane].everywhere = w.fences[lane].in_block;
    if (in_order) fences_in_order_.join(w.fences[lane].everywhere);
  });
  ++w.clock;
}

void Machine::proxy_fence(Warp& w, uint32_t mask) {
  View view = published(w, mask == w.live ? kManyLanes : __builtin_ctz(mask), mask);
  w.view.proxied.join(view.seen);
  ++w.clock;
}

// ---- costs

void Machine::count_shared(const std::array<uint64_t, kLanes>& at, uint32_t mask, int bytes) {
  // Wide accesses go in passes of 128 bytes: half the lanes of 8 bytes, a quarter of 16.
  int passes = std::max(1, bytes / 4), lanes = kLanes / passes, words = std::max(1, bytes / 4);
  for (int p = 0; p < passes; ++p) {
    std::array<std::array<uint64_t, kLanes>, kBanks> seen;
    std::array<int, kBanks> count{};
    bool any = false;
    for (int l = p * lanes; l < (p + 1) * lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      any = true;
      for (int k = 0; k < words; ++k) {
        uint64_t word = at[l] / 4 + k;
        auto& bank = seen[word % kBanks];
        int& n = count[word % kBanks];
        if (std::find(bank.begin(), bank.begin() + n, word) == bank.begin() + n) bank[n++] = word;
      }
    }
    if (!any) continue;
    costs_[pc_].wavefronts += *std::max_element(count.begin(), count.end());
    costs_[pc_].ideal_wavefronts += 1;
  }
}

void Machine::count_global(const std::array<uint64_t, kLanes>& at, uint32_t mask, int bytes) {
  std::array<uint64_t, 2 * kLanes> sectors;
  int n = 0;
  for_lanes(mask, [&](int lane) {
    for (uint64_t s = at[lane] / kSector; s <= (at[lane] + bytes - 1) / kSector; ++s)
      if (std::find(sectors.begin(), sectors.begin() + n, s) == sectors.begin() + n) {
        sectors[n++] = s;
        Region* region = find(std::max(s * kSector, at[lane]), 1);
        if (!region) continue;
        uint64_t local = s - region->base / kSector;
        if (!region->touched[local]) {
          region->touched[local] = true;
          ++costs_[pc_].fresh_sectors;
        }
      }
  });
  costs_[pc_].sectors += n;
}

// ---- loads and stores

namespace {

Strength strength(const Instruction& i) {
  return i.order == Order::weak ? Strength::weak : i.scope == Scope::cta ? Strength::in_block : Strength::everywhere;
}

// Units of global memory add without subnormal numbers.
uint64_t added_in_memory(uint64_t a, uint64_t b) {
  const auto flushed = [](float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; };
  return bits_of(flushed(flushed(as_float(a)) + flushed(as_float(b))));
}

}  // namespace

void Machine::load(Warp& w, const Instruction& i, uint32_t mask) {
  const int size = bits_of(i.type) / 8, total = size * i.vector;
  std::array<uint64_t, kLanes> shared_at{}, global_at{};
  uint32_t in_shared = 0, in_global = 0;
  const Operand& to = i.operands.at(0);
  each(mask, [&](int lane) {
    Space space = i.space;
    uint64_t at = address(w, i.operands.at(1), lane);
    const uint8_t* data = nullptr;
    std::array<uint8_t, 32> nothing;
    nothing.fill(0xff);
    Region *region = nullptr, *partly = nullptr;  // the latter with numbers that were never written
    if (space == Space::generic && at >= kParamWindow) space = Space::param, at -= kParamWindow;
    if (space == Space::param) {
      if (at + total > launch_->parameters.size() || at % size) {
        note("out of bounds", where(w, lane) + "parameter byte " + std::to_string(at));
        throw Stop{};
      }
      data = launch_->parameters.data() + at;
    } else if (resolve(w, space, at, total, lane, region, "load")) {
      Access now{w.agent, w.clock, static_cast<uint8_t>(lane), strength(i), false};
      if (!check_read(w, *region, at, total, now)) partly = region;
      if (i.constant && region->cells[(at - region->base) / 2].writer.agent != kNobody)
        note("race", where(w, lane) + "ld.nc of memory that this launch writes");
      data = region->data + (at - region->base);
      if (space == Space::shared)
        shared_at[lane] = at, in_shared |= 1u << lane;
      else
        global_at[lane] = at, in_global |= 1u << lane;
      if (i.order != Order::weak)
        pass_on(w, at + (space == Space::shared ? kSharedWindow * (w.block->index + 4) : 0), i.order, i.scope, lane, false, true, false);
    } else {
      data = nothing.data();
    }
    for (int v = 0; v < i.vector; ++v) {
      uint64_t bits = 0;
      std::memcpy(&bits, data + v * size, size);
      if (is_signed(i.type)) bits = sign_extended(bits, 8 * size);
      undefined_ = partly && !partly->initialised(at + v * size, size);
      set(w, to.kind == Kind::vector ? to.parts.at(v) : to, lane, bits);
    }
  });
  if (in_shared) count_shared(shared_at, in_shared, total);
  if (in_global) count_global(global_at, in_global, total);
}

void Machine::store(Warp& w, const Instruction& i, uint32_t mask) {
  const int size = bits_of(i.type) / 8, total = size * i.vector;
  std::array<uint64_t, kLanes> shared_at{}, global_at{};
  uint32_t in_shared = 0, in_global = 0;
  const Operand& from = i.operands.at(1);
  each(mask, [&](int lane) {
    Space space = i.space;
    uint64_t at = address(w, i.operands.at(0), lane);
    Region* region = nullptr;
    if (!resolve(w, space, at, total, lane, region, "store")) return;
    std::array<uint8_t, 32> data;
    uint32_t unknown = 0;  // numbers of the vector
    for (int v = 0; v < i.vector; ++v) {
      undefined_ = false;
      uint64_t bits = operand(w, from.kind == Kind::vector ? from.parts.at(v) : from, lane, 8 * size);
      std::memcpy(data.data() + v * size, &bits, size);
      unknown |= static_cast<uint32_t>(undefined_) << v;
    }
    Access now{w.agent, w.clock, static_cast<uint8_t>(lane), strength(i), false};
    undefined_ = unknown != 0;
    if (space != Space::shared || i.order != Order::weak) must_be_defined(w, lane, "value that is stored");
    check_write(w, *region, at, total, now, data.data());
    for_lanes(unknown, [&](int v) { region->forget(at + v * size, size); });
    std::memcpy(region->data + (at - region->base), data.data(), total);
    uint64_t key = at + (space == Space::shared ? kSharedWindow * (w.block->index + 4) : 0);
    if (i.order != Order::weak) pass_on(w, key, i.order, i.scope, lane, true, false, true);
    if (space == Space::shared)
      shared_at[lane] = at, in_shared |= 1u << lane;
    else
      global_at[lane] = at, in_global |= 1u << lane;
  });
  if (in_shared) count_shared(shared_at, in_shared, total);
  if (in_global) count_global(global_at, in_global, total);
}

void Machine::atomic(Warp& w, const Instruction& i, uint32_t mask) {
  const int bits = bits_of(i.type), size = bits / 8;
  const size_t first = i.result ? 1 : 0;
  std::array<uint64_t, kLanes> at_lane{};
  uint32_t in_global = 0;
  each(mask, [&](int lane) {
    Space space = i.space;
    uint64_t at = address(w, i.operands.at(first), lane);
    Region* region = nullptr;
    if (!resolve(w, space, at, size, lane, region, "atomic")) return;
    Access now{w.agent, w.clock, static_cast<uint8_t>(lane), strength(i), false};
    uint64_t old = 0;
    std::memcpy(&old, region->data + (at - region->base), size);
    uint64_t b = operand(w, i.operands.at(first + 1), lane, bits), next = 0;
    bool writes = true;
    if (i.modifier == "add" && i.type == Type::f32)
      next = space == Space::shared ? bits_of(as_float(old) + as_float(b)) : added_in_memory(old, b);
    else if (i.modifier == "add" && i.type == Type::f64)
      next = bits_of(as_double(old) + as_double(b));
    else if (i.modifier == "add")
      next = low_bits(old + b, bits);
    else if (i.modifier == "exch")
      next = b;
    else if (i.modifier == "cas") {
      writes = old == b;
      next = operand(w, i.operands.at(first + 2), lane, bits);
      if (!writes) next = old;
    } else if (i.modifier == "or")
      next = old | b;
    else if (i.modifier == "and")
      next = old & b;
    else if (i.modifier == "inc")
      next = old >= b ? 0 : old + 1;
    else if (i.modifier == "max" || i.modifier == "min") {
      bool less = is_signed(i.type) ? sign_extended(old, bits) < sign_extended(b, bits) : old < b;
      next = (i.modifier == "max") == less ? b : old;
    } else {
      throw Unsupported(i.text);
    }
    if (!check_read(w, *region, at, size, now)) undefined_ = true;
    must_be_defined(w, lane, "atomic");
    if (next != old) check_write(w, *region, at, size, now, reinterpret_cast<uint8_t*>(&next), false);
    std::memcpy(region->data + (at - region->base), &next, size);
    uint64_t key = at + (space == Space::shared ? kSharedWindow * (w.block->index + 4) : 0);
    pass_on(w, key, i.order, i.scope, lane, writes, true, false);
    if (i.result) set(w, i.operands[0], lane, old);
    if (space != Space::shared) at_lane[lane] = at, in_global |= 1u << lane;
  });
  if (in_global) count_global(at_lane, in_global, size);
}

// Shared memory of a matrix instruction, for one lane; null if it is out of bounds or misaligned.
uint8_t* Machine::shared_bytes(Warp& w, uint64_t at, int bytes, int lane, const char* what) {
  Space space = Space::shared;
  Region* region = nullptr;
  if (!resolve(w, space, at, bytes, lane, region, what)) return nullptr;
  return region->data + at;
}

}  // namespace ptx
