// SPDX-License-Identifier: Apache-2.0
#include "../fisher_accumulate.cu"
