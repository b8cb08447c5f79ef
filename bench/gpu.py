"""The kernels on a CUDA card, against what the card can do and against their peers, in one call under eight minutes.

Run as `python bench/gpu.py --out bench/results/`. Nothing is downloaded, and clocks and power limits are left alone. The
results file is rewritten after every section, so a call cut short loses nothing. The tests of the kernels run on the
card with `python -m pytest tests/kernels`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))
SEED = 0


class Results:
    """Rows so far, written after every section."""

    def __init__(self, folder: Path, card: dict[str, Any]) -> None:
        name = card["name"].lower().replace(" ", "-")
        self.path = folder / f"gpu-{name}-{date.today().isoformat()}.json"
        commit = ["git", "rev-parse", "--short", "HEAD"]
        self.content: dict[str, Any] = {
            "bench": "gpu",
            "command": "python bench/gpu.py " + " ".join(sys.argv[1:]),
            "commit": subprocess.run(commit, capture_output=True, text=True, cwd=ROOT).stdout.strip(),
            "date": date.today().isoformat(),
            "seed": SEED,
            "device": card,
            "host": {"cpu": platform.processor(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)},
            "versions": {name: installed(name) for name in ("torch", "triton", "numpy", "concept-erasure")},
            "limits": {},
            "seconds": {},
            "rows": [],
        }

    def section(self, name: str, rows: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Add the rows of one section; a failure is a row, and the sections after it still run."""
        start = time.monotonic()
        try:
            for found in rows():
                self.content["rows"].append({"section": name, **found})
                print(line(found), flush=True)
        except Exception as error:
            self.content["rows"].append({"section": name, "name": name, "status": f"fail: {error!r}"[:500]})
            print(f"{name}: {error!r}", flush=True)
        self.content["seconds"][name] = round(time.monotonic() - start, 1)
        self.write()

    def write(self) -> None:
        """The file as it is now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")


def installed(package: str) -> str | None:
    """Its version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def line(found: dict[str, Any]) -> str:
    """One row of the table: shape, us, GB/s, fraction of the limit, ratio to the peer, bar, verdict."""
    number = lambda key, form: format(found[key], form) if key in found else ""  # noqa: E731
    shape = "x".join(map(str, found.get("shape", [])))
    return (
        f"{found['name'][:38]:38} {shape:16} {found.get('dtype', ''):9} {number('median', '.1f'):>9} "
        f"{number('gb_s', '.0f'):>6} {number('fraction', '.2f'):>5} {number('ratio', '.2f'):>6} "
        f"{number('error', '.1e'):>8} {found.get('bar', '')[:10]:10} {found['status']}"
    )


def compile_all(shapes: list[tuple[int, int, str]], seconds: float) -> None:
    """Compile in worker processes, into the cache that this process reads."""
    from bench.gpu_rows import warm

    pool = ProcessPoolExecutor(min(8, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn"))
    jobs = [pool.submit(warm, shape) for shape in shapes]
    end = time.monotonic() + seconds
    for job, shape in zip(jobs, shapes, strict=True):
        try:
            job.result(max(1.0, end - time.monotonic()))
        except Exception as error:
            print(f"compiling {shape}: {error!r}", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)


def measure(results: Results, deadline: float) -> None:
    """Every section in order, the slowest last."""
    from bench import gpu_compiled, gpu_limits, gpu_rows

    results.content["limits"] = found = gpu_limits.limits()
    results.write()
    print({name: round(value, 1) for name, value in found.items()}, flush=True)
    shapes = [(d, r, str(dtype)[6:]) for d, r, dtype in gpu_rows.SHAPES] + [(0, 0, "bfloat16")]
    compile_all(shapes, min(120.0, deadline - time.monotonic() - 60))
    results.section("correctness", gpu_rows.correctness)
    results.section("activity", lambda: gpu_rows.sums(found["read_gb_s"]))
    results.section("project", lambda: gpu_rows.projection(found["copy_gb_s"]))
    results.section("weights", gpu_rows.weights)
    results.section("tilings", lambda: gpu_rows.tilings(found["copy_gb_s"]))
    results.section("torch.compile", lambda: gpu_compiled.compiled(deadline))


def main() -> None:
    """Measure, print one table, write one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="Folder of the results file.")
    parser.add_argument("--seconds", type=float, default=440.0, help="Time for everything, compilation included.")
    parser.add_argument("--draw", type=Path, help="Draw the figure of a results file instead of measuring.")
    chosen = parser.parse_args()
    if chosen.draw:
        from bench.gpu_figure import draw

        print(draw(chosen.draw))
        return
    import torch

    if not torch.cuda.is_available():
        sys.stderr.write(
            "no GPU: torch sees no CUDA device; python -m bench.kernels compiles the kernels without one\n"
        )
        sys.exit(2)
    from bench.gpu_limits import device

    torch.manual_seed(SEED)
    deadline = time.monotonic() + chosen.seconds
    results = Results(chosen.out, device())
    measure(results, deadline)
    print(results.path)


if __name__ == "__main__":
    main()
