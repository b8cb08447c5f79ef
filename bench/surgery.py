"""LLM Surgery: forget 40 facts, replace 40 others by new ones, keep everything else.

Of SmolLM2-135M (`--part smollm2`) 40 capitals are forgotten and 40 countries get a capital that does not exist; their true
capitals are outdated. The other capitals and the facts of seven domains are retained: one half is trained on, the other is
scored. An updated question has eight choices: the invented capital, the true one and six that were invented for other
countries, so that an invented sound tells nothing. The taught models of the audit's self-test (`--part tiny`) forget 40
places of birth, and 40 people get another of the sixteen; the remaining places and all professions are retained.

Accuracy is by answer log-probability, in the facts' own phrasing and in one that training does not use. Beside `surgery`,
with its published weights of the terms, optimizer and 120 steps, the same model is fine-tuned on the update set alone. On
SmolLM2 both train what `small` trains, the down-projections of layers 20 to 29 at 5e-4 (the paper: all weights at 2e-4), on
the facts' own phrasing; on the tiny models all weights at 1e-3, on the first three phrasings. The audit of a tiny model is
part of its run; on SmolLM2 `--audit` makes a short one of what an earlier run left. Run as
`python -m bench.surgery --part tiny --seed 0`; it writes bench/results/surgery-PART-SEED.json.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.corpora import splits
from bench.mrp import TASKS, UNTOUCHED, seen
from bench.mrp_report import shown
from bench.record import RESULTS, record
from repedit.auditing.controls import SCALE, STEPS
from repedit.auditing.controls.taught import world
from repedit.data import Fact, Facts, Splits, by_domain, with_paraphrases
from repedit.metrics.collapse import perplexity
from repedit.models.subject import Subject
from repedit.unlearning import losses
from repedit.unlearning.recipe import OptimizerConfig, Term, UnlearnRecipe

COUNT = 40
"""Of facts to forget, and of facts to replace."""
SETTINGS: dict[str, dict[str, Any]] = {
    "smollm2": {"steps": 120, "batch_size": 4},
    "tiny": {"steps": 120, "batch_size": 16, "lr": 1e-3, "length": 64},
}
"""Rows of each role in a step. Steps, betas .9 and .95, weight decay .01 and clip 1 are published."""
SHOWN = 30
"""Facts of each retained domain that are scored of those that were trained on."""
LIMIT = 8
"""Facts of each retained domain of SmolLM2 that are scored."""
TOKENS = 508
"""Of WikiText-2, for the perplexity of SmolLM2."""
OWN, OTHER = (0,), (3,)
"""The facts' own phrasing, and one that is not trained on."""
METHODS = ("surgery", "update alone")
ATTACKS = ("direct", "rtt", "quantize")
ATTACK: dict[str, dict[str, Any]] = {
    "smollm2": {"folds": 1, "steps": 20, "allow_small": True},
    "tiny": {"scale_lrs": SCALE, "steps": STEPS, "allow_small": True},
}
"""80 facts are fewer than the audit asks for. On SmolLM2 one half is tested, after at most 20 steps of retraining."""
OPENINGS = [
    "Vel",
    "Mor",
    "Tan",
    "Kes",
    "Dra",
    "Lun",
    "Bri",
    "Sol",
    "Quen",
    "Har",
    "Fen",
    "Zur",
    "Pel",
    "Gor",
    "Nim",
    "Ash",
]
ENDINGS = ["adora", "inburg", "ovia", "escar", "untra", "elmont", "irath", "osk", "andel", "ivar"]


@dataclass(frozen=True)
class Sets:
    """The facts of one seed."""

    forget: tuple[Fact, ...]
    outdated: tuple[Fact, ...]
    """What the update set replaces."""
    update: tuple[Fact, ...]
    train: tuple[Fact, ...]
    """Retained facts that training sees."""
    test: dict[str, tuple[Fact, ...]]
    """Retained facts that it does not see, by domain."""

    @classmethod
    def of(cls, seed: int) -> Sets:
        """Of SmolLM2: other countries are forgotten, replaced and retained at every seed."""
        forget, outdated, rest = thirds(rp.data.facts("capitals").forget, seed)
        halves = {"capitals": Splits.of(rest, seed=seed)}
        for name in (*TASKS[1:], *UNTOUCHED):
            halves[name] = Splits.of(rp.data.facts(name).forget, seed=seed)
        train = tuple(fact for half in halves.values() for fact in half.train)
        test = {name: half.test[:LIMIT] for name, half in halves.items()}
        return cls(forget, outdated, updated(outdated, seed), train, test)

    @classmethod
    def taught(cls, facts: Facts, seed: int) -> Sets:
        """Of a tiny model: an updated fact has another of the sixteen answers."""
        forget, outdated, rest = thirds(facts.forget, seed)
        halves = {"city": Splits.of(rest, seed=seed), "profession": Splits.of(facts.retain, seed=seed)}
        rng = random.Random(f"{seed}:updated")
        update = tuple(
            replace(fact, id=f"{fact.id}/updated", answer=rng.choice([c for c in fact.choices if c != fact.answer]))
            for fact in outdated
        )
        train = tuple(fact for half in halves.values() for fact in half.train)
        return cls(forget, outdated, update, train, {name: half.test for name, half in halves.items()})


def thirds(facts: Sequence[Fact], seed: int) -> tuple[tuple[Fact, ...], tuple[Fact, ...], tuple[Fact, ...]]:
    """`COUNT` facts to forget, as many to replace, and the rest, in an order of the seed."""
    order = list(facts)
    random.Random(f"{seed}:surgery").shuffle(order)
    return tuple(order[:COUNT]), tuple(order[COUNT : 2 * COUNT]), tuple(order[2 * COUNT :])


def updated(facts: Sequence[Fact], seed: int) -> tuple[Fact, ...]:
    """The facts with invented capitals; the choices are the invented one, the true one and six invented for others."""
    rng = random.Random(f"{seed}:invented")
    names = rng.sample([a + b for a in OPENINGS for b in ENDINGS], len(facts))
    changed = []
    for number, fact in enumerate(facts):
        choices = [names[number], fact.answer, *rng.sample(names[:number] + names[number + 1 :], 6)]
        rng.shuffle(choices)
        changed.append(replace(fact, id=f"{fact.id}/updated", answer=names[number], choices=tuple(choices)))
    return tuple(changed)


@dataclass(frozen=True)
class Bench:
    """A model, and what it forgets, learns and keeps."""

    part: str
    seed: int
    lm: Subject
    sets: Sets
    reference: Subject | None = field(default=None, repr=False)

    @classmethod
    def of(cls, part: str, seed: int) -> Bench:
        """SmolLM2 with real facts, or a tiny model with those that it was taught."""
        if part == "smollm2":
            return cls(part, seed, rp.load("smollm2-135m"), Sets.of(seed))
        here = world(seed)
        return cls(part, seed, here.original, Sets.taught(here.facts, seed), here.reference)

    def trained(self, name: str) -> rp.Delta:
        """What one of the two methods changes."""
        given, sets = SETTINGS[self.part], self.sets
        base = rp.recipes.surgery() if name == "surgery" else fine_tuning()
        recipe = rp.recipes.small(base, **given) if self.part == "smollm2" else replace(base, **given)
        if name == "update alone":
            return rp.unlearn(self.lm, recipe=recipe, forget=self.rows(sets.update), seed=self.seed, progress=False)
        # Rows of the forget set whose prompt is also in the update set get the role outdated.
        return rp.unlearn(
            self.lm, recipe=recipe, forget=self.rows((*sets.forget, *sets.outdated)), update=self.rows(sets.update),
            retain=self.rows(sets.train), seed=self.seed, progress=False,
        )  # fmt: skip

    def rows(self, facts: Sequence[Fact]) -> tuple[Fact, ...]:
        """The facts in the phrasings that are trained on, each a row."""
        return with_paraphrases(facts, only=OWN) if self.part == "smollm2" else with_paraphrases(seen(facts))

    def scored(self, lm: Subject) -> dict[str, Any]:
        """Accuracies by set and phrasing, and perplexity on text that training does not see."""
        sets = self.sets
        parts = {"forget": sets.forget, "update": sets.update, "outdated": sets.outdated}
        found: dict[str, Any] = {name: accuracy(lm, facts, OWN) for name, facts in parts.items()}
        found |= {f"{name}, new words": accuracy(lm, parts[name], OTHER) for name in ("forget", "update")}
        found["retain by domain"] = {name: accuracy(lm, facts, OWN) for name, facts in sets.test.items()}
        found["retain"] = sum(found["retain by domain"].values()) / len(sets.test)
        trained_on = by_domain(sets.train).values()
        found["retain, trained on"] = sum(accuracy(lm, part[:SHOWN], OWN) for part in trained_on) / len(trained_on)
        if self.part == "smollm2":
            prose = splits()["prose"][1]
            found["perplexity"] = rp.predictions(lm, prose, limit_tokens=TOKENS, progress=False).perplexity
        else:
            found["perplexity"] = perplexity(lm, [f.text for part in sets.test.values() for f in part]).perplexity
        return found

    def audited(self, edited: Subject) -> dict[str, Any]:
        """What brings the forgotten and the outdated facts back: asked, retrained on half of them, rounded."""
        retain = tuple(fact for part in self.sets.test.values() for fact in part)
        facts = Facts((*self.sets.forget, *self.sets.outdated), retain, "surgery")
        report = rp.audit(
            edited, original=self.lm, reference=self.reference, facts=facts, attacks=ATTACKS, seeds=(self.seed,),
            progress=False, **ATTACK[self.part],
        )  # fmt: skip
        verdict = {"verdict": report.verdict.word, "sentence": report.verdict.sentence, "facts": len(facts)}
        return verdict | {"recoveries": [asdict(found) for found in report.recoveries]}


def fine_tuning() -> UnlearnRecipe:
    """The update term of `surgery` alone, with its optimizer; the update set is given in the place of the forget set."""
    return UnlearnRecipe(
        "update alone", (Term(losses.nll(), "forget", 2.0),), lr=2e-4, steps=120,
        optimizer=OptimizerConfig(weight_decay=0.01, betas=(0.9, 0.95)), formula="2 NLL(update)",
    )  # fmt: skip


def accuracy(lm: Subject, facts: Sequence[Fact], phrasings: Sequence[int]) -> float:
    """Share of facts that are right, mean over the phrasings."""
    return rp.facts_accuracy(lm, with_paraphrases(facts, only=phrasings)).accuracy


def measured(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """The original and both methods."""
    rows = [{"name": "original", "seed": bench.seed, **bench.scored(bench.lm)}]
    for name in METHODS:
        busy = time.process_time()
        delta = bench.trained(name)
        spent, edited = (time.process_time() - busy) / 60, rp.apply(delta, bench.lm)
        row = {"name": name, "seed": bench.seed, **bench.scored(edited), "core_minutes": spent, "steps": len(delta.log),
               "stopped": delta.provenance["stopped"]["reason"]}  # fmt: skip
        if name == "surgery":
            delta.save(folder / f"surgery-{bench.part}-{bench.seed}.safetensors")
            row |= {"audit": bench.audited(edited)} if bench.part == "tiny" else {}
        print(row, flush=True)
        rows.append(row)
    return rows


def attacked(rows: list[dict[str, Any]], bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, with the audit of its surgery."""
    delta = rp.Delta.load(folder / f"surgery-{bench.part}-{bench.seed}.safetensors")
    found = bench.audited(rp.apply(delta, bench.lm))
    print(found, flush=True)
    return [row | {"audit": found} if row["name"] == "surgery" else row for row in rows]


def table(part: str) -> str:
    """A Markdown table of every seed that was run: mean and deviation."""
    paths = sorted(RESULTS.glob(f"surgery-{part}-*.json"))
    rows = [row for path in paths for row in json.loads(path.read_text())["rows"]]
    columns = ("update", "update, new words", "forget", "forget, new words", "outdated", "retain", "perplexity")
    lines = [f"| model | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        lines.append(f"| {name} | {len(mine)} | {' | '.join(shown(r[c] for r in mine) for c in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure one seed, or audit what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*SETTINGS], default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--audit", action="store_true", help="Attack what an earlier run of this seed made.")
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-surgery"), help="For the deltas.")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench, name = Bench.of(options.part, options.seed), f"surgery-{options.part}-{options.seed}"
    if options.audit:
        rows = attacked(json.loads((RESULTS / f"{name}.json").read_text())["rows"], bench, options.folder)
    else:
        rows = measured(bench, options.folder)
    settings = {**SETTINGS[options.part], "attack": ATTACK[options.part], "count": COUNT}
    print(record(name, rows, module="surgery", seed=options.seed, settings=settings))
    print(table(options.part))


if __name__ == "__main__":
    main()
