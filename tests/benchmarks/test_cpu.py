# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the CPU: what they count, which cases and peers there are, and that records are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import (
    collection,
    end_to_end,
    extras,
    growth,
    harness,
    machine,
    memory,
    records,
    registry,
    shapes,
    table,
    workload,
    workloads,
)
from benchmarks.case import OURS, Case, Provider, Target
from benchmarks.place import Place
from benchmarks.workload import Workload
from fused_ewclora.ops.dispatch import Call, explain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def few_rounds_without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings are not measured and peers not compiled: nothing here is about speed."""
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"copy": 1e9, "fp32": 1e9})
    monkeypatch.setattr(extras, "compiled", lambda method, backend="": method)
    yield


def small(op: str) -> Workload:
    return {
        "ewc_penalty": workloads.penalty("m", (6, 4), 2, 3),
        "structured_penalty": workloads.structured_penalty("m", (6, 4), 2, 3, "factored"),
        "l1_penalty": workloads.l1_penalty("m", (6, 4), 2, 3),
        "fisher_sums": workloads.fisher_sums("m", 3, 5, (6, 4)),
        "fisher_accumulate": workloads.fisher("m", 3, 5, (6, 4)),
        "lora_linear": workloads.linear("m", 7, (6, 4), 2),
        "lora_linear_slices": workloads.linear("m", 7, (6, 12), 2, slices=True),
        "merge": workloads.merge("m", (6, 4), 2, 3),
        "soft_threshold": workloads.threshold("m", 2, 5),
    }[op]


def measured(one: Workload) -> tuple[Case, list[dict]]:
    suite = next(s for s in bench.SUITES.values() if one.op in s.ops)
    case = suite.build(one, Place())
    return case, harness.measure(case, 0.0, {"copy": 1e9, "fp32": 1e9}, memory.CpuClock(2))


# Bytes and FLOPs


def product(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def test_linear_flops_bytes():
    """The linear counts every product and every pass over data."""
    m, d_in, d_out, r = 7, 6, 4, 2
    forward = product(m, d_in, d_out) + product(m, d_in, r) + product(m, r, d_out)  # x Wᵀ, z, z Bᵀ
    backward = product(m, d_out, d_in) + product(m, r, d_in)  # dy W, u A
    backward += product(m, d_out, r) + product(d_out, m, r) + product(r, m, d_in)  # u, dB, dA
    factors = r * (d_in + d_out)
    moved = (m * d_in + d_out * d_in + d_out + factors + m * d_out) + (
        m * d_out + m * d_in + d_out * d_in + factors + factors + m * d_in  # dy, x, W, A and B, dA and dB, dx
    )
    assert small("lora_linear").work == (forward + backward, 4 * moved)


def test_slice_flops():
    """Slices count two adapters of a third each."""
    m, d, r = 7, 6, 2  # W is [12, 6]; k and v have 4 rows each
    base = 2 * product(m, d, 12)
    low_rank = 2 * 3 * (product(m, d, r) + product(m, r, 4))
    assert small("lora_linear_slices").work.flops == base + low_rank


def test_penalty_flops():
    """The penalty reads F once and makes three products."""
    flops = 2 * (product(4, 3, 6) + product(4, 6, 3) + product(3, 4, 6))
    factors = 3 * 6 + 4 * 3
    assert small("ewc_penalty").work == (flops, 2 * (4 * 4 * 6 + 2 * 4 * factors))
    assert small("l1_penalty").work == (flops, 2 * 2 * 4 * factors)
    half = workloads.penalty("m", (6, 4), 2, 3, "bfloat16")
    assert small("ewc_penalty").work.bytes - half.work.bytes == 2 * 4 * 6 * 2


def test_structured_flops():
    """Structured penalties read their factors once, and multiply nothing as large as F but codes."""
    factors = 3 * 6 + 4 * 3
    small_products = 2 * (product(3, 4, 3) + product(3, 6, 3))  # M and dB, N and dA
    found = {k: workloads.structured_penalty("m", (6, 4), 2, 3, k).work for k in workload.STRUCTURES}
    assert found["8-bit"] == (small("ewc_penalty").work.flops, 2 * (4 * 48 + 8 * factors))
    assert found["factored"] == (2 * small_products, 2 * (4 * (4 + 6) + 8 * factors))
    of_factors = product(4, 4, 3) + product(6, 6, 3)
    assert found["kronecker"] == (2 * (small_products + of_factors), 2 * (4 * (16 + 36) + 8 * factors))
    sums = small("fisher_sums").work
    assert sums == (3 * product(4, 5, 6), 4 * (3 * 5 * 6 + 3 * 5 * 4) + 8 * (6 + 4))
    assert workloads.fisher_sums("m", 3, 1, (6, 4)).work.flops == 2 * 3 * (6 + 4)


def test_fisher_flops():
    """The Fisher is one product per sample."""
    assert small("fisher_accumulate").work == (
        3 * product(4, 5, 6),
        4 * (3 * 5 * 6 + 3 * 5 * 4) + 4 * 2 * 4 * 6,
    )


def test_step_flops():
    """A step counts linears twice, and attention."""
    step = workloads.step("tiny", 2, 3, 5, 4).work
    d, h, rows = 16, 64, 15
    linears = product(rows, d, 3 * d) + product(rows, d, d) + product(rows, d, h) + product(rows, h, d)
    attention = 3 * (product(5, d, 5) + product(5, 5, d))
    assert step.flops == 2 * (2 * linears + 3.5 * attention)
    assert step.bytes == 2 * 2 * 4 * (3 * d * d + d * d + 2 * d * h)


# Cases and peers


@pytest.mark.parametrize("preset", registry.PRESETS)
def test_preset_lists_once(preset: str):
    """A preset lists every case once."""
    cases = bench.planned(preset, list(bench.SUITES))
    keys = [(c.suite, records.key({**vars(c.workload)})) for c in cases]
    assert keys and len(set(keys)) == len(keys)
    assert {c.workload.op for c in cases} == set(registry.OPS)
    assert all(c.workload.work.flops > 0 and c.workload.work.bytes > 0 for c in cases if c.suite != "growth")


def test_registry_shapes():
    """The whole registry has the shapes that were promised."""
    linear = [w for w in registry.full() if w.op == "lora_linear"]
    assert {w.shape["rank"] for w in linear} == {4, 10, 16, 30, 64}
    vits = {(m, b * t) for m, t in (("ViT-B", 197), ("ViT-H", 257), ("ViT-g", 257)) for b in (1, 16, 64, 256)}
    assert vits <= {(str(w.shape["model"]).split()[0], w.shape["rows"]) for w in linear}
    assert {w.dtype for w in linear} == {"float32", "bfloat16"}
    assert shapes.GIANT.linears()["fc1"] == (1408, 6144)
    assert shapes.LLAMA.linears()["k"] == (2048, 512) and shapes.T5.linears()["wo"] == (4096, 1024)


@pytest.mark.parametrize("op", [op for op in registry.OPS if op not in end_to_end.OPS])
def test_peers_correct(op: str):
    """Cases have the peers of the registry and correct results."""
    case, found = measured(small(op))
    assert {p.name for p in case.providers if p.role == "peer"} == set(registry.PEERS[op])
    for record in found:
        full = {**record, "time": "now", "environment": machine.environment(), "targets": []}
        assert not list(records.violations(full))
        if "failed" in record:
            assert record["provider"] in extras.DISTRIBUTIONS and "Unavailable" in record["failed"]
        else:
            assert record["peak_bytes"] is not None


@pytest.mark.parametrize("kind", workload.STRUCTURES)
def test_structured_beside_dense(kind: str):
    """Every structure is right, and timed beside the dense F in one case."""
    case, found = measured(workloads.structured_penalty("m", (40, 6), 2, 3, kind))
    assert [p.name for p in case.providers] == [OURS, registry.DENSE, *registry.PEERS["structured_penalty"]]
    assert not [r for r in found if "failed" in r]
    ours = found[0]
    op = "ewc_penalty" if kind == "8-bit" else f"{kind}_penalty"
    served = {backend for backend, _, reason in explain(op, Call("cpu", torch.float32)) if reason is None}
    assert ours["backend"] in served and ours["algorithm"] == f"{kind} F"


def test_targets_match_cases():
    """Targets belong to their cases."""

    def targets(one: Workload) -> set[tuple[str | None, float]]:
        suite = next(s for s in bench.SUITES.values() if one.op in s.ops)
        return {(t.peer, t.limit) for t in suite.build(one, Place()).targets}

    published = workloads.penalty("ViT-B k,v", (6, 6), 12, 10)
    assert targets(published) == {("eager autograd", 1 / 4), ("torch.compile", 1 / 2.2)}
    assert ("frozen linear", 1.06) in targets(workloads.linear("ViT-B proj", 1025, (6, 6), 10))
    assert targets(small("lora_linear")) == {("best peer", 1.0)}
    assert targets(small("fisher_accumulate")) == {("sgemm of equal FLOPs", 1.2), (None, 0.0)}
    assert targets(workloads.fisher("m", 3, 1, (6, 4))) == set()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--preset", "huge"], "expected one of: cpu; quick; full"),
        (["--op", "conv"], "expected one of: lora_linear; lora_linear_slices; ewc_penalty"),
        (["--suite", "conv"], "expected one of: ewc_penalty"),
        (["--provider", "nobody"], "backpack; "),
        (["--shape", "ViT-X"], "ViT-B proj; "),
        (["--op", "lora_linear", "--suite", "ewc_penalty"], "no case of lora_linear in ewc_penalty"),
        (["--threads", "0"], "at least 1 of --threads"),
    ],
)
def test_unknown_name(arguments: list[str], told: str, capsys):
    """Unknown names are answered with the valid ones."""
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_unknown_preset():
    """An unknown preset of the registry is answered with the valid ones."""
    with pytest.raises(ValueError, match="cpu, quick, full"):
        registry.workloads(("lora_linear",), "huge")


def test_chosen_peers():
    """Choosing peers still keeps ours and the floors."""
    case = bench.SUITES["fisher_accumulate"].build(small("fisher_accumulate"), Place())
    kept = bench.chosen(case, ["einsum"])
    assert [p.name for p in kept.providers] == [OURS, "einsum", "sgemm of equal FLOPs"]
    penalty = bench.SUITES["ewc_penalty"].build(workloads.penalty("m", (4, 4), 12, 10), Place())
    assert [t.peer for t in bench.chosen(penalty, ["eager autograd"]).targets] == ["eager autograd"]
    assert bench.chosen(case, None) is case


# Peers from the package index


# Runs


def run(tmp_path: Path, cases: list[bench.Planned], *more: str) -> int:
    args = bench._parser().parse_args(["--out", str(tmp_path), "--min-rounds", "2", *more])
    args.seconds = 0.0
    return bench.run(cases, args)


def test_interrupted_run(tmp_path: Path, monkeypatch, capsys):
    """An interrupted run keeps what it has measured."""
    build = bench.SUITES["lora_linear"].build
    calls: list[Workload] = []

    def second_is_interrupted(one: Workload, place: Place) -> Case:
        calls.append(one)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return build(one, place)

    monkeypatch.setitem(
        bench.SUITES, "lora_linear", bench.SUITES["lora_linear"]._replace(build=second_is_interrupted)
    )
    cases = [bench.Planned("lora_linear", small("lora_linear"))] * 3
    assert run(tmp_path, cases, "--provider", "addmm") == bench.INTERRUPTED == 130
    found = records.read(tmp_path / "lora_linear.jsonl")
    assert [r["provider"] for r in found] == [OURS, "addmm", "frozen linear"]
    assert not [v for r in found for v in records.violations(r)]
    assert "interrupted in case 2 of 3: 3 records kept" in capsys.readouterr().out


def test_build_failure_recorded(tmp_path: Path, monkeypatch, capsys):
    """A case that cannot be built is recorded for every provider."""

    def build(one: Workload, place: Place) -> Case:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setitem(bench.SUITES, "growth", bench.SUITES["growth"]._replace(build=build))
    assert run(tmp_path, [bench.Planned("growth", small("ewc_penalty"))]) == 1
    found = records.read(tmp_path / "growth.jsonl")
    assert {r["provider"] for r in found} == {OURS, *registry.PEERS["ewc_penalty"]}
    assert all("can't allocate memory" in r["failed"] for r in found)
    assert not [v for r in found for v in records.violations(r)]


def test_missing_library_recorded(tmp_path: Path, monkeypatch):
    """A missing library is recorded and is no failure of ours."""
    monkeypatch.setattr(extras, "load", lambda name: (_ for _ in ()).throw(extras.Unavailable(name)))
    cases = [one for one in bench.planned("quick", ["end_to_end"]) if one.workload.op == "adapted_model"]
    assert run(tmp_path, cases) == 0
    found = records.read(tmp_path / "end_to_end.jsonl")
    assert [(r["provider"], r["failed"]) for r in found] == [
        (OURS, "Unavailable: timm"),
        ("peft", "Unavailable: timm"),
        (OURS, "Unavailable: torchvision"),
    ]


@pytest.mark.parametrize(("role", "status"), [("ours", 1), ("floor", 1), ("peer", 0)])
def test_peer_failures_forgiven(role: str, status: int):
    """Only failures of peers are forgiven."""
    assert bench._failed([{"role": role, "failed": "RuntimeError: no"}], []) == bool(status)


def test_three_verdicts():
    """Targets are judged with one of three verdicts."""
    rows = [{"ratio": 1.0, "met": True}, {"ratio": 2.0, "met": False}, {"ratio": float("nan"), "met": False}]
    assert [collection.verdict_of(row) for row in rows] == ["PASS", "FALL SHORT", "NOT MEASURED"]


def test_table_columns():
    """The table shows times, ratios, rates and verdicts."""
    fast, slow = torch.ones(4), torch.ones(4)
    providers = [Provider(OURS, lambda: [fast], "ours"), Provider("peer", lambda: [slow]),
                 Provider("gone", lambda: extras.load("opacus"))]  # fmt: skip
    target = Target("peer", 1e9, "not slower by much")
    case = Case("x", {"n": 4}, "float32", 8.0, 16.0, providers, lambda: [torch.ones(4).double()], 1e-6,
                targets=[target])  # fmt: skip
    found = harness.measure(case, 0.0, {"copy": 1e9, "fp32": 1e9}, memory.CpuClock(2))
    text = "\n".join(table.lines("title", found, harness.verdicts(case, found)))
    assert "p50 ms" in text and "1.00" in text and "PASS: not slower by much" in text


def test_quick_writes_nothing(monkeypatch: pytest.MonkeyPatch):
    """A quick run writes nothing unless told to."""
    outs: list[Path | None] = []
    monkeypatch.setattr(bench, "run", lambda cases, args: outs.append(args.out) or 0)
    for arguments in (["--preset", "quick"], [], ["--dry"], ["--preset", "quick", "--out", "there"]):
        assert bench.main(arguments) == 0
    assert outs == [None, ROOT / "benchmarks" / "results" / "cpu", None, Path("there")]


# Memory


def test_peak_per_call():
    """Peak memory is that of a single call."""

    def temporary() -> torch.Tensor:
        large = torch.empty(1 << 18)
        del large
        return torch.empty(1 << 8)

    result, peak = memory.peak_bytes(temporary)
    assert result.numel() == 1 << 8 and peak == 4 << 18
    in_place = torch.ones(1 << 18)
    assert memory.peak_bytes(lambda: in_place.add_(1.0))[1] <= 64  # the number


def test_no_sample_gradient():
    """Ours stores no gradient of a sample."""
    _, found = measured(workloads.fisher("m", 2, 5, (768, 768)))
    by_name = {r["provider"]: r for r in found}
    allowed = torch.get_num_threads() * 2 * 2**20
    assert by_name[OURS]["peak_bytes"] <= allowed < by_name["einsum"]["peak_bytes"]


def test_allocation_limit(monkeypatch: pytest.MonkeyPatch):
    """An allocation beyond the memory fails inside the limit."""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(memory, "free_bytes", lambda: 1 << 30)
    with memory.limited(), pytest.raises(RuntimeError, match="alloc"):
        torch.empty(1 << 30)
    torch.empty(1 << 28)  # the limit is gone


# Growth


@pytest.mark.parametrize("preset", registry.PRESETS)
def test_curve_one_field(preset: str):
    """Only one field varies along a curve."""
    curves: dict[str, list[Workload]] = {}
    for one in growth.plan(preset):
        curves.setdefault(json.dumps([one.op, one.shape[growth.SWEEP]]), []).append(one)
    assert {json.loads(c)[1] for c in curves} == {"tokens", "width", "rank", "adapters", "samples"}
    for key, points in curves.items():
        name = json.loads(key)[1]
        values = [p.shape[name] for p in points]
        assert len(values) > 1 and values == sorted(set(values))
        assert len({json.dumps({k: v for k, v in p.shape.items() if k != name}) for p in points}) == 1


def test_curve_providers():
    """The points of a curve are ours, the main peer and the floor."""
    for op, peer in growth.MAIN_PEER.items():
        one = next(p for p in growth.plan("quick") if p.op == op)
        case = growth.build(one, Place())
        assert case.shape == one.shape and not case.targets
        assert [p.name for p in case.providers if p.role == "peer"] == [peer]
        assert {p.role for p in case.providers} == {"ours", "peer", "floor"}
        assert case.flops == growth.expanded(one).work.flops
