"""Image classifiers: every recipe beside retrained models, on digits, MNIST-5k and CIFAR-10-6k.

Run as `python -m bench.vision --data digits|mnist5k|cifar6k --forget class:3 --forget mislabelled:0.1 --seeds 20 21 22`; each data set
and kind of request writes bench/results/vision-DATA-KIND.json. With `--forget class` every seed forgets a class of its own. Data sets
that are not there are skipped with the reason. `--figures` draws figures/vision_*.png from the first seed instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.record import record, spread
from repedit import plot, vision
from repedit.auditing.report import RELEARNING, Report
from repedit.demo import RETRAINED_AGAIN, SETTINGS, ImageDemo, forget_images
from repedit.errors import NotFound

FIGURES = Path(__file__).parents[1] / "figures"
CLASSES = (6, 1, 9, 2, 7, 4)
"""The class that the first, second, ... seed forgets; none of them is one of the chapter's own runs (8, 5, 0, 3)."""
BACK = 0.8


def measured(found: ImageDemo, seed: int) -> list[dict[str, Any]]:
    """One row a recipe: every measure of edited, retrained and original, and how soon relearning brings the images back."""
    rows = []
    for name, report in found.reports.items():
        values = {
            gap.measure: {"edited": gap.edited, "retrained": gap.reference, "original": gap.original, "gap": gap.value,
                          "interval": gap.interval, "all_retrained": gap.spread}
            for gap in report.gaps
        }  # fmt: skip
        rows.append({
            "recipe": name, "request": found.request, "seed": seed, "verdict": report.verdict.word, "rule": report.verdict.rule,
            "measures": values, "back_at": {role: backs(report, role) for role in ("edited", "reference")},
            "seconds": dict(found.seconds[name]), "retraining_seconds": found.retraining,
        })  # fmt: skip
    return rows + [
        {"recipe": n, "request": found.request, "seed": seed, "refused": why} for n, why in found.refused.items()
    ]


def backs(report: Report, role: str) -> list[int | None]:
    """The first epoch of relearning with 80 % of V right, model by model; None where there is none."""
    held = [f.correct.mean(1) for f in report.findings.get(role, ()) if f.attack == RELEARNING]
    return [next((epoch for epoch, value in enumerate(row) if value >= BACK), None) for row in held]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation over seeds by recipe and measure, of the edited value and of the gap, in points; and the verdicts."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["recipe"] for row in rows if "measures" in row):
        mine = [row for row in rows if row["recipe"] == name and "measures" in row]
        measures = mine[0]["measures"]
        found[name] = {
            "verdicts": [row["verdict"] for row in mine],
            "seconds": spread([row["seconds"]["online"] for row in mine]),
            "of_retraining": spread([row["seconds"]["online"] / row["retraining_seconds"] for row in mine]),
            **{
                f"{measure}, {kind}": spread([100 * row["measures"][measure][kind] for row in mine])
                for measure in measures
                for kind in ("edited", "gap")
            },
        }
    return found


def table(title: str, found: dict[str, Any]) -> None:
    """What was measured, as text."""
    print(f"\n{title}\n{'recipe':20} {'verdicts':42} forget  retain    test    AUC  relearn  of retraining")
    for name, row in found.items():
        words = ", ".join(f"{row['verdicts'].count(w)} {w}" for w in dict.fromkeys(row["verdicts"]))
        values = [
            row[f"{m}, gap"]["mean"]
            for m in ("forget accuracy", "retain accuracy", "test accuracy", "AUC of the loss", "relearn")
        ]
        print(
            f"{name:20} {words:42}" + "".join(f"{v:+7.1f} " for v in values) + f"{row['of_retraining']['mean']:10.2f}"
        )


def draw(data: str, seed: int) -> None:
    """The figures of the README: gaps of a class and of wrong labels, losses, relearning, condensed digits."""
    drawn = {}
    for request in (f"class:{CLASSES[0]}", "mislabelled:0.1"):
        found, kind = forget_images(request, data, seed=seed), request.partition(":")[0]
        drawn[f"gap_{kind}"] = plot.gap(found.reports)
        if kind == "class":
            drawn["relearning"] = plot.relearning(found.reports["relabel"])
        else:
            drawn["membership"] = plot.membership(found.reports["finetune"])
        if kind == "class" and data == "digits":
            plan = vision.Condense(k=10)
            drawn["condensed"] = plot.condensed(
                plan(found.original, found.task, found.splits, seed), found.splits.retain
            )
    FIGURES.mkdir(exist_ok=True)
    for name, figure in drawn.items():
        made = {"Description": f"python -m bench.vision --figures --data {data}, seed {seed}"}
        figure.savefig(FIGURES / f"vision_{name}.png", dpi=110, metadata=made)
        print(f"figures/vision_{name}.png", flush=True)


def main() -> None:
    """Run one data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=[*SETTINGS], default="digits")
    parser.add_argument(
        "--forget", action="append", help="class, class:3 or mislabelled:0.1; class and mislabelled by default"
    )
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument("--references", type=int, default=3)
    parser.add_argument("--figures", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.figures:
        draw(options.data, options.seeds[0])
        return
    for wanted in options.forget or ["class", "mislabelled"]:
        rows: list[dict[str, Any]] = []
        begin = time.time()
        for number, seed in enumerate(options.seeds):
            request = f"class:{CLASSES[number % len(CLASSES)]}" if wanted == "class" else wanted
            try:
                found = forget_images(
                    request, options.data, recipes=options.recipe, references=options.references, seed=seed
                )
            except NotFound as error:
                print(f"{options.data} skipped: {error}")
                return
            rows += measured(found, seed)
            print(
                seed,
                request,
                {n: r.verdict.word for n, r in found.reports.items()},
                f"{time.time() - begin:.0f} s",
                flush=True,
            )
        made = summary(rows)
        table(f"{options.data}, {wanted}, seeds {options.seeds}: gap to retrained models, points", made)
        kind = wanted.partition(":")[0]
        print(
            record(
                f"vision-{options.data}-{kind}", rows, module="vision", summary=made, control=RETRAINED_AGAIN, threads=1
            )
        )


if __name__ == "__main__":
    main()
