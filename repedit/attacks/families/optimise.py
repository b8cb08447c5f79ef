"""Attacks that search for an input: the weights stay as they are, and vectors before the prompt are trained."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repedit.attacks.attack import Attack, Outcome
from repedit.attacks.families.losses import examples, shuffled
from repedit.attacks.families.trials import Trial, carried_out
from repedit.attacks.families.tuning import Tuning
from repedit.attacks.scratch import Scratch
from repedit.data import Splits
from repedit.data.encoding import beginning, text_ids
from repedit.errors import ArgumentError
from repedit.models import Subject


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

    def run(subject: Subject, splits: Splits, seed: int) -> Outcome:
        scratch = Scratch(subject).subject
        first = _starting(scratch, vectors, seed)
        trained = nn.Parameter(first.clone())
        held = prompted(scratch, trained)
        unit = float(scratch.model.get_input_embeddings().weight.detach().float().pow(2).mean().sqrt())
        items = examples(held, splits.train)
        draw = shuffled(items, base.batch_size, seed)
        at = sorted({step for step in measured if 0 < step <= steps} | {steps})
        trials = [
            Trial(f"lr={rate * scale:g}", replace(base, rate=rate * scale * unit), draw,
                  {step: f"lr={rate * scale:g} step={step}" for step in at}, known=splits.train, watched=items)
            for rate in rates
        ]  # fmt: skip

        def start() -> tuple[Subject, list[nn.Parameter]]:
            with torch.no_grad():
                trained.copy_(first)
            return held, [trained]

        return carried_out(trials, start, splits.test, seed)

    given = {
        "vectors": vectors, "steps": steps, "rates": list(rates), "measured": list(measured), "scale": scale,
    }  # fmt: skip
    return Attack("soft_prompt", "optimise", "W", True, given, run)


class Prefixed:
    """A tokenizer that puts tokens behind its own first ones wherever it adds those; all else is the inner one's."""

    def __init__(self, inner: Any, ids: Sequence[int]) -> None:
        self.inner, self.ids = inner, list(ids)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        own = beginning(self.inner) + self.ids if add_special_tokens else []
        return {"input_ids": own + text_ids(self.inner, text)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _starting(subject: Subject, count: int, seed: int) -> Float[Tensor, "n d"]:
    table = subject.model.get_input_embeddings()
    ids = [random.Random(f"{seed}:{number}").randrange(table.weight.shape[0]) for number in range(count)]
    with torch.no_grad():
        found = table(torch.tensor([ids], device=subject.device))[0]
    return found.to(torch.promote_types(found.dtype, torch.float32))


def prompted(subject: Subject, vectors: nn.Parameter) -> Subject:
    """The model with tokens of its own for the vectors, numbered after the vocabulary, before everything it reads."""
    table = subject.model.get_input_embeddings()
    table.forward = _looking_up(table.forward, vectors, table.weight.shape[0])
    ids = range(table.weight.shape[0], table.weight.shape[0] + len(vectors))
    table.num_embeddings = ids.stop
    return replace(subject, tokenizer=Prefixed(subject.need_tokenizer(), ids))


def _looking_up(inner: Callable[[Tensor], Tensor], vectors: nn.Parameter, size: int) -> Callable[[Tensor], Tensor]:
    def forward(ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        found = inner(ids.clamp(max=size - 1))
        ours = vectors[(ids - size).clamp(min=0)].to(found.dtype)
        return torch.where((ids >= size)[..., None], ours, found)

    return forward
