"""Noise in the weights before a training, in the directions by which the forget set is looked up and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from repedit.activations.forward import inputs_of
from repedit.data import Batch
from repedit.data.fact_sets import fact_of
from repedit.errors import DataError, NotEnoughRows, SelectionError, check_finite_numbers, check_positive
from repedit.hashing import seed_of
from repedit.training.sampler import collate
from repedit.unlearning.forget_gradient import Matrix, linear_matrices
from repedit.unlearning.losses import autocast, token_positions
from repedit.unlearning.parameters import TrainableCopy

_BATCH_SIZE = 8
_NEGLIGIBLE = 1e-6
"""Singular values of the span, as a share of the largest, up to which a direction is rounding noise."""


@dataclass(frozen=True)
class Noise:
    """Shrink every trained matrix and add noise to it, inside the span of the keys of the forget set.

    W <- W + ((shrink scale s N) - shrink W Q) Q^T, where Q is an orthonormal basis of the span of C^-1 K: K holds the mean input
    of the matrix at the last token of each subject, C is the second moment of its inputs over the retain set, N is
    standard normal and s the root mean square of W. Restricted to Q this is (1 - shrink) W + shrink scale noise; inputs that are
    C-orthogonal to the keys see the old W.

    Args:
        ridge: what is added to the diagonal of C, as a share of its mean.
    Raises:
        ArgumentError: if a number is out of range.
    Reference: Lee et al. 2025, arXiv:2506.06278 (the noise step of UNDO), whose noise is of all weights; scale 0.1 as in its code.
    """

    shrink: float = 0.5
    scale: float = 0.1
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(shrink=self.shrink, ridge=self.ridge)
        check_finite_numbers(scale=self.scale)


def add_noise(
    trainable: TrainableCopy, noise: Noise, forget: Sequence[Batch], retain: Sequence[Batch], seed: int
) -> dict[str, Float[Tensor, "d r"]]:
    """Add the noise to what is trained, in place.

    Returns:
        The basis of the span of each matrix.
    Raises:
        SelectionError: if something else than the weights of linear modules is trained.
        DataError: if a forget row marks no entity. NotEnoughRows: if there are as many facts as inputs of a matrix.
    """
    matrices = linear_matrices(trainable, "noise works")
    keys = _keys(trainable, matrices, forget)
    moments = _second_moments(trainable, matrices, retain)
    bases = {}
    for name, matrix in matrices.items():
        p, moment, key = trainable.tensors[name], moments[name], keys[name]
        if len(key) >= len(moment):
            raise NotEnoughRows(
                f"{name} has {len(moment)} inputs and the forget set {len(key)} facts, whose keys span all of them; give fewer "
                "facts, or select wider matrices"
            )
        ridge = (
            noise.ridge * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        )
        basis = _span(torch.linalg.solve(moment + ridge, key.mT)).to(p)
        bases[name] = basis
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed_of(f"{seed}:noise:{name}"))
            weight = matrix.oriented(p)
            weight += _damage(weight, basis, noise, generator)
    return bases


def _damage(
    weight: Float[Tensor, "n d"], basis: Float[Tensor, "d r"], noise: Noise, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """What is added to a weight."""
    drawn = torch.randn(len(weight), basis.shape[1], generator=generator, dtype=torch.float64).to(weight)
    size = weight.double().square().mean().sqrt().to(weight)
    return (noise.shrink * noise.scale * size * drawn - noise.shrink * (weight @ basis)) @ basis.mT


def _keys(
    trainable: TrainableCopy, matrices: Mapping[str, Matrix], rows: Sequence[Batch]
) -> dict[str, Float[Tensor, "n d"]]:
    """The input of each matrix at the last token of the subject, averaged over the wordings of a fact."""
    facts = list(dict.fromkeys(fact_of(row.document[0]) for row in rows))
    counts = torch.zeros(len(facts), 1, dtype=torch.float64, device=trainable.subject.device)
    totals: dict[str, Tensor] = {}

    def add(batch: Batch, name: str, x: Tensor) -> None:
        assert batch.entity is not None
        index = torch.tensor([facts.index(fact_of(document)) for document in batch.document], device=x.device)
        at_entities = x[batch.entity].double()
        totals.setdefault(name, x.new_zeros(len(facts), x.shape[-1], dtype=torch.float64)).index_add_(
            0, index, at_entities
        )

    for start in range(0, len(rows), _BATCH_SIZE):
        batch = collate(rows[start : start + _BATCH_SIZE])
        if batch.entity is None or not bool((batch.entity.sum(1) == 1).all()) or bool(batch.entity[:, 0].any()):
            raise DataError(
                f"rows {', '.join(map(repr, batch.document[:3]))}, ...: noise needs the last token of an entity, after the "
                "first token of the row; give rows with entities, in prompts that do not begin with them"
            )
        _run(trainable, matrices, batch, partial(add, batch))
        index = torch.tensor([facts.index(fact_of(document)) for document in batch.document], device=counts.device)
        counts.index_add_(0, index, torch.ones_like(index, dtype=torch.float64)[:, None])
    return {name: total / counts for name, total in totals.items()}


def _second_moments(
    trainable: TrainableCopy, matrices: Mapping[str, Matrix], rows: Sequence[Batch]
) -> dict[str, Float[Tensor, "d d"]]:
    """The mean of x x^T over the inputs of each matrix, at all tokens but the first of a row."""
    moments: dict[str, Tensor] = {}
    tokens = 0

    def add(mask: Bool[Tensor, "b t"], name: str, x: Tensor) -> None:
        counted = x[mask].double()
        moments.setdefault(name, x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)).add_(counted.mT @ counted)

    for start in range(0, len(rows), _BATCH_SIZE):
        batch = collate(rows[start : start + _BATCH_SIZE])
        mask = token_positions(batch)
        tokens += int(mask.sum())
        _run(trainable, matrices, batch, partial(add, mask))
    return {name: moment / tokens for name, moment in moments.items()}


def _run(
    trainable: TrainableCopy, matrices: Mapping[str, Matrix], batch: Batch, add: Callable[[str, Tensor], None]
) -> None:
    """One forward pass that shows the input of each matrix."""
    subject = trainable.subject
    with torch.no_grad(), autocast(trainable.dtype, subject.device), _inputs(matrices, add):
        subject.model(**inputs_of(batch))


@contextmanager
def _inputs(matrices: Mapping[str, Matrix], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    def visit(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].ndim != 3:
            raise SelectionError(f"the input of {name} has no tokens of its own rows; select dense MLPs")
        add(name, inputs[0])

    handles = [m.module.register_forward_pre_hook(partial(visit, name)) for name, m in matrices.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _span(directions: Float[Tensor, "d n"]) -> Float[Tensor, "d r"]:
    """An orthonormal basis."""
    u, s, _ = torch.linalg.svd(directions, full_matrices=False)
    return u[:, s > _NEGLIGIBLE * s[0]]
