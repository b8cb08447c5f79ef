"""Share of copy bandwidth against width: what was measured, the proposed bars, and the model it is held against."""

from __future__ import annotations

import json
from pathlib import Path

# Best share by counted bytes for bfloat16, by padded rank and width; a model, not a measurement.
MODELLED = {
    16: {576: 1.0, 1024: 1.0, 2048: 1.0, 4096: 0.85, 8192: 0.67, 16384: 0.67},
    64: {576: 0.85, 1024: 0.85, 2048: 0.67, 4096: 0.67, 8192: 0.67, 16384: 0.67},
}


def draw(results: Path) -> Path:
    """One line a rank; modelled lines are dashed, bars are ticks."""
    from matplotlib.figure import Figure

    content = json.loads(results.read_text())
    rows = [row for row in content["rows"] if row.get("section") == "project" and row.get("dtype") == "bfloat16"]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for color, (rank, modelled) in zip(("C0", "C1"), MODELLED.items(), strict=True):
        mine = sorted((row["shape"][1], row) for row in rows if "fraction" in row and row["shape"][2] == rank)
        widths = [width for width, _ in mine]
        axes.plot(widths, [row["fraction"] for _, row in mine], "o-", color=color, label=f"rank {rank}, measured")
        axes.plot(list(modelled), list(modelled.values()), "--", color=color, label=f"rank {rank}, modelled from bytes")
        bars = [float(row["bar"].split()[-1]) for _, row in mine]
        axes.plot(widths, bars, "_", color=color, markersize=14, label=f"rank {rank}, bar")
    axes.set(xscale="log", xlabel="width d", ylabel="share of copy bandwidth", ylim=(0, 1.1))
    axes.set_title(f"{content['device']['name']}, {content['date']}, 16384 rows, bfloat16", fontsize=10)
    axes.legend(fontsize=8)
    target = results.with_suffix(".png")
    figure.savefig(target, dpi=150)
    return target
