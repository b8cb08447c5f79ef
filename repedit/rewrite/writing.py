"""Write the shards of an edited checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from repedit.arch import Specs, TensorSpec
from repedit.io.checkpoint import INDEX, SINGLE, Shards
from repedit.io.safetensors import header, raw_bytes
from repedit.plan import Plan, rounded
from repedit.rewrite.certificates import TensorCertificate, certified
from repedit.rewrite.manifest import Change
from repedit.rewrite.resuming import Journal

_METADATA = {"format": "pt"}
_PART = 1 << 20
"""Numbers at a time."""


def write_weights(
    plan: Plan,
    shards: Shards,
    used: Specs,
    target: Path,
    journal: Journal,
    unchanged: Callable[[], None],
    *,
    dtype: torch.dtype | None = None,
    link: bool = True,
) -> dict[str, Change]:
    """Write every shard to `target` with the plan carried out; returns what became of each touched tensor.

    A shard that the journal knows is there already. A shard without touched tensors is linked or copied; one with touched tensors is copied and the bytes of those are
    replaced, header and offsets staying as they are, unless a shape or the dtype changes. New tensors go to a shard of
    their own.

    Args:
        unchanged: raises if the source was changed; called before a shard is entered as finished, and at the end.
        used: the tensors that the model reads; the others keep their bytes, whatever the dtype.
    """
    changes: dict[str, Change] = {}
    extra = _extra_tensors(plan, shards)
    files = {file: _renamed(file, shards, bool(extra)) for file in shards.files}
    for file, name in files.items():
        made = journal.known(target / name)
        if made is None:
            made = _shard(plan, shards, file, target / name, dtype, link, used)
            unchanged()
            journal.enter(target / name, made)
        changes |= made
    names = {tensor: files[entry.file] for tensor, entry in shards.entries.items()}
    specs = {
        tensor: _cast(plan.spec(tensor, spec), dtype if tensor in used else None)
        for tensor, spec in shards.specs.items()
    }
    if extra:
        name = _added_name(set(files.values()), shards.indexed)
        tensors = {key: value if dtype is None else rounded(key, value, dtype) for key, value in extra.items()}
        changes |= {key: _change(None, value) for key, value in tensors.items()}
        _write_shard(tensors, target / name)
        names |= dict.fromkeys(tensors, name)
        specs |= {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in tensors.items()}
    for head in set(plan.unties) - set(extra) - set(plan.resized):  # the files hold it already, and keep it
        kept = shards.read(head)
        changes[head] = _change(kept, kept)
    _write_index(shards, names, specs, target, changed=bool(extra or plan.resized) or dtype is not None)
    return changes


def _renamed(file: str, shards: Shards, grows: bool) -> str:
    """A lone model.safetensors would hide the index that a second shard needs."""
    return f"model-{1:05d}-of-{2:05d}.safetensors" if grows and not shards.indexed and file == SINGLE else file


def _extra_tensors(plan: Plan, shards: Shards) -> dict[str, Tensor]:
    new = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in plan.added.items()}
    new = {name: plan.apply(name, value, shards.read) for name, value in new.items()}
    heads = {head: embedding for head, embedding in plan.unties.items() if head not in shards.entries}
    kept = {head: shards.read(embedding) for head, embedding in heads.items()}
    return new | {n: plan.apply(n, t, shards.read) if n in plan.resized else t for n, t in kept.items()}


def _added_name(taken: set[str], indexed: bool) -> str:
    """A file name that no shard has: an export of an export has such a file already."""
    if not indexed:
        return "model-00002-of-00002.safetensors"
    names = ("model-added.safetensors", *(f"model-added-{n}.safetensors" for n in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)


def _shard(
    plan: Plan, shards: Shards, file: str, target: Path, dtype: torch.dtype | None, link: bool, used: Specs
) -> dict[str, Change]:
    if dtype is not None or any(shards.entries[n].file == file for n in plan.resized if n in shards.entries):
        return _converted(plan, shards, file, target, dtype, used)
    return _patched(plan, shards, file, target, link)


def _patched(plan: Plan, shards: Shards, file: str, target: Path, link: bool) -> dict[str, Change]:
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
            after = rounded(name, computed, before.dtype)
            out.seek(shards.entries[name].start)
            out.write(raw_bytes(after))
            changes[name] = _change(before, after, certified(plan, name, before, after, computed, shards.read))
    return changes


def _converted(
    plan: Plan, shards: Shards, file: str, target: Path, dtype: torch.dtype | None, used: Specs
) -> dict[str, Change]:
    """A shard written anew, because dtypes or shapes change."""
    names = [name for name, entry in shards.entries.items() if entry.file == file]
    specs = {name: _cast(plan.spec(name, shards.entries[name].spec), dtype if name in used else None) for name in names}
    head, ranges = header(specs, _METADATA)
    changes = {}
    with open(target, "xb") as out:
        out.write(head)
        for name in sorted(names, key=lambda n: ranges[n][0]):
            before = shards.read(name)
            if name not in plan.rewritten:
                same = specs[name].dtype == before.dtype
                out.write(raw_bytes(before if same else rounded(name, before, specs[name].dtype)))
                continue
            computed = plan.computed(name, before, shards.read)
            after = rounded(name, rounded(name, computed, before.dtype), specs[name].dtype)
            out.write(raw_bytes(after))
            changes[name] = _change(before, after, certified(plan, name, before, after, computed, shards.read))
    return changes


def _cast(spec: TensorSpec, dtype: torch.dtype | None) -> TensorSpec:
    return spec if dtype is None or not spec.dtype.is_floating_point else TensorSpec(spec.shape, dtype)


def _write_shard(tensors: Mapping[str, Tensor], target: Path) -> None:
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    head, _ = header(specs, _METADATA)
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
    """The bytes of a file, copied by the system; shared until they change where the file system can."""
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


def _change(before: Tensor | None, after: Tensor, proof: TensorCertificate | None = None) -> Change:
    relative = float("inf")
    if before is not None and before.shape == after.shape:
        relative = _relative(before.reshape(-1), after.reshape(-1))
    return Change(
        relative=relative,
        before=None if before is None else hashlib.sha256(raw_bytes(before)).hexdigest(),
        after=hashlib.sha256(raw_bytes(after)).hexdigest(),
        certificate=proof,
    )


def _relative(before: Tensor, after: Tensor) -> float:
    """||after - before|| / ||before||, a part at a time: differences of half types in float32, sums in float64."""
    work, sums = torch.promote_types(before.dtype, torch.float32), torch.zeros(2, dtype=torch.float64)
    for old, new in zip(before.split(_PART), after.split(_PART), strict=True):
        wide = old.to(work)
        sums += torch.stack([torch.linalg.vector_norm(x) for x in (new.to(work) - wide, wide)]).double().square()
    return float((sums[0] / sums[1].clamp(min=1e-300)).sqrt())
