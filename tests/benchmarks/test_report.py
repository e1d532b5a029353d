# SPDX-License-Identifier: Apache-2.0
"""docs/benchmarks.md is what the records say, and says what they do not hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from benchmark_records import newer, older, record, results

from benchmarks import collection, records, report
from benchmarks.case import OURS


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of tables that start with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_records_follow_schema():
    """Made records follow the schema."""
    assert [v for one in [*older(), *newer()] for v in records.violations(one)] == []


def test_committed_text_current():
    """The committed text is what the committed records give."""
    assert report.check(report.RESULTS, report.OUTPUT) is None


def test_committed_pictures_exist():
    """The pictures of the committed text are there."""
    words = report.OUTPUT.read_text().split("](")[1:]
    pictures = [word.split(")")[0] for word in words]
    assert pictures and all((report.OUTPUT.parent / name).is_file() for name in pictures)


def test_changed_record_fails(tmp_path: Path, capsys):
    """A changed record fails the check."""
    copy = tmp_path / "results"
    shutil.copytree(report.RESULTS, copy)
    text = tmp_path / "benchmarks.md"
    text.write_text(report.generate(copy))
    command = ["--check", "--results", str(copy), "--output", str(text)]
    assert report.main(command) == 0
    file = copy / "cpu" / "ewc_penalty.jsonl"
    lines = file.read_text().splitlines()
    last = next(n for n in reversed(range(len(lines))) if json.loads(lines[n])["provider"] == OURS)
    changed = json.loads(lines[last])
    changed["seconds"] = {name: 2 * value for name, value in changed["seconds"].items()}
    lines[last] = json.dumps(changed)
    file.write_text("\n".join(lines) + "\n")
    assert report.main(command) == 1
    told = capsys.readouterr().err
    assert "is not what the records" in told and told.count("\n") == 1
    text.unlink()
    assert report.main(command) == 1


def test_figures_of_a_case(tmp_path: Path):
    text = report.generate(results(tmp_path, cpu_penalty=older()))
    heads = rows(text, "case")[0]
    assert heads == ["case", "ours", "eager", "*product*", "GB/s", "GFLOP/s", "of the ceiling", "error"]
    expected = ["50.0 ms [45.0 ms, 60.0 ms]", "4.00", "0.50", "2.00", "80.0", "40 %", "1.0e-07"]
    assert rows(text, "m8")[0] == ["m8", *expected]
    assert ["m8", "2 x faster than eager", "0.250", "0.500", "PASS"] in rows(text, "m8")
    assert ["m16", "at most the product", "2.000", "1.000", "FALL SHORT"] in rows(text, "m16")


def test_summary_row(tmp_path: Path):
    """The summary of a machine has the median and the range over cases, and counts targets."""
    made = older()
    next(one for one in made if one["provider"] == "eager" and one["shape"]["width"] == 16)["seconds"] = {
        "p20": 0.09, "p50": 0.1, "p80": 0.12,
    }  # fmt: skip
    text = report.generate(results(tmp_path, cpu_penalty=made))
    (row,) = rows(text, "`penalty`")
    assert row == ["`penalty`", "2", "3.00 (2.00 to 4.00)", "2.00 (2.00 to 2.00)", "40 %", "2 of 4"]
    assert text.index("| `penalty` |") < text.index("| m8 |"), "the summary comes first"


def test_folds_closed():
    """Whatever is folded is opened and closed once, and not within another fold."""
    depth = 0
    for line in report.generate().splitlines():
        depth += line.startswith("<details") - line.startswith("</details>")
        assert depth in (0, 1), line
    assert depth == 0


def test_older_records_dash(tmp_path: Path):
    """What older records do not say is shown as a dash."""
    text = report.generate(results(tmp_path, cpu_penalty=older()))
    assert rows(text, "copy") == [["copy", "– (these records have none)", "–"]]
    assert rows(text, "fp32 product")[0][1] == "200 GFLOP/s"
    assert 'Older records: their ceiling is the fp32 product alone, and so is "of the ceiling".' in text


def test_no_gpu_records(tmp_path: Path):
    """Without records of a GPU, nothing is called measured."""
    text = report.generate(results(tmp_path, cpu_penalty=older()))
    section = text.split("## GPUs")[1]
    assert "Nothing is measured" in section and "prediction" in section and "|" not in section


def test_predictions_column(tmp_path: Path):
    """Predictions are in a column of their own."""
    text = report.generate(results(tmp_path, cpu_penalty=older(), gpu_penalty=newer()))
    section = text.split("## GPUs")[1]
    assert "## a GPU" in section and "Nothing is measured" not in section
    assert rows(section, "case")[0][-1] == "predicted"
    assert rows(section, "m8")[0][-1] == "40.0 ms" and rows(section, "m8")[0][1].startswith("50.0 ms")
    assert "predicted" not in text.split("## GPUs")[0]
    assert {row[-1] for row in rows(section, "lora_linear")} == {"NOT MEASURED"}


def test_failed_peer_reasons(tmp_path: Path):
    """Failed peers have their reasons."""
    text = report.generate(results(tmp_path, gpu_penalty=newer()))
    reason = "RuntimeError: &lt;shape> a&#124;b"
    assert rows(text, "2 of 2 cases") == [["2 of 2 cases", "broken", reason]]
    once = [one for one in newer() if one["provider"] != "broken" or one["shape"]["width"] == 8]
    (tmp_path / "once").mkdir()
    text = report.generate(results(tmp_path / "once", gpu_penalty=once))
    assert rows(text, "m8")[-1] == ["m8", "broken", reason]
    assert rows(text, "m8")[0][rows(text, "case")[0].index("broken")] == "failed"


def test_breakdown_shares(tmp_path: Path):
    """A breakdown is given in shares."""
    found = newer(breakdown={"penalty": 0.75, "aten::mm": 0.25})
    text = report.generate(results(tmp_path, gpu_penalty=found))
    assert ["m8", OURS, "75 % penalty, 25 % aten::mm"] in rows(text, "m8")
    found = newer(breakdown={"penalty": 0.98, "aten::mm": 0.006, "aten::add": 0.009, "other": 0.005})
    (tmp_path / "small").mkdir()
    text = report.generate(results(tmp_path / "small", gpu_penalty=found))
    assert ["m8", OURS, "98 % penalty, 2 % other"] in rows(text, "m8")


def test_curves_have_their_exponents(tmp_path: Path):
    found = [
        record(OURS, 1e-3 * n**2, shape={"sweep": "width", "width": n}, flops=1e9 * n**2,
               fraction_of_sgemm=5.0) for n in (1, 2, 4, 8)
    ]  # fmt: skip
    text = report.generate(results(tmp_path, cpu_scaling=found))
    (row,) = rows(text, "penalty")
    assert row[:6] == ["penalty", "width (float32)", OURS, "2.00 ± 0.00", "2.00 ± 0.00", "flops"]
    assert "### `penalty`" not in text


def test_old_pictures_removed(tmp_path: Path):
    """The report is written with its pictures, and old ones are removed."""
    pytest.importorskip("matplotlib")
    folder, output = results(tmp_path / "results", cpu_penalty=older()), tmp_path / "docs" / "benchmarks.md"
    (tmp_path / "docs" / "images").mkdir(parents=True)
    for name in ("roofline-gone.png", "logo.png"):
        (tmp_path / "docs" / "images" / name).touch()
    assert report.main(["--results", str(folder), "--output", str(output)]) == 0
    assert report.check(folder, output) is None
    names = sorted(path.name for path in (tmp_path / "docs" / "images").iterdir())
    assert names == ["logo.png", "roofline-a-cpu-2-threads.png", "speedup-a-cpu-2-threads-penalty.png"]


def test_unusable_exit_status(tmp_path: Path, capsys):
    """Records that cannot be used end with status 2."""
    folder = results(tmp_path / "results", cpu_penalty=older())
    (folder / "cpu" / "penalty.jsonl").write_text('{"op": "pen')
    assert report.main(["--check", "--results", str(folder)]) == 2
    assert "truncated" in capsys.readouterr().err
    assert report.main(["--check", "--results", str(tmp_path / "none")]) == 2
    with pytest.raises(collection.Unusable):
        report.generate(folder)


def test_continual_records_excluded(tmp_path: Path):
    """Records of continual runs are left to their own page."""
    alone = report.generate(results(tmp_path, cpu_penalty=older()))
    assert report.generate(results(tmp_path, continual_language=[{"suite": "language"}])) == alone
