// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;
using namespace ptx;

namespace {

// (kind, negated, register, value, parts)
Operand operand_of(const py::tuple& fields) {
  Operand o;
  o.kind = static_cast<Kind>(fields[0].cast<int>());
  o.negated = fields[1].cast<bool>();
  o.reg = fields[2].cast<int>();
  o.value = fields[3].cast<uint64_t>();
  for (const auto& part : fields[4].cast<py::tuple>()) o.parts.push_back(operand_of(part.cast<py::tuple>()));
  return o;
}

Program program_of(const std::string& name, std::vector<int> widths, int shared, const py::list& instructions) {
  Program program{name, std::move(widths), {}, shared};
  for (const auto& item : instructions) {  // (mnemonic, text, line, predicate, unless, operands, targets)
    auto fields = item.cast<py::tuple>();
    Instruction i;
    i.text = fields[1].cast<std::string>();
    i.line = fields[2].cast<int>();
    i.predicate = fields[3].cast<int>();
    i.unless = fields[4].cast<bool>();
    for (const auto& operand : fields[5].cast<py::tuple>()) i.operands.push_back(operand_of(operand.cast<py::tuple>()));
    i.targets = fields[6].cast<std::vector<int>>();
    decode(i, fields[0].cast<std::string>());
    program.instructions.push_back(std::move(i));
  }
  return program;
}

}  // namespace

PYBIND11_MODULE(ptx_machine, m) {
  py::register_exception<Unsupported>(m, "Unsupported", PyExc_NotImplementedError);
  py::class_<Program>(m, "Program").def(py::init(&program_of));
  py::class_<TensorMap>(m, "TensorMap")
      .def(py::init(
          [](uint64_t base, std::vector<uint64_t> extents, std::vector<uint64_t> strides, std::vector<uint32_t> box, int element,
             int swizzle) { return TensorMap{base, std::move(extents), std::move(strides), std::move(box), element, swizzle, false}; }));
  py::class_<Machine>(m, "Machine")
      .def(py::init<>())
      .def("add", &Machine::add)
      .def("initialise", &Machine::initialise)
      .def("run", [](Machine& machine, const Program& program, std::array<uint32_t, 3> grid, int threads, int shared,
                     const py::bytes& parameters, std::vector<TensorMap> maps, uint64_t seed, int resident, bool shuffled, uint64_t limit) {
        Launch launch;
        launch.grid = grid;
        launch.threads = threads;
        launch.shared = shared;
        std::string bytes = parameters;
        launch.parameters.assign(bytes.begin(), bytes.end());
        launch.maps = std::move(maps);
        launch.seed = seed;
        launch.resident = resident;
        launch.shuffled = shuffled;
        launch.limit = limit;
        Result result = machine.run(program, launch);
        py::list findings, costs;
        for (const auto& f : result.findings) findings.append(py::make_tuple(f.kind, f.detail, f.instruction, f.count));
        for (const auto& c : result.costs)
          costs.append(py::make_tuple(c.executed, c.lanes, c.wavefronts, c.ideal_wavefronts, c.sectors, c.fresh_sectors));
        return py::make_tuple(findings, costs, result.steps);
      });
}
