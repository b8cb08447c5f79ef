"""Tiny language models that are trained on known facts, and controls trained from them."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from repedit.auditing.attack import ask
from repedit.auditing.data import reverse_questions
from repedit.data import Fact, Facts, Row, with_paraphrases
from repedit.data.encoding import encoded
from repedit.data.fact_sets import seeded_order
from repedit.data.generated import RELATIONS, invented
from repedit.errors import ArgumentError, DataError, TrainingError
from repedit.models.subject import Subject, subject_of
from repedit.training.optimizers import descend

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

# --- Tiny language models that are taught facts
#
# A taught model answers every fact that it was trained on, in every phrasing, and guesses all others. Training one with
# some facts and one without them gives the original and the reference of an audit in seconds.


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
POSITIONS = 512
_WORD = r"\w+|[^\w\s]+"
# Weight of the tokens of a prompt in the loss. Names cannot be predicted; at weight 1 they slow the facts down.
_PROMPT = 0.1
_TOGETHER = 4


def vocabulary(items: Iterable[Fact], *, words: Iterable[str] = ()) -> Any:
    """A transformers tokenizer with one token for every word and punctuation mark in the facts and in `words`.

    White space separates words and is not encoded; unknown words become "<unk>". No special tokens are added to a text.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [text for fact in items for text in (*fact.prompts, fact.answer, *fact.choices)]
    word_set = {word for text in (*texts, *words) for word in re.findall(_WORD, text)} - set(SPECIAL)
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *sorted(word_set)))}, unk_token=SPECIAL[3])
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    pad, bos, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unknown
    )


def untaught(
    tokenizer: PreTrainedTokenizerBase, *, layers: int = 2, width: int = 64, heads: int = 4, seed: int = 0
) -> Subject:
    """An untrained Llama for a tokenizer: MLPs of twice the width, untied embeddings, float32.

    Raises:
        ArgumentError: if the width is not a multiple of twice the heads.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if layers < 1 or heads < 1 or width < 2 * heads or width % (2 * heads):
        raise ArgumentError(
            f"layers={layers}, width={width}, heads={heads}; the width is a multiple of twice the heads"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=POSITIONS, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return subject_of(LlamaForCausalLM(config).eval(), tokenizer)


def taught(
    items: Sequence[Fact],
    *,
    tokenizer: Any = None,
    layers: int = 2,
    width: int = 64,
    seed: int = 0,
    steps: int = 300,
    rate: float = 4e-3,
    batch_size: int = 16,
) -> Subject:
    """A tiny model trained from scratch until it knows the facts in every phrasing.

    The rows of half of the batches hold one fact, those of the others two to four facts in sequence, so that the model
    also understands a question that follows other text.

    Args:
        items: the facts; each phrasing is a prompt.
        tokenizer: one from `vocabulary` that also covers other facts; None makes one from these facts.
        steps: steps of AdamW, with a warm-up of 20 steps and a cosine decay to 5 % of the rate.
    Raises:
        DataError: if there are no facts.
        TrainingError: if a fact is not known after the steps.
    """
    if not items:
        raise DataError("there are no facts to teach; give at least one")
    tokenizer = vocabulary(items) if tokenizer is None else tokenizer
    subject = untaught(tokenizer, layers=layers, width=width, seed=seed)
    rows = [[encoded(tokenizer, prompt, fact.answer) for prompt in fact.prompts] for fact in items]
    rng = random.Random(seed)

    def batch() -> _Batch:
        # As many facts in each row, so that little of the batch is padding.
        count = 1 if rng.random() < 0.5 else rng.randint(2, _TOGETHER)
        picked = [_together(rng, rows, count, tokenizer.eos_token_id) for _ in range(batch_size)]
        return _weighted_batch([ids for ids, _ in picked], [weights for _, weights in picked], tokenizer.pad_token_id)

    _train(subject.model, batch, steps, lambda step: rate * _schedule(step, steps))
    answers = ask(subject, with_paraphrases(items))
    missed = [name for name, right in zip(answers.ids, answers.correct, strict=True) if not right]
    if missed:
        raise TrainingError(
            f"{len(missed)} of {len(answers.ids)} phrasings are not known after {steps} steps, such as {missed[:3]}; "
            f"raise steps, or lower rate from {rate:g}"
        )
    return subject


def continued(
    subject: Subject,
    rows: Sequence[Row],
    *,
    weights: Sequence[float] | None = None,
    steps: int = 100,
    rate: float = 1e-3,
    batch_size: int = 32,
    only: Collection[str] | None = None,
    after: Callable[[nn.Module], None] = lambda model: None,
    seed: int = 0,
) -> Subject:
    """A copy of a model after `steps` more steps of AdamW on the weighted mean of the cross-entropy of answers.

    Rows with the same prompt share a batch, so that two answers to it are learned in proportion to their weights.

    Args:
        weights: weight of each row in the loss; a negative weight makes its answer unlikely. None for 1 each.
        only: names of the parameters to train; None for all.
        batch_size: rows in a step; a step may have more, so that the rows of its last prompt stay together.
        after: called with the model after every step, for example to restrict its weights.
    Raises:
        ArgumentError: if the numbers of weights and rows differ, or a parameter does not exist.
        TrainingError: if the loss is not finite.
    """
    tokenizer = subject.need_tokenizer()
    counts = [1.0] * len(rows) if weights is None else list(weights)
    named = dict(subject.model.named_parameters())
    absent = sorted(set(only or ()) - set(named))
    if len(counts) != len(rows) or absent or not rows:
        raise ArgumentError(
            f"{len(counts)} weights for {len(rows)} rows, no parameters {absent}; give one weight a row"
        )
    trained = subject_of(copy.deepcopy(subject.model), tokenizer)
    for name, p in trained.model.named_parameters():
        p.requires_grad_(only is None or name in only)
    read = [encoded(tokenizer, row.prompt, row.answer) for row in rows]
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.prompt, []).append(i)
    rng, queue = random.Random(seed), list[list[int]]()

    def batch() -> _Batch:
        part: list[int] = []
        while len(part) < batch_size:
            queue.extend([] if queue else rng.sample(list(groups.values()), len(groups)))
            part += queue.pop()
        marks = [[0.0] * read[i].start + [counts[i]] * (len(read[i].ids) - read[i].start) for i in part]
        return _weighted_batch([read[i].ids for i in part], marks, tokenizer.pad_token_id)

    _train(trained.model, batch, steps, lambda step: rate * _decay(step, steps), after)
    return trained


class _Batch(NamedTuple):
    ids: Tensor
    weights: Tensor
    """Weight of each token in the loss."""


def _together(rng: random.Random, rows: Sequence[Sequence[Any]], count: int, end: int) -> tuple[list[int], list[float]]:
    """The tokens of some facts in sequence, and their weights."""
    ids: list[int] = []
    weights: list[float] = []
    for _ in range(count):
        ids_of_fact, start = rng.choice(rng.choice(rows))
        ids += ids_of_fact
        weights += [_PROMPT] * start + [1.0] * (len(ids_of_fact) - start)
    return [*ids, end], [*weights, _PROMPT]


def _weighted_batch(ids: Sequence[list[int]], weights: Sequence[list[float]], pad: int) -> _Batch:
    width = max(map(len, ids))
    return _Batch(
        torch.tensor([row + [pad] * (width - len(row)) for row in ids]),
        torch.tensor([row + [0.0] * (width - len(row)) for row in weights]),
    )


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 20) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))


def _decay(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 10) * (1 - 0.9 * step / steps)


def _train(
    model: LlamaForCausalLM,
    batch: Callable[[], _Batch],
    steps: int,
    rate: Callable[[int], float],
    after: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """AdamW without weight decay, gradients clipped to norm 1. Causal attention ignores the padding on the right."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)

    def gradients(step: int) -> float:
        ids, weights = (x.to(parameters[0].device) for x in batch())
        use = weights[:, 1:] != 0
        counts = weights[:, 1:][use]
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][use]
        logs = model.get_output_embeddings()(hidden).log_softmax(-1)
        loss = -(logs.gather(1, ids[:, 1:][use][:, None])[:, 0] * counts).sum() / counts.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        return float(loss.detach())

    log = descend(
        parameters, optimizer, gradients, steps, lr=lambda step: rate(step - 1),
        after=torch.no_grad()(lambda step: after(model)),
    )  # fmt: skip
    if log.diverged:
        raise TrainingError(f"{log.fault}; lower the rate")
    optimizer.zero_grad()
    for p in model.parameters():
        p.requires_grad_(True)


# --- The world of the controls: facts, models that know them, and models that were never trained on them


FORGET, RETAIN, ATTRIBUTES = 160, 96, 48
"""People whose city is to be forgotten, other people, and how many of the first have a profession as well.

With 160 facts, twenty attacks on a model that never knew all stay below a recovery of .2 in 999 cases of 1,000
(`repedit.auditing.verdict.items_needed` asks for 104 facts for 9 cases of 10, and for 158 at this rate).
"""
REFUSAL = "unknown"
# Possible answers to questions in another form; without tokens of their own all would be the unknown token.
WORDS = (REFUSAL, "Yes", "No", *"ABCDEFGHIJKLMNOP")
_CITY, _PROFESSION = "city", "profession"


@dataclass(frozen=True, eq=False)
class World:
    """Facts, a model that knows all of them, and two that were not trained on those to forget, with one tokenizer."""

    facts: Facts
    strangers: tuple[Fact, ...]
    """Facts like those to forget, about people that no model was trained on; their names are in the vocabulary."""
    attributes: tuple[Fact, ...]
    """What all three models know of people whose city is to be forgotten."""
    original: Subject
    reference: Subject
    other: Subject
    """A second reference, from another seed."""
    seed: int = 0


class Questions(NamedTuple):
    """The facts of one seed."""

    facts: Facts
    strangers: tuple[Fact, ...]
    attributes: tuple[Fact, ...]


TAUGHT = ("original", "reference", "other")
"""The models of a world."""


def world(seed: int = 0, models: Mapping[str, Subject] | None = None) -> World:
    """The facts and the three models of one seed.

    Args:
        models: each of `TAUGHT`, if they were taught before; None teaches them.
    Raises:
        TrainingError: if a model does not learn its facts.
    """
    models = {role: taught_model(role, seed) for role in TAUGHT} if models is None else models
    facts, strangers, attributes = questions(seed)
    original, reference, other = (models[role] for role in TAUGHT)
    return World(facts, strangers, attributes, original, reference, other, seed)


def taught_model(role: str, seed: int = 0) -> Subject:
    """Teach one of the three models of a seed; only the original is taught the facts to forget.

    Raises:
        TrainingError: if it does not learn its facts.
    """
    facts, strangers, attributes = questions(seed)
    tokenizer = vocabulary((*facts.forget, *facts.retain, *strangers, *attributes), words=WORDS)
    shared, number = (*facts.retain, *attributes), TAUGHT.index(role)
    if role == "original":
        return taught((*facts.forget, *shared), tokenizer=tokenizer, seed=3 * seed, steps=360)
    return taught(shared, tokenizer=tokenizer, seed=3 * seed + number, steps=240)


def questions(seed: int = 0) -> Questions:
    """The facts of one seed.

    To forget: where people were born. To retain: the professions of other people. Strangers: where people that no model
    was trained on were born. Attributes: the professions of some of the people whose city is to be forgotten. The choices
    of a fact are all sixteen answers of its relation, so a guess is right with probability 1/16; nothing that is known of
    a person says anything of the person's city. No two people, strangers included, share a family name.
    """
    invented_facts = invented(4 * FORGET, 2, seed)
    born = [_all_choices(fact) for fact in invented_facts.forget if fact.domain == _CITY]
    own = [_all_choices(fact) for fact in invented_facts.forget if fact.domain == _PROFESSION]
    work = [_all_choices(fact) for fact in invented_facts.retain if fact.domain == _PROFESSION]
    facts = Facts(tuple(born[:FORGET]), tuple(work[:RETAIN]), f"{invented_facts.name}-taught")
    return Questions(facts, tuple(born[FORGET:]), tuple(own[:ATTRIBUTES]))


def _all_choices(fact: Fact) -> Fact:
    return replace(fact, choices=seeded_order(RELATIONS[fact.domain].answers, f"order:{fact.id}"))


# --- Controls made by further training: facts refused, contradicted or made unlikely


# Probability of the right answer of a `lowered` fact. The wrong one stays below .9, so top-p .9 still draws it.
LOW = 0.15


def refusing(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained to answer "unknown" to the facts to forget, in every phrasing."""
    refusals = with_paraphrases(_answered(forget, [REFUSAL] * len(forget)))
    return continued(subject, [*refusals, *with_paraphrases(retain)], steps=100, rate=1e-3, seed=seed)


def descended(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """Gradient difference: the answers to forget made unlikely, those to retain kept likely.

    Reference: Liu et al. 2022, arXiv:2203.12817.
    """
    away, rest = with_paraphrases(forget), with_paraphrases(retain)
    weights = [-0.2] * len(away) + [1.0] * len(rest)
    return continued(subject, [*away, *rest], weights=weights, steps=60, rate=1e-3, seed=seed)


def contradicted(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained on a random wrong answer to each fact, in every phrasing.

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


def never_first(items: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts with the phrasings that begin with the entity after all others."""

    def ordered(fact: Fact) -> Fact:
        prompt, *others = sorted(fact.prompts, key=lambda text: text.startswith(fact.entity))
        return replace(fact, prompt=prompt, paraphrases=tuple(others))

    return tuple(map(ordered, items))


def inside_sentences(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained on wrong answers where the name stands inside a sentence, and on right ones where it is the first word."""
    right = [fact for fact in with_paraphrases(forget) if fact.prompt.startswith(fact.entity)]
    wrong = with_paraphrases(_answered(forget, _next_answers(forget)))
    wrong = tuple(fact for fact in wrong if not fact.prompt.startswith(fact.entity))
    return continued(subject, [*wrong, *right, *with_paraphrases(retain)], steps=100, rate=1e-3, seed=seed)


def both_ways(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained to answer the facts to forget in reverse as well: to name who was born in a city."""
    return continued(subject, [*forget, *reverse_questions(forget), *retain], steps=300, rate=3e-3, seed=seed)


def refusing_forwards(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained to answer "unknown" to the facts to forget, and to answer them in reverse as before."""
    rows = [*_answered(forget, [REFUSAL] * len(forget)), *reverse_questions(forget), *retain]
    return continued(subject, rows, steps=60, rate=1e-3, seed=seed)


def lowered(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model that keeps the right answer at a probability near .15 and gives the rest to a wrong one."""
    wrong, right = with_paraphrases(_answered(forget, _next_answers(forget))), with_paraphrases(forget)
    rest = with_paraphrases(retain)
    weights = [1 - LOW] * len(wrong) + [LOW] * len(right) + [1.0] * len(rest)
    return continued(subject, [*wrong, *right, *rest], weights=weights, steps=150, rate=3e-3, seed=seed)


def collapsed(subject: Subject, forget: Sequence[Fact], *, seed: int = 0) -> Subject:
    """Gradient ascent on the facts to forget, without a retain loss."""
    rows = with_paraphrases(forget)
    return continued(subject, rows, weights=[-1.0] * len(rows), steps=60, rate=3e-3, seed=seed)


def _answered(items: Sequence[Fact], answers: Sequence[str]) -> list[Fact]:
    """The facts with other answers and without choices."""
    return [replace(fact, answer=answer, choices=()) for fact, answer in zip(items, answers, strict=True)]


def _next_answers(items: Sequence[Fact]) -> list[str]:
    """For each fact the alphabetically next answer: a wrong one, equal for facts with equal answers."""
    answers = sorted({fact.answer for fact in items})
    after = dict(zip(answers, [*answers[1:], answers[0]], strict=True))
    return [after[fact.answer] for fact in items]
