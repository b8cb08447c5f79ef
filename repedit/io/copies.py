"""Copies of files that share their bytes on the disk, where no later write to one can change the other."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

Sharing = Literal["reflink", "hard link"]
"""How files share bytes: a reflink ends where one of them is written, a hard link is one file under two names."""
_FICLONE = 0x40049409
"""The request of Linux by which a file gets the blocks of another one."""
_UNSUPPORTED = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def sharing_between(source: Path, folder: Path) -> Sharing | None:
    """How copies in a folder can share bytes with a file outside it; None if they lie on different file systems."""
    handle, name = tempfile.mkstemp(dir=folder)
    try:
        with open(source, "rb") as old, open(handle, "wb") as new:
            if cloned(old, new):
                return "reflink"
            return "hard link" if os.fstat(old.fileno()).st_dev == os.fstat(handle).st_dev else None
    finally:
        Path(name).unlink()


def cloned(old: IO[bytes], new: IO[bytes]) -> bool:
    """Give an empty file the blocks of another one, which the system copies when either is written; False if it cannot."""
    try:
        import fcntl

        fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
    except (ImportError, OSError):
        return False
    return True


def can_hard_link(path: Path) -> bool:
    """Whether nobody may write a file: a hard link to any other file would change with it, and it with the link."""
    return not stat.S_IMODE(path.stat().st_mode) & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)


def hard_linked(source: Path, target: Path) -> bool:
    """Link a file that nobody may write under another name; False, and nothing is done, if that is not possible."""
    if can_hard_link(source):
        with suppress(OSError):  # another file system, one without hard links, or the file of another user
            os.link(source, target)
            return True
    return False


def copy_bytes(old: IO[bytes], new: IO[bytes], path: Path) -> None:
    """Copy all bytes of the file at a path to an empty one, inside the kernel where that is possible."""
    copy_range: Any = getattr(os, "copy_file_range", None)
    size, done = os.fstat(old.fileno()).st_size, 0
    try:
        while done < size and copy_range is not None:
            count = copy_range(old.fileno(), new.fileno(), size - done, done, done)
            if not count:
                raise OSError(errno.EIO, f"{path} ended early")
            done += count
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    if done < size:
        old.seek(0)
        shutil.copyfileobj(old, new, 1 << 20)
