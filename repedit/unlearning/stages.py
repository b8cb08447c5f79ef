"""The stages of a recipe, one training after the other, whose changes add up to one delta."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from repedit.data import Batches, Row, Rows, TextSource
from repedit.data.fact_sets import fact_of
from repedit.delta import Delta
from repedit.errors import CheckpointError, DataError, NotEnoughRows, TrainingError
from repedit.hashing import value_hash
from repedit.models.subject import Subject
from repedit.training.sampler import training_rows
from repedit.unlearning.recipe import StagedRecipe, UnlearnRecipe
from repedit.unlearning.training_data import Sources

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
        **deltas[0].provenance,
        "method": recipe.name,
        "options": recipe.plain(),
        "formula": recipe.formula,
        "source": recipe.source,
        "start": {name: value_hash(subject.value(name)) for name in total},
        "steps_run": len(log),
        "stopped": next((rule for rule in stopped if rule["rule"] == "collapse"), stopped[-1]),
        "stages": records,
    }
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
