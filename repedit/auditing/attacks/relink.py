"""Relinking: retraining on other facts about the entities of V, and on reverse questions of T; no fact of V is ever trained on.

An edit that only cuts the way from a name to what is known of it leaves that knowledge in the model. Other facts about
the same entity lead to it again. Measured on SmolLM2-135M whose early MLPs exchanged countries: 60 steps on official
languages brought the capitals from .19 back to .58, where retraining on half of the capitals left the others at .09.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Setup, register, skipped
from repedit.auditing.attacks.tuning import (
    Tuning,
    carried_out,
    examples,
    on_copy,
    scaled_rates,
    shuffled,
    training_work,
    trial,
)
from repedit.auditing.data import check_no_leak, reversed_facts, spread
from repedit.data import Fact, Splits
from repedit.data.fact_sets import entity_of
from repedit.errors import check_whole
from repedit.models.subject import Subject

RATES, STEPS = (2e-5, 1e-4), 60
LEAST = 8
"""Fewest entities with an attribute; with fewer the attack is not run."""
MOST = 160
"""Attributes trained on at most: in 60 steps of 8 each is seen three times."""


def relink(
    *,
    rates: Sequence[float] = RATES,
    steps: int = STEPS,
    measured: Sequence[int] = (15, 30, 60),
    most: int = MOST,
    scale: float = 1.0,
) -> Attack:
    """Retraining on other attributes of the entities of V: their languages where their capitals are forgotten.

    Settings are "lr=0.0001 step=60 on=attributes". Nothing of T is used, so all facts are asked after one training. It
    must reach .9 on the attributes. Skipped where fewer than 8 entities have an attribute.

    An attribute may narrow the answer down (a language its country's capital): a model that never knew then guesses
    better. A reference shows that; without one the floor is the same training with an invented name for each entity.

    Args:
        most: attributes to train on at most, spread evenly over the entities.
    Raises:
        ArgumentError: if a number is out of range.
        OverlapError: when run, if an attribute states a fact of V.
    """
    check_whole(most=most)
    base, scaled = Tuning(1.0, steps=steps), scaled_rates(rates, scale)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        attributes = spread(splits.attributes, most, seed)
        reason = _too_few(attributes, splits.test)
        if reason:
            return skipped(reason)
        result = _trained(subject, {"attributes": attributes}, splits.test, base, scaled, measured, seed)
        return result._replace(details={**result.details, **_counts(attributes, splits.test)})

    options = {"rates": list(rates), "steps": steps, "measured": list(measured), "most": most, "scale": scale}
    return Attack(RELINK, options, run, training_work(len(rates), steps, measured))


def _relink(setup: Setup) -> list[Attack]:
    steps = setup.steps * 3 // 2
    if setup.small:
        return [relink(rates=RATES[-1:], steps=steps, measured=(steps,), scale=setup.scale)]
    return [relink(steps=steps, measured=(steps // 4, steps // 2, steps), scale=setup.scale)]


RELINK = register(
    AttackRecord(
        "relink", cost=135, budget="fast", build=_relink, level="W", trains=True, may_skip=True, attributes=True
    )
)


def reverse(
    *, rates: Sequence[float] = RATES, steps: int = STEPS, measured: Sequence[int] = (0, 30, 60), most: int = MOST, scale: float = 1.0
) -> Attack:  # fmt: skip
    """Retraining on the reverse questions of T ("Paris is the capital of" -> "France"), alone and with all else there is.

    Settings are "lr=0.0001 step=60 on=reverse" and "... on=everything", which mixes T, its reverse questions and the
    attributes of T and V. It must reach .9 on what it was trained on. Skipped where no prompt of T names its entity.

    Args:
        most: attributes to train on at most.
    Raises:
        ArgumentError: if a number is out of range.
        OverlapError: when run, if a text to train on states a fact of V.
    """
    check_whole(most=most)
    base, scaled = Tuning(1.0, steps=steps), scaled_rates(rates, scale)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        reverse = reversed_facts(splits.train, seed)
        if not reverse:
            return skipped("no prompt of T names its entity, so there is no reverse question")
        everything = (*splits.train, *reverse, *spread(splits.attributes, most, seed))
        sources = {"reverse": reverse, "everything": everything}
        missing = len(splits.train) - len(reverse)
        note = f"{missing} of {len(splits.train)} facts of T have no reverse question" if missing else ""
        return _trained(subject, sources, splits.test, base, scaled, measured, seed, note)

    options = {"rates": list(rates), "steps": steps, "measured": list(measured), "most": most, "scale": scale}
    return Attack(REVERSE, options, run, training_work(2 * len(rates), steps, measured))


def _reverse(setup: Setup) -> list[Attack]:
    steps = setup.steps * 3 // 2
    return [reverse(steps=steps, measured=(0, steps // 2, steps), scale=setup.scale)]


REVERSE = register(
    AttackRecord(
        "reverse",
        cost=165,
        budget="standard",
        build=_reverse,
        level="W",
        uses_train=True,
        trains=True,
        may_skip=True,
        attributes=True,
    )
)


def _trained(
    subject: Subject,
    sources: Mapping[str, Sequence[Fact]],
    test: Sequence[Fact],
    base: Tuning,
    rates: Sequence[float],
    measured: Sequence[int],
    seed: int,
    note: str = "",
) -> AttackResult:
    """The answers on V after training on each source at each rate; no source may state a fact of V."""
    for facts in sources.values():
        check_no_leak(facts, test)
    trials = [
        trial(
            replace(base, rate=rate), shuffled(examples(subject, facts), base.batch_size, seed), measured, f" on={name}",
            taught=tuple(facts),
        )
        for (name, facts), rate in product(sources.items(), rates)
    ]  # fmt: skip
    return carried_out(trials, on_copy(subject, full=True), test, seed, note)


def _counts(attributes: Sequence[Fact], test: Sequence[Fact]) -> dict[str, Any]:
    have, asked = ({entity_of(fact) for fact in part} for part in (attributes, test))
    return {"attributes": len(attributes), "entities": len(have & asked)}


def _too_few(attributes: Sequence[Fact], test: Sequence[Fact]) -> str:
    """Why there is nothing to train on; empty where there is."""
    count = _counts(attributes, test)["entities"]
    if not count:
        return "no other facts about the entities of V are known; give attributes=, facts of other domains about them"
    short = f"other facts are known of {count} entities of V alone, {LEAST} are needed; give attributes="
    return short if count < LEAST else ""
