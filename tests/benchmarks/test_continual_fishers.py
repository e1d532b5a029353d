# SPDX-License-Identifier: Apache-2.0
"""The page of structures shows what records say, and lambdas are those that development seeds chose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from continual_records import cost, run

from benchmarks.continual import configuration, fishers, recorded
from benchmarks.continual.codes import SUITES

CIL = "class_incremental"


def of(name: str, value: float, seed: int, loss: float = 8.0, numbers: int = 100) -> dict:
    """A run whose Fisher has so many bytes."""
    options = {"ewc_lambda": value, "fisher_mode": "sample", **fishers.OPTIONS[name]}
    method = name if seed < 100 else f"{name} {value:g}"
    made = run(method, seed, kind="EWCLoRA", loss=loss, options=options, suite="fishers-vision")
    for task in made["tasks"]:
        task["state_bytes"] = 4 * task["adapter_parameters"] + numbers
    return made


def found(factored: float = 8.0) -> list[dict]:
    """All structures and LoRA; the best lambda of the factored one is 60, of the others 600."""
    made = [run(seed=seed, suite="fishers-vision") for seed in range(5)]
    for name, best, loss, numbers in (
        ("dense", 600, 8.0, 4096),
        ("8-bit", 600, 8.0, 1088),
        ("factored", 60, factored, 128),
        ("Kronecker", 600, 8.0, 8192),
        ("uniform", 600, 12.0, 128),
    ):
        made += [of(name, best, seed, loss, numbers) for seed in range(5)]
        for value in (60, 600, 6000):
            made += [of(name, value, seed, 7.0 if value == best else 9.0) for seed in fishers.DEVELOPMENT]
    return made


def folder(path: Path, records: list[dict], codes: list[dict] | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, some in (("fishers-vision", recorded.runs(records)), ("costs", recorded.costs(records))):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    if codes is not None:
        (path / "codes.json").write_text(json.dumps(codes))
    return path


def rows(text: str, first: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith(f"| {first} |")]  # fmt: skip


def test_lambda_of_best_mean() -> None:
    """The lambda with the highest mean over both development seeds is chosen; other seeds do not count."""
    assert fishers.chosen(found()) == {**dict.fromkeys(fishers.OPTIONS, 600), "factored": 60}
    lonely = [of("dense", 6000, 100, loss=0.0)]  # best, but on one seed alone
    assert fishers.chosen([*found()[:5], *lonely]) == {}
    tied = [of("dense", value, seed) for value in (600, 60) for seed in fishers.DEVELOPMENT]
    assert fishers.chosen(tied) == {"dense": 60}


def test_rows_of_structures() -> None:
    """A row has the lambda, the means, the paired differences and the bytes of its reported runs."""
    records = found(factored=9.0)
    text = "\n".join(fishers.of_stream(records, {"dense": 1.25}))
    kept = fishers.reported(records)
    assert list(kept) == ["LoRA", *fishers.OPTIONS]
    last = [r["metrics"][CIL]["A_last_sample_weighted"] for r in kept["factored"].records]
    dense = [r["metrics"][CIL]["A_last_sample_weighted"] for r in kept["dense"].records]
    ((*_,),) = (row := rows(text, "factored"))[0:1]
    assert row[0][1:3] == ["60", "5"] and row[0][3].startswith(
        f"{np.mean(last):.1f} ± {np.std(last, ddof=1):.1f}"
    )
    assert row[0][6].startswith(f"{np.mean(np.subtract(last, dense)):+.1f}")
    assert row[0][8:] == ["0.1", "0.031", "–"] and rows(text, "dense")[0][-1] == "1.250"
    assert rows(text, "LoRA")[0][1] == "–"


def test_advice_follows() -> None:
    """The smallest structure that loses nothing is recommended; without one the dense Fisher is."""

    def advice(records: list[dict]) -> str:
        return "\n".join(fishers.recommendation({"fishers-vision": records}))

    assert "**factored** where memory counts" in advice(found()) and "Uniform is" not in advice(found())
    assert "LoRA, without a penalty, on vision: A_last minus dense" in advice(found())
    assert "at an end of those tried for factored:" in advice(found())
    assert "**8-bit** where memory counts" in advice(found(factored=12.0))
    worse = [r for r in found(factored=12.0) if r["method"] != "8-bit"] + [
        of("8-bit", 600, seed, 12.0) for seed in range(5)
    ]
    assert advice(worse).rstrip().endswith("**dense**.")
    fewer = [r for r in found() if (r["method"], r["seed"]) != ("uniform", 4)]
    assert "Nothing can be recommended yet." in advice(fewer) and "not made yet" in advice(fewer)


def test_page_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the measured part is written, and a changed record fails the check."""
    pytest.importorskip("matplotlib")
    code = {key: {"penalty": 1e-3, "dA": 1e-3, "dB": 1e-3} for key in ("once", "unbiased", "nearest")}
    code |= {"bias": 1e-5, "bias_error": 1e-5, "nearest_bias": -0.1}
    codes = [{"suite": "fishers-vision", "codes": {"square root": code, "fp8 e4m3": code}}]
    results = folder(tmp_path / "results", [*found(), cost("dense", 0.1, tasks=2)], codes)
    output = tmp_path / "page.md"
    command = ["--results", str(results), "--output", str(output)]
    output.write_text(f"before\n{fishers.BEGIN}\nold\n{fishers.END}\nafter\n")
    assert fishers.main(["--check", *command]) == 1
    assert fishers.main(command) == 0 and fishers.main(["--check", *command]) == 0
    text = output.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert (tmp_path / "images" / "fishers.png").is_file()
    assert rows(text, "vision")[0][1:5] == ["square root", "1.0e-03", "1.0e-03", "1.0e-03"]
    assert "one rounding" in text and text.count(" reached.") == 3
    folder(results, found()[1:], codes)
    assert fishers.main(["--check", *command]) == 1
    output.write_text("no marks")
    assert fishers.main(command) == 2
    assert "expected the lines" in capsys.readouterr().err


def test_committed_page() -> None:
    """The committed page is what the committed records give."""
    assert fishers.check(fishers.RESULTS, fishers.OUTPUT) is None


@pytest.mark.parametrize("name", SUITES)
def test_committed_lambdas(name: str) -> None:
    """Every record is of a planned run, and reported lambdas are those that the development seeds chose."""
    mine = [record for record in recorded.load(fishers.RESULTS) if record.get("suite") == name]
    planned = configuration.load(configuration.find(name)).runs
    assert {(r["method"], r["seed"], r["fingerprint"]) for r in mine} <= {
        (r.method, r.seed, r.fingerprint()) for r in planned
    }
    kept = fishers.reported(mine)
    assert {s: own.ewc_lambda for s, own in kept.items() if s != "LoRA"} == {
        s: value for s, value in fishers.chosen(mine).items() if s in kept
    }


def test_chosen_lambdas_written(tmp_path: Path) -> None:
    """The chosen lambdas, and nothing else, are written into the configurations."""
    for name in SUITES:
        (tmp_path / f"{name}.json").write_text(configuration.find(name).read_text())
    fishers.choose(folder(tmp_path / "results", found()), tmp_path)
    runs = {r.method: r for r in configuration.load(tmp_path / "fishers-vision.json").runs}
    assert {s: runs[s].options["ewc_lambda"] for s in fishers.OPTIONS} == fishers.chosen(found())
    before = {r.method: r for r in configuration.load(configuration.find("fishers-vision")).runs}
    untouched = [name for name in before if name not in fishers.OPTIONS]
    assert [runs[name] for name in untouched] == [before[name] for name in untouched]
