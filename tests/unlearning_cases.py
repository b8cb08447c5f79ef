"""Small models, rows and recipes for the tests of gradient unlearning."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from repedit.data import Row
from repedit.models.subject import Subject, subject_of
from repedit.unlearning.losses import Reference
from repedit.unlearning.parameters import TrainableCopy
from repedit.unlearning.trainer import Training
from repedit.unlearning.training_data import prepare_data
from tests import teachable_models


def subject(family: str = "llama", dtype: torch.dtype = torch.float64) -> Subject:
    """A blank tiny model with a byte tokenizer; fresh every time."""
    found = teachable_models.blank(family)
    model = copy.deepcopy(found.model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    # Eager attention takes its softmax in float32, where float64's lowest number is -inf: wholly masked rows become NaN.
    model.config._attn_implementation = "sdpa"
    return subject_of(model, found.tokenizer)


def rows(first: int = 0, last: int = 6, *, alternative: bool = True) -> tuple[Row, ...]:
    """Facts about who likes what, of unlike lengths."""
    return tuple(
        Row(fact.prompt + " x" * (i % 3), fact.answer, fact.id, "nothing" if alternative else None)
        for i, fact in enumerate(teachable_models.facts(first, last), first)
    )


def sides(**update):
    """Six rows to forget, six to retain."""
    return {"forget": rows(0, 6), "retain": rows(6, 12), **update}


def training(
    recipe,
    model: Subject | None = None,
    *,
    micro_batch: int | None = None,
    clip: float | None = None,
    seed: int = 0,
    **sets,
):
    """A training that has not begun."""
    model = model or subject()
    data = prepare_data(model, recipe, **(sets or sides()))
    reference = Reference(model, {**data.rows, "alternative": data.alternatives})
    return Training(
        TrainableCopy(model, recipe.parameters, seed=seed),
        reference,
        data,
        recipe,
        micro_batch or recipe.batch_size,
        clip,
        seed,
    )


def gradient(recipe, **options) -> torch.Tensor:
    """The combined gradient of the first step, as one vector."""
    run = training(replace(recipe, steps=1), **options)
    seen: list[torch.Tensor] = []

    def look(*_args, **_kwargs) -> None:
        # A parameter no loss reaches has none.
        seen.append(
            torch.cat(
                [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in run.parameters]
            ).clone()
        )

    run.optimizer.step = look  # type: ignore[method-assign]
    run.run(after_step=lambda: None, progress=False)
    return seen[0]


def values(model: Subject) -> dict[str, torch.Tensor]:
    """Every tensor, copied."""
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}
