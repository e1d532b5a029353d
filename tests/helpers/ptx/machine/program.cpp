// SPDX-License-Identifier: Apache-2.0
#include "program.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <optional>
#include <sstream>

namespace ptx {
namespace {

const std::map<std::string, Type> kTypes = {
    {"pred", Type::pred}, {"b8", Type::b8},   {"b16", Type::b16},     {"b32", Type::b32},       {"b64", Type::b64},
    {"u8", Type::u8},     {"u16", Type::u16}, {"u32", Type::u32},     {"u64", Type::u64},       {"s8", Type::s8},
    {"s16", Type::s16},   {"s32", Type::s32}, {"s64", Type::s64},     {"f16", Type::f16},       {"bf16", Type::bf16},
    {"f32", Type::f32},   {"f64", Type::f64}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2}, {"tf32", Type::tf32},
};
const std::map<std::string, Op> kOps = {
    {"abs", Op::abs},      {"add", Op::add},       {"and", Op::and_},       {"bfe", Op::bfe},
    {"bfi", Op::bfi},      {"bra", Op::bra},       {"clz", Op::clz},        {"cvta", Op::cvta},
    {"cvt", Op::cvt},      {"div", Op::div},       {"ex2", Op::ex2},        {"exit", Op::exit},
    {"ret", Op::exit},     {"fma", Op::fma},       {"ld", Op::ld},          {"lg2", Op::lg2},
    {"lop3", Op::lop3},    {"mad", Op::mad},       {"max", Op::max},        {"min", Op::min},
    {"mov", Op::mov},      {"mul", Op::mul},       {"neg", Op::neg},        {"not", Op::not_},
    {"or", Op::or_},       {"popc", Op::popc},     {"prmt", Op::prmt},      {"rcp", Op::rcp},
    {"rem", Op::rem},      {"rsqrt", Op::rsqrt},   {"selp", Op::selp},      {"setp", Op::setp},
    {"shl", Op::shl},      {"shr", Op::shr},       {"sqrt", Op::sqrt},      {"st", Op::st},
    {"sub", Op::sub},      {"xor", Op::xor_},      {"shf", Op::shf},        {"nanosleep", Op::nop},
    {"prefetch", Op::nop}, {"prefetchu", Op::nop}, {"setmaxnreg", Op::nop}, {"griddepcontrol", Op::nop},
    {"pragma", Op::nop},
};

// The words that the machine knows of every instruction, besides types. Any other changes its meaning.
const std::map<std::string, std::string> kWords = {
    {"abs", "ftz"},
    {"add", "rn ftz"},
    {"and", ""},
    {"atom", "relaxed acquire release acq_rel cta gpu sys global shared shared::cta add cas exch min max inc or and"},
    {"bar", "sync arrive warp cta aligned"},
    {"barrier", "sync arrive cta aligned"},
    {"bfe", ""},
    {"bfi", ""},
    {"bra", "uni"},
    {"brx", "idx uni"},
    {"clz", ""},
    {"cp.async", "ca cg shared shared::cta global L2::64B L2::128B L2::256B"},
    {"cp.async.bulk", "tensor 1d 2d 3d 4d 5d tile shared::cluster shared::cta global mbarrier::complete_tx::bytes L2::cache_hint"},
    {"cp.async.commit_group", ""},
    {"cp.async.wait_all", ""},
    {"cp.async.wait_group", ""},
    {"cvt", "rn rna rni rzi rmi rpi ftz"},
    {"cvta", "to global shared shared::cta param"},
    {"div", "rn approx full ftz"},
    {"elect", "sync"},
    {"ex2", "approx ftz"},
    {"exit", "uni"},
    {"fence", "sc acq_rel cta gpu sys"},
    {"fence.mbarrier_init", "release cluster"},
    {"fence.proxy", "async shared::cta"},
    {"fma", "rn ftz"},
    {"griddepcontrol", "*"},
    {"ld", "weak relaxed acquire volatile cta gpu sys global shared shared::cta param nc v2 v4 v8 ca cg cs lu cv L1::* L2::*"},
    {"ldmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"},
    {"lg2", "approx ftz"},
    {"lop3", ""},
    {"mad", "lo hi wide rn ftz"},
    {"max", "ftz NaN"},
    {"mbarrier.arrive", "expect_tx release cta shared shared::cta"},
    {"mbarrier.init", "shared shared::cta"},
    {"mbarrier.inval", "shared shared::cta"},
    {"mbarrier.test_wait", "parity acquire cta shared shared::cta"},
    {"mbarrier.try_wait", "parity acquire cta shared shared::cta"},
    {"membar", "cta gl sys"},
    {"min", "ftz NaN"},
    {"mma", "sync aligned row col m16n8k4 m16n8k8 m16n8k16"},
    {"mov", ""},
    {"movmatrix", "sync aligned m8n8 trans"},
    {"mul", "lo hi wide rn ftz"},
    {"nanosleep", ""},
    {"neg", "ftz"},
    {"not", ""},
    {"or", ""},
    {"popc", ""},
    {"pragma", "*"},
    {"prefetch", "*"},
    {"prefetchu", "*"},
    {"prmt", ""},
    {"rcp", "rn approx ftz"},
    {"red", "relaxed release cta gpu sys global shared shared::cta add min max inc or and"},
    {"rem", ""},
    {"ret", "uni"},
    {"rsqrt", "approx ftz"},
    {"selp", ""},
    {"setmaxnreg", "*"},
    {"setp", "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan ftz"},
    {"shf", "l r wrap clamp"},
    {"shfl", "sync up down bfly idx"},
    {"shl", ""},
    {"shr", ""},
    {"sqrt", "rn approx ftz"},
    {"st", "weak relaxed release volatile cta gpu sys global shared shared::cta v2 v4 v8 wb cg cs wt L1::* L2::*"},
    {"stmatrix", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"},
    {"sub", "rn ftz"},
    {"vote", "sync all any uni ballot"},
    {"wgmma.commit_group", "sync aligned"},
    {"wgmma.fence", "sync aligned"},
    {"wgmma.mma_async", "sync aligned m64n*"},
    {"wgmma.wait_group", "sync aligned"},
    {"xor", ""},
};

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '.')
      parts.emplace_back();
    else
      parts.back() += text[i];
  }
  return parts;
}

struct Words {
  std::vector<std::string> words;
  bool has(const std::string& word) const { return std::find(words.begin(), words.end(), word) != words.end(); }
  bool starts(const std::string& start) const {
    return std::any_of(words.begin(), words.end(), [&](const std::string& w) { return w.rfind(start, 0) == 0; });
  }
};

// Throws if a word of the mnemonic is none that the machine knows.
void check_words(const Instruction& i, const Words& w) {
  size_t named = 0;  // words of the longest name in the table
  const std::string* entry = nullptr;
  std::string name;
  for (size_t n = 0; n < w.words.size(); ++n) {
    name += (n ? "." : "") + w.words[n];
    if (auto found = kWords.find(name); found != kWords.end()) entry = &found->second, named = n + 1;
  }
  if (!entry) throw Unsupported("unknown instruction: " + i.text);
  std::istringstream stream(*entry);
  const std::vector<std::string> known{std::istream_iterator<std::string>(stream), {}};
  for (size_t n = named; n < w.words.size(); ++n) {
    const auto& word = w.words[n];
    const auto is = [&](const std::string& pattern) {
      if (pattern.back() == '*') return word.rfind(pattern.substr(0, pattern.size() - 1), 0) == 0;
      return word == pattern;
    };
    if (!kTypes.count(word) && std::none_of(known.begin(), known.end(), is)) throw Unsupported("." + word + " of " + i.text);
  }
}

void memory_fields(Instruction& i, const Words& w) {
  if (w.has("global")) i.space = Space::global;
  if (w.starts("shared")) i.space = Space::shared;
  if (w.has("param")) i.space = Space::param;
  for (auto [word, order] : std::initializer_list<std::pair<const char*, Order>>{{"relaxed", Order::relaxed},
                                                                                 {"volatile", Order::relaxed},
                                                                                 {"acquire", Order::acquire},
                                                                                 {"release", Order::release},
                                                                                 {"acq_rel", Order::acq_rel}})
    if (w.has(word)) i.order = order;
  if (w.has("cta")) i.scope = Scope::cta;
  i.vector = w.has("v8") ? 8 : w.has("v4") ? 4 : w.has("v2") ? 2 : 1;
  i.first_level =
      !(w.has("cg") || w.has("cs") || w.has("cv") || w.has("volatile") || w.starts("L1::no_allocate")) && i.order == Order::weak;
}

void matrix_shape(Instruction& i, const Words& w) {
  for (const auto& word : w.words) {
    int m = 0, n = 0, k = 0;
    if (std::sscanf(word.c_str(), "m%dn%dk%d", &m, &n, &k) == 3) i.m = m, i.n = n, i.k = k;
  }
  i.source = Type::none;  // of the operands, which are of one type; results are f32
  std::vector<std::string> types;
  for (const auto& word : w.words)
    if (kTypes.count(word)) types.push_back(word);
  if (types.size() < 3 || types[0] != "f32" || types[1] != types[2] || (types.size() > 3 && types[3] != "f32")) throw Unsupported(i.text);
  for (const char* name : {"tf32", "bf16", "f16"})
    if (types[1] == name) i.source = kTypes.at(name);
  if (i.source == Type::none || !i.m) throw Unsupported(i.text);
  i.collective = true;
}

// Instructions named by more than their first word. Nothing if it is not one of them.
std::optional<Op> long_name(const Words& w, Instruction& i) {
  const auto& p = w.words;
  auto second = p.size() > 1 ? p[1] : "";
  if (p[0] == "bar" || p[0] == "barrier") {
    i.collective = true;
    if (second == "warp") return Op::bar_warp;
    if (second == "sync" || (second == "cta" && w.has("sync"))) return Op::bar;
    if (second == "arrive" || w.has("arrive")) {
      i.modifier = "arrive";
      return Op::bar;
    }
    throw Unsupported(i.text);
  }
  if (p[0] == "fence" || p[0] == "membar") {
    if (second == "proxy") return Op::fence_proxy;
    if (second == "mbarrier_init") return Op::nop;  // for other blocks of a cluster
    i.scope = w.has("cta") ? Scope::cta : Scope::gpu;
    i.modifier = p[0] == "membar" || w.has("sc") ? "sc" : "";
    return Op::fence;
  }
  if (p[0] == "cp" && second == "async") {
    if (w.has("bulk")) {
      // "global" last but for the barrier: towards shared memory.
      if (!w.has("tensor") || !w.has("global") || !w.starts("mbarrier::complete_tx")) throw Unsupported(i.text);
      return Op::bulk_tensor;
    }
    if (w.has("commit_group")) return Op::cp_async_commit;
    if (w.has("wait_group") || w.has("wait_all")) {
      i.modifier = w.has("wait_all") ? "all" : "";
      return Op::cp_async_wait;
    }
    i.first_level = w.has("ca");
    return Op::cp_async;
  }
  if (p[0] == "mbarrier") {
    if (second == "init") return Op::mbarrier_init;
    if (second == "inval") return Op::mbarrier_inval;
    if (second == "arrive") {
      i.modifier = w.has("expect_tx") ? "expect_tx" : "";
      return Op::mbarrier_arrive;
    }
    if ((second == "try_wait" || second == "test_wait") && w.has("parity")) return Op::mbarrier_wait;
    throw Unsupported(i.text);
  }
  if (p[0] == "wgmma") {
    i.collective = true;
    if (second == "fence") return Op::wgmma_fence;
    if (second == "commit_group") return Op::wgmma_commit;
    if (second == "wait_group") return Op::wgmma_wait;
    matrix_shape(i, w);
    const int count = i.operands.empty() ? 0 : static_cast<int>(i.operands[0].parts.size());
    if (i.m != 64 || i.n % 8 || i.n < 8 || i.n > 256 || i.k * bits_of(i.source) != 256 || count != i.n / 2 || i.predicate >= 0)
      throw Unsupported(i.text);
    return Op::wgmma;
  }
  if (p[0] == "mma") {
    matrix_shape(i, w);
    return Op::mma;
  }
  if (p[0] == "ldmatrix" || p[0] == "stmatrix" || p[0] == "movmatrix") {
    i.collective = true;
    i.space = Space::shared;
    i.vector = w.has("x4") ? 4 : w.has("x2") ? 2 : 1;
    i.trans = w.has("trans");
    if (!w.has("m8n8") || !w.has("b16") || (p[0] == "movmatrix" && !i.trans)) throw Unsupported(i.text);
    return p[0] == "ldmatrix" ? Op::ldmatrix : p[0] == "stmatrix" ? Op::stmatrix : Op::movmatrix;
  }
  if (p[0] == "atom" || p[0] == "red") {
    for (const char* name : {"add", "cas", "exch", "min", "max", "inc", "or", "and"})
      if (w.has(name)) i.modifier = name;
    i.result = p[0] == "atom";
    if (i.order == Order::weak) i.order = Order::relaxed;
    return Op::atom;
  }
  if ((p[0] == "shfl" || p[0] == "vote") && (second != "sync" || p.size() < 4)) throw Unsupported(i.text);
  if (p[0] == "shfl") {
    i.collective = true;
    i.modifier = p.at(2);
    return Op::shfl;
  }
  if (p[0] == "vote") {
    i.collective = true;
    i.modifier = p.at(2);
    return Op::vote;
  }
  if (p[0] == "elect") {
    i.collective = true;
    return Op::elect;
  }
  if (p[0] == "brx") return Op::brx;
  return std::nullopt;
}

}  // namespace

int bits_of(Type type) {
  switch (type) {
    case Type::pred:
      return 1;
    case Type::b8:
    case Type::u8:
    case Type::s8:
      return 8;
    case Type::b16:
    case Type::u16:
    case Type::s16:
    case Type::f16:
    case Type::bf16:
      return 16;
    case Type::b64:
    case Type::u64:
    case Type::s64:
    case Type::f64:
      return 64;
    default:
      return 32;
  }
}
bool is_signed(Type type) {
  return type == Type::s8 || type == Type::s16 || type == Type::s32 || type == Type::s64;
}
bool is_float(Type type) {
  return type == Type::f16 || type == Type::bf16 || type == Type::f32 || type == Type::f64;
}

void decode(Instruction& i, const std::string& mnemonic) {
  Words w{split(mnemonic)};
  check_words(i, w);
  for (const auto& word : w.words)
    if (auto found = kTypes.find(word); found != kTypes.end()) {
      if (i.type == Type::none) i.type = found->second;
      i.source = found->second;  // the last one
    }
  memory_fields(i, w);
  if (auto op = long_name(w, i)) {
    i.op = *op;
    if (i.op == Op::atom) {
      i.type = i.source;
      const bool whole = i.modifier == "add" && (i.type == Type::f32 || i.type == Type::f64);
      if (i.modifier.empty() || (!whole && (is_float(i.type) || i.type == Type::f16x2 || i.type == Type::bf16x2)))
        throw Unsupported(i.text);
    }
    return;
  }
  auto found = kOps.find(w.words[0]);
  if (found == kOps.end()) throw Unsupported("unknown instruction: " + i.text);
  i.op = found->second;
  i.wide = w.has("wide");
  i.high = w.has("hi");
  i.uniform = w.has("uni");
  i.flushes = w.has("ftz");
  i.propagates = w.has("NaN");
  i.constant = w.has("nc");
  if (i.op != Op::cvt) i.type = i.source;
  if (i.op == Op::setp) i.modifier = w.words.at(1);
  if (i.op == Op::setp && w.words.size() > (w.has("ftz") ? 4u : 3u)) throw Unsupported(i.text);  // with a boolean operation
  if (i.op == Op::shf) i.modifier = w.words.at(1) + (w.has("wrap") ? "wrap" : "clamp");
  if (i.op == Op::cvt)
    for (const char* rounding : {"rn", "rna", "rni", "rzi", "rmi", "rpi"})
      if (w.has(rounding)) i.modifier = rounding;
  if (i.op == Op::cvta) {
    i.uniform = w.has("to");
    if (i.space == Space::generic) throw Unsupported(i.text);
  }
  if ((i.op == Op::min || i.op == Op::max) && i.operands.size() != 3) throw Unsupported(i.text);  // of three numbers
  if (i.op == Op::st && bits_of(i.type) * i.vector < 16) throw Unsupported("memory is watched in units of two bytes: " + i.text);
}

}  // namespace ptx
