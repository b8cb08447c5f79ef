"""Every recipe of gradient unlearning through the audit, in one table: what it forgets, keeps, costs, and what comes back.

`python -m bench.unlearn --part tiny --seeds 0,1,2` takes the taught models of the audit's self-test. Retain facts are
split by person: one half is trained on, the other is scored. A second model that never saw the facts to forget is the row
"retrained". `--part smollm2 --recipe NAME --seed N` takes SmolLM2-135M and real facts, see `bench.unlearn_smollm2`;
`--part steps` measures what a step costs, see `bench.unlearn_steps`. Each writes bench/results/unlearn-PART.json and prints a Markdown table.

A tiny model that does not know a fact gives one answer to all questions, so the forget column ends at how often that answer
is right; recipes that settle on the same answer agree there to the last digit, and differ in what brings the facts back.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from math import nan
from typing import Any

import torch

import repedit as rp
from bench import unlearn_smollm2, unlearn_steps
from bench.mrp_report import shown
from bench.record import record
from repedit.auditing.controls import SCALE, STEPS
from repedit.auditing.controls.taught import World, world
from repedit.data import Fact, Splits
from repedit.delta import Delta
from repedit.metrics.collapse import Signs, judge, perplexity
from repedit.metrics.membership import auc, scores
from repedit.models.subject import Subject

RECIPES = (
    "grad_diff", "ga_kl", "npo_gdr", "npo_klr", "sim_npo", "wga", "blur_npo", "blur_ga", "sure:npo_gdr", "ga",
)  # fmt: skip
SETTINGS: dict[str, Any] = {"steps": 60, "batch_size": 16, "lr": 1e-3}
"""Of the tiny models, as in tests/test_unlearning_behaviour.py, which was set up on seed 0: that seed is not fresh."""
OWN: dict[str, dict[str, Any]] = {"sure:npo_gdr": {"lr": 3e-3}}
"""What a recipe needs beside them: SURE moves a tenth of the units, so each must move further."""
ATTACKS = ("direct", "rtt", "quantize")
COLUMNS = {
    "forget": "forget", "retain": "retain", "unseen": "retain, unseen", "perplexity": "perplexity", "rtt": "RTT recovery",
    "int4": "int4 recovery", "membership": "membership AUC", "minutes": "minutes",
}  # fmt: skip


class Bench:
    """The models and facts of one seed, and what a model is scored on."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world: World = world(seed)
        self.halves = Splits.of(self.world.facts.retain, seed=seed)
        self.reference = self.measured(self.world.reference)
        self.original = self.measured(self.world.original)

    def measured(self, lm: Subject) -> dict[str, float]:
        """Shares of facts that are right, perplexity on what training never saw, and the AUC of membership."""
        facts, strangers = self.world.facts.forget, self.world.strangers
        mine, others = (scores(lm, [f.text for f in part], ("loss",))["loss"] for part in (facts, strangers))
        return {
            "forget": rp.facts_accuracy(lm, facts).accuracy,
            "retain": rp.facts_accuracy(lm, self.halves.train).accuracy,
            "unseen": rp.facts_accuracy(lm, self.halves.test).accuracy,
            "perplexity": perplexity(lm, texts(self.halves.test)).perplexity,
            "membership": auc(mine, others),
        }

    def row(self, name: str, lm: Subject, **more: Any) -> dict[str, Any]:
        """One line of the table, without what attacks bring back."""
        found = self.measured(lm)
        judgement = judge(self.signs(found), self.signs(self.original), auc_reference=self.reference["membership"])
        return {"name": name, "seed": self.seed, **found, "collapse": str(judgement), **more}

    def attacked(self, lm: Subject) -> dict[str, Any]:
        """The share of what was forgotten that retraining on half of it and rounding to 4 bits bring back."""
        here, busy = self.world, time.process_time()
        report = rp.audit(
            lm, original=here.original, reference=here.reference, facts=here.facts, retain=self.halves.test,
            unrelated=here.facts.retain, attacks=ATTACKS, seeds=(self.seed,), scale_lrs=SCALE, steps=STEPS, progress=False,
        )  # fmt: skip
        retrained = next(r for r in report.recoveries if r.attack == "rtt")
        return {
            "rtt": retrained.value, "rtt_interval": retrained.interval, "rtt_status": retrained.status,
            "int4": recovered(report, "quantize", "int4"), "verdict": report.verdict.word,
            "audit_minutes": (time.process_time() - busy) / 60,
        }  # fmt: skip

    @staticmethod
    def signs(found: dict[str, float]) -> Signs:
        """What the verdict about collapse looks at."""
        return Signs(found["unseen"], found["forget"], found["membership"], perplexity=found["perplexity"])


def texts(items: Sequence[Fact]) -> list[str]:
    """Facts as running text."""
    return [fact.text for fact in items]


def recovered(report: rp.Report, attack: str, setting: str) -> float:
    """(A - B) / (C - B) of one setting of an attack: edited, reference and original; NaN where it was not made."""
    found = [report.finding(role, attack) for role in ("edited", "reference", "original")]
    values = [f.accuracy[setting] for f in found if f is not None and setting in f.settings]
    if len(values) < 3 or values[2] == values[1]:
        return nan
    return (values[0] - values[1]) / (values[2] - values[1])


def trained(bench: Bench, name: str) -> tuple[Delta, float]:
    """A recipe carried out, and the minutes of one core it took."""
    busy = time.process_time()
    delta = rp.unlearn(
        bench.world.original, recipe=rp.recipes.by_name(name), forget=bench.world.facts.forget, retain=bench.halves.train,
        seed=bench.seed, progress=False, **(SETTINGS | OWN.get(name, {})),
    )  # fmt: skip
    return delta, (time.process_time() - busy) / 60


def tiny(seed: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The original, the retrained model, and every recipe, at one seed."""
    bench = Bench(seed)
    yield bench.row("original", bench.world.original)
    yield bench.row("retrained", bench.world.other) | bench.attacked(bench.world.other)
    for name in names:
        delta, minutes = trained(bench, name)
        edited = rp.apply(delta, bench.world.original)
        row = bench.row(
            name, edited, minutes=minutes, steps=len(delta.log), stopped=delta.provenance["stopped"]["reason"]
        )
        yield row | bench.attacked(edited)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: mean over seeds, with the standard deviation where there are several, and every verdict met."""
    lines = [f"| recipe | seeds | {' | '.join(COLUMNS.values())} | metrics say | audit says |", "|---" * 12 + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        cells = [_cell([row[key] for row in mine if row.get(key) is not None]) for key in COLUMNS]
        words = [sorted({str(row.get(key, "")).partition(":")[0] for row in mine}) for key in ("collapse", "verdict")]
        lines.append(f"| {name} | {len(mine)} | {' | '.join([*cells, *(', '.join(found) for found in words)])} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if value == value]
    return shown(known) if known else "-"


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["tiny", "smollm2", "steps"], required=True)
    parser.add_argument("--seeds", default="0", help="Part tiny: seeds, joined by commas.")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="Part tiny: names, joined by commas.")
    unlearn_smollm2.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part != "tiny":
        unlearn_smollm2.run(options) if options.part == "smollm2" else unlearn_steps.main()
        return
    rows: list[dict[str, Any]] = []
    seeds, names = [int(seed) for seed in options.seeds.split(",")], options.recipes.split(",")
    for seed in seeds:
        for row in tiny(seed, names):
            print(row, flush=True)
            rows.append(row)
            # Written after every row: a run that is cut off leaves what it measured.
            record("unlearn-tiny", rows, module="unlearn", complete=len(rows) == len(seeds) * (len(names) + 2))
    print(table(rows))


if __name__ == "__main__":
    main()
