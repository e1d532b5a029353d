# SPDX-License-Identifier: Apache-2.0
"""A training step with EWC of a large Vision Transformer under PyTorch's profiler.

    python profile_vit.py --quick
    python profile_vit.py --model vit_large_patch16_224 --batch-size 8

Writes a Chrome trace and prints how long each fused operation takes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function, schedule

import fused_ewclora as fe

QUICK: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
HOW_TO_READ = """
How to read it. A row is a fused operation with the backend and the algorithm that ran. lora_linear is called
once per adapted layer, and its time includes the product with the frozen weight, which the plain model
computes too; ewc_penalty is called once for all layers, and is what EWC adds to a step of LoRA. Shares are of
the whole step, so what they leave is the rest of the model. If an algorithm is not the one that you expect,
print(fe.explain(model)) says why it was chosen.

Open {trace} at https://ui.perfetto.dev or chrome://tracing. Inside of the ranges forward, backward and
optimizer, ranges named fused_ewclora.* show the shapes of every call; on a GPU their kernels are in the rows
of the streams below. Gaps between kernels mean that the host is the limit: use torch.compile.
"""


def table(profiled: profile, steps: int, on_gpu: bool) -> str:
    """Calls and times of each fused operation, from the ranges that fe.profiling.enable names."""
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)  # in microseconds
    total = 0.0
    for event in profiled.key_averages():
        spent = event.device_time_total if on_gpu else event.cpu_time_total
        if event.key.startswith("fused_ewclora."):  # fused_ewclora.<op>(<shapes>) <backend>: <algorithm>
            operation, _, algorithm = event.key.removeprefix("fused_ewclora.").rpartition(") ")
            name = f"{operation.partition('(')[0]}  {algorithm}"
            calls[name] += event.count
            times[name] += spent
        elif event.key in ("forward", "backward", "optimizer"):
            total += spent
    rows = [f"{'operation':60} {'calls/step':>10} {'ms/step':>9} {'share':>6}"]
    for name, spent in sorted(times.items(), key=lambda item: -item[1]):
        rows.append(
            f"{name[:60]:60} {calls[name] // steps:10} {spent / steps / 1000:9.3f} {spent / total:6.1%}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--model", default="vit_large_patch16_224", help="weights are random")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--trace", default="trace.json")
    args = parser.parse_args()

    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    # Any, for what timm's models have and an nn.Module has not.
    model: Any = timm.create_model(args.model, num_classes=10, **(QUICK if args.quick else {})).to(device)
    size = 32 if args.quick else model.pretrained_cfg["input_size"][-1]
    fe.inject(model, fe.LoRAConfig(r=16, target_modules=["qkv"], slices=("k", "v")))
    model.get_classifier().requires_grad_(True)
    ewc = fe.EWC(model, ewc_lambda=100.0, fisher_mode="sample")
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    labels = torch.randint(0, 10, (args.batch_size,), device=device)
    # After a first task there is a Fisher, and the penalty is not simply 0.
    ewc.end_task([(images, labels)], F.cross_entropy, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    # The first two steps are not recorded: they allocate memory, and compile kernels on a GPU.
    plan = schedule(wait=1, warmup=1, active=args.steps, repeat=1)
    model.train()
    with fe.profiling.enable(), profile(activities=activities, schedule=plan) as profiled:
        for _ in range(2 + args.steps):
            with record_function("forward"):
                loss = F.cross_entropy(model(images), labels) + ewc.penalty()
            with record_function("backward"):
                optimizer.zero_grad()
                torch.autograd.backward(loss)
            with record_function("optimizer"):
                optimizer.step()
            if on_gpu:
                torch.cuda.synchronize()
            profiled.step()
    profiled.export_chrome_trace(args.trace)
    name = f"a small {args.model}" if args.quick else args.model
    print(f"{name}, {args.batch_size} images of {size} x {size} on {device}, {args.steps} steps\n")
    print(table(profiled, args.steps, on_gpu))
    print(HOW_TO_READ.format(trace=args.trace))


if __name__ == "__main__":
    main()
