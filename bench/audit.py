"""The audit on models of which the answer is known, over seeds; and on SmolLM2-135M with edits of our own.

`python -m bench.audit --part controls --seeds 0,1,2` runs every control of the self-test at each seed; `--part selftest`
takes its time with and without stored findings; `--part never --seeds 0,...,9` runs the one that was never taught the facts, and
`--part respelled` this one and the one whose names are intact in other spellings.
`--part projected` exports an edit that `bench.mrp` saved, `--part pruned` makes and exports one; the checkpoint is audited
with the fast budget. `--part times --edit CHECKPOINT` takes the minutes to a verdict on the capitals: the first time, with the findings of the original
stored, and with the quick budget. `--part training` measures what a training step and a question cost. Each writes
bench/results/audit-PART.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.audit_training import training
from bench.record import record
from repedit.auditing.selftest import selftest
from repedit.data.generated import PYTHON, cloze
from repedit.models.default_model import fetch

CONTROLS = {
    "controls": None,
    "never": ("NC1",),
    "also": ("NC2a", "NC2b", "NC2c", "NC6", "PC8"),
    "respelled": ("PC14", "NC1"),
}


def controls(seeds: list[int], names: tuple[str, ...] | None, workers: int | None) -> list[dict[str, Any]]:
    """One row a control and seed, with the time of all controls of the seed."""
    rows = []
    for seed in seeds:
        busy = _busy()
        found = selftest(seed, controls=names, workers=workers, record=False, progress=False)
        spent = {"all_seconds": found.seconds, "all_cpu_seconds": _busy() - busy, "workers": workers}
        rows += [{"seed": seed, "passed": check.passed, **asdict(check), **spent} for check in found.checks]
        print(
            seed,
            f"{found.seconds:.0f} s, {spent['all_cpu_seconds']:.0f} s of CPU",
            [(c.control, c.found, round(c.recovered, 2)) for c in found.checks],
            flush=True,
        )
    return rows


def minutes_of_selftest(seed: int, workers: int | None) -> list[dict[str, Any]]:
    """The whole self-test with nothing stored, and with the findings of the original and the reference stored."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["REPEDIT_CACHE"] = cache
        for name in ("nothing stored", "findings stored"):
            found = controls([seed], None, workers)
            spent = {key: found[0][key] for key in ("all_seconds", "all_cpu_seconds", "workers")}
            slowest = {row["control"]: row["seconds"] for row in sorted(found, key=lambda row: -row["seconds"])[:4]}
            rows.append(
                {
                    "name": name,
                    "passed": sum(row["passed"] for row in found),
                    "of": len(found),
                    **spent,
                    "slowest": slowest,
                }
            )
    return rows


def _busy() -> float:
    """CPU seconds of this process and of those that it began and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def projected(edit: Path, folder: Path, times: int, attacks: Sequence[str] | None) -> list[dict[str, Any]]:
    """A saved projection off the capitals, audited twice: the second time shows what the cache saves."""
    target, facts = _exported(rp.Edit.load(edit), folder / edit.stem), rp.data.facts("capitals")
    return [_audited(name, target, facts, folder, attacks=attacks) for name in ("first", "again")[:times]]


def pruned(folder: Path, attacks: Sequence[str] | None) -> list[dict[str, Any]]:
    """The neurons most specific to code pruned, as in the first example of the README; asked which word comes next in
    code of documents that no neuron was scored on. Prose is what should have been kept."""
    (forget, _), (retain, prose) = rp.data.code().halves(), rp.data.prose().halves()
    lm = rp.load("smollm2-135m")
    scores = rp.score(*(rp.collect(lm, text, limit_tokens=4000, progress=False) for text in (forget, retain)))
    target = _exported(rp.prune(scores, fraction=0.05), folder / "pruned")
    used = {document.origin for document in forget.documents}
    whole = rp.data.code(characters=None)
    rest = replace(whole, documents=tuple(d for d in whole.documents if d.id not in used))
    facts = cloze(rest, 104, characters=48, lines=PYTHON)
    return [_audited("pruned", target, facts, folder, retain=cloze(prose, 96, characters=48), attacks=attacks)]


def times(target: Path, folder: Path, budgets: Sequence[str]) -> list[dict[str, Any]]:
    """Minutes to a verdict on a checkpoint, for each budget with nothing stored and with the original's findings stored."""
    original, facts = fetch("smollm2-135m"), rp.data.facts("capitals")
    rows = []
    for budget in budgets:
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            os.environ["REPEDIT_CACHE"] = cache
            for name in ("first", "original stored"):
                row = _audited(
                    f"{budget}, {name}", target, facts, Path(cache), original=original, budget=budget, until="verdict"
                )
                rows.append({key: value for key, value in row.items() if key != "retain"})
    return rows


def _exported(edit: rp.Edit, target: Path) -> Path:
    if not target.exists():
        rp.export(edit, source=rp.load("smollm2-135m"), target=target)
    return target


def _audited(name: str, target: Path, facts: Any, folder: Path, **options: Any) -> dict[str, Any]:
    out, start, busy = folder / f"{target.name}-{name}", time.time(), time.process_time()
    report = rp.audit(target, **{"original": "smollm2-135m", "facts": facts, "out": out, "progress": False} | options)
    row = {
        "name": name, "minutes": (time.time() - start) / 60, "core_minutes": (time.process_time() - busy) / 60,
        "minutes_of_attacks": _attacking(report), "threads": torch.get_num_threads(), "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "state": report.state, "verdict": report.verdict.word, "sentence": report.verdict.sentence,
    }  # fmt: skip
    rp.report.write(report, out)
    print(row, flush=True)
    return row | {"retain": asdict(report.retain), "recoveries": [asdict(r) for r in report.recoveries]}


def _attacking(report: rp.Report) -> dict[str, float]:
    """Minutes that the attacks on each model took, also those found before an interruption."""
    return {role: sum(f.seconds for f in found) / 60 for role, found in report.findings.items()}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--part", choices=[*CONTROLS, "selftest", "projected", "pruned", "times", "training"], required=True
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workers", type=int, help="Processes of the controls; one for each core by default.")
    parser.add_argument("--edit", type=Path, default=Path(".cache/bench-mrp/capitals-0.safetensors"))
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-audit"))
    parser.add_argument("--times", type=int, default=2, help="Part projected: 1 leaves out the audit with a cache.")
    parser.add_argument("--budgets", default="fast,quick", help="Part times: these budgets, joined by commas.")
    parser.add_argument("--attacks", help="These, joined by commas, in place of the fast budget's.")
    options = parser.parse_args()
    chosen = None if options.attacks is None else options.attacks.split(",")
    if options.part == "projected":
        rows = projected(options.edit, options.folder, options.times, chosen)
    elif options.part == "times":
        options.folder.mkdir(parents=True, exist_ok=True)
        rows = times(options.edit, options.folder, options.budgets.split(","))
    elif options.part == "pruned":
        rows = pruned(options.folder, chosen)
    elif options.part == "selftest":
        rows = minutes_of_selftest(int(options.seeds), options.workers)
    elif options.part == "training":
        rows = training()
    else:
        torch.set_num_threads(1)
        rows = controls([int(seed) for seed in options.seeds.split(",")], CONTROLS[options.part], options.workers)
    print(record(f"audit-{options.part}", rows, module="audit"))


if __name__ == "__main__":
    main()
