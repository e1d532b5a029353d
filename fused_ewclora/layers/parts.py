# SPDX-License-Identifier: Apache-2.0
"""Linear maps whose weight is a parameter of a module that is no linear layer, such as the input projections
of an attention, or the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional as FE
from ..config import QKVLayout
from ..distributed.processes import held_part, is_dtensor, whole_part
from ..ops.capture import CallCapture, RoutedCall, Source
from .adapted import LIVING, MERGED, AdaptedLinear, Updates
from .plain import without_numbers
from .slices import AdapterSlice

PartRule = Callable[[nn.Module], "Iterable[Part]"]

_rules: list[PartRule] = []


class LoRAPart(AdaptedLinear):
    """The adapters of a linear map whose weight another module, the owner, stores and passes in calls.

    It is a child of the owner and has no parameters but its adapters, so the keys of the owner's state_dict
    stay. `fused_ewclora.inject` adds it, with a class of the owner that calls it, and `eject` removes it.
    """

    plain = nn.Module
    is_part = True

    part: Part

    def __init__(
        self,
        owner: nn.Module,
        part: Part,
        adapters: tuple[AdapterSlice, ...],
        lora_alpha: float | None,
        lora_dropout: float,
    ) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple it is not a child of its child
        self.part = part
        self.in_features, self.out_features = part.in_features, part.out_features
        self._add_adapters(adapters, lora_alpha, lora_dropout)
        self.train(owner.training)
        self._reloaded = False
        self._hook = owner._register_load_state_dict_pre_hook(self._before_owner_loads)
        part.group_in(owner, make=True).add_module(part.leaf, self)

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        """Whether the owner stores the weight as `[in_features, out_features]`."""
        return self.part.transposed

    @property
    def owner(self) -> nn.Module:
        """The module that stores the weight."""
        return self._owner[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as the owner stores it, a view if that is a slice of a parameter; empty where another
        process holds the slice."""
        return self.part.weight_in(self.owner)

    def whole_weight(self) -> Tensor:
        """As in `AdaptedLinear`; a slice comes from the process that holds it."""
        if self.part.index is None:
            return super().whole_weight()
        return self.matrix_of(whole_part(getattr(self.owner, self.part.parameter), self.part.index))

    def weight_updates(self, new: Tensor) -> Updates:
        """As in `AdaptedLinear`; nothing where another process holds the weight."""
        elsewhere = self.weight.numel() == 0 and new.numel() > 0
        return [] if elsewhere else super().weight_updates(new)

    @property
    def bias(self) -> Tensor | None:
        """The owner's bias, which may have further rows of other parts."""
        return None if self.part.bias is None else cast("Tensor | None", getattr(self.owner, self.part.bias))

    def weight_place(self) -> tuple[nn.Module, str]:
        """The owner, and the name of its parameter."""
        return self.owner, self.part.parameter

    def bias_place(self) -> tuple[nn.Module, str] | None:
        """The owner, and the name of its parameter with the bias; None without one."""
        return None if self.part.bias is None else (self.owner, self.part.bias)

    def weight_name(self, name: str) -> str:
        """The name of the owner's parameter in a model in which this child has the name `name`."""
        return self.part.weight_name(self.part.owner_name(name))

    def _before_owner_loads(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The owner loads the weight, and this child does not see its key."""
        key = self.part.weight_name(prefix.removesuffix("."))
        if key not in state_dict:
            return
        if self.merged:
            del state_dict[key]
            args[-1].append(f"{key}: {MERGED}")  # error_msgs, which load_state_dict raises
            return
        own = (f"{prefix}{self.part.name}.{name}" for name, _ in self.named_lora_parameters())
        self._reloaded = not any(name in state_dict for name in own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        if self._reloaded:
            self._begin_anew()
            self._reloaded = False

    def release_(self) -> nn.Module:
        """Remove this child from its owner and restore requires_grad; returns the owner."""
        self._thaw()
        self._drop_adapters()
        self.adapter_slices = ()
        LIVING.discard(self)  # an EWC may keep it alive
        self._hook.remove()
        self.part.remove_from(self.owner)
        return self.owner

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x `[..., in_features]`, weight `[out_features, in_features]`, bias `[out_features]` -> y `[...,
        out_features]`; without adapters while merged or disabled."""
        adapters = self.active()
        if adapters is None:
            return F.linear(x, weight, bias)
        return self.apply_adapters(x, weight, bias, adapters, self.fisher_capture)

    def apply_adapters(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adapters: list[FE.Adapter],
        capture: CallCapture | None,
    ) -> Tensor:
        """The fused op, of all rows of the map or of some, as its arguments say."""
        return FE.lora_linear_adapters(
            x,
            weight,
            bias,
            adapters,
            dropout_p=self.dropout_p,
            training=self.training,
            capture=capture,
        )

    def extra_repr(self) -> str:
        part = self.part
        return f"{part.parameter}, in_features={part.in_features}, out_features={part.out_features}" + (
            super().extra_repr()
        )


class PartGroup(nn.Module):
    """Several parts of a module under a name of their own, such as those of one expert."""


class LoRARoutedPart(LoRAPart):
    """A part that takes some rows of the owner's input, such as the tokens that a router sends to an expert.

    A forward of the owner that makes a graph calls all of its parts, those without rows too: which adapters
    have gradients does not depend on the data, and a Fisher pass sees that an expert has none.
    """

    def rows_of(self, name: str) -> str:
        return self.part.owner_name(name)

    def forward(  # type: ignore[override]
        self, x: Tensor, weight: Tensor, bias: Tensor | None, source: Source, rows: Tensor
    ) -> Tensor:
        """x `[M, in_features]` of the rows `rows` `[M]` of the source; the rest as in `LoRAPart`."""
        adapters = self.active()
        if adapters is None:
            return F.linear(x, weight, bias)
        capture = self.fisher_capture
        call = None if capture is None else RoutedCall(capture, source, rows)
        return self.apply_adapters(x, weight, bias, adapters, call)

    def skip(self) -> None:
        """To be called instead, in a forward without a graph that has no rows for it: it counts as called."""
        (self._original or self).__dict__["forward_calls"] += 1

    @property
    def active_now(self) -> bool:
        """Whether a call would apply adapters."""
        return self.adapters_enabled and not self.merged


@dataclass(frozen=True)
class Part:
    """A linear map that a module has without a layer of its own.

    Args:
        name: of the child that carries the adapters; nothing else of the module has this name. With dots it
            is the path of a child of groups, which the module has besides, such as "3.down_proj".
        parameter: name of the module's parameter that holds the weight.
        in_features: of the map.
        out_features: of the map.
        bias: name of the module's parameter that holds the bias, with rows of other parts or without.
        index: of the weight along the first dimension of the parameter, if it is a part of it.
        transposed: whether the weight is stored as `[in_features, out_features]`.
        segment: the slice of a packed projection that the whole map is, such as "k" for `k_proj_weight`.
        layout: of the rows, if the map is a packed projection.
        in_all: whether `"all-linear"` selects it.
        refusal: the reason why it cannot be adapted, if there is one.
        adapted: the class of the child.

    Examples:
        >>> fe.Part("up", parameter="up_weight", in_features=8, out_features=16).leaf
        'up'
    """

    name: str
    parameter: str
    in_features: int
    out_features: int
    bias: str | None = None
    index: int | None = None
    transposed: bool = False
    segment: str | None = None
    layout: QKVLayout | None = None
    in_all: bool = True
    refusal: str | None = None
    adapted: type[LoRAPart] = LoRAPart

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    @property
    def names(self) -> list[str]:
        """What a target can call it, below the owner: its name, those of its groups, and its parameter."""
        steps = self.name.split(".")
        return [*(".".join(steps[:depth]) for depth in range(len(steps), 0, -1)), self.parameter]

    def owner_name(self, name: str) -> str:
        """The name of the owner where the child has the name `name`."""
        return name.removesuffix(self.name).removesuffix(".")

    def group_in(self, owner: nn.Module, make: bool = False) -> nn.Module:
        """The module below `owner` that the child belongs to, or will: the owner itself without groups."""
        group = owner
        for step in self.name.split(".")[:-1]:
            if make and step not in group._modules:
                group.add_module(step, PartGroup())
            group = group._modules[step]  # type: ignore[assignment]
        return group

    def child_of(self, owner: nn.Module) -> nn.Module | None:
        """The module that has the name of the child now, or None."""
        found: nn.Module | None = owner
        for step in self.name.split("."):
            found = None if found is None else found._modules.get(step)
        return found

    def remove_from(self, owner: nn.Module) -> None:
        """Remove the child, and the groups that it leaves empty."""
        steps = self.name.split(".")
        while steps:
            group = owner.get_submodule(".".join(steps[:-1]))
            del group._modules[steps.pop()]
            if group._modules or not isinstance(group, PartGroup):
                return

    def weight_in(self, owner: nn.Module) -> Tensor:
        """The weight as `owner` stores it."""
        return self.of(cast(Tensor, getattr(owner, self.parameter)))

    def of(self, whole: Tensor) -> Tensor:
        """What the part is of its parameter, or of the gradient of that."""
        return whole if self.index is None else held_part(whole, self.index)

    def weight_name(self, owner: str) -> str:
        """The name of the parameter where the owner has the name `owner`."""
        return f"{owner}.{self.parameter}".lstrip(".")

    def unfit(self, owner: nn.Module) -> str | None:
        """The reason why the part cannot be adapted, or None."""
        if self.refusal is not None:
            return self.refusal
        if "forward" in vars(owner):
            return f"the forward of its {type(owner).__name__} has been replaced on the instance"
        parameter = owner._parameters.get(self.parameter)
        if parameter is None:
            return f"its {self.parameter} is not a plain parameter (weight norm, pruning or another wrapper)"
        if not parameter.is_floating_point():
            return f"its {self.parameter} is {parameter.dtype}, not floating point"
        if self.index is not None and is_dtensor(parameter):
            return f"its {self.parameter} is sharded already; inject before fully_shard"
        if not parameter.is_meta and (why := without_numbers(parameter)):
            return why.replace("its weight", f"its {self.parameter}")
        shape = (self.out_features, self.in_features)[:: -1 if self.transposed else 1]
        if tuple(self.weight_in(owner).shape) != shape:
            got = list(self.weight_in(owner).shape)
            return f"its {self.parameter} has shape {got}, not {list(shape)}"
        first = self.name.partition(".")[0]
        taken = hasattr(owner, first) and not isinstance(owner._modules.get(first), PartGroup)
        return f"it has a {first} already" if taken or self.child_of(owner) is not None else None


def register_parts(rule: PartRule) -> PartRule:
    """Add a rule for modules with linear maps that are no layers.

    Can be used as a decorator. A rule of `register_call` that is asked about the module and the name of the
    part gives the module the class that calls the part.

    Args:
        rule: rule(module) -> the `Part`s of it.

    Returns:
        rule.

    Examples:
        >>> rule = fe.register_parts(lambda module: ())
    """
    _rules.append(rule)
    return rule


def parts_of(module: nn.Module) -> list[Part]:
    """All parts that a module has, adapted ones too."""
    return [part for rule in _rules for part in rule(module)]
