"""The pages of `repedit compare` and `repedit diff`: two checkpoints on the same texts, and the tensors that differ."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from repedit.metrics.benchmarks import Comparison
from repedit.plot.reports import bars, drops
from repedit.report.rendering import render, svg
from repedit.report.tables import Table, comparison_table
from repedit.rewrite.diff import Difference

SHOWN = "A comparison shows what both models answer now. Only an audit shows what retraining or other words bring back."
_LAYER = re.compile(r"\.(\d+)\.")


def comparison_page(comparison: Comparison, names: tuple[str, str]) -> str:
    """The drops on each text with their intervals, accuracy and perplexity before and after, and the generations.

    Args:
        names: of the two checkpoints, the original first.
    """
    effects = {corpus: comparison.effect(corpus) for corpus in comparison.base}
    measured = [("edited", corpus, e.drop, e.low, e.high) for corpus, e in effects.items() if not math.isnan(e.drop)]
    return render(
        "checkpoints", title=f"{names[0]} against {names[1]}", names=names, values=comparison_table(comparison), shown=SHOWN,
        lead="The share of next tokens that each model predicts right, and its perplexity, on the same texts.",
        figures=[("Relative drop, with 95 % intervals", svg(drops(measured)))] if measured else [],
        written=list(zip(comparison.prompts, comparison.base_text, comparison.edited_text, strict=True)),
    )  # fmt: skip


def difference_page(differences: Sequence[Difference], names: tuple[str, str]) -> str:
    """Every tensor that differs, and the norm of the change by layer, sqrt(sum of squares over the tensors of a layer).

    Args:
        names: of the two checkpoints, the original first.
    """
    squares: dict[int, float] = {}
    for difference in differences:
        layer = _LAYER.search(difference.tensor)
        if layer is not None:
            squares[int(layer[1])] = squares.get(int(layer[1]), 0.0) + difference.norm**2
    norms = {layer: math.sqrt(value) for layer, value in sorted(squares.items())}
    rows = [
        [d.tensor, f"{d.norm:.4g}", f"{d.relative:.4g}", "n/a" if d.rank is None else str(d.rank), f"{d.rows:,}", f"{d.columns:,}"]
        for d in differences
    ]  # fmt: skip
    count = len(differences)
    return render(
        "checkpoints", title=f"{names[0]} against {names[1]}", names=names, written=[],
        lead=f"{count} tensor{'' if count == 1 else 's'} differ{'s' if count == 1 else ''}, the largest relative change first."
        if count else "Both checkpoints hold the same values in every tensor.",
        figures=[("Norm of the change by layer", svg(bars(norms, "layer", "norm of the change")))] if norms else [],
        values=Table(("tensor", "norm of the change", "relative to the tensor", "rank", "rows changed", "columns changed"), rows),
        shown="Equal values are equal to the bit; a tensor that is not listed is unchanged.",
    )  # fmt: skip
