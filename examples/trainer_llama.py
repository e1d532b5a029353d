# SPDX-License-Identifier: Apache-2.0
"""Two texts one after the other with a Llama and transformers' Trainer; EWC enters by a callback.

    python trainer_llama.py --quick
    python trainer_llama.py --model meta-llama/Llama-3.2-1B --texts law.txt code.txt

--quick makes a small model from a configuration; its texts are sequences that count up and down.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import fused_ewclora as fe

Samples = list[dict[str, Tensor]]


def counting(step: int) -> Samples:
    """Sequences of 12 tokens of 32, each the last plus `step`."""
    rows = [(torch.randint(32, ()) + step * torch.arange(12)) % 32 for _ in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def blocks(path: str, model: str, length: int) -> Samples:
    """A text, cut into blocks of `length` tokens."""
    tokens = AutoTokenizer.from_pretrained(model)(Path(path).read_text(), return_tensors="pt").input_ids[0]
    whole = tokens[: len(tokens) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in whole]


def small_model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: nn.Module, samples: Samples) -> float:
    model.eval()
    device = next(model.parameters()).device
    losses = [
        float(model(**{key: value[None].to(device) for key, value in sample.items()}).loss)
        for sample in samples
    ]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, random sequences")
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--texts", nargs=2, metavar="FILE")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    parser.add_argument("--ewc-lambda", type=float, default=10.0, help="of fisher_mode='sample'")
    parser.add_argument("--out", default="trainer-llama")
    args = parser.parse_args()
    if not args.quick and not args.texts:
        parser.error("give --quick, or --texts with two files")

    torch.manual_seed(0)
    if args.quick:
        model, tasks = small_model(), [counting(1), counting(-1)]
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model)
        tasks = [blocks(text, args.model, args.length) for text in args.texts]

    print(fe.inject(model, fe.LoRAConfig(r=8, target_modules=["k_proj", "v_proj", "down_proj"])))
    # A factored Fisher takes d_out + d_in numbers per layer; a dense one as much memory as the weight.
    ewc = fe.EWC(model, ewc_lambda=args.ewc_lambda, fisher_mode="sample", fisher="factored")

    for number, samples in enumerate(tasks):
        settings = TrainingArguments(
            output_dir=f"{args.out}/task{number}",
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            learning_rate=3e-2 if args.quick else 2e-4,
            logging_steps=8,
            save_strategy="no",
            report_to="none",
            disable_tqdm=args.quick,
        )
        # A new Trainer for each task: its optimizer must not know the moments of earlier adapters.
        callback = fe.integrations.transformers.EWCCallback(ewc)
        trainer = Trainer(model, settings, train_dataset=samples, callbacks=[callback])
        trainer.train()
        ewc.end_task(trainer.get_train_dataloader())  # the Fisher, with the model's own loss
        found = [f"{perplexity(model, seen[:32]):.2f}" for seen in tasks[: number + 1]]
        print(f"after text {number}: perplexities {', '.join(found)}")

    fe.save_pretrained(f"{args.out}/adapters", model, ewc)  # to learn a third text from here
    fe.eject(model)  # a plain model, with what it learned in its weights
    model.save_pretrained(f"{args.out}/merged")


if __name__ == "__main__":
    main()
