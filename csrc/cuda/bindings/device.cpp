// SPDX-License-Identifier: Apache-2.0
// The device that tensors are on: its stream, its number of multiprocessors, and errors that describe the tensors.
#include <array>
#include <map>
#include <mutex>
#include <sstream>

#include "kept.h"

#ifndef FE_EMULATED
// PyTorch's C interface to the current stream; its C++ one needs headers that only CUDA builds have.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fe::cuda {

#ifdef FE_EMULATED

constexpr int EMULATED_MULTIPROCESSORS = 4;

cudaStream_t current_stream(const at::Tensor&) {
  return kept::pretended().stream;
}
int multiprocessors(const at::Tensor&) {
  return EMULATED_MULTIPROCESSORS;
}

#else

cudaStream_t current_stream(const at::Tensor& like) {
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device(), &stream) == 0, "no current CUDA stream on device ", like.device());
  return static_cast<cudaStream_t>(stream);
}
int multiprocessors(const at::Tensor& like) {
  static std::array<int, 64> known{};  // a race writes the same number twice
  const int device = like.get_device();
  int count = device < int(known.size()) ? known[device] : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "the number of multiprocessors", described(like));
    if (device < int(known.size())) known[device] = count;
  }
  return count;
}

#endif

uint32_t* counters(const at::Tensor& like, int64_t size, at::Tensor& used) {
  const auto zeros = [&] { return at::zeros({size}, like.options().dtype(at::kInt)); };
  if (kept::capturing(like)) {  // a graph's own, set to zero by every replay
    used = zeros();
  } else {
    static std::mutex mutex;
    static auto& all = *new std::map<std::pair<int64_t, cudaStream_t>, at::Tensor>();  // never freed: CUDA may be gone at exit
    const std::pair<int64_t, cudaStream_t> place{like.get_device(), current_stream(like)};
    const auto find = [&] {
      const std::lock_guard guard(mutex);
      used = all[place];
      return used.defined() && used.numel() >= size;
    };
    if (!find()) {
      used = kept::outside(like, zeros);  // gives the GIL away: not under the lock
      const std::lock_guard guard(mutex);
      all[place] = used;  // memory of a stream is used again in its order
    }
  }
  return static_cast<uint32_t*>(used.data_ptr());
}

void check(cudaError_t status, const char* op, const std::string& shape) {
  TORCH_CHECK(status == cudaSuccess, op, " failed on ", shape, ": ", cudaGetErrorString(status));
}

std::string described(const at::Tensor& t) {
  std::ostringstream text;
  text << t.sizes() << ' ' << t.scalar_type() << " on " << t.device();
  return text.str();
}

}  // namespace fe::cuda
