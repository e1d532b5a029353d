# SPDX-License-Identifier: Apache-2.0
"""predicted_choice.json: what is derived from predictions, and that measurements win over it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nvcc
import pytest
import torch
from budgets import LONG

from fused_ewclora.backends import measured_choice, predicted_choice
from fused_ewclora.backends.candidate import Call, Candidate, forget_choices
from fused_ewclora.backends.triton import cost_model
from fused_ewclora.ops import dispatch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
AGAIN = (
    "python -m fused_ewclora compile-report --targets --cubin build/nvcc/*.sm_90.cubin --write makes it anew"
)


def row(backend: str, seconds: float, rank: int = 16, **changed: Any) -> dict[str, Any]:
    given = {
        "op": "ewc_penalty", "algorithm": "", "precision": "high", "rank": rank, "backend": backend,
        "ratio": 2.0, "shape": f"fp32 F, r {rank}", "seconds": seconds, "kernels": ["ewc_penalty_kernel"],
    }  # fmt: skip
    return {**given, **changed}


def derived(*rows: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = predicted_choice.derived(
        {"arch": "sm_90", "machine": "H200", "rows": rows}
    )["entries"]
    return entries


def test_clearly_faster():
    """CUDA is preferred where it takes clearly less time, up to the largest rank that was compared."""
    rows = [row("triton", 1e-4, 10), row("cuda", 5e-5, 10), row("triton", 2e-4), row("cuda", 1e-4)]
    (entry,) = derived(*rows)
    assert entry == {
        "arch": "sm_90", "op": "ewc_penalty", "precision": "high", "rank": 16, "cuda_us": 100.0,
        "triton_us": 200.0, "shape": "fp32 F, r 16", "machine": "H200",
    }  # fmt: skip


@pytest.mark.parametrize(
    "rows",
    [
        [row("triton", 1.0), row("cuda", 0.85)],  # within what the model can tell
        [row("triton", 1.0), row("cuda", 0.5), row("triton", 1.0, 10), row("cuda", 0.9, 10)],
        [row("triton", 1.0, shape="bf16 F"), row("cuda", 0.5, shape="bf16 F")],
        [row("triton", 1.0)],
        [row("triton", 1.0, precision=None), row("cuda", 0.5, precision=None)],
    ],
)
def test_undecided(rows: list[dict[str, Any]]):
    """Nothing is preferred where it is not faster in every case, or was not compared."""
    assert derived(*rows) == []


def test_product_shares(tmp_path: Path):
    """Shares of BLAS are means over the products of an op, and survive the file."""
    product = {
        "op": "lora_linear",
        "algorithm": "prologue",
        "kernels": ["lora_linear_kernel"],
        "precision": None,
    }
    rows = [row("triton", 1.0, ratio=1.25, **product), row("triton", 1.0, ratio=2.0, **product)]
    table = {"arch": "sm_90", "machine": "H200", "rows": [*rows, row("triton", 1.0), row("cuda", 0.5)]}
    path = tmp_path / "table.json"
    predicted_choice.write(table, path)
    found = json.loads(path.read_text())
    assert found == predicted_choice.derived(table)
    assert found["products"] == {"sm_90": {"lora_linear": 0.65}} and len(found["entries"]) == 1
    predicted_choice.write({**table, "rows": rows}, path)
    assert json.loads(path.read_text())["entries"] == []


class FakeGPU:
    """A machine on which both backends serve every call, with tables of its own."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder = patch, folder
        self.cuda_reason: str | None = None
        backends = (("triton", lambda call: None), ("cuda", lambda call: self.cuda_reason))
        found = tuple(Candidate(name, name, supports, lambda *_: None) for name, supports in backends)
        patch.setattr(dispatch, "candidates", lambda op: found)
        self.measured([])
        self.predicted(derived(row("triton", 2e-4), row("cuda", 1e-4)))

    def _use(self, module: Any, name: str, content: dict[str, Any]) -> None:
        path = self.folder / name
        path.write_text(json.dumps(content))
        self.patch.setattr(module, "TABLE", path)
        forget_choices()

    def measured(self, entries: list[dict[str, Any]]) -> None:
        self._use(measured_choice, "measured.json", {"entries": entries})

    def predicted(self, entries: list[dict[str, Any]], products: dict[str, Any] | None = None) -> None:
        self._use(predicted_choice, "predicted.json", {"entries": entries, "products": products or {}})

    def choice(self, **changed: Any) -> str:
        call = Call("cuda", torch.float32, "sm_90", rank=10, precision="high", work=1 << 26)._replace(
            **changed
        )
        return dispatch.choose("ewc_penalty", "auto", call).backend


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeGPU]:
    with monkeypatch.context() as patch:
        yield FakeGPU(patch, tmp_path)
    forget_choices()


def test_prediction_decides(gpu: FakeGPU):
    """The prediction decides for its architecture, precision and ranks, where CUDA can serve the call."""
    assert gpu.choice() == "cuda"
    others = ({"arch": "sm_80"}, {"precision": "highest"}, {"rank": 17}, {"arch": None}, {"rank": None})
    assert {gpu.choice(**other) for other in others} == {"triton"}
    gpu.cuda_reason = "not built"
    forget_choices()
    assert gpu.choice() == "triton"


def test_explained_as_prediction(gpu: FakeGPU):
    """The reason says that it is a prediction, from what, and for what."""
    call = Call("cuda", torch.float32, "sm_90", rank=10, precision="high")
    reasons = {backend: reason for backend, _, reason in dispatch.explain("ewc_penalty", call, "auto")}
    assert reasons["cuda"] is None
    assert reasons["triton"] == (
        "'cuda' is predicted to be faster, 100 us against 200 us for fp32 F, r 16 (machine model of one "
        "H200; not measured)"
    )


def test_named_backend_obeyed(gpu: FakeGPU):
    """A backend that is asked for by name serves the call whatever is predicted."""
    call = Call("cuda", torch.float32, "sm_90", rank=10, precision="high")
    gpu.patch.setattr(dispatch, "_validated", lambda name, source: name)
    assert dispatch.choose("ewc_penalty", "triton", call).backend == "triton"


@pytest.mark.parametrize(("work", "expected"), [(0, "triton"), (1 << 20, "triton"), (1 << 26, "cuda")])
def test_measured_wins(gpu: FakeGPU, work: int, expected: str):
    """What was measured about an op on an architecture decides alone, also that CUDA was never faster."""
    gpu.measured([{"arch": "sm_90", "op": "ewc_penalty", "work": work, "record": "r"}])
    assert gpu.choice() == expected


def test_product_share_used(gpu: FakeGPU):
    """The cost model takes the predicted share of BLAS, and its own where there is none."""
    call = Call("cuda", torch.bfloat16, "sm_90", dispatch.LinearShape(8192, 1024, 1024, 16))
    before = cost_model.modelled("lora_linear", call)
    gpu.predicted([], {"sm_90": {"lora_linear": cost_model.RATES["sm_90"].efficiency / 2}})
    after = cost_model.modelled("lora_linear", call)
    assert after["full"] == pytest.approx(2 * before["full"]) and after["addmm"] == before["addmm"]


def shipped() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(predicted_choice.TABLE.read_text())
    return found


def test_shipped_table():
    """The table that ships has entries of known ops whose verdict follows from their times."""
    found = shipped()
    assert set(found) == {"entries", "products"}
    for entry in found["entries"]:
        assert entry["cuda_us"] <= predicted_choice.CLEARLY * entry["triton_us"], AGAIN
    assert all(0 < share <= 1 for shares in found["products"].values() for share in shares.values())


def printed(*arguments: str) -> Any:
    """What Python prints as JSON in a process of its own, because Triton reads TRITON_INTERPRET once."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=nvcc.ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


ONE_ROW = """
import json
from fused_ewclora.backends.triton.tools import targets
(target,) = (t for t in targets.TARGETS if t.shape == {!r})
print(json.dumps(targets.triton_row(target)))
"""


@needs_triton
def test_shipped_triton_time():
    """The kernel as it is now has about the predicted time that the table has."""
    for entry in shipped()["entries"][:1]:
        found = printed("-c", ONE_ROW.format(entry["shape"]))
        assert 1e6 * found["seconds"] == pytest.approx(entry["triton_us"], rel=0.1), AGAIN


@needs_triton
@pytest.mark.skipif(nvcc.toolkit() is None, reason="nvcc was not found")
@pytest.mark.skipif(not LONG, reason="compiling csrc/cuda for sm_90 takes minutes")
def test_same_verdicts():
    """Compiling everything again leads to the same choices."""
    cubins = [str(cubin) for cubin, _ in nvcc.all_compiled(("sm_90",))["sm_90"].values()]
    command = ("-m", "fused_ewclora", "compile-report", "--targets", "--json", "--cubin")
    made = predicted_choice.derived(printed(*command, *cubins))
    verdicts = [
        {(e["arch"], e["op"], e["precision"], e["rank"]) for e in table["entries"]}
        for table in (made, shipped())
    ]
    assert verdicts[0] == verdicts[1], AGAIN
    for op, share in shipped()["products"]["sm_90"].items():
        assert made["products"]["sm_90"][op] == pytest.approx(share, abs=0.05), AGAIN
