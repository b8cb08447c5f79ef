"""A delta: what training changed, as a frozen mapping from tensor names to differences.

It saves, scales, negates and adds; `rp.apply` and `rp.export` carry it out like any edit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from repedit.errors import ArgumentError, DtypeError, FingerprintError, NotFinite
from repedit.io import archive
from repedit.io.text import plain
from repedit.linear_maps import check_dense, not_finite_at
from repedit.models.subject import Subject
from repedit.quantization import update_cosine


@dataclass(frozen=True, eq=False)
class Delta:
    """Differences by tensor name, in float32 (float64 for a float64 model and for counts). The changed model is start + difference, rounded once.

    Two deltas are equal only if they are one object. Copies and pickles hold the same differences.

    Raises:
        NotFinite: if a difference is not finite, with the name and the place.
        DtypeError: if one is no dense tensor of a floating dtype.
    """

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """method, recipe, options, seed, data, model fingerprint, hashes of the start values; plain JSON values, no clock."""
    log: tuple[Mapping[str, Any], ...] = ()
    """One record a training step."""

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            check_dense(f"the difference of {name}", value)
            if not value.is_floating_point():
                raise DtypeError(
                    f"the difference of {name} is of {value.dtype}; give a floating dtype, such as float32"
                )
        ordered = {name: self.tensors[name].detach() for name in sorted(self.tensors)}
        for name, value in ordered.items():
            place = not_finite_at(value)
            if place is not None:
                raise NotFinite(f"the difference of {name} is not finite at {place}; did the training diverge?")
        object.__setattr__(self, "tensors", MappingProxyType(ordered))
        object.__setattr__(
            self, "provenance", MappingProxyType(plain(dict(self.provenance), "the provenance of a delta"))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The read-only views cannot be pickled or copied, what they show can.
        return Delta, (dict(self.tensors), dict(self.provenance), self.log)

    def __repr__(self) -> str:
        return f"Delta({self.provenance.get('method', 'unknown')}, {len(self.tensors)} tensors)"

    def __neg__(self) -> Delta:
        """The difference that takes this one back."""
        return self * -1.0

    def __mul__(self, factor: float | int) -> Delta:
        """The differences times a number."""
        scaled = {name: value * factor for name, value in self.tensors.items()}
        return Delta(scaled, _combination("scaled", [self], factor=factor))

    __rmul__ = __mul__

    def __add__(self, other: Delta) -> Delta:
        """The sum of two differences from one model; a tensor that only one of them changes is taken from it.

        Raises:
            FingerprintError: if they were made for different models, or a tensor has two shapes.
        """
        check_mates([self, other])
        total = dict(self.tensors)
        for name, value in other.tensors.items():
            total[name] = total[name] + value if name in total else value
        return Delta(total, _combination("sum", [self, other]))

    @staticmethod
    def ties(deltas: Sequence[Delta], weights: Sequence[float], density: float = 0.8) -> Delta:
        """Several differences merged: each is trimmed, a sign is elected for each entry, those of that sign are averaged.

        Trimming keeps the `density` of all entries of a difference that are largest in magnitude. The sign of an entry is
        that of sum_i w_i d_i; the result is the mean of w_i d_i over the differences that have that sign there.

        Raises:
            ArgumentError: if there is not one weight a delta, or the density lies outside (0, 1].
            FingerprintError: if they were made for different models, or change different tensors.
        Reference: Yadav et al. 2023, arXiv:2306.01708, section 3.
        """
        if len(deltas) != len(weights) or not deltas or not 0 < density <= 1:
            raise ArgumentError(
                f"{len(deltas)} deltas, {len(weights)} weights, density={density}: give one weight a delta, at least one, and "
                "a density in (0, 1]"
            )
        check_mates(deltas, same_names=True)
        trimmed = [_trimmed(delta, density) for delta in deltas]
        merged = {}
        for name in deltas[0].tensors:
            parts = torch.stack([w * d[name] for w, d in zip(weights, trimmed, strict=True)])
            agree = (parts.sign() == parts.sum(0).sign()) & (parts != 0)
            merged[name] = (parts * agree).sum(0) / agree.sum(0).clamp(min=1)
        return Delta(merged, _combination("ties", deltas, weights=list(weights), density=density))

    def summary(self, subject: Subject | None = None) -> str:
        """One line a tensor, largest relative change first; with the model it was trained from also how it compares.

        |dw| is the root mean square of the difference; "changed" the share of entries that differ after rounding to the
        model's dtype; "8 bit" and "4 bit" the cosine of the difference with what is left of it once the weights are rounded
        to so few bits (8: by row; 4: by groups of 64 inputs): what lies near 0 does not survive.
        """
        lines = []
        start = None if subject is None else subject.specs
        for name, value in self.tensors.items():
            size = float(value.double().square().mean().sqrt())
            row = f"{name} {tuple(value.shape)}: norm {float(value.double().norm()):.3g}, |dw| {size:.3g}"
            lines.append((size, row if subject is None else row + _against(value, subject.value(name))))
        lines.sort(key=lambda item: -item[0])
        rest = [] if start is None else [f"{len(set(start) - set(self.tensors))} tensors are untouched"]
        made = json.dumps({k: v for k, v in self.provenance.items() if k not in ("parents", "start")})
        return "\n".join([*(row for _, row in lines), *rest, f"made by: {made}"])

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the differences, and a JSON header with provenance and log."""
        header = {"provenance": dict(self.provenance), "log": [dict(record) for record in self.log]}
        archive.write(path, "delta", self.tensors, header)

    @staticmethod
    def load(path: str | Path) -> Delta:
        """Read what `save` wrote.

        Raises:
            CheckpointError: if the file is not a saved delta.
        """
        tensors, header = archive.read(path, "delta")
        with archive.rebuilding(path, "delta"):
            return Delta(tensors, header["provenance"], tuple(dict(record) for record in header["log"]))


def check_mates(deltas: Sequence[Delta], *, same_names: bool = False) -> None:
    """Refuse differences that do not belong together.

    Raises:
        FingerprintError: with both models, or the first tensor that differs.
    """
    first = deltas[0]
    for other in deltas[1:]:
        mine, theirs = first.provenance.get("model"), other.provenance.get("model")
        if mine and theirs and mine != theirs:
            raise FingerprintError(f"the deltas were made for different models: {mine[:12]} and {theirs[:12]}")
        odd = [n for n, v in first.tensors.items() if n in other.tensors and other.tensors[n].shape != v.shape]
        odd += sorted(set(first.tensors) ^ set(other.tensors)) if same_names else []
        if odd:
            shapes = [tuple(d.tensors[odd[0]].shape) if odd[0] in d.tensors else "absent" for d in (first, other)]
            raise FingerprintError(
                f"the deltas do not match: {len(odd)} tensors differ, the first is {odd[0]} ({shapes[0]} and {shapes[1]}); "
                "were they trained from one model with one parameter filter?"
            )


def _combination(method: str, parents: Sequence[Delta], **options: Any) -> dict[str, Any]:
    models = {d.provenance.get("model") for d in parents}
    start = {name: value for d in parents for name, value in d.provenance.get("start", {}).items()}
    record = {"method": method, "options": options, "model": next(iter(models)), "start": start}
    return record | {"parents": [{k: v for k, v in d.provenance.items() if k != "start"} for d in parents]}


def _trimmed(delta: Delta, density: float) -> dict[str, Tensor]:
    every = torch.cat([value.abs().flatten() for value in delta.tensors.values()])
    dropped = every.numel() - round(density * every.numel())
    limit = every.kthvalue(dropped).values if dropped else every.new_tensor(-1.0)
    return {name: value * (value.abs() > limit) for name, value in delta.tensors.items()}


def _against(value: Tensor, start: Tensor) -> str:
    """How a difference compares with the weights it changes."""
    wide = torch.promote_types(start.dtype, torch.float32)
    old = start.to(wide)
    new = old + value.to(old)
    changed = float((new.to(start.dtype) != start).double().mean())
    relative = float(value.double().square().mean().sqrt() / old.double().std().clamp(min=1e-300))
    kept = (
        "".join(f", {bits} bit {update_cosine(old, new, f'int{bits}'):.2f}" for bits in (8, 4))
        if value.ndim > 1
        else ""
    )
    return f", |dw|/std(w) {relative:.3g}, changed {changed:.1%}{kept}"
