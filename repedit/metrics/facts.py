"""Whether a model knows facts, by the probability it gives to their answers or by what it writes; two models side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import at_least_float32, check_ids, retry_with_smaller_batch
from repedit.data import Fact, Facts, by_domain
from repedit.data.encoding import encoded, question_ids
from repedit.data.grading import contains_answer
from repedit.errors import ArgumentError, DataError, NotFinite, UnknownName, nearest
from repedit.hooks import evaluating
from repedit.metrics.answers import (
    AnswerNll,
    ByRow,
    answer_nll,
    answer_probability,
    exact_memorization,
    extraction_strength,
)
from repedit.metrics.generation import written
from repedit.models.subject import Subject

# --- Whether a model knows facts: the probability it gives to their answers, or what it writes by itself


HOWS = ("choice", "greedy")
RULES = ("sum", "mean")
# On a CPU 64 facts a pass are 8 % faster than 32 and take twice the memory.
_ROWS = 32


@dataclass(frozen=True, eq=False)
class FactsAccuracy:
    """Which facts a model got right, in the order they were given."""

    correct: NDArray[np.bool_]
    graded: NDArray[np.float64]
    """Log-probability of the right answer, in nats; a token where the rule is "mean"."""
    ids: tuple[str, ...]

    def __repr__(self) -> str:
        low, high = self.interval
        return f"FactsAccuracy({self.accuracy:.3f} of {len(self.ids)} facts, 95 % interval {low:.3f} to {high:.3f})"

    @property
    def accuracy(self) -> float:
        """Share of facts that were right."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        n, p, z = len(self.ids), self.accuracy, 1.959963984540054
        middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def facts_accuracy(
    subject: Subject,
    facts: Facts | Iterable[Fact],
    *,
    how: str = "choice",
    rule: str = "sum",
    batch_size: int | str = "auto",
) -> FactsAccuracy:
    """Which facts a model gets right.

    "choice": the right answer has the highest log-probability after the prompt among the choices, each after one
    space; a tie is wrong. "greedy": the normalised answer stands in the greedy continuation of the prompt, which has
    as many tokens as the longest answer and 4 more.

    Args:
        facts: Facts (those to forget), or facts.
        rule: what compares answers of several tokens: the "sum" of their log-probabilities, or the "mean" a token.
        batch_size: facts a forward pass; "auto" is 32, some two hundred short rows with their choices, and half as
            many for as long as memory does not suffice.
    Raises:
        UnknownName: if there is no such way or rule.
        DataError: if there are no facts, a fact has no choices, or two choices are the same tokens.
        NotFinite: if a log-probability is not finite.
    """
    for what, value, valid in (("how", how, HOWS), ("rule", rule, RULES)):
        if value not in valid:
            raise UnknownName(f"{what}={value!r}; {nearest(value, valid)}")
    if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
        raise ArgumentError(f"batch_size={batch_size!r}; give 'auto' or a number of rows, at least 1")
    items = facts.forget if isinstance(facts, Facts) else tuple(facts)
    if not items:
        raise DataError("there are no facts to score; give at least one")
    bare = next((fact.id for fact in items if not fact.choices), None)
    if how == "choice" and bare is not None:
        raise DataError(f"fact {bare!r} has no choices; give some, or how='greedy'")
    options = [fact.choices if how == "choice" else (fact.answer,) for fact in items]

    def run(rows: int) -> tuple[list[NDArray[np.float64]], list[bool]]:
        pairs = choice_scores(subject, items, options, rows)
        written = _written(subject, items, rows) if how == "greedy" else []
        return [part if rule == "sum" else part / count for part, count in pairs], written

    scores, correct = retry_with_smaller_batch(run, _ROWS)[0] if batch_size == "auto" else run(int(batch_size))
    right = [choices.index(fact.answer) for fact, choices in zip(items, options, strict=True)]
    graded = np.array([score[i] for score, i in zip(scores, right, strict=True)])
    if how == "choice":
        correct = [bool((score >= score[i]).sum() == 1) for score, i in zip(scores, right, strict=True)]
    return FactsAccuracy(np.array(correct), graded, tuple(fact.id for fact in items))


class _Question(NamedTuple):
    """The tokens that all choices of a fact begin with, and how each goes on."""

    prompt: list[int]
    answers: list[list[int]]


def choice_scores(
    subject: Subject, items: Sequence[Fact], options: Sequence[Sequence[str]], rows: int
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(summed log-probability, number of tokens) of the choices of every fact."""
    tokenizer = subject.need_tokenizer()
    asked = [_question(tokenizer, fact, choices) for fact, choices in zip(items, options, strict=True)]
    for fact, question in zip(items, asked, strict=True):
        for answer in question.answers:
            check_ids(subject, question.prompt + answer, f"fact {fact.id!r}")
    found: dict[int, NDArray[np.float64]] = {}
    for part in lengths([question.prompt for question in asked], rows):
        found |= zip(part, _answered(subject, [asked[i] for i in part]), strict=True)
    for i, fact in enumerate(items):
        if not np.isfinite(found[i]).all():
            raise NotFinite(
                f"fact {fact.id!r}: the log-probabilities of {list(options[i])} are {found[i].tolist()}; "
                "load the model in float32?"
            )
    return [(found[i], np.array([float(len(tokens)) for tokens in asked[i].answers])) for i in range(len(items))]


def choice_tokens(tokenizer: Any, fact: Fact, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """(the tokens that all choices of a fact begin with, how each goes on).

    Raises:
        DataError: if no token stands before the answers, or a choice has no token of its own.
    """
    texts = [encoded(tokenizer, fact.prompt, choice) for choice in choices]
    # One start for all choices: a token merged across the boundary counts for each of them.
    start = min(text.start for text in texts)
    if not start:
        raise DataError(f"fact {fact.id!r}: no token stands before the answer; give a longer prompt")
    empty = next((choice for choice, text in zip(choices, texts, strict=True) if len(text.ids) == start), None)
    if empty is not None:
        raise DataError(f"fact {fact.id!r}: the choice {empty!r} has no token of its own; reword it")
    return texts[0].ids[:start], [text.ids[start:] for text in texts]


def _question(tokenizer: Any, fact: Fact, choices: Sequence[str]) -> _Question:
    asked = _Question(*choice_tokens(tokenizer, fact, choices))
    for i, ids in enumerate(asked.answers):
        if ids in asked.answers[:i]:
            same = choices[asked.answers.index(ids)]
            raise DataError(
                f"fact {fact.id!r}: the choices {same!r} and {choices[i]!r} are the same tokens; reword one"
            )
    return asked


def lengths(prompts: Sequence[Sequence[int]], rows: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, at most `rows` together, so that no prompt is padded."""
    for length in sorted({len(ids) for ids in prompts}):
        group = [i for i, ids in enumerate(prompts) if len(ids) == length]
        yield from (group[i : i + rows] for i in range(0, len(group), rows))


def _answered(subject: Subject, questions: Sequence[_Question]) -> list[NDArray[np.float64]]:
    """The summed log-probability of every choice of questions whose prompts have one length.

    What all prompts begin with is read once, then the rest of each. Then the tree of choices is read level by level,
    each distinct beginning once, on top of what its prompt left in the cache; nothing is padded or read twice.
    """
    found = [np.zeros(len(question.answers)) for question in questions]
    nodes: list[tuple[int, tuple[int, ...]]] = [(number, ()) for number in range(len(questions))]
    ids = torch.tensor([question.prompt for question in questions], device=subject.device)
    with torch.no_grad(), evaluating(subject.model):
        length, cache = _begun(subject, ids)
        ids = ids[:, length:]
        while nodes:
            length += ids.shape[1]
            mask = torch.ones(len(nodes), length, dtype=torch.long, device=subject.device)
            out = subject.model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            ends = [(row, *end) for row, node in enumerate(nodes) for end in _ends(node, questions)]
            logs = _picked(out.logits[:, 0], [row for row, _, _ in ends], [token for _, _, token in ends])
            for (row, choice, _), value in zip(ends, logs, strict=True):
                found[nodes[row][0]][choice] += value
            parents, nodes = _children(nodes, questions)
            if nodes:
                cache.batch_select_indices(torch.tensor(parents, device=subject.device))
                ids = torch.tensor([[path[-1]] for _, path in nodes], device=subject.device)
    return found


def _begun(subject: Subject, ids: Int[Tensor, "b t"]) -> tuple[int, Any]:
    """(tokens that all rows begin with, what reading them left in the cache, for every row); no row is read to its end."""
    same = (ids[:, :-1] == ids[:1, :-1]).all(0)
    length = int(same.to(torch.uint8).cumprod(0).sum())
    if len(ids) == 1 or not length:
        return 0, None
    out = subject.model(
        input_ids=ids[:1, :length], attention_mask=torch.ones_like(ids[:1, :length]), use_cache=True, logits_to_keep=1
    )
    out.past_key_values.batch_select_indices(torch.zeros(len(ids), dtype=torch.long, device=subject.device))
    return length, out.past_key_values


def _ends(node: tuple[int, tuple[int, ...]], questions: Sequence[_Question]) -> list[tuple[int, int]]:
    """(choice, its next token) of every choice that goes on from a node."""
    number, path = node
    answers = questions[number].answers
    return [(i, a[len(path)]) for i, a in enumerate(answers) if len(a) > len(path) and tuple(a[: len(path)]) == path]


def _children(
    nodes: Sequence[tuple[int, tuple[int, ...]]], questions: Sequence[_Question]
) -> tuple[list[int], list[tuple[int, tuple[int, ...]]]]:
    """The distinct beginnings one token longer from which a choice still goes on, and the row of each one's parent."""
    found: dict[tuple[int, tuple[int, ...]], int] = {}
    for row, (number, path) in enumerate(nodes):
        for choice, token in _ends((number, path), questions):
            if len(questions[number].answers[choice]) > len(path) + 1:
                found[(number, (*path, token))] = row
    return list(found.values()), list(found)


def _picked(logits: Float[Tensor, "r v"], rows: list[int], tokens: list[int]) -> list[float]:
    """Log-probabilities of tokens, one at a row."""
    wide = at_least_float32(logits)
    return (wide[rows, tokens] - wide.logsumexp(-1)[rows]).double().tolist()


def _written(subject: Subject, items: Sequence[Fact], rows: int) -> list[bool]:
    """Whether each answer stands in the greedy continuation of its prompt."""
    tokenizer = subject.need_tokenizer()
    texts = [encoded(tokenizer, fact.prompt, fact.answer) for fact in items]
    prompts = [question_ids(tokenizer, fact.prompt) for fact in items]
    empty = next((fact.id for fact, ids in zip(items, prompts, strict=True) if not ids), None)
    if empty is not None:
        raise DataError(f"fact {empty!r}: the prompt has no tokens; give a longer one")
    tokens = max(len(ids) - start for ids, start in texts) + 4
    for fact, ids in zip(items, prompts, strict=True):
        check_ids(subject, ids, f"the prompt of fact {fact.id!r}", size=len(ids) + tokens - 1)
    found = [False] * len(items)
    for part in lengths(prompts, rows):
        names = [f"the prompt of fact {items[i].id!r}" for i in part]
        for i, text in zip(part, written(subject, [prompts[i] for i in part], tokens, names), strict=True):
            found[i] = contains_answer(text, items[i].answer, items[i].choices)
    return found


# --- What two models know, domain by domain, side by side


@dataclass(frozen=True, eq=False)
class Knowledge:
    """Accuracy on the facts of one domain, before and after an edit."""

    before: FactsAccuracy
    after: FactsAccuracy
    chance: float
    """What guessing among the choices gets right, on average."""


def knowledge(base: Subject, edited: Subject, facts: Iterable[Fact], *, how: str = "choice") -> Mapping[str, Knowledge]:
    """Accuracy of both models on each domain of the facts, in the facts' own phrasing.

    Args:
        how: "choice" or "greedy", as in `facts_accuracy`.
    """
    found = {}
    for domain, items in by_domain(facts).items():
        before, after = (facts_accuracy(subject, items, how=how) for subject in (base, edited))
        guesses = [1 / len(fact.choices) for fact in items if fact.choices]
        found[domain] = Knowledge(before, after, sum(guesses) / len(guesses) if how == "choice" else 0.0)
    return found


__all__ = [
    "AnswerNll",
    "ByRow",
    "FactsAccuracy",
    "answer_nll",
    "answer_probability",
    "choice_scores",
    "exact_memorization",
    "extraction_strength",
    "facts_accuracy",
    "lengths",
]
