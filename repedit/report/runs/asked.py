"""The first parts of the page of a run: what was asked, of which data and model, and what was carried out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from repedit.arch import anatomy
from repedit.errors import RepeditError
from repedit.io.checkpoint import open_shards
from repedit.report.runs.gathering import RunReport
from repedit.report.sections import element, note, table
from repedit.report.tables import Table
from repedit.rewrite.families import architecture_of, used_specs


def request(run: RunReport) -> list[str]:
    """The file, and every step with its command line and what became of it."""
    rows = [
        [
            str(stage.number), stage.state,
            shlex.join(["repedit", *stage.entry.words]) if stage.entry else f"repedit {stage.verb} (see the file)",
            f"{stage.entry.seconds:.1f}" if stage.entry else "n/a", str(stage.asked.get("out", "")),
        ]
        for stage in run.stages
    ]  # fmt: skip
    return [
        element("pre", text=run.text.strip("\n")),
        table(Table(("step", "state", "command", "seconds", "writes"), rows)),
        element("h3", text="Data"), table(_data(run)),
        element("h3", text="Seeds and versions"), table(_circumstances(run)),
    ]  # fmt: skip


def model(run: RunReport) -> list[str]:
    """Which model it is, as the checkpoints say, and the hashes of the files it was read from."""
    names = dict.fromkeys(
        str(s.asked[key]) for s in run.stages for key in ("model", "base", "original") if s.asked.get(key)
    )
    prints = dict.fromkeys(str(o["model"]) for o in run.origins.values() if o.get("model"))
    rows = [["asked for as", ", ".join(names) or "no model is named"]]
    rows += [["sha256 of weights and config", name] for name in prints]
    for out in run.checkpoints:
        rows += _anatomy(out, run.file.parent / out, run.hidden)
    bases = {name: held.manifest["base"] for name, held in run.checkpoints.items() if "base" in held.manifest}
    parts = [table(Table(("what", "value"), rows))]
    if not run.checkpoints:
        parts.append(note("No checkpoint was written, so family and size are not known to this page."))
    for out, base in bases.items():
        hashes = [[name, digest] for name, digest in base["files"].items()]
        parts += [
            element("h3", text=f"Files {out} was made from: {base['name']}"),
            table(Table(("file", "sha256"), hashes), "Hashes"),
        ]
    return parts


def _data(run: RunReport) -> Table:
    """Every set of rows that something was found with or asked about, and every file a step was given, with its hash."""
    rows: dict[tuple[str, ...], str] = {}
    for out, origin in run.origins.items():
        for role, held in (origin.get("data") or {}).items():
            if isinstance(held, Mapping):
                counted = next((f"{held[unit]:,} {unit}" for unit in ("tokens", "rows", "facts") if unit in held), "")
                rows[(role, str(held.get("name", "")), counted, str(held.get("hash", "")))] = out
    for out, report in run.audits.items():
        for role, digest in (report.context.get("hashes") or {}).items():
            rows[(f"audit: {role}", "", "", str(digest))] = out
    for stage in run.stages:
        for name, digest in (stage.entry.inputs if stage.entry else {}).items():
            rows[("file", name, "", digest)] = f"step {stage.number}"
    found = [[*row, used] for row, used in rows.items()]
    return Table(("role", "name", "size", "hash", "used for"), found, "" if found else "No step left a record of data.")


def _circumstances(run: RunReport) -> Table:
    seeds = {f"step {s.number}, {s.verb}": str(s.asked["seed"]) for s in run.stages if "seed" in s.asked}
    seeds |= {f"provenance of {out}": str(o["seed"]) for out, o in run.origins.items() if o.get("seed") is not None}
    seeds |= {
        f"audit {out}": ", ".join(map(str, r.context["seeds"]))
        for out, r in run.audits.items()
        if r.context.get("seeds")
    }
    rows = [[f"seed, {where}", value] for where, value in seeds.items()] or [
        ["seed", "none was given; every verb begins from 0"]
    ]
    versions: dict[str, list[str]] = {}
    for stage in run.stages:
        for name, value in (stage.entry.versions if stage.entry else {}).items():
            if value not in versions.setdefault(name, []):
                versions[name].append(value)
    return Table(("what", "value"), rows + [[name, " and ".join(found)] for name, found in versions.items()])


def _anatomy(out: str, folder: Path, hidden: bool) -> list[list[str]]:
    """Family and size of a checkpoint, from its config and headers."""
    try:
        specs = used_specs(open_shards(folder))
        found = architecture_of(folder)
        plan = anatomy(found, specs)
    except RepeditError as error:
        return [[f"{out}", "no whole model" if hidden else f"no whole model: {error}"]]
    count = sum(prod(spec.shape) for spec in specs.values())
    kinds: dict[str, Any] = dict.fromkeys(str(spec.dtype).removeprefix("torch.") for spec in specs.values())
    size = f"{len(plan.layers)} layers of width {plan.width}, {found.n_heads} heads, {count:,} numbers in {len(specs)} tensors ({', '.join(kinds)})"
    return [[f"{out}: family", found.model_type], [f"{out}: size", size]]
