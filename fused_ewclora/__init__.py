# SPDX-License-Identifier: Apache-2.0
"""Fused LoRA linear layers, the EWC penalty on their products, and Fisher accumulation, for continual
learning.

The examples of all docstrings begin with these names:

    >>> import torch
    >>> from torch import nn
    >>> from collections import OrderedDict
    >>> import fused_ewclora as fe
    >>> from fused_ewclora import functional as FE, methods, metrics, profiling
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(OrderedDict(fc=nn.Linear(8, 6), act=nn.Tanh(), head=nn.Linear(6, 3)))
    >>> x, y = torch.randn(8, 8), torch.arange(8) % 3
    >>> loader = [(x[:4], y[:4]), (x[4:], y[4:])]
    >>> criterion = nn.functional.cross_entropy
    >>> config = fe.LoRAConfig(r=2, target_modules=["fc"])
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from . import _moved, integrations
from ._version import __version__
from .config import LoRAConfig, QKVLayout
from .diagnostics.explain import check_bypass, explain, verify_forward
from .diagnostics.rounding import rounding
from .errors import (
    ArgumentError,
    BackendError,
    CheckpointError,
    DtypeError,
    EWCLoRAError,
    EWCLoRAWarning,
    FisherError,
    IntegrationError,
    LayoutError,
    NotExactlyRepresentable,
    TargetError,
)
from .fishers import EightBitFisher, FactoredFisher, KroneckerFisher
from .layers.adapted import AdaptedLinear
from .layers.bypass import register_call
from .layers.conv import LoRAConv1d, LoRAConv2d
from .layers.inject import adapters, disabled, eject, inject, merge, unmerge
from .layers.linear import LoRALinear
from .layers.matching import register_layout
from .layers.parts import LoRAPart, Part, register_parts
from .ops.dispatch import available_backends, forget_tables, use_backend
from .report import Report

if TYPE_CHECKING:  # type checkers see these as they are; at run time `__getattr__` loads them
    from . import methods as methods
    from . import metrics as metrics
    from . import profiling as profiling
    from . import structures as structures
    from .checkpoints.checkpoint import load_pretrained, save_pretrained
    from .checkpoints.interchange import export_peft, import_peft
    from .diagnostics.fisher_memory import memory
    from .ewc.controller import EWC
    from .ewc.settings import convert_lambda
    from .ewc.structures import Structure
    from .layers.optimizers import reset_optimizer_state_

_moved.install(__name__)
logging.getLogger(__name__).addHandler(logging.NullHandler())

# Names that few programs need or that are slow to import are loaded on first use. Name -> defining module.
_LAZY = {
    "EWC": "ewc.controller",
    "Structure": "ewc.structures",
    "memory": "diagnostics.fisher_memory",
    "convert_lambda": "ewc.settings",
    "save_pretrained": "checkpoints.checkpoint",
    "load_pretrained": "checkpoints.checkpoint",
    "export_peft": "checkpoints.interchange",
    "import_peft": "checkpoints.interchange",
    "reset_optimizer_state_": "layers.optimizers",
}
_LAZY_MODULES = ("methods", "metrics", "profiling", "structures")

__all__ = [
    "EWC",
    "AdaptedLinear",
    "ArgumentError",
    "BackendError",
    "CheckpointError",
    "DtypeError",
    "EWCLoRAError",
    "EWCLoRAWarning",
    "EightBitFisher",
    "FactoredFisher",
    "FisherError",
    "IntegrationError",
    "KroneckerFisher",
    "LayoutError",
    "LoRAConfig",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRALinear",
    "LoRAPart",
    "NotExactlyRepresentable",
    "Part",
    "QKVLayout",
    "Report",
    "Structure",
    "TargetError",
    "__version__",
    "adapters",
    "available_backends",
    "check_bypass",
    "convert_lambda",
    "disabled",
    "eject",
    "explain",
    "export_peft",
    "forget_tables",
    "import_peft",
    "inject",
    "integrations",
    "load_pretrained",
    "memory",
    "merge",
    "register_call",
    "register_layout",
    "register_parts",
    "reset_optimizer_state_",
    "rounding",
    "save_pretrained",
    "unmerge",
    "use_backend",
    "verify_forward",
]


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name

    def __getattr__(name: str) -> object:
        if name in _LAZY:
            value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        elif name in _LAZY_MODULES:
            value = importlib.import_module(f".{name}", __name__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
