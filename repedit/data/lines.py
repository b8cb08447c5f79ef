"""Rows of a published file as plain mappings, with the file and the number of a row in every complaint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repedit.errors import DataError, MissingDependency, NotFound


def folder(directory: str | Path, what: str) -> Path:
    """The directory, if there is one.

    Raises:
        NotFound: if there is none, with what should lie in it.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise NotFound(f"{path.absolute()} is not a directory; give the one that holds {what}")
    return path


def mappings(path: Path, fields: Sequence[str]) -> list[Mapping[str, Any]]:
    """The rows of a .jsonl or .parquet file, each with the fields named.

    Raises:
        DataError: if a row is no object or lacks a field, with its number.
        MissingDependency: if parquet is read without pyarrow.
    """
    rows = _parquet(path) if path.suffix == ".parquet" else _jsonl(path)
    if not rows:
        raise DataError(f"{path} holds no rows; download it again")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if row.get(field) is None]
        if missing:
            raise DataError(f"{path}, row {number}: no {', '.join(missing)}; found {sorted(row)}")
    return rows


def _jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, row {number}: not JSON: {error}; one object a line is expected") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, row {number}: found a {type(row).__name__}; one object a line is expected")
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[Mapping[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependency("reading parquet needs pyarrow: pip install pyarrow==26.0.1") from error
    return list(parquet.read_table(path).to_pylist())
