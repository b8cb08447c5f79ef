"""One recipe on SmolLM2-135M with real facts: it forgets the capitals, and is to keep symbols, languages and prose.

Training sees the first three phrasings of every capital, and half of the symbols and languages; the other half, and
domains that it never saw, are scored, as in `bench.mrp`. Perplexity is on WikiText-2. Run as
`python -m bench.unlearn --part smollm2 --recipe blur_npo --seed 0`; the audit, which takes longest, is made with `--audit`.
"""

from __future__ import annotations

import json
import resource
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import repedit as rp
from bench.mrp import Bench, seen
from bench.mrp_report import shown
from bench.record import RESULTS, record
from repedit.models.subject import Subject

FORGET, RETAIN = "capitals", ("symbols", "languages")
ATTACKS = ("direct", "rtt", "quantize")


def add_options(parser: ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument(
        "--recipe", default="blur_npo", help="Part smollm2: its name, such as blur_npo or sure:npo_gdr."
    )
    parser.add_argument("--seed", type=int, default=0, help="Part smollm2.")
    parser.add_argument("--steps", type=int, help="Part smollm2: in place of 60.")
    parser.add_argument("--lr", type=float, help="Part smollm2: in place of 5e-4.")
    parser.add_argument("--audit", action="store_true", help="Part smollm2: attack the result as well.")
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache/bench-unlearn"), help="Part smollm2: for the delta."
    )


def run(options: Namespace) -> None:
    """Unlearn, score before and after, write bench/results/unlearn-smollm2-RECIPE-SEED.json and print a table.

    With `--audit`, what an earlier run wrote is taken up where it is still there.
    """
    bench, name = Bench(), f"unlearn-smollm2-{options.recipe.replace(':', '-')}-{options.seed}"
    options.folder.mkdir(parents=True, exist_ok=True)
    saved, known = options.folder / f"{name}.safetensors", RESULTS / f"{name}.json"
    if options.audit and saved.exists() and known.exists():
        delta, row = rp.Delta.load(saved), json.loads(known.read_text())["rows"][0]
    else:
        delta, row = made(bench, options)
        delta.save(saved)
    if options.audit:
        row |= {"audit": audited(bench, rp.apply(delta, bench.lm))}
    print(record(name, [row], module="unlearn"))
    print(table(row))
    print(joined())


def made(bench: Bench, options: Namespace) -> tuple[rp.Delta, dict[str, Any]]:
    """The difference that the recipe makes, and what the models score before and after."""
    before = scored(bench, bench.lm)
    recipe = rp.recipes.by_name(f"small:{options.recipe}")
    retain: dict[str, Any] = {domain: seen(bench.train[domain]) for domain in RETAIN}
    start, busy = time.time(), time.process_time()
    delta = rp.unlearn(
        bench.lm, recipe=recipe, forget=seen(bench.facts[FORGET]), retain=retain | {"prose": rp.data.prose()},
        steps=options.steps, lr=options.lr, seed=options.seed, progress=False,
    )  # fmt: skip
    spent = {"minutes": (time.time() - start) / 60, "core_minutes": (time.process_time() - busy) / 60}
    after = scored(bench, rp.apply(delta, bench.lm))
    return delta, {
        "name": options.recipe, "seed": options.seed, "before": before, "after": after, **spent, "steps": len(delta.log),
        "stopped": delta.provenance["stopped"]["reason"],
        "perplexity_ratio": after["retain"]["perplexity"] / before["retain"]["perplexity"],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def scored(bench: Bench, lm: Subject) -> dict[str, dict[str, float]]:
    """Accuracy on the capitals by phrasing; on the other domains, and perplexity."""
    return {"forget": bench.forgetting(lm, FORGET), "retain": bench.keeping(lm, [FORGET])}


def audited(bench: Bench, edited: Subject) -> dict[str, Any]:
    """What brings the capitals back."""
    report = rp.audit(edited, original=bench.lm, facts=rp.data.facts(FORGET), attacks=ATTACKS, progress=False)
    verdict = {"verdict": report.verdict.word, "sentence": report.verdict.sentence}
    return verdict | {"recoveries": [asdict(found) for found in report.recoveries]}


def table(row: dict[str, Any]) -> str:
    """A Markdown table: every score before and after, and the share of it that is left."""
    lines = [f"| {row['name']}, seed {row['seed']} | before | after | share |", "|---|---|---|---|"]
    for side in ("forget", "retain"):
        for name, value in row["before"][side].items():
            found = row["after"][side][name]
            lines.append(f"| {side}: {name} | {value:.3f} | {found:.3f} | {found / value:.3f} |")
    return "\n".join(lines)


def joined() -> str:
    """A Markdown table of every recipe that was run, with what its audit said where there was one."""
    head = ("recipe", "seeds", "capitals", "in new words", "symbols and languages kept", "worst other domain kept", "perplexity",
            "recovery by retraining", "by int4", "audit says", "core minutes")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("unlearn-smollm2-*.json")):
        row = json.loads(path.read_text())["rows"][0]
        found.setdefault(row["name"], []).append(row)
    for name, rows in found.items():
        lines.append(f"| {' | '.join((name, str(len(rows)), *_cells(rows)))} |")
    return "\n".join(lines)


def _cells(rows: Sequence[dict[str, Any]]) -> list[str]:
    def share(row: dict[str, Any], names: Sequence[str]) -> float:
        before, after = (sum(row[side]["retain"][n] for n in names) for side in ("before", "after"))
        return float(after / before)

    def back(row: dict[str, Any], attack: str) -> list[float]:
        return [r["value"] for r in row.get("audit", {}).get("recoveries", ()) if r["attack"] == attack]

    others = [n for n in rows[0]["after"]["retain"] if n not in (*RETAIN, "perplexity")]
    worst = [min(others, key=lambda n, r=row: share(r, [n])) for row in rows]
    least = shown(share(row, [n]) for row, n in zip(rows, worst, strict=True))
    attacks = [[v for row in rows for v in back(row, attack)] for attack in ("rtt", "quantize")]
    return [
        shown(row["after"]["forget"]["phrasing 0"] for row in rows), shown(row["after"]["forget"]["unseen"] for row in rows),
        shown(share(row, RETAIN) for row in rows), f"{least} ({', '.join(sorted(set(worst)))})",
        f"x{shown(row['perplexity_ratio'] for row in rows)}", *(shown(v) if v else "-" for v in attacks),
        ", ".join(sorted({row["audit"]["verdict"] for row in rows if "audit" in row})) or "-",
        shown((row["core_minutes"] for row in rows), 0),
    ]  # fmt: skip
