# SPDX-License-Identifier: Apache-2.0
"""Whether parameters are still the plain ones that a layer was given: parametrizations, weight norm, spectral
norm, pruning and quantisation put other tensors in their place."""

from __future__ import annotations

from torch import Tensor, nn

from ..distributed.processes import is_dtensor


def own_tensors(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself by name. A replica of `nn.DataParallel` has none: of it, the copies
    of them that gradients pass through."""
    return vars(module).get("_former_parameters") or module._parameters


def not_plain(module: nn.Module, name: str) -> str | None:
    """The reason why `name` is not a plain parameter of the module, and what undoes it; or None.

    A parameter that is None, as a bias may be, is plain.
    """
    return (
        None
        if name in own_tensors(module) or name in module._parameters
        else f"its {name} {_replaced_by(module, name)}"
    )


def without_numbers(tensor: Tensor) -> str | None:
    """The reason why the numbers of a weight cannot be rewritten in place, or None."""
    if tensor.is_meta:
        return "its weight is on the meta device and holds no numbers: it is offloaded, or not loaded yet"
    # Subclasses of tensors can store something else than the numbers that they show; quantised ones do.
    if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or is_dtensor(tensor):
        return None
    return f"its weight is {type(tensor).__name__}, not a plain tensor"


def _replaced_by(module: nn.Module, name: str) -> str:
    parametrized = module._modules.get("parametrizations")
    if isinstance(parametrized, nn.ModuleDict) and name in parametrized:
        kinds = ", ".join(type(step).__name__ for step in parametrized[name].children())
        undo = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r})"
        return f"is parametrized by {kinds}; undo it with {undo}"
    for parameter, kind, undo in (
        (f"{name}_g", "weight norm", "torch.nn.utils.remove_weight_norm(layer)"),
        (f"{name}_mask", "pruning", f"torch.nn.utils.prune.remove(layer, {name!r})"),
        (f"{name}_u", "spectral norm", "torch.nn.utils.remove_spectral_norm(layer)"),
    ):
        if parameter in module._parameters or parameter in module._buffers:
            return f"is computed by {kind}; undo it with {undo}"
    if name in module._buffers or isinstance(vars(module).get(name), Tensor):
        # As removing a parametrization with several parameters leaves it.
        value = f"torch.nn.Parameter(layer.{name}, requires_grad=False)"
        return f"is a plain tensor instead of a parameter; undo it with layer.{name} = {value}"
    return "is no longer a parameter of it"
