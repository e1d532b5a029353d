# SPDX-License-Identifier: Apache-2.0
"""A dry run of adapters in a named model: the layers that match, whether they run, their backend and errors.

The injected model runs in fp32 on the backends that `auto` chooses, and on the PyTorch reference. Both runs
are compared with a dense model in fp64, which has the plain classes with W + B diag(s) A in place of W. Its
weight gradient G gives dA = s Bᵀ G and dB = s G Aᵀ.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ALL_LINEAR, LoRAConfig
from ..errors import LayoutError, TargetError
from ..integrations import _named
from ..layers.adapted import LIVING
from ..layers.inject import adapters, eject, inject
from ..layers.matching import is_linear, known_layout, load_libraries, shorten
from ..layers.parts import LoRAPart, parts_of
from ..ops.dispatch import use_backend
from ..report import Report
from .explain import explain, verify_forward

# An error may be this multiple of the error of the reference in the same layer, or of the reference's median
# error, whichever is larger, because the orders of summation differ.
SLACK = 4.0
ROUNDOFF = 16 * torch.finfo(torch.float32).eps  # allowance where the reference happens to be exact
LIMIT = 2.0**-10  # for every error: deep models amplify rounding errors, but not beyond this
# The error of a gradient that nearly cancels is divided by this fraction of the median norm of all gradients.
SMALL = 2.0**-10
# Max pooling passes a gradient to the largest of its inputs, and rounding decides between two that are nearly
# equal. Layers beyond their limits are therefore also allowed what noise inside of the model changes of the
# exact gradients, noise of so many roundings that it changes more of these decisions than those of fp32 do.
NUDGE = 32 * torch.finfo(torch.float32).eps
DECIDED = 8 * LIMIT  # for errors of this kind
LOST = 2.0**-16  # fraction of the median norm below which a gradient is only rounding error
OUTPUT = " output"  # cannot be the name of a module


@dataclass(frozen=True)
class Measured:
    """The flattened outputs of a model, and the gradients of its adapters by parameter name."""

    output: Tensor
    gradients: dict[str, Tensor]


def run(
    name: str,
    library: str | None = None,
    targets: Sequence[str] = (),
    slices: Sequence[str] = (),
    rank: int = 8,
    full: bool = False,
) -> dict[str, Any]:
    """The data that `python -m fused_ewclora check` prints; `problems` is empty when there are none.

    Raises the errors of `inject` when nothing matches or a layout is missing, `ArgumentError` for an unknown
    model, `IntegrationError` when its library is not installed.

        >>> run("vit_tiny_patch16_224", targets=["qkv"], slices=("k", "v"))["problems"]
        []
    """
    torch.manual_seed(0)
    named = _named.build(name, library, full)
    model, sample = named.model, dict(named.sample)
    _perturb_constants(model)
    config = LoRAConfig(
        r=rank,
        target_modules=list(targets) or _default_targets(model, slices),
        slices=tuple(slices) or None,
    )
    injected = inject(model, config)
    problems = _bypass(model, sample)
    rows = _layers(model, sample)
    for lora_b in _lora_bs(model):
        lora_b.normal_(0, 0.1)  # with zeros, the gradient of A would be zero
    errors = _errors(model, sample)
    problems += errors.pop("problems")
    by_layer = errors.pop("layers")
    for row in rows:
        row.update(by_layer[row["name"]])
    return {
        "model": name,
        "library": f"{named.library} {named.version}",
        "built": named.built,
        "input": {key: list(value.shape) for key, value in sample.items()},
        "config": {"target_modules": config.target_modules, "slices": list(slices) or None, "r": rank},
        **injected.summary,
        "layers": rows,
        **errors,
        "problems": problems,
    }


def _default_targets(model: nn.Module, slices: Sequence[str]) -> str | list[str]:
    """All linear layers, or the known packed projections that have these slices."""
    if not slices:
        return ALL_LINEAR
    load_libraries(model)
    names = []
    for name, module in model.named_modules():
        layout = known_layout(model, name) if is_linear(module) else None
        segments = set(layout.segments if layout is not None else ())
        for part in parts_of(module):
            segments.update([part.segment or ""] if part.layout is None else part.layout.segments)
        if set(slices) <= segments:
            names.append(name)
    if not names:
        raise LayoutError(f"slices: the model has no known packed projection with {list(slices)}")
    return names


@torch.no_grad()
def _perturb_constants(model: nn.Module) -> None:
    """Add noise to constant parameters (norms, biases, layer scales), which would hide errors."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and bool((parameter == parameter.flatten()[:1]).all()):
            parameter.add_(0.1 * torch.randn_like(parameter))


def _lora_bs(model: nn.Module) -> Iterator[Tensor]:
    for layer in adapters(model).values():
        for _, _, lora_b in layer.adapter_parameters():
            yield lora_b.detach()


def _bypass(model: nn.Module, sample: Mapping[str, Tensor]) -> list[str]:
    try:
        verify_forward(model, sample)
    except TargetError as error:
        return [str(error)]
    return []


def _layers(model: nn.Module, sample: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A row per layer: its adapters, its layout, its calls in one forward pass, and the backend of these."""
    layers = adapters(model)
    rows = []
    for served in explain(model, sample).rows:
        layer = layers[served["name"]]
        layout = layer.part.layout if isinstance(layer, LoRAPart) else known_layout(model, served["name"])
        rows.append(
            {
                "name": served["name"],
                "segments": layout and layout.segments,
                "sizes": layout and layout.sizes_of(layer.out_features),
                "interleave": layout and layout.interleave,
                "slices": [piece.name for piece in layer.adapter_slices if piece.name] or None,
                "calls": served["calls"],
                "backend": served["backend"],
                "algorithm": served["algorithm"],
                "why_not_faster": served["why_not_faster"],
            }
        )
    return rows


def _errors(model: nn.Module, sample: Mapping[str, Tensor]) -> dict[str, Any]:
    """Relative errors, in the Frobenius norm, of the output and of the gradients of each layer's adapters."""
    names = {
        name: [f"{name}.{leaf}".lstrip(".") for leaf, _ in layer.named_lora_parameters()]
        for name, layer in adapters(model).items()
    }
    fused = _measure(model, sample)
    with use_backend("reference"):
        reference = _measure(model, sample)
    try:
        dense = _Dense(model)
        exact, compared_with = dense.measured(sample), "dense model in fp64"
    except RuntimeError as error:
        exact = reference
        compared_with = f"PyTorch reference in fp32 (the model does not run in fp64: {error})"
    errors, reference_errors = _compared(fused, exact, names), _compared(reference, exact, names)
    median = statistics.median(reference_errors.values())
    limits = {
        key: LIMIT if exact is reference else min(LIMIT, SLACK * max(error, median) + ROUNDOFF)
        for key, error in reference_errors.items()
    }
    if exact is not reference and any(not errors[key] <= limits[key] for key in limits):
        with _nudged(model):
            changes = _compared(dense.measured(sample), exact, names)
        limits = {key: max(limit, min(DECIDED, SLACK * changes[key])) for key, limit in limits.items()}
    norms = _norms(exact, names)
    median_norm = statistics.median(norms.values())
    return {
        "compared_with": compared_with,
        "output_error": errors[OUTPUT],
        "output_limit": limits[OUTPUT],
        "reference_error": None if exact is reference else median,
        "without_gradient": [name for name, norm in norms.items() if norm <= LOST * median_norm],
        "layers": {name: {"gradient_error": errors[name], "limit": limits[name]} for name in names},
        "problems": [
            f"{key.strip()}: relative error {error:.3g}, more than {limits[key]:.3g}"
            for key, error in errors.items()
            if not error <= limits[key]  # a NaN is a problem too
        ],
    }


def _compared(measured: Measured, exact: Measured, names: Mapping[str, list[str]]) -> dict[str, float]:
    """Relative errors of the gradients of each layer, and of the output under the key `OUTPUT`."""
    errors = {OUTPUT: _quotient(float((measured.output - exact.output).norm()), float(exact.output.norm()))}
    norms = _norms(exact, names)
    least = SMALL * statistics.median(norms.values())
    difference = Measured(
        exact.output, {key: measured.gradients[key] - gradient for key, gradient in exact.gradients.items()}
    )
    for name, error in _norms(difference, names).items():
        errors[name] = _quotient(error, max(norms[name], least))
    return errors


def _norms(measured: Measured, names: Mapping[str, list[str]]) -> dict[str, float]:
    """The Frobenius norm of all adapter gradients of each layer."""
    return {
        name: float(torch.cat([measured.gradients[key].flatten() for key in keys]).norm())
        for name, keys in names.items()
    }


def _quotient(error: float, norm: float) -> float:
    if error == 0.0:
        return 0.0
    return error / norm if norm else math.inf


def _measure(model: nn.Module, sample: Mapping[str, Tensor]) -> Measured:
    named = {
        f"{name}.{leaf}".lstrip("."): p
        for name, layer in adapters(model).items()
        for leaf, p in layer.named_lora_parameters()
    }
    output, gradients = _differentiated(model, sample, list(named.values()))
    return Measured(output, dict(zip(named, gradients, strict=True)))


def _differentiated(
    model: nn.Module, sample: Mapping[str, Tensor], parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """All outputs as one fp64 vector, and the gradients of a random projection of it."""
    torch.manual_seed(1)  # for models whose forward draws random numbers
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    moved = {key: x.to(dtype) if x.is_floating_point() else x for key, x in sample.items()}
    values = model(**moved) if len(moved) > 1 or "x" not in moved else model(moved["x"])
    output = torch.cat([t.flatten().double() for t in _tensors(values)])
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    gradients: Sequence[Tensor | None] = [None] * len(parameters)
    if output.requires_grad:  # it does not when every adapted layer is bypassed
        loss = output @ direction / len(output) ** 0.5
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return output.detach(), [
        torch.zeros_like(p, dtype=torch.float64) if g is None else g.double()
        for g, p in zip(gradients, parameters, strict=True)
    ]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)


class _Dense:
    """The dense fp64 model; `model` is converted to it in place and loses its adapters."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model.double()
        layers = adapters(model)
        self._pieces = {
            name: [
                (piece, a.detach().clone(), b.detach().clone(), layer.adapter_scale(piece))
                for piece, a, b in layer.adapter_parameters()
            ]
            for name, layer in layers.items()
        }
        # After eject the layers are plain modules, or gone. The copies do not count as users of the weights.
        self._layers = [copy.copy(layer) for layer in layers.values()]
        LIVING.difference_update(self._layers)
        places = [layer.weight_place() for layer in layers.values()]
        eject(model)
        model.requires_grad_(False)
        self._weights: list[Tensor] = [owner.get_parameter(name).requires_grad_() for owner, name in places]

    def measured(self, sample: Mapping[str, Tensor]) -> Measured:
        """The results of the model."""
        output, gradients = _differentiated(self._model, sample, self._weights)
        found: dict[str, Tensor] = {}
        for (name, pieces), layer, gradient in zip(
            self._pieces.items(), self._layers, gradients, strict=True
        ):
            part = layer.part.of(gradient) if isinstance(layer, LoRAPart) else gradient
            by_rows = layer.matrix_of(part)
            for piece, lora_a, lora_b, scale in pieces:
                rows = scale * torch.cat([by_rows[start:stop] for start, stop in piece.rows])
                found[f"{name}.{piece.a_name}".lstrip(".")] = lora_b.t() @ rows
                found[f"{name}.{piece.b_name}".lstrip(".")] = rows @ lora_a.t()
        return Measured(output, found)


@contextmanager
def _nudged(model: nn.Module) -> Iterator[None]:
    """Inside, the outputs of the innermost modules have noise of some roundings of fp32 on every number."""

    def nudge(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        return output + NUDGE * output.detach() * torch.randn_like(output)

    leaves = [module for module in model.modules() if not [*module.children()]]
    handles = [module.register_forward_hook(nudge) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def render(data: Mapping[str, Any]) -> str:
    """The text form of the result of `run`."""
    rows = [{k: v for k, v in row.items() if k != "why_not_faster"} for row in data["layers"]]
    shapes = ", ".join(f"{key} {list(shape)}" for key, shape in data["input"].items())
    median = data["reference_error"]
    ref = "" if median is None else f"; median error of the PyTorch reference {median:.2g}"
    notes = [
        f"built: {data['built']}; {data['total']:,} parameters with random weights, run on {shapes}",
        f"trainable: {data['trainable']:,} ({data['trainable_share']:.3%})",
        f"compared with: {data['compared_with']}",
        f"relative error of the output: {data['output_error']:.2g} (limit {data['output_limit']:.2g}{ref})",
    ]
    if data["bypass_fixes"]:
        notes.insert(2, f"set to call their projections: {shorten(data['bypass_fixes'])}")
    if data["without_gradient"]:
        notes.append(f"no gradient beyond rounding reaches: {shorten(data['without_gradient'])}")
    notes += [f"PROBLEM: {problem}" for problem in data["problems"]]
    notes.append("failed" if data["problems"] else "all layers run, and all errors are within their limits")
    return str(Report(f"check {data['model']} ({data['library']})", rows, notes))
