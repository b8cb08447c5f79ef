"""Output paths: checked before work begins, locked while they are written, and checked again when the result is renamed.

A directory appears complete, by one rename: after a crash its target is absent or unchanged. What repedit did not write
is never replaced: a file added to an export, a link, a special file, a home directory or a mounted disk.
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
from repedit.io.files import ABSENT, cached_hash, file_hash, user_path
from repedit.io.text import read_json

MANIFEST, CARD = "repedit.json", "README.md"
"""The record of an export, which lists its files with their hashes; and the model card, which people may edit."""
HASH = "sha256"
"""The algorithm of the hashes in a manifest; the hub names its files by the same hashes."""
_REPLACED, _DISCARDED, _LOCK, _MARK = "replaced", "discarded", "repedit.lock", "unfinished-export.json"
_STAGED = ("checkpoint", "adapter", "unedited", "finished.jsonl", _DISCARDED, _MARK)
"""What repedit writes in a staging folder; anything else in it belongs to somebody else and stays."""
_KINDS = {stat.S_IFREG: "a file", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


# --- Before work begins


def check_target(target: str | Path, *, overwrite: bool = False, source: str | Path | None = None) -> Path:
    """The absolute path of a directory that may be written; refused if something would be lost. Nothing is written yet.

    Call it before work begins; `install` checks again when the result is renamed.

    Args:
        overwrite: allow an earlier export whose files are unchanged. An empty directory is always allowed.
        source: directory that is read; neither may contain the other.
    Raises:
        TargetExists: if something else is there, or another process is writing it.
        CheckpointError: if nothing can be written there. ArgumentError: if the name cannot be one.
    """
    out = _absolute(target)
    with _typed_errors(out):
        _check_parent(out)
        if source is not None:
            _check_apart(out, _real(source), Path(source))
        if _is_staging_folder(_staging_path(out)):
            with _locked_staging(out) as staging:  # refused if another process is writing
                _restore_replaced(out, staging)
        _check_free(out, overwrite)
    return out


def check_file_target(target: str | Path, *, overwrite: bool = True) -> Path:
    """The absolute path of a file that may be written, behind all links: absent, or a regular file that may be replaced.

    Raises:
        TargetExists: if a directory or a special file is there, or a file and overwrite is False.
        CheckpointError: if nothing can be written there. ArgumentError: if the name cannot be one.
    """
    out = _absolute(target)
    with _typed_errors(out):
        out = _real(out)
        _check_parent(out)
        kind = _kind_of(out)
        if kind not in (None, "a file"):
            raise TargetExists(f"{out} is {kind}, where a file is to be written; give another target")
        if kind is not None and not overwrite:
            raise TargetExists(f"{out} exists; pass overwrite=True to replace it, or give another target")
    return out


def check_folder(target: str | Path | None, *ours: str, read: tuple[str | Path, ...] = ()) -> None:
    """Refuse a folder for pages and findings unless it is absent, empty, or holds one of the expected files.

    Args:
        ours: names of files that a folder of this kind holds; without any, it may hold anything.
        read: paths that are read, none of which may be the folder.
    Raises:
        TargetExists: if it holds something else, or is read. CheckpointError: if nothing can be written there.
    """
    if target is None:
        return
    out = _real(_absolute(target))
    with _typed_errors(out):
        if any(_real(path) == out for path in read):
            raise TargetExists(f"the target {target} is read by this command; give another target")
        _check_parent(out)
        kind = _kind_of(out)
        if kind is not None and not out.is_dir():
            raise TargetExists(f"{out} is {kind}, where a folder is to be written; give another target")
        if kind is not None and not os.access(out, os.W_OK | os.X_OK):
            raise CheckpointError(f"{out} cannot be written: it is read-only; give another target")
        if kind is not None and ours and any(out.iterdir()) and not any((out / name).exists() for name in ours):
            raise TargetExists(f"{out} holds something else than {' or '.join(ours)}; give another target")


def check_space(folder: Path, need: int) -> None:
    """Refuse to write more bytes than the disk has free.

    Raises:
        CheckpointError: naming both numbers.
    """
    free = shutil.disk_usage(folder).free
    if free < need:
        raise CheckpointError(
            f"the disk of {folder.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {need / 1e9:.1f} GB; nothing was written"
        )


# --- The files of an export


def folder_entries(folder: Path) -> dict[str, os.stat_result]:
    """Files, links and special files below a folder, none of them opened, by their relative paths."""
    statuses = {}
    for root, folders, files in os.walk(folder, onerror=_raise):
        for name in (*files, *folders):
            path = Path(root, name)
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                statuses[path.relative_to(folder).as_posix()] = status
    return dict(sorted(statuses.items()))


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest of a directory, and the hash of each file it lists.

    Raises:
        NotFound: if there is none. CheckpointError: if it is damaged, or names files outside the directory.
    """
    path = folder / MANIFEST
    if _kind_of(path) != "a file":
        raise NotFound(f"{folder.absolute()} holds no {MANIFEST}; give a directory that repedit exported")
    record = read_json(path, finite=False, remedy="export again")
    if record.get("hash", HASH) != HASH:
        raise CheckpointError(
            f"{path.absolute()} holds hashes of the algorithm {record['hash']!r}, this version of repedit computes {HASH}; install a newer "
            "version, or export again"
        )
    files = record.get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise CheckpointError(f"{path.absolute()} is not a manifest with hashes of files; export again")
    for name in files:
        if not name or name != PurePosixPath(name).as_posix() or {"", ".", "..", "/"} & set(PurePosixPath(name).parts):
            raise CheckpointError(f"{path.absolute()} names {name!r}, which is no file of its directory; export again")
    return record, files


def add_to_manifest(folder: Path, names: Iterable[str]) -> None:
    """List further files in the manifest of an export, so that they count as part of it."""
    record, files = read_manifest(folder)
    record["files"] = files | {name: file_hash(folder / name) for name in names}
    draft = folder / f"{MANIFEST}.draft"
    draft.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    times = (folder / MANIFEST).stat()
    os.utime(
        draft, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # files that changed since it was written stay newer than it
    draft.replace(folder / MANIFEST)


def reason_to_keep(folder: Path) -> str | None:
    """Why a directory must not be replaced: it is not, or no longer, what repedit wrote; None if it is and may be made again."""
    try:
        record, files = read_manifest(folder)
    except NotFound:
        return f"it is not an export of repedit, it holds no {MANIFEST}"
    except CheckpointError as error:
        return f"it cannot be told whether repedit wrote it: {error}"
    present = folder_entries(folder)
    expected = files if record.get("card") is None else files | {CARD: str(record["card"])}
    foreign = [name for name in present if name not in files and name not in (MANIFEST, CARD)]
    if foreign or not files:
        return f"it holds files that are not of the export: {_listing(foreign)}"
    changed = [
        name
        for name, status in present.items()
        if name in expected and (not stat.S_ISREG(status.st_mode) or cached_hash(folder / name) != expected[name])
    ]
    return f"files were changed since they were exported: {_listing(changed)}" if changed else None


# --- While a directory is written


@contextmanager
def staging_folder(out: Path, job: str = "", *, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside the target, locked by this process and removed at the end unless the process is killed.

    A job with a name finds there what it had finished before a kill. What other jobs left there is removed.

    Raises:
        TargetExists: if another export to the same target is under way, or it may not be replaced.
        CheckpointError: if the disk is full or cannot be written; nothing is left behind.
    """
    with _typed_errors(out, "nothing was written"):
        parents = [folder for folder in out.parents if not folder.exists()]
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with _locked_staging(out) as staging:
                _restore_replaced(out, staging)
                try:
                    _check_free(out, overwrite)
                    _mark_job(staging, job)
                    yield staging
                finally:
                    _clear(staging)
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
    aside = new.parent / _REPLACED
    try:
        _check_free(out, overwrite)
        if out.exists() and any(out.iterdir()):
            out.rename(aside)
            reason = reason_to_keep(aside)  # again, now that nobody finds it by its name
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


def sync_files(folder: Path) -> None:
    """Flush every file below a folder to the disk."""
    for name in folder_entries(folder):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


# --- Parts of the checks


def _absolute(target: str | Path) -> Path:
    """The target by the real path of its parent and its own name, so that different spellings are equal."""
    try:
        path = Path(target)
    except TypeError as error:
        raise ArgumentError(f"the target {str(target)[:60]!r} cannot be a path: {error}; give another name") from error
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
    """Compared as the file system does, behind links and, where it ignores case, in any case."""
    if any(_same(folder, origin) for folder in (out, *_real(out).parents)) or any(
        _same(out, folder) for folder in origin.parents
    ):
        raise TargetExists(
            f"the target {out} and the source {source} are the same or one lies inside the other; give another target"
        )


def _check_free(out: Path, overwrite: bool) -> None:
    """Refuse whatever exists at the target, except an empty directory and, with overwrite, an unchanged export."""
    kind = _kind_of(out)
    if kind is None:
        return
    for name, protected in _protected_folders().items():
        if any(_same(out, folder) for folder in (protected, *protected.parents)):
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
    reason = reason_to_keep(out)
    if reason:
        raise TargetExists(f"{out} is not replaced: {reason}; move it away, or give another target")


def _protected_folders() -> dict[str, Path]:
    folders = {}
    for name, find in (("the current directory", Path.cwd), ("your home directory", Path.home)):
        with suppress(OSError, RuntimeError):  # a deleted folder cannot be the target
            folders[name] = find().resolve()
    return folders


def _kind_of(path: Path) -> str | None:
    """What exists at a path, without following links or opening special files; None if nothing does."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    return "a directory" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _listing(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none is its"


@contextmanager
def _typed_errors(out: Path, consequence: str = "nothing was written") -> Iterator[None]:
    """Errors of the system and of safetensors as an error of repedit.

    Raises:
        CheckpointError: naming the target and the reason.
    """
    from safetensors import SafetensorError

    try:
        yield
    except RepeditError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"writing {out} failed: {error}; {consequence}") from error


# --- The staging folder, where a directory is written before it is renamed


def _staging_path(out: Path) -> Path:
    """The staging folder of a target, however long its name is."""
    name = out.name if len(os.fsencode(out.name)) < 200 else sha256(os.fsencode(out.name)).hexdigest()
    return out.parent / f".{name}.partial-export"


def _is_staging_folder(staging: Path) -> bool:
    """Whether a directory is a staging folder of repedit: it holds its mark, or nothing but its lock yet."""
    if _kind_of(staging) != "a directory":
        return False
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        return bool(json.loads((staging / _MARK).read_text(encoding="utf-8")).get("repedit") == "unfinished export")
    with suppress(FileNotFoundError):  # its owner has just removed it
        return all(path.name == _LOCK and not path.stat().st_size for path in staging.iterdir())
    return True


@contextmanager
def _locked_staging(out: Path) -> Iterator[Path]:
    """The staging folder of a target, locked by this process; the system releases the lock of a process that dies."""
    staging, lock = _staging_path(out), None
    while lock is None:
        with suppress(FileExistsError):
            staging.mkdir()
        if _kind_of(staging) is not None and not _is_staging_folder(staging):
            raise TargetExists(
                f"{staging} is in the way, and repedit did not make it; move it away, or give another target"
            )
        lock = _lock(staging / _LOCK, out)
    try:
        yield staging
    finally:
        if not (staging / _MARK).exists():  # nothing is left to resume from
            _remove_empty(staging)
        lock.release()


def _lock(path: Path, out: Path) -> FileLock | None:
    """The lock at a path, acquired; None if its last holder removed the file before it was locked here.

    Raises:
        TargetExists: if it is held elsewhere.
    """
    try:
        # An open file keeps its inode number: if the path has that number at the end, the file was never replaced.
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
    except (FileNotFoundError, FileExistsError):  # filelock creates the folder again if it has just been removed
        return None
    except Timeout as error:
        raise TargetExists(f"{out} is being written by another export; wait for it, or give another target") from error
    finally:
        os.close(number)


def _mark_job(staging: Path, job: str) -> None:
    """Write the name of the job into its staging folder; what another job left there is removed."""
    mark = {"repedit": "unfinished export", "job": job}
    with suppress(OSError, ValueError):
        if job and json.loads((staging / _MARK).read_text(encoding="utf-8")) == mark:
            return
    for name in _STAGED:
        _remove(staging / name)
    (staging / _MARK).write_text(json.dumps(mark), encoding="utf-8")


def _restore_replaced(out: Path, staging: Path) -> None:
    """Restore a target that an export had moved aside when it was killed before the new one was renamed."""
    aside = staging / _REPLACED
    if aside.exists() and (not os.path.lexists(out) or reason_to_keep(aside)):
        _rename_free(aside, out)
    _discard(staging)


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


def _clear(staging: Path) -> None:
    """Remove a staging folder; files of somebody else stay in it."""
    _discard(staging)
    for name in _STAGED:
        _remove(staging / name)
    _remove_empty(staging)


def _remove_empty(staging: Path) -> None:
    with suppress(OSError):
        (staging / _LOCK).unlink(missing_ok=True)
        staging.rmdir()


def _discard(staging: Path) -> None:
    """Remove the replaced target, renamed first: a kill must not leave a half-removed one to be restored."""
    _remove(staging / _DISCARDED)
    if (staging / _REPLACED).exists():
        (staging / _REPLACED).rename(staging / _DISCARDED)
        _remove(staging / _DISCARDED)


def _remove(path: Path) -> None:
    if _kind_of(path) == "a directory":
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _raise(error: OSError) -> None:
    raise error
