// SPDX-License-Identifier: Apache-2.0
// What a cubin, an ELF file, says of its kernels: where their parameters are and what a launch may ask for.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fe::driver {

struct Parameter {
  uint32_t offset;  // in the buffer of all parameters
  uint32_t size;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;  // in order
  uint32_t parameter_bytes = 0;
  uint32_t registers = 0;      // per thread
  uint32_t local = 0;          // bytes per thread
  uint32_t shared = 0;         // bytes per block, known at compile time
  uint32_t threads = 1024;     // per block, at most
  bool exact_threads = false;  // and no fewer
};

struct Image {
  int capability = 0;  // 90 of sm_90
  size_t bytes = 0;
  std::vector<Kernel> kernels;

  const Kernel* find(const std::string& name) const;
};

// Reads a cubin in memory, whose headers say how long it is. Returns why it is none, or "".
std::string read_image(const void* data, Image& image);

}  // namespace fe::driver
