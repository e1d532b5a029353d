# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture, which models of transformers store as parameters `[experts, ...]`, with adapters
of their own for each expert.

The classes of experts leave their forward to an implementation that the configuration names (a loop, grouped
or batched products), and state all that it needs: whether weights are transposed, have a bias or a gate.
Injection gives the module another class, whose forward computes the same and calls the adapters.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import QKVLayout
from ..layers.bypass import CLASS, register_call, register_refusal
from ..layers.parts import LoRARoutedPart, Part, PartGroup, register_parts
from ..ops.capture import Source

try:
    from transformers.integrations import moe
except ImportError:  # versions whose experts are linear layers
    moe = None

# What experts state about their weights; earlier versions of transformers state less.
_STATED = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
_DOWN = "down_proj"
Parts = Mapping[tuple[int, str], LoRARoutedPart]  # by expert and parameter

_classes: dict[type[nn.Module], type[CallingExperts]] = {}  # by the class of the plain experts


class CallingExperts(nn.Module):
    """Experts that call the adapters of each expert with the tokens that the router sends to it.

    Arguments, results, parameters and their keys in the state_dict are those of the class that it is mixed
    into, to rounding. As in the loop of transformers, the host waits for the number of tokens of each expert.
    """

    plain: ClassVar[type[nn.Module]]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states `[S, d]`, top_k_index and top_k_weights `[S, k]` -> `[S, d]`."""
        parts = _adapted(self)
        if not any(part.active_now for part in parts.values()):
            for part in parts.values():
                part.skip()
            output: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return output
        return _routed(self, parts, hidden_states, top_k_index, top_k_weights)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle finds a class by its name, which one that is made on demand does not have."""
        return _new, (self.plain,), self.__getstate__()


@torch.compiler.disable
def _routed(
    experts: Any, parts: Parts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The output `[S, d]`, expert by expert."""
    count, top_k = experts.num_experts, top_k_index.shape[-1]
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    every = torch.arange(count, device=chosen.device)
    ends = [0, *torch.searchsorted(chosen, every, right=True).tolist()]
    tokens = order.div(top_k, rounding_mode="floor")[: ends[-1]]
    x, source = hidden_states[tokens], Source(hidden_states)
    graph = torch.is_grad_enabled() or any(part.fisher_capture is not None for part in parts.values())
    outputs = []
    for expert, (start, stop) in enumerate(itertools.pairwise(ends)):
        own = {leaf: part for leaf in _leaves(experts) if (part := parts.get((expert, leaf))) is not None}
        if start < stop or (graph and own):
            outputs.append(_output(experts, expert, own, x[start:stop], source, tokens[start:stop]))
        else:
            for part in own.values():
                part.skip()
    y = torch.cat(outputs) if outputs else x.new_empty(0, hidden_states.shape[-1])
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    weighted = y * top_k_weights.reshape(-1)[order[: len(y)]].unsqueeze(-1)
    if len(y) < len(order):  # entries that name no expert come last, and add nothing
        weighted = F.pad(weighted, (0, 0, 0, len(order) - len(y)))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[place].view(-1, top_k, y.shape[-1]).sum(1).to(hidden_states.dtype)


def _output(
    experts: Any, expert: int, parts: Mapping[str, LoRARoutedPart], x: Tensor, source: Source, rows: Tensor
) -> Tensor:
    """What one expert computes of its rows `[M, d]`, before the weights of the router."""

    def linear(leaf: str, x: Tensor) -> Tensor:
        weight, bias = getattr(experts, leaf)[expert], None
        if experts.is_transposed:
            weight = weight.t()
        if experts.has_bias:
            bias = getattr(experts, f"{leaf}_bias")[expert]
        if (part := parts.get(leaf)) is None:
            return F.linear(x, weight, bias)
        y: Tensor = part(x, weight, bias, source, rows)
        return y

    first, last = _leaves(experts)
    y = linear(first, x)
    return linear(last, experts._apply_gate(y) if experts.has_gate else experts.act_fn(y))


def _leaves(experts: Any) -> tuple[str, str]:
    """The parameters of the first and of the second product."""
    return "gate_up_proj" if experts.has_gate else "up_proj", _DOWN


def _adapted(experts: nn.Module) -> Parts:
    groups = ((step, group) for step, group in experts._modules.items() if isinstance(group, PartGroup))
    return {(int(step), leaf): part for step, group in groups for leaf, part in group._modules.items()}  # type: ignore[misc]


def _calling(plain: type[nn.Module]) -> type[CallingExperts]:
    """The class that calls the adapters of experts of the class `plain`."""
    if plain not in _classes:
        members = {"plain": plain, "__module__": __name__}
        _classes[plain] = type(f"Calling{plain.__name__}", (CallingExperts, plain), members)
    return _classes[plain]


def _new(plain: type[nn.Module]) -> CallingExperts:
    kind = _calling(plain)
    return kind.__new__(kind)


def _known(module: nn.Module) -> bool:
    """Whether the module consists of experts whose forward is known, with adapters or without."""
    plain = module.plain if isinstance(module, CallingExperts) else type(module)
    # The forward that hands over to an implementation; of a subclass with a forward of its own nothing is
    # known.
    forward = inspect.getattr_static(plain, "forward", None)  # a scripted module has one that looks itself up
    dispatches = moe is not None and getattr(forward, "__globals__", None) is vars(moe)
    stated = dispatches and all(hasattr(module, name) for name in _STATED)
    return stated and all(module._parameters.get(leaf) is not None for leaf in _leaves(module))


@register_parts
def experts_parts(module: nn.Module) -> Iterator[Part]:
    """The two linear maps of each expert; "3.down_proj" is one of expert 3."""
    if not _known(module):
        return
    experts: Any = module
    first, last = _leaves(experts)
    refusal = None
    if getattr(module, "_is_expert_parallel", False):
        refusal = "its experts are divided over several processes"
    sides = {leaf: _sides(experts, leaf) for leaf in (first, last)}
    for expert in range(experts.num_experts):
        for leaf in (first, last):
            d_in, d_out = sides[leaf]
            yield Part(
                f"{expert}.{leaf}",
                leaf,
                d_in,
                d_out,
                bias=f"{leaf}_bias" if experts.has_bias else None,
                index=expert,
                transposed=experts.is_transposed,
                layout=_layout(experts) if leaf == first else None,
                in_all=False,
                refusal=refusal,
                adapted=LoRARoutedPart,
            )


def _sides(experts: Any, leaf: str) -> tuple[int, int]:
    """(in_features, out_features) of one expert."""
    *_, rows, columns = getattr(experts, leaf).shape
    return (rows, columns) if experts.is_transposed else (columns, rows)


def _layout(experts: Any) -> QKVLayout | None:
    """Of the rows of gate_up_proj, unless the class divides them in a way of its own."""
    usual = moe is not None and getattr(type(experts), "_apply_gate", None) is moe._default_apply_gate
    return QKVLayout(("gate", "up")) if usual and experts.has_gate and experts.is_concatenated else None


@register_call
def calling_experts(parent: nn.Module, child: str) -> Mapping[str, Any] | None:
    """The class that makes experts call the adapters of each; None if it does so already."""
    if re.fullmatch(rf"\d+\.(gate_up_proj|up_proj|{_DOWN})", child) is None or not _known(parent):
        return None
    return None if isinstance(parent, CallingExperts) else {CLASS: _calling(type(parent))}


@register_refusal
def replaced_mixture(parent: nn.Module, child: str) -> str | None:
    """Why experts are not adaptable in a module whose forward was replaced, as by a kernel that reads their
    parameters; hooks of accelerate call the forward that was there."""
    experts = parent._modules[child]
    if "forward" in vars(parent) and not hasattr(parent, "_hf_hook") and experts and _known(experts):
        return f"the forward of its {type(parent).__name__} has been replaced on the instance"
    return None
