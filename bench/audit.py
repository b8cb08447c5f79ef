"""The audit on models of which the answer is known, over seeds; and on SmolLM2-135M with edits of our own.

`python -m bench.audit --part controls --seeds 0,1,2` runs every control of the self-test at each seed;
`--part never --seeds 0,...,9` runs the one that was never taught the facts. `--part smollm2 --edit FILE --facts capitals`
exports a saved edit and audits the checkpoint with the fast budget. Each writes bench/results/audit-PART.json.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.record import record
from repedit.attacks.controls.selftest import selftest

CONTROLS = {"controls": None, "never": ("NC1",), "also": ("NC2a", "NC2b", "NC2c", "PC8")}


def controls(seeds: list[int], names: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """One row a control and seed."""
    rows = []
    for seed in seeds:
        found = selftest(seed, controls=names, record=False, progress=False)
        rows += [{"seed": seed, "passed": check.passed, **asdict(check)} for check in found.checks]
        print(
            seed,
            f"{found.seconds:.0f} s",
            [(c.control, c.found, round(c.recovered, 2)) for c in found.checks],
            flush=True,
        )
    return rows


def smollm2(edit: Path, facts: str, folder: Path) -> list[dict[str, Any]]:
    """Export an edit, audit it with the fast budget, write the pages; a second audit shows what the cache saves."""
    lm = rp.load("smollm2-135m")
    target = folder / edit.stem
    if not target.exists():
        rp.export(rp.Edit.load(edit), source=lm, target=target)
    asked, rows = rp.data.facts(facts), []
    for name in ("first", "again"):
        out, start, busy = folder / f"{edit.stem}-{name}", time.time(), time.process_time()
        report = rp.audit(target, original="smollm2-135m", facts=asked, out=out, progress=False)
        rp.report.write(report, out)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row = {
            "name": name, "minutes": (time.time() - start) / 60, "core_minutes": (time.process_time() - busy) / 60,
            "peak_gib": memory, "verdict": report.verdict.word,
        }  # fmt: skip
        rows.append(row | {"recoveries": [asdict(r) for r in report.recoveries], "sentence": report.verdict.sentence})
        print(name, row, report.verdict, flush=True)
    return rows


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*CONTROLS, "smollm2"], required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--edit", type=Path)
    parser.add_argument("--facts", default="capitals")
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-audit"))
    options = parser.parse_args()
    if options.part == "smollm2":
        if options.edit is None:
            parser.error("--part smollm2 needs --edit FILE, a saved edit")
        rows = smollm2(options.edit, options.facts, options.folder)
    else:
        torch.set_num_threads(1)
        rows = controls([int(seed) for seed in options.seeds.split(",")], CONTROLS[options.part])
    print(record(f"audit-{options.part}", rows, module="audit"))


if __name__ == "__main__":
    main()
