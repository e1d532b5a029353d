# SPDX-License-Identifier: Apache-2.0
"""The errors when a model library is missing or has an unsupported version."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fused_ewclora as fe
from fused_ewclora.integrations._library import _SUPPORTED, require

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {"timm": "timm", "transformers": "transformers", "accelerate": "transformers", "peft": "peft",
          "avalanche": "avalanche", "torchvision": "torchvision",
          "bitsandbytes": "bitsandbytes", "torchao": "torchao"}  # fmt: skip

PAGES = {"bitsandbytes": "quantised", "torchao": "quantised"}  # of extras that share one


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An import path that has nothing but a folder of the test."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in EXTRAS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    """A library of this name and version, as far as imports can tell."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("present = True\n")
    information = folder / f"{_SUPPORTED[name][0].replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {_SUPPORTED[name][0]}\nVersion: {version}\n"
    )


@pytest.mark.parametrize("name", EXTRAS)
def test_missing_names_extra(name, alone):
    """The error of a missing library names the extra that installs it."""
    with pytest.raises(
        fe.IntegrationError, match=rf"is not installed; pip install 'fused-ewclora\[{EXTRAS[name]}\]'"
    ):
        require(name)


def test_extras_exist():
    """Every extra that is named exists."""
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra in EXTRAS.values():
        assert f"\n{extra} = [" in extras


def test_error_classes():
    """Errors are import errors and errors of this library."""
    assert issubclass(fe.IntegrationError, ImportError) and issubclass(fe.IntegrationError, fe.EWCLoRAError)


def text_of(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@pytest.mark.parametrize("name", EXTRAS)
def test_same_versions(name):
    """Code, requirements and documentation name the same versions."""
    distribution, extra, first, beyond = _SUPPORTED[name]
    requirements = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    (own,) = re.findall(rf"^{extra} = \[(.*)\]$", requirements, re.MULTILINE)
    assert f'"{distribution}>={text_of(first)}"' in own
    floors = set(re.findall(rf'"{distribution}>=([\d.]+)"', requirements))
    assert floors == {text_of(first)}, "other extras ask for the same"
    pins = (ROOT / "requirements-extras.txt").read_text()
    (pin,) = re.findall(rf"^{distribution}==(.*)$", pins, re.MULTILINE)
    assert first <= tuple(map(int, pin.split("."))) < beyond
    page = (ROOT / "docs" / "integrations" / f"{PAGES.get(extra, extra)}.md").read_text().replace("\n", " ")
    library = distribution.removesuffix("-lib").replace("peft", "PEFT").replace("avalanche", "Avalanche")
    assert f"{library} {text_of(first)} and newer" in page, "the floor"
    assert re.search(rf"{library} [^|]*\b{re.escape(pin)}\b", page), "the version that is pinned"


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.24.0.dev0", "5.0.0rc1", "5.1+local.build"])
def test_versions_in_range(version, alone):
    """Versions in the range are taken."""
    install(alone, "transformers", version)
    assert require("transformers").present


@pytest.mark.parametrize("version", ["4.56.2", "6.0.0", "4.56.0.dev0", "6.0.0rc1"])
def test_versions_outside_range(version, alone):
    """Versions outside the range are refused, and the error names the range."""
    install(alone, "transformers", version)
    with pytest.raises(
        fe.IntegrationError, match=rf"transformers: expected a version >= 4\.57, < 6, got {version}$"
    ):
        require("transformers")
    assert "transformers" not in sys.modules, "it is not imported to find that out"


def test_folder_is_no_library(alone):
    """A folder of the same name is not the library."""
    (alone / "timm").mkdir()
    with pytest.raises(fe.IntegrationError, match="timm is not installed"):
        require("timm")
    (alone / "peft.py").write_text("")
    with pytest.raises(fe.IntegrationError, match="peft is not installed"):
        require("peft")


def test_import_fails(alone):
    """A library that cannot be imported says why."""
    install(alone, "timm", "1.0.31")
    (alone / "timm" / "__init__.py").write_text("raise RuntimeError('made for another torch')\n")
    with pytest.raises(fe.IntegrationError, match=r"timm 1\.0\.31 cannot be imported: made for another"):
        require("timm")


def test_unknown_integration():
    """An unknown integration is no attribute."""
    with pytest.raises(AttributeError, match="has no attribute 'tensorflow'"):
        fe.integrations.tensorflow  # noqa: B018
    assert {"avalanche", "peft", "timm", "torchvision", "transformers"} <= set(dir(fe.integrations))
