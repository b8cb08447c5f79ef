"""Rows of a published file as plain mappings, with the file and the number of a row in every complaint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repedit.errors import DataError, NotFound
from repedit.io.files import is_folder, user_path
from repedit.io.tables import parquet_rows
from repedit.io.text import json_rows


def folder(directory: str | Path, what: str) -> Path:
    """The directory, if there is one.

    Raises:
        NotFound: if there is none, with what should lie in it.
    """
    path = user_path(directory)
    if not is_folder(path):
        raise NotFound(f"{path.absolute()} is not a directory; give the one that holds {what}")
    return path


def mappings(path: Path, fields: Sequence[str]) -> list[Mapping[str, Any]]:
    """The rows of a .jsonl or .parquet file, each with the fields named; all but "id" hold texts.

    Raises:
        DataError: if the file cannot be read, or a row is no object or lacks a field, with its number.
        MissingDependency: if parquet is read without pyarrow.
    """
    rows: list[Mapping[str, Any]] = (
        [*parquet_rows(path)] if path.suffix == ".parquet" else [row for _, row in json_rows(path)]
    )
    if not rows:
        raise DataError(f"{path} holds no rows; download it again")
    for number, row in enumerate(rows, 1):
        missing = [field for field in fields if row.get(field) is None]
        if missing:
            raise DataError(f"{path}, row {number}: no {', '.join(missing)}; found {sorted(row)}")
        wrong = [field for field in fields if field != "id" and not isinstance(row[field], str)]
        if wrong:
            raise DataError(f"{path}, row {number}: {wrong[0]} is {row[wrong[0]]!r:.100}; a text was expected")
    return rows
