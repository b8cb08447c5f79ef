"""The tensors that differ between two checkpoints or models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import FingerprintError
from repedit.io.checkpoint import open_shards
from repedit.models.subject import Subject
from repedit.rewrite.checkpoint_architecture import checkpoint_directory


@dataclass(frozen=True)
class Difference:
    """One tensor that differs."""

    tensor: str
    norm: float
    """||edited - base||, Frobenius."""
    relative: float
    """norm / ||base||."""
    rank: int | None
    """Numerical rank of the difference, for matrices of at most 4096 x 4096."""
    rows: int
    """Rows with a change."""
    columns: int
    """Columns with a change."""


@checked
def diff(base: Subject | str | Path, edited: Subject | str | Path) -> list[Difference]:
    """Every tensor whose values differ, largest relative change first; the list is empty for equal weights.

    Raises:
        FingerprintError: if the two do not hold the same tensors in the same shapes, except for added biases and heads.
    """
    (first, read_first), (last, read_last) = _tensors(base), _tensors(edited)
    missing = sorted(set(first) - set(last))
    reshaped = sorted(n for n in set(first) & set(last) if first[n] != last[n])
    if missing or reshaped:
        raise FingerprintError(
            f"the checkpoints are of different models: {len(missing)} tensors are missing, {len(reshaped)} have another shape "
            f"({(missing + reshaped)[0]}); give the checkpoint that was edited. What an edit made smaller (slim, slice) is compared "
            "by what it computes: repedit compare, or repedit.compare"
        )
    differences = []
    for name in sorted(last):
        new = read_last(name).double()
        old = read_first(name).double() if name in first else torch.zeros_like(new)
        if not torch.equal(old, new):
            differences.append(_difference(name, old, new))
    return sorted(differences, key=lambda d: -d.relative)


def _difference(name: str, old: Tensor, new: Tensor) -> Difference:
    delta = new - old
    norm, base = float(delta.norm()), float(old.norm())
    matrix = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta[:, None]
    small = delta.ndim == 2 and max(delta.shape) <= 4096
    return Difference(
        tensor=name,
        norm=norm,
        relative=norm / base if base else float("inf"),
        rank=int(torch.linalg.matrix_rank(delta, rtol=1e-5)) if small else None,
        rows=int((matrix != 0).any(1).sum()),
        columns=int((matrix != 0).any(0).sum()),
    )


def _tensors(source: Subject | str | Path) -> tuple[Mapping[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes by name, and a function that reads a tensor."""
    if isinstance(source, Subject):
        shapes = {name: tuple(p.shape) for name, p in source.model.named_parameters()}
        return shapes, lambda name: source.value(name).cpu()
    shards = open_shards(checkpoint_directory(source))
    return {name: spec.shape for name, spec in shards.specs.items()}, shards.read
