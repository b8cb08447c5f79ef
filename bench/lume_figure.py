"""Why .409 is a collapsed model: figures/lume.png, the three parts of the SemEval aggregate, published and of `bench.lume`.

Run as `python -m bench.lume_figure`; it reads bench/results/lume-*.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from bench.peers_figure import FIGURES
from bench.record import RESULTS

PARTS = {"task aggregate": "#0072B2", "membership": "#E69F00", "MMLU": "#999999"}
PUBLISHED: Mapping[str, tuple[float, float, float]] = {
    "AILS-NTUA, 7B": (0.827, 0.847, 0.443),
    "Cyber for AI, 7B": (0.0, 0.999, 0.229),
    "Cyber for AI, 1B": (0.0, 0.914, 0.251),
    "gradient ascent, 7B": (0.0, 0.912, 0.269),
}
"""Task aggregate, membership and MMLU from the leaderboard of the task."""
CLAIMED = 0.409
"""The aggregate that the paper reports."""
BACKGROUND = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


def bars(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[float, float, float], str]]:
    """(label, the three parts, remark) of every bar, from the top."""
    found = [(name, values, "") for name, values in PUBLISHED.items()]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        parts = tuple(mean(row[key] for row in mine) for key in ("task aggregate", "membership", "mmlu"))
        words = ", ".join(dict.fromkeys(row["verdict"] for row in mine)) if name != "taught" else "before unlearning"
        kept = mean(row["retain"] for row in mine)
        found.append((f"here: {name}", (parts[0], parts[1], parts[2]), f"{words}; retains {kept:.2f}"))
    return found


def draw(results: Path = RESULTS, target: Path = FIGURES / "lume.png") -> Path:
    """One bar a model, made of a third of each part; the paper's aggregate as a line."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob("lume-[0-9]*.json"))]
    shown = bars([row for content in files for row in content["rows"]])[::-1]
    figure = Figure(figsize=(9.5, 1.4 + 0.36 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for height, (_, parts, remark) in enumerate(shown):
        left = 0.0
        for value, color in zip(parts, PARTS.values(), strict=True):
            axes.barh(height, value / 3, left=left, color=color, height=0.72, edgecolor="white")
            left += value / 3
        text = f"{left:.3f}" + (f"  {remark}" if remark else "")
        axes.text(left + 0.01, height, text, va="center", fontsize=8, bbox=BACKGROUND)
    axes.axvline(CLAIMED, color="black", linewidth=1, linestyle="--", zorder=0)
    axes.text(CLAIMED, len(shown) - 0.35, f"{CLAIMED}, reported", fontsize=8, ha="center", va="bottom", bbox=BACKGROUND)
    axes.set_yticks(range(len(shown)), [name for name, _, _ in shown], fontsize=8)
    axes.set(xlim=(0, 1.05), ylim=(-0.6, len(shown) + 0.3))
    axes.set_xlabel("final score: a third of each part", fontsize=8.5)
    handles = [axes.barh(0, 0, color=color, label=name) for name, color in PARTS.items()]
    axes.legend(handles=handles, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.87), ncols=3)
    axes.set_title(
        "The aggregate rewards a collapsed model: it answers nothing, so it leaks nothing and tells no member apart",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(exist_ok=True)
    command = "python -m bench.lume_figure"
    figure.savefig(target, dpi=130, metadata={"Description": f"{command}, of {len(files)} seeds"})
    return target


if __name__ == "__main__":
    print(draw())
