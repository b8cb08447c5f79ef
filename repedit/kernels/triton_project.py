"""The low-rank kernel in its three tilings, and its launchers: forward, gradients, and the weight rewrite."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import os
from functools import cache

# Type-checking decorators, such as those of an import hook of the tests, would hide a kernel's globals from triton.
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from repedit.errors import KernelUnavailable
from repedit.kernels.tiles import Tile, tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows of a block in the products of the backward pass: sums of 4096 rows in float32, which are then added.
ROWS = 4096

# --- The kernels: y = x - t U^T (+ residual) with t = x V - c
#
# Every operand has its own strides: no layout is assumed and nothing is copied. U and V keep their dtype in memory and
# are rounded to that of x in registers; products are summed in float32, residuals added in float32. There are no
# atomics, so two runs give the same bits. UPCAST makes every product a float32 one: the interpreter has no bfloat16.


@triton.jit
@no_type_check
def _factor(pointer, i, j, size_i, size_j, stride_i, stride_j, dtype: tl.constexpr):
    """A tile of U or V, zero outside, in the dtype the products take."""
    inside = (i < size_i) & (j < size_j)
    return tl.load(pointer + i * stride_i + j * stride_j, mask=inside, other=0.0).to(dtype)


@triton.jit
@no_type_check
def _write(y, residual_ptr, out_ptr, rows, columns, n, d, srn, srd, son, sod, RESIDUAL: tl.constexpr):
    """Store a tile of y, with the residual added in float32."""
    inside = (rows < n) & (columns < d)
    if RESIDUAL:
        y += tl.load(residual_ptr + rows * srn + columns * srd, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * son + columns * sod, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def resident(
    x_ptr, u_ptr, v_ptr, c_ptr, residual_ptr, out_ptr, t_ptr, n, d, k,
    sxn, sxd, sud, suk, svd, svk, srn, srd, son, sod,
    CENTER: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiling A: BM rows stay in registers, in CHUNKS tiles of BD columns, between t = x V - c and y = x - t U^T."""
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    span, ranks = tl.arange(0, BD), tl.arange(0, R)
    t = tl.zeros((BM, R), dtype=tl.float32)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        columns = i * BD + span
        inside = (rows < n) & (columns[None, :] < d)
        x = tl.load(x_ptr + rows * sxn + columns[None, :] * sxd, mask=inside, other=0.0).to(dtype)
        chunks = chunks + (x,)  # noqa: RUF005
        v = _factor(v_ptr, columns[:, None], ranks[None, :], d, k, svd, svk, dtype)
        t = tl.dot(x, v, t, input_precision=PRECISION)
    if CENTER:
        t -= tl.load(c_ptr + ranks, mask=ranks < k, other=0.0)[None, :]
    if SAVE:
        tl.store(t_ptr + rows * k + ranks[None, :], t, mask=(rows < n) & (ranks[None, :] < k))
    narrow = t.to(dtype)
    for i in tl.static_range(CHUNKS):
        columns = i * BD + span
        u = _factor(u_ptr, columns[None, :], ranks[:, None], d, k, sud, suk, dtype)
        y = chunks[i].to(tl.float32) - tl.dot(narrow, u, input_precision=PRECISION)
        _write(y, residual_ptr, out_ptr, rows, columns[None, :], n, d, srn, srd, son, sod, RESIDUAL)


@triton.jit
@no_type_check
def two_sweeps(
    x_ptr, u_ptr, v_ptr, c_ptr, residual_ptr, out_ptr, t_ptr, n, d, k,
    sxn, sxd, sud, suk, svd, svk, srn, srd, son, sod,
    CENTER: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiling B: one program reads its BM rows twice, the first time asking the L2 cache to keep them."""
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    span, ranks = tl.arange(0, BD), tl.arange(0, R)
    t = tl.zeros((BM, R), dtype=tl.float32)
    for i in tl.range(0, CHUNKS, num_stages=STAGES):
        columns = i * BD + span
        inside = (rows < n) & (columns[None, :] < d)
        here = x_ptr + rows * sxn + columns[None, :] * sxd
        x = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_last").to(dtype)
        v = _factor(v_ptr, columns[:, None], ranks[None, :], d, k, svd, svk, dtype)
        t = tl.dot(x, v, t, input_precision=PRECISION)
    if CENTER:
        t -= tl.load(c_ptr + ranks, mask=ranks < k, other=0.0)[None, :]
    if SAVE:
        tl.store(t_ptr + rows * k + ranks[None, :], t, mask=(rows < n) & (ranks[None, :] < k))
    narrow = t.to(dtype)
    for i in tl.range(0, CHUNKS, num_stages=STAGES):
        columns = i * BD + span
        inside = (rows < n) & (columns[None, :] < d)
        here = x_ptr + rows * sxn + columns[None, :] * sxd
        x = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        u = _factor(u_ptr, columns[None, :], ranks[:, None], d, k, sud, suk, dtype)
        y = x - tl.dot(narrow, u, input_precision=PRECISION)
        _write(y, residual_ptr, out_ptr, rows, columns[None, :], n, d, srn, srd, son, sod, RESIDUAL)


@triton.jit
@no_type_check
def split_reduce(
    x_ptr, v_ptr, parts_ptr, n, d, k, sxn, sxd, svd, svk,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, CHUNKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiling C, first half: the share of x V over one run of CHUNKS tiles of columns, stored in parts (splits, n, R)."""
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    part = tl.program_id(1)
    span, ranks = tl.arange(0, BD), tl.arange(0, R)
    t = tl.zeros((BM, R), dtype=tl.float32)
    for i in tl.range(0, CHUNKS, num_stages=STAGES):
        columns = (part * CHUNKS + i) * BD + span
        inside = (rows < n) & (columns[None, :] < d)
        x = tl.load(x_ptr + rows * sxn + columns[None, :] * sxd, mask=inside, other=0.0).to(dtype)
        v = _factor(v_ptr, columns[:, None], ranks[None, :], d, k, svd, svk, dtype)
        t = tl.dot(x, v, t, input_precision=PRECISION)
    tl.store(parts_ptr + (part.to(tl.int64) * n + rows) * R + ranks[None, :], t, mask=rows < n)


@triton.jit
@no_type_check
def split_apply(
    x_ptr, u_ptr, parts_ptr, c_ptr, residual_ptr, out_ptr, t_ptr, n, d, k,
    sxn, sxd, sud, suk, srn, srd, son, sod,
    CENTER: tl.constexpr, RESIDUAL: tl.constexpr, SAVE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Tiling C, second half: t is the sum of the parts in a fixed order, and one BM x BD tile of y a program."""
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    ranks = tl.arange(0, R)
    t = tl.zeros((BM, R), dtype=tl.float32)
    for s in tl.static_range(SPLITS):
        t += tl.load(parts_ptr + (rows + s * n) * R + ranks[None, :], mask=rows < n, other=0.0)
    if CENTER:
        t -= tl.load(c_ptr + ranks, mask=ranks < k, other=0.0)[None, :]
    if SAVE:  # noqa: SIM102
        if tl.program_id(1) == 0:
            tl.store(t_ptr + rows * k + ranks[None, :], t, mask=(rows < n) & (ranks[None, :] < k))
    u = _factor(u_ptr, columns[None, :], ranks[:, None], d, k, sud, suk, dtype)
    inside = (rows < n) & (columns[None, :] < d)
    x = tl.load(x_ptr + rows * sxn + columns[None, :] * sxd, mask=inside, other=0.0).to(tl.float32)
    y = x - tl.dot(t.to(dtype), u, input_precision=PRECISION)
    _write(y, residual_ptr, out_ptr, rows, columns[None, :], n, d, srn, srd, son, sod, RESIDUAL)


# --- Launchers: forward, gradients, and the weight rewrite, which is the same kernel
#
# The kernel path is one custom operator with a fake implementation and registered gradients, so torch.compile sees no
# graph break. With t = x V - c and the gradient g of y:
#
#     dx = g - (g U) V^T  (the same kernel, U and V swapped)    dU = -g^T t    dV = -x^T (g U)    dc = sum of g U
#
# and c = center V carries the rest: dV gains center (dc)^T, which makes it -(x - center)^T (g U). Saved are x (n, d),
# only where V asks for a gradient, and t (n, k), only where U does; the products run over blocks of rows in float32.


def project(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    center: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    tiling: str = "auto",
) -> Tensor:
    """x - ((x - center) V) U^T (+ residual) on CUDA, or anywhere under the interpreter; differentiable.

    Raises:
        KernelUnavailable: if the tiling does not exist for this width, rank and dtype.
    """
    # Leading axes that do not collapse into one stride, as in a slice of positions, cost a copy here.
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    # V is rounded as in the kernel: with another rounding, c would differ from m V by 2^-9 of the mean in bfloat16.
    c = None if center is None else center.float() @ v.to(x.dtype).float()
    save = torch.is_grad_enabled() and u.requires_grad
    out, _ = _project(rows, u, v, c, added, tiling, save)
    return out.reshape(x.shape)


def right(w: Tensor, u: Tensor, v: Tensor, *, out: Tensor | None = None, tiling: str = "auto") -> Tensor:
    """W - (W U) V^T: the rows of W are the tokens, U and V swapped; `out=w` is safe, a row is read before it is written."""
    out = torch.empty_like(w) if out is None else out
    launch(w, v.to(w.dtype), u.to(w.dtype), None, None, out, None, tile_for(w, u, tiling))
    return out


def tile_for(x: Tensor, u: Tensor, tiling: str = "auto") -> Tile:
    """The tile for these rows.

    Raises:
        KernelUnavailable: if the tiling does not exist for them.
    """
    chosen = tile(x.shape[-1], u.shape[1], x.element_size(), tiling, major=major_capability(x.device))
    if chosen is None:
        raise KernelUnavailable(
            f"{tiling!r} does not exist for rows of {x.shape[-1]} elements of {x.dtype} at rank {u.shape[1]}; use 'auto'"
        )
    return chosen


# Given explicitly, because type-checking decorators hide the annotations.
SCHEMA = "(Tensor x, Tensor u, Tensor v, Tensor? c, Tensor? residual, str tiling, bool save) -> (Tensor, Tensor)"


@torch.library.custom_op("repedit::project", mutates_args=(), schema=SCHEMA)
def _project(
    x: Tensor, u: Tensor, v: Tensor, c: Tensor | None, residual: Tensor | None, tiling: str, save: bool
) -> tuple[Tensor, Tensor]:
    """y and, with `save`, t in float32 (otherwise without rows)."""
    out, t = torch.empty_like(x), x.new_empty((x.shape[0] if save else 0, u.shape[1]), dtype=torch.float32)
    launch(x, u.to(x.dtype), v.to(x.dtype), c, residual, out, t if save else None, tile_for(x, u, tiling))
    return out, t


@_project.register_fake
def _(
    x: Tensor, u: Tensor, v: Tensor, c: Tensor | None, residual: Tensor | None, tiling: str, save: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0] if save else 0, u.shape[1]), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, v, _, _, ctx.tiling, save = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u, v, output[1] if save else None)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, u, v, t = ctx.saved_tensors
    need_x, need_u, need_v, need_c, need_residual = ctx.needs_input_grad[:5]
    dx = dv = dc = None
    if need_x or need_v or need_c:
        # g U is the t of the swapped kernel; it is stored where dV or dc needs it.
        dx, gu = _project(g, v, u, None, None, ctx.tiling, need_v or need_c)
        dv = -_product(x, gu).to(v.dtype) if need_v else None
        dc = gu.sum(0) if need_c else None
    du = -_product(g, t).to(u.dtype) if need_u else None
    return dx, du, dv, dc, g if need_residual else None, None, None


_project.register_autograd(_backward, setup_context=_setup)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32, over blocks of rows: no float32 copy of a."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[0], ROWS):
        total.addmm_(a[start : start + ROWS].float().T, b[start : start + ROWS])
    return total


def launch(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    c: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    t: Tensor | None,
    plan: Tile,
    *,
    upcast: bool = INTERPRETED,
    precision: str = "ieee",
) -> None:
    """Write y (n, d) to `out` and t (n, k), if given, in float32; `out` may be x itself.

    Args:
        precision: of float32 products; "tf32" is faster from rank 32 on and errs by 1e-3.
    """
    if x.shape[0] == 0:
        return
    n, d, k = *x.shape, u.shape[1]
    flags = {
        "CENTER": c is not None, "RESIDUAL": residual is not None, "SAVE": t is not None, "UPCAST": upcast,
        "PRECISION": precision, "BM": plan.rows, "BD": plan.columns, "R": plan.rank,
    }  # fmt: skip
    options = {"num_warps": plan.warps, "enable_fp_fusion": True}
    added = x if residual is None else residual
    pointers = (x if c is None else c, added, out, x if t is None else t, n, d, k)
    ends = (*added.stride(), *out.stride())
    grid = triton.cdiv(n, plan.rows)
    chunks = triton.cdiv(d, plan.columns)
    if plan.tiling != "split":
        kernel = resident if plan.tiling == "resident" else two_sweeps
        sizes = {"CHUNKS": chunks, "STAGES": plan.stages}
        kernel[(grid,)](
            x, u, v, *pointers, *x.stride(), *u.stride(), *v.stride(), *ends, **flags, **sizes, **options
        )  # fmt: skip
        return
    each = triton.cdiv(chunks, split_count(x.device, grid, chunks))
    count = triton.cdiv(chunks, each)
    parts = torch.empty(count, n, plan.rank, dtype=torch.float32, device=x.device)
    shared = {name: flags[name] for name in ("UPCAST", "PRECISION", "BM", "BD", "R")}
    split_reduce[(grid, count)](
        x, v, parts, n, d, k, *x.stride(), *v.stride(), **shared, CHUNKS=each, STAGES=plan.stages, **options
    )
    split_apply[(grid, chunks)](
        x, u, parts, *pointers, *x.stride(), *u.stride(), *ends, **flags, SPLITS=count, **options
    )


@cache
def major_capability(device: torch.device) -> int:
    """Major compute capability of the device; the interpreter uses the tiles of 9.0."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def split_count(device: torch.device, grid: int, chunks: int) -> int:
    """Number of parts of the sum over the width: enough programs for every processor, at most 8 parts."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(8, chunks, processors // grid))
