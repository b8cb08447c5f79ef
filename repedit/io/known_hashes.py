"""Hashes of files that are already on record: the hub names the blobs of its cache by them, and a manifest lists them."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from repedit.errors import RepeditError
from repedit.io.targets import MANIFEST, read_manifest


def known_hash(path: Path) -> str | None:
    """sha256 of a file of a checkpoint, without reading it; None if it is not on record, or the file may have changed since.

    The client of the hub names a blob by its hash and then links it from a snapshot; an export writes its manifest after
    the files that it lists. A file that was written, replaced or linked after that has a younger time of change, which
    no program can set back, and its hash is computed again.
    """
    with suppress(OSError):
        return _of_blob(path) if path.is_symlink() else _of_manifest(path)
    return None


def _of_blob(link: Path) -> str | None:
    blob = Path(os.path.realpath(link))
    in_cache = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    if not in_cache or not re.fullmatch("[0-9a-f]{64}", blob.name):  # small files are named by the sha1 of git
        return None
    return blob.name if _changed(blob) <= link.lstat().st_mtime_ns else None


def _of_manifest(path: Path) -> str | None:
    record = path.parent / MANIFEST
    if record.is_symlink() or not record.is_file() or _changed(path) > record.stat().st_mtime_ns:
        return None
    status = record.stat()
    return _listed(path.parent, status.st_ino, status.st_mtime_ns, status.st_size).get(path.name)


@lru_cache(maxsize=8)
def _listed(folder: Path, *_state: int) -> dict[str, str]:
    try:
        return read_manifest(folder)[1]
    except RepeditError:
        return {}


def _changed(path: Path) -> int:
    status = path.stat()
    return max(status.st_mtime_ns, status.st_ctime_ns)
