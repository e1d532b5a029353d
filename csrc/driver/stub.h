// SPDX-License-Identifier: Apache-2.0
// A stand-in for the CUDA driver that launches nothing: it takes machine code apart, checks what a driver checks, and counts and notes what it is
// handed. Part of the extension, with names that begin with fe_stub_, and alone a libcuda.so.1 (FE_STUB_ALONE), for tests without a GPU.
#pragma once
#include <cstddef>
#include <cstdint>

#include "stub_extra.h"

#ifdef FE_STUB_ALONE
// Names are expanded first, so that -DcuLaunchKernelEx=absent leaves a function out.
#define FE_STUB(name) name
#else
#define FE_STUB(name) fe_stub_##name
#endif
#define FE_STUB_API extern "C" __attribute__((visibility("default")))

#define FE_STUB_FUNCTIONS(_) FE_DRIVER_FUNCTIONS(_) FE_DRIVER_EXTRA_FUNCTIONS(_)

namespace fe::driver::stub {

struct Attribute {
  int32_t id;
  uint32_t value[4];  // the first words of the attribute's value
};

// One launch. What pointers point to lives until fe_stub_reset; in a callback, until it returns.
struct Launch {
  const char* function;
  const void* image;  // the cubin that it was loaded from
  uint64_t image_bytes;
  uint32_t grid[3], block[3];
  uint32_t shared;  // dynamic, in bytes
  uint32_t attribute_count, parameter_count, parameter_bytes;
  const void *stream, *context;
  const Attribute* attributes;
  const uint8_t* parameters;  // the buffer of all parameters as the kernel sees it, zero in between
  const uint32_t* places;     // offset and size of each
};

// What a launch returns; 0 is success.
using Callback = CUresult (*)(const Launch* launch, void* context);

}  // namespace fe::driver::stub

// Forgets notes, counts, failures, settings, the callback and what was loaded; handles from before are invalid.
FE_STUB_API void fe_stub_reset();

// Settings, by name; -1 for a name that is none. "capability" (90), "version" (13000) of the driver, "devices" (1), "initialised" (1; else every
// function fails), "context" (of this thread: 0 none, n that of device n - 1), "capturing" (0), "noting" (0: launches are counted alone).
FE_STUB_API int fe_stub_set(const char* setting, long long value);

// Lets a function return `result` from its call number `after` on (0: from the next one); -1 for a name that is none. Result 0 ends that.
FE_STUB_API int fe_stub_fail(const char* function, int result, long after);

// How often a function was called, or -1 for a name that is none.
FE_STUB_API long long fe_stub_calls(const char* function);

// Noted launches; null for a number beyond them.
FE_STUB_API const fe::driver::stub::Launch* fe_stub_launch(long long number);

// Lets a callback take every launch; null ends that.
FE_STUB_API void fe_stub_on_launch(fe::driver::stub::Callback callback, void* context);
