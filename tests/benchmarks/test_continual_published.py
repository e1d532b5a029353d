# SPDX-License-Identifier: Apache-2.0
"""The published configurations against the values of the official codes, written down here a second time."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest

from benchmarks.continual import configuration
from benchmarks.continual.configuration import Run
from fused_ewclora.methods import CLLoRA

# Of the official codes: low-rank-cl, configs/{baseline,ewclora,inflora,sdlora}/*.json; SD-Lora-CL,
# exps/*.json, with SGD of momentum 0.9 in models/sdlora.py; CoDyRA, models/codyra.py and scripts; KeepLoRA,
# MTIL/configs; O-LoRA and N-LoRA, scripts/order_1.sh; IEL and ITA, mammoth's models/config/second_order.yaml,
# datasets/configs and scripts/reproduce.json; CL-LoRA, exps/*.json and models/cllora.py. Of P&M a summary of
# the paper.
EWC = {
    "lr": 5e-4, "head_lr": 5e-3, "batch_size": 128, "optimizer": "adam", "schedule": "cosine",
    "weight_decay": 0.0,
}  # fmt: skip
EWC_SETS: dict[str, dict[str, Any]] = {  # tasks, classes per task, rank, epochs, and what differs by method
    "ewc-lora-cifar100": {
        "tasks": 10, "r": 10, "epochs": 20, "energies": (0.95, 1.0), "SD-LoRA": {"lr": 8e-3, "head_lr": 8e-3},
    },
    "ewc-lora-domainnet": {"tasks": 5, "r": 30, "epochs": 5, "energies": (0.95, 1.0)},
    "ewc-lora-imagenet-r": {
        "tasks": 10, "r": 10, "epochs": 50, "energies": (0.98, 1.0),
        "LoRA": {"head_lr": 5e-4, "weight_decay": 5e-3}, "EWC": {"head_lr": 5e-4, "weight_decay": 5e-3},
    },
    "ewc-lora-imagenet-a": {"tasks": 10, "r": 10, "epochs": 20, "energies": (0.98, 1.0)},
}  # fmt: skip
SD = {
    "batch_size": 128, "optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0, "schedule": "constant",
    "first_lr": None, "first_head_lr": None,
}  # fmt: skip
SD_SETS: dict[str, dict[str, Any]] = {
    "sd-lora-cifar100": {"tasks": 10, "seed": 1993, "lr": 8e-3, "epochs": 20},
    "sd-lora-domainnet": {
        "tasks": 5, "seed": 1993, "lr": 0.02, "epochs": 10,
        "schedule": "multistep", "milestones": (4, 6, 8), "decay": 5e-3,
    },
    "sd-lora-imagenet-r-5": {"tasks": 5, "seed": 1995, "lr": 0.01, "epochs": 20},
    "sd-lora-imagenet-r-10": {"tasks": 10, "seed": 1995, "lr": 0.01, "epochs": 20},
    "sd-lora-imagenet-r-20": {"tasks": 20, "seed": 1995, "lr": 0.01, "epochs": 20},
    "sd-lora-imagenet-a": {
        "tasks": 10, "seed": 1993, "lr": 5e-3, "epochs": 20, "first_lr": 0.01, "first_head_lr": 0.01,
        "schedule": "multistep", "milestones": (10, 15), "decay": 0.05,
    },
}  # fmt: skip
SD_LOGS = {"sd-lora-imagenet-a": 0.01, "sd-lora-imagenet-r-10": 8e-3}  # constant rates of published logs
RANKS = [10] * 4 + [8] * 4 + [6]  # of SD-LoRA-RR: mu = 4, nu = 8
OFFICIAL_SD = {"normalization": "factors", "alpha_init": 0.8, "reset_alphas": True, "magnitudes": "shared"}

PM_SETS = {  # tasks, epochs
    "perturb-and-merge-cifar100": (10, 10),
    "perturb-and-merge-domainnet": (5, 5),
    "perturb-and-merge-imagenet-r-10": (10, 10),
    "perturb-and-merge-imagenet-r-20": (20, 10),
    "perturb-and-merge-imagenet-a": (10, 10),
}

IN21K, IN1K = "vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k_ft_in1k"  # timm 0.6
CL_SETS: dict[str, tuple[int, str, int, dict[str, Any]]] = {  # tasks, weights, rank, training
    "cl-lora-cifar100": (20, IN21K, 8, {"lr": 0.03, "epochs": 30, "batch_size": 64, "weight_decay": 1e-4}),
    "cl-lora-imagenet-r": (40, IN1K, 10, {"lr": 0.05, "epochs": 20, "batch_size": 32, "weight_decay": 5e-4}),
    "cl-lora-imagenet-a": (10, IN21K, 10, {"lr": 0.05, "epochs": 25, "batch_size": 32, "weight_decay": 5e-3}),
    "cl-lora-vtab": (5, IN21K, 10, {"lr": 0.03, "epochs": 45, "batch_size": 32, "weight_decay": 1e-4}),
}


def runs(name: str) -> dict[str, Run]:
    """By method; published protocols have one seed."""
    found = configuration.load(configuration.find(f"published/{name}")).runs
    assert len({run.seed for run in found}) == 1
    return {run.method: run for run in found}


def check_training(run: Run, expected: dict[str, Any]) -> None:
    got = {key: getattr(run.training, key) for key in expected}
    assert got == expected, run.method


@pytest.mark.parametrize("name", EWC_SETS)
def test_ewc_lora(name: str) -> None:
    """EWC-LoRA's code: rates, epochs, decay and ranks of each of its methods, accuracies before the merge."""
    official, found = EWC_SETS[name], runs(name)
    for method, run in found.items():
        key = "EWC" if method.startswith("EWC-LoRA") else method
        expected = {**EWC, "epochs": official["epochs"], "evaluate_before_end": True, **official.get(key, {})}
        if method == "InfLoRA":
            expected["head_lr"] = 5e-4  # a single rate
        check_training(run, expected)
        (adapters,) = run.lora_configs()
        assert (adapters.r, adapters.slices, run.seed) == (official["r"], ("k", "v"), 0)
        expected = {"tasks": official["tasks"], "shuffle": False, "normalize": None}
        expected["model"] = "vit_base_patch16_224.augreg_in21k"
        assert {key: run.problem[key] for key in expected} == expected
    code = found["EWC-LoRA, official code"].options
    assert code == {"ewc_lambda": 1e7, "gamma": 1.0, "fisher_mode": "batch", "merge_mode": "factors"}
    paper = found["EWC-LoRA"].options
    assert math.isclose(paper["ewc_lambda"], 1e7 / 128) and paper["fisher_mode"] == "sample"
    inflora = found["InfLoRA"].options
    energies = (inflora["epsilon"], inflora["epsilon_last"])
    assert energies == official["energies"]
    assert (inflora["total_tasks"], inflora["variant"]) == (official["tasks"], "official")
    assert found["SD-LoRA"].options == OFFICIAL_SD


@pytest.mark.parametrize("name", SD_SETS)
def test_sd_lora(name: str) -> None:
    """SD-LoRA's code: its seed, rates and schedules, its formulas and those of the paper."""
    official, found = dict(SD_SETS[name]), runs(name)
    tasks, seed = official.pop("tasks"), official.pop("seed")
    for method, run in found.items():
        expected = {**SD, **official, "head_lr": official["lr"], "evaluate_before_end": True}
        if method == "SD-LoRA, official log":
            rate = SD_LOGS[name]
            expected |= {"lr": rate, "head_lr": rate, "schedule": "constant"}
            expected |= {"first_lr": None, "first_head_lr": None}
        check_training(run, expected)
        (adapters,) = run.lora_configs()
        assert (adapters.r, adapters.slices, run.seed) == (10, ("q", "v"), seed)
        assert run.problem["tasks"] == tasks and run.problem["shuffle"] is True
        assert run.problem["model"] == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert ("SD-LoRA, official log" in found) == (name in SD_LOGS)
    assert found["SD-LoRA, official code"].options == OFFICIAL_SD
    assert found["SD-LoRA-RR, official code"].options == {**OFFICIAL_SD, "ranks": RANKS}
    paper = {"normalization": "product", "alpha_init": 1.0, "magnitudes": "shared"}
    assert found["SD-LoRA"].options == paper
    assert found["SD-LoRA-RR"].options == {"magnitudes": "shared", "ranks": RANKS}
    assert found["SD-LoRA-KD"].options == {"magnitudes": "shared", "kd_threshold": 9e-4}


@pytest.mark.parametrize("name", ["codyra-cifar100", "codyra-imagenet-r"])
def test_codyra(name: str) -> None:
    """CoDyRA's code: AdamW, iterations, thresholds, and adapters of rank 16 for q, k and v each."""
    expected = {
        "lr": 5e-4, "iterations": 500, "batch_size": 64, "optimizer": "adamw", "betas": (0.9, 0.9999),
        "weight_decay": 0.0, "schedule": "cosine", "evaluate_before_end": True,
    }  # fmt: skip
    found = runs(name)
    for run in found.values():
        check_training(run, expected)
        packed, others = run.lora_configs()
        assert (packed.r, packed.slices, others.r) == (16, ("q", "k", "v"), 16)
    assert found["CoDyRA, official code"].options == {
        "kappa_max": 5e-3, "dense_fraction": 0.5, "gate_init": "normal", "threshold": "dead_zone",
        "schedule": "staircase",
    }  # fmt: skip


@pytest.mark.parametrize("name", PM_SETS)
def test_perturb_and_merge(name: str) -> None:
    """P&M as a summary of its paper has it: rates, perturbations, one coefficient, the merged model."""
    tasks, epochs = PM_SETS[name]
    found = runs(name)
    expected = {
        "lr": 1e-3, "head_lr": 1e-2, "epochs": epochs, "batch_size": 256, "optimizer": "adamw",
        "evaluate_before_end": False,
    }  # fmt: skip
    for run in found.values():
        check_training(run, expected)
        (adapters,) = run.lora_configs()
        assert (adapters.r, adapters.slices, run.problem["tasks"]) == (10, ("k", "v"), tasks)
        assert run.problem["model"] == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert found["P&M"].options == {"epsilon": 0.5, "per_module": False, "labels": "empirical"}
    assert found["P&M, merging alone"].options == {"epsilon": 0.0}


TUNED: dict[str, dict[str, Any]] = {  # epochs, of them of tuning, and by method strength and weights of heads
    "iel-ita-cifar100": {
        "tasks": 10, "epochs": 20, "pretuning": 3, "IEL": (20.0, 0.1, 0.001), "ITA": (0.02, 0.025, 0.001),
    },
    "iel-ita-imagenet-r": {  # the strengths of CIFAR-100
        "tasks": 10, "epochs": 50, "pretuning": 3, "IEL": (20.0, 0.1, 0.001), "ITA": (0.02, 0.025, 0.001),
    },
    "ita-cropdiseases": {"tasks": 7, "epochs": 5, "pretuning": 1, "ITA": (5.0, 0.1, 0.01)},
}  # fmt: skip


@pytest.mark.parametrize("name", TUNED)
def test_iel_ita(name: str) -> None:
    """The code of IEL and ITA, mammoth's second_order: its configurations and, for the protocol, defaults."""
    official, found = TUNED[name], runs(name)
    assert set(found) == {"IEL", "ITA"} & set(official)
    for method, run in found.items():
        check_training(
            run,
            {
                "lr": 3e-4, "head_lr": 3e-4, "epochs": official["epochs"], "batch_size": 8 * 16,
                "optimizer": "adamw", "weight_decay": 0.0, "schedule": "quarter-cosine",
                "evaluate_before_end": False,
            },
        )  # fmt: skip
        strength, of_head, plain = official[method]
        assert run.options == {"beta" if method == "IEL" else "alpha": strength, "variant": "official"}
        assert run.protocol == {
            "kind": "tuned-heads", "num_epochs_pretuning": official["pretuning"],
            "learning_rate_pretuning": 0.01, "num_samples_align_pretuning": 256,
            "batch_size_align_pretuning": 128, "num_epochs_align_pretuning": 10, "lr_align_pretuning": 0.01,
            "n_components": 5, "clip_grad": 100.0, "req_weight_cls": of_head,
            "simple_reg_weight_cls": plain,
        }  # fmt: skip
        packed, others = run.lora_configs()
        assert (packed.r, packed.slices, packed.lora_alpha, others.r) == (3 * 16, None, None, 16)
        expected = {"tasks": official["tasks"], "shuffle": False, "train_interpolation": "bicubic"}
        expected |= {"model": "vit_base_patch16_224.augreg_in21k", "interpolation": "bicubic"}
        assert {key: run.problem[key] for key in expected} == expected


@pytest.mark.parametrize("name", CL_SETS)
def test_cl_lora(name: str) -> None:
    """CL-LoRA's code: one rate, adapters of q and v, six shared blocks, its protocol."""
    tasks, model, rank, training = CL_SETS[name]
    expected = {
        **training, "head_lr": training["lr"], "optimizer": "sgd", "momentum": 0.9, "schedule": "cosine",
        "evaluate_before_end": False, "first_lr": None, "first_head_lr": None,
    }  # fmt: skip
    problem = {"model": model, "tasks": tasks, "normalize": None, "crop_scale": [0.05, 1.0]}
    problem["shuffle"] = name != "cl-lora-vtab"
    found = runs(name)
    for run in found.values():
        check_training(run, expected)
        (adapters,) = run.lora_configs()
        assert (adapters.r, adapters.lora_alpha, adapters.slices, run.seed) == (rank, None, ("q", "v"), 1993)
        assert {key: run.problem[key] for key in problem} == problem
        shared = re.compile(run.options["shared"])
        blocks = [f"backbone.network.blocks.{k}.attn.qkv" for k in range(12)]
        assert [bool(shared.fullmatch(block)) for block in blocks] == [True] * 6 + [False] * 6
    defaults = inspect.signature(CLLoRA).parameters
    published = {"kd_weight": 5.0, "temperature": 2.0, "orthogonality": 1e-4}
    assert {key: defaults[key].default for key in published} == published
    assert found["CL-LoRA"].protocol == {"kind": "cl-lora"} and set(found["CL-LoRA"].options) == {"shared"}
    code = found["CL-LoRA, official code"]
    assert code.protocol == {"kind": "cl-lora", "separate_step": True}
    assert set(code.options) == {"shared", "variant"} and code.options["variant"] == "official"


@pytest.mark.parametrize(
    ("name", "order", "epochs"),
    [
        ("keeplora-mtil", "mtil-1", (10,) * 10 + (5,)),
        ("keeplora-mtil-2", "mtil-2", (5, 2, 5, 5, 5, 5, 10, 10, 10, 10, 10)),
    ],
)
def test_keep_lora(name: str, order: str, epochs: tuple[int, ...]) -> None:
    """KeepLoRA's code, keeplora_order1 and 2: shares of weights by tower, that of features, all images."""
    expected = {
        "lr": 1e-3, "epochs_by_task": epochs, "batch_size": 64, "optimizer": "adamw", "weight_decay": 0.01,
        "schedule": "one-cycle", "passes_drop_last": True,
    }  # fmt: skip
    found = runs(name)
    for run in found.values():
        check_training(run, {**expected, "iterations": None, "evaluate_before_end": False})
        packed, others = run.lora_configs()
        assert (packed.r, packed.slices, others.r, run.seed) == (16, ("q", "k", "v"), 16, 42)
        problem = {"datasets": order, "shots": None, "rivals": "own", "text_loss": False}
        assert {key: run.problem[key] for key in problem} == problem
    shared = {"epsilon_w": {".*visual.*": 0.85, ".*": 0.2}, "epsilon_f": 0.99}
    assert found["KeepLoRA"].options == {**shared, "variant": "official"}
    assert found["KeepLoRA, paper"].options == {**shared, "variant": "paper"}


@pytest.mark.parametrize(
    ("name", "method", "lambda_1", "epochs", "batch"),
    [
        ("o-lora-t5-large", "O-LoRA", 0.5, 1, 64),
        ("n-lora-t5-large", "N-LoRA", 0.4, 10, 48),
        ("ewc-lora-t5-large", "O-LoRA", 0.5, 1, 64),
        ("ewc-lora-t5-large", "N-LoRA", 0.4, 10, 48),
        ("ewc-lora-llama-3.2-1b", "O-LoRA", 0.5, 1, 64),
    ],
)
def test_orthogonal_sparse(name: str, method: str, lambda_1: float, epochs: int, batch: int) -> None:
    """O-LoRA's and N-LoRA's scripts of order 1."""
    run = runs(name)[method]
    assert run.options == {"lambda_1": lambda_1, "variant": "official"}
    lr = 1e-4 if "llama" in name else 1e-3
    check_training(run, {"lr": lr, "epochs": epochs, "batch_size": batch, "schedule": "constant"})
    assert run.training.of_task(0).lr == 1e-3
    (adapters,) = run.lora_configs()
    assert (adapters.r, adapters.lora_alpha, adapters.lora_dropout) == (8, 32, 0.1)


def test_every_file_checked() -> None:
    """Every published configuration can be read, and names its paper."""
    names = [name.partition("/")[2] for name in configuration.available() if name.startswith("published/")]
    checked = {
        *EWC_SETS,
        *SD_SETS,
        *PM_SETS,
        *TUNED,
        *CL_SETS,
        "codyra-cifar100",
        "codyra-imagenet-r",
        "keeplora-mtil",
        "keeplora-mtil-2",
    }
    assert checked | {"o-lora-t5-large", "n-lora-t5-large"} <= set(names)
    for name in names:
        about = configuration.load(configuration.find(f"published/{name}")).about
        assert "arXiv" in about, name
