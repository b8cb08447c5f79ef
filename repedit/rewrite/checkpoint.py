"""Write an edited checkpoint that plain transformers can load.

At most a few tensors are in memory. The target appears whole, by one rename: a crash leaves it absent.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repedit.arch import resolve
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    NoOpEdit,
    NotFound,
    PlanMismatch,
    QuantizedModel,
    TargetExists,
)
from repedit.lower import lower
from repedit.models import Subject
from repedit.plan import Plan
from repedit.rewrite.live import noop_message, planned
from repedit.rewrite.manifest import Change, Manifest, card, manifest
from repedit.rewrite.writing import write_weights
from repedit.shards import Shards, open_shards

# Weights of other formats, optimiser states and adapters are not part of an exported checkpoint.
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".lock")
_REPLACED = {"model.safetensors.index.json", "README.md", "repedit.json", "config.json"}


def export(
    change: Edit | Plan,
    source: Subject | str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    link: bool = True,
    overwrite: bool = False,
    allow_identity: bool = False,
    max_shard_size: str = "5GB",
    **options: Any,
) -> Manifest:
    """Write the edited checkpoint to `target`, a directory that AutoModelForCausalLM loads without repedit.

    Untouched tensors are byte-identical; shards without a touched tensor are hard links where possible.

    Args:
        source: a Subject, or a checkpoint directory, which is then streamed tensor by tensor.
        dtype: convert every tensor ("bfloat16", say); None keeps each as it is.
        link: hard-link untouched files of one file system; False always copies.
        overwrite: replace an existing target, which is kept until the new one is whole.
        max_shard_size: size of the shards of a model that has no files yet.
        options: passed to lowering: tied="untie" | "both", sides="all" | "output".
    Raises:
        TargetExists: if the target exists, or lies inside or equals the source.
        NoOpEdit: if the edit changes no byte, unless `allow_identity=True`.
        NotFoldable, QuantizedModel: if no weight can equal the edit.
        CheckpointError: if the source is damaged or the disk is full; nothing is left behind.
    """
    out = Path(target).absolute()
    with _workplace(out, overwrite) as place, _files_of(source, place, max_shard_size, change, options) as directory:
        if out == directory or out.is_relative_to(directory):
            raise TargetExists(f"the target {out} is the source {directory}, or lies inside it; give another target")
        shards = open_shards(directory)
        config = _config(directory)
        plan = _plan(change, config, shards, options)
        _check_space(shards, place)
        new = place / "checkpoint"
        new.mkdir()
        changes = write_weights(plan, shards, new, dtype=_dtype(dtype), link=link)
        _check_changes(plan, changes, allow_identity, dtype)
        _copy_others(directory, new)
        _write_config(directory, new, plan, dtype, identity=not plan.config and dtype is None)
        record = manifest(plan, changes, directory, new, dtype)
        (new / "README.md").write_text(card(plan, record, directory))
        (new / "repedit.json").write_text(record.to_json())
        _sync(new)
        _install(new, out, overwrite)
    return record


@dataclass(frozen=True)
class _Config:
    architecture: Any
    raw: dict[str, Any]


@contextmanager
def _workplace(out: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of the target, removed whatever happens."""
    if out.exists() and not overwrite:
        raise TargetExists(f"{out} exists; pass overwrite=True to replace it, or give another target")
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        yield place
    except OSError as error:
        if isinstance(error, CheckpointError | TargetExists | NotFound):
            raise
        raise CheckpointError(f"writing {out} failed: {error}; nothing was written") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _files_of(
    source: Subject | str | Path, place: Path, max_shard_size: str, change: Edit | Plan, options: Any
) -> Iterator[Path]:
    """The directory that holds the unedited weights; a model in memory is saved first, which gives the right names."""
    if not isinstance(source, Subject):
        yield _directory(source)
        return
    planned(change, source, **options)
    if source.source is not None:
        yield source.source.absolute()
        return
    folder = place / "unedited"
    source.model.save_pretrained(folder, max_shard_size=max_shard_size)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    yield folder


def _directory(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.absolute()
    from repedit.fetching import DEFAULT, cached

    if str(source) == DEFAULT:
        return cached()
    raise NotFound(
        f"{path.absolute()} is not a directory; a hub id is exported by loading it first: export(edit, rp.load(...), target)"
    )


def _config(directory: Path) -> _Config:
    from transformers import AutoConfig

    raw = json.loads((directory / "config.json").read_text())
    quantizer = raw.get("quantization_config")
    if quantizer:
        raise QuantizedModel(
            f"{directory} is quantised ({quantizer.get('quant_method', 'unknown')}) and cannot be edited exactly; export from the "
            "unquantised base. Measuring works"
        )
    return _Config(resolve(AutoConfig.from_pretrained(directory, trust_remote_code=False)), raw)


def _plan(change: Edit | Plan, config: _Config, shards: Shards, options: Any) -> Plan:
    plan = change if isinstance(change, Plan) else lower(change, config.architecture, shards.specs, **options)
    plan.check(shards.specs)
    return plan


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(f"dtype={name!r} is not a floating dtype; give 'float32', 'bfloat16' or 'float16'")
    return found


def _check_space(shards: Shards, place: Path) -> None:
    need = sum((shards.directory / file).stat().st_size for file in shards.files)
    free = shutil.disk_usage(place).free
    if free < need:
        raise CheckpointError(
            f"the disk of {place.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {need / 1e9:.1f} GB; nothing was written"
        )


def _check_changes(plan: Plan, changes: dict[str, Change], allow_identity: bool, dtype: str | None) -> None:
    if set(changes) != set(plan.touched):
        missed, extra = sorted(plan.touched - set(changes)), sorted(set(changes) - plan.touched)
        raise PlanMismatch(f"planned but untouched: {missed[:5]}; touched but not planned: {extra[:5]}")
    if not allow_identity and dtype is None and all(c.before == c.after for c in changes.values()):
        raise NoOpEdit(noop_message(list(changes)))


def _copy_others(directory: Path, new: Path) -> None:
    for path in sorted(directory.iterdir()):
        if (
            path.is_file()
            and path.suffix not in _LEFT_OUT
            and path.name not in _REPLACED
            and not path.name.startswith(".")
        ):
            shutil.copyfile(path.resolve(), new / path.name)


def _write_config(directory: Path, new: Path, plan: Plan, dtype: str | None, *, identity: bool) -> None:
    if identity:
        shutil.copyfile(directory / "config.json", new / "config.json")
        return
    config = json.loads((directory / "config.json").read_text()) | dict(plan.config)
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _sync(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _install(new: Path, out: Path, overwrite: bool) -> None:
    aside = new.parent / "replaced"
    if overwrite and out.exists():
        out.rename(aside)
    try:
        new.rename(out)
    except OSError:
        if aside.exists():
            aside.rename(out)
        raise
