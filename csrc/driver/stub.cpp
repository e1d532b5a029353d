// SPDX-License-Identifier: Apache-2.0
#include "stub.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "image.h"

namespace fe::driver {
namespace stub {
namespace {

enum Error : CUresult {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  NOT_INITIALIZED = 3,
  INVALID_DEVICE = 101,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NO_BINARY_FOR_GPU = 209,
  INVALID_HANDLE = 400,
  NOT_FOUND = 500,
  NOT_SUPPORTED = 801
};

const std::pair<CUresult, const char*> WORDS[] = {
    {SUCCESS, "no error"},
    {INVALID_VALUE, "invalid argument"},
    {2, "out of memory"},
    {NOT_INITIALIZED, "initialization error"},
    {INVALID_DEVICE, "invalid device ordinal"},
    {INVALID_IMAGE, "device kernel image is invalid"},
    {INVALID_CONTEXT, "invalid device context"},
    {NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"},
    {INVALID_HANDLE, "invalid resource handle"},
    {NOT_FOUND, "named symbol not found"},
    {700, "an illegal memory access was encountered"},
    {701, "too many resources requested for launch"},
    {719, "unspecified launch failure"},
    {NOT_SUPPORTED, "operation not supported"},
};

// Functions by number.
#define NUMBER(name, arguments) NUMBER_##name,
enum Function { FE_STUB_FUNCTIONS(NUMBER) FUNCTIONS };
#undef NUMBER
#define NAME(name, arguments) #name,
const char* const NAMES[] = {FE_STUB_FUNCTIONS(NAME)};
#undef NAME

int number_of(const char* name) {
  for (int f = 0; f < FUNCTIONS; ++f)
    if (std::strcmp(NAMES[f], name) == 0) return f;
  return -1;
}

struct Counted {
  std::atomic<long long> calls{0}, fails_from{0};
  std::atomic<CUresult> failure{SUCCESS};
};

Counted counted[FUNCTIONS];

constexpr int MOST_DEVICES = 16;
char contexts[MOST_DEVICES];  // their addresses are the handles of primary contexts
thread_local CUcontext current = nullptr;

struct Settings {
  std::atomic<long long> capability{90}, version{13000}, devices{1}, initialised{1}, capturing{0}, noting{0};

  void reset() { capability = 90, version = 13000, devices = 1, initialised = 1, capturing = 0, noting = 0; }
} settings;

// Handles are addresses of these, which stay: one that was let go is known to be invalid.
struct Module {
  bool valid = true;
  std::vector<uint8_t> bytes;
  Image image;
  CUcontext context;
};

struct LoadedFunction {
  const Module* module;
  const Kernel* kernel;
  int most_dynamic;  // bytes of shared memory
};

struct Noted {
  Launch launch;
  std::vector<Attribute> attributes;
  std::vector<uint8_t> parameters;
  std::vector<uint32_t> places;
};

std::mutex lock;  // of the following
std::deque<Module> modules;
std::deque<LoadedFunction> functions;
std::deque<Noted> noted;
Callback callback = nullptr;
void* callback_context = nullptr;

CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(&contexts[device]);
}

int device_of(CUcontext context) {
  return int(reinterpret_cast<char*>(context) - contexts);
}

bool is_device(int device) {
  return device >= 0 && device < settings.devices;
}

// Counts a call; what it fails with, or success.
CUresult entered(Function function) {
  Counted& c = counted[function];
  const long long call = c.calls.fetch_add(1, std::memory_order_relaxed);
  const CUresult failure = c.failure.load(std::memory_order_acquire);
  if (failure != SUCCESS && call >= c.fails_from) return failure;
  return settings.initialised || function == NUMBER_cuInit || function == NUMBER_cuGetErrorString ? SUCCESS : NOT_INITIALIZED;
}

int most_shared_of_block() {
  const long long capability = settings.capability;
  return capability >= 90 && capability < 120 ? 232448 : capability == 80 || capability == 87 ? 166912 : 101376;
}

Module* as_module(CUmodule handle) {
  for (Module& m : modules)
    if (reinterpret_cast<CUmodule>(&m) == handle) return m.valid ? &m : nullptr;
  return nullptr;
}

LoadedFunction* as_function(CUfunction handle) {
  for (LoadedFunction& f : functions)
    if (reinterpret_cast<CUfunction>(&f) == handle) return f.module->valid ? &f : nullptr;
  return nullptr;
}

constexpr unsigned MOST_BLOCKS_X = 0x7fffffff, MOST_BLOCKS = 65535;

bool is_grid(const CUlaunchConfig& c) {
  return c.gridDimX && c.gridDimY && c.gridDimZ && c.gridDimX <= MOST_BLOCKS_X && c.gridDimY <= MOST_BLOCKS && c.gridDimZ <= MOST_BLOCKS;
}

bool fits(const CUlaunchConfig& c, const LoadedFunction& f) {
  const uint64_t threads = uint64_t(c.blockDimX) * c.blockDimY * c.blockDimZ;
  if (threads == 0 || threads > f.kernel->threads || (f.kernel->exact_threads && threads != f.kernel->threads)) return false;
  return c.sharedMemBytes <= unsigned(f.most_dynamic);
}

// What comes next in `extra`: macros of cuda.h.
constexpr uintptr_t END = 0, BUFFER_POINTER = 1, BUFFER_SIZE = 2;

// The buffer of all parameters, from pointers to each or from `extra`.
bool gather(const Kernel& kernel, void** parameters, void** extra, std::vector<uint8_t>& buffer) {
  buffer.assign(kernel.parameter_bytes, 0);
  if (extra != nullptr) {
    const void* given = nullptr;
    size_t size = 0;
    for (; reinterpret_cast<uintptr_t>(extra[0]) != END; extra += 2) {
      if (reinterpret_cast<uintptr_t>(extra[0]) == BUFFER_POINTER) given = extra[1];
      if (reinterpret_cast<uintptr_t>(extra[0]) == BUFFER_SIZE) size = *static_cast<const size_t*>(extra[1]);
    }
    if (parameters != nullptr || size < buffer.size() || (given == nullptr && !buffer.empty())) return false;
    for (const Parameter& p : kernel.parameters)
      std::memcpy(buffer.data() + p.offset, static_cast<const uint8_t*>(given) + p.offset, p.size);
    return true;
  }
  if (parameters == nullptr) return kernel.parameters.empty();
  for (size_t i = 0; i < kernel.parameters.size(); ++i) {
    const Parameter& p = kernel.parameters[i];
    if (parameters[i] == nullptr || p.offset + p.size > buffer.size()) return false;
    std::memcpy(buffer.data() + p.offset, parameters[i], p.size);
  }
  return true;
}

void fill(Noted& n, const CUlaunchConfig& c, const LoadedFunction& f) {
  for (const Parameter& p : f.kernel->parameters) n.places.insert(n.places.end(), {p.offset, p.size});
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    Attribute a{c.attrs[i].id, {}};
    std::memcpy(a.value, c.attrs[i].value, sizeof a.value);
    n.attributes.push_back(a);
  }
  Launch& l = n.launch;
  l = {};
  l.function = f.kernel->name.c_str();
  l.image = f.module->bytes.data(), l.image_bytes = f.module->bytes.size();
  l.grid[0] = c.gridDimX, l.grid[1] = c.gridDimY, l.grid[2] = c.gridDimZ;
  l.block[0] = c.blockDimX, l.block[1] = c.blockDimY, l.block[2] = c.blockDimZ;
  l.shared = c.sharedMemBytes;
  l.stream = c.hStream, l.context = current;
  l.attribute_count = uint32_t(n.attributes.size()), l.attributes = n.attributes.data();
  l.parameter_count = uint32_t(n.places.size() / 2), l.places = n.places.data();
  l.parameter_bytes = uint32_t(n.parameters.size()), l.parameters = n.parameters.data();
}

CUresult launch(const CUlaunchConfig* config, CUfunction handle, void** parameters, void** extra) {
  if (current == nullptr) return INVALID_CONTEXT;
  if (config == nullptr || (config->numAttrs && config->attrs == nullptr)) return INVALID_VALUE;
  Noted one;
  Callback take = nullptr;
  void* with = nullptr;
  {
    const std::lock_guard<std::mutex> guard(lock);
    const LoadedFunction* function = as_function(handle);
    if (function == nullptr || function->module->context != current) return INVALID_HANDLE;
    if (!is_grid(*config) || !fits(*config, *function)) return INVALID_VALUE;
    if (!gather(*function->kernel, parameters, extra, one.parameters)) return INVALID_VALUE;
    if (!settings.noting && callback == nullptr) return SUCCESS;
    fill(one, *config, *function);
    take = callback, with = callback_context;
    if (settings.noting) {
      Noted& kept = noted.emplace_back();
      kept.parameters = one.parameters;
      fill(kept, *config, *function);
    }
  }
  return take ? take(&one.launch, with) : SUCCESS;
}

// ---- tensor maps. What the real driver writes is not documented. Here it is: the address; small fields; sizes less one in 32 bits;
// strides; the box; steps. As in a real one, bit 21 of the second word is one that drivers up to 13.1 set where they should not, and that
// launchers clear for small tensors.

constexpr uint64_t MOST_SIZE = uint64_t(1) << 32, MOST_STRIDE = uint64_t(1) << 40;
constexpr int MOST_RANK = 5, MOST_TYPE = 12, MOST_SWIZZLE = 6;  // types beyond are packed
constexpr uint64_t DOUBTFUL_BIT = uint64_t(1) << 21, MARK = uint64_t(0xfe57) << 32;

int bytes_of(int type) {
  constexpr int BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return BYTES[type];
}

struct Encoded {
  uint64_t address, fields;
  uint32_t last[MOST_RANK];  // sizes less one
  uint32_t unused;
  uint64_t strides[MOST_RANK - 1];
  uint16_t box[MOST_RANK];
  uint8_t steps[MOST_RANK];
};
static_assert(sizeof(Encoded) <= sizeof(CUtensorMap));

bool is_map(int type, int rank, const void* address, const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
            const uint32_t* steps, int interleave, int swizzle, int promotion, int fill) {
  if (type < 0 || type > MOST_TYPE || rank < 1 || rank > MOST_RANK || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return false;
  if (reinterpret_cast<uintptr_t>(address) % 16 || swizzle < 0 || swizzle > MOST_SWIZZLE) return false;
  if (promotion < 0 || promotion > 3 || fill < 0 || fill > 1) return false;
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > MOST_SIZE || box[i] == 0 || box[i] > 256 || steps[i] == 0 || steps[i] > 8) return false;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= MOST_STRIDE)) return false;
  }
  const uint32_t inner = box[0] * bytes_of(type);
  const uint32_t span = swizzle == 0 ? ~0u : swizzle == 1 ? 32 : swizzle == 2 ? 64 : 128;
  return inner % 16 == 0 && inner <= span;
}

}  // namespace
}  // namespace stub

using namespace stub;

#define DEFINE(name, arguments) FE_STUB_API CUresult FE_STUB(name) arguments
#define ENTER(name) \
  if (const CUresult failure = entered(NUMBER_##name)) return failure

DEFINE(cuInit, (unsigned)) {
  ENTER(cuInit);
  settings.initialised = 1;
  return SUCCESS;
}

DEFINE(cuDriverGetVersion, (int* version)) {
  ENTER(cuDriverGetVersion);
  *version = int(settings.version);
  return SUCCESS;
}

DEFINE(cuGetErrorString, (CUresult error, const char** text)) {
  ENTER(cuGetErrorString);
  *text = nullptr;
  for (const auto& [number, words] : WORDS)
    if (number == error) *text = words;
  return *text ? SUCCESS : INVALID_VALUE;
}

DEFINE(cuDeviceGet, (CUdevice * device, int ordinal)) {
  ENTER(cuDeviceGet);
  if (!is_device(ordinal)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

DEFINE(cuDeviceGetCount, (int* count)) {
  ENTER(cuDeviceGetCount);
  *count = int(settings.devices);
  return SUCCESS;
}

DEFINE(cuDeviceGetAttribute, (int* value, int attribute, CUdevice device)) {
  ENTER(cuDeviceGetAttribute);
  if (!is_device(device)) return INVALID_DEVICE;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = most_shared_of_block();
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = most_shared_of_block() + 1024;
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = int(settings.capability / 10);
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = int(settings.capability % 10);
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      return SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 1;  // asked for, used for nothing
      return SUCCESS;
    default:
      return INVALID_VALUE;
  }
}

DEFINE(cuCtxGetCurrent, (CUcontext * context)) {
  ENTER(cuCtxGetCurrent);
  *context = current;
  return SUCCESS;
}

DEFINE(cuCtxSetCurrent, (CUcontext context)) {
  ENTER(cuCtxSetCurrent);
  if (context != nullptr && !is_device(device_of(context))) return INVALID_CONTEXT;
  current = context;
  return SUCCESS;
}

DEFINE(cuCtxGetDevice, (CUdevice * device)) {
  ENTER(cuCtxGetDevice);
  if (current == nullptr) return INVALID_CONTEXT;
  *device = device_of(current);
  return SUCCESS;
}

DEFINE(cuCtxGetLimit, (size_t* value, int)) {
  ENTER(cuCtxGetLimit);
  *value = 0;
  return SUCCESS;
}

DEFINE(cuCtxSetLimit, (int, size_t)) {
  ENTER(cuCtxSetLimit);
  return SUCCESS;
}

DEFINE(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device)) {
  ENTER(cuDevicePrimaryCtxRetain);
  if (!is_device(device)) return INVALID_DEVICE;
  *context = context_of(device);
  return SUCCESS;
}

DEFINE(cuModuleLoadData, (CUmodule * module, const void* data)) {
  ENTER(cuModuleLoadData);
  if (current == nullptr) return INVALID_CONTEXT;
  Image image;
  if (!read_image(data, image).empty()) return INVALID_IMAGE;
  // Code runs on its own architecture and on later ones of the same family.
  if (image.capability / 10 != settings.capability / 10 || image.capability > settings.capability) return NO_BINARY_FOR_GPU;
  const std::lock_guard<std::mutex> guard(lock);
  Module& made = modules.emplace_back();
  made.bytes.assign(static_cast<const uint8_t*>(data), static_cast<const uint8_t*>(data) + image.bytes);
  made.image = std::move(image);
  made.context = current;
  *module = reinterpret_cast<CUmodule>(&made);
  return SUCCESS;
}

DEFINE(cuModuleGetFunction, (CUfunction * function, CUmodule handle, const char* name)) {
  ENTER(cuModuleGetFunction);
  const std::lock_guard<std::mutex> guard(lock);
  const Module* module = as_module(handle);
  if (module == nullptr) return INVALID_HANDLE;
  const Kernel* kernel = module->image.find(name);
  if (kernel == nullptr) return NOT_FOUND;
  constexpr int WITHOUT_ASKING = 48 << 10;
  functions.push_back({module, kernel, WITHOUT_ASKING - int(kernel->shared)});
  *function = reinterpret_cast<CUfunction>(&functions.back());
  return SUCCESS;
}

DEFINE(cuFuncGetAttribute, (int* value, int attribute, CUfunction handle)) {
  ENTER(cuFuncGetAttribute);
  const std::lock_guard<std::mutex> guard(lock);
  const LoadedFunction* function = as_function(handle);
  if (function == nullptr) return INVALID_HANDLE;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = int(function->kernel->threads);
      return SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = int(function->kernel->shared);
      return SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = int(function->kernel->local);
      return SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = int(function->kernel->registers);
      return SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = function->most_dynamic;
      return SUCCESS;
    default:
      return INVALID_VALUE;
  }
}

DEFINE(cuFuncSetAttribute, (CUfunction handle, int attribute, int value)) {
  ENTER(cuFuncSetAttribute);
  const std::lock_guard<std::mutex> guard(lock);
  LoadedFunction* function = as_function(handle);
  if (function == nullptr) return INVALID_HANDLE;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return SUCCESS;
  if (value < 0 || value + int(function->kernel->shared) > most_shared_of_block()) return INVALID_VALUE;
  function->most_dynamic = value;
  return SUCCESS;
}

DEFINE(cuFuncSetCacheConfig, (CUfunction handle, int)) {
  ENTER(cuFuncSetCacheConfig);
  const std::lock_guard<std::mutex> guard(lock);
  return as_function(handle) ? SUCCESS : INVALID_HANDLE;
}

DEFINE(cuLaunchKernelEx, (const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra)) {
  ENTER(cuLaunchKernelEx);
  return launch(config, function, parameters, extra);
}

DEFINE(cuLaunchKernel, (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** parameters, void** extra)) {
  ENTER(cuLaunchKernel);
  const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, nullptr, 0};
  return launch(&config, function, parameters, extra);
}

DEFINE(cuStreamIsCapturing, (CUstream, int* status)) {
  ENTER(cuStreamIsCapturing);
  *status = int(settings.capturing);
  return SUCCESS;
}

DEFINE(cuPointerGetAttribute, (void* data, int attribute, CUdeviceptr pointer)) {
  ENTER(cuPointerGetAttribute);
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return INVALID_VALUE;
  *static_cast<CUdeviceptr*>(data) = pointer;
  return SUCCESS;
}

DEFINE(cuOccupancyMaxActiveClusters, (int*, CUfunction, const CUlaunchConfig*)) {
  ENTER(cuOccupancyMaxActiveClusters);
  return NOT_SUPPORTED;
}

DEFINE(cuTensorMapEncodeTiled, (CUtensorMap * map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                                const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill)) {
  ENTER(cuTensorMapEncodeTiled);
  if (settings.capability < 90) return NOT_SUPPORTED;
  if (reinterpret_cast<uintptr_t>(map) % alignof(CUtensorMap)) return INVALID_VALUE;
  if (!is_map(type, int(rank), address, sizes, strides, box, steps, interleave, swizzle, promotion, fill)) return INVALID_VALUE;
  Encoded encoded{};
  encoded.address = reinterpret_cast<uint64_t>(address);
  encoded.fields = uint64_t(type) | uint64_t(rank) << 4 | uint64_t(swizzle) << 8 | uint64_t(promotion) << 12 | uint64_t(fill) << 16 |
                   DOUBTFUL_BIT | MARK;
  for (uint32_t i = 0; i < rank; ++i) {
    encoded.last[i] = uint32_t(sizes[i] - 1);
    encoded.box[i] = uint16_t(box[i]);
    encoded.steps[i] = uint8_t(steps[i]);
    if (i + 1 < rank) encoded.strides[i] = strides[i];
  }
  *map = {};
  std::memcpy(map, &encoded, sizeof encoded);
  return SUCCESS;
}

DEFINE(cuTensorMapReplaceAddress, (CUtensorMap * map, void* address)) {
  ENTER(cuTensorMapReplaceAddress);
  if (map->opaque[1] >> 32 != MARK >> 32 || reinterpret_cast<uintptr_t>(address) % 16) return INVALID_VALUE;
  map->opaque[0] = reinterpret_cast<uint64_t>(address);
  return SUCCESS;
}

DEFINE(cuTensorMapEncodeIm2col, (CUtensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const int*, const int*, uint32_t,
                                 uint32_t, const uint32_t*, int, int, int, int)) {
  ENTER(cuTensorMapEncodeIm2col);
  return NOT_SUPPORTED;
}

}  // namespace fe::driver

using namespace fe::driver::stub;

void fe_stub_reset() {
  const std::lock_guard<std::mutex> guard(lock);
  for (Counted& c : counted) c.calls = 0, c.fails_from = 0, c.failure = SUCCESS;
  settings.reset();
  for (Module& m : modules) m.valid = false;
  noted.clear();
  callback = nullptr, callback_context = nullptr;
  current = nullptr;
}

int fe_stub_set(const char* setting, long long value) {
  const std::string name = setting;
  if (name == "context") {
    current = value == 0 ? nullptr : fe::driver::stub::context_of(int(value - 1));
    return 0;
  }
  const std::pair<const char*, std::atomic<long long>*> named[] = {
      {"capability", &settings.capability},   {"version", &settings.version},     {"devices", &settings.devices},
      {"initialised", &settings.initialised}, {"capturing", &settings.capturing}, {"noting", &settings.noting},
  };
  for (const auto& [known, at] : named)
    if (name == known) return *at = value, 0;
  return -1;
}

int fe_stub_fail(const char* function, int result, long after) {
  const int f = number_of(function);
  if (f < 0) return -1;
  counted[f].fails_from = counted[f].calls + after;
  counted[f].failure = result;
  return 0;
}

long long fe_stub_calls(const char* function) {
  const int f = number_of(function);
  return f < 0 ? -1 : counted[f].calls.load();
}

const Launch* fe_stub_launch(long long number) {
  const std::lock_guard<std::mutex> guard(lock);
  return number >= 0 && number < (long long)noted.size() ? &noted[size_t(number)].launch : nullptr;
}

void fe_stub_on_launch(Callback take, void* context) {
  const std::lock_guard<std::mutex> guard(lock);
  callback = take, callback_context = context;
}
