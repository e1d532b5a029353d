# SPDX-License-Identifier: Apache-2.0
"""`AdaptedLinear`: what a linear layer has once it carries adapters, whichever class stores its weight."""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import functional as FE
from ..distributed.processes import is_dtensor, whole
from ..errors import ArgumentError, FisherError, TargetError
from ..ops.capture import FisherCapture
from .digest import digest
from .finite import check_finite
from .plain import not_plain, own_tensors, without_numbers
from .slices import AdapterSlice, fingerprint

# Where a parameter is stored: the `_parameters` dictionary of its module, and its key there.
Location = tuple[dict[str, nn.Parameter | None], str]
# What to write where: (target, new value), the targets being tensors of a model or views of them.
Updates = list[tuple[Tensor, Tensor]]
MERGED = "the adapters are merged into this weight; call fe.unmerge(model) before loading"
# Every adapted layer that is alive: models that share a weight are found here.
LIVING: weakref.WeakSet[AdaptedLinear] = weakref.WeakSet()


class Composer(Protocol):
    """Computes the adapters of a layer whose lora_A and lora_B are not all that it applies: a method may add
    directions of earlier tasks, or normalise scales.

    A composer holds no tensors. The tensors that it uses are parameters of the layer whose names begin with
    lora_, so that they are moved, copied and saved with the layer.
    """

    def adapters(self, layer: AdaptedLinear) -> list[FE.Adapter]:
        """The adapters that the layer applies, differentiable; an empty list when there are none."""


class AdaptedLinear(nn.Module):
    """Base class of adapted layers: all that injection, merging, the Fisher and checkpoints use of them.

    The attribute `plain` of a subclass is the class that it replaces. `adopt_` turns a module of that class
    into an adapted layer by assigning its `__class__`, so that the module itself stays in its place.
    """

    plain: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False  # whether `plain` stores its weight as `[in_features, out_features]`
    weight_path: ClassVar[str] = "weight"  # path of the weight below the layer
    is_part: ClassVar[bool] = False  # whether another module stores the weight, see `LoRAPart`
    in_all: ClassVar[bool] = True  # whether "all-linear" selects modules of the class `plain`
    stores_matrices: ClassVar[bool] = True  # whether lora_A and lora_B are parameters of two dimensions

    in_features: int
    out_features: int
    weight: Tensor
    bias: Any  # Tensor or None
    adapter_slices: tuple[AdapterSlice, ...]
    r: int
    lora_alpha: float | None
    lora_dropout: float
    adapters_enabled: bool
    merged: bool
    fisher_capture: FisherCapture | None
    forward_calls: int  # eager ones only; a graph that counts could not be checkpointed
    origin_fingerprint: str
    consolidated_tasks: int  # tasks whose B diag(s) A is part of weight
    base_trainable: tuple[str, ...]  # which of weight and bias required gradients before injection
    rows_before_merge: Tensor  # exists only while the adapters are merged
    composer: Composer | None = None
    # Of a replica, which nn.DataParallel makes for every forward pass: the layer that it is a copy of, and
    # the copies of the parameters of that by name.
    _original: ClassVar[AdaptedLinear | None] = None
    _former_parameters: ClassVar[dict[str, Any] | None] = None

    @staticmethod
    def features(module: nn.Module) -> tuple[int, int]:
        """(in_features, out_features) of a module of the class `plain`."""
        return module.in_features, module.out_features  # type: ignore[return-value]

    @classmethod
    def unfit_shape(cls, module: nn.Module) -> str | None:
        """The reason why a module of the class `plain`, with a plain weight, cannot be adapted, or None."""
        shape, expected = list(cast(Tensor, module.weight).shape), list(cls.features(module))
        sides = "[in_features, out_features]" if cls.transposed else "[out_features, in_features]"
        fits = shape == (expected if cls.transposed else expected[::-1])
        return None if fits else f"its weight has shape {shape}, not {sides}"

    @classmethod
    def kernel_of(cls, module: nn.Module) -> tuple[int, ...]:
        """The size of the windows that a module of the class `plain` maps; () if it maps rows."""
        return ()

    @classmethod
    def unlike_peft(cls, module: nn.Module) -> str | None:
        """The reason why PEFT's LoRA of a module of the class `plain` computes something else, or None."""
        return None

    @property
    def base_weight(self) -> Tensor:
        """The weight as `[out_features, in_features]`, to be read: a view of the parameter where its strides
        allow one, else a copy. `weight_updates` changes it."""
        return self.matrix_of(self.weight)

    def whole_weight(self) -> Tensor:
        """`base_weight`, gathered if several processes share it; each of them must call this."""
        return whole(self.base_weight)

    def matrix_of(self, stored: Tensor) -> Tensor:
        """A stored weight, or some rows of one, as a matrix `[out_features, in_features]`."""
        return stored.t() if self.transposed else stored

    def stored_as(self, stored: Tensor, matrix: Tensor) -> Tensor:
        """The inverse of `matrix_of`: a matrix in the shape of `stored`."""
        return matrix.t() if self.transposed else matrix

    def weight_updates(self, new: Tensor) -> Updates:
        """What to write so that `base_weight` becomes `new` `[out_features, in_features]`, rounded to its
        dtype; nothing is written yet."""
        return [(self.weight, self.stored_as(self.weight, new))]

    def weight_state(self) -> dict[str, Tensor] | None:
        """The tensors that determine `base_weight`, by name, where these are not its numbers; else None."""
        return None

    def state_like(self, parts: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the shapes and dtypes of a `weight_state` that has these parts."""
        return self.weight_state() or {}

    def state_updates(self, state: Mapping[str, Tensor]) -> Updates:
        """What to write so that `weight_state` becomes `state`; nothing is written yet."""
        now = self.weight_state() or {}
        return [(now[name], value) for name, value in state.items()]

    def fingerprint_of(self, state: Mapping[str, Tensor]) -> str:
        """The fingerprint of the weight that `state` determines: a hash, the kind "parts" and a longer hash,
        in the form of `fingerprint`; `""` on the meta device."""
        parts = {name: digest(tensor) for name, tensor in sorted(state.items())}
        if not all(parts.values()):
            return ""
        hashed = hashlib.sha256(repr(parts).encode()).hexdigest()
        return f"{hashed[:16]}:parts:{hashed[:32]}"

    def weight_fingerprint(self) -> str:
        """The `fingerprint` of the weight as it is now; every process that holds a part of it must call
        this."""
        state = self.weight_state()
        return fingerprint(self.whole_weight()) if state is None else self.fingerprint_of(state)

    @classmethod
    def unfit(cls, module: nn.Module) -> str | None:
        """The reason why a module of the class `plain` has no weight that this class could take, or None."""
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is not a plain parameter (weight norm, pruning or another wrapper)"
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}, not floating point"
        if is_traceable_wrapper_subclass(weight) and not is_dtensor(weight):
            return f"its weight is {type(weight).__name__}, which is not one that can be adapted"
        return cls.unfit_shape(module)

    def not_writable(self) -> str | None:
        """The reason why `weight_updates` cannot change the weight, or None."""
        return without_numbers(self.weight)

    def not_ejectable(self, merge: bool) -> str | None:
        """The reason why the class `plain` could not hold the weight that `eject` would leave, or None."""
        return None

    def weight_place(self) -> tuple[nn.Module, str]:
        """The module that stores the weight, and the name that it has there."""
        owner, _, leaf = self.weight_path.rpartition(".")
        return self.get_submodule(owner), leaf

    def bias_place(self) -> tuple[nn.Module, str] | None:
        """As `weight_place`, of the bias; None for a kind of layer that has no such attribute."""
        return self.weight_place()[0], "bias"

    def weight_name(self, name: str) -> str:
        """The name of the weight in a model in which the layer has the name `name`."""
        return f"{name}.{self.weight_path}".lstrip(".")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the numbers in the base weight."""
        return self.weight.dtype

    def rows_of(self, name: str) -> str:
        """What has the rows of its input, where the layer has the name `name`: the layer itself, or the owner
        of a part that takes some of the owner's rows."""
        return name

    @property
    def dropout_p(self) -> float:
        """The probability of dropout on the input of the low-rank branch during training."""
        return self.lora_dropout

    def not_fused(self) -> str | None:
        """The reason why calls of this layer do not run on the fused op, or None."""
        return None

    def not_plain(self) -> str | None:
        """The reason why weight, bias or adapters are not the plain parameters that the layer was given (a
        parametrization, pruning, quantisation), or None."""
        adapters = [(self, name) for piece in self.adapter_slices for name in (piece.a_name, piece.b_name)]
        reasons = (not_plain(module, name) for module, name in (*self._base_places(), *adapters))
        return next((reason for reason in reasons if reason is not None), None)

    def _base_places(self) -> list[tuple[nn.Module, str]]:
        return [place for place in (self.weight_place(), self.bias_place()) if place is not None]

    def base_forward(self, x: Tensor) -> Tensor:
        """The output of the class `plain`, without adapters."""
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def adopt_(
        cls,
        module: nn.Module,
        adapters: tuple[AdapterSlice, ...],
        lora_alpha: float | None,
        lora_dropout: float,
    ) -> AdaptedLinear:
        """Turn `module` itself into this class, with its hooks and state_dict keys; the caller validates."""
        module.__class__ = cls
        layer = cast(AdaptedLinear, module)
        try:
            layer._add_adapters(adapters, lora_alpha, lora_dropout)
        except BaseException:  # for example when memory runs out
            layer.release_()
            raise
        return layer

    def release_(self) -> nn.Module:
        """Turn this module back into its plain class in place: remove the adapters, restore requires_grad."""
        self._thaw()
        self._drop_adapters()
        for name in _OWN:
            self.__dict__.pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    def _thaw(self) -> None:
        for module, name in self._base_places():
            if name in self.base_trainable:
                module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]

    def _drop_adapters(self) -> None:
        for name, _ in self.named_lora_parameters():
            del self._parameters[name]
        if self.merged:
            del self.rows_before_merge

    def _add_adapters(
        self, adapters: tuple[AdapterSlice, ...], lora_alpha: float | None, lora_dropout: float
    ) -> None:
        LIVING.add(self)
        self.adapter_slices = adapters
        self.r, self.lora_alpha, self.lora_dropout = adapters[0].r, lora_alpha, lora_dropout
        self.adapters_enabled, self.merged = True, False
        self.fisher_capture = None
        self.forward_calls = 0
        self.consolidated_tasks = 0
        self.origin_fingerprint = self.weight_fingerprint()
        base = {name: module._parameters.get(name) for module, name in self._base_places()}
        trainable = {name: p for name, p in base.items() if p is not None and p.requires_grad}
        self.base_trainable = tuple(trainable)
        for parameter in trainable.values():
            parameter.requires_grad_(False)
        dtype = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype
        for adapter in adapters:
            a_shape, b_shape = (adapter.r, self.in_features), (adapter.row_count, adapter.r)
            for name, shape in ((adapter.a_name, a_shape), (adapter.b_name, b_shape)):
                value = torch.empty(shape, dtype=dtype, device=self.weight.device)
                setattr(self, name, nn.Parameter(value))
        self.reset_adapters()

    @property
    def initial_bound(self) -> float:
        """The bound b of the uniform distribution on (-b, b) that a new lora_A is drawn from."""
        return 1.0 / math.sqrt(self.in_features)

    @torch.no_grad()
    def reset_adapters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the adapters in place, as at the start of a task: A ~ U(-1/sqrt(in_features),
        1/sqrt(in_features)), which is Kaiming uniform with a = sqrt 5, and B = 0.

        A generator on another device draws on its own device and the numbers are copied, so that one seed
        gives the same A on every device, and in every memory format.
        """
        bound = self.initial_bound
        for _, lora_a, lora_b in self.adapter_parameters():
            device = lora_a.device if generator is None else generator.device
            if device == lora_a.device and lora_a.is_contiguous():
                lora_a.uniform_(-bound, bound, generator=generator)
            else:  # numbers are drawn in the order of memory
                drawn = torch.empty(lora_a.shape, dtype=lora_a.dtype, device=device)
                lora_a.copy_(drawn.uniform_(-bound, bound, generator=generator))
            lora_b.zero_()

    def named_lora_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that adaptation added: lora_A, lora_B and lora_scale if it exists.

        The names are those of checkpoints, wherever the layer stores the parameters.
        """
        table = own_tensors(self)
        return [(name, p) for name, p in table.items() if p is not None and name.startswith("lora_")]

    def adapter_parameters(self) -> list[tuple[AdapterSlice, nn.Parameter, nn.Parameter]]:
        """(slice, lora_A, lora_B) per adapter, in the order of `FisherCapture.fishers`."""
        adapters = []
        for piece in self.adapter_slices:
            (a_table, a_name), (b_table, b_name) = self.parameter_locations(piece)
            lora_a, lora_b = a_table.get(a_name), b_table.get(b_name)
            if lora_a is None or lora_b is None:
                raise TargetError(f"adapters: expected plain parameters, but {self.not_plain()}")
            adapters.append((piece, lora_a, lora_b))
        return adapters

    def parameter_locations(self, piece: AdapterSlice) -> tuple[Location, Location]:
        """Where lora_A and lora_B of an adapter are stored; the dictionaries live as long as the layer."""
        table = self._former_parameters or self._parameters
        return (table, piece.a_name), (table, piece.b_name)

    def composed(self) -> list[FE.Adapter]:
        """The adapters that the layer applies: those of its `composer`, else lora_A, lora_B and the scale."""
        if self.composer is not None:
            return self.composer.adapters(self)
        return [FE.Adapter(a, b, self.adapter_scale(s), s.rows) for s, a, b in self.adapter_parameters()]

    def _composed_in_eval(self) -> list[FE.Adapter]:
        training, self.training = self.training, False
        try:
            return self.composed()
        finally:
            self.training = training

    def adapter_scale(self, adapter: AdapterSlice) -> float | Tensor:
        """The scale of one adapter: its `scaling`, times the parameter `lora_scale` if it exists."""
        learned = (self._former_parameters or self._parameters).get(adapter.scale_name)
        if learned is None:
            return adapter.scaling
        return learned if adapter.scaling == 1.0 else learned * adapter.scaling

    def active(self) -> list[FE.Adapter] | None:
        """The adapters of a call that begins, which is counted; None if it computes what the plain class
        computes."""
        if not torch.compiler.is_compiling():
            (self._original or self).__dict__["forward_calls"] += 1
        if self.merged or not self.adapters_enabled:
            return None
        adapters = self.composed()
        if not adapters and self.fisher_capture is not None:
            # The op collects the Fisher in its backward, and it runs only with an adapter.
            adapters = [FE.Adapter(a, b, 0.0, s.rows) for s, a, b in self.adapter_parameters()]
        return adapters or None

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in_features]` -> y `[..., out_features]`; the plain output while merged or disabled."""
        adapters = self.active()
        if adapters is None:
            return self.base_forward(x)
        return FE.lora_linear_adapters(
            x,
            self.base_weight,
            self.bias,
            adapters,
            dropout_p=self.dropout_p,
            training=self.training,
            capture=self.fisher_capture,
        )

    def row_count(self, x: Tensor) -> int:
        """The number of rows that the linear map is applied to in a call with x."""
        return x.numel() // max(x.shape[-1], 1)

    def input_rows(self, x: Tensor) -> Iterator[Tensor]:
        """These rows `[rows, in_features]`, in pieces of limited size where they are copies."""
        yield x.reshape(-1, x.shape[-1])

    @torch.no_grad()
    def consolidated_weight(self) -> Tensor:
        """A new tensor W + B diag(s) A, summed in fp32 (fp64 for fp64) and rounded once.

        Of what the layer computes in eval mode: no perturbation of training is part of a weight. Rows without
        an adapter are copied. Raises `TargetError` while merged, when W holds the sum already.
        """
        if self.merged:
            raise TargetError(
                "consolidated_weight: expected unmerged adapters, got merged ones; call fe.unmerge(model)"
            )
        weight = self.base_weight.detach().clone()
        entries: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        for adapter in self._composed_in_eval():
            first = 0
            for start, stop in adapter.rows:
                last = first + stop - start
                entries.append(
                    (weight[start:stop], adapter.lora_a, adapter.lora_b[first:last], adapter.scale)
                )
                first = last
        if not entries:
            return weight
        weights, lora_as, lora_bs, scales = zip(*entries, strict=True)
        FE.merge_(weights, lora_as, lora_bs, scales)
        return weight

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters into weight and keep a copy of the rows that change; a no-op when already merged.

        Raises `ArgumentError` and changes nothing when the sum is not finite.
        """
        if self.merged:
            return
        self._check_plain("merge")
        weight = self.consolidated_weight()
        check_finite({"W + B diag(s) A": weight}, "merge", ArgumentError)
        before = torch.cat([self.base_weight[start:stop] for start, stop in self._owned_rows()])
        self.register_buffer("rows_before_merge", before, persistent=False)
        self._write(weight)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the rows that `merge` kept, bit for bit; a no-op when not merged."""
        if not self.merged:
            return
        self._check_plain("unmerge")
        weight, first = self.base_weight.detach().clone(), 0
        for start, stop in self._owned_rows():
            weight[start:stop] = self.rows_before_merge[first : first + stop - start]
            first += stop - start
        self._write(weight)
        del self.rows_before_merge
        self.merged = False

    def _write(self, weight: Tensor) -> None:
        for target, value in self.weight_updates(weight):
            target.copy_(value)

    def _check_plain(self, action: str) -> None:
        if why := self.not_plain():
            raise TargetError(f"{action}: {why}. Nothing was changed")

    def _owned_rows(self) -> list[tuple[int, int]]:
        return [rows for adapter in self.adapter_slices for rows in adapter.rows]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        has_weight = key in state_dict
        if has_weight and self.merged:
            args[-1].append(f"{key}: {MERGED}")  # error_msgs, which load_state_dict raises
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if has_weight and not any(key.startswith(f"{prefix}lora_") for key in state_dict):
            self._begin_anew()

    def _begin_anew(self) -> None:
        """The weights of a checkpoint without adapters are the base weights from now on."""
        self.origin_fingerprint, self.consolidated_tasks = self.weight_fingerprint(), 0

    def _replicate_for_data_parallel(self) -> AdaptedLinear:
        """What `nn.DataParallel` asks every module for.

        Raises `FisherError` in a Fisher pass: each replica has some samples of a batch, and the calls of one
        forward pass are taken for calls with the same samples.
        """
        if self.fisher_capture is not None:
            raise FisherError(
                f"{self.fisher_capture.name}: a Fisher pass through the replicas of nn.DataParallel, each of "
                "which has a part of the samples; call the model inside in the pass, model.module(x) instead "
                "of model(x)"
            )
        replica: AdaptedLinear = super()._replicate_for_data_parallel()
        vars(replica)["_original"] = self  # as a plain attribute, no child
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # The buffers belong to the running Fisher pass, not to copies of the layer.
        return {**self.__dict__, "fisher_capture": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVING.add(self)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{s.name or 'lora'}(r={s.r}, scaling={s.scaling:.4g})" for s in self.adapter_slices
        )
        state = ", merged" if self.merged else "" if self.adapters_enabled else ", disabled"
        tasks = f", consolidated_tasks={self.consolidated_tasks}" if self.consolidated_tasks else ""
        return f"{super().extra_repr()}, {adapters}{tasks}{state}"


# Attributes that an adapted layer has in addition to those of its plain class.
_OWN = set(AdaptedLinear.__annotations__) - {
    "plain", "transposed", "weight_path", "is_part", "in_all", "stores_matrices", "in_features",
    "out_features", "weight", "bias",
}  # fmt: skip
