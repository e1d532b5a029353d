// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <bit>

#include "lora_linear.h"
#include "plan.h"

namespace fe::plans {
namespace {

namespace py = pybind11;

using Tensors = std::vector<std::optional<at::Tensor>>;
using Sizes = std::vector<int64_t>;
using PyView = std::tuple<int64_t, bool, int64_t, Sizes, Sizes>;
using PyPlace = std::tuple<int64_t, int64_t>;

View view_of(const PyView& v) {
  return {std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v), std::get<4>(v)};
}
Place place_of(const PyPlace& p) {
  return {std::get<0>(p), std::get<1>(p)};
}

Arguments arguments(const Tensors& tensors, std::vector<int64_t> decisions, std::vector<double> numbers) {
  Arguments made{{}, std::move(decisions), std::move(numbers)};
  made.tensors.reserve(tensors.size());
  for (const auto& t : tensors) made.tensors.push_back(t.value_or(at::Tensor()));
  return made;
}

void add_call(Plan& plan, const std::string& name, const std::string& overload, const py::list& values,
              const std::vector<std::tuple<size_t, int64_t, PyView>>& tensors, bool makes) {
  Call call{c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str()), {}, {}, makes};
  const auto& expected = call.operation.schema().arguments();
  for (size_t i = 0; i < values.size(); ++i)
    call.arguments.push_back(values[i].is_none() ? c10::IValue() : torch::jit::toIValue(values[i], expected[i].type()));
  for (const auto& [argument, element, view] : tensors) call.tensors.push_back({argument, element, view_of(view)});
  plan.steps.emplace_back(std::move(call));
}

using Optionals = recorded::Optionals;

recorded::LinearCall linear_call(const std::optional<at::Tensor>& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                 const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs, const Optionals& scales,
                                 const std::vector<double>& scale_factors, const std::vector<int64_t>& rows, double dropout_p,
                                 const std::optional<at::Tensor>& seed) {
  return {x.value_or(at::Tensor()),   weight, bias.value_or(at::Tensor()), lora_as, lora_bs, scales, scale_factors, rows, dropout_p,
          seed.value_or(at::Tensor())};
}
Arguments of_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs, const Optionals& scales,
                    const std::vector<double>& scale_factors, const std::vector<int64_t>& rows, double dropout_p,
                    const std::optional<at::Tensor>& seed) {
  return described(linear_call(x, weight, bias, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed));
}
Arguments of_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& x, const at::Tensor& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& z,
                             const std::vector<at::Tensor>& lora_as, const std::vector<at::Tensor>& lora_bs, const Optionals& scales,
                             const std::vector<double>& scale_factors, const std::vector<int64_t>& rows, double dropout_p,
                             const std::optional<at::Tensor>& seed, const std::vector<bool>& needs, const std::vector<at::Tensor>& again) {
  return described(dy, z.value_or(at::Tensor()),
                   linear_call(x, weight, bias, lora_as, lora_bs, scales, scale_factors, rows, dropout_p, seed), needs, again);
}

// What keys of a penalty hold: all but lambda, read from lists of hundreds of tensors in one pass.
Arguments of_penalty(const py::handle& fishers, const py::handle& lora_as, const py::handle& lora_bs, const py::handle& scales,
                     const std::vector<double>& scale_factors, double ewc_lambda, const std::vector<bool>& needs) {
  Arguments made{{}, {}, {ewc_lambda}};
  for (const py::handle& given : {fishers, lora_as, lora_bs, scales}) {
    const auto list = py::reinterpret_steal<py::object>(PySequence_Fast(given.ptr(), "expected lists of tensors"));
    if (!list) throw py::error_already_set();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(list.ptr());
    made.decisions.push_back(count);
    made.tensors.reserve(made.tensors.size() + 4 * count);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(list.ptr(), i);
      TORCH_CHECK_TYPE(item == Py_None || THPVariable_Check(item), "expected tensors, got ", Py_TYPE(item)->tp_name);
      made.tensors.push_back(item == Py_None ? at::Tensor() : THPVariable_Unpack(item));
    }
  }
  made.decisions.push_back(int64_t(scale_factors.size()));
  for (const double factor : scale_factors) made.decisions.push_back(std::bit_cast<int64_t>(factor));
  for (const bool need : needs) made.decisions.push_back(need);
  return made;
}

using PyMap = std::tuple<int, int, int, uint64_t, std::vector<uint64_t>, std::vector<uint64_t>, std::vector<uint32_t>, PyPlace>;

void add_launch(Plan& plan, std::shared_ptr<driver::Kernel> kernel, const std::array<unsigned, 3>& grid, unsigned threads,
                std::vector<uint64_t> values, std::vector<int> order, const std::vector<std::tuple<size_t, PyPlace>>& pointers,
                const std::vector<std::tuple<size_t, size_t>>& numbers, const std::vector<PyMap>& maps, std::string about) {
  Launch launch{std::move(kernel), {grid[0], grid[1], grid[2]}, threads, std::move(values), std::move(order), {}, {}, {}, std::move(about)};
  for (const auto& [value, place] : pointers) launch.pointers.push_back({value, place_of(place)});
  for (const auto& [value, number] : numbers) launch.numbers.push_back({value, number});
  for (const auto& [type, swizzle, fill, size, sizes, strides, box, place] : maps)
    launch.maps.push_back({type, swizzle, fill, size, sizes, strides, box, place_of(place)});
  plan.steps.emplace_back(std::move(launch));
  ++plan.launches;
}

}  // namespace

void bind(py::module_& m) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (python_error& error) {
      error.restore();
    }
  });
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("load_driver", &driver::load, "Loads the CUDA driver from a library whose functions begin with a prefix", Unlocked());
  m.def(
      "check_stream", [](int8_t device) { current_stream({at::kCUDA, device}); }, "Raises what keeps the current stream from being known");
  m.def("launches", &launches, "Launches from plans since the process began");
  m.def("forget_plans", &forget, "Lets go of all plans", Unlocked());
  m.def("bypass_plans", [](bool on) { Bypass::count() += on ? 1 : -1; }, "Begins or ends, in this thread, a time without plans");

  py::class_<driver::Kernel, std::shared_ptr<driver::Kernel>>(m, "Kernel")
      .def(py::init([](const py::bytes& image, std::string name, int shared) {
        return std::make_shared<driver::Kernel>(std::string(image), std::move(name), shared);
      }));
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init<>())
      .def("keep", [](Plan& plan, const at::Tensor& t) { plan.kept.push_back(t); })
      .def("allocate", [](Plan& plan, Sizes sizes, Sizes strides,
                          at::ScalarType dtype) { plan.steps.emplace_back(Allocation{std::move(sizes), std::move(strides), dtype}); })
      .def("call", &add_call)
      .def("launch", &add_launch)
      .def("result", [](Plan& plan, const PyView& view) { plan.results.push_back(view_of(view)); })
      .def_readonly("launches", &Plan::launches);
  py::class_<Arguments>(m, "Arguments").def(py::init(&arguments));
  py::class_<Host, std::unique_ptr<Host, py::nodelete>>(m, "Host")
      .def("replay", &Host::replay, Unlocked())
      .def("should_record", &Host::should_record, Unlocked())
      .def("add", [](Host& host, const Arguments& arguments, std::shared_ptr<Plan> plan) { host.add(arguments, std::move(plan)); })
      .def("clear", &Host::clear)
      .def("__len__", &Host::size);
  m.def("penalty_arguments", &of_penalty);
  m.def("linear_arguments", &of_linear);
  m.def("linear_backward_arguments", &of_linear_backward);
  m.def("linear_backend_of_hosts", &LinearHosts::address);
  m.def("plan_host", &host, py::return_value_policy::reference);
}

}  // namespace fe::plans
