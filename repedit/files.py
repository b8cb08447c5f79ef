"""Files as such: their hash, and lines of JSON that are added one at a time and outlive a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(path: Path) -> dict[str, str]:
    """sha256 of a file, under "", or of every file of a folder by its path there; empty where there is nothing."""
    if path.is_file():
        return {"": file_hash(path)}
    return {p.relative_to(path).as_posix(): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one JSON object as a line, on the disk when this returns; the rest of a line that was cut off is taken away first."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    if whole < len(data):  # what is added would else stand behind the rest of a line
        os.truncate(path, whole)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Lines:
    """The rows of a file, one JSON object a line; a line that was cut off is no row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        data = path.read_bytes() if path.exists() else b""
        self.rows += map(json.loads, data[: data.rfind(b"\n") + 1].splitlines())

    def add(self, row: Mapping[str, Any]) -> None:
        """One row more, on the disk when this returns."""
        self.rows.append(dict(row))
        append(self.path, row)
