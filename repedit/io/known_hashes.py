"""Hashes of files, remembered once they were computed: by an export of a checkpoint, or by a run of its inputs.

The name of a blob in the cache of the hub and the lines of a manifest are not used: they say what a file once was, and the
times of a file that was written since and then copied or linked do not show it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from repedit.errors import CheckpointError, NotFound
from repedit.io.files import FileState, exact_state, file_hash
from repedit.io.store import JsonStore, cache_folder

SETTLED = 60
"""Seconds without a change before a file is remembered: its times of change tell nothing of two changes within a tick of
the clock, or of a page in memory that was written again before Linux wrote it to the disk, which it does within 35 seconds."""


class KnownFile(NamedTuple):
    """What is on record of a file of tensors."""

    sha256: str
    finite: bool = False
    """Whether every number in it was found to be finite."""


def known_hash(path: Path) -> str | None:
    """sha256 of a file of a checkpoint, without reading it; None if it is not on record, or the file may have changed since."""
    known = known_file(path)
    return None if known is None else known.sha256


def remembered_hash(path: Path) -> str:
    """sha256 of a regular file: as it is on record, or else computed and remembered.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    known, state = known_hash(path), settled_state(path)
    if known is None:
        known = file_hash(path)
        remember(path, state, KnownFile(known))
    return known


def known_file(path: Path) -> KnownFile | None:
    """What is on record of a file of a checkpoint, without reading it; None if nothing is, or the file may have changed since.

    An export remembers the state of a file before it reads it, see `remember`. A file that was written, replaced or linked
    after that has another time of change, which no program can set back, and its hash is computed again.
    """
    with suppress(OSError):
        return _remembered(path)
    return None


# --- What exports remember, in the user's cache


def settled_state(path: Path) -> FileState | None:
    """Device, number, size and times of a file, from before it is read; None if it changed within the last minute.

    Only POSIX systems have a time of change that no program can set.
    """
    state = exact_state(path)
    *_, modified, changed = state
    return None if os.name != "posix" or time.time_ns() - max(modified, changed) < SETTLED * 10**9 else state


def remember(path: Path, state: FileState | None, known: KnownFile) -> None:
    """Keep what was found of a file in the user's cache, if its state is still what it was before the file was read.

    Without a cache that can be written, nothing is kept. Writes to a mapped file in a memory file system (tmpfs) leave no
    trace in its times; such a file must not be written while it is exported, nor afterwards.
    """
    with suppress(OSError, CheckpointError):
        if state is not None and settled_state(path) == state:
            _store().put(_name(path), repr(state), known._asdict())


def _remembered(path: Path) -> KnownFile | None:
    state = settled_state(path)
    value = None if state is None else _store().get(_name(path), repr(state))
    if not isinstance(value, Mapping) or not re.fullmatch("[0-9a-f]{64}", str(value.get("sha256"))):
        return None
    return KnownFile(str(value["sha256"]), value.get("finite") is True)


def _store() -> JsonStore:
    with suppress(NotFound):
        return JsonStore(cache_folder() / "hashes")
    return JsonStore(None)


def _name(path: Path) -> str:
    return hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
