"""A directory appears whole, by one rename: a crash leaves its target absent, or as it was."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from repedit.errors import CheckpointError, RepeditError, TargetExists


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
def workplace(out: Path) -> Iterator[Path]:
    """A temporary sibling of the target, removed whatever happens.

    Raises:
        CheckpointError: if the disk is full or refuses; nothing is left behind.
    """
    place = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        yield place
    except RepeditError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"writing {out} failed: {error}; nothing was written") from error
    finally:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


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
    aside = new.parent / "replaced"
    if out.exists():
        out.rename(aside)
    try:
        new.rename(out)
    except BaseException:  # an interrupt too: the old checkpoint must not go with the temporary directory
        if aside.exists():
            aside.rename(out)
        raise
