"""Write an edited checkpoint that standard transformers can load.

Every worker has at most a few tensors in memory. The target appears complete, by one rename: a crash leaves it absent, and the same
export then continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch

from repedit.arch import Architecture, Specs, match_layout
from repedit.arch.storage import StoredSpecs
from repedit.arguments import checked
from repedit.distributed import usable_cores
from repedit.edit import Edit
from repedit.errors import ArgumentError, CheckpointError, NoOpEdit, NotSliceable, NotSlimmable, is_whole
from repedit.escaping import for_terminal
from repedit.io.checkpoint import INDEX, FileStates, Shards, check_unchanged, file_states, open_shards
from repedit.io.files import can_hard_link, file_hash, sharing_between
from repedit.io.safetensors import floating_dtype
from repedit.io.targets import CARD, MANIFEST, check_space, check_target, install, staging_folder, sync_files
from repedit.io.text import read_json
from repedit.lower import Change, EditOrDelta, check_model, lower, stages
from repedit.models.dequantization import forget_conversions
from repedit.models.loading import auto_class, changed_json, check_finite_weights, read_config
from repedit.models.modifications import check_unmodified
from repedit.models.subject import CHANGED_FILES, Origin, Subject
from repedit.plan import LoweringOptions, Plan
from repedit.rewrite.apply import check_editable, no_op_message
from repedit.rewrite.checkpoint_architecture import (
    Matches,
    architecture_of,
    check_computed,
    check_described,
    check_planned,
    checkpoint_directory,
    used_specs,
)
from repedit.rewrite.manifest import (
    Companions,
    Manifest,
    Weights,
    base_card,
    base_of,
    card,
    companions,
    copy_companions,
    manifest,
    used_files,
)
from repedit.rewrite.shards import ShardJournal, job, rewritten_files, write_weights
from repedit.rewrite.slice import slice_plan
from repedit.rewrite.slim import slim_plan
from repedit.rewrite.streaming import ShardWriter

log = logging.getLogger("repedit")
STRUCTURES = ("keep", "slim", "slice")
PlanFunction = Callable[[Architecture, Specs], Plan]
"""(architecture, shape and dtype by tensor name) -> the plan of an export."""


class _Checkpoint(NamedTuple):
    """A checkpoint on disk with the plan that was made for it."""

    plan: Plan
    shards: Shards
    used: StoredSpecs
    """The tensors that its model reads."""
    row: Architecture
    matches: Matches
    """How the tensors match models that were built so far."""


@checked
def export(
    change: Change,
    source: Subject | str | Path,
    target: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    link: bool = True,
    overwrite: bool = False,
    allow_identity: bool = False,
    max_shard_size: int | str = "5GB",
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    workers: int | None = None,
    **options: Unpack[LoweringOptions],
) -> Manifest:
    """Write the edited checkpoint to `target`, a directory that transformers loads without repedit.

    The loaders that can read it are in the result and logged: layers of different widths (layout="ragged") need
    `repedit.load`. Untouched tensors are byte-identical. Files without a touched tensor share their blocks with the source
    on a file system with reflinks, and are hard links where nobody may write the file (`chmod a-w`); otherwise they are
    copied, so that no later write to the source changes the export, or the reverse. The manifest lists hard links. Tokenizer, licence, templates and the other files of the source are copied; what is left out (pickles, code) is in the
    result and logged.

    A model whose weights are unchanged since they were loaded is streamed from its files, in their dtype, even if
    `repedit.load` gave it another one; a model that was changed in memory is written as it is there, and so is a model
    whose delta was trained on weights that were rounded when they were loaded.

    Args:
        source: a Subject, or a checkpoint directory, which is then streamed tensor by tensor.
        dtype: convert every tensor ("bfloat16", say); None keeps each as it is in the files.
        link: share untouched files with the source where that is safe; False always copies.
        overwrite: replace an earlier export, which is kept until the new one is complete; nothing else is ever replaced.
        max_shard_size: size of the shards of a model that has no files yet.
        structure: "keep" every shape; "slim" cuts pruned neurons and heads out (`slimmed`); "slice" narrows an erased
            stream (`sliced`).
        layout, multiple: of the widths, see `slimmed` and `sliced`.
        workers: shards that are written at a time, by default one for each core; memory is bounded by four times the largest
            tensor for each of them. The files do not depend on it.
        options: passed to lowering: tied="untie" | "both", sides="all" | "output", any_model=False | True.
    Raises:
        ArgumentError: if an option is out of range, or does not fit the others.
        TargetExists: if the target exists, is being written, or lies inside or equals the source.
        NoOpEdit: if the edit changes no byte, unless `allow_identity=True`.
        NotFoldable, NotSlimmable, NotSliceable, QuantizedModel: if no weight can equal the edit.
        FingerprintError: if the change was made for other weights, unless `any_model=True`.
        CheckpointError: if the source is damaged, has changed since it was loaded, holds links to files outside it, or is not
            the model of its config, if a model in memory computes something else than its files would, or if the disk is full;
            nothing is left behind.
        UnknownArchitecture: if hooks or replaced methods change what the model computes.
        NotFinite: if a weight is not finite, or would not be in its dtype.
    """
    workers = _workers(workers)
    _check_shard_size(max_shard_size)
    plan_for = partial(structured_plan, change, structure=structure, layout=layout, multiple=multiple, options=options)
    new_dtype = None if dtype is None else floating_dtype(dtype)
    dtype_name = None if new_dtype is None else str(new_dtype).removeprefix("torch.")
    files, states = _source_files(source, plan_for)
    out = check_target(target, overwrite=overwrite, source=files)
    origin = source.origin if isinstance(source, Subject) else None
    row = source.architecture if isinstance(source, Subject) else None
    stored = None if files is None else _plan_checkpoint(files, plan_for, row)
    _check_model(change, source, stored, any_model=options.get("any_model", False))
    key = "" if stored is None else job(stored.plan, stored.shards, new_dtype, link)
    with staging_folder(out, key, overwrite=overwrite) as staging:
        checkpoint = stored or _plan_checkpoint(_save_in_memory(source, staging, max_shard_size), plan_for, row)
        plan, shards, _, row, matches = checkpoint
        directory, new = shards.directory, staging / "checkpoint"
        unchanged = partial(
            check_unchanged, directory, states or file_states(directory), "while it was exported", "export it again"
        )
        others = _companions(shards, origin, streamed=stored is not None)
        new.mkdir(exist_ok=True)
        sharing = sharing_between(directory / "config.json", new) if link else None
        # The values of a model in memory were checked when it was loaded or saved.
        unchecked = frozenset() if isinstance(source, Subject) else frozenset(checkpoint.used.files)
        writer = ShardWriter(plan, shards, checkpoint.used.files, new_dtype, sharing, unchecked)
        weights = _written_weights(writer, others, new, unchanged, workers)
        _check_changes(plan, weights, identity=allow_identity or new_dtype is not None)
        copy_companions(others, new)
        _write_config(directory, new, plan, dtype_name)
        layout_written = match_layout(architecture_of(new, row), used_specs(open_shards(new), row, matches))
        if origin is None and stored is not None:
            origin = Origin(directory)
        base = base_of(shards, origin, others, stored is None)
        loader = auto_class(read_config(new, trust_remote_code=False)).__name__
        record = manifest(plan, weights, base, new, dtype_name, layout_written, loader)
        unchanged()
        text = card(plan, record, base_card(directory if stored or not origin else origin.path))
        (new / CARD).write_text(text, encoding="utf-8")
        record = replace(record, card=file_hash(new / CARD))
        (new / MANIFEST).write_text(record.to_json(), encoding="utf-8")
        sync_files(new)
        install(new, out, overwrite=overwrite)
    _log_result(record, out, others, structure)
    return record


def dry_run(
    change: Change,
    source: Subject | str | Path,
    *,
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    **options: Unpack[LoweringOptions],
) -> str:
    """A description of what `export` would do with these arguments; of files, only the headers are read.

    Raises:
        NotFoldable, NotSlimmable, NotSliceable, QuantizedModel, CheckpointError: as `export`.
    """
    plan_for = partial(structured_plan, change, structure=structure, layout=layout, multiple=multiple, options=options)
    files, _ = _source_files(source, plan_for)
    if files is None:
        assert isinstance(source, Subject)
        return plan_for(source.architecture, source.specs).summary(source.specs)
    row = source.architecture if isinstance(source, Subject) else None
    plan, shards, *_ = _plan_checkpoint(files, plan_for, row)
    rewritten = rewritten_files(plan, shards)
    sizes = {file: (shards.directory / file).stat().st_size for file in shards.files}
    return (
        f"{plan.summary(shards.specs)}\n{len(rewritten)} of {len(sizes)} files rewritten, "
        f"{sum(sizes[file] for file in rewritten) / 1e9:.2f} of {sum(sizes.values()) / 1e9:.2f} GB; the others are shared or copied"
    )


def structured_plan(
    change: Change,
    architecture: Architecture,
    specs: Specs,
    *,
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    options: LoweringOptions | None = None,
) -> Plan:
    """The plan of a change for the structure that the checkpoint is written in.

    Args:
        structure: "keep" every shape; "slim": cut pruned neurons and heads out; "slice": narrow an erased stream.
        layout: of "slim", see `slimmed`.
        multiple: what a width must be a multiple of; None is 8 for "slim" and 1 for "slice".
        options: passed to lowering.
    Raises:
        ArgumentError: if an option does not belong to the structure.
        NotFoldable, NotSlimmable, NotSliceable: if the change has no such plan.
    """
    options = options or {}
    if structure not in STRUCTURES:
        raise ArgumentError(f"structure={structure!r} is 'keep', 'slim' or 'slice'")
    if (layout != "uniform" and structure != "slim") or (multiple is not None and structure == "keep"):
        raise ArgumentError(
            f"layout={layout!r}, multiple={multiple} with structure={structure!r}: layout belongs to 'slim', multiple to 'slim' and 'slice'"
        )
    if isinstance(change, Plan):
        if structure not in ("keep", change.structure):
            raise ArgumentError(
                f"the plan has structure {change.structure!r}, {structure!r} was asked for; pass the edit"
            )
        return change
    if structure == "slim":
        edit = _composed_edit(change, structure)
        return slim_plan(
            edit, architecture, specs, layout=layout, multiple=8 if multiple is None else multiple, **options
        )
    if structure == "slice":
        edit = _composed_edit(change, structure)
        return slice_plan(edit, architecture, specs, multiple=1 if multiple is None else multiple, **options)
    return lower(change, architecture, specs, **options)


def _composed_edit(change: EditOrDelta | Sequence[EditOrDelta], structure: str) -> Edit:
    """The composition of several edits; a delta among them is refused."""
    edits: list[Edit] = []
    for stage in stages(change):
        if not isinstance(stage, Edit):
            raise (NotSlimmable if structure == "slim" else NotSliceable)(
                f"a delta changes values and removes nothing that structure={structure!r} could cut; apply it first, and export the edit "
                "of the result"
            )
        edits.append(stage)
    if not edits:
        raise ArgumentError("no edit was given")
    return reduce(or_, edits)


def _workers(workers: int | None) -> int:
    """The number of workers that was asked for, or that of the cores this process may use."""
    if workers is None:
        return usable_cores()
    if not is_whole(workers):
        raise ArgumentError(f"workers={workers!r}; give a number of at least 1, or None for one worker for each core")
    return int(workers)


def _check_shard_size(size: int | str) -> None:
    """Refuse what transformers does not read as a size of shards."""
    match = re.fullmatch(r"(\d+(\.\d+)?) ?([KMGT]I?)B", size, re.IGNORECASE) if isinstance(size, str) else None
    if not is_whole(size) and (match is None or not float(match[1])):
        raise ArgumentError(f"max_shard_size={size!r}; give a size such as '5GB', or a number of bytes")


# --- Where the unedited weights are, and whether they can be edited


def _source_files(source: Subject | str | Path, plan_for: PlanFunction) -> tuple[Path | None, FileStates | None]:
    """The directory of the unedited weights and the state of its files; (None, None) for a model that is only in memory."""
    if not isinstance(source, Subject):
        directory = checkpoint_directory(source)
        return directory, file_states(directory)
    states = file_states(source.source) if source.source is not None and source.source.is_dir() else None
    files = source.unchanged_files()
    if files is None or source.quantizer:  # offloaded weights need not be in memory if they are in the files
        check_editable(source)
    check_unmodified(source.model)
    check_described(source)
    plan = plan_for(source.architecture, source.specs)
    plan.check(source.specs)
    if source.source is not None and files is None:
        log.info(
            "weights were changed in memory since they were read from %s: exporting those in memory", source.source
        )
    if files is not None and _has_trained_delta(plan) and _rounded_at_loading(source, files):
        log.info("the change was trained on weights rounded to %s: exporting those in memory", source.model.dtype)
        files = None
    if files is None:
        check_computed(source)
    return files, None if files is None else states


def _has_trained_delta(plan: Plan) -> bool:
    """Whether a plan holds differences that belong to the exact values they were trained from."""
    return any(operation.start for operations in plan.operations.values() for operation in operations)


def _rounded_at_loading(subject: Subject, files: Path) -> bool:
    """Whether the dtype of the model in memory cannot represent the values in its files."""
    dtype = subject.model.dtype
    stored = {spec.dtype for spec in open_shards(files).specs.values() if spec.dtype.is_floating_point}
    return any(torch.promote_types(other, dtype) != dtype for other in stored)


def _plan_checkpoint(directory: Path, plan_for: PlanFunction, architecture: Architecture | None) -> _Checkpoint:
    """A checkpoint with its plan, made from its headers and checked against them."""
    shards, matches = open_shards(directory), Matches()
    row = architecture_of(directory, architecture)
    used = used_specs(shards, row, matches)
    plan = plan_for(row, used)
    plan.check(used.files)
    check_planned(plan, shards, used, row, matches)
    return _Checkpoint(plan.resolved(shards.read), shards, used, row, matches)


def _check_model(change: Change, source: Subject | str | Path, stored: _Checkpoint | None, *, any_model: bool) -> None:
    """Refuse a change that was made for another model, and files that do not hold the model any more.

    Raises:
        FingerprintError: naming the tensor. CheckpointError: naming the files.
    """
    if isinstance(source, Subject):
        check_model(change, source.value, any_model=any_model)
        if stored is not None:
            _check_touched(source, stored)
    elif stored is not None:
        check_model(change, lambda name: stored.used.read(name, stored.shards.read), any_model=any_model)


def _check_touched(source: Subject, stored: _Checkpoint) -> None:
    """Refuse files whose time of change alone differs since the model was loaded, if they hold other values than the model.

    Raises:
        CheckpointError: naming the files.
    """
    touched, shards, used = source.touched_files(), stored.shards, stored.used
    for name, entry in used.stored.items() if touched else ():
        files = {shards.entries[part].file for part in entry.names} & touched
        value, stored_value = source.value(name), used.read(name, shards.read)
        if files and stored_value is not None and not torch.equal(stored_value.to(value), value):
            raise CheckpointError(
                f"files of {shards.directory} changed {CHANGED_FILES[0]}: {', '.join(sorted(files))}; {CHANGED_FILES[1]}"
            )


def _save_in_memory(subject: Subject | str | Path, staging: Path, max_shard_size: int | str) -> Path:
    """A model in memory, saved unedited by transformers, which knows the names of its tensors on disk."""
    assert isinstance(subject, Subject)
    check_finite_weights(subject.model)
    folder = staging / "unedited"
    check_space(staging, sum(p.nbytes for p in subject.model.parameters()))
    forget_conversions(subject.model)
    with _generation_config(subject.model):
        subject.model.save_pretrained(folder, max_shard_size=max_shard_size)
    if subject.tokenizer is not None:
        subject.tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _generation_config(model: Any) -> Iterator[None]:
    """Lend a model that has none the generation settings that transformers derives from its config; it saves none without."""
    from transformers import GenerationConfig

    if getattr(model, "generation_config", "") is not None:
        yield
        return
    model.generation_config = GenerationConfig.from_model_config(model.config)
    try:
        yield
    finally:
        model.generation_config = None


def _check_changes(plan: Plan, weights: Weights, *, identity: bool) -> None:
    """Refuse other changes than those planned and, unless `identity`, none at all.

    Raises:
        PlanMismatch, NoOpEdit: naming the tensors.
    """
    plan.check_touched(weights.changes.keys())
    if not identity and all(change.before == change.after for change in weights.changes.values()):
        raise NoOpEdit(no_op_message(list(weights.changes)))


def _written_weights(
    writer: ShardWriter, others: Companions, new: Path, unchanged: Callable[[], None], workers: int
) -> Weights:
    """The weights, written to a new directory if the disk has space for all files, or continued there."""
    journal = ShardJournal(new)
    written = sum(path.stat().st_size for path in new.iterdir())
    size = sum(path.stat().st_size for path in others.files.values())
    check_space(new.parent, size + _bytes_to_write(writer) - written)
    return write_weights(writer, new, journal, unchanged, workers=workers)


# --- What is written beside the weights


def _companions(shards: Shards, origin: Origin | None, *, streamed: bool) -> Companions:
    """The files to copy: of the source, or of the directory that a model in memory came from."""
    hub = origin is not None and origin.hub_id is not None
    if streamed or origin is None or not origin.path.is_dir():
        return companions(shards.directory, used_files(shards), trusted=streamed and hub)
    weights = frozenset((INDEX, *(path.name for path in origin.path.glob("*.safetensors"))))
    others = companions(origin.path, weights, trusted=hub)
    own = companions(shards.directory, used_files(shards)).files  # the tokenizer as it is in memory
    return Companions({**others.files, **own}, others.left_out)


def _bytes_to_write(writer: ShardWriter) -> int:
    """The size of the new shards; those that share all their bytes with the source take no space."""
    plan, shards, sharing = writer.plan, writer.shards, writer.sharing
    added = sum(spec.nbytes for spec in plan.added.values())
    added += sum(shards.specs[name].nbytes for name in plan.unties.values())
    files = {file: shards.directory / file for file in shards.files}
    shared = set() if writer.dtype is not None or sharing is None else files.keys() - rewritten_files(plan, shards)
    shared = {file for file in shared if sharing == "reflink" or can_hard_link(files[file])}
    return added + sum(path.stat().st_size for file, path in files.items() if file not in shared)


def _write_config(directory: Path, new: Path, plan: Plan, dtype: str | None) -> None:
    if not plan.config and dtype is None:
        shutil.copyfile(directory / "config.json", new / "config.json")
        return
    config = read_json(directory / "config.json", finite=False)
    changed_json(config, read_config(directory, trust_remote_code=False), plan.config, dtype)
    (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _log_result(record: Manifest, out: Path, others: Companions, structure: str) -> None:
    """Log which loaders read the checkpoint, if not all do, and which files of the source are not part of it."""
    if structure != "keep" or len(record.loaders) == 1:
        log.info("%s is read by %s", out, " and ".join(record.loaders))
    if others.left_out:
        lines = (f"{for_terminal(name)} ({reason})" for name, reason in others.left_out.items())
        log.warning("not part of the export to %s: %s", out, ", ".join(lines))
