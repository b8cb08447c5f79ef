"""One part of `python -m bench`, in a process of its own: what others cost over what ours costs, on the same input.

Run as `python -m bench.peers PART --out rows.json [--full]`. Every row says what is ours, who the other is and what was
counted; above 1 ours costs less. A peer that is not installed is a row that says how to install it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

import repedit as rp
from bench import cpu, fit, hooks, streaming
from bench.checkpoints import LLAMA_3B, llama
from bench.timing import Ratio, paired
from repedit.fit import top_eigenvectors
from repedit.stats import Moments

STATUS = {"pass": "pass", "fail": "missed", "not resolved": "not resolved"}
THEOREMS = ("tests/test_leace.py", "tests/test_leace_theorems.py")
ROUNDS = 7


def row(ours: str, peer: str, what: str, found: Ratio, least: float | None, **context: Any) -> dict[str, Any]:
    """A ratio of the other's cost to ours, and whether it reaches the bar."""
    status = "recorded" if least is None else STATUS[found.verdict(lambda ratio: ratio >= least)]
    return {"ours": ours, "peer": peer, "what": what, **asdict(found), "bar": least, "status": status, **context}


def taken(ours: str, peer: str, what: str, found: dict[str, Any]) -> dict[str, Any]:
    """A row of another module, whose ratio is theirs over ours already."""
    rest = {key: value for key, value in found.items() if key not in ("name", "bar", "status")}
    bar = float(found["bar"].removeprefix(">= ")) if "bar" in found else None
    return {"ours": ours, "peer": peer, "what": what, "bar": bar, **rest} | {
        "status": STATUS.get(found["status"], found["status"])
    }


def importance(full: bool) -> list[dict[str, Any]]:
    """Sums of activations: on one layer's tensor, and in the forward pass of the default model."""
    z = torch.randn(1024, 1536, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1024, dtype=torch.bool)
    mask[::128] = False
    sums = "sums of 1024 x 1536 activations"
    inside, whole = hooks.against_hooks(rp.load("smollm2-135m"), pairs=15 if full else ROUNDS)
    return [
        taken("activity kernel", "taker 1.2.3", f"CPU, {sums}", cpu.against_taker(z, mask)),
        taken("activity kernel", "four torch reductions", f"CPU, {sums}", cpu.against_reductions(z, mask)),
        taken("rp.collect", "hand-written hooks", "CPU inside the hooks of a forward pass", inside),
        taken("rp.collect", "hand-written hooks", "CPU of the whole forward pass", whole),
    ]


def projection(full: bool) -> list[dict[str, Any]]:
    """Taking 16 directions out of rows or weights of width 576."""
    modes = ("default", "max-autotune") if full else ("default",)
    rows = []
    for n in (1024, 8192):
        for found in cpu.projections(n, modes=modes):
            name = found["name"].removesuffix(" / ours")
            compiled, _, form = name.rpartition(", x - ")
            peer = "concept-erasure 0.2.4" if name.startswith("Leace") else compiled or "torch eager"
            what = f"x - {form}" if compiled else "its call" if peer.startswith("concept") else name
            ours = "LowRank" if peer.startswith("concept") else "projection kernel"
            rows.append(taken(ours, peer, f"CPU, {what}, {n} rows", found))
    return rows


def erasure(full: bool) -> list[dict[str, Any]]:
    """LEACE and what it is fitted from, in a stream; on a real covariance and on a synthetic one of width 2048."""
    subject, peer = rp.load("smollm2-135m"), "concept-erasure 0.2.4"
    rows = [each for width in (576, 1536) for each in streams(width, peer)]
    sites = ["15.mlp.out", *(["15.mlp.neurons"] if full else [])]
    found = rp.collect(subject, rp.data.prose(), sites, statistic=Moments, limit_tokens=6000, progress=False)
    matrices = {f"covariance of {site}": value.second for site, value in found.items()}
    q = torch.linalg.qr(torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    matrices["eigenvalues i^-1.4"] = (q * torch.arange(1, 2049).double() ** -1.4) @ q.T
    for name, c in matrices.items():
        fitter, where = fit.filled(c), f"width {len(c)}, {name}"
        if fitter is None:
            rows.append(_absent("rp.fit.leace", peer, f"CPU, fit, {where}"))
            continue
        xx, xz = fit.sums_of(fitter)
        ratio = paired(lambda: rp.fit.leace(xx, xz), fit.uncached(fitter), pairs=ROUNDS)  # noqa: B023
        rows.append(row("rp.fit.leace", peer, f"CPU, fit, {where}", ratio, 1.0))
        ratio = paired(lambda: top_eigenvectors(c, fit.K), fit.uncached(fitter), pairs=ROUNDS)  # noqa: B023
        rows.append(row("top 16 eigenvectors", peer, f"CPU, fit, {where}", ratio, 4.0 if len(c) == 2048 else None))
    return rows


def streams(width: int, peer: str) -> list[dict[str, Any]]:
    """An update of Moments, alone and with CrossMoments, against one that does both."""
    what = f"CPU, an update with 896 rows of width {width}"
    found = fit.updates(width)
    if found is None:
        return [_absent("Moments", peer, what)]
    alone, both, theirs = found
    return [
        row("Moments", peer, what, paired(alone, theirs, pairs=ROUNDS), 1.0),
        row("Moments and CrossMoments", peer, what, paired(both, theirs, pairs=ROUNDS), 1.0),
    ]


def _absent(ours: str, peer: str, what: str) -> dict[str, Any]:
    return {
        "ours": ours,
        "peer": peer,
        "what": what,
        "bar": None,
        "status": "skipped: pip install concept-erasure==0.2.4",
    }


def theorems(full: bool) -> list[dict[str, Any]]:
    """The tests of our eraser against what the paper proves, and against the published one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *THEOREMS]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    if done.returncode or counts.get("skipped"):
        status = "missed" if done.returncode else "skipped: pip install concept-erasure==0.2.4"
    else:
        status = "pass" if counts.get("passed") else "missed"
    context = {"ours": "rp.fit.leace", "peer": "theorems of LEACE", "bar": None, "status": status}
    return [context | {"what": f"tests on our eraser: {last}", "tests": list(THEOREMS)}]


def export(full: bool) -> list[dict[str, Any]]:
    """An edited checkpoint on the disk: CPU against `cp`; CPU and memory against loading, editing and saving."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _exported("SmolLM2", *streaming.smollm2_edit(folder), ROUNDS)
        if full:
            source = llama(folder / "source", **LLAMA_3B, shard_bytes=500_000_000)
            rows += _exported("3.6 GB", source, streaming.projection_edit(folder, LLAMA_3B), 3)
    return rows


def _exported(name: str, source: Path, edit: Path, rounds: int) -> list[dict[str, Any]]:
    modes = ("cp", "cp with hashes", "stream", "save_pretrained")
    streaming.run("cp", source, edit)  # from here on the files are in the page cache
    rng = random.Random(0)
    orders = [rng.sample(modes, len(modes)) for _ in range(rounds)]
    found = [{mode: streaming.run(mode, source, edit) for mode in order} for order in orders]
    limit = streaming.memory_limit(source)
    ours = "rp.export"

    def over(key: str, peer: str) -> Ratio:
        values = [each["stream"][key] for each in found]
        theirs = [limit if peer == "limit" else each[peer][key] for each in found]
        q20, median, q80 = np.quantile([b / a for a, b in zip(values, theirs, strict=True)], [0.2, 0.5, 0.8])
        # One run after another, so what a run is to the one before it is the control.
        again = np.quantile([b / a for a, b in pairwise(values)], [0.2, 0.8])
        return Ratio(float(median), float(q20), float(q80), rounds, (float(again[0]), float(again[1])))

    def medians(mode: str) -> dict[str, float]:
        return {key: statistics.median(each[mode][key] for each in found) for key in ("peak_mb", "cpu_s", "wall_s")}

    mine, hand = {"ours_measured": medians("stream")}, {"theirs_measured": medians("save_pretrained")}
    copied, hashed = ({"theirs_measured": medians(mode)} for mode in ("cp", "cp with hashes"))
    return [
        row(ours, "cp", f"CPU, {name}; at most 2.5 times cp", over("cpu_s", "cp"), 0.4, **mine, **copied),
        row(
            ours,
            "cp with hashes",
            f"CPU, {name}; at most 2.5 times it",
            over("cpu_s", "cp with hashes"),
            0.4,
            **mine,
            **hashed,
        ),
        row(
            ours,
            "cp with hashes",
            f"wall time, {name}; at most twice it",
            over("wall_s", "cp with hashes"),
            0.5,
            **mine,
            **hashed,
        ),
        row(
            ours,
            "save_pretrained",
            f"CPU, {name}; at most .8 of it",
            over("cpu_s", "save_pretrained"),
            1.25,
            **mine,
            **hand,
        ),
        row(ours, "save_pretrained", f"peak memory, {name}", over("peak_mb", "save_pretrained"), 1.0, **mine, **hand),
        row(ours, "4 x largest tensor + 64 MB", f"peak memory, {name}", over("peak_mb", "limit"), 1.0, **mine),
    ]


PARTS: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "importance": importance,
    "projection": projection,
    "erasure": erasure,
    "theorems": theorems,
    "export": export,
}


def main() -> None:
    """Measure one part."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.write_text(json.dumps(PARTS[options.part](options.full)))


if __name__ == "__main__":
    main()
