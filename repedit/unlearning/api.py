"""rp.unlearn: train the forgetting of some rows and the keeping of others into the weights, and return the difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from repedit.delta import Delta
from repedit.distributed import Ranks, joined_ranks
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    NoOpEdit,
    TargetExists,
    TrainingError,
    check_positive,
    check_seed,
    check_whole,
    is_whole,
)
from repedit.hashing import value_hash
from repedit.io import archive
from repedit.io.files import append, open_regular, write_text
from repedit.io.targets import check_file_target
from repedit.io.text import parse_json
from repedit.models.subject import Subject
from repedit.unlearning import resume as state
from repedit.unlearning.masks import salient
from repedit.unlearning.parameters import Parameters, Trainee
from repedit.unlearning.recipe import Merged, UnlearnRecipe, settled
from repedit.unlearning.reference import Reference, check_vocabulary
from repedit.unlearning.schedule import Stop
from repedit.unlearning.trainer import Training, check_dropout, check_shardable, recompute_blocks
from repedit.unlearning.trainer import shard as divide
from repedit.unlearning.training_data import Material, material


def unlearn(
    subject: Subject,
    *,
    recipe: UnlearnRecipe | Merged,
    forget: Any,
    retain: Any = None,
    update: Any = None,
    reference: Subject | None = None,
    parameters: Parameters | None = None,
    lr: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    length: int | None = None,
    clip: float | None = 1.0,
    seed: int = 0,
    stop: Sequence[Stop] = (),
    checkpoint_every: int | None = None,
    resume: str | Path | None = None,
    log: str | Path | None = None,
    allow_overlap: bool = False,
    shard: bool = False,
    gradient_checkpointing: bool = False,
    dropout: bool = False,
    progress: bool | None = None,
) -> Delta:
    """Train a model to lose the forget set and keep the retain set; the subject itself is never changed.

    Gradient methods mostly hide what they forget: run `rp.audit` on the result before you believe it.

    Under `torchrun`, or in any running process group, the ranks share the rows of each step and all return the same
    Delta, that of one process up to the order of sums; the first of them writes the files.

    Args:
        recipe: from `rp.recipes`; lr, steps, epochs, batch_size, length and parameters override it, `stop` adds rules.
        forget, retain, update: rows or facts (their answers count), a corpus or texts (all of it counts), or a mapping of
            topics to those.
        reference: a model the losses compare with, in place of the start weights.
        micro_batch: rows a forward pass of a rank; gradients add up to those of the whole batch.
        clip: largest norm of the combined gradient; None for no limit.
        checkpoint_every: steps between saved states in `resume`.
        resume: a file the training is saved to on its way, and goes on from where it exists.
        log: a JSONL file that gets one line a step.
        allow_overlap: let forget and retain share rows.
        shard: divide trained copies, gradients and optimiser among the ranks (FSDP2); the subject stays whole on each.
        gradient_checkpointing: compute every block again in the backward pass; less memory, more time, the same result.
        dropout: train with the dropout of the model, drawn from the seed; references are read without it.
    Raises:
        ArgumentError: if a number is out of range, or steps and epochs are both given.
        DataError, OverlapError: if a set is missing, empty or malformed, or the sets overlap.
        SelectionError, ShapeError: if the parameter filter or mask fits nothing, or the reference has another vocabulary.
        QuantizedModel, OffloadedTensors: if the weights cannot be trained.
        TrainingError: if a loss is not finite; its `delta` is the last good state.
        TargetExists, CheckpointError: if `log` or `resume` is something else or cannot be written, before the training; later
            its `delta` is what was trained.
        NoOpEdit: if nothing changed, or rounding to the model's dtype swallows all of it.
        FingerprintError: if `resume` holds another training, or the ranks were given different ones.
    """
    if checkpoint_every is not None and (not is_whole(checkpoint_every) or resume is None):
        raise ArgumentError(
            f"checkpoint_every={checkpoint_every}, resume={resume}: give a file in resume, and at least 1 step"
        )
    _check_files(log, resume)
    check_whole(micro_batch=micro_batch)
    check_positive(clip=clip)
    check_seed(seed=seed)
    data = {"forget": forget, "retain": retain, "update": update, "allow_overlap": allow_overlap}
    changes = dict(parameters=parameters, lr=lr, steps=steps, epochs=epochs, batch_size=batch_size, length=length)  # noqa: C408
    rest = {"reference": reference, "micro_batch": micro_batch, "clip": clip, "seed": seed, "progress": progress}
    rest |= {"shard": shard, "gradient_checkpointing": gradient_checkpointing, "dropout": dropout}
    if isinstance(recipe, Merged):
        return _merged(subject, recipe, data | changes | rest | {"stop": stop}, resume, checkpoint_every, log)
    chosen = _overridden(recipe, changes, stop)
    if reference is not None:
        check_vocabulary(subject, reference)
    rows = material(subject, chosen, **data)
    chosen = _masked(subject, chosen, rows)
    if dropout:
        check_dropout(subject)
    record = _record(subject, reference, chosen, rows, seed, {"clip": clip} | ({"dropout": True} if dropout else {}))
    ranks = joined_ranks(subject.device)
    ranks.check_same(**record, micro_batch=micro_batch, shard=shard)
    training = Training(
        trainee=_trainee(subject, chosen, seed, ranks, shard, gradient_checkpointing),
        reference=Reference(reference or subject, {**rows.rows, "alternative": rows.alternatives.get("forget", [])}),
        material=rows, recipe=chosen, micro_batch=chosen.batch_size if micro_batch is None else micro_batch, clip=clip, seed=seed,
        ranks=ranks, dropout=dropout,
    )  # fmt: skip
    return _trained(training, record, None if resume is None else Path(resume), checkpoint_every, log, progress)


_ROW = b'{"c": '
"""What every line of a log begins with."""


def _check_files(log: str | Path | None, resume: str | Path | None) -> None:
    """Refuse files that cannot be written, or that something else is in, before anything is trained."""
    if log is not None and resume is not None and Path(log).absolute() == Path(resume).absolute():
        raise ArgumentError(f"log and resume are both {log}; give each its own file")
    for path in (Path(path) for path in (log, resume) if path is not None):
        check_file_target(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    if resume is not None:
        archive.check_replaceable(resume)
    if log is not None and Path(log).exists() and Path(log).stat().st_size:
        with open_regular(log) as file:
            first = file.readline(len(_ROW))
        if not _ROW.startswith(first):  # of a log whose writer was killed, the first line may be cut off
            raise TargetExists(f"{log} exists and is not the log of a training; move it away, or give another log")


def _overridden(recipe: UnlearnRecipe, changes: Mapping[str, Any], stop: Sequence[Stop]) -> UnlearnRecipe:
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(recipe, stop=(*recipe.stop, *stop), **settled({}, given))


def _trainee(subject: Subject, recipe: UnlearnRecipe, seed: int, ranks: Ranks, shard: bool, recompute: bool) -> Trainee:
    """What is trained, divided among the ranks and with blocks that are computed again where that is asked for."""
    if shard:
        check_shardable(recipe, ranks.size)
    found = Trainee(subject, recipe.parameters, seed=seed)
    if recompute:
        recompute_blocks(found.subject)
    if shard:
        divide(found)
    return found


def _masked(subject: Subject, recipe: UnlearnRecipe, rows: Material) -> UnlearnRecipe:
    """The recipe with the mask of its saliency, which is taken once at the start weights."""
    if recipe.saliency is None:
        return recipe
    if recipe.parameters.mask is not None:
        raise ArgumentError(f"recipe {recipe.name!r} computes its own mask and another was given; give one of them")
    mask = salient(subject, rows.rows["forget"], recipe.saliency, recipe.parameters, recipe.batch_size)
    return replace(recipe, parameters=replace(recipe.parameters, mask=mask))


def _trained(
    training: Training,
    record: dict[str, Any],
    path: Path | None,
    every: int | None,
    log: str | Path | None,
    progress: bool | None,
) -> Delta:
    key = {name: record[name] for name in ("model", "options", "data", "seed")}
    if path is not None and path.exists():
        state.restore(path, training, key)
    training.ranks.check_same(**{"steps taken": len(training.log)})
    written = None if log is None or not training.ranks.first else Path(log)
    if written is not None:
        write_text(written, "".join(_line(row) + "\n" for row in training.log))

    def after() -> None:
        if written is not None:
            append(written, parse_json(_line(training.log[-1]), "the log", finite=False))
        if path is not None and len(training.log) % (every or 20) == 0:
            state.save(path, training, key)

    try:
        rule, reason = training.run(after=after, progress=progress)
        if path is not None:
            state.save(path, training, key)
    except TrainingError as error:
        if path is not None:
            state.save(path, training, key)
        error.delta = _delta(training, record | {"stopped": {"rule": "error", "reason": str(error)}})
        raise
    except OSError as error:
        failure = CheckpointError(
            f"the training stopped after {len(training.log)} steps since {log or path} could not be written: {error}; "
            "error.delta holds what was trained"
        )
        failure.delta = _delta(training, record | {"stopped": {"rule": "error", "reason": str(failure)}})
        raise failure from error
    delta = _delta(training, record | {"stopped": {"rule": rule, "reason": reason}})
    _check_change(delta, training)
    return delta


def _line(row: Mapping[str, Any]) -> str:
    """A line of the log; sorted, as the rows of a saved training are."""
    return json.dumps(row, sort_keys=True)


def _delta(training: Training, record: dict[str, Any]) -> Delta:
    """What was trained, without the seconds that steps took: the same training gives the same bytes."""
    found = {name: value * training.recipe.scale for name, value in training.trainee.differences().items()}
    start = {name: value_hash(_start(training, name)) for name in found}
    return Delta(
        found,
        record | {"start": start, "steps_run": len(training.log), "lengths": training.steering.lengths},
        tuple({name: value for name, value in row.items() if name != "seconds"} for row in training.log),
    )


def _start(training: Training, name: str) -> torch.Tensor:
    """The weight as it was, also of a module that has an adapter."""
    known = training.trainee.start
    return known[name] if name in known else training.trainee.original[name]


def _check_change(delta: Delta, training: Training) -> None:
    def moves(name: str, value: torch.Tensor) -> bool:
        old = _start(training, name).cpu()
        return not torch.equal((old.to(value.dtype) + value).to(old.dtype), old)

    if not any(moves(name, value) for name, value in delta.tensors.items()):
        dtype = str(training.reference.subject.model.dtype).removeprefix("torch.")
        largest = max((float(v.abs().max()) for v in delta.tensors.values()), default=0.0)
        raise NoOpEdit(
            f"the training changes nothing: 0 % of the entries differ after rounding to {dtype}, the largest difference is "
            f"{largest:.2g}; raise lr, or train the model in float32"
        )


def _record(
    subject: Subject,
    reference: Subject | None,
    recipe: UnlearnRecipe,
    rows: Material,
    seed: int,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "method": recipe.name,
        "options": recipe.plain() | dict(run),
        "formula": recipe.formula,
        "source": recipe.source,
        "model": subject.fingerprint(),
        "reference": None if reference is None else reference.fingerprint(),
        "data": dict(rows.record),
        "seed": seed,
        "versions": {name: version(name) for name in ("repedit", "torch", "transformers")},
    }


def _merged(
    subject: Subject,
    recipe: Merged,
    options: dict[str, Any],
    resume: str | Path | None,
    every: int | None,
    log: str | Path | None,
) -> Delta:
    """Each part from the same start, then TIES; states and logs of the parts are files of their own."""
    parts = []
    for number, part in enumerate(recipe.parts):
        files: dict[str, Any] = {
            name: None if path is None else Path(path).with_name(f"{Path(path).stem}-{number}{Path(path).suffix}")
            for name, path in (("resume", resume), ("log", log))
        }
        parts.append(unlearn(subject, recipe=part, checkpoint_every=every, **files, **options))
    merged = Delta.ties(parts, recipe.weights, recipe.density)
    return Delta(merged.tensors, {**merged.provenance, "method": recipe.name, "options": recipe.plain()}, parts[0].log)
