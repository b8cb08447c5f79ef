"""The figure at the top of the README, from bench/results: what was removed, and what attacks recover.

Run as `python -m bench.overview_figure`; it measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
RESULTS, TARGET = ROOT / "bench" / "results", ROOT / "figures" / "overview.png"
BEFORE, AFTER, NEUTRAL = "#0072B2", "#D55E00", "#595959"
ATTACKS = {
    "rtt": "retrained on other capitals", "benign": "fine-tuned on other facts", "in_context": "examples in the prompt",
    "paraphrase": "asked in other words", "format": "another format", "quantize": "weights rounded", "direct": "simply asked",
}  # fmt: skip
"""Attacks that are drawn, from the strongest, and their labels."""


def draw(
    demo: Path = RESULTS / "demo.json", audit: Path = RESULTS / "audit-projected.json", target: Path = TARGET
) -> Path:
    """Three panels: accuracy after pruning code, accuracy after removing capitals, and the recovered fraction R."""
    rows = {row["name"]: row for row in json.loads(demo.read_text())["rows"]}
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    pruned, projected, recovered = figure.subplots(1, 3, width_ratios=(0.8, 1.25, 1.25))
    texts = ("code", "prose")
    _bars(pruned, texts, [rows[f"pruned, {text}"]["top1"] for text in texts])
    pruned.set_title(f"Code removed: {rows['pruned']['neurons']} neurons pruned", fontsize=10)
    pruned.set_ylabel("next token right", fontsize=9)
    domains = [
        name.removeprefix("projected, ") for name in rows if name.startswith("projected, ") and "phras" not in name
    ]
    _bars(projected, domains, [(rows[f"projected, {d}"]["before"], rows[f"projected, {d}"]["after"]) for d in domains])
    projected.set_title("Capitals removed by trained projections", fontsize=10)
    projected.set_ylabel("questions answered", fontsize=9)
    report = json.loads(audit.read_text())["rows"][0]
    _recoveries(recovered, {row["attack"]: row for row in report["recoveries"]})
    recovered.set_title(f"Audit of such a projection: {report['verdict']}", fontsize=10)
    handles = [
        pruned.bar([0], [0], color=color, label=label) for color, label in ((BEFORE, "original"), (AFTER, "edited"))
    ]
    pruned.legend(handles=handles, loc="upper right", fontsize=9, frameon=False)
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Description": "python -m bench.overview_figure"})
    return target


def _bars(axes: Axes, names: Sequence[str], pairs: Sequence[Sequence[float]]) -> None:
    """Two bars for each name: before and after."""
    for offset, color, values in ((-0.2, BEFORE, [p[0] for p in pairs]), (0.2, AFTER, [p[1] for p in pairs])):
        axes.bar([i + offset for i in range(len(names))], values, width=0.4, color=color)
    tilt: dict[str, Any] = {"rotation": 35, "ha": "right"} if len(names) > 3 else {}
    axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=9, **tilt)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.tick_params(axis="y", labelsize=8)


def _recoveries(axes: Axes, rows: dict[str, dict[str, Any]]) -> None:
    """R and its simultaneous bound for each attack, the strongest on top."""
    axes.axvspan(0.2, 1.3, color="#ececec", zorder=0)
    for edge in (0, 1):
        axes.axvline(edge, color="black", linewidth=1)
    for height, name in enumerate(reversed(ATTACKS)):
        row = rows[name]
        axes.plot(row["bound"], [height, height], color=AFTER, linewidth=2)
        axes.plot(row["value"], height, "o", color=AFTER, markersize=6)
    axes.set_yticks(range(len(ATTACKS)), [ATTACKS[name] for name in reversed(ATTACKS)], fontsize=9)
    axes.set_xlabel("recovered fraction R: 0 never knew, 1 the original", fontsize=9)
    axes.set_xlim(-0.3, 1.2)
    axes.tick_params(axis="x", labelsize=8)


if __name__ == "__main__":
    print(draw())
