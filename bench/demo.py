"""What `repedit demo` says, as a file: both acts with their defaults, and the minutes they take.

Run as `python -m bench.demo`; about five minutes. Nothing but the results file is kept.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import repedit as rp
from bench.record import record
from repedit.cli import output
from repedit.cli.run import forgotten_json
from repedit.demo import forget_capitals, prune_code
from repedit.models.default_model import cached

SEED = 0


def pruning(folder: Path) -> list[dict[str, Any]]:
    """The first act: one row a text, with what pruning as many random neurons does."""
    start = time.time()
    found = prune_code("smollm2-135m", folder / "edited", seed=SEED)
    seconds, plain = time.time() - start, output.comparison_json(found.comparison)
    rows = [
        {"name": f"pruned, {text}", **numbers, "random_drop_percent": found.control[text].drop}
        for text, numbers in plain["corpora"].items()
    ]
    pruned = sum(map_.rank_removed for map_ in found.edit.maps.values())
    return [*rows, {"name": "pruned", "neurons": pruned, "seconds": seconds, "generations": plain["generations"]}]


def projection(folder: Path) -> list[dict[str, Any]]:
    """The second act: one row a domain of facts."""
    start = time.time()
    found = forget_capitals("smollm2-135m", folder / "capitals", seed=SEED)
    seconds, plain = time.time() - start, forgotten_json(found)
    rows = [{"name": f"projected, {domain}", **numbers} for domain, numbers in plain["facts"].items()]
    rest = {"certificate": plain["certificate"], "seconds": seconds, "generations": plain["generations"]}
    return [*rows, {"name": "projected", **rest}]


def main() -> None:
    """Run both acts, record."""
    cached()
    with tempfile.TemporaryDirectory() as name:
        rows = [*pruning(Path(name)), *projection(Path(name))]
    for row in rows:
        print(row)
    print(record("demo", rows, seed=SEED, model=rp.load("smollm2-135m").fingerprint()))


if __name__ == "__main__":
    main()
