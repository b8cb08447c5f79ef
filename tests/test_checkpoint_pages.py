"""The pages of `repedit compare` and `repedit diff` show what was measured, and no text of a model becomes markup."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from repedit.activations.prediction import Predictions
from repedit.cli import app
from repedit.metrics.benchmarks import Comparison
from repedit.report import comparison_page, difference_page, pages
from repedit.rewrite.verification import Difference
from tests.saved_models import saved
from tests.test_report import HOSTILE, Elements, spoiled

NAMES = ("original", "edited/")


def predicted(hits: int) -> Predictions:
    """Eight chunks of ten tokens, of which `hits` are predicted right."""
    counts, right = np.full(8, 10), np.full(8, hits)
    return Predictions(tuple(map(str, range(8))), counts, right, right, counts * 2.0)


@pytest.fixture
def comparison() -> Comparison:
    prompts = ("a prompt", HOSTILE)
    return Comparison({"code": predicted(5)}, {"code": predicted(4)}, prompts, ("one", HOSTILE), ("two", HOSTILE))


def changed(tensor: str, norm: float, rank: int | None = 1) -> Difference:
    return Difference(tensor=tensor, norm=norm, relative=norm / 10, rank=rank, rows=3, columns=4)


def test_a_comparison_shows_accuracies_and_the_drop(comparison):
    page = comparison_page(comparison, NAMES)
    shown = Elements(page).text
    assert "code 50.0% 40.0% 20.0 %" in shown and "original against edited/" in shown and "a prompt" in shown
    assert "drop of top-1 accuracy, per cent: edited on code 20.0" in page


def test_texts_of_models_become_no_markup(comparison):
    assert spoiled(comparison_page(comparison, (HOSTILE, HOSTILE))) == []
    assert spoiled(difference_page([changed(HOSTILE, 1.0)], (HOSTILE, HOSTILE))) == []


def test_unescaped_texts_are_caught(comparison, monkeypatch):
    monkeypatch.setattr(pages, "ENVIRONMENT", pages.ENVIRONMENT.overlay(autoescape=False))
    assert spoiled(comparison_page(comparison, NAMES))


def test_a_comparison_without_a_defined_drop_has_no_chart(comparison):
    page = comparison_page(replace(comparison, base={"code": predicted(0)}), NAMES)
    assert "<svg" not in page and "not defined" in page


def check_norms(differences: list[Difference]) -> None:
    """The largest norm of a layer is the root of the sum of squares of its tensors."""
    page = difference_page(differences, NAMES)
    label = re.search(r"norm of the change by layer: 2 values, the largest (\S+) at layer (\d+)", page)
    assert label is not None and math.isclose(float(label[1]), 5.0) and label[2] == "7"


def test_differences_are_summed_by_layer(monkeypatch):
    differences = [
        changed("m.layers.7.up.weight", 3.0),
        changed("m.layers.7.down.weight", 4.0, None),
        changed("m.layers.1.up", 4.5),
    ]
    check_norms(differences)
    monkeypatch.setattr(pages.math, "sqrt", lambda value: value)
    with pytest.raises(AssertionError):
        check_norms(differences)


def test_equal_checkpoints_are_said_to_be_equal():
    assert "same values in every tensor" in difference_page([], NAMES)
    assert "1 tensor differs" in difference_page([changed("lm_head.weight", 1.0)], NAMES)


def test_both_verbs_write_a_page(tmp_path):
    model = str(saved(tmp_path / "tiny"))
    for verb, words in (("diff", ()), ("compare", ("--limit-tokens", "300", "--prompt", "one"))):
        page = tmp_path / f"{verb}.html"
        done = CliRunner().invoke(app, [verb, model, model, "--out", str(page), *words])
        assert done.exit_code == 0 and "wrote" in done.output and "<!DOCTYPE html>" in page.read_text()
        refused = CliRunner().invoke(app, [verb, model, model, "--out", str(page), *words])
        assert "exists; give another --out" in str(refused.exception)
        refused = CliRunner().invoke(app, [verb, model, model, "--out", str(tmp_path / "page.txt")])
        assert "ends in .html" in str(refused.exception)
