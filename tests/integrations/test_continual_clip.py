# SPDX-License-Identifier: Apache-2.0
"""CLIP of open_clip and transformers in continual runs: towers, tokens, weights, published methods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import domain_files
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import fused_ewclora as fe
from benchmarks.continual import clip_models, clip_small, configuration, problems
from benchmarks.continual.clip_learner import ImageText
from benchmarks.continual.configuration import Run
from benchmarks.continual.run import State, execute
from benchmarks.continual.stream import Problem
from fused_ewclora.demo.data import load_digits
from fused_ewclora.demo.formats import DataError
from fused_ewclora.layers.index import adapter_refs

CPU = torch.device("cpu")
SIDE = 28
NAMES = ["EuroSAT", "MNIST", "CIFAR100"]
CODYRA = ["published/codyra-xtail", "published/codyra-mtil"]
PUBLISHED = [*CODYRA, "published/keeplora-mtil", "published/keeplora-mtil-2"]
TEXTS = ["a photo of a snow_leopard.", "a centered satellite photo of Lotus satellite location."]
LAYERS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "out_proj", "fc1", "fc2"]


def picture(file: Path) -> None:
    random = np.random.default_rng(len(str(file.name)))
    Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image sets, and a small model of each library."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("clip")
    domain_files.write_split("EuroSAT", folder, picture)
    domain_files.write_mnist(folder)
    domain_files.write_cifar(folder)
    write_open_clip(folder / "small")
    write_hugging_face(folder / "hf")
    return folder


def write_open_clip(folder: Path) -> None:
    folder.mkdir()
    settings = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 14, "image_size": SIDE},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 24, "vocab_size": 49408},
    }
    content = {"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))


def write_hugging_face(folder: Path) -> None:
    """A tokenizer of single letters, with weights."""
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = len(tokens) - 1
    text = {
        "vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 60, "bos_token_id": end - 1, "eos_token_id": end,
        "pad_token_id": end,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 14,
    }  # fmt: skip
    settings = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(5)
    transformers.CLIPModel(settings).save_pretrained(folder)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.2] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


def load(root: Path, seed: int = 0, **changes: Any) -> Problem:
    settings = {"kind": "clip", "datasets": NAMES, "shots": 2, "model": "small", "pretrained": False}
    return problems.load(settings | changes, root, seed, "cpu")


def test_open_clip_logits(root: Path) -> None:
    """Logits are those of open_clip's own forward, with its tokenizer; the seed decides random weights."""
    made = clip_models.make(root, "open_clip", "small", False, 3)
    network = made.towers.network.double()
    assert (made.image_size, made.statistics) == (SIDE, ((0.5,) * 3, (0.25,) * 3))
    tokens = made.tokenize(TEXTS)
    assert torch.equal(tokens, open_clip.tokenize(TEXTS, 24))
    images = torch.randn(3, 3, SIDE, SIDE, dtype=torch.float64)
    features, texts, scale = network(images, tokens)
    found = made.towers.logits(images, made.towers.texts(tokens))
    torch.testing.assert_close(found, scale * features @ texts.T, rtol=1e-12, atol=1e-12)
    again, other = (clip_models.make(root, "open_clip", "small", False, seed) for seed in (3, 4))
    weights = [m.towers.network.visual.proj.double() for m in (made, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not any(p.requires_grad for p in made.towers.parameters()) and not made.towers.training


def test_transformers_logits(root: Path) -> None:
    """Logits are those of transformers' own forward, which masks what follows a text."""
    made = clip_models.make(root, "transformers", "hf", True, 0)
    network = made.towers.network
    assert made.statistics == ((0.5,) * 3, (0.2,) * 3) and made.image_size == SIDE
    tokens = made.tokenize(TEXTS)
    assert tokens.shape == (2, 60)
    inputs = transformers.CLIPTokenizer.from_pretrained(root / "hf")(TEXTS, padding=True, return_tensors="pt")
    images = torch.randn(3, 3, SIDE, SIDE)
    expected = network(pixel_values=images, **inputs).logits_per_image
    torch.testing.assert_close(
        made.towers.logits(images, made.towers.texts(tokens)), expected, rtol=1e-4, atol=1e-4
    )
    random = clip_models.make(root, "transformers", "hf", False, 0).towers.network
    assert not torch.equal(random.visual_projection.weight, network.visual_projection.weight)


def test_weights_of_file(root: Path, tmp_path: Path) -> None:
    """Weights of a file are loaded whole; files that lack some, or are none, are refused."""
    made = clip_models.make(root, "open_clip", "small", False, 7)
    state = made.towers.network.state_dict()
    save_file(state, root / "weights.safetensors")
    loaded = clip_models.make(root, "open_clip", "small", "weights.safetensors", 0).towers.network
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name])
    del state["visual.proj"]
    save_file(state, root / "part.safetensors")
    (root / "broken.safetensors").write_bytes(b"no weights")
    for file in ("part.safetensors", "broken.safetensors"):
        with pytest.raises(DataError, match=f"{file}: not a checkpoint of CLIP"):
            clip_models.make(root, "open_clip", "small", file, 0)


@pytest.mark.parametrize(
    ("library", "model", "pretrained", "words"),
    [
        ("torch", "small", False, "library: expected one of open_clip, transformers"),
        ("open_clip", "", False, "model: expected a name or a folder"),
        ("open_clip", "ViT-B-99", False, "model: expected a name that open_clip .* knows, or a folder"),
        ("open_clip", "small", True, "pretrained: expected a tag"),
        ("open_clip", "small", "none.pt", "found no file .*none.pt"),
        ("open_clip", "ViT-B-16-quickgelu", "laion400m", "pretrained: expected one of openai, .*"),
        ("open_clip", "ViT-B-16", "openai", "another activation; expected ViT-B-16-quickgelu"),
        ("transformers", "hf", "openai", "pretrained: expected true or false"),
        ("transformers", "small", True, "found no config.json"),
        ("transformers", "unknown/model", True, "transformers cannot load it"),
    ],
)  # fmt: skip
def test_wrong_models(root: Path, library: str, model: str, pretrained: Any, words: str) -> None:
    """Models and weights that are not there are refused in words, without a download."""
    with pytest.raises(DataError, match=words):
        clip_models.make(root, library, model, pretrained, 0)


def test_other_losses_refused() -> None:
    """Models that were trained with another loss than CLIP's are refused."""
    network = nn.Module()
    network.logit_scale, network.logit_bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
    with pytest.raises(DataError, match="without a logit_bias, got Module"):
        clip_models.OpenClip(network)


def test_images_and_prompts(root: Path) -> None:
    """Training images are drawn crops, test images are the centres; grey ones become coloured."""
    problem = load(root)
    euro, mnist, _ = problem.stream.tasks
    assert euro.classes == tuple(f"EuroSAT: {c}" for c in domain_files.CLASSES)
    assert [len(task.train) for task in problem.stream.tasks] == [4, 20, 4]  # type: ignore[arg-type]
    image, label = mnist.test[2 * 3]
    assert image.shape == (3, SIDE, SIDE) and image.dtype == torch.float32 and label == 3
    torch.testing.assert_close(image, torch.full_like(image, (60 / 255 - 0.5) / 0.25))
    with Image.open(euro.test.examples.images[0]) as file:  # type: ignore[attr-defined]
        whole = file.resize((SIDE * 50 // 40, SIDE), Image.Resampling.BICUBIC)
    left = round((whole.width - SIDE) / 2)
    centre = np.asarray(whole.crop((left, 0, left + SIDE, SIDE))).transpose(2, 0, 1)
    found = euro.test[0][0]
    torch.testing.assert_close(found, (torch.tensor(centre / np.float32(255)) - 0.5) / 0.25)
    drawn = [euro.train[0][0] for _ in range(8)]
    assert not torch.equal(drawn[0], drawn[1])
    assert problem.facts["templates"]["EuroSAT"] == "a centered satellite photo of {} satellite location."
    model = problem.learner(problem.backbone)  # type: ignore[misc]
    assert isinstance(model, ImageText)
    assert torch.equal(model.prompts[1], open_clip.tokenize([TEXTS[1]], 24)[0])
    assert "EuroSAT: snow leopard" in load(root, spaces=True).stream.tasks[0].classes


def learned(name: str) -> list[Run]:
    """The runs of a published configuration that differ from those of others in what they do."""
    runs = configuration.load(configuration.find(name)).runs
    if name.endswith("xtail"):
        return [run for run in runs if run.method != "LoRA"]  # as in the other one
    if "codyra" in name:
        return runs[:1]
    return runs if name.endswith("mtil") else [run for run in runs if run.method == "KeepLoRA"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_methods_learn(name: str, root: Path) -> None:
    """Methods of the published configurations learn two tasks, with adapters on q, k, v each."""
    loaded = configuration.load(configuration.find(name))
    assert loaded.name == name.removeprefix("published/")
    published = loaded.runs[0].problem
    shots = published["shots"] and 2
    changes = {"datasets": NAMES[:2], "model": "small", "pretrained": False, "shots": shots}
    problem = problems.load(published | changes, root, 8, "cpu")
    places = {"attn.in_proj.q", "attn.in_proj.k", "attn.in_proj.v", "attn.out_proj"}
    if "codyra" in name:
        places |= {"mlp.c_fc", "mlp.c_proj"}
    for run in learned(name):
        # A set has 4 images at least, of which passes that leave out a smaller last batch keep one batch.
        training = replace(run.training, iterations=1, batch_size=4, epochs_by_task=(), workers=0)
        run = replace(run, training=training)
        state = State(run, problem, CPU)
        found = {ref.key.split("resblocks.0.")[1] for ref in adapter_refs(state.method.layers)}
        assert found == places
        if "ewc_lambda" in run.options:
            other = replace(run, options={**run.options, "fisher_mode": "sample"})
            with pytest.raises(fe.ArgumentError, match=rf"text tower.*\({len(places)} such adapters"):
                State(other, problem, CPU)
        if run.kind == "CoDyRA":
            gates = state.method.gates()  # type: ignore[attr-defined]
            assert len(gates) == 2 * len(places) and all(gate.shape == (16,) for gate in gates.values())
        record = execute(run, problem, CPU)
        assert [len(row) for row in record["matrices"]["every_task"]] == [2] * 3
        assert all(np.isfinite(task["loss"]) for task in record["tasks"])
        if run.kind == "KeepLoRA":
            protected = {row["adapter"]: row["protected"] for row in record["report"]["rows"]}
            assert len(protected) == 2 * len(places) and all(protected.values())


def test_published_sizes() -> None:
    """The published configurations train as many values as the paper says, 4.4 million."""
    with torch.device("meta"):
        network = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu"))
    for name in CODYRA:
        run = next(r for r in configuration.load(configuration.find(name)).runs if r.kind == "CoDyRA")
        model = nn.ModuleDict({"backbone": clip_models.OpenClip(network)})
        for config in run.lora_configs():
            fe.inject(model, config)
        method = fe.methods.CoDyRA(model, None)
        width = {"image": (768, 3072), "text": (512, 2048)}
        by_hand = sum(12 * (4 * 2 * d * 16 + 2 * (d + m) * 16 + 6 * 16) for d, m in width.values())
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == by_hand == 4425984
        assert len(method.gates()) == 2 * 12 * 6
        fe.eject(model, merge=False)


def test_transformers_learns(root: Path) -> None:
    """The model of transformers learns a task with adapters on all linear layers of both towers."""
    problem = load(root, library="transformers", model="hf", pretrained=True, datasets=NAMES[:1])
    run = next(r for r in configuration.load(configuration.find(PUBLISHED[0])).runs if r.kind == "CoDyRA")
    training = replace(run.training, iterations=2, batch_size=4, workers=0)
    run = replace(
        run, adapters={"r": 2, "target_modules": [n.split(".")[-1] for n in LAYERS]}, training=training
    )
    gates = State(run, problem, CPU).method.gates()  # type: ignore[attr-defined]
    assert sorted(key.split("layers.0.")[1] for key in gates) == sorted(
        2 * [f"self_attn.{n}" if n == "out_proj" else n if "." in n else f"mlp.{n}" for n in LAYERS]
    )
    record = execute(run, problem, CPU)
    assert record["metrics"]["every_task"]["last"] == record["matrices"]["every_task"][1][0]


@pytest.mark.parametrize("batch", [2, 3])
def test_fisher_of_texts(root: Path, batch: int) -> None:
    """The Fisher of samples is refused for the text tower, also where there are as many classes as images;
    that of batches is the mean gradient of the loss of images, squared."""
    problem = load(root, datasets=NAMES[:1])
    model = problem.learner(problem.backbone)  # type: ignore[misc]
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["c_fc"]))
    model.begin_task(problem.stream.tasks[0])
    images, labels = torch.randn(batch, 3, SIDE, SIDE), torch.arange(batch) % 2
    with pytest.raises(fe.FisherError, match="cannot tell which rows belong to which sample"):
        fe.EWC(model, 1.0, fisher_mode="sample").end_task([(images, labels)], model.loss)
    ewc = fe.EWC(model, 1.0, fisher_mode="batch")
    ewc.end_task([(images, labels)], model.loss)  # nothing was learned: the weights stay
    model.eval()
    for key, fisher in ewc.fishers.items():
        weight = model.get_submodule(key).weight.requires_grad_()
        gradient = torch.autograd.grad(F.cross_entropy(model(images), labels), weight)[0]
        weight.requires_grad_(False)
        torch.testing.assert_close(fisher, gradient**2, rtol=1e-3, atol=1e-3 * float(fisher.max()))
    assert len(ewc.fishers) == 2


def test_fisher_of_images(root: Path) -> None:
    """With adapters in the image tower alone, the Fisher of samples is the mean of squared gradients."""
    problem = load(root, datasets=NAMES[:1])
    model = problem.learner(problem.backbone)  # type: ignore[misc]
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=".*visual.*(c_fc|c_proj)"))
    model.begin_task(problem.stream.tasks[0])
    images, labels = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0, 1, 1])
    ewc = fe.EWC(model, 1.0, fisher_mode="sample")
    ewc.end_task([(images, labels)], model.loss)
    assert len(ewc.fishers) == 2
    model.eval()
    for key, fisher in ewc.fishers.items():
        weight = model.get_submodule(key).weight.requires_grad_()
        losses = F.cross_entropy(model(images), labels, reduction="none")
        squares = [torch.autograd.grad(loss, weight, retain_graph=True)[0] ** 2 for loss in losses]
        weight.requires_grad_(False)
        expected = torch.stack(squares).mean(0)
        torch.testing.assert_close(fisher, expected, rtol=1e-3, atol=1e-3 * float(fisher.max()))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings of the small problem with the digits of scikit-learn in place of all sets."""
    digits = load_digits()
    monkeypatch.setattr(
        clip_small, "_sets", lambda root: dict.fromkeys(("mnist", "fashion-mnist", "digits"), digits)
    )
    torch.set_num_threads(1)
    yield {
        "kind": "clip-small", "train_per_class": 4, "test_per_class": 3, "base_per_class": 2, "base_steps": 3,
        "width": 16, "depth": 1,
    }  # fmt: skip
    clip_small._parts.cache_clear()
    clip_small._base.cache_clear()


def test_small_data(tiny: dict[str, Any]) -> None:
    """Five domains of ten classes; no image has two purposes or, before it is changed, two domains."""
    before = torch.get_rng_state()
    problem = problems.load(tiny, Path("nowhere"), 0, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    tasks = dict(zip(clip_small.DOMAINS, problem.stream.tasks, strict=True))
    assert [len(task.classes) for task in tasks.values()] == [10] * 5
    assert tasks["upside down"].classes[9] == "upside down: ankle boot"
    images = {name: task.train[:][0] for name, task in tasks.items()}
    for task in tasks.values():
        inputs, labels = task.test[:]
        assert inputs.shape == (30, 3, SIDE, SIDE) and -1.0 <= inputs.min() < inputs.max() <= 1.0
        assert labels.tolist() == [label for label in range(10) for _ in range(3)]
    back = {**images, "negatives": -images["negatives"], "upside down": images["upside down"].flip(-1, -2)}
    parts = clip_small._parts(Path("nowhere").resolve(), 0, 2, 4, 3)
    for name, other in (("digits", "negatives"), ("clothes", "upside down")):
        assert not {x.numpy().tobytes() for x in back[name]} & {x.numpy().tobytes() for x in back[other]}
        drawn = {x.numpy().tobytes() for x in parts[name].before[:][0]}
        assert not drawn & {x.numpy().tobytes() for x in images[name]}
    again = problems.load(tiny, Path("nowhere"), 0, "cpu").backbone
    assert again is problem.backbone  # shared by the methods of a suite
    other = problems.load(tiny, Path("nowhere"), 1, "cpu")
    assert not torch.equal(other.stream.tasks[0].train[:][0], images["digits"])
    with pytest.raises(DataError, match="train_per_class: digits, class 0: expected 902 images"):
        problems.load({**tiny, "train_per_class": 900}, Path("nowhere"), 0, "cpu")


def test_small_trained() -> None:
    """Training before the first task lowers the loss of images and prompts."""
    torch.manual_seed(0)
    tokens = clip_small.words(["a one", "a two", "a three"])
    towers = clip_small.small(tokens, 16, 1)
    images, labels = torch.randn(9, 3, SIDE, SIDE), torch.arange(9) % 3

    @torch.no_grad()
    def loss() -> float:
        return F.cross_entropy(towers.logits(images, towers.texts(tokens)), labels).item()

    before = loss()
    clip_small.train(towers, images, labels, tokens, 20, 0)
    assert loss() < 0.5 * before


def test_small_methods_learn(tiny: dict[str, Any]) -> None:
    """Every method of the configuration learns two tasks; its short version has some of them and one seed."""
    runs, short = (configuration.load(configuration.find("clip"), quick).runs for quick in (False, True))
    assert all(run.problem["kind"] == "clip-small" for run in runs)
    assert {run.seed for run in short} == {1} and {run.training.iterations for run in short} == {40}
    problem = problems.load(tiny, Path("nowhere"), 0, "cpu")
    problem = replace(problem, stream=replace(problem.stream, tasks=problem.stream.tasks[:2]))
    for run in {run.method: run for run in runs}.values():
        training = replace(run.training, iterations=2, batch_size=8)
        record = execute(replace(run, training=training), problem, CPU)
        assert [len(row) for row in record["matrices"]["every_task"]] == [2] * 3
        assert np.isfinite(record["tasks"][1]["loss"])


def test_small_words() -> None:
    """Words have numbers in alphabetical order; the largest number ends a text."""
    assert clip_small.words(["a big Cat", "cat"]).tolist() == [[1, 2, 3, 4, 5], [1, 4, 5, 0, 0]]
