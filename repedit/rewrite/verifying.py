"""Whether a directory still holds what its manifest says was exported."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.io.files import file_hash, user_path
from repedit.io.targets import CARD, MANIFEST, entries, read_manifest


@dataclass(frozen=True)
class Verification:
    """The files of an export beside its manifest."""

    manifest: Mapping[str, Any]
    files: Mapping[str, int]
    """Bytes of every file of the manifest that is there, and of the manifest and the card."""
    changed: tuple[str, ...]
    """Files with another hash than the manifest has, or links and special files in their place."""
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
    place = user_path(directory)
    record, expected = read_manifest(place)
    there = entries(place)
    regular = [name for name, status in there.items() if stat.S_ISREG(status.st_mode)]
    known = [name for name in (*expected, MANIFEST, CARD) if name in there]
    return Verification(
        record,
        {name: there[name].st_size for name in sorted(known)},
        tuple(n for n in sorted(known) if n not in regular or (n in expected and file_hash(place / n) != expected[n])),
        tuple(name for name in sorted(expected) if name not in there),
        tuple(name for name in there if name not in known),
    )
