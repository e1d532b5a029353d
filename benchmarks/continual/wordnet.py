# SPDX-License-Identifier: Apache-2.0
"""Definitions of WordNet 3.0, labelled by the lexicographer file that they come from."""

from __future__ import annotations

import re
from pathlib import Path

from fused_ewclora.demo.formats import DataError
from fused_ewclora.demo.sources import debian_package

PACKAGE = "wordnet-base"
PARTS = ("noun", "verb", "adj", "adv")
# By number, as lexnames(5WN) lists them.
LEXICOGRAPHER_FILES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact",
    "noun.attribute", "noun.body", "noun.cognition", "noun.communication", "noun.event", "noun.feeling",
    "noun.food", "noun.group", "noun.location", "noun.motive", "noun.object", "noun.person",
    "noun.phenomenon", "noun.plant", "noun.possession", "noun.process", "noun.quantity", "noun.relation",
    "noun.shape", "noun.state", "noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition",
    "verb.communication", "verb.competition", "verb.consumption", "verb.contact", "verb.creation",
    "verb.emotion", "verb.motion", "verb.perception", "verb.possession", "verb.social", "verb.stative",
    "verb.weather", "adj.ppl",
)  # fmt: skip
# A synset up to its words: its offset in the file, its lexicographer file, its kind.
_SYNSET = re.compile(r"\d{8} (\d\d) [nvasr] [0-9a-f]{2} ")
# Examples are quoted; most follow a semicolon, some a colon or a comma.
_EXAMPLE = re.compile(r'\s*[;:,]\s*"')


def definition(gloss: str) -> str:
    """A gloss without its examples."""
    return _EXAMPLE.split(gloss, maxsplit=1)[0].strip(" ;:")


def read(path: Path) -> list[tuple[str, str]]:
    """(lexicographer file, definition) of every synset in a file of the form of wndb(5WN), such as data.noun.

    Raises `DataError` with the number of the line for one that is not a synset.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    synsets: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if line.startswith("  "):  # the licence, at the top of every file
            continue
        synset, bar, gloss = line.partition(" | ")
        if not bar or (fields := _SYNSET.match(synset)) is None:
            raise DataError(f"{path}, line {number}: expected a synset and ' | gloss', got {line[:60]!r}")
        if (file := int(fields[1])) >= len(LEXICOGRAPHER_FILES):
            raise DataError(
                f"{path}, line {number}: expected a lexicographer file below {len(LEXICOGRAPHER_FILES)}, "
                f"got {file}"
            )
        if not (text := definition(gloss)):
            raise DataError(f"{path}, line {number}: expected a definition, got the gloss {gloss[:60]!r}")
        synsets.append((LEXICOGRAPHER_FILES[file], text))
    if not synsets:
        raise DataError(f"{path}: expected synsets, found none")
    return synsets


def definitions(root: Path, parts: tuple[str, ...] = ("noun", "verb")) -> list[tuple[str, str]]:
    """(lexicographer file, definition) of all synsets of some parts of speech.

    root: folder with the Debian package wordnet-base or its content; it is downloaded there if missing.
    Adjectives and adverbs are not divided by subject: nearly all are in one file each. Raises `DataError`.
    """
    if unknown := sorted(set(parts) - set(PARTS)):
        raise DataError(f"parts: expected some of {', '.join(PARTS)}, got {unknown[0]!r}")
    content = debian_package(root, PACKAGE)
    synsets: list[tuple[str, str]] = []
    for part in parts:
        if not (files := sorted(content.rglob(f"data.{part}"))):
            raise DataError(f"{content}: expected a file data.{part} of {PACKAGE}, found none")
        synsets += read(files[0])
    return synsets
