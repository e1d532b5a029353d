# SPDX-License-Identifier: Apache-2.0
"""Resetting the optimizer state of adapters at a task boundary."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ..errors import ArgumentError, TargetError
from .from_peft import no_adapters
from .inject import adapters


def reset_optimizer_state_(optimizer: Optimizer, model: nn.Module) -> int:
    """Drop the state that `optimizer` has for the adapters of `model`, in place.

    Consolidation starts new adapters in the same tensors, where moments and step counts of the old adapters
    would still push in the directions of the task that has ended. The state of heads and of all other
    parameters stays, as do learning rates and schedules. The next step of the adapters equals the first step
    of a new optimizer, for every optimizer of `torch.optim` in every implementation; the history of LBFGS
    covers all parameters together and is dropped as a whole. Tensors of the state are replaced, so CUDA
    graphs of a step must be captured again.

    Args:
        optimizer: which holds adapters of the model; unchanged when this raises.
        model: with adapters.

    Returns:
        The number of parameters whose state was dropped.

    Raises:
        TargetError: for a model without adapters.
        ArgumentError: for an optimizer that holds none of them.

    Examples:
        >>> _ = fe.inject(model, config)
        >>> optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
        >>> criterion(model(x), y).backward()
        >>> optimizer.step()
        >>> fe.reset_optimizer_state_(optimizer, model)
        2
    """
    layers = adapters(model).values()
    if not layers:
        raise TargetError(no_adapters(model))
    owned = {id(p) for layer in layers for _, p in layer.named_lora_parameters()}
    held = [(group, p) for group in optimizer.param_groups for p in group["params"] if id(p) in owned]
    if not held:
        raise ArgumentError(
            "optimizer: expected one that holds adapters of the model, got one that holds none; it was made "
            "before inject, or .to() or load_state_dict(assign=True) has replaced the parameters: make a new "
            "one"
        )
    if "history_size" in optimizer.defaults:  # LBFGS
        optimizer.state.clear()
    for group, parameter in held:
        if (
            "initial_accumulator_value" in group
        ):  # Adagrad creates its state in its constructor and nowhere else
            state = optimizer.state[parameter]
            state["step"].zero_()
            state["sum"].fill_(group["initial_accumulator_value"])
        else:
            optimizer.state.pop(parameter, None)
    return len(held)
