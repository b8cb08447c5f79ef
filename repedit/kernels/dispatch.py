"""Which implementation runs, and why; callers outside this package use these functions.

`choose` looks at device, dtype and shape alone, so its answer is the same for every batch of a site and is cached.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.errors import ArgumentError, DeviceError, DtypeError, KernelUnavailable, ShapeError, UnknownName, nearest
from repedit.kernels import reference
from repedit.kernels.tiles import MAX_RANK, MIN_ELEMENTS, TILINGS, tile

LEAK_LIMITS = {torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-11}
"""Dtypes of maps, weights and activations -> the leak ||V^T W'|| / ||V^T W|| that rounding alone can leave."""
# Measured at k = 1 to 16: float32 4e-7, float16 2e-4, bfloat16 1.7e-3 (6e-3 at k = 1, width 2048).
SUPPORTED = tuple(LEAK_LIMITS)
CHOICES = ("auto", "reference", *TILINGS)
HAS_TRITON = find_spec("triton") is not None


def choose(
    device: torch.device | str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    *,
    rows: int | None = None,
    want: str = "auto",
) -> tuple[str, str]:
    """The implementation for a basis of `shape` (d, k) and the reason: "reference", "resident", "two_sweeps" or "split".

    Args:
        rows: number of rows of the input, if known; the reference handles very small inputs.
        want: the name of an implementation, or "auto".
    Raises:
        KernelUnavailable: if the requested implementation cannot run here.
        UnknownName: if there is no such implementation.
    """
    small = rows is not None and rows * shape[0] < MIN_ELEMENTS
    # torch.compile traces through the function, and warns about a cache.
    decide = _choose if torch.compiler.is_compiling() else _cached_choice
    return decide(torch.device(device), dtype, (shape[0], shape[1]), small, want)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of x, so that products are computed in the dtype in which they are written."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()


def project(x: Tensor, u: Tensor, v: Tensor, center: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
    """x - ((x - center) V) U^T (+ residual) on the last axis of x (..., d); differentiable.

    Raises:
        ShapeError, DtypeError, DeviceError: if the tensors do not fit each other; nothing is copied between devices.
    """
    _check(x, u, v, "x", x.dim() - 1)
    _check_center(x, u, center, residual)
    name, _ = choose(x.device, x.dtype, (u.shape[0], u.shape[1]), rows=x.numel() // max(x.shape[-1], 1))
    if name == "reference":
        with full_precision(x):
            return reference.project(x, u, v, center, residual=residual)
    from repedit.kernels import triton_project

    return triton_project.project(x, u, v, center, residual=residual, tiling=name)


def left(w: Tensor, u: Tensor, v: Tensor, *, out: Tensor | None = None) -> Tensor:
    """W - U (V^T W) for W (d, i), by blocks of columns; `out=w` rewrites in place. Raises as `project`."""
    _check(w, u, v, "the weight", 0)
    _check_out(w, out)
    with full_precision(w):
        return reference.left(w, u, v, out=out)


def right(w: Tensor, u: Tensor, v: Tensor, *, out: Tensor | None = None) -> Tensor:
    """W - (W U) V^T for W (o, d): the rows of W are projected; `out=w` rewrites in place. Raises as `project`."""
    _check(w, u, v, "the weight", 1)
    _check_out(w, out)
    name, _ = choose(w.device, w.dtype, (u.shape[0], u.shape[1]), rows=w.shape[0])
    if name == "reference" or (out is None and reference.is_traced(w, u, v)):
        with full_precision(w):
            return reference.right(w, u, v, out=out)
    from repedit.kernels import triton_project

    return triton_project.right(w, u, v, out=out, tiling=name)


def activity(
    z: Float[Tensor, "n f"], mask: Tensor | None = None, grad: Tensor | None = None, shift: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums over the rows (n, f) where `mask` is 1, in float64; the names are those of `reference.activity`.

    Raises:
        ShapeError: if mask, grad or shift does not fit z.
        ArgumentError: if the mask holds anything but 0 and 1.
        DtypeError, DeviceError: if a dtype is not supported, or tensors are on different devices.
    """
    selected = _boolean_mask(z, mask, grad, shift)
    name, _ = choose_activity(z.device, z.dtype, z.numel())
    if name == "reference":
        with full_precision(z):
            return reference.activity(z, selected, grad, shift)
    from repedit.kernels import triton_activity

    return triton_activity.activity(z, selected, grad, shift)


def choose_activity(device: torch.device | str, dtype: torch.dtype, elements: int) -> tuple[str, str]:
    """The implementation of `activity` ("reference" or "one_pass") and the reason."""
    reason = _why_not(torch.device(device), dtype)
    if reason is None and elements < MIN_ELEMENTS:
        reason = f"fewer than {MIN_ELEMENTS} elements: a kernel takes longer to start"
    return ("one_pass", "one masked pass over the rows") if reason is None else ("reference", reason)


def _choose(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], small: bool, want: str
) -> tuple[str, str]:
    if want not in CHOICES:
        raise UnknownName(f"no implementation named {want!r}; {nearest(want, CHOICES)}")
    width, rank = shape
    if want == "reference":
        return "reference", "asked for"
    reason = _why_not(device, dtype)
    if reason is None and rank == 0:
        reason = "rank 0: nothing to remove"
    if reason is None and rank > MAX_RANK:
        reason = f"rank {rank} is above {MAX_RANK}: two matrix products are as fast"
    if reason is None and small and want == "auto":
        reason = f"fewer than {MIN_ELEMENTS} elements: a kernel takes longer to start"
    fit = None if reason else tile(width, rank, dtype.itemsize, want, major=_capability(device)[0])
    if fit is not None:
        return fit.tiling, f"width {width}, rank {rank}: {fit.rows} rows a program, {_TILING_REASONS[fit.tiling]}"
    reason = reason or f"rows of {width} elements of {dtype} at rank {rank} do not fit the registers"
    if want == "auto":
        return "reference", reason
    raise KernelUnavailable(f"{want!r} cannot run on {device}: {reason}; use want='auto'")


_cached_choice = lru_cache(maxsize=1024)(_choose)

_TILING_REASONS = {
    "resident": "kept in registers, read once",
    "two_sweeps": "read twice by the same program",
    "split": "two kernels, any width and rank",
}


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel runs for this device and dtype, or None."""
    if device.type != "cuda":
        return f"{device.type} tensors: blocked torch code"
    if torch.version.hip is not None:
        return "not an NVIDIA card: the tiles were never compiled for it"
    if not HAS_TRITON:
        return "triton is not installed"
    if dtype not in SUPPORTED or dtype == torch.float64:
        return f"{dtype}: the kernels compute in float32"
    major, minor = _capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    # Not get_device_capability: torch.compile takes only the properties for constants.
    card = torch.cuda.get_device_properties(device)
    return card.major, card.minor


def _check(x: Tensor, u: Tensor, v: Tensor, name: str, axis: int) -> None:
    if u.dim() != 2 or u.shape != v.shape:
        raise ShapeError(f"u {tuple(u.shape)} and v {tuple(v.shape)} must both be (d, k)")
    if x.dim() <= axis or axis < 0 or x.shape[axis] != u.shape[0]:
        raise ShapeError(
            f"the basis {tuple(u.shape)} has width {u.shape[0]}, {name} {tuple(x.shape)} has width "
            f"{x.shape[axis] if 0 <= axis < x.dim() else 'none'}; was the basis fitted on another model?"
        )
    if u.dtype != v.dtype:
        raise DtypeError(f"u is {u.dtype} and v is {v.dtype}; give both in one dtype")
    _check_dtypes_and_devices(x, name, u=u, v=v)


def _check_center(x: Tensor, u: Tensor, center: Tensor | None, residual: Tensor | None) -> None:
    if center is not None and center.shape != u.shape[:1]:
        raise ShapeError(
            f"center {tuple(center.shape)} must be ({u.shape[0]},), the width of the basis {tuple(u.shape)}; "
            "was the basis fitted on another model?"
        )
    if residual is not None and residual.shape != x.shape:
        raise ShapeError(f"residual {tuple(residual.shape)} must have the shape of x, {tuple(x.shape)}")
    if residual is not None and residual.dtype != x.dtype:
        raise DtypeError(f"residual is {residual.dtype} and x is {x.dtype}; give both in one dtype")
    _check_dtypes_and_devices(x, "x", center=center, residual=residual)


def _check_out(w: Tensor, out: Tensor | None) -> None:
    if out is None:
        return
    if out.shape != w.shape or out.dtype != w.dtype or out.device != w.device:
        raise ShapeError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}, the weight is {w.dtype} {tuple(w.shape)} on "
            f"{w.device}; they must agree"
        )
    itself = out.data_ptr() == w.data_ptr() and out.stride() == w.stride()
    (start, end), (first, last) = _extent(w), _extent(out)
    if not itself and start < last and first < end:
        raise ArgumentError("out overlaps the weight in memory without being it; give out=w or a tensor of its own")


def _extent(w: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of w and of the byte after its last."""
    elements = sum((size - 1) * stride for size, stride in zip(w.shape, w.stride(), strict=True)) + 1
    return w.data_ptr(), w.data_ptr() + elements * w.element_size()


def _check_dtypes_and_devices(x: Tensor, name: str, **others: Tensor | None) -> None:
    """Check that every tensor has a supported dtype and is on the device of x."""
    for other, tensor in {name: x, **others}.items():
        if tensor is None:
            continue
        if tensor.dtype not in SUPPORTED:
            raise DtypeError(f"{other} is {tensor.dtype}; supported: {', '.join(str(d)[6:] for d in SUPPORTED)}")
        if tensor.device != x.device:
            raise DeviceError(f"{name} is on {x.device}, {other} is on {tensor.device}; move one of them")


def _boolean_mask(z: Tensor, mask: Tensor | None, grad: Tensor | None, shift: Tensor | None) -> Tensor:
    """The mask as booleans, one for each row, after checks of all arguments."""
    _check_dtypes_and_devices(z, "z", grad=grad, shift=shift)
    if grad is not None and grad.shape != z.shape:
        raise ShapeError(f"grad {tuple(grad.shape)} must have the shape of the activations, {tuple(z.shape)}")
    if shift is not None and shift.shape != z.shape[1:]:
        raise ShapeError(f"shift {tuple(shift.shape)} must hold one number for each neuron, {tuple(z.shape[1:])}")
    if mask is None:
        return torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
    if mask.shape != z.shape[:1]:
        raise ShapeError(
            f"mask {tuple(mask.shape)} must hold one value for each row of the activations, ({z.shape[0]},)"
        )
    if mask.device != z.device:
        raise DeviceError(f"z is on {z.device}, mask is on {mask.device}; move one of them")
    if mask.dtype != torch.bool:
        odd = mask[(mask != 0) & (mask != 1)]
        if len(odd):
            raise ArgumentError(f"a mask holds 0 and 1; found {float(odd[0]):.4g}")
    return mask.bool()
