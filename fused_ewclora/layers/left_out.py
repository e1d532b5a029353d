# SPDX-License-Identifier: Apache-2.0
"""Matrices of a model that could be linear maps and get no adapters, so that a report can name them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from .adapted import AdaptedLinear
from .parts import LoRAPart, parts_of

_NO_LINEAR_MAPS = (
    nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _ConvNd, _NormBase,
    ParametrizationList,  # of the weight of a module, which is what is told
)  # fmt: skip
# In the names of parameters that are looked up, added or decays, as position embeddings and A_log are.
_TABLES = ("_log", "bias", "embed", "latent", "pos", "table", "token")
NOT_IN_ALL = '"all-linear" leaves them out, target_modules can name them'

Wanted = Callable[[nn.Module, str], bool]


def left_out(
    model: nn.Module, covered: Iterable[nn.Module], matched: set[tuple[nn.Module, str]], wanted: Wanted
) -> dict[str, list[str]]:
    """Reason -> names of the parameters that may be linear maps, outside of the modules in `covered`, of
    which no part is in `matched` (module, name of the parameter) or has an adapter already.

    wanted: whether a parameter, (module, its name in the model), is asked for.
    """
    covered = set(covered)
    reasons: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        if module in covered or isinstance(module, (AdaptedLinear, *_NO_LINEAR_MAPS)):
            continue
        known: dict[str, str] | None = None  # asked for only where it is needed
        for leaf, _ in _matrices(module):
            name = f"{prefix}.{leaf}".lstrip(".")
            if (module, leaf) in matched or not wanted(module, name):
                continue
            known = _of_parts(module) if known is None else known
            if reason := known.get(leaf, f"parameters of {type(module).__name__}, which is no known layer"):
                reasons.setdefault(reason, []).append(name)
    return reasons


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that can be matrices, or stacks of them, by their shapes and names."""
    for leaf, parameter in module._parameters.items():
        if parameter is None or not parameter.is_floating_point() or parameter.dim() not in (2, 3):
            continue
        if min(parameter.shape[0], *parameter.shape[-2:]) > 1 and not any(word in leaf for word in _TABLES):
            yield leaf, parameter


def _of_parts(module: nn.Module) -> dict[str, str]:
    """By parameter of which the module has parts: the reason why no part of it was selected; empty where one
    has an adapter, or `"all-linear"` could select it."""
    reasons: dict[str, str] = {}
    for part in parts_of(module):
        told = part.in_all or isinstance(part.child_of(module), LoRAPart)
        if told or reasons.get(part.parameter) != "":
            reasons[part.parameter] = "" if told else part.refusal or NOT_IN_ALL
    return reasons
