// SPDX-License-Identifier: Apache-2.0
// See kept.h.
#include "kept.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstring>
#include <exception>
#include <thread>

namespace fe::cuda::kept {
namespace {

std::vector<at::Tensor>& of_graphs() {
  static auto* held = new std::vector<at::Tensor>;  // never destroyed: CUDA is gone by the time static objects are
  return *held;
}

#ifndef FE_EMULATED
c10::Stream stream_of(const at::Tensor& like) {
  return c10::impl::VirtualGuardImpl(like.device().type()).getStream(like.device());
}
#endif

}  // namespace

#ifdef FE_EMULATED

Pretended& pretended() {
  static Pretended what;
  return what;
}
bool capturing(const at::Tensor&) {
  return pretended().capturing;
}
void used(const at::Tensor&) {
  ++pretended().uses;
}

#else

bool capturing(const at::Tensor& like) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(current_stream(like), &status), "the capture status of the current stream", described(like));
  return status != cudaStreamCaptureStatusNone;
}
void used(const at::Tensor& tensor) {
  tensor.record_stream(stream_of(tensor));
}

#endif

at::Tensor outside(const at::Tensor& like, const std::function<at::Tensor()>& make) {
  at::Tensor made;
  std::exception_ptr failure;
#ifdef FE_EMULATED
  const auto watching = c10::impl::TorchDispatchModeTLS::get_state();  // a test may watch allocations
#else
  const c10::Stream current = stream_of(like);
#endif
  const auto work = [&] {
    try {
#ifdef FE_EMULATED
      c10::impl::TorchDispatchModeTLS::set_state(watching);
#else
      const c10::StreamGuard guard(current);
#endif
      made = make();
    } catch (...) {
      failure = std::current_exception();
    }
  };
  {
    // The allocator may call Python when memory is short.
    std::optional<pybind11::gil_scoped_release> unlocked;
    if (PyGILState_Check()) unlocked.emplace();
    std::thread(work).join();
  }
  if (failure) std::rethrow_exception(failure);
  return made;
}

at::Tensor copied(const void* data, size_t size, const at::Tensor& like) {
  return outside(like, [&] {
    const at::Tensor host = at::from_blob(const_cast<void*>(data), {int64_t(size)}, at::kByte);
    return host.to(like.device(), host.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
  });
}

at::Tensor by_value(const void* data, size_t size, const at::Tensor& like) {
  std::vector<int64_t> words((size + 7) / 8, 0);
  std::memcpy(words.data(), data, size);
  at::Tensor made = at::zeros({int64_t(words.size())}, like.options().dtype(at::kLong).requires_grad(false));
  at::_foreach_add_(made.unbind(), std::vector<at::Scalar>(words.begin(), words.end()));
  return made.view(at::kByte);
}

void write(const at::Tensor& to, const std::vector<double>& values) {
  bool same = true;
  for (double value : values) same = same && value == values[0];
  if (same) {
    if (!values.empty()) to.fill_(values[0]);
    return;
  }
  to.zero_();
  at::_foreach_add_(to.unbind(), std::vector<at::Scalar>(values.begin(), values.end()));
}

void hold(const at::Tensor& tensor) {
  of_graphs().push_back(tensor);
}
void forget() {
  of_graphs().clear();
}

}  // namespace fe::cuda::kept
