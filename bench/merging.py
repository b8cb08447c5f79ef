"""Entities that nothing else is about, merged (`rp.fit.merge`): what is left of them, what else is lost, and what an audit finds.

`python -m bench.merging --forget us_cities --seed 0` merges the names of a built-in domain of SmolLM2-135M, asks the test half of
every other domain, and audits with the attacks named by `--attacks`. What was trained is kept in `--folder`. It writes
bench/results/merging-DOMAIN-SEED.json.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.corpora import splits
from bench.mrp import TOKENS
from bench.record import record
from repedit.data import Splits, entity_of
from repedit.models.subject import Subject

TEXT = splits()["prose"][1]
"""What perplexity is measured on."""
ATTACKS = "direct,paraphrase,first_word,respelled,reverse_question,head_rows,quantize,rtt"


def merged(lm: Subject, facts: rp.data.Facts, halves: Splits, saved: Path, seed: int) -> rp.Delta:
    """The delta, with the core minutes that it took in its provenance."""
    if saved.exists():
        return rp.Delta.load(saved)
    forgotten, busy = {entity_of(fact) for fact in facts.forget}, time.process_time()
    others = [fact for fact in halves.train if fact.entity and entity_of(fact) not in forgotten]
    never = {fact.entity for fact in halves.test}
    delta = rp.fit.merge(lm, facts.forget, others=others, never=never, seed=seed, progress=False)
    minutes = round((time.process_time() - busy) / 60, 1)
    delta = replace(delta, provenance={**delta.provenance, "core minutes": minutes})
    saved.parent.mkdir(parents=True, exist_ok=True)
    delta.save(saved)
    return delta


def measured(domain: str, seed: int, attacks: list[str], folder: Path) -> dict[str, Any]:
    """One row: accuracy before and after by domain, and the report's verdict and recoveries."""
    lm, facts = rp.load("smollm2-135m"), rp.data.facts(domain)
    halves = Splits.of(facts.retain)
    delta = merged(lm, facts, halves, folder / f"{domain}-{seed}.safetensors", seed)
    edited = rp.apply(delta, lm)
    asked = {domain: facts.forget, **rp.data.by_domain(halves.test)}
    accuracy = {name: [rp.facts_accuracy(m, part).accuracy for m in (lm, edited)] for name, part in asked.items()}
    perplexity = [rp.predictions(m, TEXT, limit_tokens=TOKENS, progress=False).perplexity for m in (lm, edited)]
    print(domain, accuracy, perplexity, flush=True)
    audited = rp.data.Facts(facts.forget, tuple(halves.test), domain)
    report = rp.audit(edited, original=lm, facts=audited, attacks=attacks, progress=False)
    return {
        "forget": domain, "seed": seed, "core minutes": delta.provenance["core minutes"], "certificate": dict(delta.provenance["certificate"]),
        "accuracy": accuracy, "perplexity": perplexity, "verdict": report.verdict.word, "sentence": report.verdict.sentence, "attacks": attacks,
        "recoveries": [asdict(row) for row in report.recoveries],
    }  # fmt: skip


def main() -> None:
    """Merge, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forget", default="us_cities")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attacks", default=ATTACKS)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-merging"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    row = measured(options.forget, options.seed, options.attacks.split(","), options.folder)
    print(record(f"merging-{options.forget}-{options.seed}", [row], module="merging"))


if __name__ == "__main__":
    main()
