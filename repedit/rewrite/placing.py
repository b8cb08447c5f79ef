"""A directory appears whole, by one rename: a crash leaves its target absent, or as it was."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from repedit.errors import CheckpointError, RepeditError, TargetExists

_ASIDE, _LOCK = "replaced", "lock"


def check_target(out: Path, files: Path | None, overwrite: bool) -> None:
    """Refuse a target that exists, or lies inside or around the directory that is read.

    Raises:
        TargetExists: with both paths.
    """
    empty = out.is_dir() and not any(out.iterdir())
    if files is not None:
        real, origin = out.resolve(), files.resolve()
        if real.is_relative_to(origin) or origin.is_relative_to(real):
            raise TargetExists(
                f"the target {out} and the source {files} are the same or one lies inside the other; give another target"
            )
    if out.exists() and not empty and not overwrite:
        raise TargetExists(f"{out} exists; pass overwrite=True to replace it, or give another target")


@contextmanager
def workplace(out: Path, job: str = "") -> Iterator[Path]:
    """A temporary sibling of the target, removed whatever happens short of a kill; a job with a name finds its own again.

    What other jobs left there when they were killed is removed.

    Raises:
        CheckpointError: if the disk is full or refuses, nothing being left behind; or if the job is under way elsewhere.
    """
    place, lock = None, None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = (
            Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
            if not job
            else Path(f"{out.parent / _prefix(out)}{job}")
        )
        place.mkdir(exist_ok=True)
        lock = _locked(place)
        if lock is None:
            place = None
            raise CheckpointError(f"{out} is being written by another process from the same source; wait for it")
        for old in _left(out):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)
        yield place
    except RepeditError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"writing {out} failed: {error}; nothing was written") from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            lock.release()


def recover(out: Path) -> None:
    """Put back a target that was moved aside by an export that was killed before the new one stood in its place."""
    for place in _left(out):
        if (place / _ASIDE).exists() and not out.exists():
            (place / _ASIDE).rename(out)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _left(out: Path) -> list[Path]:
    """Places of exports to this target that nobody works in any more."""
    found = []
    for place in sorted(out.parent.glob(glob.escape(_prefix(out)) + "*")):
        lock = _locked(place) if (place / _LOCK).exists() else None
        if lock is not None:
            lock.release()
            found.append(place)
    return found


def _locked(place: Path) -> FileLock | None:
    """The lock of a place, held; None where another process holds it. The system releases it when a process dies."""
    lock = FileLock(place / _LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def check_space(place: Path, need: int) -> None:
    """Refuse to write more bytes than the disk has.

    Raises:
        CheckpointError: with both numbers.
    """
    free = shutil.disk_usage(place).free
    if free < need:
        raise CheckpointError(
            f"the disk of {place.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {need / 1e9:.1f} GB; nothing was written"
        )


def sync(folder: Path) -> None:
    """Have every file of a folder on the disk."""
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def install(new: Path, out: Path) -> None:
    """Put a whole folder in the target's place by one rename."""
    aside = new.parent / _ASIDE
    if out.exists():
        out.rename(aside)
    try:
        new.rename(out)
    except BaseException:  # an interrupt too: the old checkpoint must not go with the temporary directory
        if aside.exists():
            aside.rename(out)
        raise
