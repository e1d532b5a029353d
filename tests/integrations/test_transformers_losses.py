# SPDX-License-Identifier: Apache-2.0
"""The Fisher of transformers' own losses, against -log p of one sample at a time in fp64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.ewc.losses import sample_labels

IGNORED, VOCABULARY, SAMPLES, TOKENS = -100, 13, 6, 5
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 8, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
Batch = dict[str, Any]


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    target: str
    labels: str
    shifted: bool = False

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype).eval()


def bert(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, name)(hf.BertConfig(**SIZES, **options))


CASES = {
    "causal": Case(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), "c_fc", "tokens", True),
    "masked": Case(bert("BertForMaskedLM"), "query", "tokens"),
    "tokens": Case(bert("BertForTokenClassification", num_labels=4), "query", "classes of tokens"),
    "sequences": Case(bert("BertForSequenceClassification", num_labels=3), "query", "classes"),
    "regression": Case(bert("BertForSequenceClassification", num_labels=1), "query", "numbers"),
    "several labels": Case(bert("BertForSequenceClassification", num_labels=3), "query", "several"),
}  # fmt: skip
OF_CLASSES = [name for name, case in CASES.items() if case.labels not in ("numbers", "several")]


def batch_of(case: Case, dtype: torch.dtype = torch.float64) -> Batch:
    """Samples of unequal numbers of labels, one of them without any where labels are tokens."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (SAMPLES, TOKENS))
    if case.labels == "numbers":
        return {"input_ids": ids, "labels": torch.randn(SAMPLES, dtype=dtype)}
    if case.labels == "several":
        return {"input_ids": ids, "labels": torch.randint(0, 2, (SAMPLES, 3)).to(dtype)}
    if case.labels == "classes":
        labels = torch.randint(0, 3, (SAMPLES,))
        labels[2] = IGNORED
        return {"input_ids": ids, "labels": labels}
    labels = ids.clone() if case.labels == "tokens" else torch.randint(0, 4, ids.shape)
    for n, count in enumerate((1, 5, 3, 0, 4, 2)):
        labels[n, count:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def parts(batch: Batch, size: int) -> list[Batch]:
    return [{key: v[i : i + size] for key, v in batch.items()} for i in range(0, SAMPLES, size)]


def log_loss(case: Case, model: nn.Module, sample: Batch, labels: Tensor | None = None) -> Tensor:
    """The sum of -log p over the labels that count, or the model's loss where it is of another kind."""
    output = model(**sample)
    if case.labels in ("numbers", "several"):
        return output.loss
    labels = sample["labels"] if labels is None else labels
    logits = output.logits
    if case.shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


def oracle(case: Case, batch: Batch, labels: Tensor | None = None) -> dict[str, Tensor]:
    """(1/N) sum_n (d loss_n / dW)^2 of the plain model."""
    model = case.model()
    weights = {n: m.weight for n, m in model.named_modules() if n.split(".")[-1] == case.target}
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for n, sample in enumerate(parts(batch, 1)):
        loss = log_loss(case, model, sample, None if labels is None else labels[n : n + 1])
        for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            total[name] += gradient.square() / SAMPLES
    transposed = case.target == "c_fc"  # of Conv1D, whose Fisher has the rows of the adapter
    return {name: value.t() if transposed else value for name, value in total.items()}


def fisher(case: Case, loader: list[Batch], dtype: torch.dtype = torch.float64, **options: Any) -> fe.EWC:
    model = case.model(dtype)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=[case.target]))
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.promote_types(dtype, torch.float32))
    ewc.end_task(loader, **options)
    return ewc


def assert_close(ewc: fe.EWC, expected: dict[str, Tensor], tolerance: float) -> None:
    assert ewc.history[0].samples == SAMPLES and ewc.fishers.keys() == expected.keys()
    for name, value in expected.items():
        error = float((ewc.fishers[name] - value).abs().max() / value.abs().max())
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("name", CASES)
def test_own_loss(name, size):
    """The loss of a sample is -log p of all its labels, however the model averages them and whatever the
    batch; other losses of the model are taken as they are."""
    case = CASES[name]
    batch = batch_of(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ewc = fisher(case, parts(batch, size))
    # Attention of these models is fp32 in part, and sums over other numbers of rows differ by that.
    assert_close(ewc, oracle(case, batch), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_own_loss_low_precision(name, dtype):
    """So it is in lower precision."""
    case = CASES[name]
    ewc = fisher(case, parts(batch_of(case, dtype), 3), dtype)
    assert_close(ewc, oracle(case, batch_of(case)), 60 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_sampled_labels(name):
    """Sampled labels are drawn from the logits that predict them, at the positions that count."""
    case = CASES[name]
    batch = batch_of(case)
    ewc = fisher(case, [batch], labels="sampled", generator=torch.Generator().manual_seed(3))
    logits, given = case.model()(**batch).logits, batch["labels"]
    if case.shifted:
        logits, given = logits[:, :-1], given[:, 1:]
    drawn = sample_labels(logits, given, torch.Generator().manual_seed(3))
    assert torch.equal(drawn == IGNORED, given == IGNORED) and not torch.equal(drawn, given)
    if case.shifted:
        drawn = torch.cat([drawn.new_full((SAMPLES, 1), IGNORED), drawn], 1)
    assert_close(ewc, oracle(case, batch, drawn), 1e-6)


def test_exact_labels():
    """Exact labels of a classifier leave ignored samples out and count them."""
    case = CASES["sequences"]
    batch = batch_of(case)
    whole = fisher(case, parts(batch, 3), labels="exact")
    kept = {key: value[batch["labels"] != IGNORED] for key, value in batch.items()}
    expected = fisher(case, [kept], labels="exact")
    for name, value in expected.fishers.items():
        torch.testing.assert_close(whole.fishers[name], value * 5 / 6, rtol=1e-6, atol=1e-12)


def test_nothing_counts():
    """Labels that are all ignored are an error, whether the model's loss is NaN or 0."""
    for name in OF_CLASSES:
        batch = batch_of(CASES[name])
        batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        with pytest.raises(fe.FisherError, match="every target of the pass is ignored"):
            fisher(CASES[name], parts(batch, 3))


def test_first_batch_ignored():
    """A first batch without labels decides nothing."""
    case = CASES["causal"]
    batch = batch_of(case)
    batch["labels"][:3] = IGNORED
    assert_close(fisher(case, parts(batch, 3)), oracle(case, batch), 1e-6)


def test_number_of_items():
    """A loss divided by the items of a larger batch is refused."""
    case = CASES["causal"]
    loader = [{**part, "num_items_in_batch": 100} for part in parts(batch_of(case), 3)]
    with pytest.raises(fe.FisherError, match="looks like a sum over samples"):
        fisher(case, loader)


def test_auxiliary_loss():
    """A language model whose loss has a term that is no -log p of its labels is refused with what to do."""
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=8, num_local_experts=3, output_router_logits=True,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    case = Case(lambda: hf.MixtralForCausalLM(config), "q_proj", "tokens", True)
    with pytest.raises(fe.FisherError, match=r"mean of the losses of the samples.*leave loss_fn out"):
        fisher(case, parts(batch_of(case), 3), torch.float32)


def yolos() -> nn.Module:
    return hf.YolosForObjectDetection(
        hf.YolosConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, patch_size=16,
            image_size=[32, 32], num_detection_tokens=3, num_labels=4,
        )
    )  # fmt: skip


def test_detection():
    """The loss of a detector is normalised by the boxes of a batch; images one by one have their own."""
    pytest.importorskip("scipy")
    case = Case(yolos, "value", "boxes")
    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    boxes = [
        {"class_labels": torch.randint(0, 4, (k,)), "boxes": torch.rand(k, 4) * 0.3 + 0.2}
        for k in (1, 3, 2, 1)
    ]
    with pytest.raises(fe.FisherError, match=r"mean of the losses of the samples.*boxes"):
        fisher(case, [{"pixel_values": images, "labels": boxes}], torch.float32)
    loader = [{"pixel_values": images[i : i + 1], "labels": boxes[i : i + 1]} for i in range(4)]
    assert fisher(case, loader, torch.float32).history[0].samples == 4
