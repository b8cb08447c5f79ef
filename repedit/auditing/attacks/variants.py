"""Retraining on T in ways that no defence was tuned against: other ranks, optimizers and lengths, early MLPs alone, more facts.

Every setting of an attack is chosen on one half of V and scored on the other, and an upper end chooses anew in every draw
(`repedit.auditing.statistics`). So a setting that is added makes an attack stronger where it works, widens its upper end
where it does not, and never counts as an attack of its own: the bound over all attacks grows with the number of attacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from repedit.auditing.attack import Attack, AttackRecord, Setup, Work, register
from repedit.auditing.attacks.tuning import (
    Trial,
    Tuning,
    examples,
    running,
    scaled_rates,
    shuffled,
    training_work,
    trial,
)
from repedit.data import Splits
from repedit.errors import ArgumentError, UnknownName, check_positive, nearest
from repedit.models.subject import Subject

# --- Other ranks, optimizers, lengths and losses

VARIANTS = {
    "rank=4": Tuning(5e-4, how="lora", rank=4),
    "rank=64": Tuning(5e-4, how="lora", rank=64),
    "rank=256": Tuning(2e-4, how="lora", rank=256),
    "optimizer=lion": Tuning(1e-5, optimizer="lion"),
    "optimizer=sgd": Tuning(0.2, optimizer="sgd"),
    "steps=200": Tuning(2e-5, steps=200),
    "rank=8": Tuning(5e-4, how="lora", rank=8),
    "rank=32": Tuning(5e-4, how="lora", rank=32),
    "rank=128": Tuning(2e-4, how="lora", rank=128),
    "optimizer=lion rank=16": Tuning(1e-4, how="lora", optimizer="lion"),
    "loss=sequence steps=200": Tuning(2e-5, steps=200, loss="sequence"),
    "steps=500": Tuning(1e-5, steps=500),
}
"""What is tried, by the words that settings are named with."""
STANDARD = tuple(VARIANTS)[:6]
"""The variants of the standard budget; the full one tries all."""


def retraining(*, variants: Sequence[str] = STANDARD, scale: float = 1.0, stretch: float = 1.0) -> Attack:
    """Retraining on T in several ways, each at one rate.

    Settings are "lr=0.0005 step=40 rank=4", "lr=1e-05 step=20 optimizer=lion" and so on: half-way and at the end of each. The
    best must reach .9 on T.

    Args:
        variants: names of `VARIANTS`.
        scale: multiplies the rates.
        stretch: multiplies the steps.
    Raises:
        UnknownName: if there is no such variant.
        ArgumentError: if none is given, or a number is not above 0.
    """
    unknown = next((name for name in variants if name not in VARIANTS), None)
    if unknown is not None:
        raise UnknownName(f"variant {unknown!r}; {nearest(unknown, VARIANTS)}")
    if not variants:
        raise ArgumentError(f"variants is empty; give some of {list(VARIANTS)}")
    check_positive(stretch=stretch)
    tunings = {
        name: replace(t, rate=scaled_rates([t.rate], scale)[0], steps=max(2, round(t.steps * stretch)))
        for name, t in VARIANTS.items()
        if name in variants
    }

    def trials(subject: Subject, splits: Splits, seed: int) -> Iterator[Trial]:
        for name, tuning in tunings.items():
            draw = shuffled(examples(subject, splits.train, loss=tuning.loss), tuning.batch_size, seed)
            yield trial(tuning, draw, (tuning.steps // 2, tuning.steps), f" {name}", taught=splits.train)

    work = Work(3 * len(tunings), sum(tuning.steps for tuning in tunings.values()))
    full = any(tuning.how == "full" for tuning in tunings.values())
    return Attack(
        RETRAINING, {"variants": list(tunings), "scale": scale, "stretch": stretch}, running(trials, full=full), work
    )


RETRAINING = register(
    AttackRecord(
        "retraining", cost=182, budget="standard", level="W", uses_train=True, trains=True,
        build=lambda setup: [
            retraining(
                variants=tuple(VARIANTS) if setup.budget == "full" else STANDARD, scale=setup.scale,
                stretch=setup.steps / 40,
            )
        ],
    )
)  # fmt: skip


# --- The MLPs of early layers alone, where names are looked up


def early_mlps(
    *, rates: Sequence[float] = (5e-5, 2e-4), shares: Sequence[float] = (0.1, 0.35), steps: int = 40, scale: float = 1.0
) -> Attack:
    """Retraining on T of the MLPs in the first layers alone, where a name is turned into what is known of it.

    Settings are "lr=0.0002 step=40 layers=3": the first tenth and the first third of the layers, at least one. It must
    reach .9 on T.

    Args:
        shares: the fractions of the layers that are trained.
    Raises:
        ArgumentError: if a number is out of range.
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ArgumentError(f"shares={tuple(shares)}; give at least one, above 0 and at most 1")
    base, scaled = Tuning(1.0, steps=steps, how="mlps"), scaled_rates(rates, scale)

    def trials(subject: Subject, splits: Splits, seed: int) -> Iterator[Trial]:
        total = len(subject.layout.layers)
        draw = shuffled(examples(subject, splits.train), base.batch_size, seed)
        for count, rate in product(dict.fromkeys(max(1, round(share * total)) for share in shares), scaled):
            tuning = replace(base, rate=rate, layers=tuple(range(count)))
            yield trial(tuning, draw, (steps // 2, steps), f" layers={count}", taught=splits.train)

    options = {"rates": list(rates), "shares": list(shares), "steps": steps, "scale": scale}
    work = training_work(len(rates) * len(shares), steps, (steps // 2, steps))
    return Attack(EARLY_MLPS, options, running(trials, full=True), work)


EARLY_MLPS = register(
    AttackRecord(
        "early_mlps", cost=175, budget="standard", level="W", uses_train=True, trains=True,
        build=lambda setup: [early_mlps(steps=setup.steps, scale=setup.scale)],
    )
)  # fmt: skip


# --- More facts: T is four fifths


def rtt_four_fifths(*, rates: Sequence[float] = (5e-5, 2e-4), steps: int = 40, scale: float = 1.0) -> Attack:
    """Retraining on four fifths of the facts, five times, with the last fifth asked.

    Settings are "lr=5e-05 step=40". It must reach .9 on T; a larger T needs more steps.

    Raises:
        ArgumentError: if a number is out of range.
    """
    base, scaled = Tuning(1.0, steps=steps), scaled_rates(rates, scale)

    def trials(subject: Subject, splits: Splits, seed: int) -> Iterator[Trial]:
        draw = shuffled(examples(subject, splits.train), base.batch_size, seed)
        for rate in scaled:
            yield trial(replace(base, rate=rate), draw, (steps // 2, steps), taught=splits.train)

    options = {"rates": list(rates), "steps": steps, "scale": scale}
    work = training_work(len(rates), steps, (steps // 2, steps))
    return Attack(FOUR_FIFTHS, options, running(trials, full=True), work)


def _four_fifths(setup: Setup) -> list[Attack]:
    # As often as half of the facts are seen in `rtt`, with T larger by 8 / 5.
    return [rtt_four_fifths(steps=setup.steps * 8 // 5, scale=setup.scale)]


FOUR_FIFTHS = register(
    AttackRecord(
        "rtt_four_fifths", cost=185, budget="standard", build=_four_fifths, level="W", uses_train=True, trains=True,
        four_fifths=True,
    )
)  # fmt: skip
