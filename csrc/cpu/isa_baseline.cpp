// SPDX-License-Identifier: Apache-2.0
// The kernels for baseline. The target pragma comes before every include, so that all code of this file is compiled for it; nothing with
// external linkage but the table leaves the namespace, so no other file can pick up code that its processor lacks.
#define FE_ISA baseline
#define FE_VECTOR_BYTES 16
#include "table.inl"
