"""How a run chose what to change: scores, what was selected of each layer, the course of a training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from repedit.edit import Edit, describe_map
from repedit.importance.scores import Scores
from repedit.io import archive
from repedit.io.text import JsonLines
from repedit.report.runs.bars import bars, charts, course, spreads
from repedit.report.runs.gathering import RunReport
from repedit.report.runs.showing import items
from repedit.report.sections import element, note, table
from repedit.report.tables import Table, plain
from repedit.report.withholding import without_texts
from repedit.sites import Site

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
    for name, origin in run.origins.items():
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
    for name, origin in run.origins.items():
        history = origin.get("history")
        if isinstance(history, Mapping):
            found[name] = origin, {WORDS.get(str(key), str(key)): list(held) for key, held in history.items()}
    for name, rows in _logs(run):
        records: dict[str, list[float]] = {}
        for row in without_texts(rows) if run.hidden else rows:
            for key, value in (row.get("losses") or {}).items():
                records.setdefault(f"{key} loss", []).append(float("nan") if value is None else float(value))
        if records:
            found[name] = run.origins.get(name, {}), dict(records)
    return found


def _logs(run: RunReport) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The records of gradient unlearning: in the delta, or in the file that `log` named."""
    for name, path in run.of_kind("delta"):
        yield name, archive.header_of(path).get("log", [])
    for stage in run.stages:
        log = Path(run.file.parent / str(stage.asked.get("log", "")))
        if (
            stage.verb == "unlearn"
            and stage.asked.get("log")
            and log.is_file()
            and str(stage.asked.get("out")) not in run.saved
        ):
            yield (
                str(stage.asked.get("out")),
                JsonLines(log).rows,
            )
