# SPDX-License-Identifier: Apache-2.0
"""Peers from the package index, which are not part of this repository: how they are imported and called.

`make bench` installs the versions of requirements-extras.txt. A peer that cannot be imported raises
`Unavailable` when it is run, so its record states the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_ewclora.demo.environment import installed_version

from .case import Run

DISTRIBUTIONS = {  # by the name of the module
    "peft": "peft",
    "timm": "timm",
    "torchvision": "torchvision",
    "backpack": "backpack-for-pytorch",
    "opacus": "opacus",
    "avalanche": "avalanche-lib",
    "matplotlib": "matplotlib",
}
INSTALL = "pip install --no-deps -r requirements-extras.txt"
# Operators for which torchvision's Python files register functions; the compiled ones need a matching torch.
_OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align",
    "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d",
    "_deform_conv2d_backward",
)  # fmt: skip


class Unavailable(RuntimeError):
    """A peer that is not installed or cannot be imported."""


@functools.cache
def _declared() -> torch.library.Library:
    """Declarations of torchvision's operators without implementations; cached, since they live as long as the
    library object."""
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor input) -> Tensor")
    return library


@functools.cache
def prepare_torchvision() -> None:
    """Makes torchvision importable beside a build of torch that it was not compiled for. timm and
    transformers import it, though its compiled operators are not used here; without them its import fails."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as failure:
        if "torchvision::" not in str(failure):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declared()
        importlib.import_module("torchvision")


def load(name: str) -> Any:
    """The module of a peer; raises `Unavailable` with the reason and how to install it."""
    if name not in DISTRIBUTIONS:
        raise ValueError(f"extra: expected one of {', '.join(DISTRIBUTIONS)}, got {name!r}")
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"{DISTRIBUTIONS[name]} is not installed; {INSTALL}")
    # Caused by hooks of BackPACK and Opacus on a layer whose input needs no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside peers do not concern this library
            if name != "matplotlib":
                prepare_torchvision()
            return importlib.import_module(name)
    except Exception as failure:
        raise Unavailable(f"{DISTRIBUTIONS[name]} cannot be imported: {failure}") from failure


def versions() -> dict[str, str]:
    """The installed peers, for the environment of records."""
    installed = {name: installed_version(name) for name in DISTRIBUTIONS.values() if name != "matplotlib"}
    return {name: version for name, version in installed.items() if version is not None}


def compiled(method: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """torch.compile for the shapes of one case. Compiled code of earlier cases is dropped: after a few shapes
    of the same function the compiler would use dynamic shapes, and then stop compiling."""
    torch._dynamo.reset()
    compiled_method: Callable[..., Any] = torch.compile(method, dynamic=False, backend=backend)
    return compiled_method


def lazily(make: Callable[[], Run]) -> Run:
    """A run that is made at its first call, so that a missing peer fails there."""
    runs: list[Run] = []

    def run() -> Any:
        if not runs:
            runs.append(make())
        return runs[0]()

    return run


def peft_linear(weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's LoRA layer at scale 1 around a frozen linear, with copies of the given factors; and its two
    parameters."""
    peft = load("peft")
    base = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    base.weight, base.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    config = peft.LoraConfig(r=a.shape[0], lora_alpha=a.shape[0], target_modules=["0"], lora_dropout=0.0)
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight = nn.Parameter(a.detach().clone())
    layer.lora_B["default"].weight = nn.Parameter(b.detach().clone())
    return layer, [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def backpack_square_sum(x: Tensor, dy: Tensor) -> Run:
    """Sum over samples of squared gradients of one linear by BackPACK's SumGradSquared. The forward pass is
    done once, before; a call is the backward pass, which also computes the gradient of the batch."""
    backpack = load("backpack")
    extensions = importlib.import_module("backpack.extensions")
    layer = nn.Linear(x.shape[-1], dy.shape[-1], bias=False, device=x.device, dtype=x.dtype)
    layer = backpack.extend(layer)
    y = layer(x)

    def run() -> list[Tensor]:
        layer.weight.grad = None
        with backpack.backpack(extensions.SumGradSquared(), retain_graph=True):
            y.backward(dy, retain_graph=True)
        return [layer.weight.sum_grad_squared]

    return run


def opacus_square_sum(x: Tensor, dy: Tensor) -> Run:
    """Sum over samples of squared gradients of one linear from Opacus' grad sampler."""
    load("opacus")
    sampler = importlib.import_module("opacus.grad_sample.linear").compute_linear_grad_sample
    layer = nn.Linear(x.shape[-1], dy.shape[-1], bias=False, device=x.device, dtype=x.dtype)

    def run() -> list[Tensor]:
        return [sampler(layer, [x], dy)[layer.weight].square_().sum(0)]

    return run
