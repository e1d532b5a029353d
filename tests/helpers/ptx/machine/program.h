// SPDX-License-Identifier: Apache-2.0
// A kernel as instructions with fields: what the text of an instruction says, decoded once.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Type : uint8_t { none, pred, b8, b16, b32, b64, u8, u16, u32, u64, s8, s16, s32, s64, f16, bf16, f32, f64, f16x2, bf16x2, tf32 };
int bits_of(Type type);
bool is_signed(Type type);
bool is_float(Type type);

enum class Op : uint8_t {
  abs,
  add,
  and_,
  atom,
  bar,
  bar_warp,
  bfe,
  bfi,
  bra,
  brx,
  bulk_tensor,
  clz,
  cp_async,
  cp_async_commit,
  cp_async_wait,
  cvt,
  cvta,
  div,
  elect,
  ex2,
  exit,
  fence,
  fence_proxy,
  fma,
  ld,
  ldmatrix,
  lg2,
  lop3,
  mad,
  max,
  mbarrier_arrive,
  mbarrier_init,
  mbarrier_inval,
  mbarrier_wait,
  min,
  mma,
  mov,
  movmatrix,
  mul,
  neg,
  nop,
  not_,
  or_,
  popc,
  prmt,
  rcp,
  rem,
  rsqrt,
  selp,
  setp,
  shf,
  shfl,
  shl,
  shr,
  sqrt,
  st,
  stmatrix,
  sub,
  vote,
  wgmma,
  wgmma_commit,
  wgmma_fence,
  wgmma_wait,
  xor_
};
enum class Space : uint8_t { generic, global, shared, param };
enum class Order : uint8_t { weak, relaxed, acquire, release, acq_rel };
enum class Scope : uint8_t { cta, gpu };

enum class Kind : uint8_t { none, sink, reg, special, immediate, vector, address };
enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid
};

struct Operand {
  Kind kind = Kind::none;
  bool negated = false;        // of a predicate
  int reg = -1;                // register, or base of an address (-1: none); number of a Special
  uint64_t value = 0;          // of an immediate, or offset of an address
  std::vector<Operand> parts;  // of a vector, of p|q, or the coordinates of a tensor address
};

struct Instruction {
  Op op = Op::nop;
  Type type = Type::none, source = Type::none;  // `source` of cvt
  Space space = Space::generic;
  Order order = Order::weak;
  Scope scope = Scope::gpu;
  std::string modifier;  // comparison, rounding, mode, atomic operation: what is left to say
  bool wide = false, high = false, trans = false, uniform = false, first_level = true;
  bool flushes = false;     // .ftz: subnormal operands and results are zero
  bool propagates = false;  // .NaN of min and max
  bool constant = false;    // .nc: of memory that nobody writes
  bool result = true;       // of an atomic operation
  bool collective = false;  // executed by all lanes of a warp together
  int vector = 1, m = 0, n = 0, k = 0;
  int predicate = -1;
  bool unless = false;
  std::vector<Operand> operands;
  std::vector<int> targets;  // of branches
  std::string text;
  int line = 0;
};

struct Program {
  std::string name;
  std::vector<int> widths;  // of the registers in bits, 1 for predicates
  std::vector<Instruction> instructions;
  int shared = 0;  // bytes of static shared memory
};

// `mnemonic` with dots, as written; operands, targets and predicate are filled in already.
void decode(Instruction& instruction, const std::string& mnemonic);

}  // namespace ptx
