"""Slicing: a model with a narrower residual stream, without the coordinates that a stream erasure empties.

The removed directions cannot be restored by removing a hook or by filling a null space, because they have no coordinates
left. The remaining coordinates may still hold copies of the information, or learn it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm, sqrt
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.arch import Architecture, ModelLayout, Specs, TensorSpec, match_layout
from repedit.arch.storage import Piece
from repedit.arguments import checked
from repedit.edit import Edit, check_widths
from repedit.errors import ArgumentError, NotSliceable, is_whole
from repedit.fit.linalg import complement, orthonormal
from repedit.linear_maps import LowRank
from repedit.lower import check_model, lower
from repedit.models.subject import Subject
from repedit.plan import LoweringOptions, Plan, Resize, TensorReader, plan_for_files
from repedit.rewrite.apply import check_editable, rebuilt
from repedit.sites import Point, Site


@checked
def sliced(edit: Edit, subject: Subject, *, multiple: int = 1) -> Subject:
    """The subject without the stream directions that a stream erasure removes; its logits equal those of the erased model.

    With V (d, s) a basis of the remaining directions, writers become V^T P W, readers W diag(gain) V sqrt(d / s), every
    norm's gain 1, and epsilon' = epsilon d / s.

    Args:
        edit: the result of `erase_stream`.
        multiple: refuse a width s that is not a multiple of this; `erase_stream(..., multiple=, retain=)` makes it one.
    Raises:
        NotSliceable: if the edit is not a stream erasure, or the family or the width does not allow slicing.
    """
    check_editable(subject)
    check_model(edit, subject.value)
    return rebuilt(slice_plan(edit, subject.architecture, subject.specs, multiple=multiple), subject)


def slice_plan(
    edit: Edit, architecture: Architecture, specs: Specs, *, multiple: int = 1, **options: Unpack[LoweringOptions]
) -> Plan:
    """The plan of `sliced`, from tensor names and shapes alone, so that a checkpoint can be sliced tensor by tensor.

    Raises:
        NotSliceable: as for `sliced`.
    """
    if not is_whole(multiple) or options.pop("tied", "untie") != "untie":
        raise ArgumentError(f"multiple={multiple!r}: at least 1; and a sliced head is always untied (tied='untie')")
    reason = "its row does not say what changes with the width (Architecture.shrink)"
    if architecture.shrink is not None:
        reason = architecture.shrink.whole_stream
    if reason:
        raise NotSliceable(
            f"the stream of {architecture.model_type} cannot be made narrower: {reason}; use structure='keep'"
        )
    layout = match_layout(architecture, specs)
    check_widths(edit, layout)
    map_ = erasure(edit, layout)
    basis = coordinates(map_, centered=architecture.centered)
    _check_width(layout, basis.shape[1], multiple)
    builder = _SliceBuilder(layout, specs, map_, basis)
    resized = dict(builder.tensors())
    _check_complete(resized, builder, specs)
    folded = lower(edit, architecture, dict(specs), **options)
    plan = replace(
        folded,
        operations={},
        resized=resized,
        config={**folded.config, **builder.config()},
        structure="slice",
        stream=(basis.shape[0], basis.shape[1]),
    )
    return plan_for_files(plan, specs)


def erasure(edit: Edit, layout: ModelLayout) -> LowRank:
    """The projection that an edit applies at every writer of the stream.

    Raises:
        NotSliceable: naming the first site that differs.
    """
    writers = [Site(0, Point.RESID_PRE), *(Site(i, b.outer) for i, layer in enumerate(layout.layers) for b in layer)]
    hint = "build it with erase_stream"
    extra = sorted(set(edit.maps) - set(writers))
    if extra:
        raise NotSliceable(f"{extra[0]} is not a writer of the stream, so this is not a stream erasure; {hint}")
    first = edit.maps.get(writers[0])
    for site in writers:
        map_ = edit.maps.get(site)
        if map_ is None:
            raise NotSliceable(f"{site} is not edited, so the stream still receives the directions there; {hint}")
        if not isinstance(map_, LowRank) or map_.offset is not None or not _is_projection(map_):
            raise NotSliceable(f"{site} holds a {type(map_).__name__} that is not a linear projection; {hint}")
        assert isinstance(first, LowRank)
        if map_.u.shape != first.u.shape or not (torch.equal(map_.u, first.u) and torch.equal(map_.v, first.v)):
            raise NotSliceable(f"{site} removes other directions than {writers[0]}; {hint}")
    assert isinstance(first, LowRank)
    if layout.architecture.centered and float(first.v.double().sum(0).abs().max()) > 1e-4 * sqrt(layout.width):
        raise NotSliceable(
            f"{layout.architecture.model_type} subtracts the mean, which is in the span of the directions; {hint}, which leaves it out"
        )
    return first


# --- Coordinates of an erased residual stream, and the new values of the tensors that write, read and scale it
#
# Let V (d, s), s = d - k, be orthonormal and span the directions that remain. The stream y = V^T x holds all of x, and
# mean_d(x^2) = (s / d) mean_s(y^2), so x / sqrt(mean_d(x^2) + eps) = sqrt(d / s) V y / sqrt(mean_s(y^2) + eps d / s).


def coordinates(map_: LowRank, *, centered: bool) -> Float[Tensor, "d s"]:
    """V: an orthonormal basis, in float64, of the stream directions that a projection keeps.

    Where norms subtract the mean, V carries it: V = A B^T + 1_d 1_s^T / sqrt(d s), with A a basis of what is
    orthogonal to the removed directions and to 1_d, and B of what is orthogonal to 1_s. Then the mean of V^T x is that
    of x, times sqrt(d / s).
    """
    removed = orthonormal(map_.v.cpu())
    if not centered:
        return complement(removed)
    d = map_.width
    ones = torch.ones(d, 1, dtype=torch.float64) / d**0.5
    inner = complement(orthonormal(torch.cat([removed, ones], 1)))
    s = inner.shape[1] + 1
    even = torch.ones(s, 1, dtype=torch.float64) / s**0.5
    return inner @ complement(even).T + ones @ even.T


@dataclass(frozen=True, eq=False)
class Write(Resize):
    """A writer of the stream in the new coordinates: W (d, i) -> A W, or A on the last axis of an embedding or a bias."""

    matrix: Float[Tensor, "s d"]
    """A = V^T P; for an orthogonal projection V^T alone."""
    last: bool
    """Whether the stream is the last axis of the stored tensor."""
    factor: float = 1.0
    """sqrt(d / s) for an embedding that the model multiplies by the root of the width."""

    def __call__(self, tensor: Tensor, read: TensorReader) -> Tensor:
        matrix = self.matrix.to(tensor) * self.factor
        return tensor @ matrix.T if self.last else matrix @ tensor

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        s = self.matrix.shape[0]
        return (*before[:-1], s) if self.last else (*before[:-2], s, before[-1])

    def describe(self) -> str:
        return f"writes: {self.matrix.shape[1]} coordinates of the stream become {self.matrix.shape[0]}"


@dataclass(frozen=True, eq=False)
class Observe(Resize):
    """A reader of a norm of the stream: W (o, d) -> factor W diag(gain) V, with the gain and bias of the norm absorbed.

    A bias b of the norm becomes ones, and is absorbed by centre(W diag(gain) V) factor + (W b) 1_s^T / s: the normed
    vector is orthogonal to 1_s, so the first term does not respond to the ones, and the second responds only to them.
    """

    basis: Float[Tensor, "d s"]
    gain: str
    """Weight of the norm."""
    unit_gain: bool
    bias: str | None
    """Bias of the norm."""
    factor: float
    """sqrt(d / s); in the readers rather than in the norm, where half types would round it, unlike the 1 left there."""
    extra: float = 1.0
    """sqrt(d / s) for rows that pass a norm of head width, which adds the same epsilon."""

    def __call__(self, tensor: Tensor, read: TensorReader) -> Tensor:
        gain = read(self.gain).to(tensor) + (1.0 if self.unit_gain else 0.0)
        new = (tensor * gain) @ self.basis.to(tensor) * self.factor
        if self.bias is not None:
            shift = tensor @ read(self.bias).to(tensor)
            new = new - new.mean(-1, keepdim=True) + shift[..., None] / new.shape[-1]
        return new * self.extra

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return (*before[:-1], self.basis.shape[1])

    def of_piece(self, piece: Piece, stored: TensorSpec, name: Callable[[str], str]) -> Resize:
        return replace(self, gain=name(self.gain), bias=self.bias and name(self.bias))

    def describe(self) -> str:
        return (
            f"reads: {self.basis.shape[0]} coordinates of the stream become {self.basis.shape[1]}, {self.gain} absorbed"
        )


@dataclass(frozen=True)
class Constant(Resize):
    """The gain or bias of a norm whose values its readers absorb."""

    width: int
    value: float

    def __call__(self, tensor: Tensor, read: TensorReader) -> Tensor:
        return tensor.new_full((self.width,), self.value)

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return (self.width,)

    def describe(self) -> str:
        return f"norm: {self.value:g} in {self.width} coordinates, its values are in its readers"


@dataclass(frozen=True)
class Scaled(Resize):
    """A tensor times a number, in the same shape."""

    factor: float

    def __call__(self, tensor: Tensor, read: TensorReader) -> Tensor:
        return tensor * self.factor

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return before

    def describe(self) -> str:
        return f"scaled by {self.factor:.6g}, for the epsilon of the norm that follows"


# --- The tensors of a model, and what each becomes


class _SliceBuilder:
    """The new values of every tensor of a model and of its config."""

    def __init__(self, layout: ModelLayout, specs: Specs, map_: LowRank, basis: Float[Tensor, "d s"]) -> None:
        row = layout.architecture
        assert row.shrink is not None
        self.layout, self.row, self.shrink, self.specs, self.basis = layout, row, row.shrink, specs, basis
        d, self.width = basis.shape
        self.ratio = d / self.width
        u, v = map_.u.double().cpu(), map_.v.double().cpu()
        self.writer = basis.T - (basis.T @ u) @ v.T
        self.readers: set[str] = set()

    def tensors(self) -> Iterator[tuple[str, Resize]]:
        tokens, *positions = self.layout.embeddings
        scale = sqrt(self.ratio) if self.row.embedding_scaled else 1.0
        router = f"{self.row.experts.module.partition('.experts')[0]}.gate" if self.row.experts else ""
        yield tokens, Write(self.writer, True, scale)
        for name in positions:
            yield name, Write(self.writer, True)
        for block, (attention, mlp) in zip(self.layout.block_paths, self.layout.layers, strict=True):
            first, second = f"{block}.{self.shrink.attention_norm}", f"{block}.{self.shrink.mlp_norm}"
            for norm in dict.fromkeys((first, second)):
                yield from self._norm(norm)
            for branch in (attention, mlp):
                yield from ((part.out.tensor, Write(self.writer, False)) for part in branch.parts)
                if branch.bias is not None:
                    yield branch.bias, Write(self.writer, True)
            for module in self.shrink.heads:
                yield from self._reader(f"{block}.{module}", first, normed=module in self.shrink.head_norms)
            readers = {view.tensor for part in mlp.parts for view in part.readers if not view.tensor.endswith(".bias")}
            yield from ((name, self._observe(second)) for name in sorted(readers))
            self.readers |= readers
            if mlp.routed:
                yield from self._reader(f"{block}.{router}", second)
        base = tokens.removesuffix(f"{self.row.embeddings[0]}.weight")
        final = f"{base}{self.shrink.final_norm}"
        yield from self._norm(final)
        yield from self._reader(self.layout.head.removesuffix(".weight"), final)

    def config(self) -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "head_dim": self.layout.layers[0][0].head_width,
            self.shrink.epsilon: self.row.epsilon * self.ratio,
        }

    def _norm(self, norm: str) -> Iterator[tuple[str, Resize]]:
        yield f"{norm}.weight", Constant(self.width, 0.0 if self.row.unit_gain else 1.0)
        if f"{norm}.bias" in self.specs:
            yield f"{norm}.bias", Constant(self.width, 1.0)

    def _reader(self, module: str, norm: str, *, normed: bool = False) -> Iterator[tuple[str, Resize]]:
        extra = sqrt(self.ratio) if normed else 1.0
        self.readers.add(f"{module}.weight")
        yield f"{module}.weight", replace(self._observe(norm), extra=extra)
        if normed and f"{module}.bias" in self.specs:
            yield f"{module}.bias", Scaled(extra)

    def _observe(self, norm: str) -> Observe:
        bias = f"{norm}.bias" if f"{norm}.bias" in self.specs else None
        return Observe(self.basis, f"{norm}.weight", self.row.unit_gain, bias, sqrt(self.ratio))


def _is_projection(map_: LowRank) -> bool:
    inner = map_.v.double().T @ map_.u.double()
    # 1e-4: a float32 basis is orthonormal to about 1e-7.
    return bool(((inner - torch.eye(len(inner)).to(inner)).abs() < 1e-4).all())


def _check_width(layout: ModelLayout, width: int, multiple: int) -> None:
    """Refuse a width that the config or the caller does not allow, naming the nearest ranks with an allowed width."""
    row = layout.architecture
    step = lcm(multiple, row.n_heads if row.shrink and row.shrink.heads_must_divide_width else 1)
    if width % step == 0 and width:
        return
    ranks = sorted({layout.width - s for s in (width // step * step, -(-width // step) * step) if 0 < s < layout.width})
    heads = (
        f" (the config of {row.model_type} requires a multiple of its {row.n_heads} heads)" if step != multiple else ""
    )
    raise NotSliceable(
        f"removing {layout.width - width} of {layout.width} directions leaves a width of {width}, which is not a multiple of {step}{heads}; "
        f"the nearest ranks that do are {ranks}: erase_stream(..., multiple={step}, retain=moments) adds directions"
    )


def _check_complete(resized: dict[str, Resize], builder: _SliceBuilder, specs: Specs) -> None:
    """Refuse a model with a tensor that may read or write the stream and that the row does not account for."""
    absent = sorted(set(resized) - set(specs) - {builder.layout.head})
    if absent:
        raise NotSliceable(f"the row of {builder.row.model_type} names {absent[0]}, which this model does not hold")
    norms = builder.shrink.head_norms.values()
    unaffected = {f"{name.removesuffix('.weight')}.bias" for name in builder.readers}
    unaffected |= {f"{block}.{norm}.weight" for block in builder.layout.block_paths for norm in norms}
    for name, spec in specs.items():
        suspect = builder.layout.width in spec.shape or "norm" in name.split(".")[-2]
        if suspect and name not in resized and name not in unaffected:
            raise NotSliceable(
                f"{name} {tuple(spec.shape)} may read or write the stream and the row of {builder.row.model_type} does not say how; "
                "use structure='keep'"
            )
