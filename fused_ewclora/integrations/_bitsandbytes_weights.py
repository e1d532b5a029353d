# SPDX-License-Identifier: Apache-2.0
"""How bitsandbytes stores and multiplies weights of 4 and 8 bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError
from ._library import require

bnb: Any = require("bitsandbytes")

CODES, _SCALES, _SUPER_SCALES, _OFFSET = "codes", "scales", "super_scales", "offset"
_INT8 = 127.0


def _bytes(codes: Tensor) -> Tensor:
    """Codes in the same memory, without the class of their parameter and the dtype that they pose as."""
    return codes.detach().as_subclass(Tensor).view(torch.uint8).view(-1, 1)


class FourBit:
    """`Linear4bit`: NF4 or FP4 codes in blocks, with one scale per block, which may be quantised as well."""

    def product(self, module: Any, x: Tensor) -> Tensor:
        """As the forward of `Linear4bit`, but nothing of the module is changed: neither is its bias cast in
        place, nor its weight packed for one kind of CPU, which rounds scales and has no backward."""
        weight, bias = module.weight, module.bias
        if why := _packed(weight.quant_state):
            raise TargetError(why)
        if not module.compute_type_is_set:
            module.set_compute_type(x)
            module.compute_type_is_set = True
        dtype = x.dtype if module.compute_dtype is None else module.compute_dtype
        bias = None if bias is None else bias.to(dtype)
        y: Tensor = bnb.matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=weight.quant_state)
        return y.to(x.dtype)

    def stored(self, module: Any) -> dict[str, Tensor]:
        state = module.weight.quant_state
        tensors = {CODES: _bytes(module.weight), _SCALES: state.absmax}
        if state.nested:
            tensors |= {_SUPER_SCALES: state.state2.absmax, _OFFSET: state.offset}
        return tensors

    def numbers(self, module: Any, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None) -> Tensor:
        state = copy.copy(module.weight.quant_state)
        tensors = self.stored(module) if stored is None else stored
        state.absmax, state.dtype = tensors[_SCALES], torch.float32
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax, state.offset = tensors[_SUPER_SCALES], tensors[_OFFSET]
        found: Tensor = bnb.functional.dequantize_4bit(tensors[CODES], state)
        return found.to(dtype)

    def quantised(self, module: Any, new: Tensor) -> dict[str, Tensor]:
        old = module.weight.quant_state
        codes, state = bnb.functional.quantize_4bit(
            new.float().contiguous(),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
        )
        tensors = {CODES: codes, _SCALES: state.absmax}
        if old.nested:
            tensors |= {_SUPER_SCALES: state.state2.absmax, _OFFSET: state.offset}
        return tensors

    def kind(self, module: Any) -> str:
        return str(module.weight.quant_state.quant_type)

    def dtype(self, module: Any) -> torch.dtype:
        return torch.float32


class EightBit:
    """`Linear8bitLt`: int8 codes, with one scale per row."""

    def product(self, module: Any, x: Tensor) -> Tensor:
        """As the forward of `Linear8bitLt`, but the bias is not cast in place."""
        state, weight, bias = module.state, module.weight, module.bias
        state.is_training = module.training
        if weight.CB is not None:
            module.init_8bit_state()
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = bnb.matmul(x, weight, bias=bias, state=state)
        weight.data = state.CB
        return y

    def stored(self, module: Any) -> dict[str, Tensor]:
        if module.weight.CB is not None:
            module.init_8bit_state()
        if module.weight.data_ptr() != module.state.CB.data_ptr():  # as in a copy
            module.weight.data = module.state.CB
        return {CODES: module.state.CB, _SCALES: module.state.SCB}

    def numbers(self, module: Any, dtype: torch.dtype, stored: Mapping[str, Tensor] | None = None) -> Tensor:
        tensors = self.stored(module) if stored is None else stored
        return tensors[CODES].to(dtype) * (tensors[_SCALES].to(dtype)[:, None] / _INT8)

    def quantised(self, module: Any, new: Tensor) -> dict[str, Tensor]:
        """bitsandbytes quantises from fp16."""
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(new.to(torch.float16).contiguous())
        return {CODES: codes, _SCALES: scales}

    def kind(self, module: Any) -> str:
        return "int8"

    def dtype(self, module: Any) -> torch.dtype:
        return torch.float32


def _packed(state: Any) -> str | None:
    """The reason why a state has no numbers to train on any more, or None."""
    if not getattr(state, "packing_format_for_cpu", False):
        return None
    return (
        "bitsandbytes has packed its weight for inference on this CPU, in a call in eval mode, and rounded "
        "its scales to bf16, from which there is no way back; load the model again, and inject before it "
        "runs in eval mode"
    )


def unfit_four(module: Any) -> str | None:
    """The reason why a `Linear4bit` has no weight that `FourBit` could use, or None."""
    weight = module._parameters.get("weight")
    if not isinstance(weight, bnb.nn.Params4bit):
        kind = "no parameter" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
        return f"its weight is expected to be a quantised Params4bit, and is {kind}"
    state = weight.quant_state
    if state is None or not weight.bnb_quantized:
        return (
            f"its weight is expected to be quantised, and still holds {weight.dtype} numbers; bitsandbytes "
            "quantises when the model is moved, as with model.to(device)"
        )
    if why := _packed(state):
        return why
    shape = (module.out_features, module.in_features)
    if tuple(state.shape) != shape:
        return f"its quantised weight has shape {list(state.shape)}, not {list(shape)}"
    return None


def unfit_eight(module: Any) -> str | None:
    """The reason why a `Linear8bitLt` has no weight that `EightBit` could use, or None."""
    weight = module._parameters.get("weight")
    if module.state.has_fp16_weights:
        return (
            "it keeps its weight in floating point and quantises it in every call; make it with "
            "has_fp16_weights=False"
        )
    if not isinstance(weight, bnb.nn.Int8Params):
        kind = "no parameter" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
        return f"its weight is expected to be a quantised Int8Params, and is {kind}"
    if weight.dtype != torch.int8 or (weight.CB is None and module.state.CB is None):
        return (
            f"its weight is expected to be quantised to int8, and still holds {weight.dtype} numbers; "
            "bitsandbytes quantises when the model is moved, as with model.to(device)"
        )
    if module.index is not None:
        return "its weight has an index that reorders it"
    return None
