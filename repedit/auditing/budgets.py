"""Which attacks a budget includes, how many seeds and facts they get, and what an audit will cost."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from repedit.auditing.attack import _RECORDS, BUDGETS, QUICK, Attack, AttackRecord, Setup, ask, import_attacks
from repedit.auditing.attacks.finetune import rtt
from repedit.auditing.runner import Audited
from repedit.data import Fact, Facts, Splits
from repedit.data.fact_sets import fact_items
from repedit.errors import UnknownName, check_choice, nearest
from repedit.models.subject import Subject

# --- Which attacks a budget includes: the registered records in order of cost, and how many seeds and facts they get


SEEDS = {QUICK: (0,), "fast": (0,), "standard": (0, 1, 2), "full": (0, 1, 2)}
INVENTED_FACTS = {QUICK: 48, "fast": 96, "standard": 256, "full": 256}
"""Invented facts asked at most."""
RETAIN_FACTS = {QUICK: 96, "fast": 160, "standard": None, "full": None}
"""Retain facts asked at most."""
DISTILLATION = "the model is not distilled into another one"
SHORT, LONG = (
    "hundreds of steps, other optimisers and other data",
    "more than {} steps, and optimizers other than AdamW, Lion and SGD",
)
"""What training is left untried without attack "retraining", and with it."""


def untried(longest: int | None = None) -> dict[str, str]:
    """What no attack of an audit did, whatever its budget; every report says so.

    Args:
        longest: training steps of the longest variant of "retraining" that ran, with AdamW, Lion and SGD among them;
            None where that is not so.
    """
    return {"distillation": DISTILLATION, "long training": SHORT if longest is None else LONG.format(longest)}


def records() -> Mapping[str, AttackRecord]:
    """Every registered attack by name, the cheapest first."""
    import_attacks()
    return {record.name: record for record in sorted(_RECORDS.values(), key=lambda record: (record.cost, record.name))}


def record_of(attack: str) -> AttackRecord | None:
    """The record of an attack by the name of its findings, such as "probe-mlp" or "rtt, LoRA"; None of an unknown one."""
    registered = records()
    return registered.get(attack) or registered.get(attack.partition("-")[0].partition(",")[0])


def planned(budget: str, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """The attacks of a budget, or those named, the cheapest first; "direct" is always among them.

    Raises:
        UnknownName: if there is no such budget or attack.
    """
    check_choice(BUDGETS, budget=budget)
    registered = records()
    if isinstance(names, str):
        raise UnknownName(f"attacks={names!r} is one text; give a list of names")
    for name in names or ():
        if name not in registered:
            raise UnknownName(f"no attack is called {name!r}; {nearest(name, registered)}")
    included = BUDGETS[: BUDGETS.index(budget) + 1]
    return tuple(
        name
        for name, record in registered.items()
        if name == "direct" or (record.budget in included if names is None else name in names)
    )


def built(names: Sequence[str], setup: Setup) -> tuple[Attack, ...]:
    """The attacks of these names, built for a setup."""
    registered = records()
    return tuple(attack for name in names for attack in registered[name].build(setup))


# --- What an audit will cost, before it is begun: questions and training steps, timed on a few of each


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
    items = fact_items(facts)
    model = Audited("edited", edited, device)
    attacks_built = built(planned(budget, attacks), Setup(budget, model.layers))
    # Edited and original are asked, and the edited model again with invented facts; training on attributes is repeated.
    invented = min(1.0, INVENTED_FACTS[budget] / len(items))
    costs = {}
    with model.opened() as subject:
        question, step = _calibrated(subject, items[:SAMPLE])
        for attack in attacks_built:
            folds, runs = _folds(attack), len(SEEDS[budget]) if attack.record.draws else 1
            questions = attack.work.questions * len(items) * (0.5 if attack.folds == 1 else 1.0)
            steps = folds * attack.work.steps
            asked, trained = (3.0, 3.0) if attack.record.attributes else (2 + invented, 2.0)
            if attack.applies is not None:
                # The original is taken to give it nothing to work on.
                asked, trained = (1 + invented, 1.0) if attack.applies(subject) else (0.0, 0.0)
            seconds = runs * (asked * questions * question + trained * steps * step)
            costs[attack.name] = {"questions": round(questions), "steps": steps, "seconds": seconds}
    return {
        "facts": len(items), "seconds_a_question": question, "seconds_a_step": step, "attacks": costs,
        "minutes": sum(cost["seconds"] for cost in costs.values()) / 60,
    }  # fmt: skip


def _folds(attack: Attack) -> int:
    """Trainings in which every fact is tested once, or fewer where the attack is made on some folds."""
    return 1 if not attack.record.uses_train else attack.folds or (5 if attack.record.four_fifths else 2)


def _calibrated(subject: Subject, items: tuple[Fact, ...]) -> tuple[float, float]:
    """(seconds a question, seconds a training step)."""
    ask(subject, items[:2])
    start = time.perf_counter()
    ask(subject, items)
    question = (time.perf_counter() - start) / len(items)
    finding = rtt(rates=(1e-9,), steps=STEPS, measured=(STEPS,))(subject, Splits(items, items[:1]))
    return question, max(0.0, finding.seconds - (len(items) + 2) * question) / STEPS
