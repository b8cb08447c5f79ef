"""The page of a whole run: what was asked, what was done, what it shows, and what it does not."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from repedit.arch import match_layout
from repedit.edit import Edit, describe_map
from repedit.errors import RepeditError
from repedit.io import archive
from repedit.io.checkpoint import open_shards
from repedit.io.files import make_folder, user_path, write_text
from repedit.io.text import JsonLines
from repedit.neurons.scores import Scores
from repedit.report.html import (
    TONES,
    Length,
    box,
    document,
    drawing,
    element,
    label,
    line,
    listed,
    mark,
    note,
    opening,
    polyline,
    section,
    table,
    told,
    values,
)
from repedit.report.limitations import MEASURES, limitations
from repedit.report.redaction import redacted_run, redacted_values
from repedit.report.tables import Table, number, plain
from repedit.rewrite.certificate import Certificate, TensorCertificate
from repedit.rewrite.checkpoint_architecture import architecture_of, used_specs
from repedit.runs import RunReport, run_file, run_report
from repedit.sites import Site

# --- Small charts of a run: a bar a layer, a spread a layer, a line over steps; as SVG of the size of those of an audit


WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 300.0, 205.0, 46.0, 12.0, 42.0
RIGHT, FLOOR = WIDTH - 10, HEIGHT - BOTTOM


def bars(name: str, values: Mapping[int, float], x: str, y: str) -> str:
    """One bar an integer of the x axis, from 0."""
    axes = _Axes(list(values), [0.0, *values.values()], half=0.5)
    wide = 0.7 * (axes.x(1) - axes.x(0))
    drawn = [
        box(axes.x(at) - wide / 2, axes.y(value), wide, FLOOR - axes.y(value), class_="bar")
        for at, value in values.items()
    ]
    most = max(values, key=lambda at: values[at])
    says = f"{y} by {x}: {len(values)} values, the largest {values[most]:.4g} at {x} {most}"
    return _figure(name, axes.drawn(says, x, y, drawn))


def spreads(name: str, values: Mapping[int, tuple[float, float, float, float]], x: str, y: str) -> str:
    """(low, middle, high, largest) at each integer of the x axis: a line, a stroke on it, a dot."""
    axes = _Axes(list(values), [v for held in values.values() for v in held], half=0.5)
    wide = 0.35 * (axes.x(1) - axes.x(0))
    drawn = []
    for at, (low, middle, high, most) in values.items():
        here = axes.x(at)
        drawn.append(line(here, axes.y(low), here, axes.y(high), class_="spread"))
        drawn.append(line(here - wide, axes.y(middle), here + wide, axes.y(middle), class_="spread"))
        drawn.append(mark(here, axes.y(most), 0, 2.6, class_="dot"))
    most = max(values, key=lambda at: values[at][3])
    says = f"{y} by {x}; the largest, {values[most][3]:.4g}, is at {x} {most}"
    return _figure(name, axes.drawn(says, x, y, [element("g", *drawn, class_="curve edited")]))


def course(name: str, values: Sequence[float]) -> str:
    """Values over steps, from step 1; where one is not finite the line has a gap."""
    finite = [value for value in values if math.isfinite(value)]
    axes = _Axes([1, len(values)], finite or [0.0])
    runs: list[list[tuple[Length, Length]]] = [[]]
    for step, value in enumerate(values, 1):
        if math.isfinite(value):
            runs[-1].append((axes.x(step), axes.y(value)))
        else:
            runs.append([])
    drawn = [
        polyline(points) if len(points) > 1 else mark(*points[0], 0, 2.6, class_="dot") for points in runs if points
    ]
    gaps = len(values) - len(finite)
    says = f"{name}: {_said(values[0])} at the first of {len(values)} steps, {_said(values[-1])} at the last" + (
        f"; {gaps} not finite" if gaps else ""
    )
    return _figure(name, axes.drawn(says, "training step", "", [element("g", *drawn, class_="curve edited")]))


def charts(*drawn: str) -> str:
    """Charts side by side, as far as there is room."""
    return element("div", *drawn, class_="charts") if any(drawn) else ""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axes:
    """Where values stand in a chart."""

    def __init__(self, across: Sequence[int], up: Sequence[float], half: float = 0.0) -> None:
        self._steps = (min(across), max(across))
        self._left, self._right = min(across) - half, max(max(across), min(across) + (0 if half else 1)) + half
        low, high = min(up), max(up)
        margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        self._low = low if low == 0 else low - margin
        self._high = high + margin

    def x(self, at: Length) -> float:
        return LEFT + (at - self._left) / (self._right - self._left) * (RIGHT - LEFT)

    def y(self, value: Length) -> float:
        return FLOOR - (value - self._low) / (self._high - self._low) * (FLOOR - TOP)

    def drawn(self, says: str, x: str, y: str, inside: Sequence[str]) -> str:
        """The chart with its axes."""
        parts = []
        for value in ticks(self._low, self._high):
            parts.append(line(LEFT, self.y(value), RIGHT, self.y(value), class_="axis" if value == 0 else "grid"))
            parts.append(label(LEFT - 6, self.y(value) + 4, f"{value:.4g}", class_="tick", text_anchor="end"))
        parts.append(line(LEFT, FLOOR, RIGHT, FLOOR, class_="axis"))
        first, last = self._steps
        for at in dict.fromkeys([first, *(int(t) for t in ticks(float(first), float(last)) if self._apart(t)), last]):
            parts.append(line(self.x(at), FLOOR, self.x(at), FLOOR + 4, class_="axis"))
            parts.append(label(self.x(at), FLOOR + 17, str(at), class_="tick", text_anchor="middle"))
        parts.append(
            label((LEFT + RIGHT) / 2, HEIGHT - 6, f"{x}; up: {y}" if y else x, class_="tick", text_anchor="middle")
        )
        return drawing(WIDTH, HEIGHT, says, *parts, *inside)

    def _apart(self, at: float) -> bool:
        """Whether a tick is whole and stands far enough from both ends to be read."""
        return at == int(at) and min(self.x(at) - self.x(self._steps[0]), self.x(self._steps[1]) - self.x(at)) > 22


def _said(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "n/a"


def _figure(name: str, drawn: str) -> str:
    return element("figure", element("figcaption", text=name), drawn)


# --- What steps showed while they ran, as they showed it: tables, generations side by side, lines


def items(run: RunReport, *verbs: str) -> list[str]:
    """Everything the steps with these verbs showed, under a heading a step."""
    parts, heading = list[str](), 0
    for stage, item in run.display(*verbs):
        if stage.number != heading:
            heading = stage.number
            parts.append(element("h3", text=f"Step {stage.number}, {stage.verb}"))
        parts.append(_item(item))
    return parts


def first_tables(run: RunReport, *verbs: str) -> list[str]:
    """The first table that each of the steps with these verbs showed: what a reader asks for first."""
    found = dict[int, str]()
    for stage, item in run.display(*verbs):
        if item["kind"] == "table" and stage.number not in found:
            found[stage.number] = element("p", text=f"Step {stage.number}: {item['title']}", class_="caption")
            found[stage.number] += table(Table(item["columns"], item["rows"]))
    return list(found.values())


def _item(item: Mapping[str, Any]) -> str:
    kind = item["kind"]
    if kind == "line":
        return note(item["text"])
    if kind == "json":
        return values(item["value"] if isinstance(item["value"], Mapping) else {"found": item["value"]})
    if kind == "generations":
        return element("p", text=item["title"], class_="caption") + beside(item["columns"], item["rows"])
    caption = element("p", text=item["title"], class_="caption") if item["title"] else ""
    return caption + table(Table(item["columns"], item["rows"]), item["title"])


def beside(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Each prompt with what every model wrote, side by side; one below the other where there is no room."""
    parts = []
    for prompt, *texts in rows:
        sides = [
            element("figure", element("figcaption", text=name), element("pre", text=text))
            for name, text in zip(columns[1:], texts, strict=True)
        ]
        first = element("pre", text=prompt, class_="prompt")
        parts.append(element("div", first, element("div", *sides, class_="sides"), class_="answer"))
    return "".join(parts)


# --- The first parts of the page of a run: what was asked, of which data and model, and what was carried out


def request(run: RunReport) -> list[str]:
    """The file, and every step with its command line and what became of it."""
    rows = [
        [
            str(stage.number), stage.state,
            shlex.join(["repedit", *stage.record.command]) if stage.record else f"repedit {stage.verb} (see the file)",
            f"{stage.record.seconds:.1f}" if stage.record else "n/a", str(stage.table.get("out", "")),
        ]
        for stage in run.steps
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
        str(s.table[key]) for s in run.steps for key in ("model", "base", "original") if s.table.get(key)
    )
    prints = dict.fromkeys(str(o["model"]) for o in run.provenances.values() if o.get("model"))
    rows = [["asked for as", ", ".join(names) or "no model is named"]]
    rows += [["sha256 of weights and config", name] for name in prints]
    for out in run.checkpoints:
        rows += _anatomy(out, run.file.parent / out, run.redacted)
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
    for out, origin in run.provenances.items():
        for role, held in (origin.get("data") or {}).items():
            if isinstance(held, Mapping):
                counted = next((f"{held[unit]:,} {unit}" for unit in ("tokens", "rows", "facts") if unit in held), "")
                rows[(role, str(held.get("name", "")), counted, str(held.get("hash", "")))] = out
    for out, report in run.audits.items():
        for role, digest in (report.context.get("hashes") or {}).items():
            rows[(f"audit: {role}", "", "", str(digest))] = out
    for stage in run.steps:
        for name, digest in (stage.record.inputs if stage.record else {}).items():
            rows[("file", name, "", digest)] = f"step {stage.number}"
    found = [[*row, used] for row, used in rows.items()]
    return Table(("role", "name", "size", "hash", "used for"), found, "" if found else "No step left a record of data.")


def _circumstances(run: RunReport) -> Table:
    seeds = {f"step {s.number}, {s.verb}": str(s.table["seed"]) for s in run.steps if "seed" in s.table}
    seeds |= {f"provenance of {out}": str(o["seed"]) for out, o in run.provenances.items() if o.get("seed") is not None}
    seeds |= {
        f"audit {out}": ", ".join(map(str, r.context["seeds"]))
        for out, r in run.audits.items()
        if r.context.get("seeds")
    }
    rows = [[f"seed, {where}", value] for where, value in seeds.items()] or [
        ["seed", "none was given; every verb begins from 0"]
    ]
    versions: dict[str, list[str]] = {}
    for stage in run.steps:
        for name, value in (stage.record.versions if stage.record else {}).items():
            if value not in versions.setdefault(name, []):
                versions[name].append(value)
    return Table(("what", "value"), rows + [[name, " and ".join(found)] for name, found in versions.items()])


def _anatomy(out: str, folder: Path, hidden: bool) -> list[list[str]]:
    """Family and size of a checkpoint, from its config and headers."""
    try:
        specs = used_specs(open_shards(folder))
        found = architecture_of(folder)
        layout = match_layout(found, specs)
    except RepeditError as error:
        return [[f"{out}", "no whole model" if hidden else f"no whole model: {error}"]]
    count = sum(prod(spec.shape) for spec in specs.values())
    kinds: dict[str, Any] = dict.fromkeys(str(spec.dtype).removeprefix("torch.") for spec in specs.values())
    size = f"{len(layout.layers)} layers of width {layout.width}, {found.n_heads} heads, {count:,} numbers in {len(specs)} tensors ({', '.join(kinds)})"
    return [[f"{out}: family", found.model_type], [f"{out}: size", size]]


# --- How a run chose what to change: scores, what was selected of each layer, the course of a training


NEURONS, RANK = re.compile(r"^(\d+) of (\d+) neurons"), re.compile(r"removes rank (\d+)$")
"""What `describe_map` says of a mask and of everything else."""
METHOD = ("method", "formula", "source", "sites", "rank", "steps_run")
"""What of a provenance stands first."""
WORDS = {
    "forget": "forget loss, nats",
    "right": "share of forget tokens still right",
    "divergence": "divergence on retain, nats",
}
"""What the histories of a projection's training hold."""
Counts = dict[tuple[str, str], dict[int, float]]
"""By point and kind: a number by layer."""


def scores(run: RunReport) -> list[str]:
    """The spread of the scores of each layer; nothing where none were written."""
    parts = []
    for name, path in run.of_kind("scores"):
        found = Scores.load(path)
        by_point: dict[str, dict[int, tuple[float, float, float, float]]] = {}
        for site, score in found.items():
            kept = score.values[torch.isfinite(score.values)]
            if len(kept):
                low, middle, high = kept.quantile(torch.tensor([0.01, 0.5, 0.99], dtype=kept.dtype)).tolist()
                by_point.setdefault(str(site.point), {})[site.layer] = (low, middle, high, float(kept.max()))
        drawn = [spreads(f"{point}: score by layer", layers, "layer", "score") for point, layers in by_point.items()]
        words = (
            f"{name}: lines from the 1st to the 99th percentile of the neurons of a layer, a stroke at the median, a dot at the largest; "
            f"higher is more specific to what is to be forgotten. Median rank correlation of the two importances: {found.agreement:.2f}."
        )
        parts.append(charts(*drawn) + note(words))
    return [*parts, *items(run, "score", "collect")]


def selection(run: RunReport) -> list[str]:
    """What an edit removes of each layer: neurons, or directions."""
    parts = []
    for name, counts in _counts(run).items():
        drawn = [bars(f"{point}: {kind} removed", layers, "layer", kind) for (point, kind), layers in counts.items()]
        parts.append(charts(*drawn) + note(f"{name}: {_total(counts)}"))
    return parts


def totals(run: RunReport) -> dict[str, str]:
    """What every edit removes, in one line each."""
    return {name: _total(counts) for name, counts in _counts(run).items()}


def training(run: RunReport) -> list[str]:
    """The losses of every training, step by step, as far as they were kept."""
    parts = []
    for name, (origin, records) in _courses(run).items():
        drawn = [course(what, held) for what, held in records.items() if held]
        stopped = origin.get("stopped")
        words = plain(stopped) if stopped else ""
        parts.append(
            charts(*drawn)
            + note(f"{name}: {origin.get('method', 'training')}" + (f"; it ended so: {words}." if words else "."))
        )
    return [*parts, *items(run, "unlearn")]


def settings(run: RunReport) -> list[str]:
    """Method, formula and source of everything that was found, then its options, folded where they are many."""
    parts = []
    for name, origin in run.provenances.items():
        held = [[key, plain(origin[key])] for key in METHOD if origin.get(key) is not None]
        options = [[key, plain(value)] for key, value in (origin.get("options") or {}).items() if value is not None]
        if held or options:
            parts += [element("h3", text=name), table(Table(("what", "value"), held))]
            parts.append(table(Table(("option", "value"), options), "Options"))
    return parts


def described(run: RunReport) -> dict[str, Mapping[str, str]]:
    """What is done at each site, in words, of every edit that a checkpoint or a file holds."""
    found: dict[str, Mapping[str, str]] = {}
    for name, held in run.checkpoints.items():
        sites = held.manifest.get("sites") or {}
        found[name] = {site: row["map"] for site, row in sites.items()}
    for name, path in run.of_kind("edit"):
        found[name] = {str(site): describe_map(map_) for site, map_ in Edit.load(path).maps.items()}
    return {name: sites for name, sites in found.items() if sites}


def _counts(run: RunReport) -> dict[str, Counts]:
    """Neurons or directions removed, by layer."""
    found: dict[str, Counts] = {}
    for name, sites in described(run).items():
        for site, text in sites.items():
            neurons, rank = NEURONS.match(text), RANK.search(text)
            kind, number = ("neurons", neurons) if neurons else ("directions", rank)
            if number:
                at = Site.parse(site)
                found.setdefault(name, {}).setdefault((str(at.point), kind), {})[at.layer] = float(number[1])
    return found


def _total(counts: Counts) -> str:
    words = [
        f"{sum(layers.values()):,.0f} {kind} removed at {point} of {len(layers)} layers"
        for (point, kind), layers in counts.items()
    ]
    return f"{'; '.join(words)}."


def _courses(run: RunReport) -> dict[str, tuple[Mapping[str, Any], dict[str, Sequence[float]]]]:
    """(provenance, values by name) of every training of which the losses were kept."""
    found: dict[str, tuple[Mapping[str, Any], dict[str, Sequence[float]]]] = {}
    for name, origin in run.provenances.items():
        history = origin.get("history")
        if isinstance(history, Mapping):
            found[name] = origin, {WORDS.get(str(key), str(key)): list(held) for key, held in history.items()}
    for name, rows in _logs(run):
        records: dict[str, list[float]] = {}
        for row in redacted_values(rows) if run.redacted else rows:
            for key, value in (row.get("losses") or {}).items():
                records.setdefault(f"{key} loss", []).append(float("nan") if value is None else float(value))
        if records:
            found[name] = run.provenances.get(name, {}), dict(records)
    return found


def _logs(run: RunReport) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The records of gradient unlearning: in the delta, or in the file that `log` named."""
    for name, path in run.of_kind("delta"):
        yield name, archive.header_of(path).get("log", [])
    for stage in run.steps:
        log = Path(run.file.parent / str(stage.table.get("log", "")))
        if (
            stage.verb == "unlearn"
            and stage.table.get("log")
            and log.is_file()
            and str(stage.table.get("out")) not in run.saved
        ):
            yield (
                str(stage.table.get("out")),
                JsonLines(log).rows,
            )


# --- What a run changed in the weights: sites, tensors, how exactly, and the certificate


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


# --- The page of a whole run: what was asked, what was done, what it shows, and what it does not; for who must defend an edit


ABSENT = {
    "The model": "No step of this run says which model it is about.",
    "How it was found": "Nothing this run left says by which method it was found.",
    "How neurons were scored": "Not run: no score step of this run left scores, and no edit needed any from a file.",
    "What was selected": "Not run: this run left no edit of sites.",
    "How it was trained": "Not run, or not kept: no training of this run left its losses. unlearn keeps them in a .safetensors file, or in the file that log names.",
    "What changed in the weights": "Not run: this run left no edit, no difference and no checkpoint.",
    "How exact it is": "Not run: without an exported checkpoint nothing says how exactly weights equal an edit.",
    "Before and after": "Not run: no step measured the edited model beside the original (compare, prune or project).",
    "Under attack": "Not run: nobody attacked the edited model, so nothing is known of what brings the removed back. An audit step does it.",
}
"""What stands in place of a part that a run does not have."""


def run_page(path: str | Path, *, hide_items: bool = False) -> str:
    """One HTML page that tells a whole run and needs no network: asked, chosen, changed, measured, attacked, not shown.

    Every file of the run is hashed again; what is not as the run left it stands first.

    Args:
        path: the TOML file of a run, or the folder that holds one.
        hide_items: withhold every text of an item, see `repedit.report.redaction`.
    Raises:
        NotFound: if there is no run. ArgumentError: if the folder holds several.
        DataError, CheckpointError: if the file or its journal is not that of a run.
    """
    return rendered(run_report(path), hide_items=hide_items)


def write_run(path: str | Path, target: str | Path | None = None, *, hide_items: bool = False) -> Path:
    """Write the page of a run; beside its file, as NAME.report.html, where no target is given. A folder gets report.html.

    Raises:
        As `run_page`; CheckpointError: if it cannot be written.
    """
    file = run_file(path)
    place = file.with_suffix(".report.html") if target is None else user_path(target)
    place = place / "report.html" if place.is_dir() else place
    text = run_page(file, hide_items=hide_items)
    make_folder(place.parent)
    write_text(place, text)
    return place


def rendered(run: RunReport, *, hide_items: bool = False) -> str:
    """The page of a run that was gathered."""
    run = redacted_run(run) if hide_items else run
    parts = {
        "What was asked": request(run),
        "The model": model(run),
        "How it was found": settings(run),
        "How neurons were scored": scores(run),
        "What was selected": selection(run),
        "How it was trained": training(run),
        "What changed in the weights": tensors(run),
        "How exact it is": exactness(run),
        "Before and after": items(run, *MEASURES),
        "Under attack": _attacks(run),
        "What has not been shown": [listed(limitations(run), "plain")],
        "How to make it again": [
            element(
                "pre",
                text=f"repedit run {run.file.name}\nrepedit reproduce {run.file.name}\nrepedit report {run.file.name}",
            )
        ],
    }
    return document(
        f"{run.file.stem}: {_outcome(run)[0]}", [_head(run), *(_part(title, inside) for title, inside in parts.items())]
    )


def _part(title: str, inside: Sequence[str]) -> str:
    """A section, which says so where it has nothing to say."""
    return section(title, *inside) if any(inside) else section(title, element("p", text=ABSENT[title], class_="absent"))


def _head(run: RunReport) -> str:
    """Name, outcome, and whatever does not hold any more, before anything else."""
    word, tone, sentence = _outcome(run)
    done = sum(stage.done for stage in run.steps)
    names = dict.fromkeys(str(stage.table["model"]) for stage in run.steps if stage.table.get("model"))
    facts = [
        f"run {run.file.name}",
        f"{done} of {len(run.steps)} steps carried out",
        *(f"model {name}" for name in names),
    ]
    facts += [f"{name}: {origin['method']}" for name, origin in run.provenances.items() if origin.get("method")]
    alarm = (
        element("div", element("h2", text="Not as the run left it"), listed(run.faults, "plain"), class_="alarm")
        if run.faults
        else ""
    )
    intact = (
        ""
        if run.faults or not done
        else note(
            "Every file that the steps were given, and all they wrote, still has the sha256 it had then; models are told by the hashes below."
        )
    )
    return element(
        "header", element("h1", text=f"{run.file.stem}: {word}", class_=tone), element("p", text=sentence, class_="lead"), alarm, intact,
        listed(facts, "facts"), section("In brief", listed(_brief(run), "plain"), *first_tables(run, *MEASURES)),
    )  # fmt: skip


def _brief(run: RunReport) -> list[str]:
    """The numbers a reader asks for first, each told in full below."""
    found = [f"{name}: {words}" for name, words in totals(run).items()]
    for name, held in run.checkpoints.items():
        plan, certificate = held.manifest.get("plan") or {}, held.manifest.get("certificate")
        most = max((row["relative_change"] or 0.0 for row in plan.values()), default=0.0)
        found.append(
            f"{run.label(name)}: {len(plan)} tensors changed, by {most:.3f} of their size at most; {held.describe()}."
        )
        if certificate:
            found.append(
                f"{name}: {certificate['form']}, {certificate['exactness']}, largest leak along a removed direction {certificate['worst_leak']:.1e}."
            )
    for name, report in run.audits.items():
        found.append(f"{run.label(name)}: {report.verdict.word}; {report.verdict.rule}".rstrip(".") + ".")
    return found or ["Nothing: no step left anything that can be read."]


def _outcome(run: RunReport) -> tuple[str, str, str]:
    """(words, tone, sentence): what the worst audit says; that there was none."""
    if run.faults:
        return (
            "CHANGED SINCE THE RUN",
            "bad",
            "Something this page speaks of is not what the run left. Carry the run out again before you rely on it.",
        )
    if not run.audits:
        return (
            "NOT AUDITED",
            "open",
            "The edit was made and measured as told below; nobody attacked it, so nothing shows that anything is gone.",
        )
    words = dict.fromkeys(report.verdict.word for report in run.audits.values())
    worst = max(run.audits.values(), key=lambda report: report.verdict.exit_code)
    return " / ".join(words), TONES.get(worst.verdict.word, "bad"), worst.verdict.sentence


def _attacks(run: RunReport) -> list[str]:
    """Every audit: its verdict, the forest, the tables."""
    parts = []
    for name, report in run.audits.items():
        parts += [opening(report, "h3", f"{run.label(name)}: "), *told(report, "h3")]
        parts.append(note(f"Settings, guesses that need no knowledge and diagnostics are in {name}/audit.html."))
    return parts
