"""Figures show the numbers they were given, completely and legibly, and refuse to draw nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from repedit import plot
from repedit.activations.collection import Collection, collect
from repedit.activations.prediction import Predictions
from repedit.data.corpus import Tokens, tokens
from repedit.edit import Edit
from repedit.errors import (
    ArgumentError,
    NotEnoughRows,
    NotFinite,
    SelectionError,
    ShapeError,
    UnknownName,
    UnknownSite,
    UnsuitableImportance,
)
from repedit.linear_maps import Diagonal, LowRank
from repedit.neurons.scores import Score, Scores, agreement
from repedit.neurons.selection import prune, random_like, top
from repedit.neurons.trajectory import Step, Trajectory
from repedit.plot.canvas import describe_sites, percent, text_color
from repedit.sites import Point, Site
from repedit.stats import Activity
from tests.figure_laws import check_legible, laid_out, line, title
from tests.tiny import ids, tiny

LAYERS, WIDTH = 3, 40
DATA = {role: {"name": name, "tokens": 1234} for role, name in (("forget", "code"), ("retain", "prose"))}
PROVENANCE = {"options": {"importance": "abs", "combine": "difference"}, "data": DATA, "model": "0123456789ab"}
MLP = [Site(layer, Point.MLP_NEURONS) for layer in range(LAYERS)]
BOTH = sorted(MLP + [Site(layer, Point.ATTN_NEURONS) for layer in range(LAYERS)])


def scores(sites: list[Site] = MLP, combine: str = "difference", protected: int = 0, width: int = WIDTH) -> Scores:
    rng = np.random.default_rng(len(sites))
    found = {}
    for site in sites:
        values = torch.tensor(rng.normal(size=width) if combine != "ratio" else rng.lognormal(size=width))
        values[:protected] = -torch.inf
        found[site] = Score(site, values, "abs", combine, 0.5)
    return Scores(found, PROVENANCE)


def predicted(hits: int) -> Predictions:
    return Predictions(("a", "b"), np.array([50, 50]), np.array([hits, 0]), np.array([hits, 0]), np.array([99.0, 99.0]))


def steps(sites: list[Site] = MLP) -> Trajectory:
    """Forget drops 0, 30, 60, 80 %, retain drops 0, 5, 7.5, 20 %."""
    edits = [Edit({}), *(prune(scores(sites), fraction=k * 0.1) for k in (1, 2, 3))]
    sides = zip((40, 28, 16, 8), (40, 38, 37, 32), strict=True)
    made = [
        Step(0.1 * k, e, predicted(f), predicted(r)) for k, (e, (f, r)) in enumerate(zip(edits, sides, strict=True))
    ]
    return Trajectory(tuple(made), {"combine": "difference", "importance": "abs", "sites": "*.mlp.neurons"})


def collection(name: str, seed: int, sites: list[Site] = MLP, dead: int = 0) -> Collection:
    rng, found = np.random.default_rng(seed), {}
    for site in sites:
        found[site] = Activity.zeros(WIDTH)
        found[site].count += 10
        found[site].abs += torch.tensor(10 * rng.lognormal(size=WIDTH))
        found[site].abs[:dead] = 0
    return Collection(found, "0123456789ab", name, name, {}, 12, 10, {site: {} for site in sites}, True)


def corpus(seed: int, name: str = "text", pad: int = 0) -> Tokens:
    """Three rows of 11 tokens, the last row with four tokens of padding."""
    rows, mask = ids(3, 11, seed), torch.ones(3, 11, dtype=torch.bool)
    rows[2, 7:], mask[2, 7:] = pad, False
    return tokens([{"input_ids": rows, "attention_mask": mask}], name)


def neuron_figure(**options: object) -> Figure:
    return plot.activations(tiny("llama"), "1.mlp.neurons", 7, corpus(1, "code"), corpus(2, "prose"), **options)  # type: ignore[arg-type]


FIGURES: dict[str, Callable[[], Figure]] = {
    "trajectory": lambda: plot.trajectory(steps(), steps(), control=[(1.0, 2.0), (5.0, 4.0)]),
    "specialization": lambda: plot.specialization(scores(protected=3)),
    "specialization of two points": lambda: plot.specialization(scores(BOTH)),
    "importances": lambda: plot.importances(
        collection("code", 1, BOTH), collection("prose", 2, BOTH), edit=prune(scores(BOTH), fraction=0.1)
    ),
    "pruned_per_layer": lambda: plot.pruned_per_layer(prune(scores(BOTH), fraction=0.1), layers=30),
    "pruned_per_layer of steps": lambda: plot.pruned_per_layer(steps(), random_like(steps().steps[-1].edit, seed=0)),
    "selectivity_strip": lambda: plot.selectivity_strip(
        {f"a method with a long name, number {i}": (i * 12.0 - 5, "mlp") for i in range(9)}
    ),
    "transfer": lambda: plot.transfer(
        50 * np.eye(3), ["code", "encyclopaedia", "legal text"], plot.overlap([prune(scores(), fraction=0.1)] * 3)
    ),
    "activations": neuron_figure,
}


@cache
def drawn(name: str) -> Figure:
    """Drawn once; no test changes one."""
    return laid_out(FIGURES[name]())


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_legible_and_says_what_it_shows(name):
    check_legible(drawn(name), slanted=name == "transfer")


def test_a_notebook_can_show_a_figure():
    assert drawn("transfer")._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]


def test_trajectory_points_equal_drops():
    figure = plot.trajectory(steps(), labels=["mine"])
    assert_allclose(line(figure, "mine"), [[0, 5, 7.5, 20], [0, 30, 60, 80]], atol=1e-9)
    assert_allclose(figure.axes[1].lines[1].get_ydata(), [0, 25, 52.5, 60], atol=1e-9)
    assert [a.get_xlabel() for a in figure.axes] == ["retain drop, % of top-1 accuracy"] * 2
    assert "100 forget and 100 retain predictions" in title(figure)
    assert "collected on forget code, 1,234 tokens" in title(figure)


@pytest.mark.parametrize(("limit", "best"), [(10.0, 7.5), (None, 20.0)])
def test_trajectory_rings_the_best_step_within_the_limit(limit, best):
    figure = plot.trajectory(steps(), limit=limit)
    assert line(figure, "best step")[0, 0] == pytest.approx(best)
    limits = [item for item in figure.axes[0].lines if str(item.get_label()).startswith("retain limit")]
    assert len(limits) == (limit is not None)


def test_trajectory_says_when_no_step_is_within_the_limit():
    labels = plot.trajectory(steps(), limit=1.0).axes[0].get_legend_handles_labels()[1]
    assert "difference of abs: no step within the limit" in labels


def test_control_band_is_mean_and_two_deviations():
    figure = plot.trajectory(steps(), control=[(1.0, 3.0), (4.0, 2.0)])
    box = figure.axes[1].collections[0].get_paths()[0].get_extents()
    assert_allclose((box.y0, box.y1), (-4, 4))


def test_specialization_shows_sorted_scores_and_global_tops():
    given = scores()
    axes = plot.specialization(given).axes[0]
    shown = axes.collections[0].get_array().reshape(WIDTH, LAYERS)
    assert_allclose(shown, np.stack([np.sort(s.values.numpy())[::-1] for s in given.values()], 1))
    for fraction, patch in zip((0.01, 0.05), axes.patches, strict=True):
        keep = top(given, fraction=fraction)
        assert_allclose(patch.get_data().values, [int((~keep[site]).sum()) for site in MLP])


@pytest.mark.parametrize(
    ("combine", "centre"), [("difference", 0.0), ("logratio", 0.0), ("ratio", 0.0), ("rank", None)]
)
def test_specialization_is_centred_at_no_preference(combine, centre):
    given = scores(combine=combine)
    norm = plot.specialization(given).axes[0].collections[0].norm
    median = float(np.median(np.concatenate([s.values.numpy() for s in given.values()])))
    assert (norm.vmin + norm.vmax) / 2 == pytest.approx(median if centre is None else centre)


def test_specialization_hides_protected_neurons_and_splits_points():
    figure = plot.specialization(scores(BOTH, protected=3))
    heat = [axes.collections[0].get_array().reshape(WIDTH, LAYERS) for axes in figure.axes[:2]]
    assert all(np.ma.getmaskarray(np.ma.masked_invalid(h))[-3:].all() for h in heat)
    assert [axes.get_ylabel().split(" in ")[0] for axes in figure.axes[:2]] == [
        "rank of attention neurons",
        "rank of MLP neurons",
    ]
    assert "protected, 18 neurons" in figure.axes[0].get_legend_handles_labels()[1]


def test_specialization_colours_scores_that_are_all_equal_and_ratios_of_zero():
    flat = Scores({MLP[0]: Score(MLP[0], torch.zeros(5, dtype=torch.float64), "abs", "ratio", 0.0)}, {})
    norm = plot.specialization(flat).axes[0].collections[0].norm
    assert norm.vmin < 0 < norm.vmax


def test_importances_are_the_points_and_pruned_ones_are_ringed():
    forget, retain, edit = collection("code", 1), collection("prose", 2), prune(scores(), fraction=0.1)
    figure = plot.importances(forget, retain, edit=edit)
    cloud, rings = (item.get_offsets() for item in figure.axes[0].collections)
    expected = np.stack([torch.cat([c[s].abs / 10 for s in MLP]).numpy() for c in (retain, forget)], 1)
    assert_allclose(np.sort(cloud, 0), np.sort(expected, 0))
    gone = torch.cat([~edit.maps[s].kept for s in MLP]).numpy()  # type: ignore[attr-defined]
    assert_allclose(rings, expected[gone])
    assert "12 of 120 neurons pruned" in title(figure)


def test_importances_name_sets_and_correlation():
    forget, retain = collection("code", 1), collection("prose", 2)
    figure = plot.importances(forget, retain)
    assert figure.axes[0].get_xlabel() == "importance on retain (prose): mean |z|"
    assert figure.axes[0].get_ylabel() == "importance on forget (code): mean |z|"
    assert f"median rank correlation over sites {np.median(list(agreement(forget, retain).values())):.2f}" in title(
        figure
    )


def test_neurons_without_importance_lie_at_the_edge():
    figure = plot.importances(collection("code", 1, dead=2), collection("prose", 2))
    up = np.sort(figure.axes[0].collections[0].get_offsets()[:, 1])
    assert_allclose(up[:6], up[6] / 2)
    assert "6 of 120 neurons without importance on a set, at the edge" in title(figure)


def test_bars_equal_counts_beside_the_control():
    edit = prune(scores(), fraction=0.2)
    control = random_like(edit, seed=0, match="uniform")
    figure = plot.pruned_per_layer(edit, control, layers=5)
    for bars, shown in zip(figure.axes[0].containers, (edit, control), strict=True):
        assert [b.get_height() for b in bars] == [shown.maps[s].rank_removed for s in MLP] + [0, 0]
    assert figure.axes[0].get_ylabel() == "pruned MLP neurons"
    assert "24 neurons" in title(figure)
    assert "20 % pruned" in title(figure)


def test_bars_of_a_trajectory_stack_to_the_last_step():
    given = steps(BOTH)
    figure = plot.pruned_per_layer(given)
    for axes, point in zip(figure.axes, (Point.ATTN_NEURONS, Point.MLP_NEURONS), strict=False):
        stacks = [[b.get_height() for b in bars] for bars in axes.containers]
        last = given.steps[-1].edit.maps
        assert len(stacks) == 3
        assert np.sum(stacks, 0).tolist() == [last[Site(layer, point)].rank_removed for layer in range(LAYERS)]


def test_strip_has_one_stem_and_one_label_a_method():
    results = {"difference": (51.3, "mlp"), "heads": (5.9, "attention"), "random": (-1.1, "random")}
    axes = plot.selectivity_strip(results).axes[0]
    stems = {item.get_xdata()[0]: item for item in axes.lines if len(item.get_xdata()) == 2 and item.get_ydata()[1] > 0}
    assert {x: item.get_linestyle() for x, item in stems.items()} == {51.3: "-", 5.9: "--", -1.1: "-"}
    assert stems[-1.1].get_color() == "black"
    assert [t.get_text() for t in axes.texts] == ["difference, 51.3", "heads, 5.9", "random, -1.1"]
    assert axes.get_xlim()[0] < -1.1
    assert axes.get_xlim()[1] >= 100


def test_transfer_writes_every_cell():
    figure = plot.transfer(np.array([[60.0, 5.25], [-2.0, 40.0]]), ["code", "prose"], np.eye(2))
    assert [t.get_text() for t in figure.axes[0].texts] == ["60.0", "5.2", "-2.0", "40.0"]
    assert [t.get_text() for t in figure.axes[1].texts] == ["1.00", "0.00", "0.00", "1.00"]
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_xlabel()) == ("neurons removed for", "evaluated on")


def test_overlap_is_jaccard_over_all_sites():
    def edit(*pruned: tuple[int, int]) -> Edit:
        keep = torch.ones(LAYERS, WIDTH, dtype=torch.bool)
        for layer, neuron in pruned:
            keep[layer, neuron] = False
        return Edit({site: Diagonal.mask(keep[site.layer]) for site in MLP})

    first, second, third = edit((0, 1), (0, 2), (1, 1)), edit((0, 1), (1, 1), (2, 0)), edit((2, 2))
    assert_allclose(plot.overlap([first, second, third]), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]])


def test_activation_marks_equal_the_collected_mean():
    figure = neuron_figure(bins=20)
    for role, seed in (("forget", 1), ("retain", 2)):
        mean = float(collect(tiny("llama"), corpus(seed), "1.mlp.neurons")["1.mlp.neurons"].mean[7])
        assert line(figure, f"{role} mean")[0, 0] == pytest.approx(mean, rel=1e-6)
    assert "neuron 7 of 1.mlp.neurons" in title(figure)


def test_activation_densities_share_bins_and_integrate_to_one():
    shapes = [patch.get_data() for patch in neuron_figure(bins=20).axes[0].patches]
    assert_allclose(shapes[0].edges, shapes[1].edges)
    for role, shape in zip(("forget", "retain"), shapes, strict=True):
        assert float((shape.values * np.diff(shape.edges)).sum()) == pytest.approx(1)
        centre = shape.edges[shape.values.argmax() :][:2].mean()
        assert line(neuron_figure(bins=20), f"{role} peak")[0, 0] == pytest.approx(centre)


def test_activations_count_neither_padding_nor_the_first_position():
    assert "forget code, 26 tokens; retain prose, 26 tokens; 100 bins" in title(neuron_figure())


def test_activations_of_an_expert_neuron_are_those_collected():
    subject = tiny("mixtral")
    figure = plot.activations(subject, "0.mlp.neurons", 55, corpus(1), corpus(2))
    found = collect(subject, corpus(1), "0.mlp.neurons")["0.mlp.neurons"]
    assert line(figure, "forget mean")[0, 0] == pytest.approx(float(found.mean[55]), rel=1e-5)
    assert f"forget text, {int(found.count[55])} tokens" in title(figure)


def test_activations_follow_an_edit_and_leave_no_hook():
    subject, keep = tiny("llama"), torch.ones(40, dtype=torch.bool)
    keep[7] = False
    edit = Edit({Site(1, Point.MLP_NEURONS): Diagonal.fill(keep, torch.full((40,), 2.5))})
    figure = plot.activations(subject, "1.mlp.neurons", 7, corpus(1), corpus(2), edit=edit)
    assert line(figure, "forget mean")[0, 0] == pytest.approx(2.5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_words_of_titles():
    assert percent(0.025) == "2.5 %"
    assert describe_sites([Site(2, Point.MLP_NEURONS)]) == "MLP neurons of layer 2"
    assert describe_sites([Site(i, Point.MLP_OUT) for i in (0, 1, 5)]) == "mlp.out of 3 layers in 0-5"
    assert (text_color((1.0, 1.0, 1.0, 1.0)), text_color((0.0, 0.0, 0.0, 1.0))) == ("black", "white")


NOTHING = prune(scores(), fraction=0.1)
SHIFTED = Edit({Site(0, Point.MLP_OUT): LowRank(torch.eye(4)[:, :1], torch.eye(4)[:, :1])})
KEPT = Edit({MLP[0]: Diagonal.mask(torch.ones(WIDTH, dtype=torch.bool))})
REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no trajectory": (lambda: plot.trajectory(), ArgumentError, "given no trajectory to draw"),
    "no step": (lambda: plot.trajectory(Trajectory(steps().steps[:1], {})), SelectionError, "trajectory 0 has 1 step, none that prunes"),
    "labels": (lambda: plot.trajectory(steps(), labels=["a", "b"]), ArgumentError, "2 labels for 1 trajectories"),
    "control": (lambda: plot.trajectory(steps(), control=[]), ArgumentError, "control holds no point"),
    "no score": (lambda: plot.specialization(Scores({}, {})), ArgumentError, "given no score to draw"),
    "all protected": (lambda: plot.specialization(scores(protected=WIDTH)), ArgumentError, "all 120 neurons of 3 sites are protected"),
    "importance": (lambda: plot.importances(collection("a", 1), collection("b", 2), importance="abz"), UnknownName, "did you mean 'abs'"),
    "signed": (lambda: plot.importances(collection("a", 1), collection("b", 2), importance="attribution"), UnsuitableImportance, "signed"),
    "all dead": (lambda: plot.importances(collection("a", 1, dead=WIDTH), collection("b", 2)), SelectionError, "none of 120 neurons has importance"),
    "elsewhere": (lambda: plot.importances(collection("a", 1), collection("b", 2), edit=KEPT), SelectionError, "prunes none of the collected neurons"),
    "not a mask": (lambda: plot.pruned_per_layer(SHIFTED), ArgumentError, "0.mlp.out holds a LowRank, which prunes no single neurons"),
    "no bar": (lambda: plot.pruned_per_layer(KEPT), SelectionError, "no neuron is pruned"),
    "no bar of steps": (lambda: plot.pruned_per_layer(Trajectory(steps().steps[:1], {})), SelectionError, "no neuron is pruned"),
    "no result": (lambda: plot.selectivity_strip({}), ArgumentError, "given no result to draw"),
    "kind": (lambda: plot.selectivity_strip({"x": (1.0, "mpl")}), UnknownName, "'x' has kind 'mpl'; did you mean 'mlp'"),
    "not finite": (lambda: plot.selectivity_strip({"x": (float("nan"), "mlp")}), ArgumentError, "'x' has selectivity nan"),
    "no set": (lambda: plot.transfer(np.zeros((0, 0)), []), ArgumentError, "given no set to draw"),
    "matrix": (lambda: plot.transfer(np.zeros((2, 3)), ["a", "b"]), ShapeError, r"matrix has shape \(2, 3\), 2 names need"),
    "overlap": (lambda: plot.transfer(np.zeros((2, 2)), ["a", "b"], np.eye(3)), ShapeError, r"overlap has shape \(3, 3\)"),
    "no edit": (lambda: plot.overlap([]), ArgumentError, "given no edit to compare"),
    "empty edit": (lambda: plot.overlap([NOTHING, KEPT]), SelectionError, "edit 1 prunes no neuron"),
    "no neuron": (lambda: plot.activations(tiny("llama"), "1.mlp.neurons", 40, corpus(1), corpus(2)), ArgumentError, r"1.mlp.neurons has no neuron 40; its neurons are 0\.\.39"),
    "no layer": (lambda: plot.activations(tiny("llama"), "9.mlp.neurons", 0, corpus(1), corpus(2)), UnknownSite, r"layers are 0\.\.1"),
    "bins": (lambda: neuron_figure(bins=0), ArgumentError, "bins=0"),
    "first only": (lambda: plot.activations(tiny("llama"), "1.mlp.neurons", 0, tokens([{"input_ids": ids(3, 1)}], "short"), corpus(2)), NotEnoughRows, "corpus 'short': no counted token reaches neuron 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    draw, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        draw()


def test_an_activation_that_is_not_finite_is_refused():
    subject = tiny("llama")
    with torch.no_grad():
        subject.model.model.layers[1].mlp.up_proj.weight[7] = torch.inf
    with pytest.raises(
        NotFinite, match=r"neuron 7 of 1\.mlp\.neurons is not finite on 'code'; load the model in float32"
    ):
        plot.activations(subject, "1.mlp.neurons", 7, corpus(1, "code"), corpus(2))
