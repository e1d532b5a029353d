#include "program.h"

#include <algorithm>
#include <map>
#include <optional>

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
  for (const char* name : {"tf32", "bf16", "f16", "f32"})
    if (w.has(name)) {
      i.source = kTypes.at(name);
      break;
    }
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
    i.scope = w.has("cta") ? Scope::cta : Scope::gpu;
    return Op::fence;
  }
  if (p[0] == "cp" && second == "async") {
    if (w.has("bulk")) {
      if (!w.has("tensor") || !w.has("global") || !w.starts("mbarrier::complete_tx") || p.back() == "im2col") throw Unsupported(i.text);
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
    if (!w.has("m8n8") || !w.has("b16")) throw Unsupported(i.text);
    return p[0] == "ldmatrix" ? Op::ldmatrix : p[0] == "stmatrix" ? Op::stmatrix : Op::movmatrix;
  }
  if (p[0] == "atom" || p[0] == "red") {
    for (const char* name : {"add", "cas", "exch", "min", "max", "inc", "or", "and"})
      if (w.has(name)) i.modifier = name;
    if (i.order == Order::weak) i.order = Order::relaxed;
    return Op::atom;
  }
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
  for (const auto& word : w.words)
    if (auto found = kTypes.find(word); found != kTypes.end()) {
      if (i.type == Type::none) i.type = found->second;
      i.source = found->second;  // the last one
    }
  memory_fields(i, w);
  if (auto op = long_name(w, i)) {
    i.op = *op;
    if (i.op == Op::atom) i.type = i.source;
    return;
  }
  auto found = kOps.find(w.words[0]);
  if (found == kOps.end()) throw Unsupported("unknown instruction: " + i.text);
  i.op = found->second;
  i.wide = w.has("wide");
  i.high = w.has("hi");
  i.uniform = w.has("uni");
  if (i.op != Op::cvt) i.type = i.source;
  if (i.op == Op::setp) i.modifier = w.words.at(1);
  if (i.op == Op::setp && w.words.size() > (w.has("ftz") ? 4u : 3u)) throw Unsupported(i.text);  // with a boolean operation
  if (i.op == Op::shf) i.modifier = w.words.at(1) + (w.has("wrap") ? "wrap" : "clamp");
  if (i.op == Op::cvt)
    for (const char* rounding : {"rn", "rna", "rni", "rz", "rzi", "rmi", "rpi", "rm", "rp"})
      if (w.has(rounding)) i.modifier = rounding;
  if (i.op == Op::cvta) {
    i.uniform = w.has("to");
    if (i.space == Space::generic) throw Unsupported(i.text);
  }
  if ((w.has("sat") || w.has("cc") || w.has("relu")) && i.op != Op::nop) throw Unsupported(i.text);
}

}  // namespace ptx
