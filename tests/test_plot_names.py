"""Names that somebody else gave (of attacks, models, tensors, corpora) are drawn as they are, whatever they hold."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import cbook
from matplotlib.figure import Figure
from matplotlib.text import Text

from repedit import plot
from repedit.auditing.report import Gap, Report
from repedit.escaping import for_plotly
from repedit.metrics.location import Ablation, Location
from repedit.plot import TradeOff
from repedit.plot.canvas import LONGEST
from repedit.rewrite.certificate import Certificate, TensorCertificate
from tests import test_plot as neurons
from tests import test_plot_gradients as gradient
from tests import test_plot_projections as projection
from tests.handmade_reports import clean, report

NAMES = ("cost_$5_$6", "_a$\\frac{$^%{x}; \\ <b>\n\x1b[2J\x00\u202e", "日本語 \U0001f600$" + "x" * 5000, "")


def attacked(name: str) -> Report:
    whole = report()
    rows = tuple(replace(r, attack=f"{r.attack} {name}", floor_name=name) for r in whole.recoveries)
    findings = {
        role: tuple(replace(f, attack=f"{f.attack} {name}") if f.attack != "retain" else f for f in held)
        for role, held in whole.findings.items()
    }
    return replace(whole, recoveries=rows, findings=findings, context=whole.context | {"budget": name})


def gaps(name: str) -> dict[str, Report]:
    gap = Gap("forget accuracy", 0.5, 0.9, 0.4, 0.1, (0.0, 0.2))
    return {name: replace(report(), gaps=(gap,)), f"{name} 2": replace(report(), gaps=(gap,))}


def scored(name: str):
    found = neurons.scores()
    data = {role: {"name": name, "tokens": 12} for role in ("forget", "retain")}
    return type(found)(
        dict(found),
        {**found.provenance, "data": data, "options": {"importance": name, "combine": name}, "model": name or "m"},
    )


FIGURES: dict[str, Callable[[str], Figure]] = {
    "ablations": lambda n: plot.ablations(Location((Ablation("0-1", "mlp.out", "last", {n: 0.5}, {n: 2}),), {n: 0.9}, {n: 2}, "mean", 0, ""), on=n, notes=(n,)),
    "activations": lambda n: plot.activations(neurons.tiny("llama"), "1.mlp.neurons", 7, neurons.corpus(1, n or "a"), neurons.corpus(2, "b")),
    "audits": lambda n: plot.audits({n: attacked(n), "b": clean()}),
    "continual": lambda n: plot.continual(projection.DONE, [n, "b", "c"], untouched=[f"{n} d"], rows=["original", n, "b", "c"]),
    "delta": lambda n: plot.delta(gradient.change("0.mlp.down_proj"), gradient.lm(), notes=(n,)),
    "gap": lambda n: plot.gap(gaps(n)),
    "importances": lambda n: plot.importances(neurons.collection(n, 1), neurons.collection("b", 2)),
    "layer_rank": lambda n: plot.layer_rank([[0.5]], layers=[n], ranks=[8], label=n),
    "leakage": lambda n: plot.leakage(Certificate("folded", "exact", 1, 0.0, {n: TensorCertificate(1, 1e-7, 1e-3, 0.0, "float32")})),
    "lenses": lambda n: plot.lenses(attacked(n)),
    "principal_angles": lambda n: plot.principal_angles({n: projection.edit(1), "b": projection.edit(2)}),
    "pruned_per_layer": lambda n: plot.pruned_per_layer(replace(neurons.prune(neurons.scores(), fraction=0.1), provenance={"method": n, "model": n})),
    "rank_tradeoff": lambda n: plot.rank_tradeoff({n: [TradeOff(8, 0.3, 0.9)], f"{n} 2": [TradeOff(4, 0.3, 0.9)]}),
    "recovery": lambda n: plot.recovery(attacked(n)),
    "relearning": lambda n: plot.relearning(attacked(n)),
    "saliency": lambda n: plot.saliency(gradient.mask(), notes=(n,)),
    "selectivity_strip": lambda n: plot.selectivity_strip({n: (12.0, "mlp"), f"{n} 2": (40.0, "random")}),
    "semeval": lambda n: plot.semeval({n: gradient.score(0.2, n), f"{n} 2": gradient.score(0.7)}, notes=(n,)),
    "specialization": lambda n: plot.specialization(scored(n)),
    "spectra": lambda n: plot.spectra(projection.spectra(), notes=[n]),
    "tradeoff": lambda n: plot.tradeoff({"original": [(0.9, 0.9)], n: [(0.2, 0.8)]}, notes=(n,)),
    "trajectory": lambda n: plot.trajectory(neurons.steps(), labels=[n]),
    "transfer": lambda n: plot.transfer(50 * np.eye(3), [n, "b", "c"]),
}  # fmt: skip
NAMELESS = {"condensed", "membership", "training", "overlap", "TradeOff"}
"""What draws no name that a user gives, or is drawn by its own tests from a whole training."""


def test_every_figure_is_drawn_with_every_name():
    assert set(FIGURES) | NAMELESS == set(plot.__all__)


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("which", FIGURES)
def test_a_name_is_no_formula_and_breaks_no_figure(which):
    for name in NAMES:
        figure = FIGURES[which](name)
        if name == NAMES[1]:  # laying out the others finds what drawing them would
            figure.savefig(io.BytesIO(), format="png", dpi=20)
        else:
            figure.draw_without_rendering()
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert [t for t in texts if cbook.is_math_text(t) and not t.startswith(r"$\mathdefault{")] == [], name
        assert not any(c in text for text in texts for c in "\x1b\x00\u202e")
        assert max(figure.get_size_inches()) < 60
        if name == "cost_$5_$6":
            assert any("5_" in text for text in texts)


def test_a_name_that_begins_with_an_underscore_is_in_the_legend():
    figure = plot.tradeoff({"original": [(0.9, 0.9)], "_hidden": [(0.2, 0.8)]})
    assert "_hidden" in [text.get_text().strip() for text in figure.findobj(Text)]


def test_a_long_name_keeps_its_ends():
    figure = plot.transfer(np.eye(2), ["begin" + "x" * 5000 + "end", "b"])
    label = figure.axes[0].get_yticklabels()[0].get_text()
    assert len(label) <= LONGEST and label.startswith("begin") and label.endswith("end")


def test_what_plotly_shows_is_no_markup_and_no_formula():
    for name in NAMES:
        shown = for_plotly(name)
        assert "<" not in shown and "$" not in shown and json.dumps(shown)
