"""Accuracy on facts: by the probability of the right choice, or by greedy generation; and a comparison of two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from repedit.activations.forward import (
    at_least_float32,
    check_ids,
    lengths,
    prefix_tree,
    retry_with_smaller_batch,
    tree_capacity,
    tree_groups,
    tree_log_probs,
)
from repedit.arguments import checked
from repedit.data import Fact, Facts, by_domain
from repedit.data.encoding import Encoded, Tokenizer, encoded_choices, question_ids
from repedit.data.fact_sets import fact_items
from repedit.data.grading import contains_answer
from repedit.errors import ArgumentError, DataError, NotFinite, check_choice, check_whole, is_whole
from repedit.hooks import evaluating
from repedit.metrics.generation import greedy_continuations
from repedit.models.subject import Subject

if TYPE_CHECKING:
    from transformers import TrainerCallback


HOWS = ("choice", "greedy")
RULES = ("sum", "mean")
# On a CPU 64 facts in a pass are 8 % faster than 32 and take twice the memory.
_ROWS = 32
# Nodes of a tree for each fact of a pass: passes of 256 tokens are as fast as longer ones.
_NODES = 8

# --- Accuracy on facts


@dataclass(frozen=True, eq=False)
@checked
class FactsAccuracy:
    """The facts that a model answers correctly, in the given order."""

    correct: NDArray[np.bool_]
    graded: NDArray[np.float64]
    """Log-probability of the right answer in nats; per token if the rule is "mean"."""
    ids: tuple[str, ...]

    def __repr__(self) -> str:
        low, high = self.interval
        return f"FactsAccuracy({self.accuracy:.3f} of {len(self.ids)} facts, 95 % interval {low:.3f} to {high:.3f})"

    @property
    def accuracy(self) -> float:
        """Share of the facts that are correct."""
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        from scipy.stats import binomtest

        interval = binomtest(int(self.correct.sum()), len(self.ids)).proportion_ci(method="wilson")
        return float(interval.low), float(interval.high)


@checked
def facts_accuracy(
    subject: Subject,
    facts: Facts | Iterable[Fact],
    *,
    how: str = "choice",
    rule: str = "sum",
    batch_size: int | str = "auto",
) -> FactsAccuracy:
    """Which facts a model answers correctly.

    "choice": after the prompt, the right answer has the highest log-probability of all choices; a tie is wrong.
    "greedy": the normalized answer occurs in the greedy continuation of the prompt, which has 4 tokens more than the
    longest answer.

    Args:
        facts: Facts (those to forget), or facts.
        how: "choice" or "greedy".
        rule: compares answers of several tokens by the "sum" of their log-probabilities, or by the "mean" per token.
        batch_size: facts in a forward pass; "auto" is 32, and half as many while memory does not suffice.
    Raises:
        UnknownName: if there is no such `how` or `rule`.
        DataError: if there are no facts, a fact has no choices, or two choices are the same tokens.
        NotFinite: if a log-probability is not finite.
    """
    check_choice(HOWS, how=how)
    check_choice(RULES, rule=rule)
    if batch_size != "auto" and not is_whole(batch_size):
        raise ArgumentError(f"batch_size={batch_size!r}; give 'auto' or a number of rows, at least 1")
    items = fact_items(facts)
    if not items:
        raise DataError("there are no facts to score; give at least one")
    bare = next((fact.id for fact in items if not fact.choices), None)
    if how == "choice" and bare is not None:
        raise DataError(f"fact {bare!r} has no choices; give some, or how='greedy'")
    options = [fact.choices if how == "choice" else (fact.answer,) for fact in items]

    def run(rows: int) -> tuple[list[NDArray[np.float64]], list[bool]]:
        pairs = choice_scores(subject, items, options, rows)
        greedy = _greedy_correct(subject, items, rows) if how == "greedy" else []
        return [part if rule == "sum" else part / count for part, count in pairs], greedy

    scores, correct = retry_with_smaller_batch(run, _ROWS)[0] if batch_size == "auto" else run(int(batch_size))
    right = [choices.index(fact.answer) for fact, choices in zip(items, options, strict=True)]
    graded = np.array([score[i] for score, i in zip(scores, right, strict=True)])
    if how == "choice":
        correct = chosen(items, options, scores)
    return FactsAccuracy(np.array(correct), graded, tuple(fact.id for fact in items))


@checked
def chosen(
    items: Sequence[Fact], options: Sequence[Sequence[str]], scores: Sequence[NDArray[np.float64]]
) -> list[bool]:
    """Whether the right answer of each fact has the highest score of all choices; a tie is wrong."""
    right = [choices.index(fact.answer) for fact, choices in zip(items, options, strict=True)]
    return [bool((score >= score[i]).sum() == 1) for score, i in zip(scores, right, strict=True)]


class _Question(NamedTuple):
    """The token ids of a prompt, and the ids with which each choice continues it."""

    prompt: list[int]
    answers: list[list[int]]


@checked
def choice_scores(
    subject: Subject,
    items: Sequence[Fact],
    options: Sequence[Sequence[str]],
    rows: int,
    *,
    prompts: Callable[[Sequence[int]], AbstractContextManager[None]] | None = None,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(summed log-probability, number of tokens) of the choices of every fact.

    Args:
        prompts: a context, such as one of hooks, for the pass over the whole prompts of the facts with these numbers;
            choices are read outside it.
    """
    tokenizer = subject.need_tokenizer()
    questions = _questions(tokenizer, items, options)
    _check_questions(subject, items, questions)
    logs: dict[int, NDArray[np.float64]] = {}
    trees = None if prompts is not None else _trees(subject, questions, rows)
    if trees is not None:
        for part in trees:
            logs |= zip(part, _tree_choice_logs(subject, [questions[i] for i in part]), strict=True)
    else:
        for part in lengths([question.prompt for question in questions], rows):
            context = None if prompts is None else prompts(part)
            logs |= zip(part, _choice_logs(subject, [questions[i] for i in part], context), strict=True)
    for i, fact in enumerate(items):
        if not np.isfinite(logs[i]).all():
            raise NotFinite(
                f"fact {fact.id!r}: the log-probabilities of {list(options[i])} are {logs[i].tolist()}; "
                "load the model in float32?"
            )
    return [(logs[i], np.array([float(len(tokens)) for tokens in questions[i].answers])) for i in range(len(items))]


@checked
def choice_tokens(tokenizer: Tokenizer, fact: Fact, choices: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """(ids of the prompt, ids with which each choice continues it).

    Raises:
        DataError: if the prompt has no token, or a choice has no token of its own.
    """
    return _tokens(fact, choices, encoded_choices(tokenizer, [(fact.prompt, choices)])[0])


def _tokens(fact: Fact, choices: Sequence[str], texts: Sequence[Encoded]) -> tuple[list[int], list[list[int]]]:
    # One start for all choices: a token merged across the boundary counts as part of each choice.
    start = min(text.start for text in texts)
    if not start:
        raise DataError(f"fact {fact.id!r}: no token stands before the answer; give a longer prompt")
    empty = next((choice for choice, text in zip(choices, texts, strict=True) if len(text.ids) == start), None)
    if empty is not None:
        raise DataError(f"fact {fact.id!r}: the choice {empty!r} has no token of its own; reword it")
    return texts[0].ids[:start], [text.ids[start:] for text in texts]


def _questions(tokenizer: Tokenizer, items: Sequence[Fact], options: Sequence[Sequence[str]]) -> list[_Question]:
    texts = encoded_choices(tokenizer, [(fact.prompt, choices) for fact, choices in zip(items, options, strict=True)])
    return [_question(*row) for row in zip(items, options, texts, strict=True)]


def _check_questions(subject: Subject, items: Sequence[Fact], questions: Sequence[_Question]) -> None:
    """Refuse ids that the model has no embedding for, and texts with more tokens than it has positions."""
    texts = [(fact, q.prompt + answer) for fact, q in zip(items, questions, strict=True) for answer in q.answers]
    try:
        # Looking up the limits of a model takes longer than comparing ids with them, so all texts are checked at once.
        check_ids(subject, [i for _, ids in texts for i in ids], "facts", size=max(len(ids) for _, ids in texts))
    except DataError:
        for fact, ids in texts:
            check_ids(subject, ids, f"fact {fact.id!r}")
        raise


def _question(fact: Fact, choices: Sequence[str], texts: Sequence[Encoded]) -> _Question:
    question = _Question(*_tokens(fact, choices, texts))
    for i, ids in enumerate(question.answers):
        if ids in question.answers[:i]:
            same = choices[question.answers.index(ids)]
            raise DataError(
                f"fact {fact.id!r}: the choices {same!r} and {choices[i]!r} are the same tokens; reword one"
            )
    return question


def _trees(subject: Subject, questions: Sequence[_Question], rows: int) -> list[list[int]] | None:
    """Groups of questions that are read as one tree each; None where the model does not read trees so large."""
    texts = [[question.prompt + answer[:-1] for answer in question.answers] for question in questions]
    groups = list(tree_groups(texts, most=rows, extra=_NODES * rows))
    capacity = tree_capacity(subject)
    # Groups are smaller where the attention of the model does not reach as far.
    if capacity < max(len(prefix_tree([t for i in group for t in texts[i]]).tokens) for group in groups):
        groups = [[i] for i in range(len(questions))]
        if capacity < max(len(prefix_tree(part).tokens) for part in texts):
            return None
    return groups


def _tree_choice_logs(subject: Subject, questions: Sequence[_Question]) -> list[NDArray[np.float64]]:
    """The summed log-probability of every choice of questions that are read as one tree."""
    answers = [(question.prompt, answer) for question in questions for answer in question.answers]
    scored = [[False] * len(prompt) + [True] * len(answer) for prompt, answer in answers]
    with torch.no_grad(), evaluating(subject.model):
        logs = tree_log_probs(subject, [prompt + answer for prompt, answer in answers], scored).double().tolist()
    ends = np.cumsum([len(answer) for _, answer in answers]).tolist()
    sums = iter([sum(logs[end - len(answer) : end]) for (_, answer), end in zip(answers, ends, strict=True)])
    return [np.array([next(sums) for _ in question.answers]) for question in questions]


def _choice_logs(
    subject: Subject, questions: Sequence[_Question], prompts: AbstractContextManager[None] | None = None
) -> list[NDArray[np.float64]]:
    """The summed log-probability of every choice of questions whose prompts have equal length.

    The common prefix of all prompts is read once, then the rest of each. Then the tree of choices is read level by
    level, each distinct prefix once, on top of the cache of its prompt; nothing is padded or read twice.
    """
    sums = [np.zeros(len(question.answers)) for question in questions]
    nodes: list[tuple[int, tuple[int, ...]]] = [(number, ()) for number in range(len(questions))]
    ids = torch.tensor([question.prompt for question in questions], device=subject.device)
    with torch.no_grad(), evaluating(subject.model):
        length, cache = (0, None) if prompts is not None else _shared_prefix(subject, ids)
        ids = ids[:, length:]
        while nodes:
            length += ids.shape[1]
            mask = torch.ones(len(nodes), length, dtype=torch.long, device=subject.device)
            with prompts or nullcontext():
                out = subject.model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
            cache, prompts = out.past_key_values, None
            ends = [(row, *end) for row, node in enumerate(nodes) for end in _next_tokens(node, questions)]
            logs = _token_logs(out.logits[:, 0], [row for row, _, _ in ends], [token for _, _, token in ends])
            for (row, choice, _), value in zip(ends, logs, strict=True):
                sums[nodes[row][0]][choice] += value
            parents, nodes = _children(nodes, questions)
            if nodes:
                cache.batch_select_indices(torch.tensor(parents, device=subject.device))
                ids = torch.tensor([[path[-1]] for _, path in nodes], device=subject.device)
    return sums


def _shared_prefix(subject: Subject, ids: Int[Tensor, "b t"]) -> tuple[int, Any]:
    """(length of the common prefix of all rows, its cache for every row); the last token of a row is not read."""
    same = (ids[:, :-1] == ids[:1, :-1]).all(0)
    length = int(same.to(torch.uint8).cumprod(0).sum())
    if len(ids) == 1 or not length:
        return 0, None
    out = subject.model(
        input_ids=ids[:1, :length], attention_mask=torch.ones_like(ids[:1, :length]), use_cache=True, logits_to_keep=1
    )
    out.past_key_values.batch_select_indices(torch.zeros(len(ids), dtype=torch.long, device=subject.device))
    return length, out.past_key_values


def _next_tokens(node: tuple[int, tuple[int, ...]], questions: Sequence[_Question]) -> list[tuple[int, int]]:
    """(choice, its next token) of every choice that continues from a node."""
    number, path = node
    answers = questions[number].answers
    return [(i, a[len(path)]) for i, a in enumerate(answers) if len(a) > len(path) and tuple(a[: len(path)]) == path]


def _children(
    nodes: Sequence[tuple[int, tuple[int, ...]]], questions: Sequence[_Question]
) -> tuple[list[int], list[tuple[int, tuple[int, ...]]]]:
    """(row of each node's parent, nodes): the distinct prefixes one token longer from which a choice still continues."""
    parents: dict[tuple[int, tuple[int, ...]], int] = {}
    for row, (number, path) in enumerate(nodes):
        for choice, token in _next_tokens((number, path), questions):
            if len(questions[number].answers[choice]) > len(path) + 1:
                parents[(number, (*path, token))] = row
    return list(parents.values()), list(parents)


def _token_logs(logits: Float[Tensor, "r v"], rows: list[int], tokens: list[int]) -> list[float]:
    """Log-probabilities of one token in each row."""
    wide = at_least_float32(logits)
    return (wide[rows, tokens] - wide.logsumexp(-1)[rows]).double().tolist()


def _greedy_correct(subject: Subject, items: Sequence[Fact], rows: int) -> list[bool]:
    """Whether each answer occurs in the greedy continuation of its prompt."""
    prompts, tokens = open_prompts(subject, items)
    correct = [False] * len(items)
    for part in lengths(prompts, rows):
        names = [f"the prompt of fact {items[i].id!r}" for i in part]
        for i, text in zip(part, greedy_continuations(subject, [prompts[i] for i in part], tokens, names), strict=True):
            correct[i] = contains_answer(text, items[i].answer, items[i].choices)
    return correct


@checked
def open_prompts(subject: Subject, items: Sequence[Fact]) -> tuple[list[list[int]], int]:
    """(the token ids of each prompt, the tokens of a continuation): as many as the longest answer has, and 4.

    Raises:
        DataError: if a prompt has no tokens, or leaves no room for the continuation.
    """
    tokenizer = subject.need_tokenizer()
    texts = [text for (text,) in encoded_choices(tokenizer, [(fact.prompt, (fact.answer,)) for fact in items])]
    prompts = [question_ids(tokenizer, fact.prompt) for fact in items]
    empty = next((fact.id for fact, ids in zip(items, prompts, strict=True) if not ids), None)
    if empty is not None:
        raise DataError(f"fact {empty!r}: the prompt has no tokens; give a longer one")
    tokens = max(len(ids) - start for ids, start in texts) + 4
    for fact, ids in zip(items, prompts, strict=True):
        check_ids(subject, ids, f"the prompt of fact {fact.id!r}", size=len(ids) + tokens - 1)
    return prompts, tokens


# --- Comparison of two models by domain


@dataclass(frozen=True, eq=False)
@checked
class Knowledge:
    """Accuracy on the facts of one domain, before and after an edit."""

    before: FactsAccuracy
    after: FactsAccuracy
    chance: float
    """Mean accuracy of guessing among the choices."""


@checked
def knowledge(base: Subject, edited: Subject, facts: Iterable[Fact], *, how: str = "choice") -> Mapping[str, Knowledge]:
    """Accuracy of both models on each domain of the facts, in the facts' own phrasing.

    Args:
        how: "choice" or "greedy", as in `facts_accuracy`.
    """
    by_name = {}
    for domain, items in by_domain(facts).items():
        before, after = (facts_accuracy(subject, items, how=how) for subject in (base, edited))
        guesses = [1 / len(fact.choices) for fact in items if fact.choices]
        by_name[domain] = Knowledge(before, after, sum(guesses) / len(guesses) if how == "choice" else 0.0)
    return by_name


# --- Accuracy on facts while a `transformers.Trainer` fine-tunes a model


@checked
def trainer_callback(subject: Subject, facts: Mapping[str, Facts] | Facts, *, every: int = 10) -> TrainerCallback:
    """A callback that measures a model on facts before the first step, every few steps, and after the last one.

    The accuracies go to `trainer.state.log_history`, one row for each measurement: {"step": 10, "facts/capitals": 0.42}. It
    is saved with the state of the Trainer; loggers such as TensorBoard, to which the Trainer sends rows of its own, do not
    get these. A LoRA adapter that PEFT injected into the model is measured with it.

    Args:
        subject: `rp.wrap(model, tokenizer)` of the model that the Trainer trains.
        facts: the facts, of which those to forget are asked; several sets by name.
        every: optimizer steps between two measurements.
    Raises:
        ArgumentError: if `every` is not a positive whole number; when training begins, if the Trainer trains another model.
            If the subject has no tokenizer.
        DataError: if there are no facts.
    """
    from transformers import TrainerCallback

    check_whole(every=every)
    subject.need_tokenizer()
    if not isinstance(facts, Facts | Mapping):
        raise DataError(f"trainer_callback() was given a {type(facts).__name__}; give Facts, or several by name")
    sets = {facts.name: facts} if isinstance(facts, Facts) else dict(facts)
    wrong = next((name for name, part in sets.items() if not isinstance(part, Facts)), None)
    if wrong is not None:
        raise DataError(f"trainer_callback() was given a {type(sets[wrong]).__name__} as {wrong!r}; give Facts")
    if not sets or not all(part.forget for part in sets.values()):
        raise DataError("trainer_callback() was given no facts to ask; give at least one to each set")

    class FactsCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
        """Measures `sets` on the model of `subject`."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            trained = {p.data_ptr() for p in held["model"].parameters()}
            if not {p.data_ptr() for p in subject.model.parameters()} & trained:
                raise ArgumentError(
                    "the Trainer trains another model than the callback measures; wrap the model that the Trainer has"
                )
            _measure(state)

        def on_step_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            if state.global_step % every == 0:
                _measure(state)

        def on_train_end(self, args: Any, state: Any, control: Any, **held: Any) -> None:
            if state.global_step % every:
                _measure(state)

    def _measure(state: Any) -> None:
        accuracies = {f"facts/{name}": facts_accuracy(subject, part).accuracy for name, part in sets.items()}
        state.log_history.append({"step": state.global_step, **accuracies})

    return FactsCallback()
