# SPDX-License-Identifier: Apache-2.0
"""EWC-LoRA inside real Avalanche strategies: the bits of the controller used by hand; clear errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from avalanche.benchmarks import (
    benchmark_from_datasets,
    split_online_stream,
    task_incremental_benchmark,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.transform_groups import TransformGroups
from avalanche.checkpointing import maybe_load_checkpoint, save_checkpoint
from avalanche.models import (
    IncrementalClassifier,
    MultiHeadClassifier,
    MultiTaskModule,
)
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.training.plugins import SupervisedPlugin
from avalanche.training.supervised import Naive
from models import MLP, randomize_adapters_
from tiny_models import assert_same, snapshot
from torch import nn

import fused_ewclora as fe
from fused_ewclora.errors import ArgumentError, TargetError
from fused_ewclora.integrations.avalanche import EWCLoRAPlugin

FEATURES, CLASSES, SAMPLES = 6, 2, 11
CONFIG = fe.LoRAConfig(r=2, target_modules=["fc1", "fc2"])


class Samples(torch.utils.data.Dataset):
    """Random x, labels of one experience, and the `targets` that Avalanche asks for."""

    def __init__(self, experience: int, classes: range) -> None:
        generator = torch.Generator().manual_seed(experience)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.targets = [classes[i % len(classes)] for i in range(SAMPLES)]

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], self.targets[index]


def benchmark(experiences: int = 3, new_classes: bool = True, transforms: TransformGroups | None = None):
    """A domain- or class-incremental stream."""
    sets = [
        as_classification_dataset(
            Samples(i, range(CLASSES * i, CLASSES * (i + 1)) if new_classes else range(CLASSES)), transforms
        )
        for i in range(experiences)
    ]
    return with_classes_timeline(benchmark_from_datasets(train=sets, test=sets))


class MultiHead(MultiTaskModule):
    """One head per task label on a shared body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP(FEATURES, classes=8)
        self.heads = MultiHeadClassifier(8, CLASSES, masking=False)

    def forward(self, x, task_labels):
        return self.heads(torch.tanh(self.body(x)), task_labels)


class Growing(nn.Module):
    """A head that gets units for new classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP(FEATURES, classes=8)
        self.classifier = IncrementalClassifier(8, CLASSES, masking=False)

    def forward(self, x):
        return self.classifier(torch.tanh(self.body(x)))


def injected(model: nn.Module, *trained: str) -> nn.Module:
    torch.manual_seed(0)
    fe.inject(model, CONFIG)
    randomize_adapters_(model)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    return model


def mlp() -> nn.Module:
    return injected(MLP(FEATURES, classes=6), "head")


def options(**others):
    return {
        "ewc_lambda": 30.0,
        "fisher_mode": "batch",
        "generator": torch.Generator().manual_seed(5),
        **others,
    }


def naive(model: nn.Module, *plugins: SupervisedPlugin, **others) -> Naive:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"train_mb_size": 4, "train_epochs": 2, "eval_mb_size": 8, "evaluator": None} | others
    return Naive(model=model, optimizer=optimizer, plugins=list(plugins), **settings)


class Recorder(SupervisedPlugin):
    """The batches that the strategy trained on; makes what dynamic modules draw repeatable."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[list[torch.Tensor]]] = []

    def before_train_dataset_adaptation(self, strategy, **kwargs) -> None:
        self.batches.append([])
        torch.manual_seed(len(self.batches))

    def before_forward(self, strategy, **kwargs) -> None:
        self.batches[-1].append([part.clone() for part in strategy.mbatch])


def by_hand(model, recorded, stream) -> fe.EWC:
    """What the strategy with the plugin should do, with the controller alone."""
    ewc = fe.EWC(model, **options())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    known = set(model.parameters())
    for number, (experience, batches) in enumerate(zip(stream, recorded, strict=True), start=1):
        torch.manual_seed(number)
        model.train()
        avalanche_model_adaptation(model, experience)
        if fresh := [p for p in model.parameters() if p not in known]:
            optimizer.add_param_group({"params": fresh})
            known |= set(fresh)
        for x, y, *task in batches:
            optimizer.zero_grad()
            (F.cross_entropy(model(x, *task), y) + ewc.penalty()).backward()
            optimizer.step()
        loader = torch.utils.data.DataLoader(experience.dataset.eval(), batch_size=4)
        ewc.end_task(loader, F.cross_entropy, forward=lambda m, batch: (m(batch[0], *batch[2:]), batch[1]))
        fe.reset_optimizer_state_(optimizer, model)
    return ewc


CASES = {
    "one head": (mlp, benchmark),
    "head per task": (
        lambda: injected(MultiHead(), "heads", "body.head"),
        lambda: with_classes_timeline(task_incremental_benchmark(benchmark(new_classes=False))),
    ),
    "growing head": (lambda: injected(Growing(), "classifier", "body.head"), benchmark),
}


@pytest.mark.parametrize("case", CASES)
def test_strategy_bitwise(case):
    """A strategy equals the controller used by hand to the last bit."""
    build, stream = CASES[case][0], CASES[case][1]().train_stream
    model = build()
    twin = copy.deepcopy(model)
    ewc, recorder = fe.EWC(model, **options()), Recorder()
    strategy = naive(model, EWCLoRAPlugin(ewc), recorder)
    for experience in stream:
        strategy.train(experience)
    assert ewc.tasks == 3 and all(len(batches) == 6 for batches in recorder.batches)
    twin_ewc = by_hand(twin, recorder.batches, stream)
    assert_same(snapshot(model, ewc.fishers), snapshot(twin, twin_ewc.fishers))
    assert ewc.history == twin_ewc.history


def test_controller_options():
    """The plugin makes its controller from options."""
    model = mlp()
    plugin = EWCLoRAPlugin(**options(gamma=0.5), labels="sampled", max_batches=2)
    assert plugin.ewc is None
    naive(model, plugin).train(benchmark().train_stream[:2])
    assert (plugin.ewc.ewc_lambda, plugin.ewc.gamma, plugin.ewc.fisher_mode) == (30.0, 0.5, "batch")
    assert [(t.labels, t.samples, t.batch_size) for t in plugin.ewc.history] == [("sampled", 8, 4)] * 2


@pytest.mark.parametrize("reset", [True, False])
def test_optimizer_head_state(reset):
    """The optimizer keeps its state for the head."""
    model = mlp()
    strategy = naive(model, EWCLoRAPlugin(**options(), reset_optimizer=reset))
    strategy.train(benchmark().train_stream[0])
    state = {p for p, held in strategy.optimizer.state.items() if held}
    lora = {p for layer in fe.adapters(model).values() for _, p in layer.named_lora_parameters()}
    assert set(model.head.parameters()) <= state
    assert bool(state & lora) != reset


@pytest.mark.parametrize("group", ["eval", "train"])
def test_fisher_transforms(group):
    """The Fisher sees the transformations that were asked for."""
    stream = benchmark(1, transforms=TransformGroups({"train": lambda x: 3.0 * x, "eval": lambda x: -x}))
    model = mlp()
    twin = copy.deepcopy(model)
    ewc = fe.EWC(model, **options(fisher_mode="sample"))
    naive(model, EWCLoRAPlugin(ewc, transforms=group, batch_size=SAMPLES), train_epochs=0).train(
        stream.train_stream
    )
    data = Samples(0, range(CLASSES))
    x = -data.x if group == "eval" else 3.0 * data.x
    expected = fe.EWC(twin, **options(fisher_mode="sample"))
    expected.end_task([(x, torch.tensor(data.targets))], F.cross_entropy)
    assert_same(snapshot(model, ewc.fishers), snapshot(twin, expected.fishers))


def test_criterion_that_sums():
    """The Fisher is that of the same data under a criterion that averages."""
    model, fishers = mlp(), []
    for criterion in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        ewc = fe.EWC(copy.deepcopy(model), **options(fisher_mode="sample"))
        strategy = naive(ewc.model, EWCLoRAPlugin(ewc), train_epochs=0, criterion=criterion)
        strategy.train(benchmark(1).train_stream)
        fishers.append(ewc.fishers)
    for key, expected in fishers[0].items():
        # Gradients that nearly cancel lose digits beside the largest ones.
        torch.testing.assert_close(fishers[1][key], expected, rtol=0.0, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("known", [True, False])
def test_online_boundaries(known):
    """Without boundaries every small experience is a task, as for Avalanche's own plugins."""
    online = split_online_stream(benchmark(2).train_stream, 4, access_task_boundaries=known)
    ewc = fe.EWC(mlp(), **options())
    strategy = naive(ewc.model, EWCLoRAPlugin(ewc), train_epochs=1)
    for experience in online:
        strategy.train(experience)
    samples = [record.samples for record in ewc.history]
    assert samples == ([SAMPLES] * 2 if known else [4, 4, 3] * 2)


def test_resume_checkpoint(tmp_path):
    """Without the optimizer, whose class dill does not pickle with every PyTorch; plain SGD has no state."""

    def plain_sgd(strategy: Naive) -> Naive:
        strategy.optimizer = torch.optim.SGD(strategy.model.parameters(), lr=0.1)
        strategy.optimized_param_id = None
        return strategy

    stream = benchmark().train_stream
    ewc = fe.EWC(mlp(), **options())
    strategy = plain_sgd(naive(ewc.model, EWCLoRAPlugin(ewc)))
    strategy.train(stream[:2])
    save_checkpoint(strategy, tmp_path / "run.pkl", exclude=["optimizer"])
    torch.manual_seed(3)
    strategy.train(stream[2])
    resumed, first = maybe_load_checkpoint(naive(mlp(), EWCLoRAPlugin()), tmp_path / "run.pkl")
    assert first == 2
    torch.manual_seed(3)
    plain_sgd(resumed).train(stream[2])
    (plugin,) = (p for p in resumed.plugins if isinstance(p, EWCLoRAPlugin))
    assert plugin.ewc.model is resumed.model and plugin.ewc is not ewc
    assert_same(snapshot(ewc.model, ewc.fishers), snapshot(resumed.model, plugin.ewc.fishers))
    assert plugin.ewc.history == ewc.history


def test_evaluation_in_between():
    """Evaluation in between changes nothing and sees the same function."""
    stream = benchmark(2)
    model = mlp()
    strategy = naive(model, EWCLoRAPlugin(**options()))
    strategy.train(stream.train_stream[0])
    x = torch.randn(5, FEATURES)
    before, expected = snapshot(model), model(x)
    strategy.eval(stream.test_stream)
    assert_same(before, snapshot(model))
    assert torch.equal(model(x), expected)


def two_plugins():
    model = mlp()
    return model, [EWCLoRAPlugin(**options()), EWCLoRAPlugin(**options())]


def replaced_layer():
    model = Growing()
    torch.manual_seed(0)
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1", "classifier.classifier"]))
    ewc = fe.EWC(model)
    model.classifier.classifier = nn.Linear(8, CLASSES)
    return model, [EWCLoRAPlugin(ewc)]


def later_injection():
    model = mlp()
    plugin = EWCLoRAPlugin(fe.EWC(model))
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["head"]))
    return model, [plugin]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: (MLP(FEATURES), [EWCLoRAPlugin()]), TargetError, "expected adapters.*inject"),
        (lambda: (mlp(), [EWCLoRAPlugin(fe.EWC(mlp()))]), ArgumentError, "that of another module"),
        (two_plugins, ArgumentError, "plugins: expected one"),
        (replaced_layer, TargetError, "classifier.classifier: .*replaced.*exclude_modules"),
        (later_injection, TargetError, "1 adapted layers are unknown"),
    ],
)
def test_early_mistakes(build, error, message):
    """Mistakes are named before anything is trained."""
    model, plugins = build()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        naive(model, *plugins).train(benchmark().train_stream[0])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ewc": 3}, "ewc: expected an EWC or None, got int"),
        ({"ewc": "made", "gamma": 0.5}, r"got both: \['gamma'\]"),
        ({"lamda": 3}, "lamda: expected options of EWC.*ewc_lambda"),
        ({"labels": "guessed"}, "labels: expected one of"),
        ({"transforms": "test"}, "transforms: expected one of"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"max_batches": 0}, "max_batches: expected an integer >= 1"),
    ],
)
def test_bad_arguments(arguments, message):
    """Arguments are checked when the plugin is made."""
    if arguments.get("ewc") == "made":
        arguments = {**arguments, "ewc": fe.EWC(mlp())}
    with pytest.raises(ArgumentError, match=message):
        EWCLoRAPlugin(**arguments)
