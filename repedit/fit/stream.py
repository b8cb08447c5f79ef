"""Stream erasure: one basis removed by every writer of the residual stream, so that the stream never contains it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.edit import Edit
from repedit.errors import ArgumentError, RankError, ShapeError
from repedit.fit.linalg import extend, is_orthogonal, orthonormal, projector
from repedit.linear_maps import LowRank
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from repedit.stats import Moments


def erase_stream(
    subject: Subject, basis: LowRank | Float[Tensor, "d k"], *, multiple: int = 1, retain: Moments | None = None
) -> Edit:
    """The edit {0.resid.pre: P, *.attn.out: P, *.mlp.out: P, ...}: the stream has no component along the basis at any point.

    P = I - U U^T, or the oblique map given. If the norms of the family subtract the mean (LayerNorm), centring would
    re-create part of the direction in what readers see; U' = orth((I - 1 1^T / d) U) is used instead.

    Args:
        basis: (d, k), d the width of the stream, or a map without a center.
        multiple: remove more directions, those that `retain` uses least, until d - k is a multiple of this, so that a
            sliced stream has a width that suits the hardware.
        retain: second moments of the stream on the retain set; needed if directions have to be added.
    Raises:
        ShapeError: if the width is not that of the stream.
        ArgumentError: if the map has a center, or is oblique in a family with LayerNorm or if directions have to be
            added; if retain is needed and missing.
        RankError: if nothing is removed, or nothing would remain.
    """
    width = subject.layout.width
    map_ = basis if isinstance(basis, LowRank) else None
    basis_width = basis.width if isinstance(basis, LowRank) else basis.shape[0]
    if basis_width != width:
        raise ShapeError(
            f"the basis has width {basis_width}, the stream has width {width}; was it fitted on another model?"
        )
    if map_ is not None and map_.center is not None:
        raise ArgumentError("a stream erasure is linear: every writer would add the offset again; fit without a center")
    if map_ is None or is_orthogonal(map_):
        columns = basis.u if isinstance(basis, LowRank) else basis
        u = orthonormal(columns)
        u = centred_basis(u) if subject.architecture.centered else u
        u = _extended_to_multiple(u, multiple, retain, subject.architecture.centered)
        map_ = projector(u, torch.promote_types(columns.dtype, torch.float32))
    elif subject.architecture.centered:
        raise ArgumentError(
            f"{subject.architecture.model_type} has LayerNorm, which re-creates part of an oblique map's kernel; "
            "give an orthogonal projection"
        )
    elif (width - map_.rank_removed) % multiple:
        raise ArgumentError(f"multiple={multiple} adds directions to an orthogonal basis; the map given is oblique")
    if not 0 < map_.rank_removed < width:
        raise RankError(
            f"the basis removes rank {map_.rank_removed} of a stream of width {width}; give 1 to {width - 1} directions"
            + (" that are not the mean" if subject.architecture.centered else "")
        )
    sites = stream_sites(subject)
    return Edit(
        dict.fromkeys(sites, map_),
        {"method": "stream erasure", "options": {"rank": map_.rank_removed}, **subject.made_for(sites)},
    )


def _extended_to_multiple(
    u: Float[Tensor, "d k"], multiple: int, retain: Moments | None, centered: bool
) -> Float[Tensor, "d r"]:
    """The basis with the directions added that make d - k a multiple; not the mean, if the norms subtract it."""
    if multiple < 1:
        raise ArgumentError(f"multiple={multiple}; give at least 1")
    d, k = u.shape
    rank = d - (d - k) // multiple * multiple
    if rank == k:
        return u
    if retain is None:
        raise ArgumentError(
            f"{d - k} is not a multiple of {multiple}, so {rank - k} more directions must be removed; pass retain=Moments of the "
            "stream to determine which are used least"
        )
    if not centered:
        return extend(u, retain, rank)
    return centred_basis(extend(torch.cat([u, torch.ones(d, 1).to(u)], 1), retain, rank + 1))


def stream_sites(subject: Subject) -> tuple[Site, ...]:
    """Every site that writes to the residual stream: the embedding sum and every branch of every block."""
    writers = (Site(i, branch.outer) for i, layer in enumerate(subject.layout.layers) for branch in layer)
    return (Site(0, Point.RESID_PRE), *sorted(writers))


def centred_basis(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """orth((I - 1 1^T / d) U), U orthonormal: the basis without the mean, which LayerNorm removes itself."""
    left, size, _ = torch.linalg.svd(basis - basis.mean(0, keepdim=True), full_matrices=False)
    return left[:, size > 1e-6]
