"""The page of a whole run: what was asked, what was done, what it shows, and what it does not."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from repedit.arch import match_layout
from repedit.arguments import checked
from repedit.edit import Edit, describe_map
from repedit.errors import RepeditError
from repedit.io import archive
from repedit.io.checkpoint import open_shards
from repedit.io.files import make_folder, user_path, write_text
from repedit.io.text import JsonLines
from repedit.neurons.scores import Scores
from repedit.plot import specialization
from repedit.plot.reports import bars, course, drops, ranges
from repedit.report.pages import AuditFigures, render, svg, tone
from repedit.report.redaction import redacted_run, redacted_values
from repedit.report.tables import Table, format_value
from repedit.rewrite.certificate import Certificate
from repedit.rewrite.checkpoint_architecture import architecture_of, used_specs
from repedit.rewrite.verification import Verification
from repedit.runs import RunReport, run_file, run_report
from repedit.sites import Site


@checked
def run_page(path: str | Path, *, hide_items: bool = False) -> str:
    """One HTML page about a whole run, without network requests: asked, chosen, changed, measured, attacked, not shown.

    Every file of the run is hashed again; the page begins with what is not as the run left it.

    Args:
        path: the TOML file of a run, or the folder that holds one.
        hide_items: redact every text of an item, see `repedit.report.redaction`.
    Raises:
        NotFound: if there is no run. ArgumentError: if the folder holds several.
        DataError, CheckpointError: if the file or its journal is not that of a run.
    """
    return rendered(run_report(path), hide_items=hide_items)


@checked
def write_run(path: str | Path, target: str | Path | None = None, *, hide_items: bool = False) -> Path:
    """Write the page of a run: to the target, to report.html in it if it is a folder, or to NAME.report.html beside the run.

    Raises:
        As `run_page`; CheckpointError: if it cannot be written.
    """
    file = run_file(path)
    page = file.with_suffix(".report.html") if target is None else user_path(target)
    page = page / "report.html" if page.is_dir() else page
    text = run_page(file, hide_items=hide_items)
    make_folder(page.parent)
    write_text(page, text)
    return page


def rendered(run: RunReport, *, hide_items: bool = False) -> str:
    """The page of a run that was read."""
    run = redacted_run(run) if hide_items else run
    word, style, sentence = _outcome(run)
    maps = _maps(run)
    removed = _removed(maps)
    return render(
        "run", title=f"{run.file.stem}: {word}", style=style, sentence=sentence, run=run, maps=maps,
        removed=[(out, _total(counts)) for out, counts in removed.items()], first_tables=partial(_first_tables, run),
        commands=_commands(run), data=_data(run), versions=_seeds_and_versions(run), models=_models(run), bases=_bases(run),
        methods=_methods(run), specialization=_specialization(run), scores=_scores(run), effects=_effects(run), selections=_selections(removed), trainings=_trainings(run),
        changed=_changed(run), deltas=_deltas(run), exactness=_exactness(run), leaks=_leaks, certified=_certificate, unattacked=_unattacked(run),
        audits=[(out, AuditFigures.of(report)) for out, report in run.audits.items()],
    )  # fmt: skip


def _outcome(run: RunReport) -> tuple[str, str, str]:
    """(words, style, sentence) of the worst audit, or of there being none."""
    if run.faults:
        return (
            "CHANGED SINCE THE RUN", "bad",
            "Something on this page is not as the run left it. Carry the run out again before you rely on it.",
        )  # fmt: skip
    if not run.audits:
        return (
            "NOT AUDITED", "open",
            "The edit was made and measured as described below; it was not attacked, so nothing shows that anything is gone.",
        )  # fmt: skip
    words = dict.fromkeys(report.title for report in run.audits.values())
    worst = max(run.audits.values(), key=lambda report: report.verdict.exit_code)
    return " / ".join(words), tone(worst), worst.verdict.sentence


def _first_tables(run: RunReport, *verbs: str) -> list[tuple[int, str, Table]]:
    """(step, title, table) of the first table that each of the steps with these verbs showed."""
    first: dict[int, tuple[int, str, Table]] = {}
    for step, item in run.display(*verbs):
        if item["kind"] == "table":
            first.setdefault(step.number, (step.number, item["title"], Table(item["columns"], item["rows"])))
    return list(first.values())


def _unattacked(run: RunReport) -> list[str]:
    """The checkpoints that no audit of the run attacked."""
    attacked = {Path(str(step.table.get("edited"))) for step in run.steps if step.verb == "audit" and step.done}
    return [out for out in run.checkpoints if Path(out) not in attacked]


# --- What was asked, and of which data and model


def _commands(run: RunReport) -> Table:
    rows = [
        [
            str(step.number), step.state,
            shlex.join(["repedit", *step.record.command]) if step.record else f"repedit {step.verb} (see the file)",
            f"{step.record.seconds:.1f}" if step.record else "n/a", str(step.table.get("out", "")),
        ]
        for step in run.steps
    ]  # fmt: skip
    return Table(("step", "state", "command", "seconds", "writes"), rows)


def _data(run: RunReport) -> Table:
    """Every data set that a step used or was asked about, and every file that was given to a step, with its hash."""
    used_for: dict[tuple[str, ...], str] = {}
    for out, origin in run.provenances.items():
        for role, data in (origin.get("data") or {}).items():
            if isinstance(data, Mapping):
                size = next((f"{data[unit]:,} {unit}" for unit in ("tokens", "rows", "facts") if unit in data), "")
                used_for[(role, str(data.get("name", "")), size, str(data.get("hash", "")))] = out
    for out, report in run.audits.items():
        for role, digest in (report.context.get("hashes") or {}).items():
            used_for[(f"audit: {role}", "", "", str(digest))] = out
    for step in run.steps:
        for name, digest in (step.record.inputs if step.record else {}).items():
            used_for[("file", name, "", digest)] = f"step {step.number}"
    rows = [[*row, use] for row, use in used_for.items()]
    return Table(("role", "name", "size", "hash", "used for"), rows, "" if rows else "No step left a record of data.")


def _seeds_and_versions(run: RunReport) -> Table:
    seeds = {f"step {s.number}, {s.verb}": str(s.table["seed"]) for s in run.steps if "seed" in s.table}
    seeds |= {f"provenance of {out}": str(o["seed"]) for out, o in run.provenances.items() if o.get("seed") is not None}
    audit_seeds = {out: report.context.get("seeds") or () for out, report in run.audits.items()}
    seeds |= {f"audit {out}": ", ".join(map(str, values)) for out, values in audit_seeds.items() if values}
    rows = [[f"seed, {where}", value] for where, value in seeds.items()]
    versions: dict[str, dict[str, None]] = {}
    for step in run.steps:
        for package, version in (step.record.versions if step.record else {}).items():
            versions.setdefault(package, {})[version] = None
    rows = rows or [["seed", "none was given; every verb starts from 0"]]
    return Table(("what", "value"), rows + [[package, " and ".join(used)] for package, used in versions.items()])


def _models(run: RunReport) -> Table:
    """The model of the run, and the family and size of its checkpoints."""
    names = dict.fromkeys(
        str(s.table[key]) for s in run.steps for key in ("model", "base", "original") if s.table.get(key)
    )
    fingerprints = dict.fromkeys(str(o["model"]) for o in run.provenances.values() if o.get("model"))
    rows = [["asked for as", ", ".join(names) or "no model is named"]]
    rows += [["sha256 of weights and config", fingerprint] for fingerprint in fingerprints]
    for out in run.checkpoints:
        rows += _family_and_size(out, run.file.parent / out, run.redacted)
    note = "" if run.checkpoints else "No checkpoint was written, so family and size are not known to this page."
    return Table(("what", "value"), rows, note)


def _family_and_size(out: str, folder: Path, hidden: bool) -> list[list[str]]:
    """From the config of a checkpoint and the headers of its files."""
    try:
        specs = used_specs(open_shards(folder))
        architecture = architecture_of(folder)
        layout = match_layout(architecture, specs)
    except RepeditError as error:
        return [[out, "no whole model" if hidden else f"no whole model: {error}"]]
    count = sum(prod(spec.shape) for spec in specs.files.values())
    dtypes = dict.fromkeys(str(spec.dtype).removeprefix("torch.") for spec in specs.files.values())
    size = (
        f"{len(layout.layers)} layers of width {layout.width}, {architecture.n_heads} heads, "
        f"{count:,} numbers in {len(specs.files)} tensors ({', '.join(dtypes)})"
    )
    return [[f"{out}: family", architecture.model_type], [f"{out}: size", size]]


def _bases(run: RunReport) -> list[tuple[str, str, Table]]:
    """(checkpoint, base, hashes of the files of the base)."""
    bases = {out: export.manifest["base"] for out, export in run.checkpoints.items() if "base" in export.manifest}
    return [
        (out, base["name"], Table(("file", "sha256"), [[name, digest] for name, digest in base["files"].items()]))
        for out, base in bases.items()
    ]


# --- How a run chose what to change


NEURONS, RANK = re.compile(r"^(\d+) of (\d+) neurons"), re.compile(r"removes rank (\d+)$")
"""What `describe_map` says of a mask, and of a projection."""
METHOD = ("method", "formula", "source", "sites", "rank", "steps_run")
"""Fields of a provenance that are shown first."""
HISTORY_NAMES = {
    "forget": "forget loss, nats", "right": "share of forget tokens still right", "divergence": "divergence on retain, nats",
}  # fmt: skip
"""What the values in the history of a projection are."""
Counts = Mapping[tuple[str, str], Mapping[int, float]]
"""Number removed by layer, by point and kind ("neurons" or "directions")."""
Charts = list[tuple[str, Markup]]
"""Charts as SVG with their titles."""


def _methods(run: RunReport) -> list[tuple[str, Table, Table]]:
    """(output, method with formula and source, options)."""
    methods = []
    for out, origin in run.provenances.items():
        values = [[key, format_value(origin[key])] for key in METHOD if origin.get(key) is not None]
        options = [[key, format_value(v)] for key, v in (origin.get("options") or {}).items() if v is not None]
        if values or options:
            methods.append((out, Table(("what", "value"), values), Table(("option", "value"), options)))
    return methods


def _specialization(run: RunReport) -> list[tuple[str, Markup]]:
    """The score of every neuron, for each file of scores; not in a redacted page, since it names the data."""
    figures = []
    for out, path in () if run.redacted else run.of_kind("scores"):
        scores = Scores.load(path)
        if not any(bool(torch.isfinite(score.values).any()) for score in scores.values()):
            continue  # every neuron is protected, so there is no score to draw
        figure = specialization(scores)
        figure.set_label(
            f"{out}: the score of every neuron, one column per layer; orange is specific to the forget set"
        )
        figures.append((out, svg(figure)))
    return figures


def _effects(run: RunReport) -> list[tuple[str, Markup]]:
    """The drops that prune and compare measured, with their intervals."""
    charts = []
    for step, item in run.display("prune", "compare"):
        rows = (
            [row for row in item.get("rows", ()) if isinstance(row[2], int | float)]
            if item["kind"] == "effects"
            else []
        )
        if rows:
            values = [
                (e, of, float(drop), *(math.nan if v is None else float(v) for v in bounds))
                for e, of, drop, *bounds in rows
            ]
            charts.append((f"Step {step.number}, {step.verb}: drop, with 95 % intervals", svg(drops(values))))
    return charts


def _scores(run: RunReport) -> list[tuple[Charts, str]]:
    """The distribution of the scores of each layer."""
    charts = []
    for out, path in run.of_kind("scores"):
        scores = Scores.load(path)
        by_point: dict[str, dict[int, tuple[float, float, float, float]]] = {}
        for site, score in scores.items():
            finite = score.values[torch.isfinite(score.values)]
            if len(finite):
                quantiles = torch.tensor([0.01, 0.5, 0.99], dtype=finite.dtype)
                low, middle, high = finite.quantile(quantiles).tolist()
                by_point.setdefault(str(site.point), {})[site.layer] = (low, middle, high, float(finite.max()))
        figures = [
            (f"{point}: score by layer", svg(ranges(layers, "layer", "score"))) for point, layers in by_point.items()
        ]
        note = (
            f"{out}: lines from the 1st to the 99th percentile of the neurons of a layer, a stroke at the median, a dot at the largest; "
            f"higher is more specific to what is to be forgotten. Median rank correlation of the two importances: {scores.agreement:.2f}."
        )
        charts.append((figures, note))
    return charts


def _selections(removed: Mapping[str, Counts]) -> list[tuple[Charts, str]]:
    """What each edit removes from each layer: neurons, or directions."""
    charts = []
    for out, counts in removed.items():
        figures = [
            (f"{point}: {kind} removed", svg(bars(layers, "layer", kind))) for (point, kind), layers in counts.items()
        ]
        charts.append((figures, f"{out}: {_total(counts)}"))
    return charts


def _trainings(run: RunReport) -> list[tuple[Charts, str]]:
    """The losses of every training, step by step, as far as they were kept."""
    charts = []
    for out, (origin, records) in _losses(run).items():
        figures = [(name, svg(course(name, values))) for name, values in records.items() if values]
        stopped = format_value(origin["stopped"]) if origin.get("stopped") else ""
        ending = f"; it stopped because of: {stopped}." if stopped else "."
        charts.append((figures, f"{out}: {origin.get('method', 'training')}{ending}"))
    return charts


def _maps(run: RunReport) -> dict[str, Mapping[str, str]]:
    """The map at each site, in words, of every edit that a checkpoint or a file holds."""
    maps: dict[str, Mapping[str, str]] = {}
    for out, checkpoint in run.checkpoints.items():
        sites = checkpoint.manifest.get("sites") or {}
        maps[out] = {site: row["map"] for site, row in sites.items()}
    for out, path in run.of_kind("edit"):
        maps[out] = {str(site): describe_map(map_) for site, map_ in Edit.load(path).maps.items()}
    return {out: sites for out, sites in maps.items() if sites}


def _removed(maps: Mapping[str, Mapping[str, str]]) -> dict[str, Counts]:
    """Neurons or directions that each edit removes, by layer."""
    removed: dict[str, dict[tuple[str, str], dict[int, float]]] = {}
    for out, sites in maps.items():
        for name, text in sites.items():
            neurons, rank = NEURONS.match(text), RANK.search(text)
            kind, number = ("neurons", neurons) if neurons else ("directions", rank)
            if number:
                site = Site.parse(name)
                by_layer = removed.setdefault(out, {}).setdefault((str(site.point), kind), {})
                by_layer[site.layer] = float(number[1])
    return dict(removed)


def _total(counts: Counts) -> str:
    sentences = [
        f"{sum(layers.values()):,.0f} {kind} removed at {point} of {len(layers)} layers"
        for (point, kind), layers in counts.items()
    ]
    return f"{'; '.join(sentences)}."


def _losses(run: RunReport) -> dict[str, tuple[Mapping[str, Any], dict[str, Sequence[float]]]]:
    """(provenance, values by name) of every training of which the losses were kept."""
    losses: dict[str, tuple[Mapping[str, Any], dict[str, Sequence[float]]]] = {}
    for out, origin in run.provenances.items():
        history = origin.get("history")
        if isinstance(history, Mapping):
            values: dict[str, Sequence[float]] = {
                HISTORY_NAMES.get(str(key), str(key)): list(values) for key, values in history.items()
            }
            losses[out] = origin, values
    for out, rows in _logs(run):
        records: dict[str, list[float]] = {}
        for row in redacted_values(rows) if run.redacted else rows:
            for key, value in (row.get("losses") or {}).items():
                records.setdefault(f"{key} loss", []).append(float("nan") if value is None else float(value))
        if records:
            losses[out] = run.provenances.get(out, {}), dict(records)
    return losses


def _logs(run: RunReport) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The records of gradient unlearning: in the delta, or in the file that `log` named."""
    for out, path in run.of_kind("delta"):
        yield out, archive.header_of(path).get("log", [])
    for step in run.steps:
        out, log = str(step.table.get("out")), step.table.get("log")
        if step.verb == "unlearn" and log and out not in run.saved and (run.file.parent / str(log)).is_file():
            yield out, JsonLines(run.file.parent / str(log)).rows


# --- What a run changed in the weights, and how exactly


HASHES = (
    "The sha256 of each of them before and after is in repedit.json; every other tensor is byte-identical to the base."
)
CONVERTED = "The sha256 of each of them before and after is in repedit.json; every tensor was converted to {}."


def _changed(run: RunReport) -> list[tuple[str, Mapping[str, Any], Table]]:
    """(checkpoint, manifest, tensors that the export changed, the largest relative change first)."""
    changed = []
    for out, export in run.checkpoints.items():
        plan, dtype = export.manifest.get("plan") or {}, export.manifest.get("dtype")
        rows = [
            [name, "; ".join(row["operations"]), _relative_change(row["relative_change"])]
            for name, row in sorted(plan.items(), key=_change, reverse=True)
        ]
        note = "" if not rows else CONVERTED.format(dtype) if dtype else HASHES
        changed.append((out, export.manifest, Table(("tensor", "what was done", "relative change"), rows, note)))
    return changed


def _deltas(run: RunReport) -> list[tuple[str, int]]:
    """(file, number of tensors) of differences; 0 if the file does not tell."""
    headers = {out: archive.header_of(path) for out, path in run.of_kind("delta")}
    return [(out, len(header.get("provenance", {}).get("start", {}))) for out, header in headers.items()]


def _exactness(run: RunReport) -> list[tuple[str, Verification, Table, Certificate | None]]:
    """(checkpoint, its files, its sites, its certificate)."""
    parts = []
    for out, export in run.checkpoints.items():
        sites = export.manifest.get("sites") or {}
        rows = [[site, sites[site]["map"], sites[site]["exactness"]] for site in sorted(sites, key=Site.parse)]
        certificate = _certificate(export.manifest.get("certificate"))
        parts.append((out, export, Table(("site", "edit", "exactness"), rows), certificate))
    return parts


def _certificate(values: Mapping[str, Any] | None) -> Certificate | None:
    return None if values is None else Certificate.of(values)


def _leaks(certificate: Certificate) -> Table:
    """What is left of removed directions, tensor by tensor."""
    rows = [
        [name, str(row.rank), f"{row.leak_computed:.1e}", f"{row.leak:.1e}", f"{row.residue:.1e}", row.dtype]
        for name, row in sorted(certificate.tensors.items(), key=lambda item: _natural_order(item[0]))
    ]
    columns = ("tensor", "rank", "leak computed", "leak as stored", "of the original", "dtype")
    note = "Leak: what is left of a tensor along the removed directions, as a share of what was there."
    return Table(columns, rows, note if rows else "")


def _change(item: tuple[str, Mapping[str, Any]]) -> float:
    change = item[1]["relative_change"]
    return float("inf") if change is None else float(change)


def _relative_change(value: float | None) -> str:
    return "new or another shape" if value is None else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
