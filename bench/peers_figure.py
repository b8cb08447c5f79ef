"""The ratios of `python -m bench` on one logarithmic axis."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

FIGURES = Path(__file__).parents[1] / "figures"
COLORS = {"pass": "#2a7f4f", "missed": "#b3352c", "not resolved": "#8a8a8a", "recorded": "#3a6ea5"}


def draw(results: Path, target: Path = FIGURES / "bench.png") -> Path:
    """A dot and its 20 to 80 % interval for each ratio, bars as ticks, in grey what ours is to itself."""
    content = json.loads(results.read_text())
    rows = [row for row in content["rows"] if "median" in row][::-1]
    figure = Figure(figsize=(9.5, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1.0, color="black", linewidth=1)
    for height, row in enumerate(rows):
        color = COLORS[row["status"]]
        axes.plot(row["control"], [height, height], color="#d8d8d8", linewidth=8, solid_capstyle="butt", zorder=0)
        axes.plot([row["q20"], row["q80"]], [height, height], color=color, linewidth=2)
        axes.plot(row["median"], height, "o", color=color, markersize=5)
        if row["bar"] is not None:
            axes.plot(row["bar"], height, "|", color="black", markersize=11, markeredgewidth=1.5)
    axes.set_yticks(
        range(len(rows)), [f"{row['ours']} against {row['peer']}: {row['what']}" for row in rows], fontsize=7
    )
    axes.set(xscale="log", ylim=(-0.7, len(rows) - 0.3))
    axes.set_xlabel("cost of the other over ours, on the same input; right of 1 ours costs less", fontsize=8)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if _within(tick, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    shown = [status for status in COLORS if any(row["status"] == status for row in rows)]
    handles = [axes.plot([], [], "o-", color=COLORS[status], label=status)[0] for status in shown]
    handles += [axes.plot([], [], "|", color="black", markersize=11, label="bar")[0]]
    handles += [axes.plot([], [], color="#d8d8d8", linewidth=8, label="ours over itself")[0]]
    axes.legend(handles=handles, fontsize=7, loc="best")
    host = content["host"]
    axes.set_title(
        f"{host.get('cpu', host['machine'])}, one thread, {content['date']}, torch {content['versions']['torch']}",
        fontsize=8,
    )
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=130, metadata={"Description": f"{content['command']}, seed {content['seed']}"})
    return target


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]
