"""Write the shards of an edited checkpoint, one tensor in memory at a time, with a journal of those that are finished."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.arch import Specs, TensorSpec
from repedit.errors import CheckpointError
from repedit.hashing import byte_hash, package_versions
from repedit.io.checkpoint import INDEX, SINGLE, Shards
from repedit.io.files import file_hash
from repedit.io.safetensors import header_bytes, raw_bytes
from repedit.io.store import JsonLog
from repedit.plan import Plan, cast_tensor
from repedit.rewrite.certificate import TensorCertificate, certified
from repedit.rewrite.manifest import PACKAGES, TensorChange

_METADATA = {"format": "pt"}
_CHUNK = 1 << 20
"""Numbers compared at a time."""


def write_weights(
    plan: Plan,
    shards: Shards,
    used: Specs,
    target: Path,
    journal: ShardJournal,
    unchanged: Callable[[], None],
    *,
    dtype: torch.dtype | None = None,
    link: bool = True,
) -> dict[str, TensorChange]:
    """Write every shard to `target` with the plan applied; returns the change of each touched tensor.

    A shard in the journal is kept. A shard without touched tensors is linked or copied; a shard with touched tensors is
    copied and their bytes are replaced, while header and offsets stay the same unless a shape or the dtype changes. New
    tensors go to a shard of their own.

    Args:
        unchanged: raises if the source was changed; called before a shard is entered as finished, and at the end.
        used: the tensors that the model reads; the others keep their bytes, whatever the dtype.
    """
    changes: dict[str, TensorChange] = {}
    extra = _extra_tensors(plan, shards)
    files = {file: _shard_name(file, shards, bool(extra)) for file in shards.files}
    for file, name in files.items():
        written = journal.changes(target / name)
        if written is None:
            written = _shard(plan, shards, file, target / name, dtype, link, used)
            unchanged()
            journal.add(target / name, written)
        changes |= written
    names = {tensor: files[entry.file] for tensor, entry in shards.entries.items()}
    specs = {
        tensor: _cast(plan.spec(tensor, spec), dtype if tensor in used else None)
        for tensor, spec in shards.specs.items()
    }
    if extra:
        name = _added_name(set(files.values()), shards.indexed)
        tensors = {key: value if dtype is None else cast_tensor(key, value, dtype) for key, value in extra.items()}
        changes |= {key: _tensor_change(None, value) for key, value in tensors.items()}
        _write_shard(tensors, target / name)
        names |= dict.fromkeys(tensors, name)
        specs |= {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    for head in (
        set(plan.unties) - set(extra) - set(plan.resized)
    ):  # the files already hold the head, which stays as it is
        value = shards.read(head)
        changes[head] = _tensor_change(value, value)
    _write_index(shards, names, specs, target, changed=bool(extra or plan.resized) or dtype is not None)
    return changes


def rewritten_files(plan: Plan, shards: Shards) -> set[str]:
    """The shards that hold a tensor whose values the plan computes."""
    return {shards.entries[name].file for name in plan.rewritten if name in shards.entries}


def _shard_name(file: str, shards: Shards, grows: bool) -> str:
    """The name of a shard in the new checkpoint; a single model.safetensors would hide the index that a second shard needs."""
    return f"model-{1:05d}-of-{2:05d}.safetensors" if grows and not shards.indexed and file == SINGLE else file


def _extra_tensors(plan: Plan, shards: Shards) -> dict[str, Tensor]:
    """New biases, and untied heads that the files do not hold."""
    new = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in plan.added.items()}
    new = {name: plan.apply(name, value, shards.read) for name, value in new.items()}
    heads = {head: embedding for head, embedding in plan.unties.items() if head not in shards.entries}
    untied = {head: shards.read(embedding) for head, embedding in heads.items()}
    return new | {n: plan.apply(n, t, shards.read) if n in plan.resized else t for n, t in untied.items()}


def _added_name(taken: set[str], indexed: bool) -> str:
    """A file name that no shard has; in an export of an export there is such a file already."""
    if not indexed:
        return "model-00002-of-00002.safetensors"
    names = ("model-added.safetensors", *(f"model-added-{n}.safetensors" for n in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _shard(
    plan: Plan, shards: Shards, file: str, target: Path, dtype: torch.dtype | None, link: bool, used: Specs
) -> dict[str, TensorChange]:
    if dtype is not None or any(shards.entries[n].file == file for n in plan.resized if n in shards.entries):
        return _converted(plan, shards, file, target, dtype, used)
    return _patched(plan, shards, file, target, link)


def _patched(plan: Plan, shards: Shards, file: str, target: Path, link: bool) -> dict[str, TensorChange]:
    source = (shards.directory / file).resolve()
    touched = [name for name in plan.rewritten if name in shards.entries and shards.entries[name].file == file]
    if not touched:
        _link_or_copy(source, target, link)
        return {}
    _copy(source, target)
    changes = {}
    with open(target, "r+b") as out:
        for name in touched:
            before = shards.read(name)
            computed = plan.computed(name, before, shards.read)
            after = cast_tensor(name, computed, before.dtype)
            out.seek(shards.entries[name].start)
            out.write(raw_bytes(after))
            changes[name] = _tensor_change(before, after, certified(plan, name, before, after, computed, shards.read))
    return changes


def _converted(
    plan: Plan, shards: Shards, file: str, target: Path, dtype: torch.dtype | None, used: Specs
) -> dict[str, TensorChange]:
    """A shard with a new header, because dtypes or shapes change."""
    names = [name for name, entry in shards.entries.items() if entry.file == file]
    specs = {name: _cast(plan.spec(name, shards.entries[name].spec), dtype if name in used else None) for name in names}
    head, ranges = header_bytes(specs, _METADATA)
    changes = {}
    with open(target, "xb") as out:
        out.write(head)
        for name in sorted(names, key=lambda n: ranges[n][0]):
            before = shards.read(name)
            if name not in plan.rewritten:
                same = specs[name].dtype == before.dtype
                out.write(raw_bytes(before if same else cast_tensor(name, before, specs[name].dtype)))
                continue
            computed = plan.computed(name, before, shards.read)
            after = cast_tensor(name, cast_tensor(name, computed, before.dtype), specs[name].dtype)
            out.write(raw_bytes(after))
            changes[name] = _tensor_change(before, after, certified(plan, name, before, after, computed, shards.read))
    return changes


def _cast(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    return spec if dtype is None or not spec.dtype.is_floating_point else TensorSpec(spec.shape, dtype)


def _write_shard(tensors: Mapping[str, Tensor], target: Path) -> None:
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    head, _ = header_bytes(specs, _METADATA)
    # "x": the name may be a hard link to a file of the source, which must never be opened for writing.
    with open(target, "xb") as out:
        out.write(head)
        for tensor in tensors.values():
            out.write(raw_bytes(tensor))


def _write_index(
    shards: Shards, names: Mapping[str, str], specs: Mapping[str, TensorSpec], target: Path, *, changed: bool
) -> None:
    if not changed and shards.indexed:
        shutil.copyfile(shards.directory / INDEX, target / INDEX)
        return
    if len(set(names.values())) == 1 and not shards.indexed:
        return
    total = {
        "total_size": sum(spec.nbytes for spec in specs.values()),
        "total_parameters": sum(prod(spec.shape) for spec in specs.values()),
    }
    index = {"metadata": total, "weight_map": dict(sorted(names.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _link_or_copy(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without hard links: a copy has the same bytes
    _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    """Copy a file inside the kernel, which shares the blocks on file systems that can."""
    if not hasattr(os, "copy_file_range"):
        shutil.copyfile(source, target)
        return
    with open(source, "rb") as old, open(target, "xb") as new:
        left = os.fstat(old.fileno()).st_size
        try:
            while left:
                done = os.copy_file_range(old.fileno(), new.fileno(), left)
                if not done:
                    raise OSError(errno.EIO, f"{source} ended early")
                left -= done
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
    target.unlink()
    shutil.copyfile(source, target)


def _tensor_change(before: Tensor | None, after: Tensor, certificate: TensorCertificate | None = None) -> TensorChange:
    relative = float("inf")
    if before is not None and before.shape == after.shape:
        relative = _relative(before.reshape(-1), after.reshape(-1))
    return TensorChange(
        relative=relative,
        before=None if before is None else hashlib.sha256(raw_bytes(before)).hexdigest(),
        after=hashlib.sha256(raw_bytes(after)).hexdigest(),
        certificate=certificate,
    )


def _relative(before: Tensor, after: Tensor) -> float:
    """||after - before|| / ||before|| in chunks: differences of half types in float32, sums in float64."""
    work, sums = torch.promote_types(before.dtype, torch.float32), torch.zeros(2, dtype=torch.float64)
    for old, new in zip(before.split(_CHUNK), after.split(_CHUNK), strict=True):
        wide = old.to(work)
        sums += torch.stack([torch.linalg.vector_norm(x) for x in (new.to(work) - wide, wide)]).double().square()
    return float((sums[0] / sums[1].clamp(min=1e-300)).sqrt())


# --- The journal of an export: the finished shards, so that an export that was killed is resumed
#
# A shard is entered once it is on the disk, with its hash and the changes to its tensors. It counts as finished only if the
# file still has that hash and the directory belongs to the same job: the same plan, source files and options.


_TYPES = {"file": str, "sha256": str, "changes": dict}
_REMEDY = "remove it, and export again"


def job(plan: Plan, shards: Shards, dtype: torch.dtype | None, link: bool) -> str:
    """Key of an export: hash of the plan with its values, the state of every source file, the options and the versions."""
    digest = hashlib.sha256()
    _feed(digest.update, plan, {})
    for file in shards.files:
        stat = (shards.directory / file).stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    digest.update(f"{shards.directory.resolve()} {dtype} {link} {[*package_versions(*PACKAGES).values()]}".encode())
    return digest.hexdigest()[:16]


class ShardJournal:
    """The finished shards of one export, in a file beside their folder; every other file in the folder is removed."""

    def __init__(self, shards: Path) -> None:
        self._path = shards.parent / "finished.jsonl"
        self._log = JsonLog(self._path, _TYPES, "the journal of an export", _REMEDY)
        self.hashes: dict[str, str] = {}
        """sha256 of every finished file."""
        self._rows = {row["file"]: row for row in self._log.rows}
        for path in shards.iterdir():
            if path.name not in self._rows:
                path.unlink()

    def changes(self, path: Path) -> dict[str, TensorChange] | None:
        """The changes to the tensors of a shard that is finished and complete; otherwise None, and the file is removed."""
        row = self._rows.get(path.name)
        if row is None:
            return None
        if not path.exists() or file_hash(path) != row["sha256"]:
            path.unlink(missing_ok=True)
            return None
        self.hashes[path.name] = row["sha256"]
        try:
            return {name: _change(plain) for name, plain in row["changes"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._path} is damaged: {error!r}; {_REMEDY}") from error

    def add(self, path: Path, changes: Mapping[str, TensorChange]) -> None:
        """Enter a finished shard, once its bytes are on the disk."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self.hashes[path.name] = file_hash(path)
        rows = {name: asdict(change) for name, change in changes.items()}
        self._log.add({"file": path.name, "sha256": self.hashes[path.name], "changes": rows})


def _change(plain: Mapping[str, Any]) -> TensorChange:
    certificate = plain["certificate"]
    return TensorChange(**{**plain, "certificate": None if certificate is None else TensorCertificate(**certificate)})


def _feed(update: Callable[[bytes], None], value: object, seen: dict[int, bytes]) -> None:
    """Update a hash with a value of a plan: its type, and every part of it; a tensor that many operations share is read once."""
    update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = byte_hash(value)
        update(f"{value.dtype} {tuple(value.shape)}".encode() + seen[id(value)])
    elif is_dataclass(value):
        for field in fields(value):
            update(field.name.encode())
            _feed(update, getattr(value, field.name), seen)
    elif isinstance(value, Mapping):
        for key, item in sorted(value.items(), key=lambda pair: str(pair[0])):
            update(str(key).encode())
            _feed(update, item, seen)
    elif isinstance(value, list | tuple):
        update(str(len(value)).encode())
        for item in value:
            _feed(update, item, seen)
    else:
        update(repr(value).encode())
