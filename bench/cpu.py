"""What the inner loops cost on a CPU: share of the forward, memory, and time against others on the same tensors.

Run as `python -m bench.cpu` for the collection of activity, with `--part project` for projections. The peer is compared where it is installed:
`INSTALL` says how.
"""

from __future__ import annotations

import argparse
import ast
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import repedit as rp
from bench.record import record
from bench.timing import cpu, paired
from repedit.data.corpus import tokens
from repedit.kernels import reference

PEERS = Path(__file__).parents[1] / ".cache" / "peers"
INSTALL = "pip install --no-deps --target .cache/peers taker==1.2.3 welford-torch==0.2.5"


def share_in_hooks(subject: rp.Subject, repeats: int = 5) -> dict[str, Any]:
    """CPU spent in the hooks over CPU of the rest of the same forward, MLP neurons, 8 x 128 tokens."""
    batch = {"input_ids": torch.randint(3, 40_000, (8, 128), generator=torch.Generator().manual_seed(0))}
    shares = []
    for number in range(repeats + 1):
        found: list[Any] = []
        total = cpu(lambda: found.append(rp.collect(subject, tokens([batch], f"r{number}"), progress=False)))  # noqa: B023
        shares.append(found[0].seconds_in_hooks / (total - found[0].seconds_in_hooks))
    q20, median, q80 = np.quantile(shares[1:], [0.2, 0.5, 0.8])
    status = "not resolved" if q20 <= 0.06 < q80 else ("pass" if q80 <= 0.06 else "fail")
    return {
        "name": "share of the forward in hooks",
        "median": median,
        "q20": q20,
        "q80": q80,
        "n": repeats,
        "bar": "<= 0.06",
        "status": status,
    }


def memory(subject: rp.Subject) -> dict[str, Any]:
    """Growth of resident memory between 4,096 and 16,384 collected tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 40_000, (8, 128), generator=generator)} for _ in range(16)]
    rp.collect(subject, tokens(batches[:4], "warm"), progress=False)
    before = resident()
    rp.collect(subject, tokens(batches, "all"), progress=False)
    growth = (resident() - before) / 1e6
    return {
        "name": "resident growth, 4k to 16k tokens",
        "megabytes": growth,
        "bar": "< 20 MB",
        "status": "pass" if growth < 20 else "fail",
    }


def against_reductions(z: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """Four plain float32 reductions over the counted rows."""

    def plain() -> None:
        rows = z[mask]
        rows.sum(0), rows.abs().sum(0), rows.square().sum(0), (rows > 0).sum(0)

    ratio = paired(lambda: reference.activity(z, mask), plain)
    return ratio.row("four plain reductions / ours", ">= 2.8", lambda r: r >= 2.8)


def against_taker(z: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    """The published collector, on the same activations; its class is read from the installed package."""
    source = PEERS / "taker" / "data_classes.py"
    if not source.exists():
        return {"name": "taker 1.2.3 / ours", "status": f"skipped: {INSTALL}"}
    sys.path.insert(0, str(PEERS))
    from welford_torch import Welford

    tree = ast.parse(source.read_text())
    wanted = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("ActivationCollector", "ActivationSummary")
    ]
    scope: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "Tuple": tuple, "Welford": Welford}
    # The whole module imports packages that its collector does not use and that current transformers no longer has.
    exec(compile(ast.Module([n for n in wanted if n.name == "ActivationCollector"], []), str(source), "exec"), scope)

    def peer() -> None:
        collector = scope["ActivationCollector"]((z.shape[1],), "cpu")
        collector.add_all(z[mask])

    ratio = paired(lambda: reference.activity(z, mask), peer)
    return ratio.row("taker 1.2.3 / ours", ">= 10", lambda r: r >= 10)


def projections(n: int, d: int = 576, k: int = 16, modes: tuple[str, ...] = ("default",)) -> list[dict[str, Any]]:
    """The blocked projection and weight rewrites against the plain expressions, torch.compile and concept-erasure."""
    x, m = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(n, d), (d,)]))
    u, v = (torch.linalg.qr(torch.randn(d, k, generator=torch.Generator().manual_seed(s)))[0] for s in (2, 3))
    w, y = x.T.contiguous(), x.clone()
    plain = lambda x: x - ((x - m) @ v) @ u.T  # noqa: E731
    centred = lambda: reference.project(x, u, v, m)  # noqa: E731
    # In place it is an orthogonal projection: repeated a thousand times, an oblique one overflows.
    forms: dict[str, tuple[Callable[[], object], Callable[[], object]] | str] = {
        "x - (x @ v) @ u.T": (lambda: reference.project(x, u, v), lambda: x - (x @ v) @ u.T),
        "x - ((x - m) @ v) @ u.T": (centred, lambda: plain(x)),
        "w - u @ (v.T @ w)": (lambda: reference.left(w, u, v), lambda: w - u @ (v.T @ w)),
        "w - (w @ u) @ u.T, in place": (lambda: reference.right(y, u, u, out=y), lambda: y.sub_((y @ u) @ u.T)),
    }
    compiler = shutil.which("g++") or shutil.which("clang++")
    for mode in modes:
        name = "torch.compile" + (f" {mode}" if mode != "default" else "") + ", x - ((x - m) @ v) @ u.T"
        forms[name] = (centred, _compiled(plain, mode, x)) if compiler else "skipped: install a C++ compiler, g++ say"
    try:
        from concept_erasure import LeaceEraser
    except ImportError:
        forms["LeaceEraser.__call__"] = "skipped: pip install concept-erasure==0.2.4"
    else:
        map_, eraser = rp.LowRank(u, v, m), LeaceEraser(u, v.T, m)
        forms["LeaceEraser.__call__"] = (lambda: map_(x), lambda: eraser(x))
    context = {"shape": [n, d, k], "dtype": "float32"}
    # A call of 1024 rows takes about a millisecond.
    many = lambda run: lambda: [run() for _ in range(max(4, 20 * 1024 // n))]  # noqa: E731
    rows = []
    with torch.no_grad():
        for name, form in forms.items():
            if isinstance(form, str):
                rows.append({"name": f"{name} / ours", "status": form, **context})
                continue
            torch.testing.assert_close(form[0](), form[1](), rtol=1e-4, atol=1e-4)
            found = paired(*map(many, form), pairs=15)
            rows.append(found.row(f"{name} / ours", ">= 1.0", lambda r: r >= 1.0, **context))
    return rows


def _compiled(plain: Callable[[torch.Tensor], torch.Tensor], mode: str, x: torch.Tensor) -> Callable[[], object]:
    torch._dynamo.reset()  # else the second number of rows would be compiled for any number of rows
    compiled = torch.compile(plain, mode=mode)
    compiled(x)
    return lambda: compiled(x)


def resident() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def activity() -> None:
    """Measure the collection of activity, print, record."""
    subject = rp.load("smollm2-135m")
    z = torch.randn(1024, 1536, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1024, dtype=torch.bool)
    mask[::128] = False
    rows = [share_in_hooks(subject), memory(subject), against_reductions(z, mask), against_taker(z, mask)]
    show(rows)
    print(record("cpu", rows, seed=0, model=subject.fingerprint()))


def project() -> None:
    """Measure projections, print, record."""
    rows = [row for n in (1024, 8192) for row in projections(n)]
    show(rows)
    print(record("cpu-project", rows, module="cpu", seed=0))


def show(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    for row in rows:
        print(row)


def main() -> None:
    """Run one part."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("activity", "project"), default="activity")
    {"activity": activity, "project": project}[parser.parse_args().part]()


if __name__ == "__main__":
    main()
