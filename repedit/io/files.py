"""Regular files: opened without blocking, hashed, replaced atomically, appended to so that no kill loses a line, copied."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

from repedit.errors import CheckpointError, NotFound, RepeditError

LIMIT = 4 << 30
"""Bytes of the largest text that is read into memory as a whole."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""First line of a Git LFS pointer, which a clone holds instead of a file that was not downloaded."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path, error: type[RepeditError] = CheckpointError) -> io.BufferedReader:
    """A regular file, or a link to one, opened for reading; anything else is refused before a read could block.

    Raises:
        RepeditError: of the type `error`, if the path is absent, unreadable, no regular file or a Git LFS pointer.
    """
    try:
        _check_regular(Path(path).stat().st_mode, path, error)
        # O_NONBLOCK: opening a pipe that replaced the file meanwhile would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError, TypeError) as reason:
        if isinstance(reason, RepeditError):
            raise
        raise error(f"{path} cannot be opened: {_reason_text(reason)}; give the path of a readable file") from reason
    file = os.fdopen(handle, "rb")
    try:
        status = os.fstat(handle)
        _check_regular(status.st_mode, path, error)
        if status.st_size < 1024 and file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
            raise error(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")
    except OSError as reason:
        file.close()
        if isinstance(reason, RepeditError):
            raise
        raise error(f"{path} cannot be read: {_reason_text(reason)}") from reason
    except RepeditError:
        file.close()
        raise
    return file


def user_path(path: str | Path) -> Path:
    """A path with the home folder in place of ~; as it is if there is no such user.

    Raises:
        NotFound: if the value cannot be a path.
    """
    try:
        return Path(path).expanduser()
    except TypeError as reason:
        what = " ".join(repr(path).split())[:60]  # of a model it has a hundred lines
        raise NotFound(f"{what} cannot be a path: {reason}; give the path of a file or directory") from reason
    except RuntimeError:
        return Path(path)


ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Error numbers of paths at which nothing exists."""


def is_file(path: str | Path) -> bool:
    """Whether a path names a regular file, or a link to one; False also for impossible paths."""
    return _mode_is(path, stat.S_ISREG)


def is_folder(path: str | Path) -> bool:
    """Whether a path names a folder, or a link to one; False also for impossible paths."""
    return _mode_is(path, stat.S_ISDIR)


def exists(path: str | Path) -> bool:
    """Whether anything exists at a path, behind all links; False also for impossible paths."""
    return _mode_is(path, lambda mode: True)


def _mode_is(path: str | Path, test: Callable[[int], bool]) -> bool:
    try:
        return test(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def read_bytes(path: str | Path, error: type[RepeditError] = CheckpointError) -> bytes:
    """The content of a regular file.

    Raises:
        RepeditError: of the type `error`, if it cannot be opened or read, or holds more than `LIMIT` bytes.
    """
    with open_regular(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(LIMIT + 1) if size <= LIMIT else b""
        except OSError as reason:
            raise error(f"{path} cannot be read: {_reason_text(reason)}") from reason
    if max(size, len(data)) > LIMIT:
        raise error(
            f"{path} holds {max(size, len(data)):,} bytes, more than the {LIMIT:,} that are read; is it this file?"
        )
    return data


FileState = tuple[int, ...]
_hashes: dict[FileState, str] = {}


def cached_hash(path: Path) -> str:
    """sha256 of a regular file, computed once for each state of it."""
    key = exact_state(path)
    if key not in _hashes:
        _hashes[key] = file_hash(path)
    return _hashes[key]


def file_hash(path: Path) -> str:
    """sha256 of a regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(path: Path) -> dict[str, str]:
    """sha256 of a file, under "", or of every file of a folder by its relative path; empty if nothing exists there."""
    if path.is_file():
        return {"": file_hash(path)}
    return {p.relative_to(path).as_posix(): file_hash(p) for p in sorted(path.rglob("*")) if p.is_file()}


def exact_state(path: Path) -> FileState:
    """Device, number, size and times of modification and of change of a file, behind links.

    Raises:
        OSError: if there is no such file.
    """
    status = path.stat()
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_state(path: Path) -> FileState:
    """`exact_state` of a file whose content decides: another state, another content.

    A program can set the time of modification back, but not the time of change. The latter does not count for a file that
    nobody may write: it changes whenever somebody makes a hard link to the file, as an export does.

    Raises:
        OSError: if there is no such file.
    """
    *state, changed = exact_state(path)
    return (*state, 0 if can_hard_link(path) else changed)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces `path` when the context ends; after an exception `path` is unchanged.

    The content is written beside the target under a temporary name and flushed to the disk before the rename. A link is
    followed to the file it names.

    Raises:
        CheckpointError: if the folder is absent, the target is no regular file, or writing fails.
    """
    target, temporary = _target(path), None
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".repedit-", suffix=".partial")
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        Path(temporary).chmod(_mode(target))
        Path(temporary).replace(target)
        temporary = None
    except OSError as reason:
        if isinstance(reason, RepeditError):
            raise
        raise CheckpointError(
            f"{path} cannot be written: {_reason_text(reason)}; nothing there was changed"
        ) from reason
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def make_folder(path: str | Path) -> Path:
    """A folder, created with its parents if it does not exist.

    Raises:
        CheckpointError: if it cannot be created or something else has its name.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as reason:
        raise CheckpointError(
            f"the folder {folder} cannot be made: {_reason_text(reason)}; give another path"
        ) from reason
    return folder


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append a JSON object as one line, which is on the disk when this returns; an incomplete last line is removed first.

    Raises:
        CheckpointError: if the path is no regular file, or cannot be written.
    """
    size, complete = _complete(path) if os.path.lexists(path) else (0, 0)
    try:
        if complete < size:  # otherwise the new row would be appended to a truncated line
            os.truncate(path, complete)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as reason:
        raise CheckpointError(f"{path} cannot be written: {_reason_text(reason)}") from reason


def _complete(path: Path) -> tuple[int, int]:
    """(bytes of a file, bytes of its complete lines)."""
    with open_regular(path) as file:
        size = stop = file.seek(0, os.SEEK_END)
        while stop:
            start = max(0, stop - 65536)
            file.seek(start)
            end = file.read(stop - start).rfind(b"\n")
            if end >= 0:
                return size, start + end + 1
            stop = start
    return size, 0


def _check_regular(mode: int, path: str | Path, error: type[RepeditError]) -> None:
    if not stat.S_ISREG(mode):
        raise error(
            f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file; give another path"
        )


def _target(path: str | Path) -> Path:
    """The path of the regular file to replace or to create, behind all links."""
    try:
        target = Path(os.path.realpath(path))
        if os.path.lexists(target):
            _check_regular(target.stat().st_mode, path, CheckpointError)
        elif not target.parent.is_dir():
            raise CheckpointError(f"{path} cannot be written: the folder {target.parent} does not exist; make it first")
    except (OSError, ValueError, TypeError) as reason:
        if isinstance(reason, RepeditError):
            raise
        raise CheckpointError(f"{path} cannot be written: {_reason_text(reason)}") from reason
    return target


def _mode(target: Path) -> int:
    """The permissions of the file to replace, or of a new file."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _reason_text(reason: Exception) -> str:
    number = getattr(reason, "errno", None)
    if number == errno.ENOENT:
        return "no such file or folder"
    return os.strerror(number) if number else str(reason)


# --- Copies that share bytes with the original, where no later write to one can change the other

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
