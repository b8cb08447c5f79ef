"""Write one shard of an edited checkpoint in one pass: every tensor is read, changed, hashed and written once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from math import prod
from pathlib import Path
from threading import Event, local
from typing import IO

import torch
from torch import Tensor

from repedit.arch import Specs, TensorSpec
from repedit.errors import CheckpointError, RepeditError
from repedit.io.checkpoint import Shards
from repedit.io.files import Sharing, cloned, copy_bytes, file_hash, hard_linked, open_regular
from repedit.io.known_hashes import KnownFile, known_file, remember, settled_state
from repedit.io.safetensors import Entry, header_bytes, raw_bytes, read_fully, read_tensor, stored_tensor
from repedit.linear_maps import not_finite_at
from repedit.plan import Plan, cast_tensor, check_finite_tensor
from repedit.rewrite.certificate import TensorCertificate, certified
from repedit.rewrite.manifest import TensorChange

_METADATA = {"format": "pt"}
_BYTES = 1 << 20
"""Bytes read, hashed and written at a time where a tensor is not changed; they stay in the cache of the processor."""
_WRITE = 1 << 18
"""Bytes given to the system at a time: Linux looks for large free pages for longer writes, which can cost six times as much."""
_CHUNK = 1 << 20
"""Numbers compared at a time."""


class Stopped(Exception):
    """The export has failed elsewhere, and this shard is not needed any more."""


@dataclass(frozen=True)
class Written:
    """A shard that was written."""

    changes: Mapping[str, TensorChange]
    sha256: str
    source: str
    """sha256 of the shard of the source."""
    hard_link: bool = False
    """Whether it is the file of the source under another name."""


@dataclass(frozen=True)
class ShardWriter:
    """What the shards of one export have in common; several threads may write different shards at a time."""

    plan: Plan
    shards: Shards
    used: Specs
    """The tensors that the model reads; the others keep their bytes, whatever the dtype."""
    dtype: torch.dtype | None = None
    sharing: Sharing | None = None
    """How files that are not touched share their bytes with the source; None copies them."""
    unchecked: frozenset[str] = frozenset()
    """Tensors that nobody has yet found to be finite."""
    memory: local = field(default_factory=local)
    """Of each thread."""
    stop: Event = field(default_factory=Event)
    """Once it is set, every shard that is being written ends with `Stopped`."""

    def write(self, file: str, target: Path) -> Written:
        """Write a shard with the plan applied; it is on the disk when this returns.

        Header and offsets stay the same unless a shape or the dtype changes.

        Raises:
            NotFinite, CheckpointError: naming the tensor.
        """
        entries = {name: entry for name, entry in self.shards.entries.items() if entry.file == file}
        convert = self.dtype is not None or any(name in self.plan.resized for name in entries)
        path = self.shards.directory / file
        record, state, all_checked = known_file(path), settled_state(path), entries.keys() <= self.unchecked
        writer = replace(self, unchecked=frozenset()) if record is not None and record.finite else self
        sha256 = None if record is None else record.sha256
        written = (writer._converted if convert else writer._patched)(file, entries, target, sha256)
        if record is None or (all_checked and not record.finite):
            remember(path, state, KnownFile(written.source, all_checked))
        with open(target, "rb") as new:
            os.fsync(new.fileno())
        return written

    def _patched(self, file: str, entries: Mapping[str, Entry], target: Path, source_hash: str | None) -> Written:
        path = self.shards.directory / file
        touched = [name for name in self.plan.rewritten if name in entries]
        linked = not touched and self.sharing == "hard link" and hard_linked(path.resolve(), target)
        with ExitStack() as stack:
            old = stack.enter_context(open_regular(path))
            new = None if linked else stack.enter_context(open(target, "xb"))
            shared = new is None or (self.sharing == "reflink" and cloned(old, new))
            if source_hash is not None and not touched and not self.unchecked & entries.keys():
                self._check_running()
                if new is not None and not shared:
                    copy_bytes(old, new, path)
                return Written({}, source_hash, source_hash, linked)
            copy = _Copy(old, new, shared, source_hash, bool(touched))
            changes = self._streamed(path, entries, frozenset(touched), copy)
        return Written({name: changes[name] for name in touched if name in changes}, *copy.hashes, hard_link=linked)

    def _streamed(
        self, path: Path, entries: Mapping[str, Entry], touched: frozenset[str], copy: _Copy
    ) -> dict[str, TensorChange]:
        """Pass every byte of a shard through a copy; the changes to the tensors that are touched."""
        changes, part = {}, torch.empty(_BYTES, dtype=torch.uint8)
        memory = self._memory() if touched else None
        self._pass(path, "the header", None, 0, min(entry.start for entry in entries.values()), part, copy)
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
            with _named(name, path):
                self._check_running()
                if name not in touched:
                    dtype = entry.spec.dtype if name in self.unchecked else None
                    self._pass(path, name, dtype, entry.start, entry.stop, part, copy)
                    continue
                assert memory is not None
                data = memory.before[: entry.stop - entry.start]
                read_fully(copy.old, data.numpy().data, path, name, entry.start)
                before = stored_tensor(data, entry.spec)
                after, changes[name] = self._changed(name, before, before.dtype, memory)
                copy.differ(raw_bytes(before), raw_bytes(after))
        return changes

    def _pass(
        self, path: Path, name: str, dtype: torch.dtype | None, start: int, stop: int, part: Tensor, copy: _Copy
    ) -> None:
        """Pass bytes that stay the same through a copy; with a dtype, refuse numbers that are not finite."""
        for at in range(start, stop, len(part)):
            self._check_running()
            data = part[: min(len(part), stop - at)]
            view = data.numpy().data
            read_fully(copy.old, view, path, name, at)
            if dtype is not None and not_finite_at(data.view(dtype)) is not None:
                self._check_finite(name, self.shards.read(name))  # whose message has the index in the whole tensor
            copy.same(view)

    def _converted(self, file: str, entries: Mapping[str, Entry], target: Path, source_hash: str | None) -> Written:
        """A shard with a new header, because dtypes or shapes change."""
        path = self.shards.directory / file
        specs = {
            n: cast_spec(self.plan.spec(n, e.spec), self.dtype if n in self.used else None) for n, e in entries.items()
        }
        head, _ = header_bytes(specs, _METADATA)
        starts = [entry.start for entry in entries.values()]
        changes, read, written = {}, hashlib.sha256(), hashlib.sha256(head)
        # The tensors are read in the order of the new header; where the bytes have another order, they are hashed apart.
        source_hash = source_hash if source_hash or starts == sorted(starts) else file_hash(path)
        with open_regular(path) as old, open(target, "xb") as new:
            new.write(head)
            read.update(old.read(min(starts)))
            for name, entry in entries.items():
                with _named(name, path):
                    self._check_running()
                    before = read_tensor(old, path, name, entry)
                    if name in self.plan.rewritten:
                        after, changes[name] = self._changed(name, before, specs[name].dtype)
                    else:
                        self._check_finite(name, before)
                        same = specs[name].dtype == before.dtype
                        after = before if same else cast_tensor(name, before, specs[name].dtype)
                    if source_hash is None:
                        read.update(raw_bytes(before))
                    data = raw_bytes(after)
                    written.update(data)
                    _write(new, data)
        return Written(changes, written.hexdigest(), source_hash or read.hexdigest())

    def _changed(
        self, name: str, before: Tensor, dtype: torch.dtype, memory: _Memory | None = None
    ) -> tuple[Tensor, TensorChange]:
        """A tensor after the plan, rounded to its dtype and converted to another one, and the record of its change."""
        self._check_finite(name, before)
        computed = self.plan.computed(name, before, self.shards.read, None if memory is None else memory.work)
        after = cast_tensor(name, computed, before.dtype, None if memory is None else memory.after_like(before))
        after = after if dtype == before.dtype else cast_tensor(name, after, dtype)
        certificate = certified(self.plan, name, before, after, computed, self.shards.read)
        return after, tensor_change(before, after, certificate)

    def _memory(self) -> _Memory:
        """Room for the largest tensor that is touched, the same for all shards that a thread writes."""
        if not hasattr(self.memory, "room"):
            entries = self.shards.entries
            self.memory.room = _Memory([entries[name].spec for name in self.plan.rewritten if name in entries])
        room: _Memory = self.memory.room
        return room

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        if name in self.unchecked:
            check_finite_tensor(f"tensor {name!r} of {self.shards.directory}", tensor)

    def _check_running(self) -> None:
        if self.stop.is_set():
            raise Stopped


def write_tensors(tensors: Mapping[str, Tensor], target: Path) -> str:
    """Write tensors to a new file; its sha256."""
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    head, _ = header_bytes(specs, _METADATA)
    digest = hashlib.sha256(head)
    # "x": the name may be a hard link to a file of the source, which must never be opened for writing.
    with open(target, "xb") as out:
        out.write(head)
        for tensor in tensors.values():
            data = raw_bytes(tensor)
            digest.update(data)
            _write(out, data)
    return digest.hexdigest()


def cast_spec(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    """The spec of a tensor whose numbers are converted to a dtype."""
    return spec if dtype is None or not spec.dtype.is_floating_point else TensorSpec(spec.shape, dtype)


def tensor_change(before: Tensor | None, after: Tensor, certificate: TensorCertificate | None = None) -> TensorChange:
    """The record of a change; `before` is None for a tensor that is new."""
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


class _Memory:
    """Room for one tensor before, during and after its change, used again for the next: fresh pages cost as much as hashing."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        size = max((spec.nbytes for spec in specs), default=0)
        # float64 and integers are computed in memory of their own.
        half = [spec for spec in specs if spec.dtype.is_floating_point and spec.dtype != torch.float64]
        self.before, self._after = (torch.empty(size, dtype=torch.uint8) for _ in range(2))
        self.work = torch.empty(max((prod(spec.shape) for spec in half), default=0), dtype=torch.float32)

    def after_like(self, before: Tensor) -> Tensor:
        """Room for a tensor of the same shape and dtype."""
        return stored_tensor(self._after[: before.nbytes], TensorSpec(tuple(before.shape), before.dtype))


class _Copy:
    """A file that is read once, from its first byte to its last, while another one is written, and the hashes of both.

    Args:
        new: the other file; None if it is the same file.
        shared: whether the other file holds the bytes already.
        source_hash: sha256 of the file that is read, if it is known.
        changes: whether any byte will differ.
    """

    def __init__(
        self, old: BufferedReader, new: IO[bytes] | None, shared: bool, source_hash: str | None, changes: bool
    ) -> None:
        self.old = old
        self._new, self._shared, self._source_hash, self._changes = new, shared, source_hash, changes
        self._at = 0
        self._read = hashlib.sha256()
        """Of the bytes read; up to the first byte that differs also of those written."""
        self._written: hashlib._Hash | None = None

    def same(self, data: memoryview) -> None:
        """The next bytes of both files."""
        if self._source_hash is None or (self._changes and self._written is None):
            self._read.update(data)
        if self._written is not None:
            self._written.update(data)
        if not self._shared and self._new is not None:
            _write(self._new, data)
        self._at += len(data)

    def differ(self, old: memoryview, new: memoryview) -> None:
        """The next bytes of the file that is read, and as many bytes that the other one has in their place."""
        assert self._new is not None and len(old) == len(new)
        if self._written is None:
            self._written = self._read.copy()
        if self._source_hash is None:
            self._read.update(old)
        self._written.update(new)
        if self._shared:
            self._new.seek(self._at)
        _write(self._new, new)
        self._at += len(new)

    @property
    def hashes(self) -> tuple[str, str]:
        """sha256 of the file that was written, and of the one that was read."""
        source = self._source_hash or self._read.hexdigest()
        return source if self._written is None else self._written.hexdigest(), source


def _write(file: IO[bytes], data: memoryview) -> None:
    for start in range(0, len(data), _WRITE):
        file.write(data[start : start + _WRITE])


@contextmanager
def _named(name: str, path: Path) -> Iterator[None]:
    """Add the name of a tensor to errors that do not have it.

    Raises:
        RepeditError: of the same type. CheckpointError: for errors of other libraries. OSError: with its number.
    """
    place = f"tensor {name!r} of {path.name}"
    try:
        yield
    except Stopped:
        raise
    except RepeditError as error:
        if name in str(error):
            raise
        raise type(error)(f"{error} ({place})") from error
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} ({place})") from error
    except Exception as error:
        raise CheckpointError(f"{place} could not be exported: {type(error).__name__}: {error}") from error
