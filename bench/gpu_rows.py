"""The rows of bench/gpu.py: our kernels and their peers on the same tensors, with the bar each has to pass.

All bars are proposals until a results file of this benchmark is committed: they were derived from bytes and FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench import gpu_limits
from bench.gpu_limits import Time, microseconds, normal, rotated
from repedit.kernels import dispatch, reference, triton_activity, triton_project
from repedit.kernels.tiles import TILINGS, tile

N = 16384
WIDTHS, RANKS = (576, 1024, 2048, 4096, 8192, 16384), (16, 64)
EXTRA = ((4096, 128, torch.bfloat16), (4096, 256, torch.bfloat16), (576, 16, torch.float32), (4096, 16, torch.float32))
SHAPES = (*((d, r, torch.bfloat16) for d in WIDTHS for r in RANKS), *EXTRA)
NEURONS = 14336
# Root-mean-square error over the float64 result, operands rounded to the dtype.
ERRORS = {torch.bfloat16: 2.5e-3, torch.float16: 5e-4, torch.float32: 1e-6}
Row = dict[str, Any]


def row(name: str, shape: list[int], dtype: torch.dtype, time: Time | None, bar: str = "", **extra: Any) -> Row:
    """A row of the results file; it is only recorded where there is no bar."""
    measured = {} if time is None else {"unit": "us", **asdict(time)}
    return {"name": name, "shape": shape, "dtype": str(dtype)[6:], **measured, "bar": bar, "status": "recorded"} | extra


def judged(found: Row, value: float, least: float) -> Row:
    """With a verdict; "not resolved" where the two measurements of ours differ by more than the margin."""
    margin, noise = abs(value / least - 1), abs(found.get("control", 1.0) - 1)
    status = "not resolved" if margin < noise else ("pass" if value >= least else "fail")
    return found | {"bar": f">= {least}", "status": status}


def factors(d: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """U, V and the mean, in the dtype of the activations."""
    u, v = (torch.linalg.qr(torch.randn(d, r, device=gpu_limits.DEVICE))[0].contiguous().to(dtype) for _ in range(2))
    return u, v, torch.randn(d, device=gpu_limits.DEVICE).to(dtype)


def bar_of_copy(d: int, r: int) -> float | None:
    """The share of copy bandwidth proposed for bfloat16 at this shape."""
    if r <= 16:
        return 0.80 if d <= 2048 else 0.70 if d <= 4096 else 0.60
    return (0.70 if d <= 1024 else 0.60) if r <= 64 else None


def warm(shape: tuple[int, int, str]) -> None:
    """Compile the kernels of one shape into the shared cache; runs in a worker process."""
    d, r, name = shape
    dtype = getattr(torch, name)
    if d == 0:
        z, mask = normal(256, NEURONS), torch.ones(256, dtype=torch.bool, device=gpu_limits.DEVICE)
        triton_activity.activity(z, mask), triton_activity.activity(z, mask, z)
        return
    u, v, m = factors(d, r, dtype)
    triton_project.project(normal(N, d, dtype=dtype), u, v, m)
    triton_project.right(normal(256, d, dtype=dtype), u, v)


def correctness() -> Iterator[Row]:
    """Error of every benchmarked shape against float64, beside that of eager code; outputs are poisoned with NaN."""
    for d, r, dtype in SHAPES:
        x, (u, v, m) = normal(1000, d, dtype=dtype), factors(d, r, dtype)
        wide = [t.double() for t in (x, u, v, m)]
        expected = wide[0] - ((wide[0] - wide[3]) @ wide[2]) @ wide[1].T
        eager = float(((x - ((x - m) @ v) @ u.T).double() - expected).norm() / expected.norm())
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            out = torch.full_like(x, torch.nan)
            plan, c = triton_project.tile_for(x, u), m.float() @ v.float()
            triton_project.launch(x, u, v, c, None, out, None, plan, precision=precision)
            error = float((out.double() - expected).norm() / expected.norm())
            least = 1e-3 if precision == "tf32" else ERRORS[dtype]
            good = error <= least and (precision == "tf32" or error <= 1.1 * eager + 1e-6)
            yield row(
                f"error {precision}", [1000, d, r], dtype, None, f"<= {least} and <= 1.1 eager + 1e-6",
                error=error, eager=eager, status="pass" if good else "fail",
            )  # fmt: skip


def projection(copy: float) -> Iterator[Row]:
    """The kernel at every shape as a share of copy bandwidth, and plain torch on the same tensors."""
    for d, r, dtype in SHAPES:
        xs = rotated(lambda d=d, dtype=dtype: normal(N, d, dtype=dtype))
        outs = [torch.empty_like(x) for x in xs]
        (u, v, m), size = factors(d, r, dtype), xs[0].numel() * xs[0].element_size()
        plan, c = triton_project.tile_for(xs[0], u), m.float() @ v.float()
        call = lambda i: triton_project.launch(xs[i], u, v, c, None, outs[i], None, plan)  # noqa: B023, E731
        ours = microseconds(call, len(xs))
        rate = 2 * size / ours.median / 1e3
        found = row(
            f"project {plan.tiling}", [N, d, r], dtype, ours, gb_s=rate, fraction=rate / copy, tile=asdict(plan)
        )
        least = bar_of_copy(d, r) if dtype == torch.bfloat16 else None
        yield found if least is None else judged(found, rate / copy, least)
        peers: dict[str, Callable[[int], object]] = {
            "eager with m": lambda i: xs[i] - ((xs[i] - m) @ v) @ u.T,  # noqa: B023
            "addmm": lambda i: torch.addmm(xs[i], xs[i] @ v, u.T, alpha=-1),  # noqa: B023
        }
        for name, peer in peers.items():
            theirs = microseconds(peer, len(xs))
            ratio = theirs.median / ours.median
            found = row(name, [N, d, r], dtype, theirs, peer=name, ratio=ratio)
            need = 2.0 if name == "eager with m" and r <= 16 and d <= 4096 else None
            yield found if need is None else judged(found, ratio, need)


def tilings(copy: float) -> Iterator[Row]:
    """The three tilings where more than one is a candidate: what the dispatch table should say."""
    for d, r in ((576, 16), (2048, 16), (4096, 16), (1024, 64)):
        xs, (u, v, m) = rotated(lambda d=d: normal(N, d)), factors(d, r, torch.bfloat16)
        out, c = torch.empty_like(xs[0]), m.float() @ v.float()
        for name in TILINGS:
            plan = tile(d, r, 2, name, major=triton_project.major_capability(xs[0].device))
            if plan is not None:
                call = lambda i: triton_project.launch(xs[i], u, v, c, None, out, None, plan)  # noqa: B023, E731
                time = microseconds(call, len(xs))
                rate = 2 * xs[0].numel() * 2 / time.median / 1e3
                yield row(f"tiling {name}", [N, d, r], torch.bfloat16, time, fraction=rate / copy, tile=asdict(plan))


def sums(read: float) -> Iterator[Row]:
    """One-pass activity sums as a share of read bandwidth, with and without gradients, and the reference."""
    zs, mask = rotated(lambda: normal(N, NEURONS), 3), torch.ones(N, dtype=torch.bool, device=gpu_limits.DEVICE)
    size = zs[0].numel() * 2
    for name, grad in (("activity", None), ("activity with gradients", zs[-1])):
        time = microseconds(lambda i: triton_activity.activity(zs[i], mask, grad), len(zs))  # noqa: B023
        share = size * (1 if grad is None else 2) / time.median / 1e3 / read
        yield judged(row(name, [N, NEURONS], torch.bfloat16, time, fraction=share), share, 0.80)
    naive = microseconds(lambda i: plain_sums(zs[i], mask), len(zs))
    yield row("four reductions", [N, NEURONS], torch.bfloat16, naive, peer="eager")


def plain_sums(z: Tensor, mask: Tensor) -> list[Tensor]:
    """The same sums as one would write them."""
    w = torch.where(mask[:, None], z.float(), 0.0)
    return [w.sum(0), w.abs().sum(0), w.square().sum(0), (w > 0).sum(0)]


def weights() -> Iterator[Row]:
    """Rewrites of a 4096 x 14336 weight, and the second moments of a batch, which are left to torch."""
    w, (u, v, _) = normal(4096, NEURONS), factors(4096, 16, torch.bfloat16)
    yield row("left, in place", [4096, NEURONS, 16], w.dtype, microseconds(lambda i: reference.left(w, u, v, out=w), 3))
    turned = w.T.contiguous()
    ours = microseconds(lambda i: dispatch.right(turned, u, v, out=turned), 3)
    yield row("right, in place", [NEURONS, 4096, 16], w.dtype, ours)
    theirs = microseconds(lambda i: turned - (turned @ u) @ v.T, 3)
    yield row("right, eager", [NEURONS, 4096, 16], w.dtype, theirs, peer="eager", ratio=theirs.median / ours.median)
    x = normal(4096, 4096)
    yield row("moments, torch", [4096, 4096], x.dtype, microseconds(lambda i: x.T @ x, 10))
