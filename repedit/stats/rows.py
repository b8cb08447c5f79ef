"""The rows of a tensor that a second-moment statistic counts, and what may go wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from repedit.errors import NotFinite, ShapeError

# Rows whose products are summed in float32 before they are added to float64: 1e6 rows err by 4e-6 of a block
# instead of the 6e-2 (worst case) of float32 throughout.
BLOCK = 4096


def counted(x: Float[Tensor, "... d"], mask: Bool[Tensor, ...] | None, width: int) -> Float[Tensor, "n d"]:
    """The rows where `mask` is True; the others may hold NaN, so they are cut out and not multiplied by zero.

    Raises:
        ShapeError: if x is not of this width, or the mask does not have its leading shape.
    """
    if x.shape[-1] != width:
        raise ShapeError(f"the statistic has width {width}, the activations have width {x.shape[-1]}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ShapeError(
            f"mask {tuple(mask.shape)} must have the leading shape of the activations, {tuple(x.shape[:-1])}"
        )
    rows = rearrange(x.detach(), "... d -> (...) d")
    # Always cut, so that the same rows give the same bits wherever the padding is.
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


def centre(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The mean of the first block, rounded to float32 so that float32 rows are shifted by exactly the stored value."""
    return rows[:BLOCK].double().mean(0).float().double()


def centred(block: Float[Tensor, "n d"], shift: Float[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """block - shift, in float32, or in float64 where the block is."""
    work = torch.float64 if block.dtype == torch.float64 else torch.float32
    return block.to(work) - shift.to(work)


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
