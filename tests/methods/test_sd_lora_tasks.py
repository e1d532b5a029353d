# SPDX-License-Identifier: Apache-2.0
"""SD-LoRA over many tasks: resuming, failing, copying, low precision, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from sd_literal import OFFICIAL, directions, run, train
from tiny_models import KEYS, Tiny, adapted, assert_same, batches, data, snapshot
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.methods import SDLoRA


def seeded(model: nn.Module, **options) -> SDLoRA:
    return SDLoRA(model, generator=torch.Generator().manual_seed(3), **options)


def everything(method: SDLoRA) -> dict[str, Tensor]:
    fishers = {} if method.ewc is None else method.ewc.fishers
    return snapshot(method.model, fishers)


def reloaded(method: SDLoRA, fresh: nn.Module, **options) -> SDLoRA:
    """The method as another process would build it."""
    file = io.BytesIO()
    torch.save({"method": method.state_dict(), "head": method.model.head.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = seeded(fresh, **options)
    other.load_state_dict(saved["method"])
    fresh.head.load_state_dict(saved["head"])
    other.generator.set_state(method.generator.get_state())
    return other


def test_many_tasks_plain():
    """Many tasks end as a plain model that computes the same."""
    model = adapted()
    method = seeded(model, ranks=(3, 2, 1), kd_threshold=0.3)
    run(method, range(13), steps=1)
    x, _ = data(4)
    expected = model(x)
    report = method.report()
    assert report.summary["directions"] + report.summary["dropped"] == 13 * len(KEYS)
    assert "13 tasks" in str(report)
    assert method.export() is model
    assert model.state_dict().keys() == Tiny().state_dict().keys() and type(model.qkv) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert "composer" not in vars(model.fc)


@pytest.mark.parametrize("tasks", [0, 1, 3])
@pytest.mark.parametrize("moment", ["between tasks", "in a task"])
@pytest.mark.parametrize(
    "kind",
    [{"kd_threshold": 0.95}, {"kd_threshold": 0.95, "magnitudes": "shared"}, OFFICIAL],
    ids=["own magnitudes", "shared magnitudes", "official code"],
)
def test_resume_bitwise(tasks, moment, kind):
    """Training resumes bit for bit in a new model."""
    options = {"ranks": (2, 3, 1), "ewc_lambda": 3.0, **kind}
    method = seeded(adapted(), **options)
    run(method, range(tasks), steps=1)
    if moment == "in a task":
        method.begin_task(tasks)
        train(method, 50, steps=1)
    other = reloaded(method, adapted(), **options)
    assert_same(everything(method), everything(other))
    assert other.report().to_dict() == method.report().to_dict()
    for each in (method, other):
        if moment == "in a task":
            train(each, 51, steps=1)
            each.end_task(batches(*data(6), 4), F.cross_entropy)
        run(each, range(each.tasks, each.tasks + 1), steps=1)
    assert_same(everything(method), everything(other))


def test_loaded_state_independent():
    """A loaded state is independent of its source."""
    source, target = seeded(adapted(), ewc_lambda=3.0), seeded(adapted(), ewc_lambda=3.0)
    run(source, range(2), steps=1)
    target.load_state_dict(source.state_dict())
    before = everything(source)
    run(target, range(2, 3), steps=1)
    assert_same(everything(source), before)


def test_bad_state_unchanged():
    """A state that does not fit changes nothing."""
    method = seeded(adapted(), ewc_lambda=3.0)
    run(method, range(2), steps=1)
    target = seeded(adapted(), ewc_lambda=3.0)
    run(target, range(1), steps=1)
    before = everything(target)
    good = method.state_dict()

    def refused(saved, match, error=fe.CheckpointError, by=target):
        with pytest.raises(error, match=match):
            by.load_state_dict(saved)

    def changed(name, value):
        return good | {"tensors": good["tensors"] | {name: value}}

    def configured(**values):
        return good | {"config": good["config"] | values}

    refused({}, "the dictionary that state_dict")
    refused(configured(normalization="factors"), "normalization: expected 'product', got 'factors'")
    refused(configured(magnitudes="shared"), "magnitudes: expected 'per_adapter', got 'shared'")
    refused(configured(tasks=5), "qkv.k: expected an outcome for each of 5 tasks")
    refused(configured(tasks=-1), "a number of tasks")
    refused(configured(adapters={"fc": {}}), "qkv.k: adapted in the model only")
    broken = {**good["config"]["adapters"], "fc": {"fingerprint": target.model.fc.origin_fingerprint}}
    refused(configured(adapters=broken), "fc: expected a list of outcomes of tasks, got an entry None")
    broken["fc"] = {**broken["fc"], "outcomes": [{"residual": "1", "kept": True}]}
    refused(configured(adapters=broken), "fc: expected a list of outcomes of tasks")
    refused(changed("fc.lora_past_B", torch.zeros(6, 3).double()), r"fc.lora_past_B: expected shape \[6, 4\]")
    refused(changed("fc.lora_B", torch.full((6, 2), torch.nan)), "fc.lora_B: expected finite values")
    refused(changed("fc.lora_A", None), "fc.lora_A: expected a floating-point tensor")
    refused(changed("fc.lora_anchor", torch.zeros(())), r"fc.lora_magnitudes: expected shape \[1\]")
    refused(good | {"ewc": None}, "saved without an ewc_lambda")
    fishers = {**good["ewc"]["tensors"], "fisher.fc": torch.zeros(2, 2)}
    refused(good | {"ewc": {**good["ewc"], "tensors": fishers}}, "fisher of fc", fe.FisherError)
    refused(good, "other base weights", by=seeded(adapted(seed=9), ewc_lambda=3.0))
    assert target.tasks == 1
    assert_same(everything(target), before)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("direction", "end_task: fc: expected a finite direction"),
        ("magnitude", "end_task: fc: expected a finite direction"),
        ("loader", "the loader is empty"),
        ("loss", None),
        ("Fisher", "Fisher of fc: expected finite"),  # after the task's own was estimated
        ("merged", "call unmerge"),
    ],
)
def test_failed_task_retry(cause, message):
    """A task that cannot end changes nothing and can be ended again."""
    method, other = (seeded(adapted(), ewc_lambda=3.0, fisher_dtype=torch.float64) for _ in range(2))
    loader = batches(*data(6), 4)
    for each in (method, other):
        run(each, range(2), steps=1)
        each.begin_task(2)
        train(each, 2)
    model, kept = method.model, copy.deepcopy(method.model.state_dict())
    now = directions(model)["fc"]
    if cause in ("direction", "magnitude"):
        with torch.no_grad():
            (now.lora_A if cause == "direction" else now.lora_magnitudes)[-1] = torch.nan
    if cause == "Fisher":
        method.ewc.fishers["fc"].fill_(torch.inf)
    if cause == "merged":
        fe.merge(model)
    before = everything(method)
    drawn = method.generator.get_state()
    with pytest.raises(ZeroDivisionError if cause == "loss" else fe.EWCLoRAError, match=message):
        method.end_task([] if cause == "loader" else loader, failing if cause == "loss" else F.cross_entropy)
    assert_same(everything(method), before)
    assert method.tasks == 2 and method.ewc.tasks == 2
    if cause == "merged":
        fe.unmerge(model)
    model.load_state_dict(kept)
    method.ewc.fishers["fc"].copy_(other.ewc.fishers["fc"])
    method.generator.set_state(drawn)
    for each in (method, other):
        each.end_task(loader, F.cross_entropy)
    assert_same(everything(method), everything(other))
    assert method.ewc.history == other.ewc.history


def failing(output: Tensor, y: Tensor) -> Tensor:
    if len(y) == 2:  # the second batch
        raise ZeroDivisionError
    return F.cross_entropy(output, y)


def test_merged_refused():
    """Merged adapters can neither end a task nor load one."""
    method = seeded(adapted())
    run(method, range(1), steps=1)
    method.begin_task(1)
    fe.merge(method.model)
    before = everything(method)
    for refused in (lambda: method.end_task([]), lambda: method.load_state_dict(method.state_dict())):
        with pytest.raises(fe.TargetError, match="qkv: its adapter is merged"):
            refused()
    assert_same(everything(method), before)


def test_penalty_starts_zero():
    """The penalty is zero where the last task ended."""
    method = seeded(adapted(), ewc_lambda=3.0)
    run(method, range(2))
    assert method.penalty().item() == 0.0 and method.ewc.tasks == 2
    method.begin_task(2)
    train(method, 2)
    parameters = [p for _, p in method.model.named_parameters() if p.requires_grad]
    assert method.penalty().item() > 0
    expected = torch.autograd.grad(method.penalty(), parameters, allow_unused=True)
    method.model.zero_grad()
    method.ewc.add_penalty_grad_(grad_scale=4.0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is None:
            assert parameter.grad is None  # the head's
        else:
            torch.testing.assert_close(parameter.grad, 4 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_masters(dtype):
    """Weights in low precision keep adapters in single precision."""
    model = adapted(dtype=dtype)
    method = SDLoRA(model, kd_threshold=9e-4)
    run(method, range(3), steps=1)
    method.begin_task(3)
    train(method, 3)
    x, _ = data(4, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype and y.isfinite().all()
    for now in directions(model).values():
        assert {t.dtype for t in vars(now).values()} == {torch.float32}
    for layer in fe.adapters(model).values():
        wide = layer.weight.double()
        for adapter in layer.composed():
            first = 0
            for start, stop in adapter.rows:
                b = adapter.lora_b[first : first + stop - start].double()
                wide[start:stop] += (b * adapter.scale.double()) @ adapter.lora_a.double()
                first += stop - start
        sample = torch.randn(5, layer.in_features).to(dtype)
        expected = F.linear(sample.double(), wide, layer.bias.double())
        # One rounding of y in dtype, beside fp32 sums of in_features + R terms.
        bound = 2 * torch.finfo(dtype).eps * (1 + expected.abs())
        assert ((layer(sample).double() - expected).abs() <= bound).all()


def test_autocast_norm():
    """Autocast leaves the norm in single precision."""
    model = adapted(dtype=torch.float32)
    method = SDLoRA(model)
    run(method, range(1))
    method.begin_task(1)
    train(method, 1)
    scales = [a.scale for layer in fe.adapters(model).values() for a in layer.composed()]
    with torch.autocast("cpu", torch.bfloat16):
        again = [a.scale for layer in fe.adapters(model).values() for a in layer.composed()]
    assert all(torch.equal(a, b) for a, b in zip(scales, again, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_move(copied):
    """Copies of the model compute the same and can be moved."""
    model = adapted()
    method = SDLoRA(model)
    run(method, range(2))
    x, _ = data(4)
    other = copied(model)
    assert torch.equal(other(x), model(x))
    assert other.state_dict().keys() == model.state_dict().keys()
    single = other.float()(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), model(x), rtol=1e-4, atol=1e-5)
    train(method, 9)
    assert not torch.equal(other.double()(x), model(x))
    fe.merge(model)
    merged = model(x)
    fe.unmerge(model)
    torch.testing.assert_close(model(x), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"magnitudes": "shared"}], ids=str)
def test_the_model_compiles_whole(options):
    model = adapted()
    method = SDLoRA(model, **options)
    run(method, range(2))
    x, _ = data(4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)


def test_lossy_files_refused(tmp_path):
    """Files that would lose directions are refused."""
    model = adapted()
    method = SDLoRA(model)
    run(method, range(1))
    with pytest.raises(fe.CheckpointError, match=r"saved and loaded by state_dict\(\) of SDLoRA"):
        fe.save_pretrained(tmp_path, model)
    with pytest.raises(fe.CheckpointError, match="SDLoRA"):
        fe.load_pretrained(tmp_path, model)
    with pytest.raises(fe.NotExactlyRepresentable, match="export"):
        fe.export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "rows"}, "normalization: expected one of"),
        ({"magnitudes": "tied"}, "magnitudes: expected one of"),
        ({"magnitudes": "shared", "normalization": "factors"}, "reset_alphas: expected True with magnitudes"),
        ({"alpha_init": 0.0}, "alpha_init: expected a number > 0"),
        ({"ranks": ()}, "ranks: expected ranks per task"),
        ({"ranks": (4, 0)}, r"ranks\[1\]: expected an integer >= 1"),
        ({"ranks": 2.5}, "ranks: expected ranks per task"),
        ({"kd_threshold": -1e-4}, "kd_threshold: expected a finite number >= 0"),
        ({"kd_threshold": 1.0}, "kd_threshold: expected a number < 1"),
        ({"kd_threshold": 0.1, "reset_alphas": True}, "kd_threshold: expected None with reset_alphas"),
        ({"gamma": 0.5}, "gamma: expected an ewc_lambda beside it"),
        ({"ewc_lambda": -1.0}, "ewc_lambda"),
        ({"ewc_lambda": 1.0, "merge_mode": "delta"}, "merge_mode: expected none"),
    ],
)
def test_bad_arguments(options, message):
    """Bad arguments are named and change nothing."""
    model = adapted()
    before = snapshot(model)
    with pytest.raises(fe.EWCLoRAError, match=message):
        SDLoRA(model, **options)
    assert_same(snapshot(model), before)
    assert model.fc.composer is None


def test_bad_rank_refused():
    """An invalid rank is refused before the task begins."""
    model = adapted()
    method = SDLoRA(model, ranks=lambda task: 2 - task)
    run(method, range(2), steps=1)
    before = snapshot(model)
    with pytest.raises(fe.ArgumentError, match=r"ranks\(2\): expected an integer >= 1, got 0"):
        method.begin_task(2)
    assert_same(snapshot(model), before)


def test_foreign_adapters_refused():
    """Adapters with other scales or owners are refused."""
    with pytest.raises(fe.ArgumentError, match="lora_alpha: expected None"):
        SDLoRA(adapted(lora_alpha=4.0))
    plain = Tiny()
    with pytest.raises(fe.ArgumentError, match="lora_alpha: expected None"):
        SDLoRA(plain, fe.LoRAConfig(r=2, lora_alpha=4.0, target_modules=["fc"]))
    assert not fe.adapters(plain)
    model = adapted()
    SDLoRA(model)
    with pytest.raises(fe.TargetError, match="qkv: expected plain adapters, got those of another method"):
        SDLoRA(model)
    with pytest.raises(fe.TargetError, match="shard_"):
        SDLoRA(adapted(), ewc_lambda=1.0).ewc.shard_()
