// SPDX-License-Identifier: Apache-2.0
// Numbers as bit patterns: what PTX registers hold.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

inline constexpr uint32_t kNaN = 0x7fffffff;

inline uint64_t low_bits(uint64_t value, int bits) {
  return bits >= 64 ? value : value & ((uint64_t{1} << bits) - 1);
}
inline int64_t sign_extended(uint64_t value, int bits) {
  return bits >= 64 ? static_cast<int64_t>(value) : static_cast<int64_t>(value << (64 - bits)) >> (64 - bits);
}
inline float as_float(uint64_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits));
}
inline double as_double(uint64_t bits) {
  return std::bit_cast<double>(bits);
}
inline uint64_t bits_of(float value) {
  return std::isnan(value) ? kNaN : std::bit_cast<uint32_t>(value);
}
inline uint64_t bits_of(double value) {
  return std::bit_cast<uint64_t>(value);
}

inline float from_bf16(uint64_t bits) {
  return as_float((bits & 0xffff) << 16);
}
inline uint16_t to_bf16(float value) {  // to nearest, ties to even
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t to_bf16(double value) {
  // First to the odd one of the two floats next to it, which the second rounding cannot take for a tie.
  float near = static_cast<float>(value);
  if (std::isnan(value) || near == value) return to_bf16(near);
  uint32_t bits = std::bit_cast<uint32_t>(near);
  if (!(bits & 1)) bits += std::abs(static_cast<double>(near)) < std::abs(value) ? 1 : -1;
  return to_bf16(std::bit_cast<float>(bits));
}
// a * b + c of numbers of 16 bits, rounded to odd: rounding it once more is as good as rounding once.
inline double fused_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;  // the product is exact
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (!std::isfinite(sum) || error == 0 || (bits & 1)) return sum;
  return std::bit_cast<double>(bits + ((error > 0) == (sum > 0) ? 1 : -1));
}
// A whole number as a double that may be rounded once more: exact up to 53 bits, then to odd.
inline double whole_to_odd(uint64_t magnitude) {
  if (magnitude >> 53) magnitude = (magnitude & ~uint64_t{0x7ff}) | uint64_t{(magnitude & 0x7ff) != 0} << 11;
  return static_cast<double>(magnitude);
}

inline float from_f16(uint64_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits)));
}
inline uint16_t to_f16(double value) {
  return std::isnan(value) ? 0x7fff : std::bit_cast<uint16_t>(static_cast<_Float16>(value));
}
// What a matrix unit reads of a 32-bit operand: the low 13 bits are ignored, not rounded.
inline float truncated_tf32(uint64_t bits) {
  return as_float(bits & 0xffffe000);
}
inline uint32_t rounded_tf32(uint64_t bits) {  // cvt.rna: to nearest, ties away from zero
  if (std::isnan(as_float(bits))) return kNaN;
  return static_cast<uint32_t>(bits + 0x1000) & 0xffffe000;
}

}  // namespace ptx
