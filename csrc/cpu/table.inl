// SPDX-License-Identifier: Apache-2.0
// The table of kernels of one instruction set; included last by each isa_*.cpp.
#pragma once
#include "ewc_penalty.inl"
#include "factored_penalty.inl"
#include "fisher_accumulate.inl"
#include "lora_linear.inl"
#include "merge.inl"

namespace fe::FE_ISA {

#define FE_STRING_(x) #x
#define FE_STRING(x) FE_STRING_(x)
extern const Kernels table;
const Kernels table = {
    .name = FE_STRING(FE_ISA),
    .lanes = L,
    .pack_panel = pack_panel,
    .pack_transposed = pack_transposed,
    .unpack_panel = unpack_panel,
    .unpack_transposed = unpack_transposed,
    .pack_pairs = pack_pairs,
    .lora_scratch = lora_scratch,
    .lora_forward = lora_forward,
    .lora_backward = lora_backward,
    .penalty_scratch = penalty_scratch,
    .penalty_rows = F_ROWS,
    .penalty = penalty,
    .factored_scratch = factored_scratch,
    .factored = factored,
    .fisher_scratch = fisher_scratch,
    .fisher_block = FISHER_BLOCK,
    .fisher_tile_rows = TILE_ROWS,
    .fisher_tile_columns = WIDTH,
    .fisher = fisher,
    .merge = merge,
};

}  // namespace fe::FE_ISA
