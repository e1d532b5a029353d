# SPDX-License-Identifier: Apache-2.0
"""One small call of every operation: the same numbers whoever computes them."""

from __future__ import annotations

import torch
from strategies import Values
from torch import Tensor

from fused_ewclora import functional as FE


def results(backend: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Outputs and gradients by name, on the CPU; shapes are multiples of no vector length."""
    values = Values(12, backend)
    x, w, bias = values.normal(30, 37), values.normal(45, 37, std=0.2), values.normal(45)
    a, b, s = values.normal(10, 37, std=0.2), values.normal(45, 10, std=0.3), values.normal(10)
    dy, fisher = values.normal(30, 45), values.fisher(45, 37)
    x, w, bias, a, b, s, dy, fisher = (t.to(dtype) for t in (x, w, bias, a, b, s, dy, fisher))
    leaves = [t.requires_grad_() for t in (x, w, bias, a, b, s)]
    out: dict[str, Tensor] = {}
    for name, options in (("linear", {}), ("dropout", {"dropout_p": 0.25, "training": True, "seed": 5})):
        y = FE.lora_linear(*leaves, **options, backend=backend)
        grads = torch.autograd.grad(y, leaves, dy)
        out |= {f"{name} {i}": t.detach() for i, t in enumerate((y, *grads))}
    penalty = FE.ewc_penalty([fisher], [a], [b], [s], 3.0, backend=backend)
    grads = torch.autograd.grad(penalty, [a, b, s])
    out |= {f"penalty {i}": t.detach() for i, t in enumerate((penalty, *grads))}
    norm = FE.l1_penalty([a], [b], [s], 3.0, backend=backend)
    grads = torch.autograd.grad(norm, [a, b, s])
    out |= {f"l1 norm {i}": t.detach() for i, t in enumerate((norm, *grads))}
    for mode in ("sample", "batch"):
        tokens = (x.detach().view(6, 5, 37), dy.view(6, 5, 45))
        out[mode] = FE.fisher_accumulate_(fisher.clone(), *tokens, mode=mode, weight=0.5, backend=backend)
    out["one token"] = FE.fisher_accumulate_(fisher.clone(), x, dy, backend=backend)
    out["merge"] = FE.merge_(w.detach().clone(), a, b, s, backend=backend)
    out["threshold"] = FE.soft_threshold_(s.detach().clone(), 0.5, backend=backend)
    return {name: t.cpu() for name, t in out.items()}


def worst_error(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Largest error of any result, in fractions of its largest element."""
    assert actual.keys() == exact.keys()
    errors = {
        name: (t.double() - exact[name]).abs().max() / exact[name].abs().max() for name, t in actual.items()
    }
    return float(max(errors.values()))
