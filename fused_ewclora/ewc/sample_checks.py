"""Whether a loss is the mean, or the sum, of the losses of its samples: a batch against a sample alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FisherError
from .batches import mapped, take_sample, tensors_of

# A factor on the loss that is closer to 1 than this changes F by less than its own rounding in fp32 models.
_OUTPUT_TOLERANCE = 1e-4


def judge(batch: Tensor, alone: Tensor, samples: int, reduction: str, tolerance: float) -> None:
    """Raises `FisherError` unless the gradient of a sample within a batch of `samples` is that of the sample
    alone, divided by `samples` for "mean"."""
    batch, alone = batch.double(), alone.double()
    if not bool(torch.isfinite(batch).all() & torch.isfinite(alone).all()):
        return  # losses that are not finite are reported as such
    factors = {"mean": float(samples), "sum": 1.0}
    ratio = _ratio(batch * factors[reduction], alone, tolerance)
    if ratio is not None and abs(ratio - 1) <= tolerance:
        return
    if ratio is not None:
        for other, factor in factors.items():
            if abs(ratio * factor / factors[reduction] - 1) <= tolerance:
                raise FisherError(
                    f"reduction: the loss looks like a {other} over samples, expected a {reduction}; give "
                    f"reduction={other!r}"
                )
    told = "depends on the other samples" if ratio is None else f"is {ratio:.4g} times that of its own loss"
    raise FisherError(
        f"loss_fn: expected a {reduction} of the losses of the samples, but in a batch of {samples} the "
        f"gradient of a sample {told}. Likely causes are ignored targets, class weights, a mean over "
        "tokens, boxes or pixels, a normalisation over the batch, or a term that compares samples. Give a "
        "loss_fn that averages the losses of the samples, leave loss_fn out for -log p of the targets, or "
        "use batches of one sample; check_samples=False accepts the loss as it is"
    )


def _ratio(batch: Tensor, alone: Tensor, tolerance: float) -> float | None:
    """batch / alone where they are parallel, else None; 1 where both are 0."""
    size = float(alone.norm())
    if size == 0.0:
        return 1.0 if float(batch.norm()) == 0.0 else None
    ratio = float((batch * alone).sum()) / size**2
    return ratio if float((batch - ratio * alone).norm()) <= tolerance * float(batch.norm()) else None


class Watch:
    """Notes the gradient that a loss has at the output of the model, at the sample where it is largest.

    The loss function is called once more, with a copy of that sample alone. Nothing is noted twice of the
    graph of the batch.
    """

    def __init__(self, output: Any, samples: int) -> None:
        self._output, self._samples = output, samples
        self._index: Tensor | None = None
        self._rows: dict[int, Tensor] = {}
        self._watched = [
            i for i, tensor in enumerate(tensors_of(output))
            if tensor.requires_grad and tensor.dim() > 0 and tensor.shape[0] == samples
        ]  # fmt: skip
        tensors = list(tensors_of(output))
        self._handles = [tensors[i].register_hook(self._keeping(i)) for i in self._watched]
        self._tolerance = max(
            [_OUTPUT_TOLERANCE, *(4 * torch.finfo(tensors[i].dtype).eps for i in self._watched)]
        )

    def _keeping(self, position: int) -> Callable[[Tensor], None]:
        def keep(grad: Tensor) -> None:
            grad = grad.detach()
            if self._index is None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self._index = grad.reshape(self._samples, -1).norm(dim=1, dtype=wide).argmax()
            self._rows[position] = grad.index_select(0, self._index.to(grad.device).view(1))

        return keep

    def compare(self, loss_fn: Callable[[Any, Any], Tensor], targets: Any, reduction: str) -> str | None:
        """Raises `FisherError` when the loss is no mean (sum) over samples; the reason why it cannot be told,
        or None. To be called after backward."""
        for handle in self._handles:
            handle.remove()
        if self._index is None:
            return (
                "the loss does not depend on a tensor of the output whose leading size is that of the batch"
            )
        output, own = take_sample((self._output, targets), int(self._index), self._samples)
        if len(list(tensors_of(output))) != len(list(tensors_of(self._output))):
            return "the output of the model is a list of samples"
        leaves: dict[int, Tensor] = {}
        output = mapped(output, self._detaching(leaves))
        try:
            with _buffers_kept(loss_fn), torch.enable_grad():
                loss = loss_fn(output, own)
                grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        except Exception as error:
            return f"the loss of one sample raises {type(error).__name__}: {error}"
        rows = [self._rows.get(i, torch.zeros_like(leaf)) for i, leaf in leaves.items()]
        alone = [
            torch.zeros_like(leaf) if grad is None else grad
            for leaf, grad in zip(leaves.values(), grads, strict=True)
        ]
        judge(flat(rows), flat(alone), self._samples, reduction, self._tolerance)
        return None

    def _detaching(self, leaves: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        """Detaches tensors in order; those that were watched become leaves."""
        positions = iter(range(2**31))

        def detach(tensor: Tensor) -> Tensor:
            position = next(positions)
            if position not in self._watched:
                return tensor.detach()
            leaves[position] = tensor.detach().clone().requires_grad_()
            return leaves[position]

        return detach


def flat(tensors: list[Tensor]) -> Tensor:
    """All entries, in fp64."""
    return torch.cat([tensor.detach().flatten().double().to(tensors[0].device) for tensor in tensors])


@contextmanager
def _buffers_kept(loss_fn: Any) -> Iterator[None]:
    """A loss with running statistics keeps those of the batches."""
    buffers = list(loss_fn.buffers()) if isinstance(loss_fn, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
