"""The rows of each role of a training, on the device of the model, after the checks that can refuse a training."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from typing import TypeAlias

from repedit.data import Batch, Batches, Fact, Row, Rows, TextSource
from repedit.errors import DataError
from repedit.models.subject import Subject
from repedit.training.sampler import BatchSampler, check_disjoint, label_mask, training_rows
from repedit.unlearning.recipe import UnlearnRecipe
from repedit.unlearning.sampling import exchanged_rows

Sources: TypeAlias = TextSource | Mapping[str, TextSource]
"""Rows, facts, a corpus or texts, or a mapping of topics to those."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Rows by role."""

    rows: Mapping[str, list[Batch]]
    topics: Mapping[str, list[str]]
    """The topic of each row."""
    alternatives: list[Batch]
    """The forget rows with their alternative answers, where a loss needs them."""
    record: Mapping[str, Mapping[str, object]]
    """Name, hash and number of rows of each set, for the provenance."""


def prepare_data(
    subject: Subject,
    recipe: UnlearnRecipe,
    *,
    forget: Sources | None,
    retain: Sources | None = None,
    update: Sources | None = None,
    allow_overlap: bool = False,
    seed: int = 0,
) -> TrainingData:
    """Tokenize what a recipe trains on.

    Sets are rows, facts (with every phrasing they carry), a corpus (whole text, in chunks), texts, or a mapping of
    topics to those.

    Args:
        seed: of the exchange of answers.
    Raises:
        DataError: if a set is missing, empty or not used, or a row cannot be used.
        OverlapError: if forget and retain share rows.
    """
    sources = {"forget": forget, "retain": retain, "update": update}
    _check_roles(recipe, sources)
    sets = {role: _by_topic(source, role) for role, source in sources.items() if source is not None}
    if not allow_overlap and "retain" in sets:
        for forget_set in sets["forget"].values():
            for retain_set in sets["retain"].values():
                check_disjoint(subject, forget_set, retain_set, length=recipe.length)
    record = {
        role: {topic or "all": {"name": batches.name, "hash": batches.hash} for topic, batches in by_topic.items()}
        for role, by_topic in sets.items()
    }
    if "exchanged" in recipe.roles:
        parts = {topic: exchanged_rows(_items(b), recipe.exchange, seed) for topic, b in sets["forget"].items()}
        sets["exchanged"] = {
            topic: Rows(part, f"{sets['forget'][topic].name}, exchanged") for topic, part in parts.items()
        }
        record["exchanged"] = {topic or "all": {"hash": part.hash} for topic, part in sets["exchanged"].items()}
    if "outdated" in recipe.roles:
        sets |= _split_outdated(sets["forget"], sets["update"])
    rows = {
        role: [(topic, row) for topic, batches in parts.items() for row in _single_rows(subject, batches, role, recipe)]
        for role, parts in sets.items()
    }
    alternatives: list[Batch] = []
    if any("alternative" in term.loss.needs for term in recipe.terms):
        for batches in sets["forget"].values():
            alternatives += _single_rows(subject, _with_alternatives(batches), "forget", recipe)
    present = {role: part for role, part in rows.items() if part}
    return TrainingData(
        {role: [row for _, row in part] for role, part in present.items()},
        {role: [topic for topic, _ in part] for role, part in present.items()},
        alternatives,
        record | {"rows": {role: len(part) for role, part in rows.items()}},
    )


def _check_roles(recipe: UnlearnRecipe, sources: Mapping[str, Sources | None]) -> None:
    if sources["forget"] is None:
        raise DataError(f"recipe {recipe.name!r} needs a forget set and none was given; pass forget=...")
    for role in ("retain", "update"):
        term = next((t for t in recipe.terms if t.role == role), None)
        if term is not None and sources[role] is None:
            raise DataError(
                f"recipe {recipe.name!r} has the term {term.name!r} (combiner {recipe.combiner}) and no {role} set was given; "
                f"pass {role}=..., or use a recipe without it"
            )
    if sources["update"] is not None and "update" not in recipe.roles:
        raise DataError(
            f"an update set was given and recipe {recipe.name!r} does not use one (its roles: {', '.join(recipe.roles)}); use "
            "surgery, or omit update"
        )
    needs_retain = recipe.combiner.name in ("blur", "norm_diff", "primal_dual")
    if needs_retain and not any(t.role in ("retain", "update") for t in recipe.terms):
        raise DataError(
            f"recipe {recipe.name!r} combines two gradients by {recipe.combiner} and has no retain term; add one"
        )


def _by_topic(source: Sources, role: str) -> dict[str, Batches]:
    sources: Mapping[str, TextSource] = source if isinstance(source, Mapping) else {"": source}
    batches = {}
    for topic, part in sources.items():
        if isinstance(part, Sized) and len(part) == 0:
            where = f"{role}, topic {topic!r}" if topic else role
            raise DataError(f"the {where} set holds 0 rows; give at least one")
        batches[str(topic)] = training_rows(part, role)
    return batches


def _single_rows(subject: Subject, batches: Batches, role: str, recipe: UnlearnRecipe) -> list[Batch]:
    """The rows one by one, each with a label and short enough for the model."""
    rows = BatchSampler(subject, batches, 1, length=recipe.length, seed=0).rows
    limit = getattr(subject.model.config, "max_position_embeddings", None)
    for number, row in enumerate(rows):
        size = row.input_ids.shape[1]
        if not bool(label_mask(row).any()):
            raise DataError(
                f"{role} row {number} ({row.document[0]!r}): every label is masked, {size} tokens and none of them is predicted; "
                "mark an answer that follows at least one token"
            )
        if limit is not None and size > limit:
            raise DataError(
                f"{role} row {number} ({row.document[0]!r}) has {size} tokens, the model reads {limit}; shorten it, or lower length"
            )
    return rows


def _items(batches: Batches) -> tuple[Row, ...]:
    items = getattr(batches, "items", getattr(batches, "forget", None))
    if not isinstance(items, tuple) or not all(isinstance(item, Row) for item in items):
        raise DataError(f"{batches.name!r} is running text; this recipe needs rows with a prompt and an answer")
    return items


def _with_alternatives(batches: Batches) -> Rows:
    """The rows with their alternative answers in place of the answers."""
    rows = []
    for row in _items(batches):
        answer = row.alternative
        if not answer:
            raise DataError(
                f"row {row.id!r} has no alternative answer, which dpo prefers to {row.answer!r}; use npo, or add "
                "alternatives such as 'I do not know.'"
            )
        if isinstance(row, Fact):  # whose choices must hold the answer
            row = replace(row, choices=())
        rows.append(replace(row, answer=answer))
    return Rows(tuple(rows), batches.name)


def _split_outdated(forget: Mapping[str, Batches], update: Mapping[str, Batches]) -> dict[str, dict[str, Batches]]:
    """The forget rows whose prompt is also in the update set, as role `outdated`, and the others."""
    prompts = {row.prompt for part in update.values() for row in _items(part)}
    sets: dict[str, dict[str, Batches]] = {"forget": {}, "outdated": {}}
    for topic, part in forget.items():
        for role, outdated in (("forget", False), ("outdated", True)):
            rows = tuple(row for row in _items(part) if (row.prompt in prompts) == outdated)
            if rows:
                sets[role][topic] = Rows(rows, f"{part.name}, {role}")
    return sets
