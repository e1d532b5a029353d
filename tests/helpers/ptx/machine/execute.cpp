// SPDX-License-Identifier: Apache-2.0
// One instruction of one warp: registers, arithmetic, control flow. Arithmetic is a function of bit patterns.
#include <algorithm>
#include <cmath>

#include "machine.h"
#include "numbers.h"

namespace ptx {
namespace {

template <class T>
uint64_t packed(T value) {
  if constexpr (std::is_floating_point_v<T>)
    return bits_of(value);
  else
    return static_cast<uint64_t>(static_cast<std::make_unsigned_t<T>>(value));
}

template <class T>
uint64_t integer(const Instruction& i, uint64_t x, uint64_t y, uint64_t z) {
  using U = std::make_unsigned_t<T>;
  constexpr int bits = 8 * sizeof(T);
  const T a = static_cast<T>(x), b = static_cast<T>(y);
  const U ua = static_cast<U>(x), ub = static_cast<U>(y);
  const auto product = [&] {
    return std::is_signed_v<T> ? static_cast<unsigned __int128>(static_cast<__int128>(a) * static_cast<__int128>(b))
                               : static_cast<unsigned __int128>(ua) * ub;
  };
  switch (i.op) {
    case Op::add:
      return static_cast<U>(ua + ub);
    case Op::sub:
      return static_cast<U>(ua - ub);
    case Op::mul:
    case Op::mad: {
      uint64_t value = static_cast<uint64_t>(i.high ? product() >> bits : product());
      if (i.wide) return low_bits(value + (i.op == Op::mad ? z : 0), 2 * bits);
      return static_cast<U>(value + (i.op == Op::mad ? z : 0));
    }
    case Op::div:
      // By zero: unspecified, this is what GPUs return.
      if (std::is_signed_v<T> && b == T(-1)) return static_cast<U>(0 - ua);
      return b == 0 ? static_cast<U>(-1) : static_cast<U>(a / b);
    case Op::rem:
      if (std::is_signed_v<T> && b == T(-1)) return 0;
      return b == 0 ? ua : static_cast<U>(a % b);
    case Op::min:
      return static_cast<U>(std::min(a, b));
    case Op::max:
      return static_cast<U>(std::max(a, b));
    case Op::neg:
      return static_cast<U>(0 - ua);
    case Op::abs:
      return a < 0 ? static_cast<U>(0 - ua) : ua;
    case Op::and_:
      return ua & ub;
    case Op::or_:
      return ua | ub;
    case Op::xor_:
      return ua ^ ub;
    case Op::not_:
      return static_cast<U>(~ua);
    case Op::shl:
      return y >= bits ? 0 : static_cast<U>(ua << y);
    case Op::shr:
      return static_cast<U>(a >> std::min<uint64_t>(y, bits - 1)) & (std::is_signed_v<T> || y < bits ? ~U(0) : U(0));
    case Op::clz:
      return ua ? static_cast<uint64_t>(__builtin_clzll(ua)) - (64 - bits) : bits;
    case Op::popc:
      return static_cast<uint64_t>(__builtin_popcountll(ua));
    default:
      throw Unsupported(i.text);
  }
}

// Numbers win against NaN unless it propagates, and -0 is less than +0.
template <class T>
T extreme(const Instruction& i, T a, T b) {
  const bool largest = i.op == Op::max;
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) == i.propagates ? a : b;
  if (a == b) return std::signbit(a) == largest ? b : a;
  return (a < b) == largest ? b : a;
}

template <class T>
uint64_t floating(const Instruction& i, T a, T b, T c) {
  switch (i.op) {
    case Op::add:
      return packed(a + b);
    case Op::sub:
      return packed(a - b);
    case Op::mul:
      return packed(a * b);
    case Op::fma:
    case Op::mad:
      return packed(std::fma(a, b, c));
    case Op::div:
      return packed(a / b);
    case Op::min:
    case Op::max:
      return packed(extreme(i, a, b));
    case Op::neg:
      return packed(-a);
    case Op::abs:
      return packed(std::abs(a));
    case Op::sqrt:
      return packed(std::sqrt(a));
    case Op::rsqrt:
      return packed(T(1) / std::sqrt(a));
    case Op::rcp:
      return packed(T(1) / a);
    case Op::ex2:
      return packed(std::exp2(a));
    case Op::lg2:
      return packed(std::log2(a));
    default:
      throw Unsupported(i.text);
  }
}

float half(Type type, uint64_t bits) {
  return type == Type::bf16 ? from_bf16(bits) : from_f16(bits);
}
uint64_t to_half(Type type, double value) {
  return type == Type::bf16 ? to_bf16(value) : to_f16(value);
}

// Zero with its sign, if it is subnormal.
uint64_t flushed(Type type, uint64_t bits) {
  const int exponent = type == Type::f64 ? 11 : type == Type::f16 ? 5 : 8, width = bits_of(type);
  const uint64_t field = low_bits(~uint64_t{0}, exponent) << (width - 1 - exponent);
  return bits & field ? bits : bits & uint64_t{1} << (width - 1);
}

uint64_t number(const Instruction& i, Type type, uint64_t a, uint64_t b, uint64_t c) {
  a = low_bits(a, bits_of(type)), b = low_bits(b, bits_of(type)), c = low_bits(c, bits_of(type));
  if (i.flushes) a = flushed(type, a), b = flushed(type, b), c = flushed(type, c);
  uint64_t out = 0;
  if (type == Type::f32)
    out = floating<float>(i, as_float(a), as_float(b), as_float(c));
  else if (type == Type::f64)
    out = floating<double>(i, as_double(a), as_double(b), as_double(c));
  else if (i.op == Op::fma)
    out = to_half(type, fused_to_odd(half(type, a), half(type, b), half(type, c)));
  else
    out = to_half(type, as_double(floating<double>(i, half(type, a), half(type, b), half(type, c))));
  return i.flushes ? flushed(type, out) : out;
}

// Results of three operands at most; predicates and selections are elsewhere.
uint64_t scalar(const Instruction& i, uint64_t a, uint64_t b, uint64_t c) {
  switch (i.op) {
    case Op::lop3:
      throw Unsupported(i.text);
    case Op::bfe: {
      const int bits = bits_of(i.type), position = static_cast<int>(b & 0xff), length = static_cast<int>(c & 0xff);
      if (length == 0) return 0;
      uint64_t value = position >= bits ? 0 : low_bits(a, bits) >> position;
      if (!is_signed(i.type)) return low_bits(value, std::min(length, 64));
      const int last = std::min(position + length - 1, bits - 1);
      const bool sign = a >> last & 1;
      const int have = std::max(0, last - position + 1);
      value = low_bits(value, have);
      if (sign) value |= have >= 64 ? 0 : ~uint64_t{0} << have;
      return low_bits(value, bits);
    }
    case Op::prmt: {
      uint64_t both = low_bits(a, 32) | b << 32, out = 0;
      for (int n = 0; n < 4; ++n) {
        uint64_t select = c >> (4 * n) & 0xf, byte = both >> (8 * (select & 7)) & 0xff;
        if (select & 8) byte = byte & 0x80 ? 0xff : 0;
        out |= byte << (8 * n);
      }
      return out;
    }
    case Op::shf: {
      const bool left = i.modifier[0] == 'l', wraps = i.modifier.find("wrap") != std::string::npos;
      uint64_t both = low_bits(a, 32) | b << 32, by = wraps ? c & 31 : std::min<uint64_t>(c, 32);
      return low_bits(left ? (both << by) >> 32 : both >> by, 32);
    }
    default:
      break;
  }
  if (is_float(i.type)) return number(i, i.type, a, b, c);
  if (i.type == Type::bf16x2 || i.type == Type::f16x2) {
    const Type one = i.type == Type::bf16x2 ? Type::bf16 : Type::f16;
    return number(i, one, a, b, c) | number(i, one, a >> 16, b >> 16, c >> 16) << 16;
  }
  switch (i.type) {
    case Type::s16:
      return integer<int16_t>(i, a, b, c);
    case Type::u16:
    case Type::b16:
      return integer<uint16_t>(i, a, b, c);
    case Type::s32:
      return integer<int32_t>(i, a, b, c);
    case Type::u32:
    case Type::b32:
      return integer<uint32_t>(i, a, b, c);
    case Type::s64:
      return integer<int64_t>(i, a, b, c);
    case Type::u64:
    case Type::b64:
      return integer<uint64_t>(i, a, b, c);
    default:
      throw Unsupported(i.text);
  }
}

uint64_t converted(const Instruction& i, uint64_t a, uint64_t b) {
  const Type to = i.type, from = i.source;
  if (i.flushes && from == Type::f32) a = flushed(from, a), b = flushed(from, b);
  if (to == Type::bf16x2 || to == Type::f16x2) {  // the first operand is the upper half
    const Type one = to == Type::bf16x2 ? Type::bf16 : Type::f16;
    return (to_half(one, as_float(a)) & 0xffff) << 16 | (to_half(one, as_float(b)) & 0xffff);
  }
  if (to == Type::tf32) {
    if (i.modifier != "rna") throw Unsupported(i.text);
    return rounded_tf32(a);
  }
  const bool integral = i.modifier.size() > 2 || !is_float(to);
  const auto rounded = [&](double value) {
    if (i.modifier == "rni") return std::nearbyint(value);
    if (i.modifier == "rmi") return std::floor(value);
    if (i.modifier == "rpi") return std::ceil(value);
    return std::trunc(value);
  };
  if (is_float(from)) {
    double value = from == Type::f64 ? as_double(a) : from == Type::f32 ? as_float(a) : half(from, a);
    if (integral) value = rounded(value);
    switch (to) {
      case Type::f64:
        return bits_of(value);
      case Type::f32: {
        const uint64_t out = bits_of(static_cast<float>(value));
        return i.flushes ? flushed(to, out) : out;
      }
      case Type::f16:
      case Type::bf16:
        return to_half(to, value);
      default:
        break;
    }
    const int bits = bits_of(to);
    if (std::isnan(value)) return from == Type::f64 || bits == 64 ? uint64_t{1} << (bits - 1) : 0;
    const double low = is_signed(to) ? -std::ldexp(1.0, bits - 1) : 0, high = std::ldexp(1.0, bits - is_signed(to));
    if (value <= low) return low_bits(static_cast<uint64_t>(static_cast<int64_t>(low)), bits);
    if (value >= high) return is_signed(to) ? low_bits(~uint64_t{0}, bits - 1) : low_bits(~uint64_t{0}, bits);
    return low_bits(is_signed(to) ? static_cast<uint64_t>(static_cast<int64_t>(value)) : static_cast<uint64_t>(value), bits);
  }
  const int bits = bits_of(from);
  const uint64_t whole = is_signed(from) ? static_cast<uint64_t>(sign_extended(a, bits)) : low_bits(a, bits);
  if (!is_float(to)) return low_bits(whole, bits_of(to));
  if (to == Type::f64) return bits_of(is_signed(from) ? static_cast<double>(static_cast<int64_t>(whole)) : static_cast<double>(whole));
  if (to == Type::f32) return bits_of(is_signed(from) ? static_cast<float>(static_cast<int64_t>(whole)) : static_cast<float>(whole));
  const bool negative = is_signed(from) && static_cast<int64_t>(whole) < 0;
  const double magnitude = whole_to_odd(negative ? 0 - whole : whole);
  return to_half(to, negative ? -magnitude : magnitude);
}

template <class T>
bool related(const std::string& how, T a, T b, bool unordered) {
  const auto is = [&](const char* name) { return how == name; };
  if (is("eq")) return a == b;
  if (is("ne")) return unordered ? false : a != b;
  if (is("lt") || is("lo")) return a < b;
  if (is("le") || is("ls")) return a <= b;
  if (is("gt") || is("hi")) return a > b;
  if (is("ge") || is("hs")) return a >= b;
  if (is("num")) return !unordered;
  if (is("nan")) return unordered;
  if (is("equ")) return unordered || a == b;
  if (is("neu")) return unordered || a != b;
  if (is("ltu")) return unordered || a < b;
  if (is("leu")) return unordered || a <= b;
  if (is("gtu")) return unordered || a > b;
  if (is("geu")) return unordered || a >= b;
  throw Unsupported("setp." + how);
}

bool compared(const Instruction& i, Type type, uint64_t a, uint64_t b) {
  const int bits = bits_of(type);
  if (is_float(type)) {
    const auto number = [&](uint64_t x) { return type == Type::f64 ? as_double(x) : type == Type::f32 ? as_float(x) : half(type, x); };
    if (i.flushes) a = flushed(type, low_bits(a, bits)), b = flushed(type, low_bits(b, bits));
    double x = number(a), y = number(b);
    return related(i.modifier, x, y, std::isnan(x) || std::isnan(y));
  }
  if (is_signed(type)) return related(i.modifier, sign_extended(a, bits), sign_extended(b, bits), false);
  return related(i.modifier, low_bits(a, bits), low_bits(b, bits), false);
}

// How wide each source operand is read.
int operand_bits(const Instruction& i, size_t n) {
  if (i.op == Op::shl || i.op == Op::shr) return n == 0 ? bits_of(i.type) : 32;
  if ((i.op == Op::bfe || i.op == Op::bfi) && n > (i.op == Op::bfi)) return 32;
  if (i.wide && n == 2) return 2 * bits_of(i.type);
  return bits_of(i.type);
}

}  // namespace

// ---- registers

void Machine::touch(Warp& w, int reg) {
  if (w.in_flight[reg])
    note("wgmma", where(w, 0) + "register " + std::to_string(reg) + " is used before the product that holds it was waited for");
}

uint64_t Machine::special(const Warp& w, int which, int lane) const {
  const auto& grid = launch_->grid;
  switch (static_cast<Special>(which)) {
    case Special::tid_x:
      return w.index * kLanes + lane;
    case Special::ntid_x:
      return launch_->threads;
    case Special::ntid_y:
    case Special::ntid_z:
      return 1;
    case Special::ctaid_x:
      return w.block->at[0];
    case Special::ctaid_y:
      return w.block->at[1];
    case Special::ctaid_z:
      return w.block->at[2];
    case Special::nctaid_x:
      return grid[0];
    case Special::nctaid_y:
      return grid[1];
    case Special::nctaid_z:
      return grid[2];
    case Special::laneid:
      return lane;
    case Special::warpid:
      return w.index;
    default:
      return 0;
  }
}

uint64_t Machine::operand(Warp& w, const Operand& o, int lane, int bits) {
  switch (o.kind) {
    case Kind::immediate:
      return low_bits(o.value, bits);
    case Kind::special:
      return low_bits(special(w, o.reg, lane), bits);
    case Kind::reg: {
      if (w.in_flight[o.reg]) touch(w, o.reg);
      if (!(w.written[o.reg] >> lane & 1)) {
        undefined_ = true;
        return low_bits(~uint64_t{0}, bits);  // NaN, as a float
      }
      return low_bits(w.values[o.reg * kLanes + lane], bits);
    }
    default:
      throw Unsupported("operand of " + program_->instructions[pc_].text);
  }
}

void Machine::set(Warp& w, const Operand& o, int lane, uint64_t value) {
  if (o.kind == Kind::sink) return;
  if (o.kind != Kind::reg) throw Unsupported("destination of " + program_->instructions[pc_].text);
  if (w.in_flight[o.reg]) touch(w, o.reg);
  w.values[o.reg * kLanes + lane] = low_bits(value, program_->widths[o.reg]);
  w.written[o.reg] = undefined_ ? w.written[o.reg] & ~(1u << lane) : w.written[o.reg] | 1u << lane;
  w.generic_at[o.reg] = w.serial;
}

bool Machine::predicate(Warp& w, const Operand& o, int lane) {
  if (o.kind == Kind::immediate) return o.value != 0;
  return ((operand(w, o, lane, 64) & 1) != 0) != o.negated;
}

// What was never written may be moved, computed with and dropped, but nothing may depend on it.
void Machine::must_be_defined(const Warp& w, int lane, const char* what) {
  if (undefined_) note("never written", where(w, lane) + what);
  undefined_ = false;
}

// ---- instructions

void Machine::move(Warp& w, const Instruction& i, uint32_t mask) {
  const Operand &to = i.operands.at(0), &from = i.operands.at(1);
  const int bits = bits_of(i.type);
  each(mask, [&](int lane) {
    if (to.kind == Kind::vector) {
      const uint64_t value = operand(w, from, lane, bits);
      const int part = bits / static_cast<int>(to.parts.size());
      for (size_t n = 0; n < to.parts.size(); ++n) set(w, to.parts[n], lane, low_bits(value >> (part * n), part));
    } else if (from.kind == Kind::vector) {
      const int part = bits / static_cast<int>(from.parts.size());
      uint64_t value = 0;
      for (size_t n = 0; n < from.parts.size(); ++n) value |= operand(w, from.parts[n], lane, part) << (part * n);
      set(w, to, lane, value);
    } else if (i.type == Type::pred) {
      set(w, to, lane, predicate(w, from, lane));
    } else {
      set(w, to, lane, operand(w, from, lane, bits));
      // A copy is as old as its value: compilers copy the operands of a product after its fence, in name only.
      if (from.kind == Kind::reg && to.kind == Kind::reg) w.generic_at[to.reg] = w.generic_at[from.reg];
    }
  });
}

void Machine::compare(Warp& w, const Instruction& i, uint32_t mask) {
  const Operand& to = i.operands.at(0);
  const bool pairs = i.type == Type::bf16x2 || i.type == Type::f16x2;
  const Type one = i.type == Type::bf16x2 ? Type::bf16 : i.type == Type::f16x2 ? Type::f16 : i.type;
  each(mask, [&](int lane) {
    uint64_t a = operand(w, i.operands.at(1), lane, bits_of(i.type)), b = operand(w, i.operands.at(2), lane, bits_of(i.type));
    const bool low = compared(i, one, a, b);
    if (to.kind != Kind::vector) {
      set(w, to, lane, low);
      return;
    }
    set(w, to.parts.at(0), lane, low);  // p|q: of pairs the two halves, otherwise q is not p
    set(w, to.parts.at(1), lane, pairs ? compared(i, one, a >> 16, b >> 16) : !low);
  });
}

// The lanes that an instruction names have to be those that execute it.
void Machine::check_members(Warp& w, const Instruction& i, uint32_t mask) {
  each(mask, [&](int lane) {
    const uint64_t members = operand(w, i.operands.back(), lane, 32);
    must_be_defined(w, lane, "lanes of an instruction");
    if ((members & w.live) != mask) note("divergence", where(w, lane) + "the instruction names other lanes than execute it");
  });
}

void Machine::shuffle(Warp& w, const Instruction& i, uint32_t mask) {
  const Operand& to = i.operands.at(0);
  const Operand& value_to = to.kind == Kind::vector ? to.parts.at(0) : to;
  std::array<uint64_t, kLanes> values{};
  uint32_t unknown = 0;
  each(mask, [&](int lane) {
    values[lane] = operand(w, i.operands.at(1), lane, 32);
    unknown |= static_cast<uint32_t>(undefined_) << lane;
  });
  each(mask, [&](int lane) {
    const int b = static_cast<int>(operand(w, i.operands.at(2), lane, 32) & 31),
              c = static_cast<int>(operand(w, i.operands.at(3), lane, 32));
    const int segment = c >> 8 & 31, clamp = c & 31, minimum = lane & segment, maximum = minimum | (clamp & ~segment);
    int from = lane;
    bool inside = true;
    if (i.modifier == "up")
      from = lane - b, inside = from >= maximum;
    else if (i.modifier == "down")
      from = lane + b, inside = from <= maximum;
    else if (i.modifier == "bfly")
      from = lane ^ b, inside = from <= maximum;
    else
      from = minimum | (b & ~segment), inside = from <= maximum;
    if (!inside) from = lane;
    if (!(mask >> from & 1)) {
      note("divergence", where(w, lane) + "shuffle from lane " + std::to_string(from) + ", which does not take part");
      from = lane;
    }
    must_be_defined(w, lane, "lane of a shuffle");
    undefined_ = unknown >> from & 1;
    set(w, value_to, lane, values[from]);
    undefined_ = false;
    if (to.kind == Kind::vector) set(w, to.parts.at(1), lane, inside);
  });
}

void Machine::vote(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t yes = 0;
  each(mask, [&](int lane) {
    yes |= static_cast<uint32_t>(predicate(w, i.operands.at(1), lane)) << lane;
    must_be_defined(w, lane, "vote");
  });
  uint64_t result = yes;
  if (i.modifier == "all") result = yes == mask;
  if (i.modifier == "any") result = yes != 0;
  if (i.modifier == "uni") result = yes == 0 || yes == mask;
  each(mask, [&](int lane) { set(w, i.operands[0], lane, result); });
}

void Machine::branch(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  each(mask, [&](int lane) {
    if (i.op == Op::bra) {
      w.pc[lane] = i.targets.at(0);
    } else {
      uint64_t index = operand(w, i.operands.at(0), lane, 32);
      must_be_defined(w, lane, "branch");
      if (index >= i.targets.size()) {
        note("out of bounds", where(w, lane) + "branch to target " + std::to_string(index));
        throw Stop{};
      }
      w.pc[lane] = i.targets[index];
    }
  });
  (void)pc;
}

void Machine::execute(Warp& w, const Instruction& i, uint32_t mask, int pc) {
  ++w.serial;
  if (i.op == Op::shfl || i.op == Op::vote || i.op == Op::elect || i.op == Op::bar_warp) check_members(w, i, mask);
  switch (i.op) {
    case Op::nop:
      return;
    case Op::mov:
      return move(w, i, mask);
    case Op::setp:
      return compare(w, i, mask);
    case Op::shfl:
      return shuffle(w, i, mask);
    case Op::vote:
      return vote(w, i, mask);
    case Op::ld:
      return load(w, i, mask);
    case Op::st:
      return store(w, i, mask);
    case Op::atom:
      return atomic(w, i, mask);
    case Op::fence:
      return fence(w, i, mask);
    case Op::fence_proxy:
      return proxy_fence(w, mask);
    case Op::cp_async:
      return copy(w, i, mask);
    case Op::cp_async_wait:
      return copy_wait(w, i, mask);
    case Op::bulk_tensor:
      return bulk_tensor(w, i, mask);
    case Op::mbarrier_init:
    case Op::mbarrier_inval:
    case Op::mbarrier_arrive:
    case Op::mbarrier_wait:
      return mbarrier(w, i, mask);
    case Op::ldmatrix:
      return ldmatrix(w, i);
    case Op::stmatrix:
      return stmatrix(w, i);
    case Op::movmatrix:
      return movmatrix(w, i);
    case Op::mma:
      return mma(w, i);
    case Op::wgmma_fence:
      w.fenced = w.serial;
      return;
    case Op::wgmma_commit:
      ++w.open_group;
      return;
    case Op::wgmma_wait:
      return wgmma_wait(w, i);
    case Op::bar_warp:
      if (mask != w.live) throw Unsupported("by part of a warp: " + i.text);
      return synchronise(w);
    case Op::cp_async_commit:
      each(mask, [&](int lane) {
        w.copies[lane].push_back(std::move(w.open_copies[lane]));
        w.open_copies[lane] = CopyGroup{};
      });
      return;
    case Op::elect: {
      const int leader = __builtin_ctz(mask);
      const Operand& to = i.operands.at(0);
      each(mask, [&](int lane) {
        set(w, to.parts.at(0), lane, leader);
        set(w, to.parts.at(1), lane, lane == leader);
      });
      return;
    }
    case Op::selp:
      each(mask, [&](int lane) {
        const bool first = predicate(w, i.operands.at(3), lane);  // what is not chosen does not matter
        set(w, i.operands[0], lane, operand(w, i.operands.at(first ? 1 : 2), lane, bits_of(i.type)));
      });
      return;
    case Op::cvt:
      each(mask, [&](int lane) {
        const int bits = bits_of(i.source);
        uint64_t b = i.operands.size() > 2 ? operand(w, i.operands[2], lane, bits) : 0;
        uint64_t value = converted(i, operand(w, i.operands.at(1), lane, bits), b);
        if (is_signed(i.type)) value = static_cast<uint64_t>(sign_extended(value, bits_of(i.type)));
        set(w, i.operands[0], lane, value);
      });
      return;
    case Op::cvta:
      each(mask, [&](int lane) {
        uint64_t window = i.space == Space::shared ? kSharedWindow : i.space == Space::param ? kParamWindow : 0;
        uint64_t value = operand(w, i.operands.at(1), lane, 64);
        set(w, i.operands[0], lane, i.uniform ? value - window : value + window);
      });
      return;
    case Op::lop3:
      each(mask, [&](int lane) {
        uint64_t x[3], out = 0, table = i.operands.at(4).value;
        for (int n = 0; n < 3; ++n) x[n] = operand(w, i.operands.at(n + 1), lane, 32);
        for (int n = 0; n < 8; ++n)
          if (table >> n & 1) out |= (n & 4 ? x[0] : ~x[0]) & (n & 2 ? x[1] : ~x[1]) & (n & 1 ? x[2] : ~x[2]);
        set(w, i.operands[0], lane, out);
      });
      return;
    case Op::bfi:
      each(mask, [&](int lane) {
        const int bits = bits_of(i.type);
        uint64_t x = operand(w, i.operands.at(1), lane, bits), y = operand(w, i.operands.at(2), lane, bits);
        uint64_t at = operand(w, i.operands.at(3), lane, 32) & 0xff, length = operand(w, i.operands.at(4), lane, 32) & 0xff;
        uint64_t place = at >= 64 ? 0 : low_bits(~uint64_t{0}, static_cast<int>(std::min<uint64_t>(length, 64))) << at;
        set(w, i.operands[0], lane, (y & ~place) | ((at >= 64 ? 0 : x << at) & place));
      });
      return;
    default:
      break;
  }
  if (i.type == Type::pred) {
    each(mask, [&](int lane) {
      const bool a = predicate(w, i.operands.at(1), lane), b = i.operands.size() > 2 && predicate(w, i.operands[2], lane);
      switch (i.op) {
        case Op::and_:
          return set(w, i.operands[0], lane, a && b);
        case Op::or_:
          return set(w, i.operands[0], lane, a || b);
        case Op::xor_:
          return set(w, i.operands[0], lane, a != b);
        case Op::not_:
          return set(w, i.operands[0], lane, !a);
        default:
          throw Unsupported(i.text);
      }
    });
    return;
  }
  std::array<int, 3> bits{};
  for (size_t n = 0; n < 3; ++n) bits[n] = operand_bits(i, n);
  const size_t count = i.operands.size() - 1;
  each(mask, [&](int lane) {
    std::array<uint64_t, 3> x{};
    for (size_t n = 0; n < count && n < 3; ++n) x[n] = operand(w, i.operands[n + 1], lane, bits[n]);
    set(w, i.operands[0], lane, scalar(i, x[0], x[1], x[2]));
  });
  (void)pc;
}

}  // namespace ptx
