# SPDX-License-Identifier: Apache-2.0
"""Slow, obvious fp64 oracles, one sample and one adapter at a time, written from docs/mathematics.md.

Arguments may have any dtype and any strides; they are copied to contiguous fp64 on the CPU first. The same
functions on absolute values give the magnitudes that error bounds are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Scale = float | Tensor
Ranges = tuple[tuple[int, int], ...]
WORD = 2**32


class Gradients(NamedTuple):
    """Gradients of one LoRA linear; `adapters` holds (dA, dB, ds) with ds `[r]` for every adapter."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    adapters: list[tuple[Tensor, Tensor, Tensor]]


def exact(value: Scale) -> Tensor:
    return torch.as_tensor(value).detach().cpu().to(torch.float64, copy=True).contiguous()


def magnitude(value: Scale) -> Tensor:
    return exact(value).abs()


def per_rank(scale: Scale, rank: int) -> Tensor:
    return exact(scale).expand(rank).clone()


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[tuple[Tensor, Tensor, Scale, Ranges]],
    mask: Tensor | None = None,
) -> Tensor:
    """y_m = W x_m + bias + B (s * A (mask_m * x_m)) for one row m after the other."""
    rows = exact(x).reshape(-1, weight.shape[1])
    y = torch.zeros(rows.shape[0], weight.shape[0], dtype=torch.float64)
    for m, row in enumerate(rows):
        y[m] = exact(weight) @ row
        if bias is not None:
            y[m] += exact(bias)
        branch = row if mask is None else row * mask[m]
        for a, b, scale, ranges in adapters:
            low_rank = exact(b) @ (per_rank(scale, a.shape[0]) * (exact(a) @ branch))
            done = 0
            for start, stop in ranges:
                y[m, start:stop] += low_rank[done : done + stop - start]
                done += stop - start
    return y.reshape(*x.shape[:-1], weight.shape[0])


def lora_linear_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    adapters: Sequence[tuple[Tensor, Tensor, Scale, Ranges]],
    mask: Tensor | None = None,
) -> Gradients:
    """Gradients from G = outer(dy_m, x_m) of every row m."""
    d_out, d_in = weight.shape
    rows, grads = exact(x).reshape(-1, d_in), exact(dy).reshape(-1, d_out)
    dx, dw, dbias = torch.zeros_like(rows), torch.zeros(d_out, d_in, dtype=torch.float64), grads.sum(0)
    results = []
    for m in range(rows.shape[0]):
        dx[m] = grads[m] @ exact(weight)
        dw += torch.outer(grads[m], rows[m])
    for a, b, scale, ranges in adapters:
        a, b, s = exact(a), exact(b), per_rank(scale, a.shape[0])
        product = torch.zeros(b.shape[0], d_in, dtype=torch.float64)  # gradient of B diag(s) A
        for m in range(rows.shape[0]):
            g = torch.cat([grads[m, start:stop] for start, stop in ranges])
            kept = torch.ones(d_in, dtype=torch.float64) if mask is None else mask[m]
            product += torch.outer(g, rows[m] * kept)
            dx[m] += (((g @ b) * s) @ a) * kept
        results.append(((b * s).T @ product, product @ a.T * s, (b * (product @ a.T)).sum(0)))
    return Gradients(dx.reshape(x.shape), dw, dbias, results)


def ewc_penalty(
    fishers: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale],
    ewc_lambda: float,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """P and (dA, dB, ds `[r]`) of every adapter."""
    value, grads = torch.zeros((), dtype=torch.float64), []
    for fisher, a, b, scale in zip(map(exact, fishers), lora_as, lora_bs, scales, strict=True):
        s = per_rank(scale, a.shape[0])
        a, b = exact(a), exact(b)
        delta = b @ torch.diag(s) @ a
        for i in range(delta.shape[0]):
            value += ewc_lambda / 2 * (fisher[i] * delta[i] * delta[i]).sum()
        h = ewc_lambda * fisher * delta
        grads.append((torch.diag(s) @ b.T @ h, h @ a.T @ torch.diag(s), (b * (h @ a.T)).sum(0)))
    return value, grads


def kronecker_penalty(
    factors: Sequence[tuple[Tensor, Tensor]],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    scales: Sequence[Scale],
    ewc_lambda: float,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """P = lambda/2 sum D * (G D C) and (dA, dB, ds `[r]`) of every adapter, D = B diag(s) A."""
    value, grads = torch.zeros((), dtype=torch.float64), []
    for (outputs, inputs), a, b, scale in zip(factors, lora_as, lora_bs, scales, strict=True):
        s = torch.diag(per_rank(scale, a.shape[0]))
        a, b = exact(a), exact(b)
        delta = b @ s @ a
        h = ewc_lambda * (exact(outputs) @ delta @ exact(inputs))
        value += 0.5 * (h * delta).sum()
        grads.append((s @ b.T @ h, h @ a.T @ s, (b * (h @ a.T)).sum(0)))
    return value, grads


def l1_penalty(
    lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], scales: Sequence[Scale], l1_lambda: float
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """P = lambda sum |B diag(s) A| and (dA, dB, ds `[r]`) of every adapter, with a slope of 0 at 0."""
    value, grads = torch.zeros((), dtype=torch.float64), []
    for a, b, scale in zip(lora_as, lora_bs, scales, strict=True):
        s = torch.diag(per_rank(scale, a.shape[0]))
        a, b = exact(a), exact(b)
        delta = b @ s @ a
        value += l1_lambda * delta.abs().sum()
        h = l1_lambda * ((delta > 0).double() - (delta < 0).double())
        grads.append((s @ b.T @ h, h @ a.T @ s, (b * (h @ a.T)).sum(0)))
    return value, grads


def fisher(samples: Sequence[tuple[Tensor, Tensor]], mode: str = "sample") -> Tensor:
    """sum_n (dy_n^T x_n)^2 or, in mode "batch", (sum_n dy_n^T x_n)^2; samples are (x_n, dy_n)."""
    products = []
    for x, dy in samples:
        product = torch.zeros(dy.shape[-1], x.shape[-1], dtype=torch.float64)
        for row, grad in zip(exact(x), exact(dy), strict=True):
            product += torch.outer(grad, row)
        products.append(product)
    if mode == "batch":
        return torch.stack(products).sum(0).square()
    return torch.stack([product.square() for product in products]).sum(0)


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Scale) -> Tensor:
    return exact(weight) + exact(lora_b) @ torch.diag(per_rank(scale, lora_a.shape[0])) @ exact(lora_a)


def soft_threshold(scale: Tensor, kappa: float) -> Tensor:
    values = [max(abs(v) - kappa, 0.0) * (1.0 if v > 0 else -1.0) for v in exact(scale).reshape(-1).tolist()]
    return torch.tensor(values, dtype=torch.float64).reshape(scale.shape)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 of Salmon et al. (SC'11) on Python integers, which cannot overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, WORD)
        high1, low1 = divmod(c2 * 0xCD9E8D57, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def dropout_word(seed: int, row: int, column: int) -> int:
    """The random word of one mask element: block column // 4 of the row, key = the seed's two halves."""
    words = philox4x32((column // 4, row % WORD, row // WORD, 0), (seed % WORD, (seed >> 32) % WORD))
    return words[column % 4]


def dropout_mask(seed: int, rows: int, columns: int, p: float) -> Tensor | None:
    """0 where a word is below p * 2^32, else 1 / (1 - p); None without dropout."""
    if p == 0.0:
        return None
    if p == 1.0:
        return torch.zeros(rows, columns, dtype=torch.float64)
    mask = torch.empty(rows, columns, dtype=torch.float64)
    for m in range(rows):
        for block in range(-(-columns // 4)):
            words = philox4x32((block, m % WORD, m // WORD, 0), (seed % WORD, (seed >> 32) % WORD))
            for j, word in enumerate(words[: columns - 4 * block]):
                mask[m, 4 * block + j] = 0.0 if word < round(p * WORD) else 1.0 / (1.0 - p)
    return mask
