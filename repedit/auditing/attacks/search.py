"""Attacks that search for an input: trained vectors before the prompt, and a prefix of tokens found by greedy coordinate gradients."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repedit.auditing.attack import (
    FAILED,
    RAN,
    Attack,
    AttackRecord,
    AttackResult,
    Scratch,
    Setting,
    Work,
    ask,
    register,
)
from repedit.auditing.attacks.tuning import (
    FALL,
    Draw,
    Example,
    Trial,
    Tuning,
    carried_out,
    examples,
    masked_loss,
    mean_loss,
    shuffled,
    stacked,
    training_work,
)
from repedit.data import Splits
from repedit.data.encoding import prefix_ids, text_ids
from repedit.errors import ArgumentError
from repedit.metrics.facts import FactsAccuracy
from repedit.models.subject import Subject

# --- Soft prompts: vectors before the prompt are trained, the weights stay as they are


def soft_prompt(
    *,
    vectors: int = 8,
    steps: int = 50,
    rates: Sequence[float] = (0.03, 0.1, 0.3),
    measured: Sequence[int] = (25, 50),
    scale: float = 1.0,
) -> Attack:
    """Trains a few input vectors before the prompt on T, and asks V behind the same vectors.

    They start as the embeddings of tokens drawn by the seed and stand after the tokenizer's own first tokens. Settings
    are "lr=0.1 step=50". It must lower the loss on T by a tenth: vectors may well be too few to hold T by heart.

    Args:
        rates: of Adam, in units of the root mean square of the token embeddings.
    Raises:
        ArgumentError: if a number is out of range.
    Reference: Schwinn et al. 2024, arXiv:2402.09063; the vectors are those of Lester et al. 2021, arXiv:2104.08691.
    """
    if vectors < 1 or not rates or not min(rates) * scale > 0:
        raise ArgumentError(
            f"vectors={vectors}, rates={tuple(rates)}, scale={scale}; give at least one of each, and all above 0"
        )
    base = Tuning(1.0, steps=steps)

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        scratch = Scratch(subject).subject
        first = _starting(scratch, vectors, seed)
        trained = nn.Parameter(first.clone())
        prompted_subject = prompted(scratch, trained)
        unit = float(scratch.model.get_input_embeddings().weight.detach().float().pow(2).mean().sqrt())
        items = examples(prompted_subject, splits.train)
        draw = shuffled(items, base.batch_size, seed)
        at = sorted({step for step in measured if 0 < step <= steps} | {steps})
        trials = [
            Trial(f"lr={rate * scale:g}", replace(base, rate=rate * scale * unit), draw,
                  {step: Setting(f"lr={rate * scale:g} step={step}", step=step) for step in at}, taught=splits.train, watched=items)
            for rate in rates
        ]  # fmt: skip

        def start() -> tuple[Subject, list[nn.Parameter]]:
            with torch.no_grad():
                trained.copy_(first)
            return prompted_subject, [trained]

        return carried_out(trials, start, splits.test, seed)

    options = {
        "vectors": vectors, "steps": steps, "rates": list(rates), "measured": list(measured), "scale": scale,
    }  # fmt: skip
    return Attack(SOFT_PROMPT, options, run, training_work(len(rates), steps, measured))


SOFT_PROMPT = register(
    AttackRecord(
        "soft_prompt", cost=210, budget="full", build=lambda setup: [soft_prompt()], level="W", uses_train=True,
        trains=True,
    )
)  # fmt: skip


class Prefixed:
    """A tokenizer that puts tokens behind its own first ones wherever it adds those; all else is the inner one's."""

    def __init__(self, inner: Any, ids: Sequence[int]) -> None:
        self.inner, self.ids = inner, list(ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        own = prefix_ids(self.inner) + self.ids if add_special_tokens else []
        return {"input_ids": own + text_ids(self.inner, text)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _starting(subject: Subject, count: int, seed: int) -> Float[Tensor, "n d"]:
    table = subject.model.get_input_embeddings()
    ids = [random.Random(f"{seed}:{number}").randrange(table.weight.shape[0]) for number in range(count)]
    with torch.no_grad():
        embeddings = table(torch.tensor([ids], device=subject.device))[0]
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))


def prompted(subject: Subject, vectors: nn.Parameter) -> Subject:
    """The model with tokens of its own for the vectors, numbered after the vocabulary, before everything it reads."""
    table = subject.model.get_input_embeddings()
    table.forward = _looking_up(table.forward, vectors, table.weight.shape[0])
    ids = range(table.weight.shape[0], table.weight.shape[0] + len(vectors))
    table.num_embeddings = ids.stop
    return replace(subject, tokenizer=Prefixed(subject.need_tokenizer(), ids))


def _looking_up(inner: Callable[[Tensor], Tensor], vectors: nn.Parameter, size: int) -> Callable[[Tensor], Tensor]:
    def forward(ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        embedded = inner(ids.clamp(max=size - 1))
        vectors_at = vectors[(ids - size).clamp(min=0)].to(embedded.dtype)
        return torch.where((ids >= size)[..., None], vectors_at, embedded)

    return forward


# --- GCG: a prefix of tokens before every prompt, found by greedy coordinate gradients


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

    A step takes the gradient of the loss on a batch of T with respect to each place's one-hot vector, tries prefixes
    that differ in one token drawn from the `top` steepest of a place drawn at random, and keeps the best, which may be
    the old one. Settings are "step=100". The loss on T must fall by a tenth. The first prefix is drawn by the seed.

    Raises:
        ArgumentError: if a number is below 1.
    Reference: Zou et al. 2023, arXiv:2307.15043, with one prefix for all facts.
    """
    search = Search(length, steps, candidates, top, batch_size)
    if min(search) < 1:
        raise ArgumentError(f"{dict(search._asdict())}; give at least 1 of each")
    at = sorted({step for step in measured if 0 < step <= steps} | {steps})

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        scratch = Scratch(subject).subject
        allowed = _allowed(scratch)
        prefix = random.Random(f"{seed}:gcg").choices(allowed.tolist(), k=length)
        size, width = scratch.model.get_input_embeddings().weight.shape
        vectors = nn.Parameter(torch.zeros(length, width, device=scratch.device))
        prompted_subject = prompted(scratch, vectors)
        items = examples(prompted_subject, splits.train)
        before = mean_loss(scratch, _with(items, prefix, size))
        answers: dict[str, FactsAccuracy] = {}
        losses, tokens = [], 0
        steps_of = _steps(prompted_subject, vectors, shuffled(items, batch_size, seed), prefix, allowed, search, seed)
        for step, (prefix, loss, read) in enumerate(steps_of, 1):
            losses.append(round(loss, 4))
            tokens += read
            if step in at:
                behind = replace(scratch, tokenizer=Prefixed(scratch.need_tokenizer(), prefix))
                answers[Setting(f"step={step}", step=step)] = ask(behind, splits.test)
        fall = 1 - mean_loss(scratch, _with(items, prefix, size)) / max(before, 1e-12)
        failed = not fall >= FALL
        reason = f"the loss on T fell by {fall:.1%}, {FALL:.0%} is needed; give more steps, candidates or tokens"
        details = {"prefix": scratch.need_tokenizer().decode(prefix), "losses": losses, "fall": fall}
        return AttackResult(answers, reason if failed else "", None, tokens, details, FAILED if failed else RAN)

    options = {**search._asdict(), "measured": at}
    # Each candidate is a forward pass, which is about a third of a training step.
    return Attack(GCG, options, run, Work(len(at), steps * (1 + candidates / 3)))


GCG = register(
    AttackRecord("gcg", cost=220, budget="full", build=lambda setup: [gcg()], level="W", uses_train=True, trains=True)
)


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


@torch.enable_grad()
def _slopes(
    held: Subject, vectors: nn.Parameter, items: Sequence[Example], prefix: Sequence[int]
) -> Float[Tensor, "n v"]:
    """d loss / d one-hot vector of each place of the prefix."""
    table = held.model.get_input_embeddings()
    with torch.no_grad():
        vectors.copy_(table(torch.tensor([list(prefix)], device=held.device))[0])
    (gradient,) = torch.autograd.grad(masked_loss(held, stacked(held, items)), vectors)
    # Some families scale what the table gives; a positive number for all tokens leaves their order as it is.
    return gradient @ table.weight.detach().to(gradient).T


def _with(items: Sequence[Example], prefix: Sequence[int], size: int) -> list[Example]:
    """The examples with the tokens of the prefix where its places are, which are numbered after the vocabulary."""
    return [item._replace(ids=[t if t < size else prefix[t - size] for t in item.ids]) for item in items]


def _allowed(subject: Subject) -> Tensor:
    """The tokens a prefix may hold: all that the tokenizer knows but its special ones."""
    tokenizer = subject.need_tokenizer()
    size = min(len(tokenizer), subject.model.get_input_embeddings().weight.shape[0])
    special = set(tokenizer.all_special_ids)
    return torch.tensor([i for i in range(size) if i not in special], device=subject.device)
