"""Where the capitals enter SmolLM2-135M, and what relearning brings back while that stays ablated.

`python -m bench.locate --seed N` replaces the MLP outputs of some layers at the name of the country (all its tokens, and its
last token alone) by their mean over countries, asks all capitals, retrains a copy on half of them with the ablation held
(40 steps at 1e-4, three wordings), and asks both halves. The seed is that of the halves and of the order of the rows.
`--table` prints what is measured.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import repedit as rp
from bench.mrp import seen
from bench.record import RESULTS, record
from repedit.metrics.relearning import Relearning

RANGES = "0-11,2-11"
POSITIONS = {"subject": "all tokens of the name", "subject_last": "last token of the name"}
COLUMNS = ("facts", "T after relearning", "V after relearning")


def main() -> None:
    """Measure one seed, or print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", default=RANGES, help="Ranges of layers, each ablated as a whole.")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        measure(options.seed, options.layers)
    print(table())


def measure(seed: int, layers: str) -> None:
    """Write bench/results/locate-SEED.json."""
    start, lm = time.process_time(), rp.load("smollm2-135m")
    found = rp.locate(
        lm, seen(rp.data.facts("capitals").forget), layers=layers, points=("mlp.out",), positions=tuple(POSITIONS),
        relearning=Relearning(split=seed, seed=seed),
    )  # fmt: skip
    plain = {"layers": "none", "point": "mlp.out", "position": "none", "accuracy": dict(found.before)}
    rows = [plain, *json.loads(found.to_json())["rows"]]
    record(
        f"locate-{seed}", rows, module="locate", counts=dict(found.counts), model=found.model, seed=seed,
        core_minutes=(time.process_time() - start) / 60,
    )  # fmt: skip


def table() -> str:
    """A Markdown table of every seed that was measured."""
    lines = [
        "| MLP outputs ablated | where | seed | capitals | T after relearning | V after relearning |",
        "|---|---|---|---|---|---|",
    ]
    measured = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("locate-*.json"))]
    ablations = dict.fromkeys((row["layers"], row["position"]) for content in measured for row in content["rows"])
    for layers, position in ablations:
        for content in measured:
            for row in content["rows"]:
                if (row["layers"], row["position"]) == (layers, position):
                    cells = [f"{row['accuracy'][name]:.2f}" for name in COLUMNS]
                    what = "none" if layers == "none" else f"layers {layers}"
                    where = POSITIONS.get(position, "-")
                    lines.append(f"| {what} | {where} | {content['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
