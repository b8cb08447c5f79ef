"""The low-rank kernel in its three tilings: y = x - t U^T (+ residual) with t = x V - c.

Every operand has its own strides: no layout is assumed and nothing is copied. U and V keep their dtype in memory and
are rounded to that of x in registers; products are summed in float32, residuals added in float32. There are no
atomics, so two runs give the same bits. UPCAST makes every product a float32 one: the interpreter has no bfloat16.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

# Decorators that check types, such as an import hook of tests adds, would hide a kernel's globals from triton.
from typing import no_type_check

import triton
import triton.language as tl


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
    kept = ()
    for i in tl.static_range(CHUNKS):
        columns = i * BD + span
        inside = (rows < n) & (columns[None, :] < d)
        x = tl.load(x_ptr + rows * sxn + columns[None, :] * sxd, mask=inside, other=0.0).to(dtype)
        kept = kept + (x,)  # noqa: RUF005
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
        y = kept[i].to(tl.float32) - tl.dot(narrow, u, input_precision=PRECISION)
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
