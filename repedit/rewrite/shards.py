"""Write the shards of an edited checkpoint, several at a time, with a journal of those that are finished."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, is_dataclass
from math import prod
from pathlib import Path
from threading import Thread, current_thread
from typing import Any

import torch
from torch import Tensor

from repedit.arch import TensorSpec
from repedit.distributed import completed
from repedit.errors import CheckpointError
from repedit.hashing import byte_hash, package_versions
from repedit.io.checkpoint import INDEX, SINGLE, Shards
from repedit.io.files import file_hash, file_state
from repedit.io.store import JsonLog
from repedit.plan import Plan, cast_tensor
from repedit.rewrite.certificate import TensorCertificate
from repedit.rewrite.manifest import PACKAGES, TensorChange, Weights
from repedit.rewrite.streaming import ShardWriter, Written, cast_spec, tensor_change, write_tensors


def write_weights(
    writer: ShardWriter, target: Path, journal: ShardJournal, unchanged: Callable[[], None], *, workers: int = 1
) -> Weights:
    """Write every shard to `target` with the plan applied.

    A shard in the journal is kept. A shard without touched tensors shares its bytes with the source or is copied. New tensors
    go to a shard of their own.

    Args:
        unchanged: raises if the source was changed; called before a shard is entered as finished, and at the end.
        workers: shards that are written at a time; the files do not depend on it.
    """
    plan, shards, dtype = writer.plan, writer.shards, writer.dtype
    extra = _extra_tensors(plan, shards)
    files = {file: _shard_name(file, shards, bool(extra)) for file in shards.files}
    written = _write_shards(writer, {file: target / name for file, name in files.items()}, journal, unchanged, workers)
    changes = {tensor: change for file in files for tensor, change in written[file].changes.items()}
    hashes = {name: written[file].sha256 for file, name in files.items()}
    names = {tensor: files[entry.file] for tensor, entry in shards.entries.items()}
    specs = {
        tensor: cast_spec(plan.spec(tensor, spec), dtype if tensor in writer.used else None)
        for tensor, spec in shards.specs.items()
    }
    if extra:
        name = _added_name(set(files.values()), shards.indexed)
        tensors = {key: value if dtype is None else cast_tensor(key, value, dtype) for key, value in extra.items()}
        changes |= {key: tensor_change(None, value) for key, value in tensors.items()}
        hashes[name] = write_tensors(tensors, target / name)
        names |= dict.fromkeys(tensors, name)
        specs |= {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    for head in (
        set(plan.unties) - set(extra) - set(plan.resized)
    ):  # the files already hold the head, which stays as it is
        value = shards.read(head)
        changes[head] = tensor_change(value, value)
    _write_index(shards, names, specs, target, changed=bool(extra or plan.resized) or dtype is not None)
    sources = {file: written[file].source for file in files}
    return Weights(changes, hashes, sources, tuple(sorted(files[file] for file in files if written[file].hard_link)))


def _write_shards(
    writer: ShardWriter,
    targets: Mapping[str, Path],
    journal: ShardJournal,
    unchanged: Callable[[], None],
    workers: int,
) -> dict[str, Written]:
    """Write the shards that the journal does not have, in several threads; after an error all of them end.

    Threads are enough: hashes, files and torch release the lock of the interpreter.
    """
    written = {file: entry for file, path in targets.items() if (entry := journal.written(path)) is not None}
    missing = [file for file in targets if file not in written]
    grad, threads = torch.is_grad_enabled(), set[Thread]()

    def write(file: str) -> Written:
        threads.add(current_thread())
        with torch.set_grad_enabled(grad):  # a thread begins with the default
            return _shard(writer, file, targets[file])

    # In a forked process, torch replaces its own pool at the first call; threads that race to do it fail with "Invalid thread pool".
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor(max(1, min(workers, len(missing))), thread_name_prefix="export") as pool:
        try:
            futures = {pool.submit(write, file): file for file in missing}
            for future in completed(futures):
                file, result = futures[future], future.result()
                unchanged()
                journal.add(targets[file], result)
                written[file] = result
        except BaseException:  # an interrupt too, which only the main thread gets
            writer.stop.set()
            pool.shutdown(cancel_futures=True)
            for thread in threads:  # an interrupt while a thread is started keeps it from the pool
                thread.join()
            raise
    return written


def _shard(writer: ShardWriter, file: str, target: Path) -> Written:
    return writer.write(file, target)


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


# --- The journal of an export: the finished shards, so that an export that was killed is resumed
#
# A shard is entered once it is on the disk, with its hash and the changes to its tensors. It counts as finished only if the
# file still has that hash and the directory belongs to the same job: the same plan, source files and options.


_TYPES = {"file": str, "sha256": str, "source": str, "hard_link": bool, "changes": dict}
_REMEDY = "remove it, and export again"


def job(plan: Plan, shards: Shards, dtype: torch.dtype | None, link: bool) -> str:
    """Key of an export: hash of the plan with its values, the state of every source file, the options and the versions."""
    digest = hashlib.sha256(repr(sorted(_TYPES)).encode())  # of another version, whose journal has other fields
    _feed(digest.update, plan, {})
    for file in shards.files:
        digest.update(os.fsencode(file) + f" {file_state(shards.directory / file)}".encode())
    digest.update(os.fsencode(shards.directory.resolve()))
    digest.update(f"{dtype} {link} {[*package_versions(*PACKAGES).values()]}".encode())
    return digest.hexdigest()[:16]


class ShardJournal:
    """The finished shards of one export, in a file beside their folder; everything else in the folder is removed."""

    def __init__(self, shards: Path) -> None:
        self._path = shards.parent / "finished.jsonl"
        self._log = JsonLog(self._path, _TYPES, "the journal of an export", _REMEDY)
        self._rows = {row["file"]: row for row in self._log.rows}
        for path in shards.iterdir():
            if path.is_dir():  # of companions, which are copied once the shards are finished
                shutil.rmtree(path)
            elif path.name not in self._rows:
                path.unlink()

    def written(self, path: Path) -> Written | None:
        """A shard that is finished and complete; otherwise None, and the file is removed."""
        row = self._rows.get(path.name)
        if row is None:
            return None
        if not path.exists() or file_hash(path) != row["sha256"]:
            path.unlink(missing_ok=True)
            return None
        try:
            changes = {name: _change(plain) for name, plain in row["changes"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self._path} is damaged: {error!r}; {_REMEDY}") from error
        return Written(changes, row["sha256"], row["source"], row["hard_link"])

    def add(self, path: Path, written: Written) -> None:
        """Enter a finished shard, whose bytes are on the disk."""
        changes = {name: asdict(change) for name, change in written.changes.items()}
        row = {"file": path.name, "sha256": written.sha256, "source": written.source, "hard_link": written.hard_link}
        self._log.add({**row, "changes": changes})


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
