# SPDX-License-Identifier: Apache-2.0
"""docs/architectures.md is what the records of the sweep give."""

from __future__ import annotations

from sweep import table


def test_page_is_current():
    """The page is the one of the committed records, and names the versions of the libraries."""
    about, records = table.load()
    text = table.PAGE.read_text()
    assert text == table.page(about, records), "make sweep writes it again"
    assert all(version in text for version in about["versions"].values())


def test_rows_complete():
    """A row per record, at least 40 with adapted layers of timm and of transformers."""
    _, records = table.load()
    assert len(table.table(records).splitlines()) == len(records) + 2
    for library in ("timm", "transformers"):
        assert sum(one["library"] == library and one["layers"] > 0 for one in records) >= 40


def test_outcomes():
    """WRONG outweighs a refusal, and a refusal what is right; without checks a row is left out."""

    def of(*statuses: str) -> str:
        return table.outcome({"checks": {str(i): {"status": status} for i, status in enumerate(statuses)}})

    assert of("right", "refused", "WRONG") == "WRONG"
    assert of("right", "-", "refused") == "refused"
    assert of("right", "-") == "right" and of() == "left out"
