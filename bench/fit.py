"""What fitting in closed form costs: solvers on real SmolLM2 covariances, streaming moments, their share of a forward.

Run as `python -m bench.fit` with OMP_NUM_THREADS=1. Times are CPU of one thread, as ratios in one process. The peer,
concept-erasure 0.2.4, is compared where it is installed (the dev extra has it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import repedit as rp
from bench.corpora import chunks, splits
from bench.record import record
from bench.timing import cpu, paired
from repedit.data.corpus import tokens
from repedit.fit import principal_angles, top_eigenvectors
from repedit.stats import CrossMoments, Moments

K = 16
LAYER = 15
CHUNKS = 48
"""Of 128 tokens: 6,000 rows, four times the widest site."""


def covariances(subject: rp.Subject) -> dict[str, torch.Tensor]:
    """Second moments at an MLP's output (576) and neurons (1536) on WikiText-2, and a synthetic decay at 2048."""
    text = chunks(splits()["prose"][0], CHUNKS, seed=0)
    sites = [f"{LAYER}.mlp.out", f"{LAYER}.mlp.neurons"]
    found = rp.collect(subject, text, sites, statistic=Moments, progress=False)
    real = {f"SmolLM2 {site}": value.second for site, value in found.items()}
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(2048, 2048, generator=generator, dtype=torch.float64)).Q
    return real | {"synthetic i^-1.4": (q * torch.arange(1, 2049).double() ** -1.4) @ q.T}


def solvers(name: str, c: torch.Tensor, pairs: int) -> list[dict[str, Any]]:
    """Time of what `top_eigenvectors` chooses over a full eigh and over the peer's eraser, and its error."""
    width = c.shape[0]
    context = {"matrix": name, "width": width, "k": K}
    full: list[torch.Tensor] = []
    exact = lambda: full.append(torch.linalg.eigh(c)[1])  # noqa: E731
    rows = []
    ratio = paired(exact, lambda: top_eigenvectors(c, K), pairs=pairs)
    error = subspace_error(top_eigenvectors(c, K)[1], full[-1].flip(1)[:, :K])
    bar = 0.15 if width == 2048 else None
    rows.append(_row(f"top-{K} / eigh", ratio, bar, **context, subspace_error=error))
    if peer := filled(c):
        ratio = paired(uncached(peer), lambda: top_eigenvectors(c, K), pairs=pairs)
        rows.append(_row(f"top-{K} / LeaceFitter.eraser", ratio, 0.25 if width == 2048 else None, **context))
        xx, xz = sums_of(peer)
        ratio = paired(uncached(peer), lambda: rp.fit.leace(xx, xz), pairs=pairs)
        rows.append(_row("leace / LeaceFitter.eraser", ratio, None, **context))
    else:
        rows.append({"name": "LeaceFitter.eraser", "status": "skipped: pip install concept-erasure==0.2.4"})
    return rows


def subspace_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||(I - A A^T) B||: the sine of the largest principal angle, without the cancellation of 1 - cos^2."""
    assert float(principal_angles(a, b).min()) > 0.5
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2))


def streaming(width: int) -> list[dict[str, Any]]:
    """Time of one update with 1024 float32 rows, 128 of them masked out, over the peer's with the same rows."""
    found, context = updates(width), {"width": width, "rows": 896}
    if found is None:
        return [{"name": "LeaceFitter.update", "status": "skipped: pip install concept-erasure==0.2.4", **context}]
    ours, both, theirs = found
    return [
        _row("Moments.update / LeaceFitter.update", paired(theirs, ours), 1.0, **context),
        _row("Moments and CrossMoments / LeaceFitter.update", paired(theirs, both), None, **context),
    ]


def updates(width: int) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]] | None:
    """One update with the same rows: of Moments, of Moments and CrossMoments, and of the peer; None without it."""
    x = torch.randn(8, 128, width, generator=torch.Generator().manual_seed(0)) + 0.5
    z = torch.nn.functional.one_hot(torch.arange(1024) % 8, 8).reshape(8, 128, 8).float()
    mask = torch.ones(8, 128, dtype=torch.bool)
    mask[:, ::8] = False
    peer = fitter(width, 8, dtype=torch.float32)
    if peer is None:
        return None
    xx, xz, alone = Moments(width).update(x), CrossMoments(width, 8).update(x, z), Moments(width).update(x)
    return (
        lambda: alone.update(x, mask),
        lambda: (xx.update(x, mask), xz.update(x, z, mask)),
        lambda: peer.update(x[mask], z[mask]),
    )


def share_in_hooks(subject: rp.Subject, selector: str, repeats: int = 5) -> dict[str, Any]:
    """CPU spent in the hooks over CPU of the rest of the same forward, 8 x 128 tokens."""
    batch = {"input_ids": torch.randint(3, 40_000, (8, 128), generator=torch.Generator().manual_seed(0))}
    found: list[Any] = []

    def once() -> None:
        found.append(rp.collect(subject, tokens([batch]), selector, statistic=Moments, progress=False))

    shares = []
    for _ in range(repeats + 1):
        total = cpu(once)
        shares.append(found[-1].seconds_in_hooks / (total - found[-1].seconds_in_hooks))
    q20, median, q80 = (float(q) for q in np.quantile(shares[1:], [0.2, 0.5, 0.8]))
    status = "not resolved" if q20 <= 0.10 < q80 else ("pass" if q80 <= 0.10 else "fail")
    row = {"median": median, "q20": q20, "q80": q80, "n": repeats, "bar": "<= 0.1", "status": status}
    return {"name": "Moments, share of the forward in hooks", "sites": selector, **row}


def _row(name: str, ratio: Any, bar: float | None, **context: Any) -> dict[str, Any]:
    if bar is None:
        return ratio.row(name, "none", lambda _: True, **context) | {"status": "recorded"}
    return ratio.row(name, f"<= {bar}", lambda value: value <= bar, **context)


def fitter(width: int, labels: int, dtype: torch.dtype = torch.float64) -> Any:
    try:
        from concept_erasure import LeaceFitter
    except ImportError:
        return None
    return LeaceFitter(width, labels, dtype=dtype, constrain_cov_trace=False)


def filled(c: torch.Tensor) -> Any:
    """The peer's fitter as if it had seen 100,000 rows of this covariance and K labels; None where it is absent."""
    peer = fitter(len(c), K)
    if peer is not None:
        peer.sigma_xx_, peer.n = c * 1e5, torch.tensor(100_000)
        labels = torch.randn(len(c), K, generator=torch.Generator().manual_seed(1)).double()
        peer.sigma_xz_ = 1e5 * c @ labels
    return peer


def uncached(peer: Any) -> Callable[[], object]:
    """The peer's fit from its statistics, without what it remembers of the last one."""
    return lambda: type(peer).eraser.fget.__wrapped__(peer)


def sums_of(peer: Any) -> tuple[Moments, CrossMoments]:
    """The peer's sums as ours."""
    xx, xz = Moments(peer.x_dim), CrossMoments(peer.x_dim, peer.z_dim)
    xx.count = xz.count = int(peer.n)
    xx._square, xz._product = peer.sigma_xx_, peer.sigma_xz_
    return xx, xz


def main() -> None:
    """Measure, print, record."""
    torch.set_num_threads(1)
    subject = rp.load("smollm2-135m")
    rows = [share_in_hooks(subject, selector) for selector in ("*.resid.post", "*.mlp.out")]
    matrices = covariances(subject)
    rows += [row for width in (576, 1536) for row in streaming(width)]
    rows += [row for name, c in matrices.items() for row in solvers(name, c, 5 if c.shape[0] == 1536 else 7)]
    for row in rows:
        print(row)
    print(record("fit", rows, seed=0, model=subject.fingerprint()))


if __name__ == "__main__":
    main()
