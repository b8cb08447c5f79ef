"""The rows of each role, single and on the model's device, after the checks that forbid a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from repedit.data import Batch, Batches, Rows
from repedit.data.rows import Row
from repedit.errors import DataError
from repedit.fit.mrp_training import targets_of
from repedit.models.subject import Subject
from repedit.training.sampler import Sampler, check_disjoint, training_rows
from repedit.unlearning.recipe import UnlearnRecipe


@dataclass(frozen=True, eq=False)
class Material:
    """Rows by role."""

    rows: Mapping[str, list[Batch]]
    topics: Mapping[str, list[str]]
    alternatives: Mapping[str, list[Batch]]
    """The same rows with their alternative answers, where a loss needs them."""
    record: Mapping[str, Any]
    """Name, hash and number of rows of each set, for the provenance."""


def material(
    subject: Subject,
    recipe: UnlearnRecipe,
    *,
    forget: Any,
    retain: Any = None,
    update: Any = None,
    allow_overlap: bool = False,
) -> Material:
    """Gather what a recipe trains on.

    Sets are rows, facts (every phrasing they carry), a corpus (whole text, in chunks), texts, or a mapping of topics to those.

    Raises:
        DataError: if a set is missing, empty, not asked for, or a row cannot be used.
        OverlapError: if forget and retain share rows.
    """
    given = {"forget": forget, "retain": retain, "update": update}
    _check_given(recipe, given)
    sets = {role: _topics(source, role) for role, source in given.items() if source is not None}
    if not allow_overlap and "retain" in sets:
        for bad in sets["forget"].values():
            for good in sets["retain"].values():
                check_disjoint(subject, bad, good, length=recipe.length)
    record = {
        role: {topic or "all": {"name": b.name, "hash": b.hash} for topic, b in parts.items()}
        for role, parts in sets.items()
    }
    if "outdated" in recipe.roles:
        sets |= _split(sets["forget"], sets["update"])
    rows = {
        role: [(topic, row) for topic, b in parts.items() for row in _single(subject, b, role, recipe)]
        for role, parts in sets.items()
    }
    needs_other = any("alternative" in term.loss.needs for term in recipe.terms)
    others = (
        {
            "forget": [
                row for b in sets["forget"].values() for row in _single(subject, _alternative(b), "forget", recipe)
            ]
        }
        if needs_other
        else {}
    )
    kept = {role: part for role, part in rows.items() if part}
    return Material(
        {role: [row for _, row in part] for role, part in kept.items()},
        {role: [topic for topic, _ in part] for role, part in kept.items()},
        others,
        record | {"rows": {role: len(part) for role, part in rows.items()}},
    )


def _check_given(recipe: UnlearnRecipe, given: Mapping[str, Any]) -> None:
    if given["forget"] is None:
        raise DataError(f"recipe {recipe.name!r} needs a forget set and none was given; pass forget=...")
    for role in ("retain", "update"):
        term = next((t for t in recipe.terms if t.role == role), None)
        if term is not None and given[role] is None:
            raise DataError(
                f"recipe {recipe.name!r} has the term {term.name!r} (combiner {recipe.combiner}) and no {role} set was given; "
                f"pass {role}=..., or take a recipe without it"
            )
    if given["update"] is not None and "update" not in recipe.roles:
        raise DataError(
            f"an update set was given and recipe {recipe.name!r} learns none (its roles: {', '.join(recipe.roles)}); take surgery, or "
            "leave update out"
        )
    combining = recipe.combiner.name in ("blur", "norm_diff", "primal_dual")
    if combining and not any(t.role in ("retain", "update") for t in recipe.terms):
        raise DataError(
            f"recipe {recipe.name!r} joins two gradients by {recipe.combiner} and has no retain term; add one"
        )


def _topics(source: Any, role: str) -> dict[str, Batches]:
    parts = source if isinstance(source, Mapping) else {"": source}
    found = {}
    for topic, part in parts.items():
        if hasattr(part, "__len__") and len(part) == 0:
            where = f"{role}, topic {topic!r}" if topic else role
            raise DataError(f"the {where} set holds 0 rows; give at least one")
        found[str(topic)] = training_rows(part, role)
    return found


def _single(subject: Subject, batches: Batches, role: str, recipe: UnlearnRecipe) -> list[Batch]:
    """The rows one by one; each has a label and fits the model."""
    rows = Sampler(subject, batches, 1, length=recipe.length, seed=0).rows
    limit = getattr(subject.model.config, "max_position_embeddings", None)
    for number, row in enumerate(rows):
        size = row.input_ids.shape[1]
        if not bool(targets_of(row).any()):
            raise DataError(
                f"{role} row {number} ({row.document[0]!r}): every label is masked, {size} tokens and none of them is predicted; "
                "mark an answer that follows something"
            )
        if limit is not None and size > limit:
            raise DataError(
                f"{role} row {number} ({row.document[0]!r}) has {size} tokens, the model reads {limit}; shorten it, or lower length"
            )
    return rows


def _items(batches: Batches) -> tuple[Row, ...]:
    found = getattr(batches, "items", getattr(batches, "forget", None))
    if not isinstance(found, tuple) or not all(isinstance(item, Row) for item in found):
        raise DataError(f"{batches.name!r} is running text; this recipe needs rows with a prompt and an answer")
    return found


def _alternative(batches: Batches) -> Rows:
    items = _items(batches)
    bare = next((row for row in items if not row.alternative), None)
    if bare is not None:
        raise DataError(
            f"row {bare.id!r} has no alternative answer, which dpo prefers to {bare.answer!r}; use npo, or add alternatives such as "
            "'I do not know.'"
        )
    return Rows(tuple(replace(row, answer=str(row.alternative), **_no_choices(row)) for row in items), batches.name)


def _no_choices(row: Row) -> dict[str, Any]:
    return {"choices": ()} if hasattr(row, "choices") else {}


def _split(forget: Mapping[str, Batches], update: Mapping[str, Batches]) -> dict[str, dict[str, Batches]]:
    """The forget rows whose prompt also stands in the update set, as `outdated`, and the others."""
    prompts = {row.prompt for part in update.values() for row in _items(part)}
    found: dict[str, dict[str, Batches]] = {"forget": {}, "outdated": {}}
    for topic, part in forget.items():
        for role, replaced in (("forget", False), ("outdated", True)):
            rows = tuple(row for row in _items(part) if (row.prompt in prompts) == replaced)
            if rows:
                found[role][topic] = Rows(rows, f"{part.name}, {role}")
    return found
