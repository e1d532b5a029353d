# SPDX-License-Identifier: Apache-2.0
"""Public operations: every argument is checked once, here, and handed to the ops.

Shapes: x `[..., d_in]`, weight `[d_out, d_in]`, lora_a `[r, d_in]`, lora_b `[d_out, r]`, scale a float, 0-d
or `[r]`. dtypes: x and weight share one floating dtype; adapters have that dtype or fp32. Products accumulate
in fp32 (fp64 for fp64) and every gradient has the dtype of its parameter. `backend=None` is the current
choice; a backend that is named serves the call or raises `BackendError`. Second derivatives, and calls inside
`torch.func` transforms, forward-mode differentiation or `torch.jit.trace`, are computed by the formulas in
PyTorch on every backend (docs/mathematics.md, section 9.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .errors import ArgumentError, DtypeError
from .fishers import EightBitFisher, FactoredFisher, Fisher, KroneckerFisher
from .literals import Backend, FisherMode
from .ops import add_low_rank as _low_rank
from .ops import checks as check
from .ops import dispatch, memory, schemas
from .ops import ewc_penalty as _penalty
from .ops import lora_conv as _conv
from .ops import lora_linear as _linear
from .ops.adapters import Adapter, Adapters, Scale
from .ops.capture import CallCapture, FisherCapture
from .ops.windows import Geometry
from .reference.fisher_accumulate import sample_bounds

__all__ = [
    "Adapter",
    "Geometry",
    "add_low_rank",
    "ewc_penalty",
    "ewc_penalty_grad_",
    "fisher_accumulate_",
    "l1_penalty",
    "lora_conv_adapters",
    "lora_linear",
    "lora_linear_adapters",
    "lora_linear_slices",
    "merge_",
    "soft_threshold_",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Scale = 1.0,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """A linear layer with a low-rank adapter, `y = x W^T + bias + ((x A^T) * s) B^T` (docs/mathematics.md,
    section 1), differentiable in x, weight, bias, lora_a, lora_b and a tensor scale.

    Args:
        x: `[..., d_in]`, of a floating dtype.
        weight: W `[d_out, d_in]`, in the dtype of x.
        bias: `[d_out]` in the dtype of x, or None.
        lora_a: A `[r, d_in]`, in the dtype of x or fp32.
        lora_b: B `[d_out, r]`, in the dtype of lora_a.
        scale: s, a float, or a tensor 0-d or `[r]`.
        dropout_p: probability of dropout on the x of the low-rank branch, which acts when `training`.
        training: whether dropout acts.
        seed: of the dropout mask (docs/mathematics.md, section 11); None draws one from the default
            generator.
        backend: name of the backend that has to serve the call; None is the current choice.

    Returns:
        y `[..., d_out]` in the dtype of x.

    Raises:
        ArgumentError: for a shape, value or device that does not fit; the message names the argument.
        DtypeError: for a dtype that does not fit.
        BackendError: when the named backend cannot serve the call.

    Examples:
        >>> x, weight = torch.ones(2, 8), torch.zeros(4, 8)
        >>> FE.lora_linear(x, weight, None, torch.ones(2, 8), torch.ones(4, 2), scale=0.5)
        tensor([[8., 8., 8., 8.],
                [8., 8., 8., 8.]])
    """
    check.matrix(weight, "weight")
    adapters = (Adapter(lora_a, lora_b, scale, ((0, weight.shape[0]),)),)
    return lora_linear_adapters(
        x, weight, bias, adapters, dropout_p=dropout_p, training=training, seed=seed, backend=backend
    )


def lora_linear_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slices: Sequence[tuple[int, int, Tensor, Tensor, Scale]],
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """As `lora_linear`, with an adapter on each of several disjoint ranges of output rows of one packed
    projection.

    Args:
        x: `[..., d_in]`, of a floating dtype.
        weight: `[d_out, d_in]`, in the dtype of x.
        bias: `[d_out]` in the dtype of x, or None.
        slices: of (row_start, row_stop, lora_a, lora_b, scale), with lora_a `[r, d_in]` and lora_b
            `[row_stop - row_start, r]`; ranks may differ.
        dropout_p: as in `lora_linear`.
        training: as in `lora_linear`.
        seed: as in `lora_linear`.
        backend: as in `lora_linear`.

    Returns:
        y `[..., d_out]` in the dtype of x.

    Raises:
        ArgumentError: as in `lora_linear`, and for ranges that overlap or leave the rows of weight.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> x, weight = torch.ones(1, 8), torch.zeros(6, 8)
        >>> FE.lora_linear_slices(x, weight, None, [(2, 4, torch.ones(2, 8), torch.ones(2, 2), 1.0)])
        tensor([[ 0.,  0., 16., 16.,  0.,  0.]])
    """
    adapters = [Adapter(a, b, scale, ((start, stop),)) for start, stop, a, b, scale in slices]
    return lora_linear_adapters(
        x, weight, bias, adapters, dropout_p=dropout_p, training=training, seed=seed, backend=backend
    )


def lora_linear_adapters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    backend: Backend | None = None,
    capture: CallCapture | None = None,
) -> Tensor:
    """The general form of `lora_linear`: every adapter may own several row ranges, as heads need that
    interleave q, k and v.

    Args:
        x: `[..., d_in]`, of a floating dtype.
        weight: `[d_out, d_in]`, in the dtype of x.
        bias: `[d_out]` in the dtype of x, or None.
        adapters: of `Adapter(lora_a, lora_b, scale, rows)`, whose lora_b has as many rows as its ranges
            together.
        dropout_p: as in `lora_linear`.
        training: as in `lora_linear`.
        seed: as in `lora_linear`.
        backend: as in `lora_linear`.
        capture: collects the Fisher of the layer during backward; `EWC` makes it.

    Returns:
        y `[..., d_out]` in the dtype of x.

    Raises:
        ArgumentError: for a shape, value, device or row range that does not fit.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> x, weight = torch.ones(1, 8), torch.zeros(6, 8)
        >>> heads = FE.Adapter(torch.ones(2, 8), torch.ones(2, 2), 1.0, rows=((0, 1), (4, 5)))
        >>> FE.lora_linear_adapters(x, weight, None, [heads])
        tensor([[16.,  0.,  0.,  0., 16.,  0.]])
    """
    if not torch.compiler.is_compiling() and (eager := _linear.eager()) is not None:
        captured = None if capture is None else _linear.Captured(capture)
        name = dispatch.resolve(backend)
        y = eager(x, weight, bias, adapters, dropout_p, training, seed, name, captured)
        if y is not None:
            return y
    x, weight, bias, adapters = check.autocast(x, weight, bias, adapters)
    rows = check.lora_linear(x, weight, bias, adapters, dropout_p)
    if dropout_p > 0.0 and not training:  # in this order: without dropout no graph depends on the mode
        dropout_p = 0.0
    mask_seed = check.seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    meta = _linear.LoRALinearMeta(rows, float(dropout_p), dispatch.resolve(backend))
    lora_as, lora_bs, scales, _ = zip(*adapters, strict=True)
    together = Adapters.of(lora_as, lora_bs, scales)
    return _linear.lora_linear(x, weight, bias, together, meta, mask_seed, capture)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    adapters: Sequence[Adapter],
    residual: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    capture: CallCapture | None = None,
) -> Tensor:
    """`y + x R^T + ((x A^T) * s) B^T`, for a product y of x that something else has computed, such as a layer
    with quantised weights; differentiable in y, x, lora_a, lora_b and tensor scales.

    Args:
        y: `[..., d_out]`, of a floating dtype.
        x: `[..., d_in]`.
        adapters: as in `lora_linear_adapters`.
        residual: R `[d_out, d_in]` of any floating dtype, which is not differentiated, or None.
        dropout_p: as in `lora_linear`.
        training: as in `lora_linear`.
        seed: as in `lora_linear`.
        capture: as in `lora_linear_adapters`.

    Returns:
        A new tensor in the dtype of y; sums are fp32 (fp64 for fp64), with autocast too.

    Raises:
        ArgumentError: for a shape, value or device that does not fit.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> adapter = FE.Adapter(torch.ones(2, 8), torch.ones(4, 2), 1.0, rows=((0, 4),))
        >>> FE.add_low_rank(torch.ones(1, 4), torch.ones(1, 8), [adapter])
        tensor([[17., 17., 17., 17.]])
    """
    rows = check.add_low_rank(y, x, adapters, residual, dropout_p)
    if dropout_p > 0.0 and not training:
        dropout_p = 0.0
    mask_seed = check.seed_tensor(seed, x.device) if dropout_p > 0.0 else None
    together = Adapters.of(
        [adapter.lora_a for adapter in adapters],
        [adapter.lora_b for adapter in adapters],
        [adapter.scale for adapter in adapters],
    )
    meta = _low_rank.AddLowRankMeta(rows, together.scale_factors, float(dropout_p))
    return _low_rank.add_low_rank(y, x, residual, together, meta, mask_seed, capture)


def lora_conv_adapters(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    geometry: Geometry,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: Backend | None = None,
    capture: FisherCapture | None = None,
) -> Tensor:
    """The convolution whose windows, as rows, a LoRA linear maps, `y = conv(x, W) + bias +
    conv1x1(conv(x, A) * s, B)` (docs/mathematics.md, section 1.1).

    Disjoint windows (1 x 1, or as large as the stride, without padding) are rows of `lora_linear_adapters`
    where that is faster, which for 1 x 1 copies nothing if x has its channels last; the rest are convolutions
    of PyTorch, whatever the backend.

    Args:
        x: `[N, C, H, W]` or `[N, C, L]`, with or without N.
        weight: `[d_out, C, *kernel]`, in the dtype of x.
        bias: `[d_out]` or None.
        adapters: as in `lora_linear_adapters`, with lora_a `[r, C * kernel]` in the order of
            `weight.flatten(1)`.
        geometry: the windows.
        dropout_p: probability of dropout on the elements of x in the low-rank branch.
        training: whether dropout acts.
        backend: as in `lora_linear`.
        capture: as in `lora_linear_adapters`.

    Returns:
        y `[N, d_out, *windows]` in the dtype of x.

    Raises:
        ArgumentError: for a shape, value or device that does not fit.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> geometry = FE.Geometry(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
        >>> adapter = FE.Adapter(torch.ones(1, 18), torch.ones(3, 1), 1.0, rows=((0, 3),))
        >>> x, weight = torch.ones(1, 2, 4, 4), torch.zeros(3, 2, 3, 3)
        >>> FE.lora_conv_adapters(x, weight, None, [adapter], geometry)[0, 0, 1]
        tensor([12., 18., 18., 12.])
    """
    check.images(x, weight, geometry)
    if x.dim() < weight.dim():
        options: dict[str, Any] = {"dropout_p": dropout_p, "training": training, "capture": capture}
        return lora_conv_adapters(
            x.unsqueeze(0), weight, bias, adapters, geometry, backend=backend, **options
        ).squeeze(0)
    if geometry.disjoint and (_conv.prefers_rows(x, geometry) or capture is not None):
        last = capture is None and not geometry.pointwise and _conv.channels_last(x)
        if last:
            weight, adapters = _conv.with_channels_last(weight, adapters)
        y = lora_linear_adapters(
            geometry.rows(x, last),
            weight.flatten(1),
            bias,
            adapters,
            dropout_p=dropout_p,
            training=training,
            backend=backend,
            capture=capture,
        ).movedim(-1, 1)
        # The memory format that PyTorch's convolution gives.
        return y if y.dim() == 4 and _conv.channels_last(x) else y.contiguous()
    x, weight, bias, adapters = check.autocast(x, weight, bias, adapters)
    check.lora_conv(x, weight, bias, adapters, dropout_p)
    meta = _conv.LoRAConvMeta(geometry, float(dropout_p) if training else 0.0)
    return _conv.lora_conv(x, weight, bias, *_conv.together(adapters, weight.shape[0]), meta, capture)


class _Penalty(NamedTuple):
    """A penalty whose arguments have been checked."""

    op: str
    fishers: list[Tensor]  # of the op
    adapters: Adapters
    terms: _penalty.Terms | None


def _checked_penalty(
    fishers: Sequence[Fisher],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None,
    ewc_lambda: float,
    writes: str | None = None,
) -> _Penalty:
    """writes: the operation, where it writes gradients in place."""
    kinds = {Tensor if isinstance(fisher, Tensor) else type(fisher) for fisher in fishers}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ArgumentError(f"fishers: expected one kind of Fisher in a call, got {names}")
    op, flat = "ewc_penalty", list(fishers)
    pairs: Any = fishers
    if EightBitFisher in kinds:
        flat = [fisher.codes for fisher in pairs]
    elif kinds and Tensor not in kinds:
        if not kinds <= set(_STRUCTURED):
            raise DtypeError(
                f"fishers: expected tensors, EightBitFisher, FactoredFisher or KroneckerFisher, got "
                f"{kinds.pop().__name__}"
            )
        op = _STRUCTURED[kinds.pop()]
        flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    terms = _penalty.terms(op, flat, lora_as, lora_bs, scales)  # type: ignore[arg-type]
    if writes is not None and terms is None:  # with terms it is plain that nothing is transformed
        check.writes(writes)
    scales = [1.0] * len(fishers) if scales is None else scales
    if terms is None and op != "ewc_penalty":
        check.structured_penalty(pairs, lora_as, lora_bs, scales)
    elif terms is None:
        check.penalty(flat, lora_as, lora_bs, scales)  # type: ignore[arg-type]
    check.number(ewc_lambda, "ewc_lambda", lora_as[0].dtype if lora_as else torch.float32)
    return _Penalty(op, flat, Adapters.of(lora_as, lora_bs, scales), terms)  # type: ignore[arg-type]


_STRUCTURED: dict[type, str] = {FactoredFisher: "factored_penalty", KroneckerFisher: "kronecker_penalty"}


def ewc_penalty(
    fishers: Sequence[Fisher],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None = None,
    ewc_lambda: float = 1.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """The penalty `P = (lambda/2) sum_l sum_ij F_l[i,j] (B_l diag(s_l) A_l)[i,j]^2` over all adapters, with
    one read of each F (EWC-LoRA, arXiv 2602.17559; docs/mathematics.md, section 2).

    Args:
        fishers: F_l `[d_out, d_in]` fp32 or bf16 (fp32 or fp64 beside fp64 adapters), not differentiated; or
            all of them an `EightBitFisher`, a `FactoredFisher`, whose F is never formed, or a
            `KroneckerFisher`, whose penalty is `(lambda/2) trace(outputs D inputs D^T)` with `D = B diag(s)
            A`.
        lora_as: A_l `[r, d_in]`, all of one dtype and device.
        lora_bs: B_l `[d_out, r]`, likewise.
        scales: s_l, floats, or tensors 0-d or `[r]`; None is 1 for all.
        ewc_lambda: the strength.
        backend: as in `lora_linear`.

    Returns:
        P, a 0-d fp32 tensor (fp64 when all adapters are fp64): a sum and not a mean, differentiable in
        lora_as, lora_bs and tensor scales. No adapters give 0.

    Raises:
        ArgumentError: for a shape, value or device that does not fit; the message names the entry.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> FE.ewc_penalty([torch.ones(4, 8)], [torch.ones(2, 8)], [torch.ones(4, 2)], ewc_lambda=0.5)
        tensor(32.)
    """
    op, flat, adapters, terms = _checked_penalty(fishers, lora_as, lora_bs, scales, ewc_lambda)
    if not fishers:
        return torch.zeros(())
    return _penalty.penalty(op, flat, adapters, float(ewc_lambda), dispatch.resolve(backend), terms)


@torch.no_grad()
def ewc_penalty_grad_(
    fishers: Sequence[Fisher],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None = None,
    ewc_lambda: float = 1.0,
    *,
    grad_scale: float | Tensor = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """Adds `grad_scale * dP` to `.grad` of the adapters that require gradients, without a graph and without a
    host synchronisation.

    Args:
        fishers: as in `ewc_penalty`.
        lora_as: as in `ewc_penalty`.
        lora_bs: as in `ewc_penalty`.
        scales: as in `ewc_penalty`.
        ewc_lambda: as in `ewc_penalty`.
        grad_scale: factor of the gradient, a float or a tensor of one number; under a GradScaler its scale,
            so that a later unscale restores lambda.
        backend: as in `lora_linear`.

    Returns:
        The unscaled P, 0-d.

    Raises:
        ArgumentError: as `ewc_penalty`.
        DtypeError: as `ewc_penalty`.

    Examples:
        >>> lora_a, lora_b = torch.ones(2, 8, requires_grad=True), torch.ones(4, 2, requires_grad=True)
        >>> FE.ewc_penalty_grad_([torch.ones(4, 8)], [lora_a], [lora_b], ewc_lambda=0.5)
        tensor(32.)
        >>> lora_a.grad[0, 0]
        tensor(4.)
    """
    op, flat, adapters, terms = _checked_penalty(
        fishers, lora_as, lora_bs, scales, ewc_lambda, "ewc_penalty_grad_"
    )
    if not fishers:
        return torch.zeros(())
    if not isinstance(grad_scale, Tensor):
        check.number(grad_scale, "grad_scale", lora_as[0].dtype)
    name = dispatch.resolve(backend)
    return _penalty.penalty_grad_(op, flat, adapters, float(ewc_lambda), grad_scale, name, terms)


def l1_penalty(
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale] | None = None,
    l1_lambda: float = 1.0,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """The l1 norm `P = lambda sum_l sum_ij |B_l diag(s_l) A_l|[i,j]` over all adapters, by tiles or blocks
    of rows: nothing is as large as B A (N-LoRA, arXiv 2410.10179; docs/mathematics.md, section 13).

    Args:
        lora_as: A_l `[r, d_in]`, all of one dtype and device.
        lora_bs: B_l `[d_out, r]`, likewise.
        scales: s_l, floats, or tensors 0-d or `[r]`; None is 1 for all.
        l1_lambda: the strength.
        backend: as in `lora_linear`.

    Returns:
        P, a 0-d fp32 tensor (fp64 when all adapters are fp64), differentiable in lora_as, lora_bs and tensor
        scales, the slope of |.| at 0 being 0. No adapters give 0.

    Raises:
        ArgumentError: for a shape, value or device that does not fit; the message names the entry.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> FE.l1_penalty([torch.ones(2, 8)], [torch.ones(4, 2)], l1_lambda=0.5)
        tensor(32.)
    """
    terms = _penalty.terms("l1_penalty", [], lora_as, lora_bs, scales)
    scales = [1.0] * len(lora_as) if scales is None else scales
    if terms is None:
        check.l1_penalty(lora_as, lora_bs, scales)
    check.number(l1_lambda, "l1_lambda", lora_as[0].dtype if lora_as else torch.float32)
    if not lora_as:
        return torch.zeros(())
    adapters = Adapters.of(lora_as, lora_bs, scales)
    return _penalty.penalty("l1_penalty", [], adapters, float(l1_lambda), dispatch.resolve(backend), terms)


@overload
def fisher_accumulate_(
    fisher: Tensor,
    x: Tensor,
    dy: Tensor,
    *,
    mode: FisherMode = "sample",
    weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = True,
    backend: Backend | None = None,
) -> Tensor: ...
@overload
def fisher_accumulate_(
    fisher: FactoredFisher,
    x: Tensor,
    dy: Tensor,
    *,
    mode: FisherMode = "sample",
    weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = True,
    backend: Backend | None = None,
) -> FactoredFisher: ...
@torch.no_grad()
def fisher_accumulate_(
    fisher: Any,
    x: Tensor,
    dy: Tensor,
    *,
    mode: FisherMode = "sample",
    weight: float = 1.0,
    cu_seqlens: Tensor | None = None,
    check_finite: bool = True,
    backend: Backend | None = None,
) -> Any:
    """Adds the Fisher of a batch in place, `F += weight * sum_n (dy_n^T x_n)^2` in mode `"sample"` or
    `F += weight * (sum_n dy_n^T x_n)^2` in mode `"batch"` (docs/mathematics.md, section 3).

    Products and squares are fp32 (fp64 for fp64).

    Args:
        fisher: F `[d_out, d_in]` fp32 or bf16 (fp64 beside fp64), or a `FactoredFisher`, of which the row and
            column sums are added, exactly and without F.
        x: `[N, T, d_in]` or `[N, d_in]`, fp32, bf16 or fp16 (fp64 beside an fp32 or fp64 fisher).
        dy: gradients of the outputs, as x with d_out.
        mode: `"sample"` or `"batch"`.
        weight: factor of what is added.
        cu_seqlens: `[N + 1]` int32 or int64; x and dy are then packed `[rows, d]`, and sample n owns the rows
            from cu_seqlens[n] to cu_seqlens[n + 1].
        check_finite: False leaves out the check of x and dy, which on GPUs saves a host synchronisation.
        backend: as in `lora_linear`.

    Returns:
        fisher.

    Raises:
        ArgumentError: for a shape or value that does not fit, and for NaN or Inf in x or dy; fisher is as it
            was.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> FE.fisher_accumulate_(torch.zeros(2, 3), torch.ones(4, 3), torch.ones(4, 2), weight=1 / 4)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    check.writes("fisher_accumulate_")
    if isinstance(fisher, FactoredFisher):
        check.fisher_sums(fisher, x, dy, mode, cu_seqlens)
        written = dict(zip(("fisher.rows", "fisher.columns"), fisher, strict=True))
        memory.check_written({"fisher.rows": fisher.rows}, {"fisher.columns": fisher.columns})
    else:
        check.fisher(fisher, x, dy, mode, cu_seqlens)
        written = {"fisher": fisher}
    check.number(weight, "weight", x.dtype)
    memory.check_written(written, {"x": x, "dy": dy})
    if cu_seqlens is not None:
        check.offsets(sample_bounds(x, cu_seqlens), x.shape[0])
    if check_finite:
        check.finite(x, "x")
        check.finite(dy, "dy")
    name = dispatch.resolve(backend)
    accumulate = schemas.fisher_accumulate_ if len(written) == 1 else schemas.fisher_sums_
    accumulate(*written.values(), x, dy, mode, float(weight), cu_seqlens, name)
    return fisher


def _named(name: str, values: Sequence[Any], alone: bool) -> dict[str, Tensor]:
    """The tensors among the values of an argument, as messages name them."""
    return {name if alone else f"{name}[{i}]": t for i, t in enumerate(values) if isinstance(t, Tensor)}


@overload
def merge_(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Scale = 1.0, *, backend: Backend | None = None
) -> Tensor: ...
@overload
def merge_(
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scale: Scale | Sequence[Scale] = 1.0,
    *,
    backend: Backend | None = None,
) -> Sequence[Tensor]: ...
@torch.no_grad()
def merge_(weight: Any, lora_a: Any, lora_b: Any, scale: Any = 1.0, *, backend: Backend | None = None) -> Any:
    """Folds adapters into weights in place, `W <- W + B diag(s) A`, summed in fp32 (fp64 for fp64) and
    rounded once (docs/mathematics.md, section 4).

    Sequences are merged entry after entry in one call, all checked before the first is changed; shapes, ranks
    and dtypes may differ, devices not. Values are not checked for NaN. Like an optimizer's step, the change
    is not recorded by autograd, also where weight requires gradients; a backward that needs the weight as it
    was raises.

    Args:
        weight: W `[d_out, d_in]`, which may be a slice of rows, or a sequence of such.
        lora_a: A `[r, d_in]` in the dtype of weight or fp32, or a sequence.
        lora_b: B `[d_out, r]`, likewise.
        scale: s, a float, or a tensor 0-d or `[r]`; a sequence unless one is meant for all.
        backend: as in `lora_linear`.

    Returns:
        weight.

    Raises:
        ArgumentError: for a shape or value that does not fit, and for a weight whose elements share memory
            with each other (an expanded tensor) or with what is merged.
        DtypeError: for a dtype that does not fit.

    Examples:
        >>> qkv = torch.zeros(3, 4)
        >>> k = FE.merge_(qkv[1:2], torch.ones(2, 4), torch.ones(1, 2))  # the rows of k alone
        >>> qkv.sum(1)
        tensor([0., 8., 0.])
    """
    alone = isinstance(weight, Tensor) or not isinstance(weight, Sequence)
    weights = [weight] if alone else list(weight)
    lora_as, lora_bs = ([lora_a], [lora_b]) if alone else (lora_a, lora_b)
    scales = scale if isinstance(scale, Sequence) and not alone else [scale] * len(weights)
    if not check.is_plain_merge(weights, lora_as, lora_bs, scales):
        _check_merge(weights, lora_as, lora_bs, scales, alone)
    if weights:
        schemas.merge_(weights, *Adapters.of(lora_as, lora_bs, scales), dispatch.resolve(backend))
    return weight


def _check_merge(weights: list[Tensor], lora_as: Any, lora_bs: Any, scales: Any, alone: bool) -> None:
    check.writes("merge_")
    if alone:
        check.merge(weights[0], lora_as[0], lora_bs[0], scales[0])
    else:
        for name, values in (("lora_a", lora_as), ("lora_b", lora_bs), ("scale", scales)):
            check.as_many(values, len(weights), name, "weight")
        for i, entry in enumerate(zip(weights, lora_as, lora_bs, scales, strict=True)):
            check.merge(*entry, where=f"[{i}]")
        check.one_device(weights, "weight")
    read = {**_named("lora_a", lora_as, alone), **_named("lora_b", lora_bs, alone)}
    memory.check_written(_named("weight", weights, alone), {**read, **_named("scale", scales, alone)})


@overload
def soft_threshold_(scale: Tensor, kappa: float, *, backend: Backend | None = None) -> Tensor: ...
@overload
def soft_threshold_(
    scale: Sequence[Tensor], kappa: float, *, backend: Backend | None = None
) -> Sequence[Tensor]: ...
@torch.no_grad()
def soft_threshold_(scale: Any, kappa: float, *, backend: Backend | None = None) -> Any:
    """`s <- sign(s) max(|s| - kappa, 0)` in place, the proximal step of the l1 norm (CoDyRA, arXiv
    2412.01004; docs/mathematics.md, section 6).

    Args:
        scale: s of any shape and floating dtype, computed in fp32 (fp64 for fp64), or a sequence of such
            tensors on one device, all checked before the first is changed.
        kappa: the shrinkage, >= 0.
        backend: as in `lora_linear`.

    Returns:
        scale.

    Raises:
        ArgumentError: for a kappa that is not >= 0.
        DtypeError: for a scale that is not floating point.

    Examples:
        >>> FE.soft_threshold_(torch.tensor([0.5, -0.25, 0.0625]), 0.125)
        tensor([ 0.3750, -0.1250,  0.0000])
    """
    check.writes("soft_threshold_")
    alone = isinstance(scale, Tensor) or not isinstance(scale, Sequence)
    if alone:
        check.floating(scale, "scale")
        scales = [scale]
    else:
        scales = list(scale)
        for i, entry in enumerate(scales):
            check.floating(entry, f"scale[{i}]")
        check.one_device(scales, "scale")
    memory.check_written(_named("scale", scales, alone), {})
    if not kappa >= 0.0:
        raise ArgumentError(f"kappa: expected a number >= 0, got {kappa}")
    if scales:
        schemas.soft_threshold_(scales, float(kappa), dispatch.resolve(backend))
    return scale
