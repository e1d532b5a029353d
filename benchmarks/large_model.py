# SPDX-License-Identifier: Apache-2.0
"""Two tasks of EWC on a language model in little memory: `fused-ewclora bench large`.

A model with the shapes of LLaMA-3.2-1B, random weights in bf16 and adapters on all of its linear layers takes
a training step, a Fisher pass with the merge, a second step with the penalty and a second pass, for every
structure of the Fisher in a process of its own whose memory is limited. What does not fit fails, and the
record says where. Records are appended to results/large_model/large_model.jsonl. Exit status: 1 when one of
the structures that are expected to fit does not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora._arguments import PROG, Parser, at_least
from fused_ewclora.demo.environment import timestamp

from . import extras, machine, records

SHAPES = {
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
GATHERED_BYTES = 1 << 30  # sums of a task at a time, where they can be packed
STRUCTURES: dict[str, dict[str, Any]] = {
    "factored": {"fisher": "factored"},
    "8bit": {"fisher_dtype": "8bit"},
    "dense": {"fisher": "dense"},
}
FITS = ("factored", "8bit")  # in the memory that is the default
LIMIT_BYTES = 12 << 30
RESULT = "result: "
SCHEMA = json.loads((Path(__file__).parent / "large_model_schema.json").read_text())


def model_of(name: str) -> nn.Module:
    """A causal language model with these shapes and random bf16 weights."""
    extras.prepare_torchvision()
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise extras.Unavailable(f"transformers is not installed; {extras.INSTALL}") from error
    config = transformers.LlamaConfig(**SHAPES[name], dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    model.tie_weights()
    # What is computed from the configuration is no parameter, and was empty.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model


def batches(model: nn.Module, samples: int, tokens: int) -> list[dict[str, Tensor]]:
    """Random token sequences one by one, with themselves as labels."""
    generator = torch.Generator().manual_seed(1)
    size = model.config.vocab_size
    rows = torch.randint(0, size, (samples, 1, tokens), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def next_token_loss(output: Any, labels: Tensor) -> Tensor:
    """The mean over samples of the sum of -log p of their next tokens."""
    logits = output.logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / len(labels)


class Steps:
    """The parts of a run, and what they took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.current = "model"

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a part; the name stays when it fails."""
        self.current, begin = name, time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin


def run(name: str, structure: str, samples: int, tokens: int, rank: int) -> dict[str, Any]:
    """Two tasks; the record without the place where it was measured."""
    steps, options = Steps(), STRUCTURES[structure]
    record: dict[str, Any] = {"model": name, "structure": structure, "samples": samples, "tokens": tokens}
    record["rank"] = rank
    try:
        _tasks(name, structure, options, samples, tokens, rank, steps, record)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        record["failed"] = f"out of memory in: {steps.current}"
    record["seconds"] = steps.seconds
    record["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return record


def _tasks(
    name: str,
    structure: str,
    options: dict[str, Any],
    samples: int,
    tokens: int,
    rank: int,
    steps: Steps,
    record: dict[str, Any],
) -> None:
    with steps.step("model"):
        model = model_of(name)
        fe.inject(model, fe.LoRAConfig(r=rank, target_modules="all-linear"))
        ewc = fe.EWC(model, ewc_lambda=1.0, **options)
    layers = fe.adapters(model)
    record["adapters"] = len(layers)
    record["weights"] = sum(layer.in_features * layer.out_features for layer in layers.values())
    data = batches(model, samples, tokens)
    more = {"max_bytes": GATHERED_BYTES} if structure == "8bit" else {}
    for task in ("first", "second"):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for number in (1, 2):  # B is 0 before the first
            with steps.step(f"{task} task, step {number}"):
                output = model(input_ids=data[0]["input_ids"])
                loss = next_token_loss(output, data[0]["labels"]) + ewc.penalty()
                loss.backward()
                del output
                optimizer.step()
                optimizer.zero_grad()
        record[f"penalty of the {task} task"] = ewc.penalty().item()
        with steps.step(f"{task} task, Fisher pass and merge"):
            ewc.end_task(data, next_token_loss, forward=_forward, progress=False, **more)
    record["fisher_bytes"] = sum(t.nbytes for t in ewc.state_dict()["tensors"].values())


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
    return model(input_ids=batch["input_ids"]), batch["labels"]


def child(arguments: argparse.Namespace) -> None:
    """Runs one structure under the limit, and prints its record."""
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit, arguments.limit))
    record = run(arguments.model, arguments.child, arguments.samples, arguments.tokens, arguments.rank)
    print(RESULT + json.dumps({**record, "limit_bytes": arguments.limit}))


def measured(structure: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of a structure from a process of its own."""
    command = [sys.executable, "-m", "fused_ewclora.benchmarks.large_model", "--child", structure]
    command += [
        f"--{name}={getattr(arguments, name)}" for name in ("model", "samples", "tokens", "rank", "limit")
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if not found:
        raise RuntimeError(f"{structure}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(found[0].removeprefix(RESULT))
    return record


def violations(record: Any) -> Iterator[str]:
    """How a record violates large_model_schema.json, in words."""
    yield from records.violations(record, SCHEMA)


def _described(record: dict[str, Any]) -> str:
    outcome = record.get("failed", "fits")
    total = sum(record["seconds"].values())
    return f"{record['structure']:9} {outcome}; peak {record['peak_bytes'] / 2**30:.2f} GiB, {total:.0f} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", choices=tuple(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--structures", nargs="+", choices=tuple(STRUCTURES), default=list(STRUCTURES))
    parser.add_argument("--samples", type=at_least(1), default=2, help="of each task")
    parser.add_argument("--tokens", type=at_least(1), default=32, help="of a sample")
    parser.add_argument("--rank", type=at_least(1), default=8)
    parser.add_argument(
        "--limit", type=at_least(1), default=LIMIT_BYTES, help="bytes that the process may allocate"
    )
    parser.add_argument("--out", type=Path, default=machine.RESULTS / "large_model")
    parser.add_argument("--child", choices=tuple(STRUCTURES), help=argparse.SUPPRESS)


def execute(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    measure: Callable[..., dict[str, Any]] = measured,
) -> int:
    """Runs the structures one after another; see the module."""
    if arguments.child:
        child(arguments)
        return 0
    environment, missed = {**machine.environment("cpu"), **extras.versions()}, False
    arguments.out.mkdir(parents=True, exist_ok=True)
    for structure in arguments.structures:
        record = measure(structure, arguments)
        whole = {**record, "environment": environment, "time": timestamp()}
        if wrong := next(violations(whole), None):
            raise RuntimeError(f"{structure}: {wrong}")
        print(_described(record), flush=True)
        missed = missed or (structure in FITS and "failed" in record)
        with (arguments.out / "large_model.jsonl").open("a") as file:
            file.write(json.dumps(whole) + "\n")
    return int(missed)


def main(argv: Sequence[str] | None = None, measure: Callable[..., dict[str, Any]] = measured) -> int:
    """Entry point."""
    parser = Parser(prog=f"{PROG} bench large", description=__doc__)
    add_arguments(parser)
    return execute(parser, parser.parse_args(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
