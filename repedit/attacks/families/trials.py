"""Trials of a training attack: each trains from the same weights, is asked at some steps, and must have learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from repedit.attacks.asking import ask
from repedit.attacks.attack import FAILED, RAN, Outcome
from repedit.attacks.families.losses import Draw, Example, mean_loss
from repedit.attacks.families.tuning import Tuning, TuningLog, tune
from repedit.attacks.scratch import Scratch
from repedit.data import Fact
from repedit.errors import ArgumentError, QuantizedModel
from repedit.metrics.probability import FactsAccuracy
from repedit.models import Subject

KNOWN = 0.9
"""Accuracy on T that the best trial must reach; less is no evidence that anything was removed."""
FALL = 0.1
"""Where no facts are taught: the share by which the loss on what is trained on must fall."""
UNTOUCHED = "step=0"

Start = Callable[[], tuple[Subject, list[nn.Parameter] | None]]
"""A model with the starting weights, and what to train of it where the tuning does not say."""


class Trial(NamedTuple):
    """One training, and when V is asked."""

    name: str
    """What sets it apart from the others, such as "lr=5e-05"."""
    tuning: Tuning
    draw: Draw
    settings: Mapping[int, str]
    """The name of each setting, by the step at which V is asked; step 0 is the same in all trials and asked once."""
    known: tuple[Fact, ...] = ()
    """Facts it should know afterwards."""
    watched: tuple[Example, ...] = ()
    """Texts whose loss should fall; with them, `known` is only asked and decides nothing."""


class _Tried(NamedTuple):
    answers: Mapping[int, FactsAccuracy]
    log: TuningLog
    known: float | None
    fall: float | None


def scaled(rates: Sequence[float], scale: float) -> tuple[float, ...]:
    """The rates times the scale.

    Raises:
        ArgumentError: if there is no rate, or one of them would not be above 0.
    """
    if not rates or not min(rates) * scale > 0:
        raise ArgumentError(f"rates={tuple(rates)}, scale={scale}; give at least one rate, and both above 0")
    return tuple(rate * scale for rate in rates)


def trial(tuning: Tuning, draw: Draw, measured: Sequence[int], extra: str = "", **check: Any) -> Trial:
    """A training whose settings are named "lr=5e-05 step=40" and `extra`, asked at the steps in reach and the last one.

    Args:
        check: `known` or `watched`, see `Trial`.
    """
    at = sorted({step for step in measured if 0 <= step <= tuning.steps} | {tuning.steps})
    settings = {step: f"lr={tuning.rate:g} step={step}{extra}" for step in at}
    return Trial(f"lr={tuning.rate:g}{extra}", tuning, draw, settings, **check)


def on_copy(subject: Subject, *, full: bool) -> Start:
    """Each trial begins with the weights of the model, on a copy of it.

    Args:
        full: whether all weights will be trained; half types are then widened to float32, as they lose small updates.
    Raises:
        QuantizedModel: if the weights are not plain tensors.
    """
    if subject.quantizer is not None:
        raise QuantizedModel(
            f"the weights are quantised ({subject.quantizer}) and cannot be trained; load the model as plain tensors"
        )
    scratch = Scratch(subject)
    if full and any(p.dtype.itemsize < 4 for p in scratch.subject.model.parameters()):
        scratch.subject.model.float()
    return lambda: (scratch.restore(), None)


def carried_out(trials: Sequence[Trial], start: Start, test: Sequence[Fact], seed: int, note: str = "") -> Outcome:
    """The answers of all trials on V.

    A trial whose numbers are no longer finite scores what the model answers before any training from there on, and
    the reason says so. The outcome is "failed to train" where no trial learned what it was taught.

    details: "losses" of every step and trial; "diverged", by trial the step.
    """
    untouched = cache(lambda: ask(start()[0], test))
    answers: dict[str, FactsAccuracy] = {}
    tried: dict[str, _Tried] = {}
    if any(0 in trial.settings for trial in trials):
        answers[UNTOUCHED] = untouched()
    for trial in trials:
        enough = any(t.known == 1.0 for t in tried.values())
        tried[trial.name] = one = _one(trial, start, test, seed, ask_known=not enough)
        for step, name in trial.settings.items():
            if step:
                answers[name] = one.answers.get(step) or untouched()
    diverged = {name: one.log.diverged for name, one in tried.items() if one.log.diverged}
    details = {
        "losses": {name: [round(loss, 4) for loss in one.log.losses] for name, one in tried.items()},
        "diverged": diverged,
    }
    failure, best = _failure(list(tried.values()), any(trial.watched for trial in trials))
    lost = "; ".join(f"{name} diverged at step {step} and scores step 0" for name, step in diverged.items())
    return Outcome(
        answers, "; ".join(part for part in (failure, note, lost) if part), best,
        sum(one.log.tokens for one in tried.values()), details, FAILED if failure else RAN,
    )  # fmt: skip


def _one(trial: Trial, start: Start, test: Sequence[Fact], seed: int, *, ask_known: bool) -> _Tried:
    subject, trained = start()
    before = mean_loss(subject, trial.watched) if trial.watched else 0.0
    answers: dict[int, FactsAccuracy] = {}
    known: list[float] = []
    falls: list[float] = []

    def measure(step: int) -> None:
        if step in trial.settings:
            answers[step] = ask(subject, test)
        if step == trial.tuning.steps and trial.known and ask_known:
            known.append(ask(subject, trial.known).accuracy)
        if step == trial.tuning.steps and trial.watched:
            falls.append(1 - mean_loss(subject, trial.watched) / max(before, 1e-12))

    at = {step for step in (*trial.settings, trial.tuning.steps) if step}
    log = tune(subject, trial.draw, trial.tuning, at=at, measure=measure, seed=seed, trained=trained)
    return _Tried(answers, log, *(next(iter(found), None) for found in (known, falls)))


def _failure(tried: Sequence[_Tried], by_loss: bool) -> tuple[str, float | None]:
    """(why nothing was learned, or nothing; best accuracy on T)."""
    known = max((one.known for one in tried if one.known is not None), default=None)
    fall = max((one.fall for one in tried if one.fall is not None), default=None)
    if all(one.log.diverged for one in tried):
        return "every training diverged; give lower rates", known
    if by_loss and (fall is None or not fall >= FALL):
        found = f"the training loss fell by {fall or 0:.1%} at best, {FALL:.0%} is needed"
        return f"{found}; give higher rates or more steps", known
    if not by_loss and (known is None or not known >= KNOWN):
        found = f"the best accuracy on T after training is {known or 0:.3f}, {KNOWN} is needed"
        return f"{found}; give other rates or more steps", known
    return "", known
