"""What an optimizer remembers of adapters that a task boundary has replaced."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from ..errors import ArgumentError, TargetError
from .inject import adapters


def reset_optimizer_state_(optimizer: Optimizer, model: nn.Module) -> int:
    """Forget what `optimizer` gathered for the adapters of `model`, in place; returns how many parameters.

    Consolidation starts new adapters in the same tensors, so moments and step counts of the old ones would
    push them in directions of a task that is over. State of heads and everything else stays, as do learning
    rates and schedules. The next step equals that of a new optimizer for the adapters, for all optimizers of
    `torch.optim` in every implementation; LBFGS, whose history mixes all parameters, forgets all of it.
    Tensors of the state are replaced, so capture CUDA graphs of a step anew. Raises `TargetError` for a model
    without adapters and `ArgumentError` for an optimizer that holds none of them; nothing is changed then.

        >>> ewc.end_task(loader, criterion); reset_optimizer_state_(optimizer, model)
    """
    layers = adapters(model).values()
    if not layers:
        raise TargetError(
            "model: expected adapters, found none; call fused_ewclora.inject(model, config) first"
        )
    owned = {id(p) for layer in layers for _, p in layer.named_lora_parameters()}
    held = [(group, p) for group in optimizer.param_groups for p in group["params"] if id(p) in owned]
    if not held:
        raise ArgumentError(
            "optimizer: expected one that holds adapters of the model, found none; it was made before "
            "inject, or .to() or load_state_dict(assign=True) has replaced the parameters: make a new one"
        )
    if "history_size" in optimizer.defaults:  # LBFGS
        optimizer.state.clear()
    for group, parameter in held:
        if (
            "initial_accumulator_value" in group
        ):  # Adagrad makes its state when it is constructed, never later
            state = optimizer.state[parameter]
            state["step"].zero_()
            state["sum"].fill_(group["initial_accumulator_value"])
        else:
            optimizer.state.pop(parameter, None)
    return len(held)
