"""Figures of a classifier's audit show what it measured, and `repedit vision demo` what became of a request."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from typer.testing import CliRunner

import repedit as rp
from repedit import demo, plot
from repedit.auditing.image_attacks import sides
from repedit.auditing.report import AUC, FORGET, RELEARNING, Report
from repedit.cli import app
from repedit.demo import COLUMNS, RECIPES, RETRAINED_AGAIN, Setting, forget_images
from repedit.errors import ArgumentError, UnknownName
from repedit.metrics.membership import auc
from repedit.vision import Condense, Images, small_cnn
from tests.classifiers import drawn
from tests.figure_laws import check_legible, laid_out
from tests.test_classifier_audit import made, report
from tests.test_public import loaded_by

TINY = Setting(lambda images, seed: small_cnn(images, width=6, hidden=24, seed=seed), train=150, remember=20, epochs=3, lr=5e-3, tuned=1, k=2)  # fmt: skip


@cache
def reports() -> dict[str, Report]:
    m = made()
    alone = rp.audit_classifier(m.model, m.model, m.task, m.splits, reference=m.references[0], relearn=False)
    return {"relabel": report(), "nothing done": alone}


FIGURES = {
    "gap": lambda: plot.gap(reports()),
    "membership": lambda: plot.membership(report()),
    "relearning": lambda: plot.relearning(report()),
    "condensed": lambda: plot.condensed(Condense(k=2, steps=2)(made().model, made().task, made().splits, 0)),
}


@cache
def figure(name: str) -> Figure:
    return laid_out(FIGURES[name]())


@pytest.mark.parametrize("name", FIGURES)
def test_figures_can_be_read(name):
    check_legible(figure(name))
    assert name == "condensed" or all(axes.get_xlabel() for axes in figure(name).axes)


def points(axes) -> list[float]:
    return [float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]


def test_gaps_are_drawn_where_they_were_measured():
    panels = {axes.get_title(): axes for axes in figure("gap").axes}
    for title, measure in (("forget accuracy", FORGET), ("AUC of the loss", AUC)):
        values = [next(g.value for g in found.gaps if g.measure == measure) for found in reports().values()]
        assert_allclose(points(panels[title]), values)
    assert [text.get_text() for text in panels["relearn value"].texts] == ["not measured"]
    names = [label.get_text() for label in panels["forget accuracy"].get_yticklabels()]
    assert names == [f"{name}: {found.verdict.word}" for name, found in reports().items()]


def test_losses_are_drawn_of_every_model_with_their_auc():
    titles = [axes.get_title() for axes in figure("membership").axes]
    for title, role in zip(titles, ("original", "edited", "reference"), strict=True):
        finding = report().finding(role, "membership")
        assert f"AUC {auc(*sides(finding)):.2f} [" in title
    for axes in figure("membership").axes:
        assert len(axes.patches) == 2, "members and others"
        for patch in axes.patches:
            assert float(patch.get_data().values.sum()) == pytest.approx(1)


def test_relearning_is_drawn_by_epoch():
    (axes,) = figure("relearning").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert axes.get_xlabel() == "epoch" and {"edited", "original", "reference"} <= set(lines)
    edited = report().finding("edited", "relearn")
    assert any(
        np.array_equal(line.get_ydata(), edited.correct.mean(1)) for line in axes.lines if len(line.get_ydata()) == 11
    )


def test_figures_are_the_same_from_a_saved_report(tmp_path):
    report().save(tmp_path)
    loaded = Report.load(tmp_path)
    for draw in (plot.membership, plot.relearning, lambda found: plot.gap({"one": found})):
        first, second = draw(report()), draw(loaded)
        assert [a.get_title() for a in first.axes] == [a.get_title() for a in second.axes]


def test_a_made_image_stands_above_the_real_one_that_is_nearest():
    m = made()
    splits = Condense(k=2, steps=2)(m.model, m.task, m.splits, 0)
    real = m.splits.retain[torch.arange(5)]
    shown = [axes for axes in plot.condensed(splits, real, most=3).axes if axes.images]
    first, nearest = (np.asarray(shown[i].images[0].get_array()) for i in (0, 3))
    distances = [np.square(first - x[0].numpy()).sum() for x in real.x.clamp(0, 1)]
    assert_allclose(nearest, real.x[int(np.argmin(distances)), 0].numpy(), atol=1e-6)
    assert shown[0].get_title().startswith("made") and shown[3].get_title().startswith("real")


def test_colour_images_are_drawn_in_colour():
    splits = made().splits
    rgb = Images(torch.rand(40, 3, 8, 8), splits.retain.y[:40], -torch.arange(1, 41))
    held = replace(
        splits,
        retain=rgb,
        forget=_rgb(splits.forget),
        test=_rgb(splits.test),
        holdout=_rgb(splits.holdout),
        remember=None,
    )
    assert np.asarray(plot.condensed(held, most=2).axes[0].images[0].get_array()).shape == (8, 8, 3)


def _rgb(images: Images) -> Images:
    return Images(images.x.expand(-1, 3, -1, -1).clone(), images.y, images.index)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: plot.gap({}), "gap\\(\\) was given no report to draw"),
    (lambda: plot.gap({"a": rp.audit_classifier(made().edited, made().model, made().task, made().splits, relearn=False)}), "'a' has no gap to a retrained model"),
    (lambda: plot.membership(replace(report(), findings={})), "holds no membership attack on images"),
    (lambda: plot.relearning(reports()["nothing done"]), "no attack of this report has settings of at least two steps"),
    (lambda: plot.condensed(made().splits), "most=20, 0 synthetic images; give the result of a data plan"),
    (lambda: plot.condensed(made().splits, most=0), "most=0"),
])  # fmt: skip
def test_there_is_nothing_to_draw(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()


# The demo and its verb.


def images(n=260) -> Images:
    return drawn(n, labels=10, dtype=torch.float32)


def test_a_request_is_carried_out_and_audited_by_recipe():
    setting = replace(TINY, remember=0)
    found = forget_images("class:2", images(), setting=setting, recipes=["relabel", "condense"], references=2)
    assert list(found.reports) == [RETRAINED_AGAIN, "relabel"] and found.refused["condense"].startswith("DataError: ")
    assert len(found.references) == 2 and len(found.reports["relabel"].findings["reference"]) == 8
    assert found.splits.forget.classes == {2} and set(found.seconds["relabel"]) == {"online", "offline"}
    rows = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in found.rows()}
    gaps = {gap.measure: gap for gap in found.reports["relabel"].gaps}
    assert (
        rows["relabel"]["forget"] == f"{gaps[FORGET].value:+.1%}"
        and rows["relabel"]["relearn"] == f"{gaps[RELEARNING].value:+.2f}"
    )
    assert rows[RETRAINED_AGAIN]["of retraining"] == "1.00"


def test_every_recipe_is_offered_and_wrong_labels_are_a_request():
    assert set(RECIPES) == {"finetune", "ascend", "relabel", "relabel runner_up", "multi_gan", "condense", "scrub", "salun", "erase_class", "zero_units"}  # fmt: skip
    found = forget_images("mislabelled:0.2", images(), setting=TINY, recipes=["ascend"], references=1)
    assert len(found.splits.forget) == 30 and found.reports["ascend"].gaps[0].members == "30 forget images"


@pytest.mark.parametrize(("words", "error", "message"), [
    (("klass:3", "digits"), UnknownName, "no request is called 'klass'; give class:3 or mislabelled:0.1"),
    (("class:three", "digits"), ArgumentError, "'class:three': 'three' is not a number"),
    (("class:3", "digit"), UnknownName, "no data set is called 'digit'; did you mean 'digits'"),
    (("class:3", "images"), UnknownName, "no data set is called 'images'"),
])  # fmt: skip
def test_requests_that_cannot_be_read_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        forget_images(*words)


def test_what_a_demo_lacks_is_named():
    with pytest.raises(UnknownName, match="no recipe is called 'relable'; did you mean 'relabel'"):
        forget_images(recipes=["relable"])
    with pytest.raises(ArgumentError, match="references=0; results are compared with retrained models"):
        forget_images(references=0)
    with pytest.raises(ArgumentError, match="images were given without a setting"):
        forget_images("class:1", images())


def run(monkeypatch, *words: str) -> str:
    """The verb on tiny networks and few digits."""
    monkeypatch.setattr(demo, "SETTINGS", {"digits": {"class": TINY, "mislabelled": TINY}})
    result = CliRunner().invoke(app, ["vision", "demo", "--references", "1", "--recipe", "relabel", *words])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def test_the_demo_shows_the_gap_of_every_recipe(monkeypatch, tmp_path):
    text = run(monkeypatch, "--out", str(tmp_path), "--forget", "class:4")
    words = " ".join(text.split())
    assert "gap to 1 retrained models" in words and "retrained again" in words and "no proof of deletion" in words
    saved = Report.load(tmp_path / "class-4" / "relabel")
    assert saved.verdict.word in text and (tmp_path / "class-4" / "gap.png").exists()
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "class-4" / "relabel")]).stdout
    assert "Gap to the retrained model" in shown and AUC in shown


def test_the_demo_as_json_is_the_same_twice(monkeypatch):
    first = json.loads(run(monkeypatch, "--json", "--seed", "3"))
    second = json.loads(run(monkeypatch, "--json", "--seed", "3", "--forget", "class:3"))
    assert set(first) == {"class:3", "mislabelled:0.1"} and set(second) == {"class:3"}
    rows, others = first["class:3"]["recipes"], second["class:3"]["recipes"]
    assert rows and rows.keys() == others.keys()
    for name, row in rows.items():
        assert row["verdict"] == others[name]["verdict"] and str(row["gaps"]) == str(others[name]["gaps"])


def test_help_of_the_demo_imports_no_torch():
    code = "from typer.testing import CliRunner\nfrom repedit.cli import app\nassert CliRunner().invoke(app, ['vision', 'demo', '--help']).exit_code == 0"
    assert loaded_by(code) == set()
