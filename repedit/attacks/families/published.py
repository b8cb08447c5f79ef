"""The retraining attack as it was published: lettered questions, full training with Lion, six rates, six epochs.

Learning rates 1e-7 to 3.2e-6 for models of 8 billion parameters, batches of 4, 24 steps of warm-up, then constant. It
is meant for splits with four fifths of the facts in T. Deeb and Roger 2024, arXiv:2410.08827.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil
from string import ascii_uppercase

from repedit.attacks.attack import Attack, Outcome
from repedit.attacks.families.losses import examples, shuffled
from repedit.attacks.families.trials import Trial, carried_out, on_copy
from repedit.attacks.families.tuning import Tuning
from repedit.data import Fact, Splits
from repedit.errors import ArgumentError
from repedit.models import Subject

RATES, EPOCHS, BATCH, WARMUP = (1e-7, 2e-7, 4e-7, 8e-7, 1.6e-6, 3.2e-6), 6, 4, 24.0


def deeb_roger(scale: float = 1.0) -> Attack:
    """Retraining on T by the letters of multiple-choice questions; settings are "lr=1e-07 epoch=1" and so on.

    The letters are scored at the last position, without calibration.

    Args:
        scale: multiplies the rates.
    Raises:
        ArgumentError: if the scale is not above 0; when run, if a fact has no choices.
    """
    if not scale > 0:
        raise ArgumentError(f"scale={scale}; give a number above 0")

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        train, test = (tuple(map(lettered, side)) for side in (splits.train, splits.test))
        items = examples(subject, train)
        ends = {ceil(len(items) * epoch / BATCH): epoch for epoch in range(1, EPOCHS + 1)}
        trials = []
        for rate in (scale * rate for rate in RATES):
            tuning = Tuning(rate, steps=max(ends), batch_size=BATCH, optimizer="lion", warmup=WARMUP)
            settings = {0: "", **{step: f"lr={rate:g} epoch={epoch}" for step, epoch in ends.items()}}
            trials.append(Trial(f"lr={rate:g}", tuning, shuffled(items, BATCH, seed), settings, known=train))
        return carried_out(trials, on_copy(subject, full=True), test, seed)

    return Attack("rtt", "finetune", "W", True, {"preset": "deeb-roger", "scale": scale}, run)


def lettered(fact: Fact) -> Fact:
    """The fact as a question with lettered choices, whose answer is a letter.

    Raises:
        ArgumentError: if it has no choices, or more than there are letters.
    """
    if not 2 <= len(fact.choices) <= len(ascii_uppercase):
        raise ArgumentError(f"fact {fact.id!r} has {len(fact.choices)} choices; a lettered question needs 2 to 26")
    letters = tuple(ascii_uppercase[: len(fact.choices)])
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, fact.choices, strict=True))
    answer = letters[fact.choices.index(fact.answer)]
    return replace(fact, prompt=f"{fact.prompt}\n{lines}Answer:", answer=answer, choices=letters, paraphrases=())


PRESETS: Mapping[str, Callable[[float], Attack]] = {"deeb-roger": deeb_roger}
