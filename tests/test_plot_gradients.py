"""Figures of gradient unlearning show the numbers they were given, completely and legibly, and refuse to draw nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from repedit import plot
from repedit.delta import Delta
from repedit.errors import ArgumentError, FingerprintError, FractionError
from repedit.metrics.collapse import Judgement
from repedit.metrics.semeval import PARTS, aggregate
from repedit.neurons.scores import Score, Scores
from repedit.plot.canvas import layer_and_module
from repedit.quantization import step_size, update_cosine
from repedit.sites import Point, Site
from repedit.unlearning import masks
from repedit.unlearning.parameters import Mask
from tests.figure_laws import check_legible, laid_out, line, title
from tests.unlearning_cases import rows, subject

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")  # fmt: skip
RESULTS = {
    "original": [(1.0, 0.98), (0.97, 1.0)], "retrained": [(0.06, 1.0)], "grad_diff": [(0.04, 0.97), (0.1, 0.9)],
    "a recipe with a long name": [(0.9, 0.99)], "ga": [(0.0, 0.05)],
}  # fmt: skip


def mask(layers: int = 2, size: int = 40, chosen: int = 4) -> Mask:
    """`chosen` rows of each module in layer 0, one more in each later layer; the head beside them."""
    found = {}
    for layer in range(layers):
        for module in MODULES:
            rows = torch.zeros(size, 1, dtype=torch.bool)
            rows[: chosen + layer] = True
            found[f"model.layers.{layer}.{module}.weight"] = rows
    known = {"unit": "row", "percentile": 90.0, "loss": "nll", "model": "0123456789ab"}
    return Mask(found | {"lm_head.weight": torch.ones(size, 1, dtype=torch.bool)}, known)


def scores(layers: int = 2, width: int = 40) -> Scores:
    rng = np.random.default_rng(0)
    sites = [Site(layer, point) for layer in range(layers) for point in (Point.MLP_NEURONS, Point.ATTN_NEURONS)]
    return Scores({s: Score(s, torch.tensor(rng.normal(size=width)), "abs", "difference", 0.5) for s in sites}, {})


@cache
def lm():
    return subject(dtype=torch.float32)


def change(names: str = "", size: float = 0.01, seed: int = 0) -> Delta:
    """Random differences of the tensors whose names hold a text."""
    found, made = {}, torch.Generator().manual_seed(seed)
    for name, p in lm().model.named_parameters():
        if names in name:
            found[name] = size * torch.randn(p.shape, generator=made)
    return Delta(found, {"method": "blur_npo", "model": lm().fingerprint()})


def score(value: float, verdict: str = "DESTROYED"):
    parts = {name: value if name.startswith("retain") else 1 - value for name in PARTS}
    return aggregate(parts, 0.5, 0.3, judgement=Judgement(verdict, ("because",)))


FIGURES: dict[str, Callable[[], Figure]] = {
    "saliency": lambda: plot.saliency(mask(), notes=("capitals",)),
    "saliency beside pruning": lambda: plot.saliency(mask(30), scores(30)),
    "saliency of one tensor": lambda: plot.saliency(
        Mask({"transformer.h.0.mlp.c_proj.weight": torch.ones(3, dtype=torch.bool)})
    ),
    "delta": lambda: plot.delta(change(), lm()),
    "delta of one module": lambda: plot.delta(change("0.mlp.down_proj"), lm(), notes=("capitals",)),
    "tradeoff": lambda: plot.tradeoff(RESULTS, notes=("tiny taught models",)),
    "tradeoff without a retrained model": lambda: plot.tradeoff({"original": [(0.9, 0.9)], "npo": [(0.2, 0.8)]}),
    "semeval": lambda: plot.semeval({"original": score(0.2), "npo": score(0.71), "ga": score(1.0)}),
    "semeval of one": lambda: plot.semeval(score(0.4), notes=("validation",)),
    "semeval of many": lambda: plot.semeval({f"recipe {i} with a name": score(i / 6) for i in range(6)}),
}


@cache
def drawn(name: str) -> Figure:
    """Drawn once; no test changes one."""
    return laid_out(FIGURES[name]())


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_legible_and_says_what_it_shows(name):
    check_legible(drawn(name), slanted=name.startswith("saliency"), labelled=any)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.down_proj.weight", (3, "mlp.down_proj")),
        ("transformer.h.11.attn.c_proj.bias", (11, "attn.c_proj")),
        ("model.layers.2.mlp.experts.7.down_proj.weight", (2, "mlp.experts.7.down_proj")),
        ("lm_head.weight", (None, "lm_head")),
    ],
)
def test_a_name_says_where_a_tensor_stands(name, expected):
    assert layer_and_module(name) == expected


def test_saliency_shows_the_share_of_each_module():
    figure = plot.saliency(mask())
    assert_allclose(figure.axes[0].images[0].get_array(), [[10.0] * 7, [12.5] * 7])
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][-1] == "down_proj"
    assert "11.2 % of the units" in title(figure) and "1 tensor outside the layers not shown" in title(figure)


def test_saliency_of_a_model_is_what_the_mask_counts():
    found = masks.saliency(lm(), rows(), percentile=80.0)
    shown = plot.saliency(found).axes[0].images[0].get_array()
    inside = {name: m for name, m in found.tensors.items() if layer_and_module(name)[0] is not None}
    assert len({layer_and_module(name) for name in inside}) == shown.size
    assert_allclose(np.sort(shown, None), sorted(100 * float(m.double().mean()) for m in inside.values()), rtol=1e-6)
    assert shown.max() > shown.min()


def test_pruning_picks_the_same_share():
    panel = plot.saliency(mask(), scores()).axes[1].images[0].get_array()
    assert_allclose(panel.mean(), 100 * int(160 * 0.1125) / 160)


@pytest.mark.parametrize("tensors", [{}, {"lm_head.weight": torch.ones(3, dtype=torch.bool)},
                                     {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, dtype=torch.bool)}])  # fmt: skip
def test_a_mask_that_selects_nothing_is_not_drawn(tensors):
    with pytest.raises(ArgumentError, match="selects nothing inside a layer"):
        plot.saliency(Mask(tensors))


def test_delta_points_are_the_relative_change():
    made = change("down_proj")
    shown = line(plot.delta(made, lm()), "down_proj")
    start = {name: p.detach() for name, p in lm().model.named_parameters()}
    expected = [float(v.square().mean().sqrt() / start[n].std()) for n, v in made.tensors.items()]
    assert_allclose(shown[1], expected, rtol=1e-5)


def test_the_line_of_four_bits_parts_what_survives():
    """A difference far below it is lost, one far above it is kept."""
    axes = plot.delta(change("down_proj"), lm())
    name, weight = next((n, p.detach()) for n, p in lm().model.named_parameters() if "0.mlp.down_proj" in n)
    half = line(axes, "half a step")[1][0] * float(weight.std())
    assert half == pytest.approx(float(step_size(weight, "int4").median()) / 2, rel=1e-4)
    moved = change(name).tensors[name]
    small, large = (update_cosine(weight, weight + moved / moved.std() * half * times, "int4") for times in (0.02, 4.0))
    assert small < 0.4 < 0.9 < large


def test_a_delta_of_another_model_is_not_drawn():
    made = change("down_proj")
    for tensors, message in (({"absent": torch.ones(2)}, "its absent has shape"), (made.tensors, "made for model")):
        with pytest.raises(FingerprintError, match=message):
            plot.delta(Delta(tensors, {"model": "another"}), lm())


def test_a_delta_outside_the_layers_is_not_drawn():
    with pytest.raises(ArgumentError, match="changes nothing inside a layer, of 1 tensor"):
        plot.delta(change("lm_head"), lm())


def test_tradeoff_points_and_regions():
    axes = plot.tradeoff(RESULTS).axes[0]
    points = {item.get_label(): item.get_offsets() for item in axes.collections if item.get_label() in RESULTS}
    for name, given in RESULTS.items():
        assert_allclose(points[name], given)
    assert {t.get_text() for t in axes.texts} >= {"not forgotten", "retain lost, a sign of collapse"}
    # The original's means are .985 and .99.
    assert sorted(round(p.get_x(), 4) for p in axes.patches)[-1] == round(0.5 * 0.985, 4)


def test_names_that_hide_each_other_are_counted():
    given = {"original": [(1.0, 1.0)], "npo": [(0.05, 1.0)], "wga": [(0.051, 0.999)], "ga": [(0.3, 0.2)]}
    texts = [text.get_text() for text in plot.tradeoff(given).axes[0].texts]
    assert [text for text in texts if text.endswith("here")] == ["2 here"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ArgumentError, "give 'original'"),
        ({"original": [(1.0, 1.0)]}, ArgumentError, "at least one other"),
        ({"npo": [(0.1, 0.9)]}, ArgumentError, "give 'original'"),
        (RESULTS | {"npo": []}, ArgumentError, "'npo' has no point"),
        (RESULTS | {"npo": [(10.0, 90.0)]}, FractionError, r"'npo' holds \(10.0, 90.0\)"),
        (RESULTS | {"npo": [(float("nan"), 0.5)]}, FractionError, "both in"),
    ],
)
def test_tradeoff_refuses(given, error, message):
    with pytest.raises(error, match=message):
        plot.tradeoff(given)


def test_semeval_bars_are_the_parts_and_the_title_the_verdict():
    given = score(0.71, "OVER-FORGOTTEN")
    figure = plot.semeval(given)
    for axes, side in zip(figure.axes, ("forget", "retain"), strict=True):
        expected = [given.parts[f"{side}/{task.get_text().replace(chr(10), '/')}"] for task in axes.get_xticklabels()]
        assert_allclose([bar.get_height() for bar in axes.patches], expected)
    assert "OVER-FORGOTTEN" in title(figure)


@pytest.mark.parametrize("count", [0, 7])
def test_semeval_refuses(count):
    with pytest.raises(ArgumentError, match=f"was given {count} scores; it draws 1 to 6"):
        plot.semeval({str(i): score(0.5) for i in range(count)})
