// SPDX-License-Identifier: Apache-2.0
// Tells ThreadSanitizer when threads of OpenMP start and join: GNU's OpenMP library is not compiled for it, so what was written before a
// parallel region and is read inside of it would look like a race. Linked in builds for ThreadSanitizer alone, where calls of GOMP_parallel
// arrive here (-Wl,--wrap). Races inside a region are seen as ever.
#include <sanitizer/tsan_interface.h>

extern "C" void __real_GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);

namespace {

struct Region {
  void (*run)(void*);
  void* data;
  char begun, ended;
};

void in_thread(void* given) {
  Region* region = static_cast<Region*>(given);
  __tsan_acquire(&region->begun);
  region->run(region->data);
  __tsan_release(&region->ended);
}

}  // namespace

extern "C" void __wrap_GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags) {
  Region region{run, data, 0, 0};
  __tsan_release(&region.begun);
  __real_GOMP_parallel(in_thread, &region, threads, flags);
  __tsan_acquire(&region.ended);
}
