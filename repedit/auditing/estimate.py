"""What an audit will cost, before it is begun: questions and training steps, timed on a few of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repedit.auditing.attack import Attack, ask
from repedit.auditing.attacks.finetune import rtt
from repedit.auditing.attacks.refill import null_spaces
from repedit.auditing.budgets import MOST_FRESH, SEEDS, Setup, built, planned
from repedit.auditing.runner import Audited
from repedit.data import Fact, Facts, Splits
from repedit.models.subject import Subject

SAMPLE, STEPS = 24, 3
_QUESTIONS = {
    "direct": 1.0, "strip": 1.0, "paraphrase": 4.6, "format": 15.0, "prefix": 6.0, "translate": 3.0, "in_context": 4.0,
    "sampling": 16.0, "perturb": 7.0, "logit_lens": 1.5, "probe": 2.5, "direction": 12.0, "membership": 1.0,
}  # fmt: skip
"""Times the facts are asked, in units of asking one plainly; forms with longer prompts count more."""


_TOKENS = 16
"""Of a fact, about: a text of twice as many costs twice as much."""


class Cost(NamedTuple):
    """Of one attack on one model."""

    questions: float
    steps: float
    """Training steps, in units of one on facts."""


def estimate(
    edited: Subject | str | Path,
    facts: Facts | Sequence[Fact],
    *,
    budget: str = "fast",
    attacks: Sequence[str] | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Seconds of every attack of a budget over all models and seeds, from 24 questions and 3 training steps.

    Raises:
        UnknownName: if there is no such budget or attack.
    """
    items = tuple(facts.forget if isinstance(facts, Facts) else facts)
    model = Audited("edited", edited, device)
    made = built(planned(budget, attacks), Setup(budget, model.layers))
    with model.opened() as subject:
        question, step = _calibrated(subject, items[:SAMPLE])
        lost = bool(null_spaces(subject)) if any(attack.name == "refill" for attack in made) else True
    # Edited and original are trained; both, and the edited one with invented facts, are asked.
    asked, found = 2 + min(1.0, MOST_FRESH[budget] / len(items)), {}
    for attack in made:
        cost = _cost(attack, len(items))
        asked_by, trained = (asked, 2.0) if attack.name != "refill" else ((asked - 1) * lost, 1.0 * lost)
        runs = len(SEEDS[budget]) if attack.draws else 1
        seconds = runs * (asked_by * cost.questions * question + trained * cost.steps * step)
        found[attack.name] = {"questions": round(cost.questions), "steps": cost.steps, "seconds": seconds}
    return {
        "facts": len(items), "seconds_a_question": question, "seconds_a_step": step, "attacks": found,
        "minutes": sum(cost["seconds"] for cost in found.values()) / 60,
    }  # fmt: skip


def _calibrated(subject: Subject, items: tuple[Fact, ...]) -> tuple[float, float]:
    """(seconds a question, seconds a training step)."""
    ask(subject, items[:2])
    start = time.perf_counter()
    ask(subject, items)
    question = (time.perf_counter() - start) / len(items)
    trained = rtt(rates=(1e-9,), steps=STEPS, measured=(STEPS,))(subject, Splits(items, items[:1]))
    return question, max(0.0, trained.seconds - (len(items) + 2) * question) / STEPS


def _cost(attack: Attack, facts: int) -> Cost:
    """Over both folds; each tests half of the facts and trains on the other."""
    given, folds = attack.settings, 2 if attack.uses_train else 1
    if "steps" in given or attack.name == "relearn":
        several = [len(given[key]) for key in ("loss", "how", "sizes") if isinstance(given.get(key), list)]
        trials = len(given.get("rates") or (1, 2, 3)) * (3 if attack.name == "benign" else 1)
        for count in several:
            trials *= count
        steps = max(given.get("steps", 0), *given.get("measured", (0,)))
        asked = trials * len(given.get("measured", ())) + (trials if attack.uses_train else 0)
        longer = 1 / 3 + 2 / 3 * max(1.0, given["length"] / _TOKENS) if attack.name == "benign" else 1.0
        return Cost(asked * facts, folds * trials * steps * longer)
    if "schemes" in given:
        return Cost(len(given["schemes"]) * facts, 0)
    return Cost(_QUESTIONS.get(attack.name, 4.0) * facts, 0)
