"""The journal of an export: which shards are finished, so that one that was killed goes on where it was.

A shard is entered once it is on the disk, with its hash and what became of its tensors; it is believed again only if the
file still has that hash, in a directory that bears the name of the same job: the same plan, source files and options.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.errors import CheckpointError
from repedit.io.checkpoint import Shards
from repedit.io.files import file_hash
from repedit.io.safetensors import raw_bytes
from repedit.io.text import JsonLines
from repedit.plan import Plan
from repedit.rewrite.certificates import TensorCertificate
from repedit.rewrite.manifest import PACKAGES, Change


def job(plan: Plan, shards: Shards, dtype: torch.dtype | None, link: bool) -> str:
    """What tells one export from another: the plan with its values, the state of every source file, the options, the versions."""
    digest = hashlib.sha256()
    _feed(digest, plan, {})
    for file in shards.files:
        stat = (shards.directory / file).stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    digest.update(f"{shards.directory.resolve()} {dtype} {link} {[version(name) for name in PACKAGES]}".encode())
    return digest.hexdigest()[:16]


class Journal:
    """The finished shards of one export, by file name, in a file beside their folder; every other file of it is removed."""

    def __init__(self, shards: Path) -> None:
        self._lines = JsonLines(shards.parent / "finished.jsonl")
        self.hashes: dict[str, str] = {}
        """sha256 of every finished file."""
        self._rows = {str(row.get("file")): row for row in self._lines.rows if "sha256" in row}
        for path in shards.iterdir():
            if path.name not in self._rows:
                path.unlink()

    def known(self, path: Path) -> dict[str, Change] | None:
        """What became of the tensors of a shard that is finished and whole; None, and no such file, where it is not."""
        row = self._rows.get(path.name)
        if row is None:
            return None
        if not path.exists() or file_hash(path) != row["sha256"]:
            path.unlink(missing_ok=True)
            return None
        self.hashes[path.name] = row["sha256"]
        try:
            return {name: _change(plain) for name, plain in row["changes"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._lines.path} is damaged: {error!r}; remove it, and export again") from error

    def enter(self, path: Path, changes: Mapping[str, Change]) -> None:
        """A shard is finished: have it on the disk first, then say so."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self.hashes[path.name] = file_hash(path)
        rows = {name: asdict(change) for name, change in changes.items()}
        self._lines.add({"file": path.name, "sha256": self.hashes[path.name], "changes": rows})


def _change(plain: Mapping[str, Any]) -> Change:
    proof = plain["certificate"]
    return Change(**{**plain, "certificate": None if proof is None else TensorCertificate(**proof)})


def _feed(digest: Any, value: Any, seen: dict[int, bytes]) -> None:
    """Add a value of a plan to a digest: its type, and every part of it; a tensor that many operations share is read once."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = hashlib.sha256(raw_bytes(value)).digest()
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + seen[id(value)])
    elif is_dataclass(value):
        for field in fields(value):
            digest.update(field.name.encode())
            _feed(digest, getattr(value, field.name), seen)
    elif isinstance(value, Mapping):
        for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            digest.update(str(key).encode())
            _feed(digest, item, seen)
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            _feed(digest, item, seen)
    else:
        digest.update(repr(value).encode())
