"""Certificates: what remains of removed directions in edited weights. They say nothing about knowledge stored elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from repedit.arch import Architecture, Specs, match_layout
from repedit.arguments import checked
from repedit.edit import Edit
from repedit.errors import ArgumentError, CheckpointError, PlanMismatch
from repedit.io.checkpoint import open_shards
from repedit.io.files import user_path
from repedit.kernels.dispatch import LEAK_LIMITS
from repedit.linear_maps import LowRank
from repedit.lower import lower
from repedit.models.subject import Subject
from repedit.plan import Operation, Plan, TensorReader
from repedit.rewrite.checkpoint_architecture import architecture_of, used_specs
from repedit.rewrite.slice import slice_plan

_ROWS = 256
"""Rows at a time, so that no whole tensor is held in float64."""
_MEANINGS = {
    "hook": "the weights are those of the original: whoever removes the hook has the original back",
    "folded": "the directions are gone from the weights, up to rounding; the slot can be trained again",
    "sliced": "the coordinates themselves are gone",
}


@dataclass(frozen=True)
class TensorCertificate:
    """One tensor that writes into, or reads from, a removed subspace."""

    rank: int
    """Directions removed."""
    leak_computed: float
    """||V^T W'|| / ||V^T W|| before the cast to the stored dtype."""
    leak: float
    """The same for the stored weights."""
    residue: float
    """Regression of V^T W' on V^T W: how much of the rest is the original, not rounding noise."""
    dtype: str


@dataclass(frozen=True)
@checked
class Certificate:
    """How irreversible a projection is, as far as the weights can show."""

    form: Literal["hook", "folded", "sliced"]
    exactness: str
    """The weakest class among the sites: "exact", "subspace-exact" or "hook-only"."""
    rank: int
    """Directions removed, over all sites."""
    worst_leak: float
    """1 if no direction was removed."""
    tensors: Mapping[str, TensorCertificate]
    widths: tuple[int, int] | None = None
    """Width of the stream before and after slicing, where the leak is 0 by shape."""
    uncertified: Mapping[str, str] = field(default_factory=dict)
    """Tensors with a low-rank map that does not remove all of its directions, and how many it removes."""

    def __repr__(self) -> str:
        return f"Certificate({self.form}: {self.summary})"

    @staticmethod
    @checked
    def of(values: Mapping[str, Any]) -> Certificate:
        """The certificate of a manifest, which `plain` made.

        Raises:
            CheckpointError: if the values are no certificate.
        """
        try:
            tensors = {name: TensorCertificate(**row) for name, row in values["tensors"].items()}
            widths = tuple(values["widths"]) if values.get("widths") else None
            return Certificate(**{**values, "tensors": tensors, "widths": widths})
        except (LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the certificate in a manifest cannot be read: {error}; export again") from error

    @property
    def summary(self) -> str:
        """What was measured, in a clause: the largest leak, the narrower stream, or that there was nothing to measure."""
        if self.widths is not None:
            return f"the stream has {self.widths[1]} coordinates where it had {self.widths[0]}, {self.exactness}"
        if not self.tensors:
            return (
                "no direction is removed whole, so none is certified" if self.uncertified else "no direction is removed"
            )
        worst = max(self.tensors, key=lambda name: self.tensors[name].leak)
        directions, tensors = "s" * (self.rank != 1), "s" * (len(self.tensors) != 1)
        return (
            f"{self.rank} direction{directions} over {len(self.tensors)} tensor{tensors}, {self.exactness}, largest leak along a "
            f"removed direction {self.worst_leak:.1e} ({worst})"
        )

    def describe(self) -> str:
        """A few lines: what the certificate shows, and what it does not."""
        measured = self.summary[0].upper() + self.summary[1:]
        if self.widths is not None:
            return (
                f"{self.form}: {_MEANINGS[self.form]}.\n{measured}.\n"
                "This says nothing of copies of the knowledge in those that stay: attack it."
            )
        form = _MEANINGS[self.form] if self.tensors or self.form == "hook" else "the weights hold the map"
        return (
            f"{self.form}: {form}.\n{measured}.\n"
            + "".join(f"{name}: {reason}.\n" for name, reason in self.uncertified.items())
            + "This says nothing of copies of the knowledge elsewhere: attack it."
        )

    def plain(self) -> dict[str, Any]:
        """Plain JSON values; without `uncertified` where every map is a projection."""
        return {key: value for key, value in asdict(self).items() if value or key != "uncertified"}


@checked
def certificate(edited: Subject | str | Path, edit: Edit, original: Subject | str | Path) -> Certificate:
    """Measure what remains, in the weights of an edited model, of the directions that an edit removes.

    leak = ||V^T W'||_F / ||V^T W||_F for each writer W (out, in), ||W' U||_F / ||W U||_F for each reader; D W in place of
    W where a post-norm with gain D follows. A narrower model is compared with what slicing makes of the original.

    Of a map x - U V^T x with V^T U != I, the coordinates (I - V^T U) V^T x stay. Only the directions V c with
    c^T V^T U = c^T are removed, and only they are measured; `uncertified` says how many are not.

    Args:
        edited, original: models in memory, or checkpoint directories; both of one kind.
    Raises:
        ArgumentError: if the edit holds no low-rank map, or one is in memory and the other a directory.
        NotFoldable: if a site of the edit has no weight.
        PlanMismatch: if some tensors were edited and others still hold the directions.
    """
    if isinstance(edited, Subject) != isinstance(original, Subject):
        raise ArgumentError(
            "edited is in memory and original a directory, or the reverse; load both, or give both directories"
        )
    architecture, specs, before = _weights(original)
    edited_architecture, edited_specs, after = _weights(edited, architecture)
    if match_layout(edited_architecture, edited_specs).width != match_layout(architecture, specs).width:
        plan = slice_plan(edit, architecture, specs)
        _check_sliced(plan, before, after)
        return sliced_certificate(plan)
    plan = lower(edit, architecture, specs)
    rows, without_projection = {}, uncertified(plan)
    for name in (name for name in plan.operations if _projections(plan, name)):
        added = plan.added.get(name)
        old = before(name) if added is None else torch.zeros(added.shape, dtype=added.dtype)
        row = certified(plan, name, old, after(name), plan.computed(name, old, before), before)
        if row is not None:
            rows[name] = row
    if not rows and not without_projection:
        raise ArgumentError(
            "the edit holds no projection (LowRank); a certificate is about directions that were removed"
        )
    untouched = all(torch.equal(before(name), after(name)) for name in {**rows, **without_projection})
    if not untouched:
        check_leaks(rows)
    return combined(plan, rows, "hook" if untouched else "folded")


def certified(
    plan: Plan, name: str, before: Tensor, after: Tensor, computed: Tensor, read: TensorReader
) -> TensorCertificate | None:
    """The certificate of one tensor, from its values before, as stored, and before rounding; None without a projection."""
    operations = _projections(plan, name)
    if not operations:
        return None
    sums = torch.zeros(4, dtype=torch.float64)
    for operation in operations:
        old, new, exact = _coordinates(operation, before, after, computed, read)
        sums += torch.stack([old.square().sum(), new.square().sum(), exact.square().sum(), (old * new).sum()]).cpu()
    size = sums[0].clamp(min=1e-300)
    # Experts share one map: a direction that four of them lose is one direction.
    maps = {id(op.map): op.map for op in operations if op.map is not None}
    return TensorCertificate(
        rank=sum(map_.rank_removed for map_ in maps.values()),
        leak_computed=float((sums[2] / size).sqrt()),
        leak=float((sums[1] / size).sqrt()),
        residue=float(sums[3] / size),
        dtype=str(after.dtype).removeprefix("torch."),
    )


def _projections(plan: Plan, name: str) -> list[Operation]:
    """The operations on a tensor that remove directions."""
    return [op for op in plan.operations.get(name, ()) if isinstance(op.map, LowRank) and _removed(op).shape[1]]


def _removed(operation: Operation) -> Tensor:
    """The combinations (k, r) of the k directions of a map that nothing of the tensor has any more, orthonormal.

    c^T V^T (x - U V^T x) = c^T (I - V^T U) V^T x is zero for outputs, and (I - U V^T) U c = U (I - V^T U) c for inputs.
    """
    map_ = operation.map
    assert isinstance(map_, LowRank)
    identity = torch.eye(map_.u.shape[1], dtype=torch.float64)
    rest = identity - map_.v.double().T.cpu() @ map_.u.double().cpu()
    # 1e-3: an oblique projection in float32 whose V^T U had a condition number of 1e4.
    if not rest.numel() or float(rest.abs().max()) < 1e-3:
        return identity
    left, sizes, right = torch.linalg.svd(rest)
    return (right.T if operation.kind == "inputs" else left)[:, sizes < 1e-4]  # as `LowRank.rank_removed`


def uncertified(plan: Plan) -> dict[str, str]:
    """How many of its directions a low-rank map of a tensor keeps, for each tensor where one keeps some."""
    reasons = {}
    for name, operations in plan.operations.items():
        for operation in (op for op in operations if isinstance(op.map, LowRank)):
            (directions, removed), map_ = _removed(operation).shape, operation.map
            if removed < directions and isinstance(map_, LowRank):
                inner = map_.v.double().T.cpu() @ map_.u.double().cpu()
                most = float(torch.linalg.matrix_norm(torch.eye(directions, dtype=torch.float64) - inner, 2))
                reasons[name] = (
                    f"a map x - U V^T x with V^T U != I keeps {directions - removed} of its {directions} directions, because "
                    f"(I - V^T U) V^T x stays (largest singular value of I - V^T U: {most:.2g})"
                )
    return dict(sorted(reasons.items()))


def sliced_certificate(plan: Plan) -> Certificate:
    """The certificate of a plan that removes coordinates."""
    rank = sum(plan.ranks.values())
    return Certificate("sliced", "exact", rank, worst_leak=0.0, tensors={}, widths=plan.stream)


def _check_sliced(plan: Plan, before: TensorReader, after: TensorReader) -> None:
    """Refuse a narrower model that is not the sliced original."""
    for name in plan.resized:
        old = before(plan.unties.get(name, name))
        new, expected = after(name), plan.apply(name, old, before)
        error = float("inf")
        if new.shape == expected.shape:
            error = float((new.double() - expected.double()).norm() / expected.double().norm())
        if error > LEAK_LIMITS[new.dtype]:
            raise PlanMismatch(
                f"{name} {tuple(new.shape)} is not what slicing makes of the original (relative error {error:.1e}); is this the model "
                "the edit was sliced out of?"
            )


def combined(plan: Plan, tensors: Mapping[str, TensorCertificate], form: Literal["hook", "folded"]) -> Certificate:
    """The certificate of all tensors."""
    order = ("exact", "subspace-exact", "hook-only")
    return Certificate(
        form=form,
        exactness=max(plan.exactness.values(), key=order.index),
        rank=sum(plan.ranks.values()),
        worst_leak=max((row.leak for row in tensors.values()), default=1.0),
        tensors=dict(tensors),
        uncertified=uncertified(plan),
    )


def check_leaks(tensors: Mapping[str, TensorCertificate]) -> None:
    """Refuse weights that still hold a removed direction.

    Raises:
        PlanMismatch: naming the tensors.
    """
    leaking = [n for n, row in tensors.items() if row.leak > LEAK_LIMITS[getattr(torch, row.dtype)]]
    if leaking:
        raise PlanMismatch(
            f"{len(leaking)} of {len(tensors)} tensors still hold removed directions, such as {leaking[0]} (leak "
            f"{tensors[leaking[0]].leak:.2g}); is this the model the edit was folded into?"
        )


def _coordinates(
    operation: Operation, before: Tensor, after: Tensor, computed: Tensor, read: TensorReader
) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates along the removed directions of the tensor before, as stored, and before rounding, in float64."""
    map_, view, offset = operation.map, operation.view, operation.constant
    assert isinstance(map_, LowRank)
    inputs = operation.kind == "inputs"
    combinations = _removed(operation).to(map_.u.device)
    factor = (map_.u if inputs else map_.v).double() @ combinations
    if not inputs:
        gain = operation.gain_of(read, factor)
        factor = factor if gain is None else gain * factor
    # A product in float32 is exact to 6e-8, which is enough for weights in a half type, exact to 2e-4.
    factor = factor.float() if before.dtype.itemsize < 4 else factor
    old, new, exact = (_products(view.read(tensor), factor, inputs) for tensor in (before, after, computed))
    if offset is None:
        return old, new, exact
    # An affine map sets the coordinates to those of its center, which serve as the measure for a bias that was zero.
    center = combinations.cpu().T @ map_.v.double().cpu().T @ offset.double().cpu()[:, None]
    zeros = torch.zeros_like(center)
    old, new, exact = old.cpu(), new.cpu(), exact.cpu()
    return torch.cat([old, center], 1), torch.cat([new - center, zeros], 1), torch.cat([exact - center, zeros], 1)


def _products(w: Tensor, factor: Tensor, inputs: bool) -> Tensor:
    """W U for inputs, V^T W for outputs, some rows of W at a time: products in the factor's dtype, sums in float64."""
    w, f = w[:, None] if w.ndim == 1 else w, factor.to(w.device)
    parts = w.split(_ROWS)
    if inputs:
        return torch.cat([(part.to(f) @ f).double() for part in parts])
    total = torch.zeros(f.shape[1], w.shape[1], dtype=torch.float64, device=w.device)
    for part, rows in zip(parts, f.split(_ROWS), strict=True):
        total += rows.T @ part.to(f)
    return total


def _weights(source: Subject | str | Path, row: Architecture | None = None) -> tuple[Architecture, Specs, TensorReader]:
    if isinstance(source, Subject):
        return source.architecture, source.specs, source.value
    directory = user_path(source)
    shards = open_shards(directory)
    return architecture_of(directory, row), used_specs(shards, row), shards.read
