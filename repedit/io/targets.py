"""Where results are written: a target is checked before work begins, locked while it is written, and checked again at the rename.

A directory appears whole, by one rename: a crash leaves its target absent, or as it was. What repedit did not write is
never replaced: not a file among the files of an export, not a link, a special file, a home or a mounted disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from repedit.errors import ArgumentError, CheckpointError, NotFound, RepeditError, TargetExists
from repedit.io.files import NOWHERE, file_hash, user_path
from repedit.io.text import read_json

MANIFEST, CARD = "repedit.json", "README.md"
"""The record of an export, which lists its other files with their hashes; and the card, which people may write on."""
_ASIDE, _DISCARDED, _LOCK, _MARK = "replaced", "discarded", "repedit.lock", "unfinished-export.json"
_OURS = ("checkpoint", "adapter", "unedited", "finished.jsonl", _DISCARDED, _MARK)
"""What a workplace may hold; anything else in it is somebody's and stays."""
_KINDS = {stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_hashes: dict[tuple[int, ...], str] = {}


# Before work begins.


def check_target(target: str | Path, *, overwrite: bool = False, source: str | Path | None = None) -> Path:
    """The absolute path of a directory that may be written, refused where something would be lost; nothing is written yet.

    Call it before work begins; `install` checks again when the result takes its place.

    Args:
        overwrite: allow an earlier export whose files are as they were exported. An empty directory is always allowed.
        source: directory that is read; the target may neither lie in it nor around it.
    Raises:
        TargetExists: if something else is there, or another process is writing it.
        CheckpointError: if nothing can be written there. ArgumentError: if the name cannot be one.
    """
    out = _absolute(target)
    with _typed(out):
        _check_parent(out)
        if source is not None:
            _check_apart(out, _real(source), Path(source))
        if _is_ours(_place(out)):
            with _claimed(
                out
            ) as place:  # refused where another process writes; what one that was killed moved aside comes back
                _put_back(out, place)
        _check_free(out, overwrite)
    return out


def check_file_target(target: str | Path, *, overwrite: bool = True) -> Path:
    """The absolute path of a file that may be written, behind all links: it is absent, or a regular file that may be replaced.

    Raises:
        TargetExists: if a directory or a special file is there, or a file and overwrite is False.
        CheckpointError: if nothing can be written there. ArgumentError: if the name cannot be one.
    """
    out = _absolute(target)
    with _typed(out):
        out = _real(out)
        _check_parent(out)
        kind = _kind(out)
        if kind not in (None, "a file"):
            raise TargetExists(f"{out} is {kind}, where a file is to be written; give another target")
        if kind is not None and not overwrite:
            raise TargetExists(f"{out} exists; pass overwrite=True to replace it, or give another target")
    return out


def check_folder(target: str | Path | None, *ours: str, read: tuple[str | Path, ...] = ()) -> None:
    """Refuse a folder that pages and findings are put into, one by one: it is absent, empty, or holds some of ours already.

    Args:
        ours: names of what a folder of this kind holds; without any, a folder may hold anything.
        read: what is read, which the folder may not be.
    Raises:
        TargetExists: if it holds something else, or is what is read. CheckpointError: if nothing can be written there.
    """
    if target is None:
        return
    out = _real(_absolute(target))
    with _typed(out):
        if any(_real(path) == out for path in read):
            raise TargetExists(f"the target {target} is read by this command; give another target")
        _check_parent(out)
        kind = _kind(out)
        if kind is not None and not out.is_dir():
            raise TargetExists(f"{out} is {kind}, where a folder is to be written; give another target")
        if kind is not None and not os.access(out, os.W_OK | os.X_OK):
            raise CheckpointError(f"{out} cannot be written: it is read-only; give another target")
        if kind is not None and ours and any(out.iterdir()) and not any((out / name).exists() for name in ours):
            raise TargetExists(f"{out} holds something else than {' or '.join(ours)}; give another target")


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


# What a directory of ours holds.


def entries(folder: Path) -> dict[str, os.stat_result]:
    """Everything in a folder that is not itself a folder, by its path there: files, and links and special files unopened."""
    found = {}
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in (*files, *folders):
            path = Path(root, name)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                found[path.relative_to(folder).as_posix()] = status
    return dict(sorted(found.items()))


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest of a directory, and the hash of each file it lists.

    Raises:
        NotFound: if there is none. CheckpointError: if it is none, or names files outside the directory.
    """
    path = folder / MANIFEST
    if _kind(path) != "a file":
        raise NotFound(f"{folder.absolute()} holds no {MANIFEST}; give a directory that repedit exported")
    record = read_json(path, finite=False, remedy="export again")
    files = record.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise CheckpointError(f"{path.absolute()} is not a manifest with hashes of files; export again")
    for name in files:
        if not name or name != PurePosixPath(name).as_posix() or {"", ".", "..", "/"} & set(PurePosixPath(name).parts):
            raise CheckpointError(f"{path.absolute()} names {name!r}, which is no file of its directory; export again")
    return record, files


def add_to_manifest(folder: Path, names: Iterable[str]) -> None:
    """List further files of an export in its manifest, so that they count as a part of it."""
    record, files = read_manifest(folder)
    record["files"] = files | {name: file_hash(folder / name) for name in names}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(folder / MANIFEST)


def not_ours(folder: Path) -> str | None:
    """Why a directory is not, or is no longer, what repedit wrote; None where it is: nothing is lost that cannot be made again."""
    try:
        record, files = read_manifest(folder)
    except NotFound:
        return f"it is not an export of repedit, it holds no {MANIFEST}"
    except CheckpointError as error:
        return f"it cannot be told whether repedit wrote it: {error}"
    there = entries(folder)
    expected = files if record.get("card") is None else files | {CARD: str(record["card"])}
    foreign = [name for name in there if name not in files and name not in (MANIFEST, CARD)]
    if foreign or not files:
        return f"it holds files that are not of the export: {_listed(foreign)}"
    changed = [
        name
        for name, status in there.items()
        if name in expected and (not stat.S_ISREG(status.st_mode) or _hash(folder / name, status) != expected[name])
    ]
    return f"files were changed since they were exported: {_listed(changed)}" if changed else None


# While it is written.


@contextmanager
def workplace(out: Path, job: str = "", *, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside the target, held by this process alone and removed whatever happens short of a kill.

    A job with a name finds there what it had finished when it was killed. What other jobs left there is removed.

    Raises:
        TargetExists: if another export to the same target is under way, or it may not be replaced.
        CheckpointError: if the disk is full or refuses, nothing being left behind.
    """
    with _typed(out, "nothing was written"):
        parents = [folder for folder in out.parents if not folder.exists()]
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with _claimed(out) as place:
                _put_back(out, place)
                try:
                    _check_free(out, overwrite)
                    _mark(place, job)
                    yield place
                finally:
                    _clear(place)
        finally:
            for folder in parents:
                with suppress(OSError):  # it holds the result
                    folder.rmdir()


def install(new: Path, out: Path, *, overwrite: bool = False) -> None:
    """Put a whole directory in the target's place by one rename, if the target is still free or may still be replaced.

    Raises:
        TargetExists: if something was put there meanwhile; it stays, and the new directory is kept beside it, under a name
            that the message says.
    """
    aside = new.parent / _ASIDE
    try:
        _check_free(out, overwrite)
        if out.exists() and any(out.iterdir()):
            out.rename(aside)
            reason = not_ours(aside)  # again, now that nobody finds it by its name
            if reason:
                raise TargetExists(f"{out} is not replaced: {reason}")
        new.rename(out)  # replaces nothing but an empty directory: the system refuses everything else
    except BaseException as error:  # an interrupt too: the old checkpoint must not go with the temporary directory
        if aside.exists():
            _rename_free(aside, out)
        if isinstance(error, RepeditError) or (isinstance(error, OSError) and error.errno in _TAKEN):
            beside = _rename_free(new, out)
            raise TargetExists(
                f"{out} was taken while the export ran: {error}; it was left as it is, and the export is whole in {beside}"
            ) from error
        raise


def sync(folder: Path) -> None:
    """Have every file of a folder, and of the folders in it, on the disk."""
    for name in entries(folder):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


# The parts of a check.


def _absolute(target: str | Path) -> Path:
    """The target by the real path of its parent and its own name, so that every way to write it is one."""
    path = Path(target)
    if any(ord(character) < 32 or character == "\x7f" for character in str(path)):
        raise ArgumentError(
            f"the target {str(path)!r} has control characters in its name, such as a line break; give another name"
        )
    try:
        path = path.expanduser()
        return path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"the target {path} cannot be found: {error}; give another target") from error


def _real(path: str | Path) -> Path:
    """A path behind all links; links that lead back to themselves stay, which `Path.resolve` does not allow."""
    return Path(os.path.realpath(user_path(path)))


def _check_parent(out: Path) -> None:
    if out == out.parent:
        return
    nearest = next(folder for folder in out.parents if folder.exists() or folder == folder.parent)
    reason = None
    if not nearest.is_dir():
        reason = f"{nearest} is not a directory"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = f"{nearest} is not writable"
    elif (longest := max(len(os.fsencode(part)) for part in out.relative_to(nearest).parts)) > _name_limit(nearest):
        reason = f"a name of {longest} bytes is too long, {_name_limit(nearest)} are allowed"
    if reason:
        raise CheckpointError(f"{out} cannot be written: {reason}; give another target")


def _name_limit(folder: Path) -> int:
    return os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255


def _check_apart(out: Path, origin: Path, source: Path) -> None:
    """Compared as the system does: links and, where it does not tell them apart, capitals are seen through."""
    if any(_same(folder, origin) for folder in (out, *_real(out).parents)) or any(
        _same(out, folder) for folder in origin.parents
    ):
        raise TargetExists(
            f"the target {out} and the source {source} are the same or one lies inside the other; give another target"
        )


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse whatever stands at the target, but for an empty directory and, on request, an export of ours."""
    kind = _kind(out)
    if kind is None:
        return
    for name, place in _standing_places().items():
        if any(_same(out, folder) for folder in (place, *place.parents)):
            raise TargetExists(f"{out} is {name} or lies above it, and is never replaced; give another target")
    if kind != "a directory":
        raise TargetExists(f"{out} is {kind} and is never replaced; give another target")
    if os.path.ismount(out):
        raise TargetExists(f"{out} is where a disk is mounted and cannot be replaced; give a directory inside it")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise TargetExists(
            f"{out} exists; pass overwrite=True to replace it if it is an earlier export, or give another target"
        )
    reason = not_ours(out)
    if reason:
        raise TargetExists(f"{out} is not replaced: {reason}; move it away, or give another target")


def _standing_places() -> dict[str, Path]:
    places = {}
    for name, find in (("the current directory", Path.cwd), ("your home directory", Path.home)):
        with suppress(OSError, RuntimeError):  # one that was deleted is not the target
            places[name] = find().resolve()
    return places


def _kind(path: Path) -> str | None:
    """What stands at a path, links and special files unopened; None where nothing does."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        if error.errno in NOWHERE:
            return None
        raise
    return "a directory" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _hash(path: Path, status: os.stat_result) -> str:
    """sha256 of a file, computed once for each state of it."""
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if key not in _hashes:
        _hashes[key] = file_hash(path)
    return _hashes[key]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none is its"


@contextmanager
def _typed(out: Path, consequence: str = "nothing was written") -> Iterator[None]:
    """What the system and safetensors say, as an error of repedit.

    Raises:
        CheckpointError: with the target and the reason.
    """
    from safetensors import SafetensorError

    try:
        yield
    except RepeditError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"writing {out} failed: {error}; {consequence}") from error


# The workplace.


def _place(out: Path) -> Path:
    """Where a target is made: one place for each target, whatever its name is long."""
    name = out.name if len(os.fsencode(out.name)) < 200 else sha256(os.fsencode(out.name)).hexdigest()
    return out.parent / f".{name}.partial-export"


def _is_ours(place: Path) -> bool:
    """Whether a directory is a workplace that repedit made: it holds its mark, or nothing but its lock yet."""
    if _kind(place) != "a directory":
        return False
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        return bool(json.loads((place / _MARK).read_text(encoding="utf-8")).get("repedit") == "unfinished export")
    with suppress(FileNotFoundError):  # removed this moment by the one who made it
        return all(path.name == _LOCK and not path.stat().st_size for path in place.iterdir())
    return True


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """The workplace of a target, held by nobody else. The system releases it when a process dies."""
    place, lock = _place(out), None
    while lock is None:
        with suppress(FileExistsError):
            place.mkdir()
        if _kind(place) is not None and not _is_ours(place):
            raise TargetExists(
                f"{place} is in the way, and repedit did not make it; move it away, or give another target"
            )
        lock = _lock(place / _LOCK, out)
    try:
        yield place
    finally:
        if not (place / _MARK).exists():  # nothing is left to go on from
            _remove_empty(place)
        lock.release()


def _lock(path: Path, out: Path) -> FileLock | None:
    """The lock at a path, held; None if the file was removed by its last holder before it was locked here.

    Raises:
        TargetExists: if it is held elsewhere.
    """
    try:
        # An open file keeps its number to itself: a file of that number at the end is the one that was there all the time.
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        lock = FileLock(path, blocking=False)
        lock.acquire()
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), path.stat()):
                return lock
        lock.release()
        return None
    except (FileNotFoundError, FileExistsError):  # filelock makes the folder anew where it was removed this moment
        return None
    except Timeout as error:
        raise TargetExists(f"{out} is being written by another export; wait for it, or give another target") from error
    finally:
        os.close(number)


def _mark(place: Path, job: str) -> None:
    """Say whose a workplace is; what a job of another name left there is removed."""
    mark = {"repedit": "unfinished export", "job": job}
    with suppress(OSError, ValueError):
        if job and json.loads((place / _MARK).read_text(encoding="utf-8")) == mark:
            return
    for name in _OURS:
        _remove(place / name)
    (place / _MARK).write_text(json.dumps(mark), encoding="utf-8")


def _put_back(out: Path, place: Path) -> None:
    """Put back a target that was moved aside by an export that was killed before the new one stood in its place."""
    aside = place / _ASIDE
    if aside.exists() and (not os.path.lexists(out) or not_ours(aside)):
        _rename_free(aside, out)
    _discard(place)


def _rename_free(folder: Path, out: Path) -> Path:
    """Rename a directory to the first free name among out, out-2, out-3, ...; returns it."""
    for count in range(1, 1000):
        free = out if count == 1 else out.with_name(f"{out.name}-{count}")
        if not os.path.lexists(free):
            try:
                folder.rename(free)
                return free
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
    raise CheckpointError(f"{out.parent} has no free name beside {out.name}; what was written is in {folder}")


def _clear(place: Path) -> None:
    """Remove a workplace; what somebody else put into it stays, and so does the directory then."""
    _discard(place)
    for name in _OURS:
        _remove(place / name)
    _remove_empty(place)


def _remove_empty(place: Path) -> None:
    with suppress(OSError):
        (place / _LOCK).unlink(missing_ok=True)
        place.rmdir()


def _discard(place: Path) -> None:
    """Remove the target that was replaced, under another name first: one that a kill left half removed must not come back."""
    _remove(place / _DISCARDED)
    if (place / _ASIDE).exists():
        (place / _ASIDE).rename(place / _DISCARDED)
        _remove(place / _DISCARDED)


def _remove(path: Path) -> None:
    if _kind(path) == "a directory":
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _raise(error: OSError) -> None:
    raise error
