"""The rows of a tensor that a second-moment statistic counts, and what may go wrong with them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.errors import NotFinite, ShapeError

# From this width on half a product beats a whole one on a CPU: of its time it takes 1.05 at width 128, 0.92 at 256,
# 0.67 at 576, 0.53 at 1536 (1024 rows, one thread).
TRIANGLE_WIDTH = 256
# Rows whose products are summed in float32 before they are added to float64: 1e6 rows err by 4e-6 of a block
# instead of the 6e-2 (worst case) of float32 throughout.
BLOCK = 4096


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, str], optional: Collection[str] = ()) -> None:
    """Refuse tensors that are not those of a statistic.

    Args:
        shapes: the axes of every tensor, such as "d d"; an axis has one size everywhere.
    Raises:
        ShapeError: naming the tensor that is missing, is one too many, or has another shape.
    """
    odd = sorted((set(state) - set(shapes)) | (set(shapes) - set(state) - set(optional)))
    if odd:
        raise ShapeError(f"a statistic is made of {', '.join(shapes)}; {odd[0]!r} is missing, or is one too many")
    sizes: dict[str, int] = {}
    for name, value in state.items():
        axes = shapes[name].split()
        if len(axes) != value.ndim or any(sizes.setdefault(a, n) != n for a, n in zip(axes, value.shape, strict=True)):
            raise ShapeError(
                f"{name!r} of a statistic has shape {tuple(value.shape)}, expected ({shapes[name]}), {sizes}"
            )


def counted(x: Float[Tensor, "... d"], mask: Bool[Tensor, ...] | None, width: int) -> Float[Tensor, "n d"]:
    """The rows where `mask` is True; the others may hold NaN, so they are cut out and not multiplied by zero.

    Raises:
        ShapeError: if x is not of this width, or the mask does not have its leading shape.
    """
    check_rows(x, mask, width)
    rows = rearrange(x.detach(), "... d -> (...) d")
    # Always cut, so that the same rows give the same bits wherever the padding is.
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


def check_rows(x: Float[Tensor, "... d"], mask: Bool[Tensor, ...] | None, width: int) -> None:
    """Refuse rows that do not fit a statistic.

    Raises:
        ShapeError: if x is not of this width, or the mask does not have its leading shape.
    """
    if x.shape[-1] != width:
        raise ShapeError(f"the statistic has width {width}, the activations have width {x.shape[-1]}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ShapeError(
            f"mask {tuple(mask.shape)} must have the leading shape of the activations, {tuple(x.shape[:-1])}"
        )


def centre(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The mean of the first block, rounded to float32 so that float32 rows are shifted by exactly the stored value."""
    return rows[:BLOCK].double().mean(0).float().double()


def centred(block: Float[Tensor, "n d"], shift: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """block - shift, in float32, or in float64 where the block is."""
    work = torch.float64 if block.dtype == torch.float64 else torch.float32
    return block.to(work) - shift.to(work)


def triangle(rows: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """X^T X, of which the lower triangle may be relied on; the rest may be 0 (a symmetric rank-n update does half)."""
    if rows.device.type != "cpu" or rows.shape[1] < TRIANGLE_WIDTH:
        return rows.T @ rows
    from scipy.linalg import blas

    update = blas.dsyrk if rows.dtype == torch.float64 else blas.ssyrk
    # A row-major (n, d) is a column-major (d, n): the transposes cost nothing, and turn upper into lower.
    return torch.from_numpy(update(1.0, rows.contiguous().numpy().T).T)


def whole(lower: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).T


def check_finite(values: Float[Tensor, " d"], what: str) -> None:
    """Refuse sums that are not finite.

    Raises:
        NotFinite: with the first bad coordinate.
    """
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise NotFinite(f"{what} {bad} is not finite; load the model in float32?")


@contextmanager
def exact_products() -> Iterator[None]:
    """Products in full float32: TensorFloat-32 would lose 3e-4."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
