"""Write an edited checkpoint that plain transformers can load."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repedit.arch import Architecture, Specs, match_layout
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    NoOpEdit,
    NotFound,
    NotSliceable,
    NotSlimmable,
    PlanMismatch,
)
from repedit.escaping import for_terminal
from repedit.io.checkpoint import INDEX, FileStates, Shards, check_unchanged, file_states, open_shards
from repedit.io.files import file_hash, is_folder, user_path
from repedit.io.safetensors import floating
from repedit.io.targets import CARD, MANIFEST, check_space, check_target, install, sync, workplace
from repedit.io.text import read_json
from repedit.lower import EditOrDelta, check_model, lower, read_by_name
from repedit.models.loading import check_finite_weights
from repedit.models.subject import Origin, Subject
from repedit.plan import Plan, check_finite_tensor
from repedit.rewrite.apply import check_editable, noop_message
from repedit.rewrite.checkpoint_architecture import architecture_of, check_described, check_planned, used_specs
from repedit.rewrite.companions import Companions, companions, copy_companions, used_files
from repedit.rewrite.manifest import Change, Manifest, base_card, base_of, card, manifest
from repedit.rewrite.shards import ShardJournal, job, write_weights
from repedit.rewrite.slice import slice_plan
from repedit.rewrite.slim import slim_plan

# --- The plan of a change for each structure a checkpoint can be written in: as it was, slimmed or sliced


STRUCTURES = ("keep", "slim", "slice")


def structured(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    architecture: Architecture,
    specs: Specs,
    *,
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that carries a change out in a structure.

    Args:
        structure: "keep" every shape; "slim": cut pruned neurons and heads out; "slice": narrow an erased stream.
        layout: of "slim", see `slimmed`.
        multiple: what a width must be a multiple of; None is 8 for "slim" and 1 for "slice".
        options: passed to lowering.
    Raises:
        ArgumentError: if an option does not belong to the structure.
        NotFoldable, NotSlimmable, NotSliceable: if the change cannot be carried out so.
    """
    options = dict(options or {})
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
        edit = _composed(change, structure)
        return slim_plan(
            edit, architecture, specs, layout=layout, multiple=8 if multiple is None else multiple, **options
        )
    if structure == "slice":
        edit = _composed(change, structure)
        return slice_plan(edit, architecture, specs, multiple=1 if multiple is None else multiple, **options)
    return lower(change, architecture, specs, **options)


def _composed(change: EditOrDelta | Sequence[EditOrDelta], structure: str) -> Edit:
    """One edit."""
    found: Edit | None = None
    for stage in [change] if not isinstance(change, Sequence) else change:
        if not isinstance(stage, Edit):
            raise (NotSlimmable if structure == "slim" else NotSliceable)(
                f"a delta changes values and removes nothing that structure={structure!r} could cut; apply it first, and export the edit "
                "of the result"
            )
        found = stage if found is None else found | stage
    if found is None:
        raise ArgumentError("no edit was given")
    return found


# --- Write an edited checkpoint that plain transformers can load
#
# At most a few tensors are in memory. The target appears whole, by one rename: a crash leaves it absent, and the same export
# goes on where it was.


log = logging.getLogger("repedit")


def export(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    source: Subject | str | Path,
    target: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    link: bool = True,
    overwrite: bool = False,
    allow_identity: bool = False,
    max_shard_size: str = "5GB",
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    **options: Any,
) -> Manifest:
    """Write the edited checkpoint to `target`, a directory that AutoModelForCausalLM loads without repedit.

    Which loaders can read it is in the result and logged: layers of different widths (layout="ragged") need `repedit.load`.
    Untouched tensors are byte-identical; shards without a touched tensor are hard links where possible. Tokenizer, licence,
    templates and the other files of the source go along; what does not (pickles, code) is in the result and logged.

    A model whose weights are as they were loaded is streamed from its files, in their dtype, also where `repedit.load` gave
    it another one; one that was changed in memory is written as it is there. A delta that was trained on weights rounded at
    loading is written so too.

    Args:
        source: a Subject, or a checkpoint directory, which is then streamed tensor by tensor.
        dtype: convert every tensor ("bfloat16", say); None keeps each as it is in the files.
        link: hard-link untouched files of one file system; False always copies.
        overwrite: replace an earlier export, which is kept until the new one is whole; nothing else is ever replaced.
        max_shard_size: size of the shards of a model that has no files yet.
        structure: "keep" every shape; "slim" cuts pruned neurons and heads out (`slimmed`); "slice" narrows an erased
            stream (`sliced`).
        layout, multiple: of the widths, see `slimmed` and `sliced`.
        options: passed to lowering: tied="untie" | "both", sides="all" | "output", any_model=False | True.
    Raises:
        TargetExists: if the target exists, is being written, or lies inside or equals the source.
        NoOpEdit: if the edit changes no byte, unless `allow_identity=True`.
        NotFoldable, NotSlimmable, NotSliceable, QuantizedModel: if no weight can equal the edit.
        FingerprintError: if the change was made for other weights, unless `any_model=True`.
        CheckpointError: if the source is damaged, has changed since it was loaded, holds links that leave it, or is not the
            model of its config, or if the disk is full; nothing is left behind.
        NotFinite: if a weight is not finite, or would not be in its dtype.
    """
    plan_for = partial(structured, change, structure=structure, layout=layout, multiple=multiple, options=options)
    to = None if dtype is None else floating(dtype)
    dtype = None if to is None else str(to).removeprefix("torch.")
    files, states = _files_of(source, plan_for)
    out = check_target(target, overwrite=overwrite, source=files)
    origin = source.origin if isinstance(source, Subject) else None
    ready = None if files is None else _prepared(files, plan_for)
    _check_source(change, source, None if ready is None else ready[1:], any_model=bool(options.get("any_model")))
    with workplace(out, "" if ready is None else job(*ready[:2], to, link), overwrite=overwrite) as place:
        plan, shards, used = ready or _prepared(_saved(source, place, max_shard_size), plan_for)
        directory = shards.directory
        unchanged = partial(
            check_unchanged, directory, states or file_states(directory), "while it was exported", "export it again"
        )
        others = _companions(shards, origin, streamed=ready is not None)
        new = place / "checkpoint"
        new.mkdir(exist_ok=True)
        journal = ShardJournal(new)
        there = sum(path.stat().st_size for path in new.iterdir())
        size = sum(path.stat().st_size for path in others.files.values())
        check_space(place, size + _bytes_to_write(plan, shards, place, to, link) - there)
        changes = write_weights(plan, shards, used, new, journal, unchanged, dtype=to, link=link)
        _check_changes(plan, changes, allow_identity, dtype)
        copy_companions(others, new)
        _write_config(directory, new, plan, dtype, identity=not plan.config and dtype is None)
        made = match_layout(architecture_of(new), used_specs(open_shards(new)))
        if origin is None and ready is not None:
            origin = Origin(directory)
        record = manifest(
            plan, changes, base_of(shards, origin, others, ready is None), new, dtype, made, journal.hashes
        )
        unchanged()
        text = card(plan, record, base_card(directory if ready or not origin else origin.path))
        (new / CARD).write_text(text, encoding="utf-8")
        record = replace(record, card=file_hash(new / CARD))
        (new / MANIFEST).write_text(record.to_json(), encoding="utf-8")
        sync(new)
        install(new, out, overwrite=overwrite)
    _log_loaders(record, out, others, structure)
    return record


def dry_run(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    source: Subject | str | Path,
    *,
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    **options: Any,
) -> str:
    """What `export` would do with these arguments, in words; of files, only the headers are read.

    Raises:
        NotFoldable, NotSlimmable, NotSliceable, QuantizedModel, CheckpointError: as `export`.
    """
    plan_for = partial(structured, change, structure=structure, layout=layout, multiple=multiple, options=options)
    files, _ = _files_of(source, plan_for)
    if files is None:
        assert isinstance(source, Subject)
        return plan_for(source.architecture, source.specs).summary(source.specs)
    plan, shards, _ = _prepared(files, plan_for)
    touched = {shards.entries[name].file for name in plan.rewritten if name in shards.entries}
    sizes = {file: (shards.directory / file).stat().st_size for file in shards.files}
    return (
        f"{plan.summary(shards.specs)}\n{len(touched)} of {len(sizes)} files rewritten, "
        f"{sum(sizes[file] for file in touched) / 1e9:.2f} of {sum(sizes.values()) / 1e9:.2f} GB; the others are linked"
    )


def _files_of(source: Subject | str | Path, plan_for: Callable[..., Plan]) -> tuple[Path | None, FileStates | None]:
    """The directory that holds the unedited weights, and the state of its files; None for a model that is only in memory."""
    if not isinstance(source, Subject):
        directory = _directory(source)
        return directory, file_states(directory)
    states = file_states(source.source) if source.source is not None and source.source.is_dir() else None
    files = source.unchanged_files()
    if files is None or source.quantizer:  # weights that are put off are in the files all the same
        check_editable(source)
    check_described(source)
    plan = plan_for(source.architecture, source.specs)
    plan.check(source.specs)
    if source.source is not None and files is None:
        log.info(
            "weights were changed in memory since they were read from %s: exporting those in memory", source.source
        )
    if files is not None and _trained(plan) and _rounded(source, files):
        log.info("the change was trained on weights rounded to %s: exporting those in memory", source.model.dtype)
        files = None
    return files, None if files is None else states


def _trained(plan: Plan) -> bool:
    """Whether a plan holds differences that belong to the very values they were trained from."""
    return any(getattr(operation, "start", None) for several in plan.operations.values() for operation in several)


def _rounded(subject: Subject, files: Path) -> bool:
    """Whether the dtype that was asked for at loading cannot hold what is in the files."""
    stored = {spec.dtype for spec in open_shards(files).specs.values() if spec.dtype.is_floating_point}
    return any(torch.promote_types(dtype, subject.model.dtype) != subject.model.dtype for dtype in stored)


def _companions(shards: Shards, origin: Origin | None, *, streamed: bool) -> Companions:
    """What goes along: of the source, or of the directory that a model in memory once came from."""
    hub = origin is not None and origin.hub_id is not None
    if streamed or origin is None or not origin.path.is_dir():
        return companions(shards.directory, used_files(shards), trusted=streamed and hub)
    weights = frozenset((INDEX, *(path.name for path in origin.path.glob("*.safetensors"))))
    others = companions(origin.path, weights, trusted=hub)
    own = companions(shards.directory, used_files(shards)).files  # the tokenizer as it is in memory
    return Companions({**others.files, **own}, others.left_out)


def _prepared(directory: Path, plan_for: Callable[..., Plan]) -> tuple[Plan, Shards, Specs]:
    """The plan for a checkpoint, made from its headers and checked against them, the checkpoint, and the tensors its model reads."""
    shards = open_shards(directory)
    used = used_specs(shards)
    plan = plan_for(architecture_of(directory), used)
    plan.check(used)
    check_planned(plan, shards, used)
    return plan.resolved(shards.read), shards, used


def _check_source(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    source: Subject | str | Path,
    files: tuple[Shards, Specs] | None,
    *,
    any_model: bool,
) -> None:
    """Refuse files that are not finite, as `load` does, and a change that was made for another model.

    Raises:
        NotFinite, FingerprintError: with the tensor.
    """
    if isinstance(source, Subject):  # its values were checked as it was loaded
        check_model(change, source.value, any_model=any_model)
    elif files is not None:
        shards, used = files
        _check_finite_shards(shards, used)
        read = read_by_name(architecture_of(shards.directory), shards.specs, shards.read)
        check_model(change, read, any_model=any_model)


def _log_loaders(record: Manifest, out: Path, others: Companions, structure: str) -> None:
    """Say who reads the checkpoint, where that is not everybody, and what of the source is not part of it."""
    if structure != "keep" or len(record.loaders) == 1:
        log.info("%s is read by %s", out, " and ".join(record.loaders))
    if others.left_out:
        lines = (f"{for_terminal(name)} ({reason})" for name, reason in others.left_out.items())
        log.warning("not part of the export to %s: %s", out, ", ".join(lines))


def _check_finite_shards(shards: Shards, used: Specs) -> None:
    """Refuse weights that are NaN or infinite, as `load` does.

    Raises:
        NotFinite: with the first place.
    """
    for name in used:
        check_finite_tensor(f"tensor {name!r} of {shards.directory}", shards.read(name))


def _saved(subject: Any, place: Path, max_shard_size: str) -> Path:
    """A model in memory saved as it is, by transformers, which knows the names its tensors have on disk."""
    check_finite_weights(subject.model)
    folder = place / "unedited"
    check_space(place, sum(p.nbytes for p in subject.model.parameters()))
    subject.model.save_pretrained(folder, max_shard_size=max_shard_size)
    if subject.tokenizer is not None:
        subject.tokenizer.save_pretrained(folder)
    return folder


def _directory(source: str | Path) -> Path:
    path = user_path(source)
    if is_folder(path):
        return path.absolute()
    from repedit.models.default_model import DEFAULT, cached

    if str(source) == DEFAULT:
        return cached()
    raise NotFound(
        f"{path.absolute()} is not a directory; a hub id is exported by loading it first: export(edit, rp.load(...), target)"
    )


def _bytes_to_write(plan: Plan, shards: Shards, place: Path, dtype: torch.dtype | None, link: bool) -> int:
    """What the new shards take: files that are hard links take nothing."""
    linked = link and dtype is None and shards.directory.stat().st_dev == place.stat().st_dev
    touched = {shards.entries[name].file for name in plan.rewritten if name in shards.entries}
    added = sum(spec.nbytes for spec in plan.added.values())
    added += sum(shards.specs[name].nbytes for name in plan.unties.values())
    files = touched if linked else shards.files
    return added + sum((shards.directory / file).stat().st_size for file in files)


def _check_changes(plan: Plan, changes: dict[str, Change], allow_identity: bool, dtype: str | None) -> None:
    if set(changes) != set(plan.touched):
        missed, extra = sorted(plan.touched - set(changes)), sorted(set(changes) - plan.touched)
        raise PlanMismatch(f"planned but untouched: {missed[:5]}; touched but not planned: {extra[:5]}")
    if not allow_identity and dtype is None and all(c.before == c.after for c in changes.values()):
        raise NoOpEdit(noop_message(list(changes)))


def _write_config(directory: Path, new: Path, plan: Plan, dtype: str | None, *, identity: bool) -> None:
    if identity:
        shutil.copyfile(directory / "config.json", new / "config.json")
        return
    config = read_json(directory / "config.json", finite=False) | dict(plan.config)
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    (new / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
