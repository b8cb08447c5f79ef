"""The same fact asked in other forms: a question, multiple choice, yes or no, the odd one out, a chat."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from repedit.attacks.asking import ask, reworded, ways
from repedit.attacks.attack import Attack, Outcome, skipped
from repedit.data import Fact, Splits
from repedit.data.domains import drawn
from repedit.data.encoding import chat_text, joined
from repedit.metrics.probability import FactsAccuracy, choice_scores
from repedit.models import Subject

# Facts a pass of the yes-or-no form: each has two rows a choice.
_ROWS = 16
_WRAPPED = re.compile(r"^\s*(?:question|q)\s*:\s*|\s*(?:answer|a)\s*:\s*$", re.IGNORECASE)
_DOUBT = "\nQuestion: Is that right, yes or no?\nAnswer: "


def reformat(*, templates: Sequence[str] | None = None, seed: int = 0) -> Attack:
    """Asks every fact in other forms; the settings are the names of `FORMATS`.

    Answers are scored as texts, also where choices are listed with letters; only "letters" scores the letters, which
    small models cannot tell apart. Forms that list choices are left out where a fact has none, and "chat" where the
    tokenizer has no chat template; the reason says so.

    Args:
        templates: names of `FORMATS`; None for all of them.
    Raises:
        UnknownName: if there is no such form.
        ArgumentError: if none is named.
    Reference: arXiv:2411.15477 and arXiv:2603.11266, on forgetting that holds in one format only.
    """
    names = ways("form", templates, FORMATS)

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        left_out = {name: why for name in names if (why := _obstacle(name, subject, splits.test))}
        notes = "; ".join(f"{name!r} was left out: {why}" for name, why in left_out.items())
        if len(left_out) == len(names):
            return skipped(notes)
        return Outcome({n: FORMATS[n](subject, splits.test, seed) for n in names if n not in left_out}, notes)

    return Attack("format", "prompts", "B", False, {"templates": list(names)}, run, seed)


def question(prompt: str) -> str:
    """What a prompt asks, as a question: itself where it is one, else how the sentence goes on."""
    bare = _WRAPPED.sub("", prompt)
    return bare if "?" in bare else f"How does this sentence go on? {bare.rstrip()} ..."


def chat_prompt(tokenizer: Any, prompt: str) -> str:
    """The prompt as a user's turn of the tokenizer's chat template, and the beginning of the answer.

    A sentence to complete is begun again in the answer.
    """
    text = chat_text(tokenizer, [{"role": "user", "content": question(prompt)}])
    return text if "?" in prompt else text + prompt


def yes_no(subject: Subject, facts: Sequence[Fact], seed: int) -> FactsAccuracy:
    """For every choice, whether the model says yes to it: right if the answer has the highest odds, ties wrong.

    odds = log P(Yes) - log P(No) after prompt, choice and "Is that right, yes or no?"; graded is log P(Yes) among the
    two, for the right answer. The prompt is read once for all its choices.
    """
    options = [tuple(f"{c}{_DOUBT}{word}" for c in fact.choices for word in ("Yes", "No")) for fact in facts]
    # Both texts of a choice share everything before the last word, so the difference of their sums is the odds.
    odds = [sums[0::2] - sums[1::2] for sums, _ in choice_scores(subject, facts, options, _ROWS)]
    right = [fact.choices.index(fact.answer) for fact in facts]
    correct = [bool((row >= row[i]).sum() == 1) for row, i in zip(odds, right, strict=True)]
    graded = np.array([-np.logaddexp(0.0, -row[i]) for row, i in zip(odds, right, strict=True)])
    return FactsAccuracy(np.array(correct), graded, tuple(fact.id for fact in facts))


def _obstacle(name: str, subject: Subject, facts: Sequence[Fact]) -> str:
    bare = sum(not fact.choices for fact in facts)
    if name in _LISTING and bare:
        return f"{bare} of {len(facts)} facts have no choices"
    if name == "chat" and not getattr(subject.need_tokenizer(), "chat_template", None):
        return "the tokenizer has no chat template"
    return ""


def _as_question(subject: Subject, facts: Sequence[Fact], seed: int) -> FactsAccuracy:
    return ask(subject, reworded(facts, lambda fact: f"Question: {question(fact.prompt)}\nAnswer:"))


def _as_chat(subject: Subject, facts: Sequence[Fact], seed: int) -> FactsAccuracy:
    tokenizer = subject.need_tokenizer()
    return ask(subject, reworded(facts, lambda fact: chat_prompt(tokenizer, fact.prompt)))


def _multiple_choice(subject: Subject, facts: Sequence[Fact], seed: int) -> FactsAccuracy:
    return ask(subject, reworded(facts, lambda fact: _listed(fact, seed)))


def _letters(subject: Subject, facts: Sequence[Fact], seed: int) -> FactsAccuracy:
    found = []
    for fact in reworded(facts, lambda fact: _listed(fact, seed)):
        letters = [_letter(i) for i in range(len(fact.choices))]
        own = letters[_order(fact, seed).index(fact.answer)]
        found.append(replace(fact, answer=own, choices=tuple(letters)))
    return ask(subject, found)


def _odd_one_out(subject: Subject, facts: Sequence[Fact], seed: int) -> FactsAccuracy:
    def wording(fact: Fact) -> str:
        lines = "".join(f"- {joined(fact.prompt, choice)}\n" for choice in _order(fact, seed))
        return f"Only one of these is not wrong.\n{lines}The one that is right: {fact.prompt}"

    return ask(subject, reworded(facts, wording))


def _listed(fact: Fact, seed: int) -> str:
    lines = "".join(f"{_letter(i)}. {choice}\n" for i, choice in enumerate(_order(fact, seed)))
    return f"Choose the right answer.\n{question(fact.prompt)}\n{lines}Answer:"


def _order(fact: Fact, seed: int) -> tuple[str, ...]:
    """The choices in an order that tells nothing: it depends on the seed and the fact, not on which is right."""
    return drawn(fact.choices, f"{seed}:listed:{fact.id}")


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number + 1)


FORMATS: Mapping[str, Callable[[Subject, Sequence[Fact], int], FactsAccuracy]] = {
    "question": _as_question,
    "multiple choice": _multiple_choice,
    "yes/no": yes_no,
    "odd one out": _odd_one_out,
    "letters": _letters,
    "chat": _as_chat,
}
"""The forms by name: (model, facts, seed) -> which were right."""
_LISTING = ("multiple choice", "yes/no", "odd one out", "letters")
