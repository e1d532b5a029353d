# SPDX-License-Identifier: Apache-2.0
"""Pictures of continual runs show the figures of the records, and so does the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from continual_records import changed, cost, ewc, run
from PIL import Image

from benchmarks.continual import configuration, page, pictures, recorded
from benchmarks.continual.groups import families, group
from benchmarks.continual.targets import lines_of_lambda

CIL, TIL = "class_incremental", "task_aware"


def found() -> list:
    made = [run(seed=seed) for seed in (0, 1)]
    for value, loss in ((1e4, 8.0), (1e5, 7.0)):
        made += [ewc(value, seed, loss=loss, aware=91.0) for seed in (0, 1)]
    return [*made, cost("LoRA"), cost("SD-LoRA", 0.05)]


def figure(kind: str, records: list, which: int = 0):
    return [one for one in pictures.planned(records) if one.kind == kind][which].draw()


def mean(protocol: str, method: str) -> list[list[float]]:
    """The mean matrix over seeds, from the records alone."""
    of = [r["matrices"][protocol] for r in found() if r.get("suite") and r["method"] == method]
    return [[float(np.mean([m[t][i] for m in of])) for i in range(t + 1)] for t in range(3)]


def lines(made, axis: int, gid: str) -> list:
    return [line for line in made.axes[axis].lines if line.get_gid() == gid]


# Pictures


@pytest.mark.parametrize(("which", "protocol"), [(0, CIL), (1, TIL)])
def test_heat_maps(which: int, protocol: str):
    """Heat maps hold the mean accuracies."""
    made = figure("matrices", found(), which)
    panels = {axis.get_gid(): axis for axis in made.axes if axis.get_gid()}
    assert list(panels) == ["LoRA", "EWC-LoRA 10000", "EWC-LoRA 100000"]
    for method, axis in panels.items():
        expected = mean(protocol, method)
        shown = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axis.texts}
        assert shown == {(t, i): f"{expected[t][i]:.1f}" for t in range(3) for i in range(t + 1)}
        (image,) = axis.images
        np.testing.assert_allclose(image.get_array()[2], expected[2])
        assert image.get_clim() == panels["LoRA"].images[0].get_clim()
    assert "Row: after this task" in made.get_supxlabel() and "abc" in made.get_supxlabel()


def test_accuracy_curves():
    """Curves show the means and standard deviations of both protocols, with names and last means."""
    made = figure("accuracy", found())
    for axis, protocol in ((0, CIL), (1, TIL)):
        (line,) = lines(made, axis, "LoRA")
        expected = [np.mean(row) for row in mean(protocol, "LoRA")]
        np.testing.assert_allclose(line.get_ydata(), expected)
        assert len(made.axes[axis].collections) == 3  # bands
        names = [text.get_text() for text in made.axes[axis].texts]
        assert names[0] == f"{expected[2]:.1f} LoRA" and len(names) == 3
    runs = [run(), run(seed=1, loss=30.0)]
    band = figure("accuracy", runs).axes[0].collections[0].get_paths()[0].vertices
    last = [np.mean(one["matrices"][CIL][2]) for one in runs]
    assert np.ptp(band[band[:, 0] == 3.0][:, 1]) == pytest.approx(2 * np.std(last, ddof=1))


def test_lambda_zero():
    """Lambda zero is LoRA, drawn to the left of a gap in the axis."""
    made = figure("over_lambda", found())
    axis = made.axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0", "1e4", "1e5"]
    places = list(axis.get_xticks())
    assert places == sorted(places) and places[1:] == [1e4, 1e5] and places[0] > 0.0
    (line,) = [one for one in lines(made, 0, f"{CIL} bwt") if one.get_marker() == "o"]  # without caps
    expected = [
        np.mean([r["metrics"][CIL]["bwt"] for r in found() if r.get("suite") and r["method"] == method])
        for method in ("LoRA", "EWC-LoRA 10000", "EWC-LoRA 100000")
    ]
    np.testing.assert_allclose(line.get_ydata(orig=False), expected)
    np.testing.assert_allclose(line.get_xdata(orig=False), places)


def test_cost_curves():
    """Costs are drawn over tasks."""
    made = figure("costs", found())
    record = cost("SD-LoRA", 0.05)
    scales = (1.0, 2.0**20, 2.0**20, 1e3)
    fields = ("ratio_to_first", "step_peak_bytes", "state_bytes", "adapter_parameters")
    for axis, (name, scale) in enumerate(zip(fields, scales, strict=True), 1):
        (line,) = lines(made, axis, "SD-LoRA")
        np.testing.assert_allclose(line.get_ydata(), np.array(record[name]) / scale)
        assert list(line.get_xdata()) == list(range(1, 11))


def test_many_methods_split():
    """Pictures of matrices hold twelve methods, pictures of lines seven beside LoRA, all of other colours."""
    many = [run(f"method {number}", kind="SDLoRA") for number in range(13)]
    planned = pictures.planned([run(), *many])
    assert [one.kind for one in planned] == ["matrices"] * 4 + ["accuracy"] * 2
    assert len({one.name for one in planned}) == 6 and planned[4].name == "continual-language-accuracy-1"
    for picture, others in ((planned[4], 7), (planned[5], 6)):
        shown = [one for one in picture.draw().axes[0].lines if one.get_gid()]
        assert shown[0].get_gid() == "LoRA" and len(shown) == 1 + others
        assert len({line.get_marker() for line in shown}) == 1 + others  # without colours as well
        assert len({line.get_color() for line in shown}) == 1 + others


def test_families():
    """Methods that pictures compare share a family; classes outside the library have one too."""
    kinds = ["EWCLoRA"] * 3 + ["InfLoRA"] * 2 + ["SDLoRA"] * 3 + ["somewhere:OnlineEWC", "somewhere:Own"]
    made = group([run(), *(run(f"method {number}", kind=kind) for number, kind in enumerate(kinds))])
    split = {name: [one.kind for one in members[1:]] for name, members in families(made, 7)}
    assert split == {
        "EWC-LoRA": ["EWCLoRA"] * 3, "directions and magnitudes": ["SDLoRA"] * 3,
        "other penalties": ["somewhere:OnlineEWC"], "projections, merging, blocks": ["InfLoRA"] * 2,
        "others": ["somewhere:Own"],
    }  # fmt: skip
    assert [name for name, _ in families(made, 10)] == [""]


def test_protocols_apart():
    """Rows with class means share a picture beside plain LoRA, and have no part in targets."""
    means = {"kind": "class-means"}
    with_means = [run("LoRA, means", protocol=means), run("EWC, means", kind="EWCLoRA", protocol=means)]
    with_means.append(run("CL", kind="CLLoRA", protocol={"kind": "cl-lora"}))
    others = [run(f"method {number}", kind="InfLoRA") for number in range(6)]
    for records in ([run(), *with_means, *others], [*with_means, *others, run()]):
        split = {name: [one.method for one in members] for name, members in families(group(records), 7)}
        assert split["class means"] == ["LoRA", "LoRA, means", "EWC, means", "CL"]
    split = {
        name: [one.method for one in members] for name, members in families(group(with_means + others), 7)
    }
    assert split["class means"] == ["LoRA, means", "EWC, means", "CL"]  # which plain LoRA none of them is
    assert all("LoRA, means" not in members for name, members in split.items() if name != "class means")
    assert not lines_of_lambda(group(with_means))
    assert lines_of_lambda(group([run(), *with_means, run("EWC", kind="EWCLoRA")]))


def test_single_lambda():
    """With a single lambda there is no picture over lambda."""
    assert "over_lambda" not in {one.kind for one in pictures.planned([run(), ewc(1e5)])}


def test_unequal_stream_lengths():
    """Streams of different lengths share a picture."""
    made = figure("accuracy", [run(), run("longer", kind="SDLoRA", tasks=5)])
    assert [len(lines(made, 1, name)[0].get_ydata()) for name in ("LoRA", "longer")] == [3, 5]
    assert list(made.axes[0].get_xticks()) == [1, 2, 3, 4, 5]


# The page


def folder(path: Path, records: list) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, of in (("language", recorded.runs(records)), ("costs", recorded.costs(records))):
        if of:
            (path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in of))
    return path


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of tables that start with a cell."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
            if line.startswith(f"| {first} |")]  # fmt: skip


def test_committed_page_current():
    """The committed page is what the committed records give."""
    assert page.OUTPUT.exists() == page.RESULTS.is_dir()
    if page.OUTPUT.exists():
        assert page.check(page.RESULTS, page.OUTPUT) is None
        shown = re.findall(r"\]\((images/[^)]+)\)", page.OUTPUT.read_text())
        assert shown and all((page.OUTPUT.parent / name).is_file() for name in shown)


def test_old_pictures_removed(tmp_path: Path):
    """The page is written with its pictures, and old pictures are removed."""
    results, output = (
        folder(tmp_path / "results", [*found()[:2], cost("LoRA")]),
        tmp_path / "docs" / "page.md",
    )
    old, other = (output.parent / "images" / name for name in ("continual-old.png", "roofline-a-cpu.png"))
    old.parent.mkdir(parents=True)
    old.touch()
    other.touch()
    command = ["--results", str(results), "--output", str(output)]
    assert page.main(["--check", *command]) == 1
    assert page.main(command) == 0 and page.main(["--check", *command]) == 0
    shown = re.findall(r"\]\(images/([^)]+)\)", output.read_text())
    assert sorted(shown) == sorted(path.name for path in old.parent.iterdir() if path != other)
    assert len(shown) == 4 and other.exists() and not old.exists()
    for name in shown:
        with Image.open(old.parent / name) as picture:
            assert picture.width == 1000


def test_changed_record_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A changed record fails the check."""
    results, output = folder(tmp_path / "results", found()), tmp_path / "page.md"
    output.write_text(page.generate(results))
    command = ["--check", "--results", str(results), "--output", str(output)]
    assert page.main(command) == 0
    folder(results, [*found(), run(seed=2)])
    assert page.main(command) == 1
    told = capsys.readouterr().err
    assert "is not what the records" in told and page.COMMAND in told and told.count("\n") == 1


def test_bad_records_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Records that cannot be used end the command with status 2."""
    command = ["--results", str(tmp_path / "results"), "--output", str(tmp_path / "page.md")]
    assert page.main(command) == 2
    file = folder(tmp_path / "results", [run()]) / "language.jsonl"
    for line in ("{", json.dumps({**run(seed=1), "surprise": 1})):
        file.write_text(f"{json.dumps(run())}\n{line}\n")
        assert page.main(command) == 2
    told = capsys.readouterr().err.splitlines()
    assert "no such folder" in told[0] and "line 2 is not a record" in told[1] and "surprise" in told[2]
    assert not (tmp_path / "page.md").exists()


def test_runs_and_targets(tmp_path: Path):
    """The page says what was run and whether targets are met."""
    text = page.generate(folder(tmp_path / "results", found()))
    verdicts = [row[-1] for row in rows_of_targets(text)]
    # The lower one of two lambdas is the middle one: it forgets 0.8 of what LoRA does.
    assert verdicts == ["FALLS SHORT", "PASS", "PASS", "FALLS SHORT", *["NOT MEASURED"] * 3]
    assert ["command", "`python -m fused_ewclora demo --suite language`"] in rows(text, "command")
    assert rows(text, "commit")[0] == ["commit", "abc"] and rows(text, "runs at a time")[0][1] == "2"
    assert rows(text, "versions")[0][1] == "torch 2.13.0, python 3.11.7"
    assert rows(text, "classes of the tasks")[0][1] == "2, 2, 2" and rows(text, "runs")[0][1] == "6"
    assert rows(text, "glosses")[0][1] == "100"
    options = ["EWC-LoRA 10000", "`EWCLoRA`", "ewc_lambda 10000, fisher_mode batch"]
    assert options in rows(text, "EWC-LoRA 10000")
    slow = ["SD-LoRA", "100 ms", "145 ms", "1.450", "190.73", "276.57", "0.95", "9.54", "46,080", "460,800"]
    assert slow in rows(text, "SD-LoRA")


def test_protocol_shown(tmp_path: Path):
    """The protocol of a method stands beside its options."""
    tuned = changed(
        run("ITA", kind="ITA", options={"alpha": 5.0}), "run.protocol", {"kind": "tuned-heads", "clip": True}
    )
    text = page.generate(folder(tmp_path / "results", [run(), tuned]))
    assert ["ITA", "`ITA`", "alpha 5; protocol: kind tuned-heads, clip yes"] in rows(text, "ITA")
    assert ["LoRA", "`LoRA`", "–"] in rows(text, "LoRA")


def rows_of_targets(text: str) -> list[list[str]]:
    section = text.split("## Targets")[1].split("##")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_configurations_listed(tmp_path: Path):
    """The page lists every configuration."""
    text = page.generate(folder(tmp_path / "results", found()))
    published = text.split("## Published configurations")[1]
    for name in configuration.available():
        about = configuration.load(configuration.find(name)).about
        assert f"- `{name}`: {about}" in (published if name.startswith("published/") else text)


def test_suite_description(tmp_path: Path):
    """A suite is described in the words of its configuration if that is what was run."""
    configured = configuration.load(configuration.find("language"))
    made = run()
    real = {**made, "run": {**made["run"], "problem": configured.runs[0].to_dict()["problem"]}}
    for record, count in ((real, 1), (made, 0)):
        text = page.generate(folder(tmp_path / "results", [record]))
        assert text.split("## Suite language")[1].split("##")[0].count(configured.about) == count


def test_equal_rows_told(tmp_path: Path):
    """Rows that agree are named, with the seeds and the options in which they differ."""

    def made(loss: float) -> list:
        plain = [run("SD-LoRA", seed, kind="SDLoRA") for seed in (0, 1)]
        losses = {0: 10.0, 1: loss}
        options = {"magnitudes": "shared"}
        return plain + [run("shared", s, kind="SDLoRA", options=options, loss=losses[s]) for s in losses]

    text = page.generate(folder(tmp_path / "results", made(10.5)))
    assert "- SD-LoRA and shared agree for seed 0 and are at most 1.0 points apart for seed 1" in text
    assert "`magnitudes` (its default against shared)." in text
    later = made(10.5)
    for record in later[2:]:  # from after there were settings that earlier records lack
        record["run"]["training"] |= {"epochs_by_task": [], "passes_drop_last": False}
        record["run"]["protocol"] = {}
    assert page.generate(folder(tmp_path / "later", later)) == text
    different = [one for one in made(10.5) if one["seed"] == 1]
    assert "Rows that agree" not in page.generate(folder(tmp_path / "results", different))


def test_no_records(tmp_path: Path):
    """Without records nothing is called measured."""
    (tmp_path / "results").mkdir()
    text = page.generate(tmp_path / "results")
    assert page.NOTHING in text and {row[-1] for row in rows_of_targets(text)} == {"NOT MEASURED"}
    assert page.NOTHING not in page.generate(folder(tmp_path / "results", found()))
    assert "## Suite" not in text and "![" not in text


def test_run_differences_listed(tmp_path: Path):
    """All differences between runs are told."""
    other = run("SD-LoRA", kind="SDLoRA", epochs=1, time="2026-03-01T00:00:00+00:00")
    text = page.generate(folder(tmp_path / "results", [run(), other]))
    assert rows(text, "training")[0][1] == "lr 0.001, epochs 5; lr 0.001, epochs 1"
    assert rows(text, "run")[0][1] == "2026-01-01 to 2026-03-01"
