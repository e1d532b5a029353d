"""`LoRALinear`: an `nn.Linear` whose adapters are parameters of the same module: base keys never change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional as FE
from .config import QKVLayout, probability
from .errors import ArgumentError, TargetError
from .ops.capture import FisherCapture
from .slices import AdapterSlice, fingerprint, fisher_key, plan_slices

__all__ = ["AdapterSlice", "LoRALinear", "fingerprint", "fisher_key"]


class LoRALinear(nn.Linear):
    """y = x W^T + bias + ((x A^T) s) B^T on the rows of each adapter, W and bias frozen (docs/mathematics.md,
    section 1).

    x `[..., in_features]`, y `[..., out_features]`; lora_A `[r, in_features]` and lora_B `[rows, r]`, with
    slices lora_A_k, lora_B_k and so on. Adapters are fp32 beside an fp16 or bf16 weight, else of its dtype. A
    parameter `lora_scale` (`lora_scale_k`) assigned later, 0-d or `[r]`, multiplies the scale. Raises
    `ArgumentError`, `DtypeError` or `LayoutError` naming the argument.

        >>> layer = LoRALinear(768, 2304, r=8, slices=("k", "v"), layout=QKVLayout(("q", "k", "v")))
    """

    adapter_slices: tuple[AdapterSlice, ...]
    r: int
    lora_alpha: float | None
    lora_dropout: float
    adapters_enabled: bool
    merged: bool
    fisher_capture: FisherCapture | None
    forward_calls: int  # eager calls; a compiled call sets it to 1, which needs no guard and no recompilation
    origin_fingerprint: str
    consolidated_tasks: int  # tasks whose B diag(s) A has been added to weight for good
    base_trainable: tuple[str, ...]  # which of weight and bias required gradients before
    rows_before_merge: Tensor  # only while merged

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        bias: bool = True,
        slices: Sequence[str] | None = None,
        layout: QKVLayout | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        adapters = plan_slices(out_features, r, lora_alpha, slices, layout)
        probability(lora_dropout, "lora_dropout")
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_adapters(adapters, lora_alpha, lora_dropout)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        slices: Sequence[str] | None = None,
        layout: QKVLayout | None = None,
    ) -> LoRALinear:
        """A new layer that shares weight and bias with `linear` and freezes them.

        Raises `ArgumentError`, `DtypeError` or `LayoutError` naming the argument.

            >>> layer = LoRALinear.from_linear(nn.Linear(16, 16), r=4)
        """
        adapters = plan_slices(linear.out_features, r, lora_alpha, slices, layout)
        probability(lora_dropout, "lora_dropout")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias, layer.training = linear.weight, linear.bias, linear.training
        layer._add_adapters(adapters, lora_alpha, lora_dropout)
        return layer

    @classmethod
    def adopt_(
        cls,
        linear: nn.Linear,
        adapters: tuple[AdapterSlice, ...],
        lora_alpha: float | None,
        lora_dropout: float,
    ) -> LoRALinear:
        """Turn `linear` itself into this class, keeping hooks, place and keys; the caller validates."""
        linear.__class__ = cls
        layer = cast(LoRALinear, linear)
        try:
            layer._add_adapters(adapters, lora_alpha, lora_dropout)
        except BaseException:  # out of memory
            layer.release_()
            raise
        return layer

    def release_(self) -> nn.Linear:
        """Turn this module back into an `nn.Linear` in place, without adapters, requires_grad as it was."""
        for name in self.base_trainable:
            self._parameters[name].requires_grad_(True)  # type: ignore[union-attr]
        for name, _ in self.named_lora_parameters():
            del self._parameters[name]
        if self.merged:
            del self.rows_before_merge
        for name in LoRALinear.__annotations__:
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def _add_adapters(
        self, adapters: tuple[AdapterSlice, ...], lora_alpha: float | None, lora_dropout: float
    ) -> None:
        self.adapter_slices = adapters
        self.r, self.lora_alpha, self.lora_dropout = adapters[0].r, lora_alpha, lora_dropout
        self.adapters_enabled, self.merged = True, False
        self.fisher_capture = None
        self.forward_calls = 0
        self.consolidated_tasks = 0
        self.origin_fingerprint = fingerprint(self.weight)
        self.base_trainable = tuple(
            n for n in ("weight", "bias") if (p := getattr(self, n)) is not None and p.requires_grad
        )
        for name in self.base_trainable:
            getattr(self, name).requires_grad_(False)
        dtype = torch.float32 if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight.dtype
        for adapter in adapters:
            a_shape, b_shape = (adapter.r, self.in_features), (adapter.row_count, adapter.r)
            for name, shape in ((adapter.a_name, a_shape), (adapter.b_name, b_shape)):
                value = torch.empty(shape, dtype=dtype, device=self.weight.device)
                setattr(self, name, nn.Parameter(value))
        self.reset_adapters()

    @torch.no_grad()
    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """A ~ U(-1/sqrt(in_features), 1/sqrt(in_features)) (Kaiming uniform with a = sqrt 5) and B = 0, in
        place, as at the start of a task.

        A generator of another device is used there and its numbers are copied, so that one seed gives the
        same A everywhere.
        """
        bound = 1.0 / math.sqrt(self.in_features)
        for _, lora_a, lora_b in self.adapter_parameters():
            if generator is None or generator.device == lora_a.device:
                lora_a.uniform_(-bound, bound, generator=generator)
            else:
                drawn = torch.empty(lora_a.shape, dtype=lora_a.dtype, device=generator.device)
                lora_a.copy_(drawn.uniform_(-bound, bound, generator=generator))
            lora_b.zero_()

    def reset_parameters(self) -> None:
        """Re-initialise weight and bias as `nn.Linear` does, and the adapters."""
        super().reset_parameters()
        if "adapter_slices" in self.__dict__:  # nn.Linear.__init__ calls this before there are adapters
            self.reset_adapters()

    def named_lora_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of all that adaptation added: lora_A, lora_B, lora_scale where there is one."""
        return [
            (name, p) for name, p in self._parameters.items() if p is not None and name.startswith("lora_")
        ]

    def adapter_parameters(self) -> list[tuple[AdapterSlice, nn.Parameter, nn.Parameter]]:
        """(slice, lora_A, lora_B) per adapter, in the order of `FisherCapture.fishers`."""
        return [(s, getattr(self, s.a_name), getattr(self, s.b_name)) for s in self.adapter_slices]

    def adapter_scale(self, adapter: AdapterSlice) -> float | Tensor:
        """The scale of one adapter: its `scaling`, times the parameter `lora_scale` where there is one."""
        factor = self._parameters.get(adapter.scale_name)
        if factor is None:
            return adapter.scaling
        return factor if adapter.scaling == 1.0 else factor * adapter.scaling

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> y `[..., out_features]`; the plain linear while merged or disabled."""
        if torch.compiler.is_compiling():
            self.forward_calls = 1
        else:
            self.__dict__["forward_calls"] += 1
        if self.merged or not self.adapters_enabled:
            return F.linear(x, self.weight, self.bias)
        return FE.lora_linear_adapters(
            x,
            self.weight,
            self.bias,
            [FE.Adapter(a, b, self.adapter_scale(s), s.rows) for s, a, b in self.adapter_parameters()],
            dropout_p=self.lora_dropout,
            training=self.training,
            capture=self.fisher_capture,
        )

    @torch.no_grad()
    def consolidated_weight(self) -> Tensor:
        """A new tensor W + B diag(s) A, summed in fp32 (fp64 for fp64) and rounded once.

        Rows without an adapter are copied. Raises `TargetError` while merged, when W holds the sum already.
        """
        if self.merged:
            raise TargetError(
                "consolidated_weight: expected unmerged adapters, got merged ones; call fe.unmerge(model)"
            )
        weight = self.weight.detach().clone()
        entries: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        for adapter, lora_a, lora_b in self.adapter_parameters():
            scale, first = self.adapter_scale(adapter), 0
            for start, stop in adapter.rows:
                last = first + stop - start
                entries.append((weight[start:stop], lora_a, lora_b[first:last], scale))
                first = last
        weights, lora_as, lora_bs, scales = zip(*entries, strict=True)
        FE.merge_(weights, lora_as, lora_bs, scales)
        return weight

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters into weight, keeping the rows as they were; nothing happens when merged already.

        Raises `ArgumentError` and changes nothing when the sum is not finite.
        """
        if self.merged:
            return
        weight = self.consolidated_weight()
        if not bool(torch.isfinite(weight).all()):
            raise ArgumentError(
                "merge: expected a finite W + B diag(s) A, got NaN or Inf; nothing was changed"
            )
        before = torch.cat([self.weight[start:stop] for start, stop in self._owned_rows()])
        self.register_buffer("rows_before_merge", before, persistent=False)
        self.weight.copy_(weight)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the rows that `merge` kept, bit for bit; nothing happens when not merged."""
        if not self.merged:
            return
        first = 0
        for start, stop in self._owned_rows():
            self.weight[start:stop].copy_(self.rows_before_merge[first : first + stop - start])
            first += stop - start
        del self.rows_before_merge
        self.merged = False

    def _owned_rows(self) -> list[tuple[int, int]]:
        return [rows for adapter in self.adapter_slices for rows in adapter.rows]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        has_weight = f"{prefix}weight" in state_dict
        if has_weight and self.merged:
            message = "the adapters are merged into it; call fe.unmerge(model) before loading"
            args[-1].append(f"{prefix}weight: {message}")  # error_msgs, which load_state_dict raises
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if has_weight and not any(key.startswith(f"{prefix}lora_") for key in state_dict):
            # A plain checkpoint: these are the base weights from now on.
            self.origin_fingerprint, self.consolidated_tasks = fingerprint(self.weight), 0

    def __getstate__(self) -> dict[str, Any]:
        # The buffers of a running Fisher pass belong to it, not to copies of the layer.
        return {**self.__dict__, "fisher_capture": None}

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{s.name or 'lora'}(r={s.r}, scaling={s.scaling:.4g})" for s in self.adapter_slices
        )
        return f"{super().extra_repr()}, {adapters}" + (", merged" if self.merged else "")
