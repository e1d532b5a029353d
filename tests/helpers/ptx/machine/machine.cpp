// SPDX-License-Identifier: Apache-2.0
// Blocks and warps: who runs next, where lanes part and meet, block barriers, and the end.
#include "machine.h"

#include <cstdio>
#include <sstream>

#include "numbers.h"

namespace ptx {

std::string Machine::where(const Warp& w, int lane) const {
  std::ostringstream text;
  text << "block " << w.block->index << " warp " << w.index << " lane " << lane << ": ";
  return text.str();
}

void Machine::note(const std::string& kind, const std::string& detail, int instruction) {
  if (instruction < 0) instruction = pc_;
  Finding& finding = findings_[{kind, instruction}];
  if (!finding.count++) finding.kind = kind, finding.detail = detail, finding.instruction = instruction;
}

void Machine::start(uint32_t index) {
  auto block = std::make_unique<Block>();
  Block& b = *block;
  const auto& grid = launch_->grid;
  b.index = index;
  b.at = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
  b.engine = n_blocks_ * warps_per_block_ + index;
  b.storage.assign(launch_->shared + 16, 0xff);
  b.shared.name = "shared memory";
  b.shared.size = launch_->shared;
  b.shared.data = b.storage.data();
  b.shared.cells.resize(launch_->shared / 2 + 8);
  const size_t registers = program_->widths.size();
  for (uint32_t n = 0; n < warps_per_block_; ++n) {
    auto warp = std::make_unique<Warp>();
    warp->block = &b;
    warp->index = static_cast<int>(n);
    warp->agent = index * warps_per_block_ + n;
    warp->live = ~0u;
    warp->values.resize(registers * kLanes);
    warp->written.resize(registers);
    warp->generic_at.resize(registers);
    warp->in_flight.resize(registers);
    warp->view.seen.ticks.resize(agents_);
    b.warps.push_back(std::move(warp));
  }
  b.alive = static_cast<int>(warps_per_block_);
  blocks_.push_back(std::move(block));
}

// Picks the lanes that go on: those of the smallest program counter mostly, so that parted lanes meet again, and any others
// now and then. Lanes at a collective instruction wait for the rest of the warp. False: nobody can go on.
bool Machine::choose(Warp& w, uint32_t& mask, int& pc) {
  if (w.converged) {
    mask = w.live;
    pc = w.pc[__builtin_ctz(w.live)];
    return true;
  }
  std::map<int, uint32_t> groups;
  for_lanes(w.live, [&](int lane) { groups[w.pc[lane]] |= 1u << lane; });
  if (groups.size() == 1) {
    w.converged = true;
    return choose(w, mask, pc);
  }
  std::vector<std::pair<int, uint32_t>> able;
  for (const auto& [at, lanes] : groups) {
    if (at >= static_cast<int>(program_->instructions.size())) {
      able.emplace_back(at, lanes);
      continue;
    }
    const Instruction& i = program_->instructions[at];
    uint32_t wanted = w.live;
    if ((i.op == Op::bar_warp || i.op == Op::shfl || i.op == Op::elect || i.op == Op::vote) && i.operands.back().kind == Kind::immediate)
      wanted = static_cast<uint32_t>(i.operands.back().value) & w.live;
    if (!i.collective || (lanes & wanted) == wanted) able.emplace_back(at, lanes);
  }
  if (able.empty()) {
    note("divergence", where(w, __builtin_ctz(w.live)) + "lanes wait for each other at different collective instructions",
         groups.begin()->first);
    throw Stop{};
  }
  size_t which = random_() % 8 ? 0 : random_() % able.size();
  std::tie(pc, mask) = able[which];
  return true;
}

void Machine::retire(Warp& w, uint32_t mask) {
  w.live &= ~mask;
  if (w.live) return;
  if (!w.products.empty()) note("wgmma", where(w, 0) + "ends while a product is in flight");
  for (const auto& groups : w.copies)
    for (const auto& group : groups)
      if (!group.copies.empty()) {
        note("too early", where(w, 0) + "ends while a cp.async is in flight");
        break;
      }
  Block& b = *w.block;
  --b.alive;
  for (int barrier = 0; barrier < 16; ++barrier) try_release(b, barrier);
}

// Lets the warps of a block barrier go when all have arrived.
void Machine::try_release(Block& b, int barrier) {
  std::vector<Warp*> waiting;
  int expected = b.alive;
  for (const auto& warp : b.warps)
    if (warp->live && warp->waiting == barrier) waiting.push_back(warp.get());
  if (waiting.empty()) return;
  const Instruction& i = program_->instructions[waiting[0]->pc[__builtin_ctz(waiting[0]->live)]];
  if (i.operands.size() > 1) expected = static_cast<int>(operand(*waiting[0], i.operands[1], 0, 32)) / kLanes;
  auto& early = b.arrived[barrier];
  if (static_cast<int>(waiting.size()) + early.first < expected) return;
  View all = early.second;
  for (Warp* w : waiting) all.join(published(*w, kManyLanes, w->live == ~0u ? ~0u : w->live));
  b.arrived.erase(barrier);
  for (Warp* w : waiting) {
    w->view.join(all);
    w->acquired.clear();
    w->synced = ++w->clock;
    w->waiting = -1;
    for_lanes(w->live, [&](int lane) { ++w->pc[lane]; });
  }
  // A barrier makes everything before it visible, of all lanes.
  for (Warp* w : waiting)
    for (Warp* other : waiting) w->view.seen.ticks[other->agent].join(Tick{other->synced, 0, 0});
}

void Machine::advance(Warp& w, uint32_t mask, int pc) {
  for_lanes(mask, [&](int lane) { w.pc[lane] = pc + 1; });
}

// One instruction of a warp. False: it has to wait for others.
bool Machine::step(Warp& w) {
  uint32_t mask = 0;
  int pc = 0;
  choose(w, mask, pc);
  pc_ = pc;
  if (pc >= static_cast<int>(program_->instructions.size())) {
    retire(w, mask);
    return true;
  }
  const Instruction& i = program_->instructions[pc];
  Cost& cost = costs_[pc];
  uint32_t active = mask;
  if (i.predicate >= 0) {
    active = 0;
    const Operand predicate_register{Kind::reg, i.unless, i.predicate, 0, {}};
    each(mask, [&](int lane) {
      active |= static_cast<uint32_t>(predicate(w, predicate_register, lane)) << lane;
      must_be_defined(w, lane, "condition of an instruction");
    });
  }
  if (i.op == Op::wgmma) {
    if (mask != ~0u || w.index / 4 * 4 + 3 >= static_cast<int>(w.block->warps.size())) {
      note("divergence", where(w, 0) + "a warp-group product needs four whole warps");
      throw Stop{};
    }
    w.at_product = true;
    w.waiting = 16;
    const int group = w.index / 4;
    for (int q = 0; q < 4; ++q) {
      const Warp& other = *w.block->warps[4 * group + q];
      if (!other.at_product) return false;
      if (other.pc[0] != pc) {
        note("divergence", where(w, 0) + "warps of one group are at different products");
        throw Stop{};
      }
    }
    costs_[pc].executed += 4, costs_[pc].lanes += 4 * kLanes;
    wgmma(*w.block, group, i);
    for (int q = 0; q < 4; ++q) {
      Warp& other = *w.block->warps[4 * group + q];
      other.at_product = false;
      other.waiting = -1;
      advance(other, ~0u, pc);
    }
    return true;
  }
  ++cost.executed;
  cost.lanes += __builtin_popcount(active);
  if (i.op == Op::bar) {
    if (mask != w.live) {
      note("divergence", where(w, 0) + "part of a warp at a block barrier");
      throw Stop{};
    }
    if (active != mask) {
      if (active) {
        note("divergence", where(w, 0) + "a block barrier under a predicate that differs between lanes");
        throw Stop{};
      }
      advance(w, mask, pc);
      return true;
    }
    const int barrier = static_cast<int>(i.operands.empty() ? 0 : operand(w, i.operands[0], __builtin_ctz(mask), 32));
    if (i.modifier == "arrive") {
      auto& early = w.block->arrived[barrier];
      ++early.first;
      early.second.join(published(w, kManyLanes, w.live));
      ++w.clock;
      advance(w, mask, pc);
    } else {
      w.waiting = barrier;
    }
    try_release(*w.block, barrier);
    return w.waiting < 0;
  }
  if (i.op == Op::exit) {
    advance(w, mask & ~active, pc);
    if (active) retire(w, active);
    if (w.live && active != mask) w.converged = false;
    return true;
  }
  advance(w, mask, pc);
  if (i.op == Op::bra || i.op == Op::brx) {
    branch(w, i, active, pc);
    if (active != mask || i.op == Op::brx) w.converged = false;
    return true;
  }
  if (i.collective && i.predicate >= 0 && active != mask && active) {
    note("divergence", where(w, 0) + "a collective instruction under a predicate that differs between lanes");
    throw Stop{};
  }
  if (active) execute(w, i, active, pc);
  return true;
}

Result Machine::run(const Program& program, const Launch& launch) {
  program_ = &program;
  launch_ = &launch;
  random_.seed(launch.seed);
  if (launch.threads < kLanes || launch.threads % kLanes || launch.threads > 1024)
    throw Unsupported("blocks of " + std::to_string(launch.threads) + " threads");
  n_blocks_ = launch.grid[0] * launch.grid[1] * launch.grid[2];
  warps_per_block_ = static_cast<uint32_t>(launch.threads / kLanes);
  agents_ = n_blocks_ * (warps_per_block_ + 1);
  findings_.clear();
  costs_.assign(program.instructions.size() + 1, Cost{});
  blocks_.clear();
  synchronised_.clear();
  fences_in_order_ = View{};
  for (auto& [end, region] : regions_) {  // what was before the launch is visible to it
    for (auto& cell : region->cells) cell.writer = cell.reader = Access{}, cell.more = -1;
    region->pool.clear();
    region->spare.clear();
    region->touched.assign(region->touched.size(), false);
  }
  std::vector<uint32_t> order(n_blocks_);
  for (uint32_t n = 0; n < n_blocks_; ++n) order[n] = n;
  if (launch.shuffled) std::shuffle(order.begin(), order.end(), random_);
  size_t next = 0;
  uint64_t steps = 0;
  const uint64_t rarity = uint64_t{2} << 4 * (launch.seed % 3);  // tiles arrive soon, later, or when everybody waits
  try {
    while (next < order.size() || !blocks_.empty()) {
      while (next < order.size() && static_cast<int>(blocks_.size()) < launch.resident) start(order[next++]);
      // Any block, any warp of it that can go on, for a few instructions.
      bool moved = false;
      size_t offset = random_() % blocks_.size();
      for (size_t n = 0; n < blocks_.size() && !moved; ++n) {
        Block& b = *blocks_[(offset + n) % blocks_.size()];
        if (!b.bulk.empty() && random_() % rarity == 0) moved = land(b);
        const size_t first = random_() % b.warps.size();
        for (size_t k = 0; k < b.warps.size() && !moved; ++k) {
          Warp& w = *b.warps[(first + k) % b.warps.size()];
          if (!runnable(w)) continue;
          moved = true;
          for (uint64_t burst = 1 + random_() % 64; burst && runnable(w); --burst, ++steps)
            if (!step(w)) break;
        }
        if (!moved) moved = land(b);
        if (b.alive == 0 && b.bulk.empty()) {
          blocks_.erase(blocks_.begin() + static_cast<long>((offset + n) % blocks_.size()));
          moved = true;
        }
      }
      if (!moved || steps > launch.limit) {
        std::ostringstream text;
        text << (moved ? "no end after " + std::to_string(steps) + " instructions; " : "");
        for (const auto& b : blocks_)
          for (const auto& w : b->warps)
            if (w->live)
              text << "block " << b->index << " warp " << w->index << " at line "
                   << program.instructions[std::min<size_t>(w->pc[__builtin_ctz(w->live)], program.instructions.size() - 1)].line << "; ";
        note("deadlock", text.str().substr(0, 600));
        break;
      }
    }
  } catch (const Stop&) {
  } catch (const std::out_of_range&) {  // of operands
    throw Unsupported("operands of " + program.instructions[pc_].text);
  }
  blocks_.clear();
  Result result;
  for (auto& [key, finding] : findings_) result.findings.push_back(finding);
  result.costs = costs_;
  result.steps = steps;
  return result;
}

}  // namespace ptx
