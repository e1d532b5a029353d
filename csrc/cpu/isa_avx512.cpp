// SPDX-License-Identifier: Apache-2.0
// The kernels for avx512. The target pragma comes before every include, so that all code of this file is compiled for it; nothing with
// external linkage but the table leaves the namespace, so no other file can pick up code that its processor lacks.
#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FE_ISA avx512
#define FE_VECTOR_BYTES 64
#include "table.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
