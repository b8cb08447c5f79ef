"""torch.compile on the tensors of bench/gpu.py: the rows that may take long, each with its own limit of time."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from bench import gpu_limits
from bench.gpu_limits import microseconds, normal, rotated
from bench.gpu_rows import NEURONS, N, Row, factors, judged, plain_sums, row
from repedit.kernels import triton_activity, triton_project

MODES = ("default", "max-autotune-no-cudagraphs")
SHAPES = ((576, 16), (2048, 16), (4096, 16), (4096, 64))


def compiled(deadline: float) -> Iterator[Row]:
    """Projections and activity under both modes, until the time is up; the rest is skipped by name."""
    jobs = [(mode, d, r) for mode in MODES for d, r in SHAPES] + [("default", 0, 0)]
    for mode, d, r in sorted(jobs, key=lambda job: job[0] != "default"):
        shape = [N, d, r] if d else [N, NEURONS]
        name = f"torch.compile {mode}" + ("" if d else ", activity")
        # One compilation takes 5 to 40 seconds.
        if time.monotonic() + (15 if mode == "default" else 45) > deadline:
            yield row(name, shape, torch.bfloat16, None, status="skipped: out of time")
            continue
        torch._dynamo.reset()
        try:
            yield projection(name, mode, d, r) if d else activity(name, mode)
        except Exception as error:  # a peer that cannot run is a row, not the end of the benchmark
            yield row(name, shape, torch.bfloat16, None, status=f"skipped: {type(error).__name__}: {error}"[:200])


def projection(name: str, mode: str, d: int, r: int) -> Row:
    """x - ((x - m) v) u^T compiled, over ours."""
    xs, (u, v, m) = rotated(lambda: normal(N, d)), factors(d, r, torch.bfloat16)
    plain = torch.compile(lambda x: x - ((x - m) @ v) @ u.T, mode=mode)
    out, plan, c = torch.empty_like(xs[0]), triton_project.tile_for(xs[0], u), m.float() @ v.float()
    ours = microseconds(lambda i: triton_project.launch(xs[i], u, v, c, None, out, None, plan), len(xs))
    theirs = microseconds(lambda i: plain(xs[i]), len(xs))
    ratio = theirs.median / ours.median
    return judged(row(name, [N, d, r], torch.bfloat16, theirs, peer=name, ratio=ratio), ratio, 1.2)


def activity(name: str, mode: str) -> Row:
    """The four sums compiled, over ours."""
    zs, mask = rotated(lambda: normal(N, NEURONS), 3), torch.ones(N, dtype=torch.bool, device=gpu_limits.DEVICE)
    plain = torch.compile(plain_sums, mode=mode)
    ours = microseconds(lambda i: triton_activity.activity(zs[i], mask), len(zs))
    theirs = microseconds(lambda i: plain(zs[i], mask), len(zs))
    ratio = theirs.median / ours.median
    return judged(row(name, [N, NEURONS], torch.bfloat16, theirs, peer=name, ratio=ratio), ratio, 1.0)
