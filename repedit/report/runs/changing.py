"""What a run changed in the weights: sites, tensors, how exactly, and the certificate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from repedit.io import archive
from repedit.report.runs.choosing import described
from repedit.report.runs.gathering import RunReport
from repedit.report.runs.showing import items
from repedit.report.sections import element, note, table
from repedit.report.tables import Table, number
from repedit.rewrite.certificates import Certificate, TensorCertificate
from repedit.sites import Site

HASHES = (
    "The sha256 of each of them before and after is in repedit.json; every other tensor is byte-identical to the base."
)
CONVERTED = "The sha256 of each of them before and after is in repedit.json; every tensor was converted to {}."


def tensors(run: RunReport) -> list[str]:
    """Every tensor that an export touched, the largest relative change first; then what `diff` found."""
    parts = []
    for name, held in run.checkpoints.items():
        plan = held.manifest.get("plan") or {}
        rows = sorted(
            plan.items(),
            key=lambda item: -(item[1]["relative_change"] if item[1]["relative_change"] is not None else float("inf")),
        )
        listed = [[tensor, "; ".join(row["operations"]), _relative(row["relative_change"])] for tensor, row in rows]
        parts.append(
            element("h3", text=f"{name}: {len(rows)} tensors changed" if rows else f"{name}: no list of tensors")
        )
        parts += _sizes(held.manifest)
        parts.append(
            table(
                Table(
                    ("tensor", "what was done", "relative change"),
                    listed,
                    (CONVERTED.format(held.manifest["dtype"]) if held.manifest.get("dtype") else HASHES)
                    if listed
                    else "",
                ),
                "Tensors, largest change first",
            )
        )
    for name, _ in run.of_kind("edit"):
        parts.append(
            note(
                f"{name} is an edit in a file, {len(described(run).get(name, {}))} sites: a value that changes no weight by itself."
            )
        )
    for name, path in run.of_kind("delta"):
        count = len(archive.header_of(path).get("provenance", {}).get("start", {}))
        parts.append(
            note(
                f"{name} is a difference in a file{f', of {count} tensors' if count else ''}: a value that changes no weight by itself."
            )
        )
    return [*parts, *items(run, "diff")]


def exactness(run: RunReport) -> list[str]:
    """One row a site: what is done there, and how exactly the weights equal it."""
    parts = []
    for name, held in run.checkpoints.items():
        sites = held.manifest.get("sites") or {}
        rows = [[site, sites[site]["map"], sites[site]["exactness"]] for site in sorted(sites, key=Site.parse)]
        words = ", ".join(
            f"{sum(row[2] == kind for row in rows)} sites {kind}" for kind in dict.fromkeys(row[2] for row in rows)
        )
        parts.append(element("h3", text=f"{name}: {words or 'no sites'}"))
        if not rows:
            parts.append(
                note(
                    "The weights were changed as such, not at sites; what is in the files is exactly the change, rounded once."
                )
            )
        parts += [
            table(Table(("site", "edit", "exactness"), rows), "Sites"),
            *_certificate(held.manifest.get("certificate")),
        ]
        parts.append(note(f"Files: {held.describe()}."))
    return parts


def _certificate(found: Mapping[str, Any] | None) -> list[str]:
    """What is left of removed directions, in words and tensor by tensor."""
    if found is None:
        return [note("No certificate: it speaks of directions that a projection removes, and this edit removes none.")]
    held = {**found, "tensors": {name: TensorCertificate(**row) for name, row in found["tensors"].items()}}
    held["widths"] = tuple(found["widths"]) if found.get("widths") else None
    rows = [
        [name, str(row.rank), f"{row.leak_computed:.1e}", f"{row.leak:.1e}", f"{row.residue:.1e}", row.dtype]
        for name, row in sorted(held["tensors"].items(), key=lambda item: _natural(item[0]))
    ]
    columns = ("tensor", "rank", "leak computed", "leak as stored", "of the original", "dtype")
    words = "Leak: what is left of a tensor along the removed directions, as a share of what was there."
    return [
        *(element("p", text=line) for line in Certificate(**held).describe().split("\n")),
        table(Table(columns, rows, words if rows else ""), "Certificate, tensor by tensor"),
    ]


def _sizes(manifest: Mapping[str, Any]) -> list[str]:
    """What changed beside the values of tensors."""
    said = []
    changes = [
        row["relative_change"] for row in (manifest.get("plan") or {}).values() if row["relative_change"] is not None
    ]
    if changes:
        said.append(
            f"Relative change |after - before| / |before|: {number(max(changes), 3)} at most, {number(min(changes), 3)} at least."
        )
    if manifest.get("parameters"):
        said.append(
            f"{manifest['parameters']['before']:,} numbers in the files before, {manifest['parameters']['after']:,} after."
        )
    if manifest.get("unties"):
        said.append(f"Untied: {', '.join(f'{a} from {b}' for a, b in manifest['unties'].items())}.")
    if manifest.get("added"):
        said.append(f"New tensors: {', '.join(manifest['added'])}.")
    if manifest.get("ranks"):
        said.append(
            f"An adapter of {len(manifest['ranks'])} modules, rank {max(manifest['ranks'].values())} at most: who has it and the base has both models."
        )
    return [element("p", text=" ".join(said))] if said else []


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _relative(value: float | None) -> str:
    return "new or another shape" if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"
