"""What an audit will cost, before it is begun: questions and training steps, timed on a few of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repedit.auditing.attack import Setup, ask
from repedit.auditing.attacks.finetune import rtt
from repedit.auditing.budgets import INVENTED_FACTS, SEEDS, built, planned
from repedit.auditing.runner import Audited
from repedit.data import Fact, Facts, Splits
from repedit.models.subject import Subject

SAMPLE, STEPS = 24, 3


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
    attacks_built = built(planned(budget, attacks), Setup(budget, model.layers))
    # Edited and original are asked, and the edited model again with invented facts.
    invented = min(1.0, INVENTED_FACTS[budget] / len(items))
    costs = {}
    with model.opened() as subject:
        question, step = _calibrated(subject, items[:SAMPLE])
        for attack in attacks_built:
            folds, runs = 2 if attack.record.uses_train else 1, len(SEEDS[budget]) if attack.record.draws else 1
            questions, steps = attack.work.questions * len(items), folds * attack.work.steps
            asked, trained = 2 + invented, 2.0
            if attack.applies is not None:
                # The original is taken to give it nothing to work on.
                asked, trained = (1 + invented, 1.0) if attack.applies(subject) else (0.0, 0.0)
            seconds = runs * (asked * questions * question + trained * steps * step)
            costs[attack.name] = {"questions": round(questions), "steps": steps, "seconds": seconds}
    return {
        "facts": len(items), "seconds_a_question": question, "seconds_a_step": step, "attacks": costs,
        "minutes": sum(cost["seconds"] for cost in costs.values()) / 60,
    }  # fmt: skip


def _calibrated(subject: Subject, items: tuple[Fact, ...]) -> tuple[float, float]:
    """(seconds a question, seconds a training step)."""
    ask(subject, items[:2])
    start = time.perf_counter()
    ask(subject, items)
    question = (time.perf_counter() - start) / len(items)
    finding = rtt(rates=(1e-9,), steps=STEPS, measured=(STEPS,))(subject, Splits(items, items[:1]))
    return question, max(0.0, finding.seconds - (len(items) + 2) * question) / STEPS
