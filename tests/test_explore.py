"""What can be explored is what was measured: every point, text and slider position against the values it shows."""

from __future__ import annotations

import base64
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import repedit as rp
from repedit import explore
from repedit.errors import ArgumentError, MissingDependency, SelectionError, TargetExists
from tests.saved_models import saved

pytestmark = pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return rp.load(saved(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def sets():
    return rp.data.code(seed=0), rp.data.prose()


@pytest.fixture(scope="module")
def scores(lm, sets):
    return rp.score(*(rp.collect(lm, c, limit_tokens=400, progress=False) for c in sets))


@pytest.fixture(scope="module")
def examples(lm, sets):
    return [rp.max_activating(lm, c, limit_tokens=400, progress=False) for c in sets]


@pytest.fixture(scope="module")
def path(lm, sets):
    options = {"limit_tokens": 300}
    return rp.trajectory(
        lm, *sets, steps=3, fraction_per_step=0.02, collect_options=options, evaluate_options=options, progress=False
    )


def points(explorer):
    """{(site, neuron): (score, rank)} of the points of a map."""
    trace = explorer.figure.data[0]
    rows = zip(trace.text, trace.customdata.tolist(), trace.y.tolist(), strict=True)
    return {(site, neuron): (y, rank) for site, (neuron, rank), y in rows}


def expected(scores):
    """Score of every unprotected neuron, and the scores in falling order."""
    values = {(str(s), i): float(v) for s, score in scores.items() for i, v in enumerate(score.values) if v > -np.inf}
    return values, sorted(values.values(), reverse=True)


def check_points(explorer, scores):
    values, ordered = expected(scores)
    shown = points(explorer)
    assert shown.keys() == values.keys() and len({rank for _, rank in shown.values()}) == len(shown)
    for key, (y, rank) in shown.items():
        assert y == pytest.approx(values[key], rel=1e-6) and ordered[rank - 1] == values[key]


def test_every_neuron_is_shown_with_its_score_and_rank(scores):
    check_points(rp.explore.neurons(scores), scores)


def test_a_neuron_under_another_index_would_be_caught(scores, monkeypatch):
    whole = explore._cloud
    monkeypatch.setattr(explore, "_cloud", lambda s: replace(whole(s), index=np.roll(whole(s).index, 1)))
    with pytest.raises(AssertionError):
        check_points(rp.explore.neurons(scores), scores)


def test_texts_are_those_of_the_neuron_on_both_sets(scores, examples):
    trace = rp.explore.neurons(scores, examples, snippets=10, context=2).figure.data[0]
    told = [i for i, text in enumerate(trace.hovertext) if text]
    assert len(told) == 10
    for i in told:
        neuron = int(trace.customdata[i][0])
        for found in examples:
            assert f"<i>{found.corpus}</i>" in trace.hovertext[i]
            first = found.of(trace.text[i], neuron, context=2)[0]
            assert f"{first.activation:+.3g}" in trace.hovertext[i]
    assert "<script" not in "".join(trace.hovertext)


def test_a_part_is_the_most_extreme_and_said_to_be_a_part(scores):
    explorer = rp.explore.neurons(scores, at_most=20)
    total = len(expected(scores)[0])
    assert {rank for _, rank in points(explorer).values()} == {*range(1, 11), *range(total - 9, total + 1)}
    assert f"the 20 most extreme of {total:,} neurons" in explorer.figure.layout.title.text
    with pytest.raises(ArgumentError, match=r"1 neurons were asked for; give at least 2"):
        rp.explore.neurons(scores, at_most=1)


def test_protected_neurons_are_left_out_and_counted(scores):
    first = next(iter(scores))
    values = scores[first].values.clone()
    values[:3] = -torch.inf
    held = replace(scores, by_site={**scores.by_site, first: replace(scores[first], values=values)})
    explorer = rp.explore.neurons(held)
    check_points(explorer, held)
    assert "protected neurons left out" in explorer.figure.layout.title.text


def test_the_slider_draws_the_line_of_prune(scores):
    layout = rp.explore.neurons(scores).figure.layout
    values, _ = expected(scores)
    for step, fraction in zip(layout.sliders[0].steps, explore.FRACTIONS[-len(layout.sliders[0].steps) :], strict=True):
        keep = rp.top(scores, fraction=fraction)
        pruned = {(str(site), int(i)) for site, mask in keep.items() for i in (~mask).nonzero()[:, 0]}
        height = step.args[0]["shapes[0].y0"]
        assert {key for key, value in values.items() if value >= height} == pruned


def test_the_slider_of_a_trajectory_shows_each_step(path):
    figure = rp.explore.trajectory(path).figure
    for number, (step, (retain, forget)) in enumerate(zip(path.steps, path.drops(), strict=True)):
        values, title, traces = figure.layout.sliders[0].steps[number].args
        assert values["x"][0] == [retain] and values["y"][0] == [forget] and list(traces) == [1, 2]
        pruned = sum(int((~map_.kept).sum()) for map_ in step.edit.maps.values())
        assert sum(values["y"][1]) == pruned and f"{100 * step.fraction:.3g} % pruned" in title["title.text"]


def test_where_nothing_is_interactive_there_is_a_picture(scores, path):
    for explorer in (rp.explore.neurons(scores, at_most=10), rp.explore.trajectory(path)):
        bundle = explorer._repr_mimebundle_()
        assert base64.b64decode(bundle["image/png"])[:8] == b"\x89PNG\r\n\x1a\n"
        assert bundle["application/vnd.plotly.v1+json"]["data"]


def test_a_page_loads_nothing(scores, tmp_path):
    page = rp.explore.neurons(scores).write_html(tmp_path / "map.html")
    text = page.read_text()
    assert "<script src=" not in text and "<link" not in text and "Plotly.newPlot" in text
    with pytest.raises(TargetExists, match=r"map\.html exists; give another path, or overwrite=True"):
        rp.explore.neurons(scores).write_html(page)


def test_without_plotly_it_says_so(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingDependency, match=r"rp\.explore needs plotly"):
        rp.explore.neurons(scores)


def test_a_trajectory_without_steps_is_refused(path):
    with pytest.raises(SelectionError, match=r"has 1 step, none that prunes"):
        rp.explore.trajectory(replace(path, steps=path.steps[:1]))


def test_the_number_of_neurons_with_texts_may_be_none_or_one(scores, examples):
    for snippets in (0, 1, 2):
        shown = rp.explore.neurons(scores, examples[0], snippets=snippets)  # one result, without a list around it
        assert sum(bool(text) for text in shown.figure.data[0].hovertext) == snippets


@pytest.mark.parametrize(
    "options", [{"at_most": 1}, {"at_most": 2.5}, {"at_most": True}, {"snippets": -1}, {"snippets": None}, {"context": -1}, {"context": "6"}], ids=repr
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_numbers_that_cannot_be_meant_are_refused(options, scores, examples):
    (name,) = options
    with pytest.raises(ArgumentError, match=rf"{name}(=|: None was given)"):
        rp.explore.neurons(scores, examples, **options)
