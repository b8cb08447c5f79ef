"""Join what `python -m bench.mrp` wrote into the tables and figures of the README. Run as `python -m bench.mrp_report`.

Where the projection that `python -m bench.mrp --part one --seed 0` saves is there, what its fold leaves in the weights is
measured as well.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import repedit as rp
from bench.mrp import TASKS, UNTOUCHED
from bench.record import RESULTS, record
from repedit import plot

FIGURES = RESULTS.parents[1] / "figures"
EDIT = Path(".cache/bench-mrp/capitals-0.safetensors")


def rows(part: str) -> list[dict[str, Any]]:
    """The rows of one part, over all seeds that were run."""
    return [row for path in sorted(RESULTS.glob(f"mrp-{part}-*.json")) for row in json.loads(path.read_text())["rows"]]


def shown(values: Iterable[float], digits: int = 2) -> str:
    """Mean ± standard deviation over seeds; the value alone where there is one seed."""
    found = list(values)
    text = f"{mean(found):.{digits}f}"
    return text if len(found) == 1 else f"{text} ± {stdev(found):.{digits}f}"


def one() -> None:
    """Capitals, and what else is kept."""
    table = defaultdict(list)
    for row in [*rows("one"), *rows("published")]:
        table[row["name"]].append(row)
    base = table["original"][0]
    print(
        "| model | seeds | capitals | seat of government | unseen, mean | lowest share kept | mean share kept | perplexity ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, found in table.items():
        kept = [{d: r["retain"][d] / base["retain"][d] for d in base["retain"] if d != "perplexity"} for r in found]
        worst = [min(k, key=lambda d, k=k: k[d]) for k in kept]
        ratio = [r["retain"]["perplexity"] / base["retain"]["perplexity"] for r in found]
        cells = [
            shown(r["forget"]["phrasing 0"] for r in found), shown(r["forget"]["phrasing 4"] for r in found),
            shown(r["forget"]["unseen"] for r in found), shown(k[w] for k, w in zip(kept, worst, strict=True)) + f" ({', '.join(sorted(set(worst)))})",
            shown(mean(k.values()) for k in kept), shown(ratio, 3),
        ]  # fmt: skip
        print(f"| {name} | {len(found)} | {' | '.join(cells)} |")


def tasks() -> None:
    """Four tasks in turn, as a table and a figure; the first seed that was run."""
    found = [row for row in rows("tasks") if row["seed"] == rows("tasks")[0]["seed"]]
    base = next(row for row in rows("one") if row["name"] == "original")
    columns, names = list(TASKS), [row["name"].removeprefix("after ") for row in found]
    first = [base["forget"]["phrasing 0"] if t == "capitals" else base["retain"][t] for t in columns]
    matrix = [first + [base["retain"][d] for d in UNTOUCHED]]
    for row in found:
        line = [row["forgotten"][t]["phrasing 0"] if t in row["forgotten"] else row["retain"][t] for t in columns]
        matrix.append(line + [row["retain"][d] for d in UNTOUCHED])
        unseen = {t: round(v["unseen"], 2) for t, v in row["forgotten"].items()}
        print(
            row["name"],
            "unseen phrasings",
            unseen,
            "perplexity",
            round(row["retain"]["perplexity"] / base["retain"]["perplexity"], 3),
        )
    figure = plot.continual(matrix, columns, chance=0.125, untouched=UNTOUCHED, rows=["original", *names])
    figure.savefig(FIGURES / "continual.png", dpi=110, metadata={"Description": "python -m bench.mrp --part tasks"})


def attacks() -> None:
    """Relearning on half, tested on the other half; rounding."""
    for part, keys in (("attack", ("name", "rate")), ("rounding", ("name", "bits"))):
        table = defaultdict(list)
        for row in rows(part):
            table[tuple(row[k] for k in keys)].append(row)
        for key, found in table.items():
            numbers = [k for k, v in found[0].items() if isinstance(v, float) and k not in keys]
            print(part, *key, f"{len(found)} seeds", {k: shown(r[k] for r in found) for k in numbers})


def leakage() -> None:
    """What the fold of the first saved projection leaves in float32 and in bfloat16 weights, as a file and a figure."""
    edit, found = rp.Edit.load(EDIT), []
    for dtype in ("float32", "bfloat16"):
        lm = rp.load("smollm2-135m", dtype=dtype)
        certificate = rp.certificate(rp.apply(edit, lm), edit, lm)
        worst = {
            field: max(abs(getattr(row, field)) for row in certificate.tensors.values())
            for field in ("leak_computed", "leak", "residue")
        }
        found.append({"name": dtype, "rank": certificate.rank, "tensors": len(certificate.tensors), **worst})
        print(found[-1])
    figure = plot.leakage(certificate, notes=["SmolLM2, capitals"])
    figure.savefig(FIGURES / "leakage.png", dpi=110, metadata={"Description": f"python -m bench.mrp_report, of {EDIT}"})
    print(record("leakage", found, module="mrp_report", seed=0, edit=edit.hash))


if __name__ == "__main__":
    if EDIT.exists():
        leakage()
    one()
    if rows("tasks"):
        tasks()
    attacks()
