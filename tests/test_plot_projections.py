"""Figures of projections show the numbers they were given, completely and legibly, and refuse to draw nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from repedit import fit, plot
from repedit.edit import Edit
from repedit.errors import ArgumentError, FractionError, NotFinite, RankError, ShapeError
from repedit.kernels.dispatch import LEAK_LIMITS
from repedit.linear_maps import Diagonal, LowRank
from repedit.plot import TradeOff
from repedit.plot.canvas import NEUTRAL
from repedit.plot.projections import MOST, spread
from repedit.rewrite.certificate import Certificate, TensorCertificate
from repedit.sites import Point, Site
from repedit.stats import Moments
from tests.figure_laws import check_legible, laid_out, line, overlapping, title

WIDTH, NAN = 24, float("nan")
TASKS = ["capitals", "symbols", "opposites"]
DONE = [[0.96, 1.0, 0.9, 0.97], [0.2, 0.98, 0.9, 0.96], [0.25, 0.15, 0.88, 0.95], [0.3, 0.2, 0.1, 0.94]]
LONG = [f"task {i} with a name that is long" for i in range(8)]


def results(interval: tuple[float, float] | None = None) -> dict[str, list[TradeOff]]:
    """Out of order, with ranks that are not powers of two."""
    mrp = [TradeOff(12, 0.3, 0.9, interval), TradeOff(0, 0.96, 0.97), TradeOff(3, 0.7, 0.95)]
    return {"mrp": mrp, "random of equal rank": [TradeOff(3, 0.95, 0.96), TradeOff(12, 0.94, 0.95)]}


def spectra(energy: float = 0.8, rows: int = 200) -> fit.Spectra:
    """Forget and retain with different energies, in `rows` rows each."""
    sides = []
    for seed, power in ((1, 0.5), (2, 1.0)):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        sides.append(Moments(WIDTH).update(x * torch.arange(1.0, WIDTH + 1) ** -power))
    return fit.spectra(*sides, rank=4, energy=energy)


def edit(seed: int, layers: Sequence[int] = (0, 1, 2), rank: int = 4, width: int = WIDTH) -> Edit:
    return Edit({Site(i, Point.MLP_OUT): fit.random_basis(width, rank=rank, seed=100 * seed + i) for i in layers})


def certificate(names: Sequence[str], dtypes: Sequence[str] = ("bfloat16",), worst: Sequence[str] = ()) -> Certificate:
    """Leaks of 1e-7 before and 1e-3 after the cast; ten times that after it for the worst."""
    rows = {
        name: TensorCertificate(16, 1e-7, 1e-2 if name in worst else 1e-3, 1e-5, dtypes[i % len(dtypes)])
        for i, name in enumerate(names)
    }
    return Certificate("folded", "exact", 16 * len(rows), 1e-2 if worst else 1e-3, rows)


def weights(layers: int, *modules: str) -> list[str]:
    return [f"model.layers.{i}.{module}.weight" for i in range(layers) for module in modules or ("mlp.down_proj",)]


def texts(axes: Axes) -> list[str]:
    return [t.get_text() for t in axes.texts if t.get_text()]


def frames(axes: Axes, style: str) -> set[tuple[int, int]]:
    """(row, column) of the cells with a frame."""
    found = [item for item in axes.lines if len(item.get_xdata()) == 5 and item.get_linestyle() == style]
    return {(round(np.mean(i.get_ydata()[:4])), round(np.mean(i.get_xdata()[:4]))) for i in found}


FIGURES: dict[str, Callable[[], Figure]] = {
    "rank_tradeoff": lambda: plot.rank_tradeoff(results((0.2, 0.4)), chance=0.125),
    "rank_tradeoff of one value": lambda: plot.rank_tradeoff({"mrp": [TradeOff(8, 0.3, 0.9)]}, chance=0.125),
    "rank_tradeoff of many": lambda: plot.rank_tradeoff(
        {f"method {i} with a name that is long": [TradeOff(r, 0.3, 0.9) for r in range(1, 40, 2)] for i in range(12)}
    ),
    "spectra": lambda: plot.spectra(spectra(), notes=["12.mlp.out"]),
    "spectra of few rows": lambda: plot.spectra(spectra(0.3, rows=8)),
    "layer_rank": lambda: plot.layer_rank(np.ones((30, 5)), layers=range(30), ranks=[2, 4, 8, 16, 32], label="KL, nats"),
    "layer_rank of one": lambda: plot.layer_rank([[0.5]], layers=["every layer of the model"], ranks=[128], label="accuracy"),
    "continual": lambda: plot.continual(DONE, TASKS, untouched=["languages"], rows=["original", *TASKS], chance=0.125),
    "continual of one row": lambda: plot.continual(DONE[1:2], TASKS, untouched=["languages"]),
    "continual of eight": lambda: plot.continual(np.full((8, 10), 0.5), LONG, untouched=["official languages", "prose"]),
    "principal_angles": lambda: plot.principal_angles({name: edit(i) for i, name in enumerate(TASKS)}),
    "principal_angles of eight": lambda: plot.principal_angles({n: edit(i, (i, i + 1)) for i, n in enumerate(LONG)}),
    "leakage": lambda: plot.leakage(certificate(weights(40, "mlp.experts.7.down_projection.with_a_long_name"))),
    "leakage of one": lambda: plot.leakage(Certificate("folded", "exact", 1, 0.0, {"w": TensorCertificate(1, 0.0, 0.0, 0.0, "float32")})),
}  # fmt: skip


@cache
def drawn(name: str) -> Figure:
    """Drawn once; no test changes one."""
    return laid_out(FIGURES[name]())


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_legible_and_says_what_it_shows(name):
    check_legible(drawn(name), slanted=name.startswith(("continual", "principal_angles")))


def test_labels_that_are_not_spread_are_caught(monkeypatch):
    monkeypatch.setattr("repedit.plot.projections.spread", lambda wanted, sizes: wanted)
    figure = FIGURES["rank_tradeoff of many"]()
    figure.draw_without_rendering()
    assert overlapping(figure, slanted=False)


def test_tradeoff_lines_are_the_values_in_the_order_of_ranks():
    figure = plot.rank_tradeoff(results())
    assert_allclose(line(figure, "mrp"), [[0, 3, 12], [0.96, 0.7, 0.3]])
    assert_allclose(line(figure, "mrp", 1), [[0, 3, 12], [0.97, 0.95, 0.9]])
    assert [axes.get_ylabel() for axes in figure.axes] == ["forget accuracy", "retain accuracy"]
    assert "2 methods; ranks 0-12" in title(figure)


@pytest.mark.parametrize("panel", [0, 1])
def test_every_method_is_labelled_and_the_control_is_grey(panel):
    axes = plot.rank_tradeoff(results(), chance=0.125).axes[panel]
    colours = {str(item.get_label()): to_hex(item.get_color()).upper() for item in axes.lines}
    assert len(axes.lines) == 3
    assert colours["random of equal rank"] == NEUTRAL
    assert colours["mrp"] not in (NEUTRAL, "#000000")
    assert texts(axes) == ["mrp", "random of equal rank", "chance 0.125"]


def test_chance_is_a_dashed_line_where_it_is_given():
    found = next(i for i in plot.rank_tradeoff(results(), chance=0.125).axes[0].lines if i.get_label() == "chance")
    assert found.get_linestyle() == "--"
    assert_allclose(found.get_ydata(), 0.125)
    assert not [i for i in plot.rank_tradeoff(results()).axes[0].lines if i.get_label() == "chance"]


def test_ranks_are_ticks_a_doubling_apart():
    axes = plot.rank_tradeoff({"mrp": [TradeOff(r, 0.5, 0.5) for r in (0, 1, 2, 4, 16)]}).axes[1]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "2", "4", "16"]
    places = axes.transData.transform([(r, 0.5) for r in (0, 1, 2, 4, 16)])[:, 0]
    assert_allclose(np.diff(places) / (places[1] - places[0]), [1, 1, 1, 2])


def test_every_rank_has_a_tick_even_where_its_name_has_no_room():
    axes = plot.rank_tradeoff({"mrp": [TradeOff(r, 0.5, 0.5) for r in range(1, 65)]}).axes[1]
    assert {*axes.get_xticks(), *axes.get_xticks(minor=True)} == set(range(1, 65))
    assert len(axes.get_xticks()) < 20


def test_intervals_are_drawn_where_they_are_known():
    figure = plot.rank_tradeoff(results((0.2, 0.4)))
    (bar,) = figure.axes[0].collections
    assert_allclose(bar.get_segments()[0], [[12, 0.2], [12, 0.4]])
    assert "bars: intervals" in title(figure)
    assert "bars" not in title(plot.rank_tradeoff(results()))


@pytest.mark.parametrize("wanted", [[0.5] * 6, [0.0, 0.01, 0.02], [1.0, 0.99, 0.3], [0.9]])
def test_labels_keep_apart_and_in_order(wanted):
    size = 0.15
    found = spread(wanted, [size] * len(wanted))
    assert all(b - a >= size - 1e-9 for a, b in pairwise(sorted(found)))
    assert np.argsort(found, kind="stable").tolist() == np.argsort(wanted, kind="stable").tolist()
    assert min(found) >= size / 2 - 1e-9
    assert max(found) <= 1 - size / 2 + 1e-9


def test_spectra_lines_are_the_energies_on_logarithmic_axes():
    given = spectra()
    figure = plot.spectra(given)
    for name, values in (("forget", given.forget), ("retain", given.retain), ("forget outside", given.residual)):
        assert_allclose(line(figure, name), [1 + np.arange(len(values)), values])
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("log", "log")
    assert f"{100 * given.share:.3g} % of forget energy outside the cut" in title(figure)


@pytest.mark.parametrize("energy", [0.3, 0.8])
def test_spectra_mark_the_cut_after_its_last_direction(energy):
    given = spectra(energy)
    figure = plot.spectra(given)
    assert_allclose(line(figure, "cut")[0], given.cut + 0.5)
    held = float(given.retain[: given.cut].sum() / given.retain.sum())
    assert held >= energy
    assert texts(figure.axes[0]) == [f"cut: first {given.cut}\nhold {100 * held:.3g} %\nof retain"]


def test_spectra_without_a_cut_mark_none():
    figure = plot.spectra(spectra(0.0))
    assert "no cut" in title(figure)
    assert not [item for item in figure.axes[0].lines if item.get_label() == "cut"]


def test_energies_that_are_rounding_are_counted_not_drawn():
    given = spectra(rows=8)
    figure = plot.spectra(given)
    hidden = sum(int((v < 1e-12 * given.forget[0]).sum()) for v in (given.forget, given.retain, given.residual))
    assert hidden
    assert f"{hidden} energies below 1e-12 of the largest not drawn" in title(figure)
    assert line(figure, "forget").shape[1] == 8


def test_layer_rank_writes_every_cell():
    figure = plot.layer_rank(
        [[0.9, 0.25], [0.5, NAN], [1.0, 0.0]], layers=[0, 1, 2], ranks=[4, 16], label="forget accuracy"
    )
    axes = figure.axes[0]
    assert texts(axes) == ["0.90", "0.25", "0.50", "n/a", "1.00", "0.00"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0", "1", "2"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["4", "16"]
    assert (axes.get_ylabel(), axes.get_xlabel(), figure.axes[1].get_ylabel()) == ("layer", "rank", "forget accuracy")
    assert "Forget accuracy by layer and rank 3 layers and 2 ranks; 1 cell not measured" in title(figure)  # fmt: skip


@pytest.mark.parametrize(
    ("values", "written"), [((12.34, 1234.5), ["12.3", "1.23e+03"]), ((0.0012, 0.0), ["0.0012", "0"])]
)
def test_layer_rank_names_ranges_and_keeps_the_digits_of_large_and_small_values(values, written):
    axes = plot.layer_rank([[v] for v in values], layers=["0-7", "8-20"], ranks=[4], label="perplexity").axes[0]
    assert texts(axes) == written
    assert axes.get_ylabel() == "layers"


def test_the_first_row_of_a_table_is_on_top():
    axes = plot.layer_rank([[0.0], [1.0]], layers=[0, 1], ranks=[4], label="x").axes[0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert_allclose(axes.images[0].get_array(), [[0], [1]])


def test_continual_writes_tasks_and_untouched_domains_apart():
    figure = plot.continual(DONE, TASKS, untouched=["languages"], rows=["original", *TASKS], chance=0.125)
    tasks, kept = figure.axes[:2]
    assert texts(tasks) == [f"{v:.2f}" for row in DONE for v in row[:3]]
    assert texts(kept) == ["0.97", "0.96", "0.95", "0.94"]
    assert [t.get_text() for t in tasks.get_yticklabels()] == ["original", *TASKS]
    assert [t.get_text() for t in (*tasks.get_xticklabels(), *kept.get_xticklabels())] == [*TASKS, "languages"]
    assert "3 tasks; earlier tasks end at 0.30 or below; chance 0.125" in title(figure)


def test_continual_frames_what_was_just_forgotten_and_what_must_stay_low():
    axes = plot.continual(DONE, TASKS, untouched=["languages"], rows=["original", *TASKS]).axes[0]
    assert frames(axes, "-") == {(1, 0), (2, 1), (3, 2)}
    assert frames(axes, "--") == {(2, 0), (3, 0), (3, 1)}
    assert axes.get_legend_handles_labels()[1] == ["just forgotten", "forgotten earlier, must stay low"]


def test_continual_frames_follow_the_order_of_the_rows():
    order = ["opposites", "capitals"]
    axes = plot.continual(np.array(DONE)[1:3, :3], TASKS, rows=order).axes[0]
    assert frames(axes, "-") == {(0, 2), (1, 0)}
    assert frames(axes, "--") == {(1, 2)}


def test_continual_marks_chance_in_the_bar_and_counts_what_is_done():
    figure = plot.continual([row[:3] for row in DONE[1:3]], TASKS, chance=0.125)
    assert any(np.allclose(item.get_ydata(), 0.125) for item in figure.axes[-1].lines)
    assert "2 of 3 tasks unlearnt; earlier tasks end at 0.25 or below" in title(figure)
    assert frames(figure.axes[0], "-") == {(0, 0), (1, 1)}


def test_principal_angles_are_mean_squared_cosines_over_shared_sites():
    edits = {"a": edit(0), "b": edit(1, (1, 2, 3))}
    shared = [Site(i, Point.MLP_OUT) for i in (1, 2)]
    expected = np.mean(
        [(edits["a"].maps[s].u.double().T @ edits["b"].maps[s].u.double()).square().sum() / 4 for s in shared]
    )
    figure = plot.principal_angles(edits)
    assert_allclose(figure.axes[0].images[0].get_array(), [[1, expected], [expected, 1]], rtol=1e-5)
    assert texts(figure.axes[0]) == ["1.000", f"{expected:.3f}", f"{expected:.3f}", "1.000"]
    assert "sites shared by a pair: 2; random subspaces: 0.167 (k/d)" in title(figure)


def test_random_subspaces_have_the_angles_the_title_says():
    figure = plot.principal_angles({"a": edit(0, range(60), 3, 48), "b": edit(1, range(60), 6, 48)})
    assert "random subspaces: 0.125 (k/d)" in title(figure)
    # Measured 0.003 off; 0.02 is five standard errors of the mean over 60 sites.
    assert float(figure.axes[0].images[0].get_array()[0, 1]) == pytest.approx(6 / 48, abs=0.02)


def test_spans_of_a_continual_series_hold_each_other_and_the_title_says_so():
    first, other = edit(0), edit(1)
    union = Edit({site: fit.union(map_, other.maps[site]) for site, map_ in first.maps.items()})  # type: ignore[arg-type]
    figure = plot.principal_angles({"capitals": first, "then symbols": union})
    assert "1 pair where one span holds the other" in title(figure)
    assert "holds" not in title(plot.principal_angles({"a": first, "b": other}))


def test_tasks_without_a_shared_site_get_no_number():
    axes = plot.principal_angles({"a": edit(0, (0,)), "b": edit(1, (0, 1)), "c": edit(2, (1,))}).axes[0]
    assert [t for t in texts(axes) if t == "n/a"] == ["n/a"] * 2


def test_leakage_bars_are_the_leaks_before_and_after_the_cast():
    names = weights(3)
    axes = plot.leakage(certificate(names, worst=names[1:2])).axes[0]
    ends = [[bar.get_x() + bar.get_width() for bar in bars] for bars in axes.containers]
    assert_allclose(ends, [[1e-7] * 3, [1e-3, 1e-2, 1e-3]])
    assert axes.get_xscale() == "log"
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"{name}, bfloat16" for name in names]
    assert texts(axes) == ["1.0e-07 → 1.0e-03", "1.0e-07 → 1.0e-02", "1.0e-07 → 1.0e-03", "before → stored"]


def test_leakage_has_one_limit_a_dtype_and_counts_what_is_beyond():
    figure = plot.leakage(certificate(weights(4), ("bfloat16", "float32")))
    for dtype in (torch.bfloat16, torch.float32):
        assert_allclose(line(figure, f"limit of {str(dtype).removeprefix('torch.')}")[0], LEAK_LIMITS[dtype])
    assert "folded, exact; 64 directions over 4 tensors; largest leak 1.0e-03; 2 of 4 beyond the limit" in title(figure)
    assert "beyond" not in title(plot.leakage(certificate(weights(4))))


def test_leakage_of_a_dtype_without_a_limit_has_no_line():
    figure = plot.leakage(certificate(weights(2), ("float8_e4m3fn",)))
    assert [str(item.get_label()) for item in figure.axes[0].lines if "limit" in str(item.get_label())] == []


def shown(figure: Figure) -> list[str]:
    return [t.get_text().replace("\n", "").split(",")[0] for t in figure.axes[0].get_yticklabels()]


def test_many_tensors_are_the_worst_of_each_layer_and_the_rest_is_counted():
    names = ["model.embed_tokens.weight", *weights(30, "attn.o_proj", "mlp.down_proj")]
    worst = [name for i, name in enumerate(names[1:]) if i // 2 % 2 == i % 2]
    figure = plot.leakage(certificate(names, worst=worst))
    assert shown(figure) == [names[0], *worst]
    assert "the worst of each layer, 30 tensors not shown" in title(figure)


def test_many_layers_are_the_worst_of_them():
    names = weights(80, "attn.o_proj", "mlp.down_proj")
    worst = names[100:110]
    figure = plot.leakage(certificate(names, worst=worst))
    assert len(shown(figure)) == MOST
    assert set(worst[::2]) <= set(shown(figure))
    assert f"the worst of the {MOST} worst layers, {160 - MOST} tensors not shown" in title(figure)


def measured_by_limits() -> bool:
    """float32 at 1e-3 is 100 times its limit, bfloat16 at 1e-2 is within its own."""
    names = weights(40, "attn.o_proj", "mlp.down_proj")
    figure = plot.leakage(certificate(names, ("bfloat16", "float32"), worst=names[::2]))
    return all("mlp.down_proj" in name for name in shown(figure))


def test_the_worst_is_measured_by_the_limit_of_its_dtype(monkeypatch):
    assert measured_by_limits()
    monkeypatch.setattr("repedit.plot.projections._beyond", lambda row: row.leak)
    assert not measured_by_limits()


def test_notes_are_in_the_title():
    made = [
        plot.rank_tradeoff(results(), notes=["on mars"]),
        plot.spectra(spectra(), notes=["on mars"]),
        plot.layer_rank([[1.0]], layers=[0], ranks=[1], label="x", notes=["on mars"]),
        plot.continual([[0.5]], ["a"], notes=["on mars"]),
        plot.principal_angles({"a": edit(0), "b": edit(1)}, notes=["on mars"]),
        plot.leakage(certificate(weights(1)), notes=["on mars"]),
    ]
    assert all("on mars" in title(figure) for figure in made)


PRUNED = Edit({Site(0, Point.MLP_OUT): Diagonal.mask(torch.arange(WIDTH) > 2)})
EMPTY = Edit({Site(0, Point.MLP_OUT): LowRank(torch.zeros(WIDTH, 0), torch.zeros(WIDTH, 0))})
NOWHERE = Certificate("folded", "exact", 0, 0.0, {})
ZERO = torch.zeros(WIDTH, dtype=torch.float64)
REFUSALS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "negative rank": (lambda: TradeOff(-1, 0.5, 0.5), RankError, "rank -1 is negative; the unedited model has rank 0"),
    "per cent": (lambda: TradeOff(4, 50.0, 0.5), FractionError, r"forget accuracy 50.0 lies outside \[0, 1\]; give a fraction, not per cent"),
    "nan": (lambda: TradeOff(4, 0.5, NAN), FractionError, "retain accuracy nan lies outside"),
    "interval": (lambda: TradeOff(4, 0.5, 0.5, (0.6, 0.7)), FractionError, r"forget_interval \(0.6, 0.7\) does not hold the accuracy 0.5"),
    "no method": (lambda: plot.rank_tradeoff({}), ArgumentError, "given no method to draw"),
    "no value": (lambda: plot.rank_tradeoff({"mrp": []}), ArgumentError, "method 'mrp' has no value to draw"),
    "rank twice": (lambda: plot.rank_tradeoff({"mrp": [TradeOff(4, 0.5, 0.5)] * 2}), ArgumentError, "method 'mrp' has rank 4 more than once"),
    "chance": (lambda: plot.rank_tradeoff(results(), chance=12.5), FractionError, r"chance=12.5 lies outside \[0, 1\]"),
    "no energy": (lambda: plot.spectra(fit.Spectra(ZERO, ZERO, ZERO, 0)), ArgumentError, "no direction has energy"),
    "no layer": (lambda: plot.layer_rank(np.zeros((0, 2)), layers=[], ranks=[1, 2], label="x"), ArgumentError, "given 0 layers and 2 ranks"),
    "values": (lambda: plot.layer_rank(np.zeros((2, 3)), layers=[0, 1], ranks=[1, 2], label="x"), ShapeError, r"values has shape \(2, 3\), 2 layers and 2 ranks need \(2, 2\)"),
    "ragged": (lambda: plot.layer_rank([[0.1, 0.2], [0.1]], layers=[0, 1], ranks=[1, 2], label="x"), ShapeError, r"values has rows of \[1, 2\] values; give every row 2"),
    "infinite": (lambda: plot.layer_rank([[0.1, float("inf")]], layers=[0], ranks=[1, 2], label="x"), NotFinite, r"values is infinite at \(0, 1\)"),
    "all nan": (lambda: plot.layer_rank([[NAN, NAN]], layers=[0], ranks=[1, 2], label="x"), ArgumentError, "values holds no number to draw; all 2 values are NaN"),
    "no task": (lambda: plot.continual(DONE, []), ArgumentError, "given no task to draw"),
    "task twice": (lambda: plot.continual(DONE, TASKS, untouched=["capitals"]), ArgumentError, "tasks and untouched hold 'capitals' more than once"),
    "no row": (lambda: plot.continual(np.zeros((0, 3)), TASKS), ArgumentError, "matrix has no cell to draw: 0 rows, 3 tasks and 0 untouched domains"),
    "unnamed original": (lambda: plot.continual(DONE, TASKS, untouched=["languages"]), ShapeError, r"4 rows for 3 tasks; name them if the first is the original: rows=\['original'"),
    "rows": (lambda: plot.continual(DONE, TASKS, rows=TASKS), ShapeError, "matrix has 4 rows, rows= names 3"),
    "row": (lambda: plot.continual(DONE[:2], TASKS, rows=["capitals", "after symbols"]), ArgumentError, "row 'after symbols' is not a task; only the first row may have another name"),
    "row twice": (lambda: plot.continual(DONE[:2], TASKS, rows=["capitals", "capitals"]), ArgumentError, "names a task twice"),
    "columns": (lambda: plot.continual(DONE[:3], TASKS), ShapeError, r"matrix has shape \(3, 4\), 3 rows, 3 tasks and 0 untouched domains need \(3, 3\)"),
    "matrix in per cent": (lambda: plot.continual([[50.0]], ["a"]), FractionError, "matrix holds 50, outside"),
    "continual chance": (lambda: plot.continual([[0.5]], ["a"], chance=-0.1), FractionError, "chance=-0.1 lies outside"),
    "one edit": (lambda: plot.principal_angles({"a": edit(0)}), ArgumentError, "given 1 edits; an angle needs at least 2"),
    "a mask": (lambda: plot.principal_angles({"a": edit(0), "b": PRUNED}), ArgumentError, "'b': 0.mlp.out holds a Diagonal, which removes no subspace"),
    "apart": (lambda: plot.principal_angles({"a": edit(0, (0,)), "b": edit(1, (1,))}), ArgumentError, "no two of the 2 edits share a site"),
    "empty basis": (lambda: plot.principal_angles({"a": edit(0), "b": EMPTY}), ArgumentError, "no two of the 2 edits share a site"),
    "widths": (lambda: plot.principal_angles({"a": edit(0), "b": edit(1, width=8)}), ShapeError, "0.mlp.out: 'b' has width 8, 'a' has width 24; are they of one model"),
    "no tensor": (lambda: plot.leakage(NOWHERE), ArgumentError, r"the certificate \(folded\) lists no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    draw, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        draw()
