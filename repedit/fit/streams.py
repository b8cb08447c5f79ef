"""One basis removed by every writer of the residual stream: the scope that leaves no place where it could be written."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.edit import Edit
from repedit.errors import ArgumentError, RankError, ShapeError
from repedit.fit.subspace import is_orthogonal, orthonormal, projector
from repedit.maps import LowRank
from repedit.models import Subject
from repedit.sites import Point, Site


def erase_stream(subject: Subject, basis: LowRank | Float[Tensor, "d k"]) -> Edit:
    """The edit {0.resid.pre: P, *.attn.out: P, *.mlp.out: P}: the stream has nothing along the basis at any point.

    P = I - U U^T, or the oblique map given. Where the family's norms subtract the mean (LayerNorm), readers see the
    centred stream, in which centring would re-create part of the direction; there U' = orth((I - 1 1^T / d) U).

    Args:
        basis: (d, k), d the width of the stream, or a map without a center.
    Raises:
        ShapeError: if the width is not the stream's.
        ArgumentError: if the map has a center, or is oblique in a family with LayerNorm.
        RankError: if nothing is removed, or nothing would remain.
    """
    width = subject.anatomy.width
    map_ = basis if isinstance(basis, LowRank) else None
    found = basis.width if isinstance(basis, LowRank) else basis.shape[0]
    if found != width:
        raise ShapeError(f"the basis has width {found}, the stream has width {width}; was it fitted on another model?")
    if map_ is not None and map_.center is not None:
        raise ArgumentError("a stream erasure is linear: every writer would add the offset again; fit without a center")
    if map_ is None or is_orthogonal(map_):
        given = basis.u if isinstance(basis, LowRank) else basis
        u = orthonormal(given)
        u = centred_basis(u) if subject.architecture.centered else u
        map_ = projector(u, torch.promote_types(given.dtype, torch.float32))
    elif subject.architecture.centered:
        raise ArgumentError(
            f"{subject.architecture.model_type} has LayerNorm, which re-creates part of an oblique map's kernel; "
            "give an orthogonal projection"
        )
    if not 0 < map_.rank_removed < width:
        raise RankError(
            f"the basis removes rank {map_.rank_removed} of a stream of width {width}; give 1 to {width - 1} directions"
            + (" that are not the mean" if subject.architecture.centered else "")
        )
    return Edit(
        dict.fromkeys(stream_sites(subject), map_),
        {"method": "stream erasure", "options": {"rank": map_.rank_removed}, "model": subject.fingerprint()},
    )


def stream_sites(subject: Subject) -> tuple[Site, ...]:
    """Every site that writes to the residual stream: the embedding sum and both branches of every block."""
    writers = subject.select(["*.attn.out", "*.mlp.out"])
    return (Site(0, Point.RESID_PRE), *writers)


def centred_basis(basis: Float[Tensor, "d k"]) -> Float[Tensor, "d r"]:
    """orth((I - 1 1^T / d) U), U orthonormal: the basis without the mean, which LayerNorm removes by itself."""
    left, size, _ = torch.linalg.svd(basis - basis.mean(0, keepdim=True), full_matrices=False)
    return left[:, size > 1e-6]
