"""rp.unlearn: train a model to forget some rows and retain others, and return the difference of its weights."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from repedit.arguments import checked
from repedit.data import Batches, Row, Rows, TextSource
from repedit.data.fact_sets import fact_of
from repedit.delta import Delta
from repedit.distributed import ProcessGroup, process_group
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    NoOpEdit,
    NotEnoughRows,
    TargetExists,
    TrainingError,
    check_positive,
    check_seed,
    check_whole,
    given,
    is_whole,
)
from repedit.hashing import package_versions, value_hash
from repedit.hooks import check_differentiable
from repedit.io import archive
from repedit.io.files import append_line, open_regular, user_path, write_text
from repedit.io.targets import check_file_target
from repedit.io.text import parse_json
from repedit.models.subject import Subject
from repedit.training import resume as resume_state
from repedit.training.sampler import training_rows
from repedit.unlearning.losses import Reference, check_vocabulary
from repedit.unlearning.masks import saliency_of_rows
from repedit.unlearning.noise import add_noise
from repedit.unlearning.parameters import Parameters, TrainableCopy
from repedit.unlearning.recipe import AnyRecipe, Changes, StagedRecipe, UnlearnRecipe, resolved_fields
from repedit.unlearning.schedule import Stop
from repedit.unlearning.trainer import Training, check_dropout, check_shardable, recompute_blocks, shard
from repedit.unlearning.training_data import Sources, TrainingData, prepare_data

_SAVE_EVERY = 20
_LOG_START = b'{"c": '
"""The beginning of every line of a log."""


class _Options(TypedDict):
    """How a training runs, apart from recipe and data."""

    reference: Subject | None
    micro_batch: int | None
    clip: float | None
    seed: int
    shard: bool
    gradient_checkpointing: bool
    dropout: bool
    checkpoint_every: int | None
    progress: bool | None


class _Data(TypedDict):
    forget: Sources | None
    retain: Sources | None
    update: Sources | None
    allow_overlap: bool


@checked
def unlearn(
    subject: Subject,
    *,
    recipe: AnyRecipe,
    forget: Sources | None,
    retain: Sources | None = None,
    update: Sources | None = None,
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
    """Train a model to forget the forget set and keep the retain set; the subject itself is never changed.

    Gradient methods mostly hide what they forget: run `rp.audit` on the result.

    Under `torchrun`, or in any running process group, the ranks share the rows of each step and all of them return the
    same Delta, which equals that of one process up to the order of sums; the first rank writes the files.

    Args:
        recipe: from `rp.recipes`; lr, steps, epochs, batch_size, length and parameters override it, `stop` adds rules. Of
            a recipe with several trainings they override all.
        forget, retain, update: rows or facts (their answers count), a corpus or texts (all of it counts), or a mapping of
            topics to those.
        reference: a model that the losses compare with, in place of the start weights.
        micro_batch: rows in a forward pass of a rank; gradients add up to those of the whole batch.
        clip: largest norm of the combined gradient; None for no limit.
        checkpoint_every: steps between saved states in `resume`; 20 by default.
        resume: a folder in which the training is saved, and from which a later call continues.
        log: a JSONL file that gets one line for each step.
        allow_overlap: let forget and retain share rows.
        shard: shard trained copies, gradients and optimizer state over the ranks (FSDP2); the subject stays whole on each.
        gradient_checkpointing: recompute every block in the backward pass: less memory, more time, the same result.
        dropout: train with the dropout of the model, drawn from the seed; the reference runs without it.
    Raises:
        ArgumentError: if a number is out of range, or steps and epochs are both given.
        DataError, OverlapError: if a set is missing, empty or malformed, or the sets overlap.
        SelectionError, ShapeError: if the parameter filter or mask fits nothing, or the reference has another vocabulary.
        QuantizedModel, OffloadedTensors: if the weights cannot be trained.
        TrainingError: if a loss is not finite; its `delta` is the last good state.
        TargetExists, CheckpointError: if `log` or `resume` is something else or cannot be written. Before the training;
            later its `delta` is what was trained.
        NoOpEdit: if nothing changed, or rounding to the dtype of the model cancels every change.
        FingerprintError: if `resume` holds another training, or the ranks have different inputs.
    """
    if checkpoint_every is not None and (not is_whole(checkpoint_every) or resume is None):
        raise ArgumentError(
            f"checkpoint_every={checkpoint_every}, resume={resume}: give a folder in resume, and at least 1 step"
        )
    log, resume = (None if path is None else user_path(path) for path in (log, resume))
    if log is not None and resume is not None and Path(log).absolute() == Path(resume).absolute():
        raise ArgumentError(f"log and resume are both {log}; give each its own path")
    _check_log(log)
    state = None if resume is None else resume_state.state_path(resume)
    _check_numbers(micro_batch, clip, seed)
    data: _Data = {"forget": forget, "retain": retain, "update": update, "allow_overlap": allow_overlap}
    overrides = dict(parameters=parameters, lr=lr, steps=steps, epochs=epochs, batch_size=batch_size, length=length)  # noqa: C408
    changes = cast(Changes, {name: value for name, value in overrides.items() if value is not None})
    options: _Options = {
        "reference": reference, "micro_batch": micro_batch, "clip": clip, "seed": seed, "shard": shard, "dropout": dropout,
        "gradient_checkpointing": gradient_checkpointing, "checkpoint_every": checkpoint_every, "progress": progress,
    }  # fmt: skip
    if isinstance(recipe, UnlearnRecipe):
        recipe = _changed(recipe, changes, stop)
        return _unlearn(subject, recipe, data, options, state, None if log is None else Path(log))
    if isinstance(recipe, StagedRecipe):
        staged = _changed_stages(recipe, changes, stop)
        return _unlearn_in_stages(subject, staged, data, options, state, log)
    # Each part from the same start; states and logs of the parts are files of their own.
    parts = [
        _unlearn(subject, _changed(part, changes, stop), data, options, *_files(state, log, number))
        for number, part in enumerate(recipe.parts)
    ]
    merged = Delta.ties(parts, recipe.weights, recipe.density)
    return Delta(merged.tensors, {**merged.provenance, "method": recipe.name, "options": recipe.plain()}, parts[0].log)


def _check_numbers(micro_batch: int | None, clip: float | None, seed: int) -> None:
    check_whole(**given(micro_batch=micro_batch))
    check_positive(**given(clip=clip))
    check_seed(seed=seed)


def _check_log(log: str | Path | None) -> None:
    """Refuse a log that cannot be written, or a file that is not a log, before anything is trained."""
    if log is None:
        return
    check_file_target(log)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    if Path(log).exists() and Path(log).stat().st_size:
        with open_regular(log) as file:
            first = file.readline(len(_LOG_START))
        if not _LOG_START.startswith(first):  # the first line may be truncated if its writer was killed
            raise TargetExists(f"{log} exists and is not the log of a training; move it away, or give another log")


def _changed(recipe: UnlearnRecipe, changes: Changes, stop: Sequence[Stop]) -> UnlearnRecipe:
    return replace(recipe, **resolved_fields({}, {**changes, "stop": (*recipe.stop, *stop)}))


def _changed_stages(recipe: StagedRecipe, changes: Changes, stop: Sequence[Stop]) -> StagedRecipe:
    if "parameters" in changes:
        raise ArgumentError(
            f"parameters was given and recipe {recipe.name!r} chooses them for each of its trainings; give its own options"
        )
    return recipe.changed(lambda part: _changed(part, changes, stop))


def _unlearn_in_stages(
    subject: Subject, recipe: StagedRecipe, data: _Data, options: _Options, state: Path | None, log: str | Path | None
) -> Delta:
    """The stages one after the other; their states and logs are files of their own."""
    if data["forget"] is None:
        raise DataError(f"recipe {recipe.name!r} needs a forget set and none was given; pass forget=...")

    def train(
        number: int,
        start: Subject,
        part: UnlearnRecipe,
        reference: Subject | None,
        forget: Sources,
        retain: Sources | None,
    ) -> Delta:
        own: _Data = {**data, "forget": forget, "retain": retain}
        settings: _Options = {**options, "reference": options["reference"] or reference}
        return _unlearn(start, part, own, settings, *_files(state, log, number))

    return run_stages(subject, recipe, data["forget"], data["retain"], options["seed"], train)


def _files(state: Path | None, log: str | Path | None, number: int) -> list[Path | None]:
    """The files of one of several trainings."""
    paths = [None if path is None else Path(path) for path in (state, log)]
    return [None if path is None else path.with_name(f"{path.stem}-{number}{path.suffix}") for path in paths]


def _unlearn(
    subject: Subject, recipe: UnlearnRecipe, data: _Data, options: _Options, state: Path | None, log: Path | None
) -> Delta:
    """The Delta of a single training."""
    check_differentiable(subject.model)
    reference = options["reference"]
    if reference is not None:
        check_vocabulary(subject, reference)
    rows = prepare_data(subject, recipe, **data, seed=options["seed"])
    recipe = _with_saliency_mask(subject, recipe, rows)
    if options["dropout"]:
        check_dropout(subject)
    record = _provenance(subject, recipe, rows, options)
    group = process_group(subject.device)
    group.check_same(**record, micro_batch=options["micro_batch"], shard=options["shard"])
    trainable = _trainable(subject, recipe, group, options)
    if recipe.noise is not None:
        add_noise(trainable, recipe.noise, rows.rows["forget"], rows.rows["retain"], options["seed"])
    training = Training(
        trainable=trainable, reference=Reference(reference or subject, {**rows.rows, "alternative": rows.alternatives}),
        data=rows, recipe=recipe, micro_batch=options["micro_batch"] or recipe.batch_size, clip=options["clip"],
        seed=options["seed"], group=group, dropout=options["dropout"],
    )  # fmt: skip
    return _train(training, record, state, log, options["checkpoint_every"] or _SAVE_EVERY, options["progress"])


def _with_saliency_mask(subject: Subject, recipe: UnlearnRecipe, data: TrainingData) -> UnlearnRecipe:
    """The recipe with the mask of its saliency, which is computed once at the start weights."""
    if recipe.saliency is None:
        return recipe
    if recipe.parameters.mask is not None:
        raise ArgumentError(f"recipe {recipe.name!r} computes its own mask and another was given; give one of them")
    mask = saliency_of_rows(subject, data.rows["forget"], recipe.saliency, recipe.parameters, recipe.batch_size)
    return replace(recipe, parameters=replace(recipe.parameters, mask=mask))


def _trainable(subject: Subject, recipe: UnlearnRecipe, group: ProcessGroup, options: _Options) -> TrainableCopy:
    if options["shard"]:
        check_shardable(recipe, group.size)
    trainable = TrainableCopy(subject, recipe.parameters, seed=options["seed"])
    if options["gradient_checkpointing"]:
        recompute_blocks(trainable.subject)
    if options["shard"]:
        shard(trainable)
    return trainable


def _provenance(subject: Subject, recipe: UnlearnRecipe, data: TrainingData, options: _Options) -> dict[str, Any]:
    reference = options["reference"]
    dropout = {"dropout": True} if options["dropout"] else {}
    return {
        "method": recipe.name, "options": recipe.plain() | {"clip": options["clip"]} | dropout,
        "formula": recipe.formula, "source": recipe.source, "model": subject.fingerprint(),
        "reference": None if reference is None else reference.fingerprint(), "data": dict(data.record),
        "seed": options["seed"], "versions": package_versions("transformers"),
    }  # fmt: skip


def _train(
    training: Training, record: dict[str, Any], state: Path | None, log: Path | None, every: int, progress: bool | None
) -> Delta:
    """Take the steps, save the state and the log as they go, and return the difference."""
    key = {name: record[name] for name in ("model", "options", "data", "seed")}
    if state is not None and state.exists():
        header, tensors = resume_state.restore(state, training.trainable.tensors, training.optimizer, key=key)
        training.forget_gradient.restore(tensors)
        with archive.rebuilding(state, "training"):
            training.log.extend(dict(row) for row in header["log"])
            training.memory.update(header["memory"])
    training.group.check_same(**{"steps taken": len(training.log)})
    if not training.group.is_first:
        log = None
    if log is not None:
        write_text(log, "".join(_line(row) + "\n" for row in training.log))

    def save() -> None:
        if state is not None:
            header = {"log": training.log, "memory": training.memory}
            is_first = training.group.is_first
            weights = training.trainable.tensors
            other = training.forget_gradient.saved()
            resume_state.save(state, weights, training.optimizer, header, key=key, other=other, is_writer=is_first)

    def after_step() -> None:
        if log is not None:
            append_line(log, parse_json(_line(training.log[-1]), "the log", finite=False))
        if len(training.log) % every == 0:
            save()

    try:
        rule, reason = training.run(after_step=after_step, progress=progress)
        save()
    except TrainingError as error:
        save()
        error.delta = _delta(training, record | {"stopped": {"rule": "error", "reason": str(error)}})
        raise
    except OSError as error:
        failure = CheckpointError(
            f"the training stopped after {len(training.log)} steps because {log or state} could not be written: {error}; "
            "error.delta holds what was trained"
        )
        failure.delta = _delta(training, record | {"stopped": {"rule": "error", "reason": str(failure)}})
        raise failure from error
    delta = _delta(training, record | {"stopped": {"rule": rule, "reason": reason}})
    _check_changed(delta, training)
    return delta


def _line(row: Mapping[str, Any]) -> str:
    """A line of the log; sorted, as the rows of a saved training are."""
    return json.dumps(row, sort_keys=True)


def _delta(training: Training, record: dict[str, Any]) -> Delta:
    """What was trained, without the seconds of the steps, so that the same training gives the same bytes."""
    differences = {name: value * training.recipe.scale for name, value in training.trainable.differences().items()}
    start = {name: value_hash(training.trainable.start_of(name)) for name in differences}
    return Delta(
        differences,
        record | {"start": start, "steps_run": len(training.log), "lengths": training.control.lengths},
        tuple({name: value for name, value in row.items() if name != "seconds"} for row in training.log),
    )


def _check_changed(delta: Delta, training: Training) -> None:
    def changes(name: str, value: torch.Tensor) -> bool:
        old = training.trainable.start_of(name).cpu()
        return not torch.equal((old.to(value.dtype) + value).to(old.dtype), old)

    if not any(changes(name, value) for name, value in delta.tensors.items()):
        dtype = str(training.reference.subject.model.dtype).removeprefix("torch.")
        largest = max((float(v.abs().max()) for v in delta.tensors.values()), default=0.0)
        raise NoOpEdit(
            f"the training changes nothing: 0 % of the entries differ after rounding to {dtype}, the largest difference is "
            f"{largest:.2g}; raise lr, or train the model in float32"
        )


# --- The stages of a recipe, one training after the other, whose changes add up to one delta


Train = Callable[[int, Subject, UnlearnRecipe, Subject | None, Sources, Sources | None], Delta]
"""(number of the stage, model, recipe, reference, forget, retain) -> what the training changed."""


def run_stages(
    subject: Subject, recipe: StagedRecipe, forget: Sources, retain: Sources | None, seed: int, train: Train
) -> Delta:
    """The sum of what the stages change.

    Raises:
        TrainingError, CheckpointError: of a stage; its `delta` is the sum up to then.
        NotEnoughRows: if there are fewer facts than folds. DataError: if folds are of something else than rows.
    """
    stages = recipe.stages(len(subject.layout.layers))
    deltas: list[Delta] = []
    # What a stage changes is added to what its start, rounded to the dtype of the model, differs from the original by.
    changes: list[Mapping[str, Tensor]] = []
    for number, stage in enumerate(stages):
        before = _sum([changes[i] for i in stage.after])
        start = subject if not before else Delta(before).apply(subject)
        exact = {name: _difference(start, subject, name) for name in before}
        to_forget, to_retain = (forget, retain) if stage.folds is None else _folded(forget, retain, stage.folds, seed)
        try:
            delta = train(
                number, start, stage.recipe, subject if stage.compares_with_original else None, to_forget, to_retain
            )
        except (TrainingError, CheckpointError) as error:
            if isinstance(error.delta, Delta):
                parts = [*changes, _sum([exact, error.delta.tensors, _negative(before)])]
                error.delta = _combined(subject, recipe, [*deltas, error.delta], parts)
            raise
        deltas.append(delta)
        # As a change to what the earlier stages gave, so that the sum over all stages is that of the last model.
        changes.append(_sum([exact, delta.tensors, _negative(before)]))
    return _combined(subject, recipe, deltas, changes)


def _combined(
    subject: Subject, recipe: StagedRecipe, deltas: Sequence[Delta], changes: Sequence[Mapping[str, Tensor]]
) -> Delta:
    total = {name: value for name, value in _sum(changes).items() if bool(value.any())}
    stopped = [delta.provenance["stopped"] for delta in deltas]
    log: list[Mapping[str, Any]] = []
    records = []
    for number, delta in enumerate(deltas):
        log += [{**row, "step": len(log) + i, "stage": number} for i, row in enumerate(delta.log)]
        records.append(
            {key: delta.provenance[key] for key in ("method", "options", "steps_run", "stopped", "reference")}
        )
    provenance = {
        **deltas[0].provenance, "method": recipe.name, "options": recipe.plain(), "formula": recipe.formula,
        "source": recipe.source, "start": {name: value_hash(subject.value(name)) for name in total},
        "steps_run": len(log), "stopped": next((rule for rule in stopped if rule["rule"] == "collapse"), stopped[-1]),
        "stages": records,
    }  # fmt: skip
    return Delta(total, provenance, tuple(log))


def _sum(changes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for change in changes:
        for name, value in change.items():
            total[name] = total[name] + value if name in total else value
    return total


def _negative(change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: -value for name, value in change.items()}


def _difference(model: Subject, original: Subject, name: str) -> Tensor:
    values = [s.value(name).detach().cpu() for s in (model, original)]
    new, old = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in values)
    return new - old


def _folded(forget: Sources, retain: Sources | None, folds: tuple[int, int], seed: int) -> tuple[Sources, Sources]:
    """The forget rows of the first folds, and the retain set with those of the others. Wordings of a fact stay together."""
    count, total = folds
    sources: Mapping[str, TextSource] = forget if isinstance(forget, Mapping) else {"": forget}
    by_topic = {topic: _rows(training_rows(source, "forget")) for topic, source in sources.items()}
    facts = sorted({fact_of(row.id) for rows in by_topic.values() for row in rows})
    if len(facts) < total:
        raise NotEnoughRows(f"{len(facts)} facts cannot be divided into {total} folds; give more, or fewer folds")
    random.Random(f"{seed}:folds").shuffle(facts)
    first = {fact for i, fact in enumerate(facts) if i % total < count}
    retained = retain if isinstance(retain, Mapping) else {} if retain is None else {"": retain}
    forgotten = {t: Rows(part, "forget") for t, rows in by_topic.items() if (part := _of(rows, first, True))}
    later = {
        f"{t} later": Rows(part, "later folds") for t, rows in by_topic.items() if (part := _of(rows, first, False))
    }
    return forgotten, {**retained, **later}


def _of(rows: Sequence[Row], facts: set[str], inside: bool) -> tuple[Row, ...]:
    return tuple(row for row in rows if (fact_of(row.id) in facts) == inside)


def _rows(batches: Batches) -> tuple[Row, ...]:
    items = getattr(batches, "items", None)
    if not isinstance(items, tuple):
        raise DataError(f"{batches.name!r} is running text; folds need rows with a prompt and an answer")
    return items
