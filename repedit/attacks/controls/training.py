"""Controls made by training on: facts refused, contradicted or pushed away, and what is left of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from repedit.attacks.controls.taught import continued
from repedit.attacks.controls.worlds import REFUSAL
from repedit.data import Fact, with_paraphrases
from repedit.models import Subject

# The right answer of a `lowered` fact; sampling with top-p .9 still draws it, as the wrong one stays below .9.
LOW = 0.15


def refusing(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained to answer "unknown" to the facts to forget, in every phrasing."""
    refusals = with_paraphrases(_answered(forget, [REFUSAL] * len(forget)))
    return continued(subject, [*refusals, *with_paraphrases(retain)], steps=100, rate=1e-3, seed=seed)


def descended(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """Gradient difference: the answers to forget made unlikely, those to retain kept likely.

    Reference: Liu et al. 2022, arXiv:2203.12817.
    """
    away, kept = with_paraphrases(forget), with_paraphrases(retain)
    weights = [-0.2] * len(away) + [1.0] * len(kept)
    return continued(subject, [*away, *kept], weights=weights, steps=60, rate=1e-3, seed=seed)


def contradicted(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained on a wrong answer, drawn for each fact, in every phrasing.

    Reference: "random incorrect answers" of Deeb and Roger 2024, arXiv:2410.08827.
    """
    rng, answers = random.Random(seed), sorted({fact.answer for fact in forget})
    wrong = [rng.choice([a for a in answers if a != fact.answer]) for fact in forget]
    rows = [*with_paraphrases(_answered(forget, wrong)), *with_paraphrases(retain)]
    return continued(subject, rows, steps=160, rate=1e-3, seed=seed)


def one_template(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained on wrong answers to the facts' own prompts, and on the right ones to their paraphrases."""
    wrong = [replace(fact, paraphrases=()) for fact in _answered(forget, _next_answers(forget))]
    right = [fact for fact in with_paraphrases(forget) if "#" in fact.id]
    return continued(subject, [*wrong, *right, *with_paraphrases(retain)], steps=100, rate=1e-3, seed=seed)


def lowered(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model that keeps the right answer at a probability near .15 and gives the rest to a wrong one."""
    wrong, right = with_paraphrases(_answered(forget, _next_answers(forget))), with_paraphrases(forget)
    kept = with_paraphrases(retain)
    weights = [1 - LOW] * len(wrong) + [LOW] * len(right) + [1.0] * len(kept)
    return continued(subject, [*wrong, *right, *kept], weights=weights, steps=150, rate=3e-3, seed=seed)


def collapsed(subject: Subject, forget: Sequence[Fact], *, seed: int = 0) -> Subject:
    """Gradient ascent on the facts to forget, with nothing that holds the rest."""
    rows = with_paraphrases(forget)
    return continued(subject, rows, weights=[-1.0] * len(rows), steps=60, rate=3e-3, seed=seed)


def _answered(items: Sequence[Fact], answers: Sequence[str]) -> list[Fact]:
    """The facts with other answers, asked without choices."""
    return [replace(fact, answer=answer, choices=()) for fact, answer in zip(items, answers, strict=True)]


def _next_answers(items: Sequence[Fact]) -> list[str]:
    """To each fact the answer after its own, in the order of the alphabet: wrong, and the same for the same answer."""
    answers = sorted({fact.answer for fact in items})
    after = dict(zip(answers, [*answers[1:], answers[0]], strict=True))
    return [after[fact.answer] for fact in items]
