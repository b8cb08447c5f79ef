"""Whether a directory still holds what its manifest says was exported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.errors import CheckpointError, NotFound
from repedit.io.files import file_hash

MANIFEST, CARD = "repedit.json", "README.md"
"""Files that no manifest hashes: it cannot hold its own hash, and the card is for people to write on."""


@dataclass(frozen=True)
class Verification:
    """The files of an export beside its manifest."""

    manifest: Mapping[str, Any]
    files: Mapping[str, int]
    """Bytes of every file of the manifest that is there, and of the manifest and the card."""
    changed: tuple[str, ...]
    """Files with another hash than the manifest has."""
    missing: tuple[str, ...]
    unlisted: tuple[str, ...]
    """Files, also of folders below, that the manifest does not know."""

    @property
    def whole(self) -> bool:
        """Whether every file of the manifest is there as it was exported; others may lie beside them."""
        return not self.changed and not self.missing

    def describe(self) -> str:
        """One line."""
        parts = [
            f"{word}: {', '.join(names)}"
            for word, names in (
                ("changed since the export", self.changed), ("missing", self.missing), ("not of the export", self.unlisted),
            )
            if names
        ]  # fmt: skip
        return "; ".join(parts) or f"all {len(self.manifest['files'])} files are as they were exported"


def verification(directory: str | Path) -> Verification:
    """Hash the files of an exported directory and compare them with its repedit.json.

    Raises:
        NotFound: if there is no manifest. CheckpointError: if it is none, or names files outside the directory.
    """
    place = Path(directory).expanduser()
    path = place / MANIFEST
    if not path.is_file():
        raise NotFound(f"{place.absolute()} holds no {MANIFEST}; give a directory that repedit exported")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        expected = {str(name): str(value) for name, value in found["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path.absolute()} is not a manifest with hashes of files: {error!r}; export again"
        ) from error
    outside = [name for name in expected if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise CheckpointError(
            f"{path.absolute()} names {outside[0]!r}, which is no file of its directory; export again"
        )
    there = {p.relative_to(place).as_posix(): p for p in sorted(place.rglob("*")) if p.is_file()}
    known = {name: there[name] for name in (*expected, MANIFEST, CARD) if name in there}
    return Verification(
        found,
        {name: path.stat().st_size for name, path in sorted(known.items())},
        tuple(name for name in sorted(expected) if name in there and file_hash(there[name]) != expected[name]),
        tuple(name for name in sorted(expected) if name not in there),
        tuple(name for name in there if name not in known),
    )
