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


class Lines:
    """The rows of a file, one JSON object a line; a line that was cut off is no row, and is taken away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # what is added next would else stand behind the rest of a line
            os.truncate(path, whole)
        self.rows += map(json.loads, data[:whole].splitlines())

    def add(self, row: Mapping[str, Any]) -> None:
        """One row more, on the disk when this returns."""
        self.rows.append(dict(row))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
