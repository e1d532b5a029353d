# SPDX-License-Identifier: Apache-2.0
"""Records of measurements: reading them, and checking them against record_schema.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA = json.loads((Path(__file__).parent / "record_schema.json").read_text())
_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
}  # fmt: skip


def _is(value: Any, kind: str) -> bool:
    if kind in ("number", "integer"):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole or (kind == "number" and isinstance(value, float) and math.isfinite(value))
    return isinstance(value, _TYPES[kind])


def violations(value: Any, schema: dict[str, Any] = SCHEMA, where: str = "record") -> Iterator[str]:
    """How `value` violates `schema`, in words; for the keywords used in the files record_schema.json."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{where}: expected {' or '.join(kinds)}, got {value!r}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        yield f"{where}: {value!r} < {schema['minimum']}"
    if "maximum" in schema and value is not None and value > schema["maximum"]:
        yield f"{where}: {value!r} > {schema['maximum']}"
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{where}: expected at least {schema['minItems']} items, got {len(value)}"
        for number, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{where}[{number}]")
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}: {name} is missing"
    choices = [list(violations(value, choice, where)) for choice in schema.get("anyOf", [])]
    if choices and all(choices):
        yield min(choices, key=len)[0]
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name in value if isinstance(value, dict) else ():
        if name not in properties and others is False:
            yield f"{where}: {name} is not described"
            continue
        yield from violations(value[name], properties.get(name, others), f"{where}.{name}")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file; an incomplete last line, of a file that is being written, is skipped."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    complete = []
    for number, line in enumerate(lines):
        try:
            complete.append(json.loads(line))
        except json.JSONDecodeError:
            if number + 1 < len(lines):
                raise
    return complete


def key(record: dict[str, Any]) -> str:
    """What identifies the case of a record."""
    return json.dumps([record["op"], record["shape"], record["dtype"]], sort_keys=True)
