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
          "avalanche": "avalanche"}  # fmt: skip


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
def test_a_missing_library_names_the_extra_that_brings_it(name, alone):
    with pytest.raises(
        fe.IntegrationError, match=rf"is not installed; pip install 'fused-ewclora\[{EXTRAS[name]}\]'"
    ):
        require(name)


def test_every_extra_that_is_named_exists():
    text = (ROOT / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra in EXTRAS.values():
        assert f"\n{extra} = [" in extras


def test_errors_are_import_errors_and_errors_of_this_library():
    assert issubclass(fe.IntegrationError, ImportError) and issubclass(fe.IntegrationError, fe.EWCLoRAError)


def text_of(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@pytest.mark.parametrize("name", EXTRAS)
def test_code_requirements_and_documentation_name_the_same_versions(name):
    distribution, extra, first, beyond = _SUPPORTED[name]
    requirements = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    (own,) = re.findall(rf"^{extra} = \[(.*)\]$", requirements, re.MULTILINE)
    assert f'"{distribution}>={text_of(first)}"' in own
    floors = set(re.findall(rf'"{distribution}>=([\d.]+)"', requirements))
    assert floors == {text_of(first)}, "other extras ask for the same"
    pins = (ROOT / "requirements-extras.txt").read_text()
    (pin,) = re.findall(rf"^{distribution}==(.*)$", pins, re.MULTILINE)
    assert first <= tuple(map(int, pin.split("."))) < beyond
    page = (ROOT / "docs" / "integrations" / f"{extra}.md").read_text().replace("\n", " ")
    library = distribution.removesuffix("-lib").replace("peft", "PEFT").replace("avalanche", "Avalanche")
    assert f"{library} {text_of(first)} and newer" in page, "the floor"
    assert re.search(rf"{library} [^|]*\b{re.escape(pin)}\b", page), "the version that is pinned"


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.24.0.dev0", "5.0.0rc1", "5.1+local.build"])
def test_versions_in_the_range_are_taken(version, alone):
    install(alone, "transformers", version)
    assert require("transformers").present


@pytest.mark.parametrize("version", ["4.56.2", "6.0.0", "4.56.0.dev0", "6.0.0rc1"])
def test_versions_outside_of_it_are_refused_with_the_range(version, alone):
    install(alone, "transformers", version)
    with pytest.raises(
        fe.IntegrationError, match=rf"transformers: expected a version >= 4\.57, < 6, got {version}$"
    ):
        require("transformers")
    assert "transformers" not in sys.modules, "it is not imported to find that out"


def test_a_folder_of_the_same_name_is_not_the_library(alone):
    (alone / "timm").mkdir()
    with pytest.raises(fe.IntegrationError, match="timm is not installed"):
        require("timm")
    (alone / "peft.py").write_text("")
    with pytest.raises(fe.IntegrationError, match="peft is not installed"):
        require("peft")


def test_a_library_that_cannot_be_imported_says_why(alone):
    install(alone, "timm", "1.0.31")
    (alone / "timm" / "__init__.py").write_text("raise RuntimeError('made for another torch')\n")
    with pytest.raises(fe.IntegrationError, match=r"timm 1\.0\.31 cannot be imported: made for another"):
        require("timm")


def test_an_unknown_integration_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'tensorflow'"):
        fe.integrations.tensorflow  # noqa: B018
    assert {"avalanche", "peft", "timm", "transformers"} <= set(dir(fe.integrations))
