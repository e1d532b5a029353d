# SPDX-License-Identifier: Apache-2.0
"""Image problems of continual runs on small sets in the official layouts; the published configurations."""

from __future__ import annotations

import json
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from image_folders import (
    CLASSES,
    SIDE,
    WNIDS,
    WRITERS,
    picture,
    write_cifar,
    write_domainnet,
    write_images,
    write_released,
    write_split,
)
from PIL import Image
from safetensors.torch import save_file

from benchmarks import extras
from benchmarks.continual import backbones, configuration, image_sets, image_transforms, images, problems
from benchmarks.continual.configuration import Run
from benchmarks.continual.image_sets import Examples
from benchmarks.continual.run import State, execute
from benchmarks.continual.stream import Problem, loader, size
from fused_ewclora.demo.formats import DataError

TINY: dict[str, Any] = {"model": "test_vit", "image_size": 32, "pretrained": False, "tasks": 2}
PUBLISHED = [
    name
    for name in configuration.available()
    if name.startswith("published/")
    and configuration.load(configuration.find(name)).runs[0].problem["kind"] == "images"
]


def load(root: Path, dataset: str, seed: int = 0, **changes: Any) -> Problem:
    torch.set_num_threads(1)
    return images.load(root, seed, "cpu", **({"dataset": dataset} | TINY | changes))


def groups(run: Run) -> list[dict[str, Any]]:
    """The adapters of a run, by the layers that they are for."""
    return run.adapters if isinstance(run.adapters, list) else [run.adapters]


def different(names: list[str]) -> dict[str, set[str]]:
    """Names of methods by configuration, each in the first one that has such a method: data, ranks and the
    number of tasks do not make another one of it."""
    methods: dict[str, set[str]] = {name: set() for name in names}
    known = set()
    for name in names:
        for run in configuration.load(configuration.find(name)).runs:
            options = {key: value for key, value in run.options.items() if key != "total_tasks"}
            adapters = [{**group, "r": 0} for group in groups(run)]
            training = (run.training.optimizer, run.training.schedule, run.training.iterations)
            key = json.dumps([run.kind, options, adapters, training, run.protocol])
            if key not in known:
                known.add(key)
                methods[name].add(run.method)
    return methods


@pytest.mark.parametrize(("name", "learned"), different(PUBLISHED).items(), ids=PUBLISHED)
def test_published_methods_learn(name: str, learned: set[str], tmp_path: Path) -> None:
    """Methods of published configurations are made and learn two tasks."""
    loaded = configuration.load(configuration.find(name))
    assert loaded.name == name.removeprefix("published/")
    settings = loaded.runs[0].problem
    write = WRITERS.get(settings["dataset"]) or write_split(settings["dataset"].removeprefix("folder:"))
    write(tmp_path)
    torch.set_num_threads(1)
    problem = problems.load(settings | TINY, tmp_path, loaded.runs[0].seed, "cpu")
    for run in loaded.runs:
        assert timm.get_pretrained_cfg(run.problem["model"]).hf_hub_id  # a name and weights that timm knows
        method = State(run, problem, torch.device("cpu")).method
        slices = {
            name.rpartition(".")[2]: tuple(group.get("slices", [""]))
            for group in groups(run)
            for name in group["target_modules"]
        }
        assert Counter(name.split(".")[-1] for name in method.layers) == dict.fromkeys(slices, 6)
        for name, layer in method.layers.items():
            segments = tuple(piece.name for piece in layer.adapter_slices)
            assert segments == slices[name.split(".")[-1]]
        if run.method in learned:
            iterations = run.training.iterations and 2
            short = replace(run.training, epochs=1, iterations=iterations, batch_size=24, workers=0)
            record = execute(replace(run, training=short), problem, torch.device("cpu"))
            assert [len(row) for row in record["matrices"]["class_incremental"]] == [1, 2]


def test_every_protocol_configured() -> None:
    """Every published protocol has a configuration."""
    sets = {configuration.load(configuration.find(name)).runs[0].problem["dataset"] for name in PUBLISHED}
    folders = {"folder:cropdiseases", "folder:vtab"}
    assert sets == {*image_sets.READERS, *folders} and len(PUBLISHED) == 24


@pytest.mark.parametrize("dataset", WRITERS)
def test_task_classes(dataset: str, tmp_path: Path) -> None:
    """Tasks hold the images of their classes."""
    WRITERS[dataset](tmp_path)
    problem = load(tmp_path, dataset)
    names = WNIDS if dataset.startswith("imagenet") else CLASSES
    assert [task.classes for task in problem.stream.tasks] == [names[:2], names[2:]]
    counts = {"cifar100": (6, 6), "domainnet": (24, 12)}.get(dataset, (7, 5))
    for task in problem.stream.tasks:
        assert (size(task.train), size(task.test)) == counts
        inputs, labels = next(iter(loader(task.train, 100)))
        assert inputs.shape == (counts[0], 3, 32, 32) and inputs.dtype == torch.float32
        assert labels.dtype == torch.int64 and set(labels.tolist()) == {0, 1}
    assert problem.facts["train_images"] == 2 * counts[0]
    assert problem.backbone(inputs).shape == (counts[0], problem.backbone.dim)


@pytest.mark.parametrize("dataset", ["imagenet-r", "domainnet", "cifar100"])
def test_labels_and_pixels(dataset: str, tmp_path: Path) -> None:
    """Labels and pixels of test images are those of the files."""
    WRITERS[dataset](tmp_path)
    whole = image_transforms.testing(SIDE, 1.0, "bilinear", image_transforms.NONE)
    for number, task in enumerate(load(tmp_path, dataset, image_size=48).stream.tasks):
        data = images.Images(task.test.examples, whole)
        for index in range(size(data)):
            image, label = data[index]
            position = 2 * number + label
            if dataset == "cifar100":
                row = 4 * (index // 2) + position  # of the file, whose labels go round
                file = tmp_path / "cifar-100-python" / "test"
                pixels = pickle.loads(file.read_bytes())[b"data"][row].reshape(3, 32, 32)
                assert (task.test.examples.images[index].transpose(2, 0, 1) == pixels).all()
                continue
            file = task.test.examples.images[index]
            assert file.parent.name == task.classes[label]
            expected = np.asarray(picture(10 * position + int(file.stem[-1])))[:, 5:-5].transpose(2, 0, 1)
            torch.testing.assert_close(image, torch.from_numpy(expected / np.float32(255)), rtol=0, atol=0)


def test_training_redrawn(tmp_path: Path) -> None:
    """Training images are drawn anew, and test images are not."""
    write_cifar(tmp_path)
    task = load(tmp_path, "cifar100").stream.tasks[0]
    assert not torch.equal(task.train[0][0], task.train[0][0])
    assert torch.equal(task.test[0][0], task.test[0][0])
    for data in (task.train, task.test):
        assert 0.0 <= data[0][0].min() < 0.5 < data[0][0].max() <= 1.0


def test_interpolation_of_training_images(tmp_path: Path) -> None:
    """Crops of training images are scaled by `train_interpolation`, those of test images are not."""
    write_split("imagenet-a")(tmp_path)
    found = []
    for mode in ("bilinear", "bicubic"):
        task = load(tmp_path, "imagenet-a", train_interpolation=mode, image_size=48).stream.tasks[0]
        torch.manual_seed(0)  # the same crop
        found.append((task.train[0][0], task.test[0][0]))
    assert torch.equal(found[0][1], found[1][1])
    assert 0.0 < float((found[0][0] - found[1][0]).abs().mean()) < 0.1


def test_normalize_statistics(tmp_path: Path) -> None:
    """`normalize` takes the statistics of the model or given ones."""
    write_cifar(tmp_path)
    plain, model, with_file = (
        load(tmp_path, "cifar100", normalize=value).stream.tasks[0].test[0][0]
        for value in (None, "model", {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 4]})
    )
    mean = torch.tensor(timm.get_pretrained_cfg("test_vit").mean)[:, None, None]
    torch.testing.assert_close(model, (plain - mean) / 0.5)
    moved = (plain - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([1, 2, 4])[:, None, None]
    torch.testing.assert_close(with_file, moved)


def test_shuffled_class_order(tmp_path: Path) -> None:
    """Shuffled classes have the order of the official generator."""
    write_split("imagenet-a")(tmp_path)
    orders = []
    for seed in (1993, 1994):
        np.random.seed(seed)  # noqa: NPY002, as the official code does
        expected = [WNIDS[i] for i in np.random.permutation(4)]  # noqa: NPY002
        tasks = load(tmp_path, "imagenet-a", seed, shuffle=True).stream.tasks
        assert [name for task in tasks for name in task.classes] == expected
        orders.append(expected)
    assert orders[0] != orders[1]
    assert load(tmp_path, "imagenet-a", 1993).stream.tasks[0].classes == WNIDS[:2]


def test_fixed_split(tmp_path: Path) -> None:
    """A released set is split once for all seeds."""
    write_released(tmp_path)

    def files(examples: Examples) -> list[str]:
        return [f"{file.parent.name}/{file.name}" for file in examples.images]  # type: ignore[union-attr]

    images = image_sets.read("imagenet-r", tmp_path)
    assert (len(images.train.labels), len(images.test.labels)) == (32, 8)
    assert sorted(files(images.train) + files(images.test)) == sorted(
        f"{wnid}/art_{number}.png" for wnid in WNIDS for number in range(10)
    )
    tested = [
        [Path(f).name for t in load(tmp_path, "imagenet-r", s).stream.tasks for f in files(t.test.examples)]
        for s in (0, 1)
    ]
    assert tested[0] == tested[1] == [Path(file).name for file in files(images.test)]
    assert files(image_sets.read("imagenet-r", tmp_path, 1).test) != files(images.test)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_position_embedding_resized(suffix: str, tmp_path: Path) -> None:
    """A checkpoint gives all weights, and its position embedding is resized."""
    torch.manual_seed(3)
    source = timm.create_model("test_vit", num_classes=7, img_size=32).eval()
    state = {name: torch.randn_like(value) for name, value in source.state_dict().items()}
    source.load_state_dict(state)
    if suffix == ".pth":
        torch.save(state, tmp_path / "w.pth")
    else:
        save_file(state, tmp_path / "w.safetensors")
    made = backbones.make(tmp_path, "test_vit", 32, f"w{suffix}", 0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source.forward_head(source.forward_features(x), pre_logits=True)
        torch.testing.assert_close(made(x), expected, rtol=0, atol=0)
    larger = backbones.make(tmp_path, "test_vit", 64, f"w{suffix}", 0)
    assert larger.network.pos_embed.shape[1] > made.network.pos_embed.shape[1]
    assert not any(p.requires_grad for p in made.parameters()) and not made.training


def test_random_weights_seed() -> None:
    """Random weights follow their seed and leave the random state alone."""
    torch.manual_seed(123)  # not what an earlier call could have left
    state = torch.random.get_rng_state()
    first, again, other = (
        torch.cat([p.flatten() for p in backbones.make(Path(), "test_vit", 32, False, seed).parameters()])
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def _checkpoint(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
        change(state)
        torch.save(state, root / "w.pth")

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: None, r"expected a checkpoint, found no file .*w\.pth"),
        (lambda root: (root / "w.pth").write_bytes(b"no weights"), r"w\.pth: not a readable checkpoint"),
        (_checkpoint(lambda s: s.pop("blocks.1.attn.qkv.weight")), r"lacks blocks\.1\.attn\.qkv\.weight"),
        (_checkpoint(lambda s: s.update(prompt=torch.ones(1))), "also has prompt"),
        (_checkpoint(lambda s: s.update({"norm.bias": torch.ones(5)})), r"shapes do not fit.*norm\.bias"),
    ],
)
def test_bad_checkpoint(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """A checkpoint that does not fit is refused."""
    write(tmp_path)
    with pytest.raises(DataError, match=f"(?s)pretrained: .*{message}"):
        backbones.make(tmp_path, "test_vit", 32, "w.pth", 0)


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that cannot be downloaded are named."""
    hub = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"timm/test_vit\.r160_in1k.*give the file as pretrained"):
        backbones.make(tmp_path, "test_vit", 32, True, 0)


def _without(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        target = root / path
        if target.is_dir():
            for file in target.iterdir():
                file.unlink()
            target.rmdir()
        else:
            target.unlink()

    return change


def _listing(text: str) -> Callable[[Path], None]:
    """Adds a fifth line to a list."""

    def change(root: Path) -> None:
        with (root / "domainnet" / "real_test.txt").open("a") as file:
            file.write(text)

    return change


@pytest.mark.parametrize(
    ("dataset", "change", "message"),
    [
        ("cifar100", _without("cifar-100-python/meta"), "expected the files train, test and meta.*no meta"),
        ("imagenet-r", _without("imagenet-r/test/n01443537"), "n01443537 is in train and not in test"),
        ("imagenet-r", _without("imagenet-r/train/n01443537"), "n01443537 is in test and not in train"),
        ("imagenet-a", lambda root: (root / "imagenet-a/test/extra").mkdir(), "extra is in test and not in"),
        ("domainnet", _without("domainnet/sketch_test.txt"), r"lists.*found no sketch_test\.txt"),
        ("domainnet", _without("domainnet/real/bear/art_2.png"), r"real_train\.txt: line 4: .*no such file"),
        ("domainnet", _without("domainnet/real/bear"), r"real_train\.txt: line 3: .*no such file"),
        ("domainnet", _listing("real/cup/art_0.png 1\n"), "line 5: label 1 is cl"),
        ("domainnet", _listing("real/cup/art_0.png 7\n"), r"expected labels 0\.\.4"),
        ("domainnet", _listing("real/cup/art_0.png\n"), "line 5: expected <domain>"),
        ("domainnet", _listing("/etc/passwd 1\n"), "line 5: expected <domain>"),
        ("domainnet", _listing("real/dog/a.png 4\n"), "line 5: .*dog.*no such file"),
    ],
)  # fmt: skip
def test_bad_folders(dataset: str, change: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """Folders that are not as published are refused."""
    WRITERS[dataset](tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        image_sets.read(dataset, tmp_path)


def test_one_sided_class(tmp_path: Path) -> None:
    """A class that is only in training or only in testing is refused."""
    write_domainnet(tmp_path)
    for domain in image_sets.DOMAINS:
        file = tmp_path / "domainnet" / f"{domain}_test.txt"
        file.write_text("".join(line for line in file.read_text().splitlines(True) if "/cup/" not in line))
    with pytest.raises(DataError, match="domainnet: class cup: expected test images, found none"):
        image_sets.read("domainnet", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": {b"fine_labels": [0, 1, 2, 0] * 3}}, "class diamond: expected test images, found none"),
        ({"train": {b"fine_labels": [0, 1, 2, 4] * 3}}, r"training: expected labels 0\.\.3, got 4"),
        ({"train": {b"fine_labels": [0, 1, 2, -1] * 3}}, r"training: expected labels 0\.\.3, got -1"),
        ({"meta": {b"names": []}}, "meta: expected a list fine_label_names"),
    ],
)
def test_cifar_mismatch(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """CIFAR files that do not agree are refused."""
    write_cifar(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        image_sets.read("cifar100", tmp_path)


def test_unreadable_image(tmp_path: Path) -> None:
    """An unreadable image is named."""
    write_split("imagenet-r")(tmp_path)
    (tmp_path / "imagenet-r" / "train" / WNIDS[0] / "art_1.png").write_bytes(b"not an image")
    task = load(tmp_path, "imagenet-r").stream.tasks[0]
    with pytest.raises(DataError, match=r"art_1\.png: not a readable image"):
        list(loader(task.train, 4))


def test_single_image_class(tmp_path: Path) -> None:
    """A class of one image cannot be split."""
    write_released(tmp_path)
    write_images(tmp_path / "imagenet-r" / "n09", 1)
    with pytest.raises(DataError, match="n09: expected at least 2 images, one for testing, got 1"):
        image_sets.read("imagenet-r", tmp_path)


@pytest.mark.parametrize("dataset", image_sets.READERS)
def test_missing_data(dataset: str, tmp_path: Path) -> None:
    """Missing data are named together with the layout expected."""
    with pytest.raises(DataError, match=r"(cifar-100-python\.tar\.gz|imagenet-.\.tar|_train\.txt).*found no"):
        load(tmp_path, dataset)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "svhn"}, r"dataset: expected one of cifar100, .*got 'svhn'"),
        ({"model": "vit_gigantic"}, "model: expected the name of a model of timm .*got 'vit_gigantic'"),
        ({"model": "test_vit.no_such_tag"}, "model: 'test_vit.no_such_tag' cannot be made"),
        ({"model": "test_resnet"}, "model: 'test_resnet' cannot be made: .*img_size"),
        ({"pretrained": 3}, "pretrained: expected true, false or the path"),
        ({"image_size": 0}, "image_size: expected an integer >= 1, got 0"),
        ({"split_seed": -1}, "split_seed: expected an integer >= 0, got -1"),
        ({"crop_scale": [0.5, 0.1]}, r"crop_scale: .*got \[0\.5, 0\.1\]"),
        ({"crop_fraction": 1.5}, r"crop_fraction: .*got 1\.5"),
        ({"interpolation": "cubic"}, "interpolation: expected bilinear or bicubic, got 'cubic'"),
        ({"train_interpolation": "cubic"}, "interpolation: expected bilinear or bicubic, got 'cubic'"),
        ({"normalize": {"mean": [0.5], "std": [0.5]}}, "normalize: expected null"),
        ({"normalize": "imagenet"}, "normalize: expected null"),
        ({"tasks": 5}, "tasks: expected at least one class per task"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Settings out of range are refused."""
    write_cifar(tmp_path)
    with pytest.raises(DataError, match=message):
        load(tmp_path, **({"dataset": "cifar100"} | settings))


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path)
    with monkeypatch.context() as change:
        change.setitem(__import__("sys").modules, "torchvision", None)
        with pytest.raises(DataError, match="pip install torchvision"):
            load(tmp_path, "cifar100")

    def missing(name: str) -> None:
        raise extras.Unavailable(f"{name} is not installed")

    monkeypatch.setattr(extras, "load", missing)
    with pytest.raises(DataError, match="pip install timm torchvision"):
        load(tmp_path, "cifar100")


@pytest.mark.parametrize("held_out", ["test", "val", None])
def test_own_folder(held_out: str | None, tmp_path: Path) -> None:
    """A folder of images per class, split or not, is a stream."""
    splits = ["train", held_out] if held_out else [""]
    for split in splits:
        for name in ("a", "b", "c", "d"):
            folder = tmp_path / "mine" / split / name if split else tmp_path / "mine" / name
            folder.mkdir(parents=True)
            for number in range(5):
                Image.new("RGB", (40, 36), (40 * number, 10, 200)).save(folder / f"{number}.png")
    problem = load(tmp_path, "folder:mine")
    assert [task.classes for task in problem.stream.tasks] == [("a", "b"), ("c", "d")]
    sizes = (10, 10) if held_out else (8, 2)
    assert all((size(task.train), size(task.test)) == sizes for task in problem.stream.tasks)
    with pytest.raises(DataError, match="expected a folder of images"):
        load(tmp_path, "folder:other")


class Labels:
    names = ("x", "y", "z", "w")


class Rows:
    """As a split of the package datasets."""

    features: ClassVar[dict[str, Any]] = {"image": None, "label": Labels()}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: Any) -> Any:
        if index == "label":
            return [0, 1, 2, 3] * 2
        return {"image": Image.new("L", (36, 36), 20 * index), "label": index % 4}


def test_own_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the package datasets are decoded on access; what it lacks is said."""
    with pytest.raises(DataError, match="pip install datasets"):
        load(tmp_path, "datasets:mine")
    fake = ModuleType("datasets")
    found: dict[str, Any] = {"train": Rows(), "validation": Rows()}
    monkeypatch.setattr(fake, "load_dataset", lambda name: found, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    problem = load(tmp_path, "datasets:mine")
    assert [task.classes for task in problem.stream.tasks] == [("x", "y"), ("z", "w")]
    inputs, labels = next(iter(loader(problem.stream.tasks[1].test, 10)))
    assert inputs.shape == (4, 3, 32, 32) and labels.tolist() == [0, 1, 0, 1]
    with pytest.raises(DataError, match="found no validation"):
        found.pop("validation")
        load(tmp_path, "datasets:mine")


def vit_folder(folder: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=16,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)


def test_other_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones of torchvision, transformers and open_clip give the features before their classifier."""
    import open_clip
    import torchvision

    small = torchvision.models.vision_transformer.VisionTransformer
    tiny = {
        "image_size": 32,
        "patch_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
    }
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights=None, **_: small(**tiny))
    vit_folder(tmp_path / "vit")
    clip = {"embed_dim": 12, "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8,
            "patch_size": 16}, "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2,
            "layers": 1}}  # fmt: skip
    (tmp_path / "tiny-clip.json").write_text(json.dumps(clip))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    x = torch.rand(2, 3, 32, 32)
    for model, pretrained, dim in (
        ("torchvision:vit_b_16", False, 16),
        ("transformers:any", "vit", 16),
        ("transformers:vit", False, 16),
        ("open_clip:tiny-clip", False, 12),
    ):
        made = backbones.make(tmp_path, model, 32, pretrained, 0)
        assert made(x).shape == (2, dim) and made.dim == dim, model
        assert not any(p.requires_grad for p in made.parameters())
        assert min(image_transforms.statistics_of("model", made.pretrained_config)[1]) > 0.0
    trained = small(**tiny)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    made = backbones.make(tmp_path, "torchvision:vit_b_16", 32, "w.pth", 0)
    trained.heads = torch.nn.Identity()
    torch.testing.assert_close(made(x), trained.eval()(x))
    for model, pretrained, message in (
        ("keras:vit", False, "expected a name of timm or LIBRARY:NAME"),
        ("torchvision:vit_b_17", False, "name of a model of torchvision"),
        ("open_clip:ViT-Q", False, "name of a model of open_clip"),
        ("transformers:any", "nothing", "expected a folder of save_pretrained"),
        ("torchvision:vit_b_16", "nothing.pth", "expected a checkpoint"),
    ):
        with pytest.raises(DataError, match=message):
            backbones.make(tmp_path, model, 32, pretrained, 0)
