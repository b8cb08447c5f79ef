"""One masked pass over activations: every sum of `reference.activity` from a single read of z (and of its gradient).

A program handles BC neurons and one range of rows, BN at a time into float32 lane sums (BN, BC); its partial sums go
to (groups, sums, f), and those are added in float64. There are no atomics, so two runs give the same bits.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

# Type-checking decorators, such as those of an import hook of the tests, would hide a kernel's globals from triton.
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

NAMES = ("total", "abs", "square", "positive", "gxa_abs", "gxa", "gxa_square", "grad")
BN, BC = 16, 128
# Rows a program sums in float32 before float64, as in the reference.
PARTIAL = 4096
# Programs for each processor: enough to hide latency, few enough that the partial sums stay small.
PROGRAMS = 4


@triton.jit
@no_type_check
def sums(
    z_ptr, mask_ptr, grad_ptr, shift_ptr, out_ptr, n, f, steps, szn, szf, sm, sgn, sgf,
    GRAD: tl.constexpr, SHIFT: tl.constexpr, COUNT: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums of one group of `steps` * BN rows over BC neurons; a row outside the mask is not loaded."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    lane = tl.arange(0, BN)
    shift = tl.zeros((1, BC), tl.float32)
    if SHIFT:
        shift += tl.load(shift_ptr + columns, mask=columns < f, other=0.0)
    total = tl.zeros((BN, BC), tl.float32)
    size = tl.zeros((BN, BC), tl.float32)
    square = tl.zeros((BN, BC), tl.float32)
    positive = tl.zeros((BN, BC), tl.float32)
    if GRAD:
        product_size = tl.zeros((BN, BC), tl.float32)
        product = tl.zeros((BN, BC), tl.float32)
        product_square = tl.zeros((BN, BC), tl.float32)
        slope = tl.zeros((BN, BC), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = (group * steps + step) * BN + lane
        marked = tl.load(mask_ptr + rows * sm, mask=rows < n, other=0) != 0
        inside = marked[:, None] & (columns < f)
        z = tl.load(z_ptr + rows[:, None] * szn + columns * szf, mask=inside, other=0.0).to(tl.float32)
        size += tl.abs(z)
        positive += (z > 0).to(tl.float32)
        if GRAD:
            g = tl.load(grad_ptr + rows[:, None] * sgn + columns * sgf, mask=inside, other=0.0).to(tl.float32)
            product += z * g
            product_size += tl.abs(z * g)
            product_square += (z * g) * (z * g)
            slope += g
        if SHIFT:
            z = tl.where(inside, z - shift, 0.0)
        total += z
        square += z * z
    out = out_ptr + group * COUNT * f + columns
    inside_columns = columns < f
    tl.store(out, tl.sum(total, 0)[None, :], mask=inside_columns)
    tl.store(out + f, tl.sum(size, 0)[None, :], mask=inside_columns)
    tl.store(out + 2 * f, tl.sum(square, 0)[None, :], mask=inside_columns)
    tl.store(out + 3 * f, tl.sum(positive, 0)[None, :], mask=inside_columns)
    if GRAD:
        tl.store(out + 4 * f, tl.sum(product_size, 0)[None, :], mask=inside_columns)
        tl.store(out + 5 * f, tl.sum(product, 0)[None, :], mask=inside_columns)
        tl.store(out + 6 * f, tl.sum(product_square, 0)[None, :], mask=inside_columns)
        tl.store(out + 7 * f, tl.sum(slope, 0)[None, :], mask=inside_columns)


def activity(z: Tensor, mask: Tensor, grad: Tensor | None = None, shift: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over the rows (n, f) where `mask` is True, in float64; keys and meaning as `reference.activity`."""
    n, f = z.shape
    names = NAMES if grad is not None else NAMES[:4]
    blocks, steps = triton.cdiv(f, BC), triton.cdiv(n, BN)
    each = max(1, min(PARTIAL // BN, triton.cdiv(steps, max(1, PROGRAMS * processors(z.device) // blocks))))
    groups = triton.cdiv(steps, each)
    partial = torch.empty(groups, len(names), f, dtype=torch.float32, device=z.device)
    if groups:
        other = z if grad is None else grad.detach()
        marks = mask.view(torch.uint8)
        sums[(groups, blocks)](
            z.detach(), marks, other, z if shift is None else shift.float(), partial, n, f, each,
            *z.stride(), marks.stride(0), *other.stride(),
            GRAD=grad is not None, SHIFT=shift is not None, COUNT=len(names), BN=BN, BC=BC, STAGES=3,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dict(zip(names, partial.double().sum(0), strict=True))


def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 stand for the interpreter's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
