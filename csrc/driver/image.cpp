// SPDX-License-Identifier: Apache-2.0
#include "image.h"

#include <algorithm>
#include <cstring>

namespace fe::driver {
namespace {

// ELF, 64 bit, little endian: the fields that are read.
constexpr size_t HEADER = 64, SECTION = 64, SYMBOL = 24;
constexpr uint16_t CUDA_MACHINE = 190;
constexpr uint32_t SYMBOL_TABLE = 2, NO_BITS = 8;
constexpr uint8_t ABI_OF_LATER_FLAGS = 8;  // from which on the architecture is the second byte of the flags

// Attributes in .nv.info sections, as `cuobjdump -elf` names them.
constexpr uint8_t MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, FRAME_SIZE = 0x11, PARAMETER_INFO = 0x17, PARAMETER_BYTES = 0x19,
                  REGISTERS = 0x2f;
constexpr uint8_t SIZED = 0x04;  // the format of attributes that are followed by their size; others have two bytes

template <class T>
T number(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

struct Section {
  std::string name;
  uint32_t type;
  uint64_t offset, size;
  uint32_t link;
};

struct Attribute {
  uint8_t kind;
  const uint8_t* data;
  size_t size;
};

class File {
 public:
  explicit File(const void* data) : bytes_(static_cast<const uint8_t*>(data)) {}

  std::string open() {
    if (!bytes_ || std::memcmp(bytes_, "\177ELF\2\1", 6) != 0) return "no 64-bit ELF file";
    if (number<uint16_t>(bytes_ + 18) != CUDA_MACHINE) return "an ELF file for another machine than a GPU";
    const uint64_t table = number<uint64_t>(bytes_ + 40);
    const uint16_t entry = number<uint16_t>(bytes_ + 58), count = number<uint16_t>(bytes_ + 60), names = number<uint16_t>(bytes_ + 62);
    if (entry != SECTION || names >= count || table < HEADER) return "an ELF file without a table of sections";
    const uint64_t segments = number<uint64_t>(bytes_ + 32) + uint64_t(number<uint16_t>(bytes_ + 54)) * number<uint16_t>(bytes_ + 56);
    size_ = std::max<size_t>(table + uint64_t(count) * entry, segments);
    std::vector<const uint8_t*> headers;
    for (int i = 0; i < count; ++i) {
      headers.push_back(bytes_ + table + uint64_t(i) * entry);
      if (number<uint32_t>(headers[i] + 4) == NO_BITS) continue;
      size_ = std::max<size_t>(size_, number<uint64_t>(headers[i] + 24) + number<uint64_t>(headers[i] + 32));
    }
    const char* text = reinterpret_cast<const char*>(bytes_) + number<uint64_t>(headers[names] + 24);
    for (const uint8_t* h : headers)
      sections_.push_back({text + number<uint32_t>(h), number<uint32_t>(h + 4), number<uint64_t>(h + 24), number<uint64_t>(h + 32),
                           number<uint32_t>(h + 40)});
    return "";
  }

  int capability() const {
    const uint32_t flags = number<uint32_t>(bytes_ + 48);
    return (bytes_[8] >= ABI_OF_LATER_FLAGS ? flags >> 8 : flags) & 0xff;
  }

  size_t size() const { return size_; }
  const std::vector<Section>& sections() const { return sections_; }

  std::vector<Attribute> attributes(const Section& section) const {
    std::vector<Attribute> found;
    for (uint64_t at = 0; at + 4 <= section.size;) {
      const uint8_t* p = bytes_ + section.offset + at;
      const size_t size = p[0] == SIZED ? number<uint16_t>(p + 2) : 2;
      const uint8_t* data = p[0] == SIZED ? p + 4 : p + 2;
      found.push_back({p[1], data, size});
      at += (data - p) + size;
    }
    return found;
  }

  std::string symbol(uint32_t index) const {
    for (const Section& s : sections_)
      if (s.type == SYMBOL_TABLE && uint64_t(index + 1) * SYMBOL <= s.size) {
        const uint32_t name = number<uint32_t>(bytes_ + s.offset + uint64_t(index) * SYMBOL);
        return reinterpret_cast<const char*>(bytes_) + sections_[s.link].offset + name;
      }
    return "";
  }

 private:
  const uint8_t* bytes_;
  size_t size_ = 0;
  std::vector<Section> sections_;
};

void read_kernel(const std::vector<Attribute>& attributes, Kernel& kernel) {
  for (const Attribute& a : attributes) {
    if (a.kind == PARAMETER_INFO && a.size >= 12) {
      const size_t ordinal = number<uint16_t>(a.data + 4);
      if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1);
      // The size is in the upper 14 bits of the last word.
      kernel.parameters[ordinal] = {number<uint16_t>(a.data + 6), number<uint32_t>(a.data + 8) >> 18};
    } else if (a.kind == PARAMETER_BYTES) {
      kernel.parameter_bytes = number<uint16_t>(a.data);
    } else if ((a.kind == MAX_THREADS || a.kind == REQUIRED_THREADS) && a.size >= 12) {
      kernel.threads = number<uint32_t>(a.data) * number<uint32_t>(a.data + 4) * number<uint32_t>(a.data + 8);
      kernel.exact_threads = a.kind == REQUIRED_THREADS;
    }
  }
}

constexpr const char INFO[] = ".nv.info", INFO_OF[] = ".nv.info.", SHARED_OF[] = ".nv.shared.";

bool starts_with(const std::string& text, const char* start) {
  return text.rfind(start, 0) == 0;
}

}  // namespace

const Kernel* Image::find(const std::string& name) const {
  for (const Kernel& kernel : kernels)
    if (kernel.name == name) return &kernel;
  return nullptr;
}

std::string read_image(const void* data, Image& image) {
  File file(data);
  if (std::string problem = file.open(); !problem.empty()) return problem;
  image.capability = file.capability();
  image.bytes = file.size();
  for (const Section& section : file.sections()) {
    if (!starts_with(section.name, INFO_OF)) continue;
    Kernel kernel;
    kernel.name = section.name.substr(sizeof INFO_OF - 1);
    read_kernel(file.attributes(section), kernel);
    image.kernels.push_back(kernel);
  }
  // From Hopper on the section begins with what the system reserves of each block, which no limit counts.
  const uint32_t reserved = image.capability >= 90 ? 1024 : 0;
  for (const Section& section : file.sections()) {
    if (starts_with(section.name, SHARED_OF)) {
      for (Kernel& kernel : image.kernels)
        if (section.name == SHARED_OF + kernel.name) kernel.shared = uint32_t(section.size) - std::min(uint32_t(section.size), reserved);
    } else if (section.name == INFO) {
      for (const Attribute& a : file.attributes(section))
        for (Kernel& kernel : image.kernels) {
          if (a.size < 8 || file.symbol(number<uint32_t>(a.data)) != kernel.name) continue;
          if (a.kind == REGISTERS) kernel.registers = number<uint32_t>(a.data + 4);
          if (a.kind == FRAME_SIZE) kernel.local = number<uint32_t>(a.data + 4);
        }
    }
  }
  return image.kernels.empty() ? "an ELF file without kernels" : "";
}

}  // namespace fe::driver
