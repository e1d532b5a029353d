// SPDX-License-Identifier: Apache-2.0
// What happens before what. Agents are the warps of the grid and one copy engine per block. A warp has a clock
// that advances at every synchronisation; a View says up to which clock of every agent its accesses are visible.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace ptx {

inline constexpr uint32_t kNobody = 0xffffffff;
inline constexpr uint32_t kPending = 0xffffffff;  // clock of an access that is not over yet
inline constexpr uint8_t kManyLanes = 255;

// Accesses of an agent that are covered: of every lane before `all`, of `lanes` up to and including `own`.
struct Tick {
  uint32_t all = 0, own = 0, lanes = 0;
  bool covers(uint32_t clock, uint8_t lane) const {
    return clock < all || (clock <= own && lanes != 0 && (lane == kManyLanes ? lanes == ~0u : (lanes >> lane & 1)));
  }
  void join(const Tick& other) {
    if (other.own > own || lanes == 0)
      own = other.own, lanes = other.lanes;
    else if (other.own == own)
      lanes |= other.lanes;
    all = std::max(all, other.all);
  }
};

struct Clock {
  std::vector<Tick> ticks;
  void join(const Clock& other) {
    if (ticks.size() < other.ticks.size()) ticks.resize(other.ticks.size());
    for (size_t i = 0; i < other.ticks.size(); ++i) ticks[i].join(other.ticks[i]);
  }
  bool covers(uint32_t agent, uint32_t clock, uint8_t lane) const { return agent < ticks.size() && ticks[agent].covers(clock, lane); }
};

// What an agent sees with ordinary accesses, and what its asynchronous ones (bulk copies, warp-group products) see:
// ordinary writes of shared memory reach the latter by a proxy fence only.
struct View {
  Clock seen, proxied;
  void join(const View& other) {
    seen.join(other.seen);
    proxied.join(other.proxied);
  }
  bool empty() const { return seen.ticks.empty(); }
};

// Accesses that are atomic or have an order do not race with their like, if the scopes of both include both.
enum class Strength : uint8_t { weak, in_block, everywhere };

struct Access {
  uint32_t agent = kNobody, clock = 0;
  uint8_t lane = 0;
  Strength strong = Strength::weak;
  bool async = false;  // by the asynchronous proxy
};

// Two bytes of memory: who wrote them last, and who read them since.
struct Cell {
  Access writer, reader;
  int32_t more = -1;  // further readers, in the pool of its region
  bool initialised = false;
};

}  // namespace ptx
