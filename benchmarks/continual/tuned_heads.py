# SPDX-License-Identifier: Apache-2.0
"""The protocol of IEL and ITA: before every task heads are tuned on the features of the first weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fused_ewclora.errors import ArgumentError
from fused_ewclora.ewc.estimation import to_device
from fused_ewclora.ewc.settings import checked_lambda, number
from fused_ewclora.methods import IEL, ITA, Method
from fused_ewclora.methods.method import Loader

from .learner import Heads, Learner
from .mixtures import Mixture
from .protocols import Protocol

# Constants of the authors' code.
INIT_STD = 0.02  # of the weights of a new head
TEMPERATURE = 0.1  # times the length of the logits divides them where heads are aligned
MORE_EPOCHS = 5  # of alignment with every further task
ITERATIONS = 500  # at most, of the fit of a mixture
FLOOR = 1e-5  # added to every number of the Fisher of a head


class TunedHeads(Protocol):
    """What the authors' code of IEL and ITA (arXiv 2405.16350; `second_order` of mammoth) does beside the
    method.

    Every head exists twice. One is trained with the task, from a fresh start. The other, the tuned one, only
    ever sees features of the pretrained weights, and is made before the task: mixtures of Gaussians are
    fitted to the features of each new class; the new tuned head is trained on the features of the task; then
    all tuned heads together are aligned, on draws from the mixtures of all classes so far. Under the tuned
    heads of all tasks as one the method estimates its Fisher, whose labels run over all classes so far. The
    trained head of a task is drawn towards its tuned one by

        req_weight_cls <F_h, (h - h_tuned)^2> + simple_reg_weight_cls ||h - h_tuned||^2

    over its weight and bias; F_h is the mean Fisher of the tuned head on draws, of all classes so far for
    ITA, of those of earlier tasks for IEL, plus 1e-5. With variant "official" of the method both penalties
    are decoupled steps beside that of the optimizer; with "paper" they are parts of the loss. Options have
    the names of the authors' code, and its defaults.

    num_epochs_pretuning, learning_rate_pretuning: of a new tuned head, by SGD without momentum.
    num_samples_align_pretuning: draws of a class in every epoch of alignment. batch_size_align_pretuning: of
    both; the rest of an epoch that is no full batch is left out, unless it is all there is.
    num_epochs_align_pretuning: in the first task, and 5 more in every further one. lr_align_pretuning: cosine
    to 0. n_components: Gaussians in the mixture of a class. req_weight_cls: None takes the strength of the
    method. clip_grad: the largest norm of the gradient of a decoupled step, of each matrix; None clips none.
    """

    model: Heads
    method: IEL | ITA

    def __init__(
        self,
        num_epochs_pretuning: int = 3,
        learning_rate_pretuning: float = 0.01,
        num_samples_align_pretuning: int = 256,
        batch_size_align_pretuning: int = 128,
        num_epochs_align_pretuning: int = 10,
        lr_align_pretuning: float = 0.01,
        n_components: int = 5,
        req_weight_cls: float | None = None,
        simple_reg_weight_cls: float = 0.0,
        clip_grad: float | None = 100.0,
    ) -> None:
        self.num_epochs_pretuning = _count("num_epochs_pretuning", num_epochs_pretuning, 0)
        self.learning_rate_pretuning = _strength("learning_rate_pretuning", learning_rate_pretuning)
        self.num_samples_align_pretuning = _count(
            "num_samples_align_pretuning", num_samples_align_pretuning, 1
        )
        self.batch_size_align_pretuning = _count("batch_size_align_pretuning", batch_size_align_pretuning, 1)
        self.num_epochs_align_pretuning = _count("num_epochs_align_pretuning", num_epochs_align_pretuning, 0)
        self.lr_align_pretuning = _strength("lr_align_pretuning", lr_align_pretuning)
        self.n_components = _count("n_components", n_components, 1)
        self.req_weight_cls = (
            None if req_weight_cls is None else checked_lambda(req_weight_cls, "protocol: req_weight_cls")
        )
        self.simple_reg_weight_cls = _strength("simple_reg_weight_cls", simple_reg_weight_cls)
        self.clip_grad = None if clip_grad is None else _strength("clip_grad", clip_grad)
        self.tuned: list[nn.Linear] = []
        self.mixtures: list[Mixture] = []  # of all classes, in the order of tasks
        self._fisher: tuple[Tensor, Tensor] | None = None  # of the newest tuned head, weight and bias

    def attach(self, model: Learner, method: Method) -> None:
        """Raises `ArgumentError` for models without heads and other methods than IEL and ITA."""
        if not isinstance(model, Heads) or not isinstance(method, (IEL, ITA)):
            raise ArgumentError(
                "protocol: expected a problem with a head per task and the method IEL or ITA, got "
                f"{type(model).__name__} and {type(method).__name__}"
            )
        super().attach(model, method)
        if self.req_weight_cls is None:
            self.req_weight_cls = method.beta if isinstance(method, IEL) else method.alpha

    def before_task(self, number: int, batches: Loader, device: torch.device) -> None:
        """Makes the tuned head of the task, aligns it with the others, and takes its Fisher."""
        head = fresh_(self.model.heads[-1])  # type: ignore[arg-type]
        self.tuned.append(fresh_(nn.Linear(head.in_features, head.out_features, device=device)))
        features, labels = self._features(batches, device)
        for label in range(head.out_features):
            own = features[labels == label]
            if not len(own):
                raise ArgumentError(
                    f"task {number}: class {label} has no training example to fit features to"
                )
            self.mixtures.append(Mixture.fit(own, self.n_components, ITERATIONS))
        self._tune(batches, device)
        self._align(number, device)
        self._fisher = self._fisher_of_head(device)

    def prepare(self, batches: Loader) -> None:
        """With the tuned heads of all tasks in place of the one that is trained."""
        earlier = sum(head.out_features for head in self.tuned[:-1])

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            # Labels count from 0 in each task, those that a method draws count over all classes.
            return F.cross_entropy(logits, labels + earlier if self.method.labels == "empirical" else labels)

        with self._with_tuned_heads():
            self.method.prepare(batches, loss)

    def backward(self, x: Any, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """With variant "official" the penalties move parameters at once, and give no gradients."""
        loss = self.model.loss(self.model(x), y)
        if self.method.variant == "paper":
            penalty = self.method.penalty() + self.head_penalty()
            (loss + penalty).backward()
            return loss, penalty
        loss.backward()
        return loss, self.method.decoupled_step_(rate, self.clip_grad) + self._decoupled_step_of_head(rate)

    def head_penalty(self) -> Tensor:
        """What draws the head of the running task to its tuned one, 0-d."""
        assert self._fisher is not None and self.req_weight_cls is not None
        head, tuned = self.model.heads[-1], self.tuned[-1]
        pairs = ((head.weight, tuned.weight), (head.bias, tuned.bias))
        squares = [(now - then.detach()).square() for now, then in pairs]  # type: ignore[operator]
        weighted = [(fisher * square).sum() for fisher, square in zip(self._fisher, squares, strict=True)]
        plain = [square.sum() for square in squares]
        return self.req_weight_cls * sum(weighted) + self.simple_reg_weight_cls * sum(plain)

    def kept_tensors(self) -> Iterator[Tensor]:
        """The tuned heads, the Fisher of the newest one and the mixtures."""
        for head in self.tuned:
            yield from head.parameters()
        yield from self._fisher or ()
        for mixture in self.mixtures:
            yield from mixture.state_dict().values()

    def state_dict(self) -> dict[str, Any]:
        """The tuned heads and the mixtures of all classes."""
        return {
            "heads": [head.state_dict() for head in self.tuned],
            "mixtures": [mixture.state_dict() for mixture in self.mixtures],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        device = next(self.model.parameters()).device
        self.tuned = []
        for values in saved["heads"]:
            classes, width = values["weight"].shape
            head = nn.Linear(width, classes, device=device).requires_grad_(False)
            head.load_state_dict(values)
            self.tuned.append(head)
        self.mixtures = [Mixture.of_state(values) for values in saved["mixtures"]]

    @torch.no_grad()
    def _features(self, batches: Loader, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of all examples under the first weights, in eval mode, `[N, dim]` fp32, and their labels; on the
        CPU, where mixtures and draws are as well."""
        training, features, labels = self.model.training, [], []
        self.model.eval()
        with self.method.pretrained():
            for inputs, ys in batches:
                features.append(self.model.backbone(to_device(inputs, device)).float().cpu())
                labels.append(ys)
        self.model.train(training)
        return torch.cat(features), torch.cat(labels)

    def _tune(self, batches: Loader, device: torch.device) -> None:
        """Trains the newest tuned head on the features of its task; images are augmented anew every epoch."""
        head = self.tuned[-1]
        optimizer = torch.optim.SGD(head.requires_grad_().parameters(), lr=self.learning_rate_pretuning)
        for _ in range(self.num_epochs_pretuning):
            for x, y in shuffled(*self._features(batches, device), self.batch_size_align_pretuning):
                optimizer.zero_grad()
                F.cross_entropy(head(x.to(device)), y.to(device)).backward()
                optimizer.step()
        head.requires_grad_(False)

    def _align(self, number: int, device: torch.device) -> None:
        """Trains the tuned heads of all tasks together on draws of all classes."""
        epochs = self.num_epochs_align_pretuning + MORE_EPOCHS * number
        if not self.num_epochs_align_pretuning:
            return
        heads = nn.ModuleList(self.tuned).requires_grad_()
        optimizer = torch.optim.SGD(heads.parameters(), lr=self.lr_align_pretuning)
        schedule = CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            drawn = [mixture.draw(self.num_samples_align_pretuning) for mixture in self.mixtures]
            labels = torch.arange(len(drawn)).repeat_interleave(self.num_samples_align_pretuning)
            for x, y in shuffled(torch.cat(drawn), labels, self.batch_size_align_pretuning):
                optimizer.zero_grad()
                alignment_loss(self._logits(x.to(device)), y.to(device)).backward()
                optimizer.step()
            schedule.step()
        heads.requires_grad_(False)

    @torch.no_grad()
    def _fisher_of_head(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean Fisher of weight and bias of the newest tuned head, over draws and all classes.

        The gradient of log p_k by row c is (1[k = c] - p_c) x; its square has the mean p_c (1 - p_c) x^2.
        """
        head, earlier = self.tuned[-1], len(self.mixtures) - self.tuned[-1].out_features
        weight, bias = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
        among = self.mixtures[:earlier] if isinstance(self.method, IEL) else self.mixtures
        for mixture in among:
            x = mixture.draw(self.num_samples_align_pretuning).to(device)
            p = self._logits(x).softmax(1)[:, earlier:]
            weight += (p * (1 - p)).T @ x.square()
            bias += (p * (1 - p)).sum(0)
        count = max(len(among) * self.num_samples_align_pretuning, 1)
        return weight / count + FLOOR, bias / count + FLOOR

    def _logits(self, features: Tensor) -> Tensor:
        """Of the tuned heads of all tasks, `[N, classes so far]`."""
        return torch.cat([head(features) for head in self.tuned], dim=1)

    @contextmanager
    def _with_tuned_heads(self) -> Iterator[None]:
        """Within the block the newest head of the model is that of all classes, made of the tuned ones."""
        heads, rows = self.model.heads, sum(head.out_features for head in self.tuned)
        joint = nn.Linear(self.tuned[0].in_features, rows, device=self.tuned[0].weight.device)
        with torch.no_grad():
            joint.weight.copy_(torch.cat([head.weight for head in self.tuned]))
            joint.bias.copy_(torch.cat([head.bias for head in self.tuned]))
        self.model.heads = nn.ModuleList([joint])
        try:
            yield
        finally:
            self.model.heads = heads

    def _decoupled_step_of_head(self, rate: float) -> Tensor:
        """theta <- theta - rate grad, clipped, for the newest head; returns its penalty."""
        penalty = self.head_penalty()
        parameters = list(self.model.heads[-1].parameters())
        gradients = torch.autograd.grad(penalty, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if self.clip_grad is not None:
                    gradient = gradient * (self.clip_grad / (gradient.norm() + 1e-6)).clamp(max=1.0)
                parameter.sub_(gradient, alpha=rate)
        return penalty.detach()


def fresh_(head: nn.Linear) -> nn.Linear:
    """Starts a head anew, as the authors' code does."""
    nn.init.trunc_normal_(head.weight, std=INIT_STD)
    nn.init.zeros_(head.bias)
    return head


def alignment_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of logits that are scaled to the length 1 / TEMPERATURE."""
    lengths = logits.norm(dim=1, keepdim=True) + 1e-7
    return F.cross_entropy(logits / (TEMPERATURE * lengths), labels)


def shuffled(features: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in an order drawn anew, without the rest that is no full batch unless that is all there is."""
    for rows in torch.randperm(len(labels)).split(batch_size):
        if len(rows) == batch_size or len(labels) < batch_size:
            yield features[rows], labels[rows]


def _count(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"protocol: {name}: expected an integer >= {least}, got {value!r}")
    return value


def _strength(name: str, value: float) -> float:
    return number(f"protocol: {name}", value, 0.0, float("inf"))
