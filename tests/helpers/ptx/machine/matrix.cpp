// SPDX-License-Identifier: Apache-2.0
// Matrix instructions: products of a warp and of a warp group, and the loads and stores that go with them.
// Products are exact, sums are in double and rounded once: hardware adds in an order of its own, with error of the same size.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "numbers.h"

namespace ptx {
namespace {

float element(Type type, uint64_t bits) {
  switch (type) {
    case Type::bf16:
      return from_bf16(bits);
    case Type::f16:
      return from_f16(bits);
    case Type::tf32:
      return truncated_tf32(bits);
    default:
      throw Unsupported("operands of a matrix product");
  }
}

// d [m, n] += a [m, k] b [k, n].
void product(const std::vector<float>& a, const std::vector<float>& b, std::vector<double>& d, int m, int n, int k) {
  for (int i = 0; i < m; ++i)
    for (int l = 0; l < k; ++l) {
      const double left = a[i * k + l];
      const float* right = &b[l * n];
      double* out = &d[i * n];
      for (int j = 0; j < n; ++j) out[j] += left * right[j];
    }
}

// Row and column of element `e` of register `r` of lane `lane` in a 16 x k operand A (also the layout of its parts in a warp group).
struct Place {
  int row, column;
};
Place place_a(int lane, int r, int e, int per_register) {
  const int g = lane / 4, t = lane % 4, columns = 4 * per_register;
  return {g + 8 * (r % 2), t * per_register + e + columns * (r / 2)};
}

}  // namespace

void Machine::ldmatrix(Warp& w, const Instruction& i) {
  const Operand& to = i.operands.at(0);
  for (int matrix = 0; matrix < i.vector; ++matrix) {
    std::array<std::array<uint16_t, 8>, 8> rows{};
    std::array<uint64_t, kLanes> at{};
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      at[row] = address(w, i.operands.at(1), lane) & 0xffffffff;
      if (const uint8_t* bytes = shared_bytes(w, at[row], 16, lane, "ldmatrix")) {
        check_read(w, w.block->shared, at[row], 16, Access{w.agent, w.clock, kManyLanes, Strength::weak, false});
        std::memcpy(rows[row].data(), bytes, 16);
      }
    }
    count_shared(at, 0xff, 16);
    const Operand& reg = to.kind == Kind::vector ? to.parts.at(matrix) : to;
    undefined_ = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int a = lane / 4, b = lane % 4 * 2;
      uint32_t low = i.trans ? rows[b][a] : rows[a][b], high = i.trans ? rows[b + 1][a] : rows[a][b + 1];
      set(w, reg, lane, low | high << 16);
    }
  }
}

void Machine::stmatrix(Warp& w, const Instruction& i) {
  const Operand& from = i.operands.at(1);
  for (int matrix = 0; matrix < i.vector; ++matrix) {
    std::array<std::array<uint16_t, 8>, 8> rows{};
    const Operand& reg = from.kind == Kind::vector ? from.parts.at(matrix) : from;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int a = lane / 4, b = lane % 4 * 2;
      const auto bits = static_cast<uint32_t>(operand(w, reg, lane, 32));
      (i.trans ? rows[b][a] : rows[a][b]) = static_cast<uint16_t>(bits);
      (i.trans ? rows[b + 1][a] : rows[a][b + 1]) = static_cast<uint16_t>(bits >> 16);
    }
    std::array<uint64_t, kLanes> at{};
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      at[row] = address(w, i.operands.at(0), lane) & 0xffffffff;
      if (uint8_t* bytes = shared_bytes(w, at[row], 16, lane, "stmatrix")) {
        check_write(w, w.block->shared, at[row], 16, Access{w.agent, w.clock, kManyLanes, Strength::weak, false},
                    reinterpret_cast<const uint8_t*>(rows[row].data()));
        std::memcpy(bytes, rows[row].data(), 16);
      }
    }
    count_shared(at, 0xff, 16);
  }
}

void Machine::movmatrix(Warp& w, const Instruction& i) {
  std::array<std::array<uint32_t, 8>, 8> halves{};
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto bits = static_cast<uint32_t>(operand(w, i.operands.at(1), lane, 32));
    halves[lane / 4][lane % 4 * 2] = bits & 0xffff;
    halves[lane / 4][lane % 4 * 2 + 1] = bits >> 16;
  }
  undefined_ = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int a = lane / 4, b = lane % 4 * 2;
    set(w, i.operands[0], lane, halves[b][a] | halves[b + 1][a] << 16);
  }
}

void Machine::mma(Warp& w, const Instruction& i) {
  const int bits = bits_of(i.source) == 16 ? 16 : 32, per_register = 32 / bits, m = i.m, n = i.n, k = i.k;
  const auto &d = i.operands.at(0).parts, &a = i.operands.at(1).parts, &c = i.operands.at(3).parts;
  const auto b = i.operands.at(2).kind == Kind::vector ? i.operands[2].parts : std::vector<Operand>{i.operands[2]};
  if (m != 16 || n != 8 || d.size() != 4 || static_cast<int>(a.size()) != m * k / (32 * per_register)) throw Unsupported(i.text);
  std::vector<float> left(m * k), right(k * n);
  std::vector<double> out(m * n, 0);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (size_t r = 0; r < a.size(); ++r) {
      uint64_t value = operand(w, a[r], lane, 32);
      for (int e = 0; e < per_register; ++e) {
        auto [row, column] = place_a(lane, static_cast<int>(r), e, per_register);
        left[row * k + column] = element(i.source, value >> (e * bits));
      }
    }
    for (size_t r = 0; r < b.size(); ++r) {
      uint64_t value = operand(w, b[r], lane, 32);
      for (int e = 0; e < per_register; ++e) {
        const int row = lane % 4 * per_register + e + 4 * per_register * static_cast<int>(r);
        right[row * n + lane / 4] = element(i.source, value >> (e * bits));
      }
    }
  }
  product(left, right, out, m, n, k);
  for (int lane = 0; lane < kLanes; ++lane)
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + 8 * (r / 2), column = lane % 4 * 2 + r % 2;
      double before = as_float(operand(w, c[r], lane, 32));
      undefined_ = false;  // what was never written is NaN, which spreads by itself
      set(w, d[r], lane, bits_of(static_cast<float>(before + out[row * n + column])));
    }
}

// ---- warp groups

namespace {

// A matrix operand in shared memory as a descriptor gives it: where 16 bytes lie.
struct Descriptor {
  uint64_t start, leading, stride, swizzle;
  explicit Descriptor(uint64_t bits)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4), swizzle(0) {
    if (bits >> 49 & 7) throw Unsupported("base offset of a matrix descriptor");
    switch (bits >> 62) {
      case 1:
        swizzle = 128;
        break;
      case 2:
        swizzle = 64;
        break;
      case 3:
        swizzle = 32;
        break;
      default:
        break;
    }
  }
  // Along k contiguous: of row `row`, the 16 bytes that start at byte `byte` of the k dimension.
  uint64_t along_k(int row, int byte) const {
    if (!swizzle) return start + row / 8 * stride + row % 8 * 16 + byte / 16 * leading;
    return mixed(start + row / 8 * stride + row % 8 * swizzle + byte);
  }
  // Along the other dimension contiguous: of index `k`, the 16 bytes that start at byte `byte`.
  uint64_t across(int k, int byte) const {
    if (!swizzle) return start + byte / 16 * stride + k % 8 * 16 + k / 8 * leading;
    const uint64_t span = swizzle;
    return mixed(start + byte / span * leading + byte % span + k % 8 * span + k / 8 * stride);
  }
  uint64_t mixed(uint64_t address) const { return address ^ ((address >> 7 & (swizzle / 16 - 1)) << 4); }
};

}  // namespace

// Products in flight may share accumulators of one shape, and operands that none of them writes.
void Machine::wgmma_register(Warp& w, int reg, bool accumulates, const Instruction& i) {
  if (w.in_flight[reg]) {
    for (const auto& before : w.products) {
      const auto place = std::find(before.registers.begin(), before.registers.end(), reg);
      if (place == before.registers.end()) continue;
      const bool accumulated = static_cast<size_t>(place - before.registers.begin()) < before.accumulators;
      if (accumulated == accumulates && (!accumulated || before.n == i.n)) continue;
      note("wgmma", where(w, 0) + "register " + std::to_string(reg) + " belongs to another product in flight");
    }
  } else if (w.generic_at[reg] > w.fenced) {
    note("wgmma", where(w, 0) + "register " + std::to_string(reg) + " was written after the last wgmma.fence");
  }
}

void Machine::wgmma(Block& b, int group, const Instruction& i) {
  const int bits = bits_of(i.source) == 16 ? 16 : 32, size = bits / 8, per_register = 32 / bits, m = 64, n = i.n, k = i.k;
  const Operand& a = i.operands.at(1);
  const bool registers = a.kind == Kind::vector;
  std::vector<float> left(m * k), right(k * n);
  std::vector<double> out(m * n, 0);
  Warp& first = *b.warps[4 * group];
  const auto constant = [&](size_t index) { return index < i.operands.size() ? sign_extended(i.operands[index].value, 32) : 0; };
  const int sign_a = constant(4) < 0 ? -1 : 1, sign_b = constant(5) < 0 ? -1 : 1;
  const bool across_a = !registers && constant(6) == 1, across_b = constant(registers ? 6 : 7) == 1;
  std::array<std::vector<std::pair<uint64_t, uint64_t>>, 4> ranges;

  const auto fetch = [&](uint64_t descriptor_bits, bool across, int extent, int rows_per_warp, auto&& put) {
    Descriptor descriptor(descriptor_bits);
    const int outer = across ? k : extent, inner = across ? extent : k, step = 16 / size;
    for (int o = 0; o < outer; ++o)
      for (int s = 0; s < inner; s += step) {
        uint64_t at = across ? descriptor.across(o, s * size) : descriptor.along_k(o, s * size);
        const uint8_t* bytes = shared_bytes(first, at, 16, 0, "wgmma");
        if (!bytes) throw Stop{};
        for (int e = 0; e < step; ++e) {
          uint64_t value = 0;
          std::memcpy(&value, bytes + e * size, size);
          put(across ? s + e : o, across ? o : s + e, element(i.source, value));
        }
        // Each warp reads its own rows of A and all of B.
        for (int q = 0; q < 4; ++q)
          if (!rows_per_warp || across || o / rows_per_warp == q) ranges[q].emplace_back(at, 16);
      }
    costs_[pc_].wavefronts += static_cast<uint64_t>(extent) * k * size / 128;
    costs_[pc_].ideal_wavefronts += static_cast<uint64_t>(extent) * k * size / 128;
  };

  // The four warps and their lanes have to agree on what the product reads.
  const auto agreed = [&](const Operand& o) {
    undefined_ = false;
    const uint64_t value = operand(first, o, 0, 64);
    for (int q = 0; q < 4; ++q)
      for (int lane = 0; lane < kLanes; ++lane)
        if (operand(*b.warps[4 * group + q], o, lane, 64) != value) {
          note("divergence", where(*b.warps[4 * group + q], lane) + "operands of a warp-group product differ");
          throw Stop{};
        }
    must_be_defined(first, 0, "operand of a product");
    return value;
  };
  const auto must_be_written = [&](const Warp& w, int reg) {
    if (w.written[reg] != ~0u) note("never written", where(w, __builtin_ctz(~w.written[reg])) + "register of a product");
  };

  if (!registers) fetch(agreed(a), across_a, m, 16, [&](int row, int column, float v) { left[row * k + column] = sign_a * v; });
  fetch(agreed(i.operands.at(2)), across_b, n, 0, [&](int column, int row, float v) { right[row * n + column] = sign_b * v; });
  for (int q = 0; q < 4 && registers; ++q)
    for (size_t r = 0; r < a.parts.size(); ++r) {
      must_be_written(*b.warps[4 * group + q], a.parts[r].reg);
      wgmma_register(*b.warps[4 * group + q], a.parts[r].reg, false, i);
      for (int lane = 0; lane < kLanes; ++lane) {
        uint64_t value = b.warps[4 * group + q]->values[a.parts[r].reg * kLanes + lane];
        for (int e = 0; e < per_register; ++e) {
          auto [row, column] = place_a(lane, static_cast<int>(r), e, per_register);
          left[(16 * q + row) * k + column] = sign_a * element(i.source, value >> (e * bits));
        }
      }
    }
  product(left, right, out, m, n, k);
  for (int q = 0; q < 4; ++q) {
    Warp& w = *b.warps[4 * group + q];
    Product mine;
    mine.ranges = std::move(ranges[q]);
    mine.group = w.open_group;
    mine.n = n;
    for (const auto& [at, bytes] : mine.ranges)
      check_read(w, b.shared, at, bytes, Access{w.agent, kPending, kManyLanes, Strength::weak, true});
    const Operand& scale = i.operands.at(3);
    const bool adds = scale.kind == Kind::immediate ? scale.value != 0 : (agreed(scale) & 1) != scale.negated;
    const auto& d = i.operands[0].parts;
    for (size_t r = 0; r < d.size(); ++r) {
      const int reg = d[r].reg;
      if (adds) must_be_written(w, reg);
      if (adds || w.in_flight[reg]) wgmma_register(w, reg, true, i);
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = 16 * q + lane / 4 + 8 * (static_cast<int>(r) / 2 % 2),
                  column = static_cast<int>(r) / 4 * 8 + lane % 4 * 2 + static_cast<int>(r) % 2;
        uint64_t& value = w.values[reg * kLanes + lane];
        value = bits_of(static_cast<float>((adds ? as_float(value) : 0.0) + out[row * n + column]));
      }
      w.written[reg] = ~0u;
      mine.registers.push_back(reg);
    }
    mine.accumulators = mine.registers.size();
    for (const auto& part : a.parts) mine.registers.push_back(part.reg);
    for (int reg : mine.registers) ++w.in_flight[reg];
    w.products.push_back(std::move(mine));
  }
}

// The reads of these bytes by `w` end at `clock`.
void Machine::over(Warp& w, Region& r, uint64_t at, uint64_t bytes, uint32_t clock) {
  for (uint64_t c = at / 2; c < (at + bytes) / 2; ++c) {
    Cell& cell = r.cells[c];
    if (cell.reader.agent == w.agent) cell.reader.clock = clock;
    if (cell.more >= 0)
      for (auto& other : r.pool[cell.more])
        if (other.agent == w.agent) other.clock = clock;
  }
}

void Machine::wgmma_wait(Warp& w, const Instruction& i) {
  const uint64_t keep = i.operands.at(0).value;
  bool ended = false;
  while (!w.products.empty() && w.products.front().group + keep < w.open_group) {
    Product& product = w.products.front();
    for (int reg : product.registers) --w.in_flight[reg];
    for (const auto& [at, bytes] : product.ranges) over(w, w.block->shared, at, bytes, w.clock);
    w.products.pop_front();
    ended = true;
  }
  if (ended)
    for (const auto& product : w.products)
      for (const auto& [at, bytes] : product.ranges) over(w, w.block->shared, at, bytes, kPending);
}

}  // namespace ptx
