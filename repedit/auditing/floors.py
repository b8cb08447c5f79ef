"""What is measured beside the attacks: accuracy without knowledge, and what should have been retained."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from repedit.activations.forward import at_least_float32, batches, inputs_of
from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, ask, reworded
from repedit.auditing.report import RETAIN_CHECK
from repedit.data import Batches, Fact, Facts, Splits, by_domain, entity_of
from repedit.data.encoding import common_prefix
from repedit.data.grading import mentions, normalized
from repedit.errors import ArgumentError, DataError, NotEnoughRows
from repedit.hooks import evaluating
from repedit.metrics.facts import FactsAccuracy
from repedit.models.subject import Subject

# --- How many facts a model gets right that never knew them: by cheap guesses, or shown by facts nobody can know


Values = NDArray[np.float64]
CHOICES_ONLY = AttackRecord("choices only", draws=False, decides=False)
COMMON_BEGINNING = "common beginning"
QUESTION = "Answer:"
"""What stands in the place of a question that is removed."""
_STARTS = ("br", "v", "dr", "k", "pl", "t", "z", "gr", "m", "sk", "l", "fr", "n", "tw", "r", "bl")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ou")
_MIDDLES = ("lv", "nd", "rg", "sk", "mb", "zz", "pt", "rk", "ld", "v", "gn", "x")
_ENDS = ("ax", "ek", "or", "un", "im", "osk", "eld", "yn", "ub", "ith")


def heuristic_values(parts: Sequence[Splits]) -> dict[str, Values]:
    """How likely each guess is to be right, fact by fact: fitted on T where it learns, scored on V.

    The facts are those of `parts[0].test`, then of `parts[1].test` and so on. A guess that cannot tell some choices
    apart takes one of them at random, so a value may lie between 0 and 1. Facts without choices are guessed by the
    majority answer alone.

    "chance", 1 / choices; "majority answer", the choice most often right in T; "majority letter", the place in the list
    most often right in T; "longest choice", "shortest choice"; "median number", the choice nearest to the median answer
    of T, where all choices are numbers.

    Raises:
        DataError: if a side of a part is empty, or a fact is tested twice.
    """
    for part in parts:
        if not part.train or not part.test:
            raise DataError(f"splits with {len(part.train)} facts to fit on and {len(part.test)} to test; give both")
    asked = [fact.id for part in parts for fact in part.test]
    if not asked or len(set(asked)) < len(asked):
        raise DataError(f"{len(asked)} facts are tested, {len(set(asked))} of them different; test each once")
    guesses = dict(_GUESSES)
    if not any(_numbers(fact.choices) for part in parts for fact in part.test):
        del guesses["median number"]
    return {
        name: np.array(
            [
                _right(fact, guess(fact, part.train))
                if fact.choices
                else _written(fact, part.train) * (name == "majority answer")
                for part in parts
                for fact in part.test
            ]
        )
        for name, guess in guesses.items()
    }


def spelling_values(facts: Sequence[Fact]) -> Values:
    """How likely the choice is to be right that shares the longest beginning with the entity (approve, approval).

    It shows what the form of an entity gives away. It is no part of the floor: it is right for most past tenses. A fact
    without choices is 0.
    """
    return np.array([_right(fact, _spelling(fact)) if fact.choices else 0.0 for fact in facts])


def question_values(record: AttackRecord, parts: Sequence[Splits]) -> dict[str, Values]:
    """`heuristic_values` about what an attack asks in the place of the facts, and one guess more.

    "common beginning": the choice that shares the longest beginning with the answer of the fact, which a reverse question
    gives. No edit of the fact takes away what its form tells (approval, approve).
    """
    tested = [fact for part in parts for fact in part.test]
    asked = dict(zip((fact.id for fact in tested), questions_of(record, tested), strict=True))
    folds = [
        replace(part, train=questions_of(record, part.train), test=tuple(asked[fact.id] for fact in part.test))
        for part in parts
    ]
    alike = spelling_values([replace(asked[fact.id], entity=fact.answer) for fact in tested])
    return {COMMON_BEGINNING: alike, **heuristic_values(folds)}


def choices_only(subject: Subject, test: Sequence[Fact]) -> FactsAccuracy:
    """Which facts the untouched model gets right when the question is taken away and only the choices are left."""
    return ask(subject, reworded(test, lambda fact: QUESTION))


def choices_only_baseline(record: AttackRecord | None = None) -> Attack:
    """Ask V without its questions: what the choices alone give away to the model that was never edited.

    Args:
        record: of an attack with questions of its own, whose choices are then asked; nothing is, if it has not one for each fact.
    """

    def run(subject: Subject, splits: Splits, _: int) -> AttackResult:
        asked = splits.test if record is None else questions_of(record, splits.test)
        return AttackResult({"choices": choices_only(subject, asked)} if any(f.choices for f in asked) else {})

    return Attack(CHOICES_ONLY, {}, run, Work(1.0), label=choices_only_name(record))


def choices_only_name(record: AttackRecord | None = None) -> str:
    """The name of the findings of `choices_only_baseline`."""
    return CHOICES_ONLY.name if record is None else f"{CHOICES_ONLY.name}, {record.name}"


def questions_of(record: AttackRecord, items: Sequence[Fact]) -> tuple[Fact, ...]:
    """What an attack asks in the place of the facts, one for each; empty if a fact has none."""
    asked = tuple(items) if record.questions is None else record.questions(items)
    return asked if len(asked) == len(items) else ()


def fresh_facts(like: Facts | Sequence[Fact], n: int, seed: int = 0) -> tuple[Fact, ...]:
    """Facts of the same format that no model can know, each about an invented entity.

    The phrasings are those of a fact of `like`, in turn and shuffled, with an invented name in the place of the entity;
    the choices are those of another fact of its domain, and the answer is any of them. So neither the template nor the
    list of choices gives the answer away, and nor does the form of the name. They have no translations.

    Args:
        like: facts, or Facts (those to forget; names that are retained are not invented again).
    Raises:
        ArgumentError: if n < 1, or there are no facts.
        DataError: if an entity does not stand in each of its phrasings, or names run out.
    """
    items = like.forget if isinstance(like, Facts) else tuple(like)
    if n < 1 or not items:
        raise ArgumentError(f"{n} fresh facts like {len(items)} given; give at least one of each")
    rng = random.Random(f"{seed}:fresh")
    words = _names(rng, _words((*like.forget, *like.retain) if isinstance(like, Facts) else items))
    pools = by_domain(items)
    fresh: list[Fact] = []
    while len(fresh) < n:
        for fact in rng.sample(items, min(len(items), n - len(fresh))):
            others = [other for other in pools[fact.domain] if other.entity != fact.entity] or [fact]
            other, name = rng.choice(others), _like(fact.entity, words)
            answer = rng.choice(other.choices) if other.choices else other.answer
            invented = _renamed(fact, name, f"fresh/{normalized(name).replace(' ', '-')}")
            fresh.append(replace(invented, answer=answer, choices=other.choices, alternative=None, split=None))
    return tuple(fresh)


def renamed_facts(items: Sequence[Fact], attributes: Sequence[Fact], seed: int = 0) -> tuple[Facts, tuple[Fact, ...]]:
    """The facts and their attributes with an invented name for each entity, in every phrasing; answers and choices stay.

    No model can know such a fact, but one that is taught the attributes may guess it: the language of a country narrows
    its capital down. What it then gets right was not recovered, so it is the floor of an attack that teaches attributes.

    Args:
        attributes: other facts about the same entities, told apart by name.
    Returns:
        (the facts, the attributes), in order.
    Raises:
        DataError: if an entity does not stand in each of its phrasings, or names run out.
    """
    rng = random.Random(f"{seed}:renamed")
    words = _names(rng, _words((*items, *attributes)))
    names: dict[str, str] = {}
    renamed = []
    for fact in (*items, *attributes):
        if entity_of(fact) not in names:
            names[entity_of(fact)] = _like(fact.entity, words)
        renamed.append(_renamed(fact, names[entity_of(fact)], f"{fact.id}/renamed"))
    return Facts(tuple(renamed[: len(items)]), (), "renamed"), tuple(renamed[len(items) :])


def _right(fact: Fact, scores: list[float]) -> float:
    """The chance that a choice drawn among the best scored is the answer."""
    return float(scores[fact.choices.index(fact.answer)] == max(scores)) / scores.count(max(scores))


def _majority(fact: Fact, train: Sequence[Fact]) -> list[float]:
    answers = [normalized(other.answer) for other in train if other.domain == fact.domain]
    return [float(answers.count(normalized(choice))) for choice in fact.choices]


def _letter(fact: Fact, train: Sequence[Fact]) -> list[float]:
    places = [other.choices.index(other.answer) for other in train if other.choices]
    return [float(places.count(place)) for place in range(len(fact.choices))]


def _median(fact: Fact, train: Sequence[Fact]) -> list[float]:
    answers = [number for other in train if other.domain == fact.domain for number in _numbers((other.answer,))]
    numbers = _numbers(fact.choices)
    if not answers or not numbers:
        return [0.0] * len(fact.choices)
    middle = median(answers)
    return [-abs(number - middle) for number in numbers]


def _spelling(fact: Fact) -> list[float]:
    entity = normalized(fact.entity)
    return [float(common_prefix(entity, normalized(choice))) for choice in fact.choices]


_GUESSES: Mapping[str, Callable[[Fact, Sequence[Fact]], list[float]]] = {
    "chance": lambda fact, train: [0.0] * len(fact.choices),
    "majority answer": _majority,
    "majority letter": _letter,
    "longest choice": lambda fact, train: [float(len(choice)) for choice in fact.choices],
    "shortest choice": lambda fact, train: [-float(len(choice)) for choice in fact.choices],
    "median number": _median,
}


def _written(fact: Fact, train: Sequence[Fact]) -> float:
    """Whether a free answer is the one given most often in T, the first of equals."""
    answers = Counter(normalized(other.answer) for other in train if other.domain == fact.domain)
    return float(bool(answers) and answers.most_common(1)[0][0] == normalized(fact.answer))


def _numbers(texts: Sequence[str]) -> list[float]:
    """The numbers the texts are; empty unless all are numbers."""
    plain = [text.strip().replace(",", "") for text in texts]
    return [float(text) for text in plain] if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", text) for text in plain) else []


def _renamed(fact: Fact, name: str, identifier: str) -> Fact:
    """The fact with a name in the place of its entity in every phrasing, without translations."""
    prompt, *paraphrases = (_with_name(text, fact, name) for text in fact.prompts)
    return replace(
        fact, id=identifier, entity=name, prompt=prompt, paraphrases=tuple(paraphrases), translations={}
    )  # fmt: skip


def _with_name(text: str, fact: Fact, name: str) -> str:
    """The text with the name wherever the entity stood, capitalised where that was."""
    entity = fact.entity.strip()
    if entity == fact.id and not mentions(fact.prompt, entity):  # the id stands for an entity not given
        raise DataError(
            f"fact {fact.id!r} names no entity, so no fresh fact can be made like it; give its row the field 'entity', written "
            "as in the prompt, or do without the fresh floor"
        )
    spans = mentions(text, entity)
    if not spans:
        raise DataError(
            f"fact {fact.id!r}: the entity {fact.entity!r} does not stand in {text!r}, so no fresh fact can be made like "
            "it; name the entity as the prompt does, or do without the fresh floor"
        )
    for start, end in reversed(spans):
        text = text[:start] + (name[:1].upper() + name[1:] if text[start].isupper() else name) + text[end:]
    return text


def _names(rng: random.Random, taken: set[str]) -> Iterator[str]:
    """Words that nobody has used, each once, in lower case."""
    words = [a + b + c + d for a in _STARTS for b in _VOWELS for c in _MIDDLES for d in _ENDS]
    rng.shuffle(words)
    yield from (word for word in words if word not in taken)
    raise DataError(f"all {len(words)} invented names are used up; ask for fewer fresh facts")


def _like(entity: str, words: Iterator[str]) -> str:
    """A name of as many words as the entity, at most two, capitalised as they are."""
    parts = entity.split()[:2] or [entity]
    return " ".join(next(words).capitalize() if part[:1].isupper() else next(words) for part in parts)


def _words(items: Sequence[Fact]) -> set[str]:
    """Every word of every text of the facts."""
    texts = (text for fact in items for text in (*fact.prompts, *fact.choices, fact.answer, fact.entity))
    return {word for text in texts for word in normalized(text).split()}


# --- The retain check: accuracy on the retain facts and perplexity of the retain text


RETAIN = AttackRecord(RETAIN_CHECK, draws=False, decides=False)
TOKENS, LENGTH = 4000, 128
"""Tokens of the text that are read, and of one row of it."""


def retain_check(text: Batches | None) -> Attack:
    """Ask the facts of V, which are those to retain here, and read a text; not an attack; its result is stored as a finding.

    details: "perplexity" and "tokens" of the text, where there is one.
    """

    def run(subject: Subject, splits: Splits, _: int) -> AttackResult:
        answers = {"prompt": ask(subject, splits.test)} if splits.test else {}
        details = {}
        if text is not None:
            value, count = perplexity(subject, text, tokens=TOKENS)
            details = {"perplexity": value, "tokens": count}
        return AttackResult(answers, details=details)

    options = {"text": text.hash if text is not None else None, "tokens": TOKENS, "length": LENGTH}
    return Attack(RETAIN, options, run, Work(1.0))


def perplexity(subject: Subject, text: Batches, *, tokens: int) -> tuple[float, int]:
    """(exp of the mean negative log-likelihood, tokens it is the mean of) on the first rows of a text.

    Infinite where the model is so broken that its loss is not finite.

    Raises:
        NotEnoughRows: if the text has no token to predict.
    """
    total, count = 0.0, 0
    for batch in batches(subject, text, LENGTH, 8, False, "perplexity"):
        if count >= tokens:
            break
        use = batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
        with torch.no_grad(), evaluating(subject.model):
            logits = at_least_float32(subject.model(**inputs_of(batch)).logits[:, :-1][use])
        target = batch.input_ids[:, 1:][use]
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        count += len(target)
    if not count:
        raise NotEnoughRows(f"the text {text.name!r} has no token to predict; give a longer one")
    mean = torch.tensor(total / count, dtype=torch.float64)
    return (float(mean.exp()) if torch.isfinite(mean) else float("inf")), count
