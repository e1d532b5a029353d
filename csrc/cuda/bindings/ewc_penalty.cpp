// SPDX-License-Identifier: Apache-2.0
// The ops ewc_penalty, l1_penalty and factored_penalty: find the table of an earlier call with the same tensors, or make one.
//
// Every training step calls it with the same hundreds of tensors. They are compared in Python's own lists: converting those to C++ vectors
// would cost more than the launch.
#include "ewc_penalty.h"

#include <torch/csrc/autograd/python_variable.h>

#include <array>
#include <list>

#include "factored_table.h"
#include "kept.h"
#include "penalty_table.h"

namespace fe::cuda {
namespace {

namespace py = pybind11;

constexpr size_t KEPT = 16;  // tables; a training loop needs one

// What a table depends on of one tensor. Those of a table have at most two dimensions, so others equal none of them.
struct Seen {
  const void* data = nullptr;
  int64_t sizes[2] = {}, strides[2] = {};
  at::ScalarType dtype = at::kFloat;
  int8_t dim = -1;  // no tensor

  Seen() = default;
  explicit Seen(const at::Tensor& t) : data(t.const_data_ptr()), dtype(t.scalar_type()), dim(int8_t(t.dim())) {
    for (int i = 0; i < std::min<int>(dim, 2); ++i) sizes[i] = t.size(i), strides[i] = t.stride(i);
  }
  bool operator==(const Seen& o) const {
    return data == o.data && dim == o.dim && dtype == o.dtype && sizes[0] == o.sizes[0] && sizes[1] == o.sizes[1] &&
           strides[0] == o.strides[0] && strides[1] == o.strides[1];
  }
};

struct Call {
  py::list lists[4];  // fishers, lora_as, lora_bs, scales
  py::list factors;
  std::vector<bool> needs;

  std::vector<double> numbers() const {
    std::vector<double> values;
    values.reserve(factors.size());
    for (const py::handle factor : factors) values.push_back(factor.cast<double>());
    return values;
  }
  std::array<size_t, 4> lengths() const { return {lists[0].size(), lists[1].size(), lists[2].size(), lists[3].size()}; }
  template <class F>
  bool each(const F& f) const {
    for (const py::list& list : lists)
      for (const py::handle item : list)
        if (!f(item.is_none() ? nullptr : &THPVariable_Unpack(item.ptr()))) return false;
    return true;
  }
};

template <class Table>
struct Entry {
  std::vector<Seen> seen;
  std::array<size_t, 4> lengths;  // of the lists
  std::vector<bool> needs;
  at::Float32MatmulPrecision precision;
  Table table;

  static PenaltyArguments arguments(const Call& call) {
    PenaltyArguments a;
    Tensors* to[] = {&a.fishers, &a.lora_as, &a.lora_bs, &a.scales};
    for (int i = 0; i < 4; ++i)
      for (const py::handle item : call.lists[i]) to[i]->push_back(item.is_none() ? at::Tensor() : THPVariable_Unpack(item.ptr()));
    a.factors = call.numbers();
    a.needs = call.needs;
    return a;
  }
  explicit Entry(const Call& call)
      : lengths(call.lengths()), needs(call.needs), precision(at::globalContext().float32MatmulPrecision()), table(arguments(call)) {
    call.each([&](const at::Tensor* t) { return seen.push_back(t ? Seen(*t) : Seen()), true; });
  }

  bool serves(const Call& call) const {
    if (needs != call.needs || precision != at::globalContext().float32MatmulPrecision()) return false;
    size_t i = 0;
    return lengths == call.lengths() && call.factors.size() == call.lists[1].size() &&
           call.each([&](const at::Tensor* t) { return seen[i++] == (t ? Seen(*t) : Seen()); });
  }
};

// The most recently used first. Calls hold the interpreter's lock, but for a moment while they make an entry: hence shared ownership.
template <class Table>
std::list<std::shared_ptr<Entry<Table>>>& entries() {
  static auto* kept = new std::list<std::shared_ptr<Entry<Table>>>;  // never destroyed: CUDA is gone by the time static objects are
  return *kept;
}

template <class Table>
std::shared_ptr<Entry<Table>> entry_of(const Call& call) {
  auto& kept = entries<Table>();
  for (auto entry = kept.begin(); entry != kept.end(); ++entry) {
    if (!(*entry)->serves(call)) continue;
    kept.splice(kept.begin(), kept, entry);
    return kept.front();
  }
  auto made = std::make_shared<Entry<Table>>(call);
  if (made->table.once()) return made;  // its memory is the graph's
  kept.push_front(made);
  while (kept.size() > KEPT) kept.pop_back();
  return made;
}

template <class Table>
std::tuple<at::Tensor, at::Tensor> penalty(py::list fishers, py::list lora_as, py::list lora_bs, py::list scales, py::list factors,
                                           double ewc_lambda, const std::vector<bool>& needs) {
  const Call call{{std::move(fishers), std::move(lora_as), std::move(lora_bs), std::move(scales)}, std::move(factors), needs};
  return entry_of<Table>(call)->table.run(call.numbers(), ewc_lambda);
}

// As a Python object: with the factors that it was made with.
struct PreparedCall {
  PenaltyTable table;
  std::vector<double> factors;
};

}  // namespace

void bind_ewc_penalty(py::module& m) {
  py::class_<PreparedCall>(m, "PenaltyTable",
                           "The table of one call of ewc_penalty in device memory; valid while its tensors stay where they are.")
      .def(py::init([](const Tensors& fishers, const Tensors& lora_as, const Tensors& lora_bs, const OptionalTensors& scales,
                       const std::vector<double>& factors, const std::vector<bool>& needs) {
             PenaltyArguments a{fishers, lora_as, lora_bs, {}, factors, needs};
             for (const auto& scale : scales) a.scales.push_back(scale.value_or(at::Tensor()));
             return PreparedCall{PenaltyTable(a), factors};
           }),
           py::arg("fishers"), py::arg("lora_as"), py::arg("lora_bs"), py::arg("scales"), py::arg("scale_factors"), py::arg("needs"))
      .def(
          "run", [](PreparedCall& call, double ewc_lambda) { return call.table.run(call.factors, ewc_lambda); }, py::arg("ewc_lambda"),
          "Penalty (0-d) and flat gradients, fp32.")
      .def_property_readonly("items", [](const PreparedCall& call) { return call.table.items(); }, "Thread blocks of a launch.");
  m.def("ewc_penalty", &penalty<PenaltyTable>);
  m.def("l1_penalty", &penalty<L1Table>);
  m.def("factored_penalty", &penalty<FactoredTable>);
  m.def(
      "forget_penalty_tables",
      [] {
        entries<PenaltyTable>().clear();
        entries<L1Table>().clear();
        entries<FactoredTable>().clear();
        kept::forget();
      },
      "Frees the tables that are kept for calls with the same tensors, and those of captured graphs.");
#ifdef FE_EMULATED
  m.def("pretend", [](uintptr_t stream, bool capturing) {
    kept::pretended().stream = reinterpret_cast<cudaStream_t>(stream);
    kept::pretended().capturing = capturing;
  });
  m.def("uses", [] { return kept::pretended().uses; });
#endif
}

}  // namespace fe::cuda
