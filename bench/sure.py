"""The quantisation attack on unlearning, and SURE against it.

Recipes of the paper's kind, GA and NPO with GDR or KLR, train all weights by AdamW at a small rate until the facts are
forgotten to within five points of chance, or the steps are used up. Every model is then asked in full precision and with
its block matrices rounded to int8 (one step a row) and int4 (round to nearest, groups of 64). *Retained* is the accuracy
over that of the original in full precision, as published; *above chance* is (a - c) / (o - c) with o the original after the
same rounding and c the chance of guessing.

Then SURE over one of the recipes: only the tenth of the rows with the largest forget gradient moves, at a larger rate;
beside it, with everything else the same, as many random rows in every tensor.

`--part smollm2` takes SmolLM2-135M and 100 real capitals, rate 1e-5, and facts of seven domains to retain; `--part tiny` the
taught models of the audit's self-test, 120 facts a side, at a tenth of the rate that `bench.unlearn` uses. Run as
`python -m bench.sure --part tiny --seed 0 [--rows npo_gdr,...]`; a run adds its rows to bench/results/sure-PART-SEED.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import repedit as rp
from bench.mrp import TASKS, UNTOUCHED
from bench.mrp_report import shown
from bench.record import RESULTS, record
from bench.relearning import trainable
from repedit.auditing.attacks.weights import projections, round_matrices
from repedit.auditing.controls.taught import world
from repedit.data import Fact, Splits, with_paraphrases
from repedit.models.subject import Subject
from repedit.unlearning import schedule
from repedit.unlearning.masks import saliency
from repedit.unlearning.parameters import Mask, Parameters
from repedit.unlearning.recipe import UnlearnRecipe

SETTINGS: dict[str, dict[str, Any]] = {
    "smollm2": {"lr": 1e-5, "steps": 120, "batch_size": 8, "length": 64},
    "tiny": {"lr": 1e-4, "steps": 400, "batch_size": 16, "length": 64},
}
"""All rows of a batch are of the facts' own phrasing on SmolLM2, and of every phrasing on the tiny models."""
SURE_RATE = 10.0
"""Times the small rate: a masked row must move further than all rows together."""
ABOVE = 0.05
"""Accuracy above chance at which a training ends; asked every `EVERY` steps."""
EVERY, ASKED = 15, 60
SCORED = 100
"""Of the facts to forget, which are asked after a training."""
SCHEMES = ("full", "int8", "int4")
PLAIN = ("grad_diff", "ga_kl", "npo_gdr", "npo_klr")
"""GA with GDR and KLR, NPO with GDR and KLR."""
OVER = "npo_gdr"
"""What SURE is made over."""
CONTROLS = ("SURE mask", "random mask")
LIMIT = 8
"""Facts of each retained domain that are scored."""


@dataclass(frozen=True)
class Bench:
    """A model, what it is to forget, and what is retained: half of that is trained on, the other half is scored."""

    part: str
    seed: int
    lm: Subject
    forget: tuple[Fact, ...]
    train: tuple[Fact, ...]
    test: tuple[Fact, ...]

    @classmethod
    def of(cls, part: str, seed: int) -> Bench:
        """SmolLM2 with real facts, or a tiny model with those that it was taught."""
        if part == "tiny":
            here = world(seed)
            half = Splits.of(here.facts.retain, seed=seed)
            return cls(part, seed, here.original, here.facts.forget, half.train, half.test)
        halves = [Splits.of(rp.data.facts(name).forget, seed=seed) for name in (*TASKS[1:], *UNTOUCHED)]
        train = own(tuple(fact for half in halves for fact in half.train))
        test = tuple(fact for half in halves for fact in half.test[:LIMIT])
        return cls(part, seed, rp.load("smollm2-135m"), own(rp.data.facts("capitals").forget), train, test)

    @property
    def chance(self) -> float:
        """Of guessing among the choices."""
        return 1 / len(self.forget[0].choices)

    def trained(self, recipe: UnlearnRecipe, factor: float = 1.0) -> rp.Delta:
        """Unlearn at a multiple of the small rate until the facts are forgotten."""
        given = SETTINGS[self.part] | {"lr": factor * SETTINGS[self.part]["lr"]}
        stop = schedule.metric(lambda lm: accuracy(lm, self.forget[:ASKED]), below=self.chance + ABOVE, every=EVERY)
        return rp.unlearn(
            self.lm, recipe=recipe, forget=self.forget, retain=self.train, stop=(stop,), seed=self.seed, progress=False, **given
        )  # fmt: skip

    def measured(self, lm: Subject) -> dict[str, dict[str, float]]:
        """Accuracies in full precision and after every rounding."""
        found = {}
        for scheme in SCHEMES:
            student = lm
            if scheme != "full":
                student = trainable(lm)
                round_matrices(student, projections(student), scheme)
            found[scheme] = {"forget": accuracy(student, self.forget[:SCORED]), "chance": self.chance}
            if scheme == "full" or self.part == "tiny":
                found[scheme]["retain"] = accuracy(student, self.test)
        return found

    def masks(self) -> dict[str, Mask]:
        """The rows with the largest forget gradient, and as many random rows in every tensor."""
        length, size = SETTINGS[self.part]["length"], SETTINGS[self.part]["batch_size"]
        chosen = saliency(self.lm, self.forget, percentile=90, length=length, batch_size=size)
        return {"SURE mask": chosen, "random mask": random_rows(chosen, self.seed)}


def random_rows(mask: Mask, seed: int) -> Mask:
    """As many rows of every tensor as the mask chooses, at random."""
    random = torch.Generator().manual_seed(seed)
    shuffled = {
        name: chosen.flatten()[torch.randperm(chosen.numel(), generator=random)].view(chosen.shape)
        for name, chosen in mask.tensors.items()
    }
    return Mask(shuffled, {"method": "random rows", "seed": seed})


def own(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts in their own phrasing only."""
    return with_paraphrases(facts, only=[0])


def accuracy(lm: Subject, facts: Sequence[Fact]) -> float:
    """Share of facts that are right in their own phrasing."""
    return rp.facts_accuracy(lm, own(facts)).accuracy


def row(bench: Bench, name: str, recipe: UnlearnRecipe, factor: float = 1.0) -> dict[str, Any]:
    """One trained model."""
    busy = time.process_time()
    delta = bench.trained(recipe, factor)
    spent, mask = (time.process_time() - busy) / 60, recipe.parameters.mask
    found = {
        "name": name, "seed": bench.seed, "measured": bench.measured(rp.apply(delta, bench.lm)), "steps": len(delta.log),
        "stopped": delta.provenance["stopped"]["reason"], "core_minutes": spent,
        "largest change": max(float(value.abs().max()) for value in delta.tensors.values()),
        "rows in the mask": None if mask is None else sum(int(m.sum()) for m in mask.tensors.values()),
        "changed outside the mask": None if mask is None else sum(
            int((value.ne(0) & ~mask.tensors[n]).sum()) for n, value in delta.tensors.items()),
    }  # fmt: skip
    print(found, flush=True)
    return found


def run(bench: Bench, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The original where it is wanted, the recipes, and SURE beside its control."""
    if "original" in names:
        yield {"name": "original", "seed": bench.seed, "measured": bench.measured(bench.lm)}
    for name in PLAIN:
        if name in names:
            yield row(bench, name, rp.recipes.by_name(name))
    wanted = [name for name in CONTROLS if name in names]
    masks = bench.masks() if wanted else {}
    for name in wanted:
        recipe = replace(rp.recipes.by_name(OVER), parameters=Parameters(mask=masks[name]))
        yield row(bench, name, recipe, SURE_RATE)


def retained(row: dict[str, Any], original: dict[str, Any], scheme: str) -> tuple[float, float]:
    """(published: accuracy over that of the original in full precision; above chance, after the same rounding)."""
    here, full = row["measured"][scheme]["forget"], original["measured"]["full"]["forget"]
    ceiling, chance = original["measured"][scheme]["forget"], original["measured"][scheme]["chance"]
    return here / full, (here - chance) / (ceiling - chance)


def table(part: str) -> str:
    """A Markdown table of every seed that was run: mean and deviation."""
    rows = [row for path in sorted(RESULTS.glob(f"sure-{part}-*.json")) for row in json.loads(path.read_text())["rows"]]
    kinds = ("retained", "above chance")
    head = ("model", "seeds", *(f"{kind}, {s}" for kind in kinds for s in SCHEMES), "other facts", "steps")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    originals = {r["seed"]: r for r in rows if r["name"] == "original"}
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = [r for r in rows if r["name"] == name]
        cells = [shown(retained(r, originals[r["seed"]], s)[i] for r in mine) for i in range(2) for s in SCHEMES]
        kept = shown(r["measured"]["full"]["retain"] / originals[r["seed"]]["measured"]["full"]["retain"] for r in mine)
        steps = ", ".join(str(r.get("steps", "")) for r in mine)
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} | {kept} | {steps} |")
    return "\n".join(lines)


def main() -> None:
    """Make the rows that are asked for, each written when it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*SETTINGS], default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default=",".join(("original", *PLAIN, *CONTROLS)), help="Names, joined by commas.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = f"sure-{options.part}-{options.seed}"
    settings = {
        **SETTINGS[options.part],
        "factor of masks": SURE_RATE,
        "above chance": ABOVE,
        "percentile": 90,
        "over": OVER,
    }
    known = RESULTS / f"{name}.json"
    rows = json.loads(known.read_text())["rows"] if known.exists() else []
    for found in run(Bench.of(options.part, options.seed), options.rows.split(",")):
        rows = [row for row in rows if row["name"] != found["name"]] + [found]
        record(name, rows, module="sure", seed=options.seed, settings=settings)
    print(table(options.part))


if __name__ == "__main__":
    main()
