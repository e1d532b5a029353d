# SPDX-License-Identifier: Apache-2.0
"""Pictures and fits of records: points, roofs, bars and exponents are where the figures are."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import collection, headline, plot, records, scaling
from benchmarks.case import OURS

CEILINGS = {"copy": 1e10, "fp32": 2e11}
ENVIRONMENT = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "python": "3.11.7", "commit": "abc"}


def record(
    provider: str, seconds: float, shape: dict, flops: float = 4e9, moved: float = 1e8, **more: object
):
    least = max(moved / CEILINGS["copy"], flops / CEILINGS["fp32"])
    made = {
        "op": "penalty", "shape": shape, "dtype": "float32", "provider": provider, "backend": "",
        "role": "ours" if provider == OURS else "floor" if provider == "product" else "peer",
        "algorithm": "", "error_fp64": 1e-7, "rounds": 30,
        "seconds": {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.2 * seconds},
        "flops": flops, "bytes": moved, "gflops_per_second": flops / seconds / 1e9,
        "gbytes_per_second": moved / seconds / 1e9, "fraction_of_ceiling": least / seconds,
        "ceilings": CEILINGS, "environment": ENVIRONMENT, "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return {**made, **more}


def two_cases() -> list:
    return [
        record(name, seconds * width, {"width": width}, flops=4e9 * width)
        for width in (1, 8)
        for name, seconds in ((OURS, 0.05), ("eager", 0.2), ("product", 0.025))
    ]


def curve(law, sizes=(2, 4, 8, 16, 32), provider: str = OURS, **fixed: object) -> list:
    """Records of n^2 FLOPs and n bytes, whose seconds are law(n)."""
    return [
        record(provider, law(n), {"sweep": "width", "width": n, **fixed}, flops=2e9 * n * n, moved=1e6 * n)
        for n in sizes
    ]


def test_records_follow_schema():
    """Made records follow the schema."""
    assert [v for one in [*two_cases(), *curve(float)] for v in records.violations(one)] == []


# Exponents


def test_exponent_of_square():
    """The exponent of a square is two."""
    found = scaling.fit([1, 2, 4, 8], [3e-3 * n**2 for n in (1, 2, 4, 8)])
    assert f"{found.exponent:.2f}" == "2.00" and found.error < 1e-6
    assert found.at(16) == pytest.approx(3e-3 * 256)


def test_exponent_standard_error():
    """The standard error of an exponent reflects its scatter."""
    draw, sizes = np.random.default_rng(0), 2.0 ** np.arange(1, 9)
    fits = [scaling.fit(sizes, sizes**1.5 * np.exp(0.1 * draw.standard_normal(8))) for _ in range(400)]
    scatter = np.std([one.exponent for one in fits])
    assert math.sqrt(np.mean([one.error**2 for one in fits])) == pytest.approx(scatter, rel=0.1)


def test_exponent_few_sizes():
    """Two sizes give an exponent without an error, and one size gives none."""
    found = scaling.fit([1, 2], [1.0, 2.0])
    assert found.exponent == pytest.approx(1.0) and math.isnan(found.error) and str(found) == "1.00"
    with pytest.raises(ValueError, match="two sizes"):
        scaling.fit([3, 3], [1.0, 2.0])


def test_curves_swept_field():
    """Curves differ in the swept field only."""
    found = [*curve(float), *curve(float, provider="eager"), *curve(float, rank=4), *two_cases()]
    curves = scaling.curves(found)
    assert [(c.provider, c.fixed) for c in curves] == [(OURS, {}), ("eager", {}), (OURS, {"rank": 4})]
    assert curves[0].field == "width" and curves[0].sizes == [2, 4, 8, 16, 32]
    assert curves[0].family == curves[1].family != curves[2].family


def test_model_ceiling():
    """The model of a curve is its ceiling."""
    (one,) = scaling.curves(curve(lambda n: 1e-3 * n))
    model = scaling.model(one)
    assert model is not None and model.bounds == "flops"
    assert model.fit.exponent == pytest.approx(2.0)
    assert model.seconds == pytest.approx([2e9 * n * n / CEILINGS["fp32"] for n in one.sizes])
    assert scaling.deviation(one.fit(), scaling.Fit(0.5, 0.1, 1.0)) == pytest.approx(5.0)


def test_bound_change_named():
    """A model that changes its bound names both."""
    (one,) = scaling.curves([
        record(OURS, 1.0, {"sweep": "rank", "rank": n}, flops=1e8 * n, moved=1e7) for n in (1, 2, 4, 8)
    ])  # fmt: skip
    assert scaling.model(one).bounds == "bytes, flops"


def test_missing_sweep_number():
    """A sweep without its number is refused."""
    with pytest.raises(collection.Unusable, match="sweeps 'rank'"):
        scaling.curves([record(OURS, 1.0, {"sweep": "rank", "width": 8})])


# Pictures


@pytest.fixture(scope="module")
def drawn():
    pytest.importorskip("matplotlib")
    slow = curve(lambda n: 1e-2 * n, provider="eager")
    return plot.pictures([*two_cases(), *curve(lambda n: 2e-2 * n * n), *slow])


def points(axis) -> set:
    lines = [line for line in axis.lines if line.get_gid() == "point"]
    return {(line.get_label(), *(round(float(v[0]), 6) for v in line.get_data())) for line in lines}


def test_roofline_points(drawn):
    """Points of the roofline are at their intensity and rate."""
    (axis,) = drawn["roofline-a-cpu-2-threads"].axes
    expected = {
        (name, 40.0 * width, round(4.0 / seconds, 6))
        for width in (1, 8)
        for name, seconds in ((OURS, 0.05), ("eager", 0.2), ("product", 0.025))
    }
    assert points(axis) == expected
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert "FLOP/byte" in axis.get_xlabel() and axis.get_ylabel() == "GFLOP/s"


def test_roofline_ceilings(drawn):
    """Roofs are the measured ceilings."""
    (axis,) = drawn["roofline-a-cpu-2-threads"].axes
    lines = [line.get_xydata() for line in axis.lines if line.get_gid() is None]
    slopes = [line for line in lines if line[0][0] != line[1][0] and line[0][1] != line[1][1]]
    flat = [line for line in lines if line[0][0] != line[1][0] and line[0][1] == line[1][1]]
    assert [line[:, 1] / line[:, 0] for line in slopes] == [pytest.approx([10.0, 10.0])]
    assert [(line[0][0], line[0][1]) for line in flat] == [pytest.approx((20.0, 200.0))]
    texts = [text.get_text() for text in axis.texts]
    assert {"copy 10 GB/s", "fp32 product 200 GFLOP/s", "width 1", "width 8"} == set(texts)


def test_bar_ratios(drawn):
    """Bars are ratios of medians."""
    (axis,) = drawn["speedup-a-cpu-2-threads-penalty"].axes
    bars = {(bar.get_gid(), round(bar.get_x() + bar.get_width(), 6)) for bar in axis.patches}
    assert bars == {("eager", 4.0), ("product", 0.5)}
    texts = [text.get_text() for text in axis.texts]
    assert texts.count("4.00 × eager") == 2 and texts.count("0.50 × product") == 2
    assert axis.get_xscale() == "log"
    assert any(line.get_xdata()[0] == line.get_xdata()[1] == 1.0 for line in axis.lines)


def test_error_bars():
    """Error bars hold both spreads."""
    from benchmarks.plots import speedup

    ours, other = record(OURS, 1.0, {}), record("eager", 3.0, {})
    middle, low, high = speedup.ratio(other, ours)
    down, up = math.log(1 / 0.9), math.log(1.2)
    both = math.exp(math.hypot(down, up))
    assert (middle, low, high) == pytest.approx((3.0, 3.0 / both, 3.0 * both))


def test_curves_name_their_exponents(drawn):
    (name,) = [name for name in drawn if name.startswith("scaling")]
    (axis,) = drawn[name].axes
    texts = {text.get_text() for text in axis.texts}
    assert texts == {
        f"{OURS}: exponent 2.00 ± 0.00", "eager: exponent 1.00 ± 0.00", "model (flops): exponent 2.00 ± 0.00",
    }  # fmt: skip
    (model,) = [line for line in axis.lines if line.get_gid() == "model"]
    assert list(model.get_ydata()) == pytest.approx([1e3 * 1e-2 * n * n for n in (2, 4, 8, 16, 32)])
    assert axis.get_ylabel() == "time (ms)" and axis.get_xlabel() == "width"


def test_caption_source(drawn):
    """Captions say where the figures are from."""
    for figure in drawn.values():
        told = " ".join(figure.get_supxlabel().split())
        assert all(
            word in told for word in ("a CPU", "2 threads", "torch 2.13.0", "commit abc", "2026-01-01")
        )


def test_names_do_not_overlap():
    """Also where many cases reach nearly the same."""
    pytest.importorskip("matplotlib")
    found = [record(OURS, 0.05 + 1e-5 * n, {"width": n}, flops=4e9 + 1e6 * n) for n in range(16)]
    figure = plot.pictures(found)["roofline-a-cpu-2-threads"]
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text().startswith("width")]
    assert len(names) == 16
    boxes = [super(type(text), text).get_window_extent() for text in names]
    boxes.sort(key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1.0 for low, high in itertools.pairwise(boxes))
    assert all(box.x1 <= 1000.0 for box in boxes)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_label_spacing(count: int):
    """Label positions stay in order and apart."""
    pytest.importorskip("matplotlib")
    from benchmarks.plots.style import spread

    wanted = list(np.random.default_rng(count).random(count) ** 4)
    placed = spread(wanted, 0.05)
    ordered = sorted(placed)
    assert [placed[i] for i in np.argsort(wanted)] == ordered
    assert -1e-9 <= ordered[0] <= ordered[-1] <= 1.0 + 1e-9
    assert all(b - a >= min(0.05, 1 / max(count - 1, 1)) - 1e-9 for a, b in itertools.pairwise(ordered))


def test_bars_paginated():
    """Many bars are spread over several pages."""
    pytest.importorskip("matplotlib")
    found = [record(name, 1.0, {"width": n}) for n in range(60) for name in (OURS, "eager")]
    names = [name for name in plot.pictures(found) if name.startswith("speedup")]
    assert names == [f"speedup-a-cpu-2-threads-penalty-{n}" for n in (1, 2)]


# The command


def test_files_reproducible(tmp_path: Path, capsys):
    """Files are written, and equal records give equal files."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in two_cases()))
    assert plot.main([str(file), "--out", str(tmp_path / "a"), "--format", "png", "svg"]) == 0
    again = plot.plot(two_cases(), tmp_path / "b", ["png"])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    stems = ("roofline-a-cpu-2-threads", "speedup-a-cpu-2-threads-penalty")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert all((tmp_path / "a" / path.name).read_bytes() == path.read_bytes() for path in again)
    assert capsys.readouterr().out.count("\n") == 4


def test_few_colours(tmp_path: Path, drawn):
    """A picture reduced to few colours keeps the right ones."""
    from PIL import Image

    from benchmarks.plots import style

    (path,) = style.save(drawn["speedup-a-cpu-2-threads-penalty"], tmp_path, "x", ["png"])
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).astype(int)
    bar = 0.85 * np.array([0xD5, 0x5E, 0x00]) + 0.15 * 255  # of the first peer
    assert (np.abs(pixels - bar).max(axis=1) <= 6).sum() > 1000


def test_undrawable_exit_status(tmp_path: Path, capsys, monkeypatch):
    """What cannot be drawn ends with status 2 and a sentence."""
    assert plot.main([str(tmp_path / "none.jsonl"), "--out", str(tmp_path)]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(record("eager", 1.0, {"width": 1})) + "\n")
    assert plot.main([str(file), "--out", str(tmp_path)]) == 2
    assert "no case has a measurement of ours" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(file), "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "matplotlib is not installed" in told and "fused-ewclora[demo]" in told and told.count("\n") == 1


def headline_records() -> list:
    """Records of all cases of the headline; ours take 1 s, the others 2 s."""
    made = []
    for panel in headline.PANELS:
        for provider in (OURS, *panel.others):
            shape = {"model": panel.model, "rank": headline.RANK}
            seconds = 1.0 if provider == OURS else 2.0
            more = {"op": panel.op, "dtype": f"fisher {headline.FISHER}"}
            made.append(record(provider, seconds, shape, **more))
    return made


def test_headline():
    """The headline shows times over ours, and is left out where a case is missing."""
    made = headline_records()
    (picture,) = plot.headline(made)
    for axis, panel in zip(picture.draw().axes, headline.PANELS, strict=True):
        widths = {bar.get_gid(): bar.get_width() for bar in axis.patches}
        assert widths == {**dict.fromkeys(panel.others, 2.0), OURS: 1.0}
    assert plot.headline(made[:-1]) == []
    assert plot.headline([one for one in made if one["op"] != "ewc_penalty"]) == []
