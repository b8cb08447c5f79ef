"""The control that rounding undoes: an edit that stays inside the buckets of a 4-bit grid."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.attacks.controls.taught import continued
from repedit.data import Fact, with_paraphrases
from repedit.models import Subject, subject_of

GROUP = 64
LEVELS = 7
# A weight moved by less than half a step rounds back; .45 leaves room for the arithmetic.
REACH = 0.45


def on_grid(subject: Subject) -> Subject:
    """The model with every matrix of its blocks on the int4 grid: q D with D = max|w| / 7 in each group of 64 inputs."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for name in matrices(subject):
            weight = model.get_parameter(name)
            steps = bucket(weight)
            weight.copy_(torch.round(weight / steps) * steps)
    return subject_of(model, subject.tokenizer)


def inside_buckets(
    gridded: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, steps: int = 120, seed: int = 0
) -> Subject:
    """A model on the grid, trained to forget while no weight of its blocks moves further than .45 of a step.

    The largest weights of each group stay, so that its step stays; nothing outside the blocks is trained. Rounding to
    int4 therefore gives the model back as it was.

    Reference: Zhang et al. 2024, arXiv:2410.16454, from the other side.
    """
    names = matrices(gridded)
    before = {name: gridded.model.get_parameter(name).detach().clone() for name in names}
    reach = {name: _reach(weight) for name, weight in before.items()}

    def hold(model: Any) -> None:
        for name, start in before.items():
            weight = model.get_parameter(name)
            weight.copy_(torch.clamp(weight, start - reach[name], start + reach[name]))

    away, kept = with_paraphrases(forget), with_paraphrases(retain)
    weights = [-1.0] * len(away) + [1.0] * len(kept)
    return continued(
        gridded, [*away, *kept], weights=weights, steps=steps, rate=3e-3, only=names, after=hold, seed=seed
    )  # fmt: skip


def matrices(subject: Subject) -> list[str]:
    """Names of the matrices of the blocks; embeddings, head and gains are not rounded."""
    blocks = tuple(f"{path}." for path in subject.anatomy.block_paths)
    return [name for name, spec in subject.specs.items() if name.startswith(blocks) and len(spec.shape) == 2]


def bucket(weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """The step of the grid at each weight; the whole row is one group where 64 does not divide it."""
    group = GROUP if weight.shape[1] % GROUP == 0 else weight.shape[1]
    largest = weight.detach().reshape(weight.shape[0], -1, group).abs().amax(-1, keepdim=True)
    return (largest / LEVELS).expand(-1, -1, group).reshape(weight.shape)


def _reach(weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """How far each weight may move: 0 where it is the largest of its group."""
    steps = bucket(weight)
    return torch.where(weight.abs() >= (LEVELS - 0.5) * steps, torch.zeros_like(steps), REACH * steps)
