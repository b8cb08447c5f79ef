"""A delta: the change that training made to a model, as a frozen mapping from tensor names to differences.

Deltas can be saved, scaled, negated, added and merged; `repedit.apply` and `repedit.export` accept them like edits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import torch
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import ArgumentError, DtypeError, FingerprintError, NotFinite
from repedit.io import archive
from repedit.io.text import json_copy
from repedit.linear_maps import check_dense, not_finite_at
from repedit.models.subject import Subject
from repedit.plan import LoweringOptions
from repedit.quantization import update_cosine


@dataclass(frozen=True, eq=False)
@checked
class Delta:
    """Differences by tensor name, in float32 (float64 for a float64 model and for counts).

    The changed model is start + difference, rounded once. Two deltas are equal only if they are the same object. Copies
    and pickles hold the same differences.

    Raises:
        NotFinite: if a difference is not finite, with its name and index.
        DtypeError: if one is not a dense tensor of a floating dtype.
    """

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """method, recipe, options, seed, data, model fingerprint, hashes of the start values; plain JSON values, no clock."""
    log: tuple[Mapping[str, Any], ...] = ()
    """One record per training step."""

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            check_dense(f"the difference of {name}", value)
            if not value.is_floating_point():
                raise DtypeError(
                    f"the difference of {name} has dtype {value.dtype}; give a floating dtype, such as float32"
                )
        ordered = {name: self.tensors[name].detach() for name in sorted(self.tensors)}
        for name, value in ordered.items():
            index = not_finite_at(value)
            if index is not None:
                raise NotFinite(f"the difference of {name} is not finite at {index}; did the training diverge?")
        object.__setattr__(self, "tensors", MappingProxyType(ordered))
        object.__setattr__(
            self, "provenance", MappingProxyType(json_copy(dict(self.provenance), "the provenance of a delta"))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies cannot be pickled or copied; the dictionaries behind them can.
        return Delta, (dict(self.tensors), dict(self.provenance), self.log)

    def __repr__(self) -> str:
        return f"Delta({self.provenance.get('method', 'unknown')}, {len(self.tensors)} tensors)"

    def __neg__(self) -> Delta:
        """The delta that undoes this one."""
        return self * -1.0

    def __mul__(self, factor: float | int) -> Delta:
        """The differences times a number."""
        scaled = {name: value * factor for name, value in self.tensors.items()}
        return Delta(scaled, _combination("scaled", [self], factor=factor))

    __rmul__ = __mul__

    def __add__(self, other: Delta) -> Delta:
        """The sum of two deltas of one model; a tensor that only one of them changes is taken from that one.

        Raises:
            FingerprintError: if they were made for different models, or a tensor has two shapes.
        """
        _check_compatible([self, other])
        total = dict(self.tensors)
        for name, value in other.tensors.items():
            total[name] = total[name] + value if name in total else value
        return Delta(total, _combination("sum", [self, other]))

    @staticmethod
    @checked
    def ties(deltas: Sequence[Delta], weights: Sequence[float], density: float = 0.8) -> Delta:
        """TIES merging of several deltas: trim each, elect a sign for each entry, and average the entries of that sign.

        Trimming keeps the fraction `density` of all entries of a delta that are largest in magnitude. The sign of an entry
        is that of sum_i w_i d_i; the result is the mean of w_i d_i over the deltas that have that sign there.

        Raises:
            ArgumentError: if the numbers of deltas and weights differ, or the density lies outside (0, 1].
            FingerprintError: if they were made for different models, or change different tensors.
        Reference: Yadav et al. 2023, arXiv:2306.01708, section 3.
        """
        if len(deltas) != len(weights) or not deltas or not 0 < density <= 1:
            raise ArgumentError(
                f"{len(deltas)} deltas, {len(weights)} weights, density={density}: give one weight per delta, at least one, "
                "and a density in (0, 1]"
            )
        _check_compatible(deltas, same_names=True)
        trimmed = [_trimmed(delta, density) for delta in deltas]
        merged = {}
        for name in deltas[0].tensors:
            parts = torch.stack([w * d[name] for w, d in zip(weights, trimmed, strict=True)])
            agree = (parts.sign() == parts.sum(0).sign()) & (parts != 0)
            merged[name] = (parts * agree).sum(0) / agree.sum(0).clamp(min=1)
        return Delta(merged, _combination("ties", deltas, weights=list(weights), density=density))

    @checked
    def apply(
        self,
        subject: Subject,
        *,
        inplace: bool = False,
        allow_identity: bool = False,
        **options: Unpack[LoweringOptions],
    ) -> Subject:
        """The model with the delta in its weights: `repedit.apply(delta, subject)`, which documents the arguments."""
        import repedit

        return repedit.apply(self, subject, inplace=inplace, allow_identity=allow_identity, **options)

    @checked
    def summary(self, subject: Subject | None = None) -> str:
        """One line per tensor, largest change first; with the model it was trained from, also how it compares with the weights.

        |dw| is the root mean square of the difference; "changed" the fraction of entries that differ after rounding to the
        model's dtype; "8 bit" and "4 bit" the cosine of the difference with what remains of it once the weights are rounded
        to int8 (by row) and int4 (by groups of 64 inputs): a difference with a cosine near 0 does not survive.
        """
        rows = []
        for name, value in self.tensors.items():
            rms = float(value.double().square().mean().sqrt())
            row = f"{name} {tuple(value.shape)}: norm {float(value.double().norm()):.3g}, |dw| {rms:.3g}"
            rows.append((rms, row if subject is None else row + _relative_to(subject.value(name), value)))
        rows.sort(key=lambda item: -item[0])
        untouched = [] if subject is None else [f"{len(set(subject.specs) - set(self.tensors))} tensors are untouched"]
        provenance = json.dumps({k: v for k, v in self.provenance.items() if k not in ("parents", "start")})
        return "\n".join([*(row for _, row in rows), *untouched, f"made by: {provenance}"])

    @checked
    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the differences, and the provenance and log in its header."""
        header = {"provenance": dict(self.provenance), "log": [dict(record) for record in self.log]}
        archive.write(path, "delta", self.tensors, header)

    @staticmethod
    @checked
    def load(path: str | Path) -> Delta:
        """Read what `save` wrote, from a file or from the hub: "hf://owner/name/delta.safetensors".

        Raises:
            CheckpointError: if the file is not a saved delta. HubError: if it cannot be downloaded.
        """
        tensors, header = archive.read(path, "delta")
        with archive.rebuilding(path, "delta"):
            return Delta(tensors, header["provenance"], tuple(dict(record) for record in header["log"]))


def _check_compatible(deltas: Sequence[Delta], *, same_names: bool = False) -> None:
    """Refuse deltas that cannot be combined.

    Raises:
        FingerprintError: with both models, or the first tensor that differs.
    """
    first = deltas[0]
    for other in deltas[1:]:
        model, other_model = first.provenance.get("model"), other.provenance.get("model")
        if model and other_model and model != other_model:
            raise FingerprintError(f"the deltas were made for different models: {model[:12]} and {other_model[:12]}")
        shared = [name for name in first.tensors if name in other.tensors]
        different = [name for name in shared if first.tensors[name].shape != other.tensors[name].shape]
        different += sorted(set(first.tensors) ^ set(other.tensors)) if same_names else []
        if different:
            name = different[0]
            shapes = [tuple(d.tensors[name].shape) if name in d.tensors else "absent" for d in (first, other)]
            raise FingerprintError(
                f"the deltas do not match: {len(different)} tensors differ, the first is {name} ({shapes[0]} and {shapes[1]}); "
                "were they trained from one model with one parameter filter?"
            )


def _combination(method: str, parents: Sequence[Delta], **options: object) -> dict[str, Any]:
    """The provenance of a combination of deltas; the hashes of the start values are kept once, not in every parent."""
    start = {name: value for delta in parents for name, value in delta.provenance.get("start", {}).items()}
    return {
        "method": method, "options": options,
        "model": next((delta.provenance["model"] for delta in parents if delta.provenance.get("model")), None),
        "start": start, "parents": [{k: v for k, v in delta.provenance.items() if k != "start"} for delta in parents],
    }  # fmt: skip


def _trimmed(delta: Delta, density: float) -> dict[str, Tensor]:
    """The differences without their smallest entries, which are set to zero."""
    magnitudes = torch.cat([value.abs().flatten() for value in delta.tensors.values()])
    dropped = magnitudes.numel() - round(density * magnitudes.numel())
    threshold = magnitudes.kthvalue(dropped).values if dropped else magnitudes.new_tensor(-1.0)
    return {name: value * (value.abs() > threshold) for name, value in delta.tensors.items()}


def _relative_to(weight: Tensor, difference: Tensor) -> str:
    """How a difference compares with the weight it changes, for `summary`."""
    before = weight.to(torch.promote_types(weight.dtype, torch.float32))
    after = before + difference.to(before)
    changed = float((after.to(weight.dtype) != weight).double().mean())
    relative = float(difference.double().square().mean().sqrt() / before.double().std().clamp(min=1e-300))
    bits = (8, 4) if difference.ndim > 1 else ()
    surviving = "".join(f", {n} bit {update_cosine(before, after, f'int{n}'):.2f}" for n in bits)
    return f", |dw|/std(w) {relative:.3g}, changed {changed:.1%}{surviving}"
