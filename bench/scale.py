"""Statistics of SmolLM2 collected by two processes against one: how far they agree, and how long each took.

`python -m bench.scale` runs `repedit collect` alone and under `torchrun --nproc-per-node 2`, one thread a process, over
the same text, and compares what both wrote: sums relative to 1e-12, covariances to 1e-11.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.record import record
from repedit.activations.collection import Collection
from repedit.stats import Activity

PARTS = {
    "activity with gradients": (("--sites", "*.mlp.neurons", "--gradients"), 1e-12),
    "moments": (("--sites", "10.mlp.out,20.mlp.out", "--statistic", "moments"), 1e-11),
}
TOKENS = 6000


def seconds(command: list[str], folder: Path) -> float:
    """Wall time of a run with one thread a process."""
    start = time.time()
    subprocess.run(
        command,
        check=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    return time.time() - start


def distance(one: Path, two: Path) -> float:
    """The largest relative error over all sites and sums."""
    first, second = Collection.load(one), Collection.load(two)
    if (first.seen, first.counted, list(first)) != (second.seen, second.counted, list(second)):
        raise SystemExit("the processes together read other tokens or sites than the one")
    return max(
        float((a - b).norm() / b.norm().clamp(min=1e-300))
        for site in first
        for a, b in zip(_sums(second[site]), _sums(first[site]), strict=True)
    )


def _sums(found: Any) -> list[torch.Tensor]:
    if isinstance(found, Activity):
        return [found.mean, found.abs, found.count, found.variance]
    return [found.mean, found.covariance]


def main() -> None:
    """Measure, print, record."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name, (given, bar) in PARTS.items():
            collect = ["repedit", "collect", "smollm2-135m", "--text", "code", "--limit-tokens", str(TOKENS), *given]
            one = seconds([sys.executable, "-m", *collect, "--out", "one.safetensors"], place)
            two = seconds(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--nproc-per-node",
                    "2",
                    "-m",
                    *collect,
                    "--out",
                    "two.safetensors",
                ],
                place,
            )
            error = distance(place / "one.safetensors", place / "two.safetensors")
            rows.append(
                {
                    "name": name,
                    "error": error,
                    "bar": bar,
                    "status": "pass" if error <= bar else "fail",
                    "seconds": {"one process": one, "two": two},
                }
            )
            print(json.dumps(rows[-1]), flush=True)
            for path in place.iterdir():
                path.unlink()
    print(record("scale", rows, note="seconds include starting the processes and loading the model in each"))


if __name__ == "__main__":
    main()
