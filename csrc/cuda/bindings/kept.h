// SPDX-License-Identifier: Apache-2.0
// Device memory that outlives a call: where it is allocated, who may still read it, when it is let go (backends/triton/kept.py in Python).
#pragma once
#include <functional>

#include "tensors.h"

namespace fe::cuda::kept {

// Whether what is launched now on the device of `like` is recorded for a CUDA graph.
bool capturing(const at::Tensor& like);

// What `make` returns, its memory allocated outside of private pools of CUDA graphs and not bound to modes of autograd. Pools that are in use
// without a capture belong to a thread, so another thread makes it, on the current stream. Not for use inside a capture.
at::Tensor outside(const at::Tensor& like, const std::function<at::Tensor()>& make);

// Bytes in device memory: a copy to stay, ready for every stream, or one for this call or graph alone. A graph would read host memory anew in
// each replay; the numbers of the second are arguments of the kernels that write them.
at::Tensor copied(const void* data, size_t size, const at::Tensor& like);
at::Tensor by_value(const void* data, size_t size, const at::Tensor& like);

// Writes numbers to a 1-d tensor of floats on the current stream, without waiting and without host memory.
void write(const at::Tensor& to, const std::vector<double>& values);

// The current stream reads `tensor`, made on another one: its memory serves no one else before it has done so.
void used(const at::Tensor& tensor);

// Keeps what the graph that is being captured reads, until `forget`: nothing says when a graph is gone.
void hold(const at::Tensor& tensor);
void forget();

#ifdef FE_EMULATED
// What a test says the GPU does, and what it sees of it.
struct Pretended {
  cudaStream_t stream = nullptr;
  bool capturing = false;
  int64_t uses = 0;  // recorded
};
Pretended& pretended();
#endif

}  // namespace fe::cuda::kept
