# SPDX-License-Identifier: Apache-2.0
"""Mixtures of Gaussians with diagonal covariances, as models of the features of a class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ewclora.errors import ArgumentError

SMALLEST_VARIANCE = 1e-6  # added to every variance, for components with a single point
GAIN = 1e-3  # of the mean log-likelihood, below which the fit has ended
MEANS_ITERATIONS = 100  # of k-means, which ends as soon as no point changes its centre


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], diag(variances[k])): weights `[K]`, means and variances `[K, d]`."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def fit(cls, points: Tensor, components: int, iterations: int) -> Mixture:
        """By expectation maximisation from the centres of k-means, for points `[N, d]`; with fewer points
        than components there are N of these. Raises `ArgumentError` for no point at all."""
        if len(points) == 0:
            raise ArgumentError("points: expected at least one to fit a mixture to, got none")
        nearest = torch.cdist(points, centres(points, min(components, len(points)))).argmin(1)
        shares = torch.nn.functional.one_hot(nearest).to(points.dtype)  # [N, K]
        before = -math.inf
        for _ in range(iterations):
            mixture = cls._of_shares(points, shares)
            joint = mixture.log_densities(points) + mixture.weights.log()
            likelihood = float(joint.logsumexp(1).mean())
            if likelihood - before < GAIN:
                break
            before, shares = likelihood, joint.softmax(1)
        return mixture

    @classmethod
    def _of_shares(cls, points: Tensor, shares: Tensor) -> Mixture:
        """The most likely one, given the share of every component in every point, `[N, K]`."""
        sums = shares.sum(0).clamp(min=torch.finfo(shares.dtype).tiny)
        means = shares.T @ points / sums[:, None]
        # Of differences, not E x^2 - (E x)^2, which may be negative after rounding.
        squares = [share @ (points - mean).square() for share, mean in zip(shares.T, means, strict=True)]
        variances = torch.stack(squares) / sums[:, None] + SMALLEST_VARIANCE
        return cls(sums / len(points), means, variances)

    def log_densities(self, points: Tensor) -> Tensor:
        """log N(x; means[k], variances[k]) of points `[N, d]`, as `[N, K]`."""
        columns = [
            (points - mean).square() @ (1 / variance) + variance.log().sum()
            for mean, variance in zip(self.means, self.variances, strict=True)
        ]
        return -0.5 * (torch.stack(columns, 1) + points.shape[1] * math.log(2 * math.pi))

    def draw(self, count: int) -> Tensor:
        """Points `[count, d]`."""
        which = torch.multinomial(self.weights, count, replacement=True)
        noise = torch.randn(count, self.means.shape[1], dtype=self.means.dtype)
        return self.means[which] + noise * self.variances[which].sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {"weights": self.weights, "means": self.means, "variances": self.variances}

    @classmethod
    def of_state(cls, saved: Mapping[str, Tensor]) -> Mixture:
        """That of a `state_dict()`."""
        return cls(saved["weights"], saved["means"], saved["variances"])


def centres(points: Tensor, count: int) -> Tensor:
    """Those of k-means, `[count, d]`: each next one is drawn among the points with the squared distance to
    those before as its probability, then all move until no point changes its centre."""
    chosen = points[torch.randint(len(points), (1,))]
    while len(chosen) < count:
        distances = torch.cdist(points, chosen).amin(1).square()
        if not bool(distances.any()):  # fewer different points than centres
            distances = torch.ones_like(distances)
        chosen = torch.cat([chosen, points[torch.multinomial(distances, 1)]])
    nearest = None
    for _ in range(MEANS_ITERATIONS):
        now = torch.cdist(points, chosen).argmin(1)
        if nearest is not None and torch.equal(now, nearest):
            break
        nearest, groups = now, [points[now == k] for k in range(count)]
        chosen = torch.stack(
            [group.mean(0) if len(group) else old for group, old in zip(groups, chosen, strict=True)]
        )
    return chosen
