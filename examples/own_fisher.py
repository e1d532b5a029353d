# SPDX-License-Identifier: Apache-2.0
"""A structure of the Fisher of one's own: one number per output row, the mean of the row's diagonal.

    python own_fisher.py --quick
    python own_fisher.py --width 1024 --rank 16

It keeps d_out numbers per adapter in place of d_out * d_in, and is compared with the dense Fisher: memory,
and the penalty of the same adapters.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.structures import Extent, MarginalSums, Parts, Weights


class Rowwise(fe.Structure):
    """F[i, j] is the mean of row i of the dense F. Row sums add over samples and tasks, exactly."""

    name = "rowwise"  # in checkpoints
    by_rows = frozenset({"rows"})  # its first dimension is that of lora_B, which FSDP shards

    def sum_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """What a Fisher pass gathers: the operation makes row and column sums together."""
        return {"rows": (extent.count,), "columns": (extent.columns,)}

    def kept_shapes(self, extent: Extent) -> dict[str, tuple[int, ...]]:
        """What stays after the task."""
        return {"rows": (extent.count,)}

    def sums(self, parts: Mapping[str, Tensor]) -> MarginalSums:
        """How the pass adds to it, in the backward pass, without the gradient of any sample."""
        return MarginalSums(parts["rows"], parts["columns"])

    def joined(
        self, old: Mapping[str, Tensor] | None, task: Mapping[str, Tensor], weights: Weights, extent: Extent
    ) -> tuple[Parts, float]:
        """The Fisher of all tasks so far, and the relative error of joining them: none."""
        return {"rows": weights.joined(None if old is None else old["rows"], task["rows"])}, 0.0

    def value(self, parts: Mapping[str, Tensor], columns: int) -> fe.FactoredFisher:
        """What the penalty gets: rows c^T / sum(c) with equal c."""
        rows = parts["rows"]
        return fe.FactoredFisher(rows, torch.ones(columns, dtype=rows.dtype, device=rows.device))

    def of_dense(self, fisher: Tensor, extent: Extent) -> Parts:
        """For `ewc.convert_fisher_`, from a dense one."""
        return {"rows": fisher.sum(1)}


def bytes_of(ewc: fe.EWC) -> int:
    return sum(tensor.nbytes for tensor in ewc.state_dict()["tensors"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    args = parser.parse_args()
    width = 32 if args.quick else args.width

    torch.manual_seed(0)
    sizes = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)]
    plain = nn.Sequential(*sizes)
    loader = [(torch.randn(32, width), torch.randint(0, 10, (32,))) for _ in range(8)]
    fe.inject(plain, fe.LoRAConfig(r=args.rank, target_modules=["0", "2"]))

    found = {}
    for fisher in ("dense", Rowwise()):
        model = copy.deepcopy(plain)
        ewc = fe.EWC(model, ewc_lambda=100.0, fisher=fisher)
        ewc.end_task(loader, F.cross_entropy, progress=False)
        torch.manual_seed(1)  # the same adapters for both
        for layer in fe.adapters(model).values():
            for _, parameter in layer.named_lora_parameters():
                nn.init.normal_(parameter, std=0.1)
        penalty = ewc.penalty()
        torch.autograd.backward(penalty)
        found[ewc.structure.name] = ewc
        print(f"{ewc.structure.name:8} {bytes_of(ewc):10,} bytes   penalty {penalty.item():.4e}")

    for name, dense in found["dense"].fishers.items():
        assert isinstance(dense, Tensor)
        rowwise = found["rowwise"].fishers[name]
        assert isinstance(rowwise, fe.FactoredFisher)
        expected = dense.mean(1, keepdim=True).expand_as(dense)
        torch.testing.assert_close(rowwise.dense(), expected, rtol=1e-4, atol=0.0)
    errors = found["dense"].convert_fisher_(Rowwise())  # what a Fisher that exists loses
    for name, error in errors.items():
        print(f"layer {name}: its dense Fisher differs by {error:.1%} in norm")


if __name__ == "__main__":
    main()
