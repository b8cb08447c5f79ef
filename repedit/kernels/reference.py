"""What each kernel computes, in plain torch: any device, any floating dtype.

`project`, `left` and `right` are one low-rank update of rows, y = r - ((r - c) V) U^T, computed in blocks of
rows that stay in cache, so no temporary of the size of the tensor is made. Under autograd the formula is computed as is.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Rows of a block: |z| and z^2 of a block stay in cache. 1024 x 1536 float32 on one core: 1.4 ms at 128 rows,
# 1.6 at 64, 2.1 at 32; four plain masked reductions over the whole tensor cost 12.7 ms.
BLOCK = 128
# Rows summed in float32 before they are added to float64.
PARTIAL = 4096
# Elements of a block of rows in `project`: 1 MiB of float32 in a CPU's second-level cache; elsewhere 64 MiB, so that
# the work of a step outweighs its launch.
BLOCK_ELEMENTS = 2**18
DEVICE_ELEMENTS = 2**24


def project(
    x: Float[Tensor, "*batch d"],
    u: Float[Tensor, "d k"],
    v: Float[Tensor, "d k"],
    center: Float[Tensor, " d"] | None = None,
    *,
    residual: Float[Tensor, "*batch d"] | None = None,
) -> Float[Tensor, "*batch d"]:
    """x - ((x - center) V) U^T (+ residual), in the dtype of x; half types are computed in float32, rounded once."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, v = u.to(work), v.to(work)
    center = None if center is None else center.to(work)
    if is_traced(x, u, v, center, residual):
        wide = x.to(work)
        y = wide - ((wide if center is None else wide - center) @ v) @ u.T
        return (y if residual is None else y + residual.to(work)).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    return _project_rows(rows, u, v, center, added, None).reshape(x.shape)


def left(
    w: Float[Tensor, "d i"],
    u: Float[Tensor, "d k"],
    v: Float[Tensor, "d k"],
    *,
    out: Float[Tensor, "d i"] | None = None,
) -> Float[Tensor, "d i"]:
    """W - U (V^T W): the rows of W^T projected, a block of columns of W at a time; `out=w` rewrites in place."""
    return right(w.T, v, u, out=None if out is None else out.T).T


def right(
    w: Float[Tensor, "o d"],
    u: Float[Tensor, "d k"],
    v: Float[Tensor, "d k"],
    *,
    out: Float[Tensor, "o d"] | None = None,
) -> Float[Tensor, "o d"]:
    """W - (W U) V^T, a block of rows at a time; `out=w` rewrites in place."""
    if out is None and is_traced(w, u, v):
        return project(w, v, u)
    work = torch.float64 if w.dtype == torch.float64 else torch.float32
    return _project_rows(w, v.to(work), u.to(work), None, None, out)


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether autograd or a compiler records the computation, in which case no block may be written in place."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _project_rows(
    x: Tensor, u: Tensor, v: Tensor, center: Tensor | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    """x - ((x - center) V) U^T (+ residual), in the dtype of u inside; a block is read before it is written.

    `out` has the dtype of x, and is x itself or apart from it.
    """
    elements = BLOCK_ELEMENTS if x.device.type == "cpu" else DEVICE_ELEMENTS
    block = max(elements // max(x.shape[1], 1), 64)
    out = torch.empty_like(x) if out is None else out
    if x.shape[0] <= block and x.dtype == u.dtype:
        return _project_block(x, u, v, center, residual, out)
    for start in range(0, x.shape[0], block):
        rows = slice(start, start + block)
        part, target = x[rows].to(u.dtype), out[rows]
        added = None if residual is None else residual[rows]
        if target.dtype == u.dtype:
            _project_block(part, u, v, center, added, target)
        else:
            target.copy_(_project_block(part, u, v, center, added, part))
    return out


def _project_block(
    x: Tensor, u: Tensor, v: Tensor, center: Tensor | None, residual: Tensor | None, out: Tensor | None = None
) -> Tensor:
    t = (x if center is None else x - center) @ v
    # Rank 1 is one elementwise pass; a matrix product of inner size 1 costs 1.3 times as much.
    if u.shape[1] == 1:
        y = torch.addcmul(x, t, u.T, value=-1, out=out)
    else:
        y = torch.addmm(x, t, u.T, alpha=-1, out=out)
    return y if residual is None else y.add_(residual)


def activity(
    z: Float[Tensor, "n f"],
    mask: Bool[Tensor, " n"],
    grad: Float[Tensor, "n f"] | None = None,
    shift: Float[Tensor, " f"] | None = None,
) -> dict[str, Float[Tensor, " f"]]:
    """Sums over the rows where `mask` is True, in float64.

    total = sum(z - shift), abs = sum |z|, square = sum (z - shift)^2, positive = count z > 0 and, with g = grad,
    gxa_abs = sum |z g|, gxa = sum z g, gxa_square = sum (z g)^2, grad = sum g.

    Each sum is a vector-matrix product with the mask on a block that stays in cache. Rows outside the mask may hold
    NaN: a product 0 * NaN shows in the result, and the sums are then taken again without those rows.
    """
    names = ["total", "abs", "square", "positive"] + (
        ["gxa_abs", "gxa", "gxa_square", "grad"] if grad is not None else []
    )
    work = torch.float64 if z.dtype == torch.float64 else torch.float32
    sums = torch.zeros(len(names), z.shape[1], dtype=torch.float64, device=z.device)
    for start in range(0, z.shape[0], PARTIAL):
        rows = slice(start, start + PARTIAL)
        sums += _partial_sums(z[rows], mask[rows], None if grad is None else grad[rows], shift, len(names), work)
    if not bool(mask.all()) and not bool(torch.isfinite(sums).all()):
        masked_grad = None if grad is None else grad[mask]
        return activity(z[mask], torch.ones_like(mask[mask]), masked_grad, shift)
    return dict(zip(names, sums, strict=True))


def _partial_sums(
    z: Tensor, mask: Tensor, grad: Tensor | None, shift: Tensor | None, count: int, work: torch.dtype
) -> Tensor:
    sums = torch.zeros(count, z.shape[1], dtype=work, device=z.device)
    scratch = torch.empty(BLOCK, z.shape[1], dtype=work, device=z.device)
    center = None if shift is None else shift.to(z.device, work)
    for start in range(0, z.shape[0], BLOCK):
        rows = slice(start, start + BLOCK)
        weight, block = mask[rows].to(work), z[rows].to(work)
        out = scratch[: block.shape[0]]
        _add(sums[1], torch.abs(block, out=out), weight)
        _add(sums[3], torch.gt(block, 0, out=out), weight)
        if grad is not None:
            _add_gradient(sums[4:], block, grad[rows].to(work), weight, out)
        if center is not None:
            block = torch.sub(block, center, out=out)
        _add(sums[0], block, weight)
        _add(sums[2], torch.mul(block, block, out=out), weight)
    return sums


def _add(total: Tensor, rows: Tensor, weight: Tensor) -> None:
    total.addmv_(rows.T, weight)


def _add_gradient(sums: Tensor, z: Tensor, grad: Tensor, weight: Tensor, out: Tensor) -> None:
    product = torch.mul(z, grad, out=out)
    _add(sums[1], product, weight)
    _add(sums[0], product.abs(), weight)
    _add(sums[2], product.square_(), weight)
    _add(sums[3], grad, weight)
