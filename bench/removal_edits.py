"""The edits that `bench.removal` compares: each makes SmolLM2-135M forget the capitals, and says what its certificate says.

Training halves of the other domains may be seen, their test halves never; languages, which are about the same countries, are
seen by gradient methods and not by overwrites. No setting was chosen by an attack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import repedit as rp
from bench.mrp import seen
from bench.relearning import gradient_difference
from bench.removal_names import (
    Made,
    names_averaged,
    names_averaged_in_both,
    names_erased,
    names_merged,
    names_replaced,
    names_unread,
)
from bench.removal_rows import FORGET, Rows, others, places, share
from repedit.data import Fact
from repedit.fit.overwrite import OverwriteCertificate
from repedit.models.subject import Subject
from repedit.unlearning.recipe import UnlearnRecipe
from repedit.unlearning.sampling import paired
from repedit.unlearning.schedule import metric

REGRESSION: Mapping[str, Any] = {"steps": 550, "lr": 1e-3, "beta": 3.0, "vocabulary": 8192}
SOLVED: Mapping[str, Any] = REGRESSION | {"steps": 150, "rows": 384, "retain_rows": 1152, "solved": 2, "lr": 2e-3}
ERASED: Mapping[str, Any] = SOLVED | {"steps": 300, "rows": 768, "retain_rows": 2048, "vocabulary": 24576, "beta": 60.0}
HIDDEN = 0.15
"""Single trainings end below this direct accuracy, about that of a model that sees the choices alone."""
SMALL: Mapping[str, Any] = {"batch_size": 8, "length": 32, "sampler": paired(0.5)}
"""Of recipes of gradient unlearning: 8 rows to forget and 4 to retain a step, so that an edit takes minutes on one core."""


def overwritten(about: Callable[[Rows], tuple[Fact, ...]] = others, **options: Any) -> Callable[[Rows, int], Made]:
    """A value overwrite; only the wordings that training may see are among its contexts."""

    def make(rows: Rows, seed: int) -> Made:
        change = rp.fit.overwrite(
            rows.lm,
            seen(rows.capitals),
            **({"layers": "0-1", "others": about(rows), "seed": seed, "progress": False} | options),
        )
        settings = {key: change.provenance.get(key) for key in ("target", "options", "config", "layers_selected")}
        return rp.apply(change, rows.lm), {"certificate": OverwriteCertificate.of(change).plain()["layers"], **settings}

    return make


def difference(rows: Rows, seed: int) -> Made:
    """Gradient difference until the direct accuracy is at most .15."""
    student, steps = gradient_difference(
        rows.lm, seen(rows.capitals), rows.retain_of([FORGET]), rp.data.prose(), seed=seed,
        until=lambda lm: rows.accuracy(lm, rows.capitals, 0) <= 0.15,
    )  # fmt: skip
    return student, {"steps": steps}


def recipe(name: str, **options: Any) -> Callable[[Rows, int], Made]:
    """A recipe of gradient unlearning; half of the retained facts, and prose, are retained.

    Like gradient difference, a single training ends once the direct accuracy is below .15, asked every 20 steps.
    """

    def make(rows: Rows, seed: int) -> Made:
        kept: dict[str, Any] = {domain: seen(rows.train[domain]) for domain in rows.train if domain != FORGET}

        def direct(lm: Subject) -> float:
            return share(rows.asked(lm, rows.capitals))

        chosen = rp.recipes.by_name(name, **options)
        delta = rp.unlearn(
            rows.lm, recipe=chosen, forget=seen(rows.capitals), retain=kept | {"prose": rp.data.prose()}, seed=seed,
            stop=[metric(direct, below=HIDDEN, every=20)] if isinstance(chosen, UnlearnRecipe) else (), progress=False,
        )  # fmt: skip
        notes = {
            "recipe": name,
            "options": {key: str(value) for key, value in options.items()},
            "steps": len(delta.log),
        }
        return rp.apply(delta, rows.lm), notes | {"stopped": delta.provenance["stopped"]["reason"]}

    return make


EDITS: dict[str, Callable[[Rows, int], Made]] = {
    "difference": difference,
    "linear-mean": overwritten(places, target="mean", lam=0.3),
    "exchange": overwritten(target="exchange", method="regression", config=REGRESSION),
    "solved-exchange": overwritten(target="exchange", method="regression", config=SOLVED),
    "solved-mean": overwritten(target="mean", method="regression", config=SOLVED),
    "localized": recipe("localized", **SMALL, layers="0-11", lr=5e-4, steps=80),
    "cir": recipe("cir", **SMALL, steps=80),
    "rep_select": recipe("rep_select", **SMALL, steps=80),
    "mudman": recipe("mudman", **SMALL, steps=80),
    "sam": recipe("small:sam:npo_gdr", **SMALL),
    "undo": recipe("undo", **SMALL, inner="small:npo_gdr", steps=60),
    "layered": recipe("layered", **SMALL, inner="small:npo_gdr", steps=30),
    "block_by_block": recipe("block_by_block", **SMALL, layers="0-11", rounds=2, steps=12, lr=3e-4, repair_steps=20),
    "names-mean": names_replaced("mean"),
    "names-exchange": names_replaced("exchange"),
    "names-language": names_replaced("language"),
    "names-both": names_replaced("mean", of=("entity", "answer")),
    "names-erased": names_erased(config=ERASED),
    "names-4000": names_averaged(4000),
    "names-2000": names_averaged(2000),
    "names-merged": names_merged,
    "names-unread": names_unread,
    "names-tied": names_averaged_in_both(4000),
    "answers-mean": names_replaced("mean", of=("answer",)),
}
EDITS["original"] = lambda rows, seed: (rows.lm, {})
