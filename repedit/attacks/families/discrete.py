"""A prefix of real tokens before every prompt, found by greedy coordinate gradients: anyone with the weights can search it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.attacks.asking import ask
from repedit.attacks.attack import FAILED, RAN, Attack, Outcome
from repedit.attacks.families.losses import Draw, Example, examples, masked_loss, mean_loss, shuffled, stacked
from repedit.attacks.families.optimise import Prefixed, prompted
from repedit.attacks.families.trials import FALL
from repedit.attacks.scratch import Scratch
from repedit.data import Splits
from repedit.errors import ArgumentError
from repedit.models import Subject


class Search(NamedTuple):
    """How much is searched."""

    length: int
    steps: int
    candidates: int
    """Prefixes tried a step."""
    top: int
    """Tokens a place that the gradient proposes."""
    batch_size: int


def gcg(
    *,
    length: int = 20,
    steps: int = 500,
    candidates: int = 64,
    top: int = 256,
    batch_size: int = 8,
    measured: Sequence[int] = (100, 500),
) -> Attack:
    """Searches one prefix of tokens that makes the answers of T likely, and asks V behind it.

    A step takes the gradient of the loss on a batch of T with respect to each place's one-hot vector, tries prefixes that
    differ in one token drawn from the `top` steepest of a place drawn at random, and keeps the best, which may be the old
    one. Settings are "step=100". The loss on T must fall by a tenth. The first prefix is drawn by the seed.

    Raises:
        ArgumentError: if a number is below 1.
    Reference: Zou et al. 2023, arXiv:2307.15043, with one prefix for all facts.
    """
    search = Search(length, steps, candidates, top, batch_size)
    if min(search) < 1:
        raise ArgumentError(f"{dict(search._asdict())}; give at least 1 of each")
    at = sorted({step for step in measured if 0 < step <= steps} | {steps})

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        scratch = Scratch(subject).subject
        allowed = _allowed(scratch)
        prefix = random.Random(f"{seed}:gcg").choices(allowed.tolist(), k=length)
        size, width = scratch.model.get_input_embeddings().weight.shape
        vectors = nn.Parameter(torch.zeros(length, width, device=scratch.device))
        held = prompted(scratch, vectors)
        items = examples(held, splits.train)
        before = mean_loss(scratch, _with(items, prefix, size))
        answers, losses, tokens = {}, [], 0
        steps_of = _steps(held, vectors, shuffled(items, batch_size, seed), prefix, allowed, search, seed)
        for step, (prefix, loss, read) in enumerate(steps_of, 1):
            losses.append(round(loss, 4))
            tokens += read
            if step in at:
                behind = replace(scratch, tokenizer=Prefixed(scratch.need_tokenizer(), prefix))
                answers[f"step={step}"] = ask(behind, splits.test)
        fall = 1 - mean_loss(scratch, _with(items, prefix, size)) / max(before, 1e-12)
        failed = not fall >= FALL
        short = f"the loss on T fell by {fall:.1%}, {FALL:.0%} is needed; give more steps, candidates or tokens"
        details = {"prefix": scratch.need_tokenizer().decode(prefix), "losses": losses, "fall": fall}
        return Outcome(answers, short if failed else "", None, tokens, details, FAILED if failed else RAN)

    given = {**search._asdict(), "measured": at}
    return Attack("gcg", "optimise", "W", True, given, run)


def _steps(
    held: Subject, vectors: nn.Parameter, draw: Draw, prefix: Sequence[int], allowed: Tensor, search: Search, seed: int
) -> Iterator[tuple[list[int], float, int]]:
    """After each step the prefix, its loss on the step's batch, and the tokens that were read."""
    size = held.model.get_input_embeddings().weight.shape[0]
    now = list(prefix)
    for step in range(search.steps):
        items, rng = draw(step), random.Random(f"{seed}:{step}")
        slopes = _slopes(held, vectors, items, now)[:, allowed]
        steepest = allowed[(-slopes).topk(min(search.top, len(allowed))).indices]
        tried = [now]
        for _ in range(search.candidates):
            place = rng.randrange(search.length)
            token = int(steepest[place, rng.randrange(steepest.shape[1])])
            tried.append([*now[:place], token, *now[place + 1 :]])
        with torch.no_grad():
            losses = [float(masked_loss(held, stacked(held, _with(items, each, size)))) for each in tried]
        best = min(range(len(tried)), key=losses.__getitem__)
        now = tried[best]
        yield now, losses[best], (len(tried) + 1) * sum(len(item.ids) for item in items)


def _slopes(
    held: Subject, vectors: nn.Parameter, items: Sequence[Example], prefix: Sequence[int]
) -> Float[Tensor, "n v"]:
    """d loss / d one-hot vector of each place of the prefix."""
    table = held.model.get_input_embeddings()
    with torch.no_grad():
        vectors.copy_(table(torch.tensor([list(prefix)], device=held.device))[0])
    (found,) = torch.autograd.grad(masked_loss(held, stacked(held, items)), vectors)
    # Some families scale what the table gives; a positive number for all tokens leaves their order as it is.
    return found @ table.weight.detach().to(found).T


def _with(items: Sequence[Example], prefix: Sequence[int], size: int) -> list[Example]:
    """The examples with the tokens of the prefix where its places are, which are numbered after the vocabulary."""
    return [item._replace(ids=[t if t < size else prefix[t - size] for t in item.ids]) for item in items]


def _allowed(subject: Subject) -> Tensor:
    """The tokens a prefix may hold: all that the tokenizer knows but its special ones."""
    tokenizer = subject.need_tokenizer()
    size = min(len(tokenizer), subject.model.get_input_embeddings().weight.shape[0])
    special = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(size) if i not in special], device=subject.device)
