# SPDX-License-Identifier: Apache-2.0
"""An existing PeftModel: its LoRA layers on the fused operation, EWC over them, and a plain model at the end.

    python peft_accelerated.py --quick
    python peft_accelerated.py --model bert-base-uncased --target query value

Batches are random in both cases; put your own in `batches`.
"""

from __future__ import annotations

import argparse
import time

import peft
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

import fused_ewclora as fe

Batch = dict[str, Tensor]


def batches(task: int, words: int, length: int, device: torch.device) -> list[Batch]:
    """Class 0 or 1 (task 0), 2 or 3 (task 1), by which of two tokens is the first."""
    found = []
    for _ in range(8):
        labels = 2 * task + torch.randint(0, 2, (16,))
        tokens = torch.randint(10, words, (16, length))
        tokens[:, 0] = 1 + labels
        found.append({"input_ids": tokens.to(device), "labels": labels.to(device)})
    return found


def seconds_per_step(model: peft.PeftModel, batch: Batch, steps: int) -> float:
    """Of forward and backward passes, after one that is not counted."""
    model(**batch).loss.backward()
    start = time.perf_counter()
    for _ in range(steps):
        model(**batch).loss.backward()
    if batch["labels"].is_cuda:
        torch.cuda.synchronize()
    model.zero_grad()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--model", default="bert-base-uncased")
    parser.add_argument("--target", nargs="+", default=["query", "value"])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--ewc-lambda", type=float, default=100.0, help="of fisher_mode='sample'")
    parser.add_argument("--out", default="peft-accelerated")
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.quick:
        plain = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        plain.num_labels = 4
        base: PreTrainedModel = BertForSequenceClassification(plain)
    else:
        plain = AutoConfig.from_pretrained(args.model, num_labels=4)
        base = AutoModelForSequenceClassification.from_pretrained(args.model, config=plain)
    length = 8 if args.quick else args.length

    # Everything up to here is as it was.
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=args.target)
    model = peft.get_peft_model(base, config).to("cuda" if torch.cuda.is_available() else "cpu")
    tasks = [batches(task, plain.vocab_size, length, model.device) for task in range(2)]
    before = seconds_per_step(model, tasks[0][0], 3)
    print(fe.integrations.peft.accelerate_(model))  # what runs on the fused operation, what does not and why
    print(f"step: {before:.4f} s before, {seconds_per_step(model, tasks[0][0], 3):.4f} s after")
    ewc = fe.integrations.peft.attach_ewc(model, ewc_lambda=args.ewc_lambda, fisher_mode="sample")

    for number, task in enumerate(tasks):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-3 if args.quick else 2e-4)  # a new one for each task
        model.train()
        losses = []
        for batch in 3 * task:
            optimizer.zero_grad()
            loss = model(**batch).loss + ewc.penalty()  # the penalty is 0 during the first task
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"task {number}: loss {losses[-1]:.3f}, of which {ewc.penalty().item():.2e} are the penalty")
        ewc.end_task(task)  # the Fisher; scaling B A into the base weights; A and B anew

    fe.save_pretrained(args.out, model, ewc)  # PEFT's own files do not have the changed base weights
    fe.integrations.peft.restore_(model)  # PEFT's own layers again
    merged = model.merge_and_unload()  # a plain model of transformers
    assert isinstance(merged, PreTrainedModel)
    merged.save_pretrained(f"{args.out}/merged")


if __name__ == "__main__":
    main()
