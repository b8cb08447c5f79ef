"""What lies between two models, and where an edited one still knows: laws on models of which the answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repedit.auditing import diagnostics
from repedit.auditing.attack import ask, deep_copy
from repedit.auditing.controls import edited as writing
from repedit.auditing.diagnostics import line, uds, with_examples_and_diagnostics
from repedit.auditing.runner import Audited
from repedit.hashing import fingerprint
from tests.handmade_reports import report
from tests.taught_models import facts, original, reference


def some(count: int = 40):
    return facts().forget[:count]


def check_ends(score) -> None:
    """The reference itself has nothing left, the original everything, in every layer that counts."""
    gone, there = (score(edited, original(), reference(), some()) for edited in (reference(), original()))
    assert gone["score"] == pytest.approx(1.0) and there["score"] == pytest.approx(0.0, abs=1e-6)
    assert gone["facts"] == 40 and len(gone["layers"]) == len(original().layout.layers)
    assert all(layer["D1"] == layer["D2"] for layer in gone["layers"].values())
    assert any(layer["D1"] > 0.5 for layer in gone["layers"].values())


def test_states_of_the_reference_know_nothing_and_those_of_the_original_everything():
    check_ends(uds)


def test_states_put_at_another_token_are_caught(monkeypatch):
    whole = diagnostics._putting
    monkeypatch.setattr(diagnostics, "_putting", lambda places, states: whole([0] * len(places), states))
    with pytest.raises(AssertionError):
        check_ends(uds)


def test_a_fact_that_does_not_name_its_entity_is_left_out():
    nameless = [replace(fact, entity="nobody at all") for fact in some(3)]
    assert uds(reference(), original(), reference(), [*nameless, *some(20)[10:]])["facts"] == 10


def test_where_no_layer_of_the_reference_costs_anything_there_is_no_score():
    assert uds(reference(), original(), original(), some())["score"] is None


def test_the_line_goes_from_the_original_to_the_edited_model():
    before = [fingerprint(m.model) for m in (original(), reference())]
    found = line(reference(), original(), some())
    assert list(found["accuracy"]) == ["0.25", "0.5", "0.75"]
    assert [fingerprint(m.model) for m in (original(), reference())] == before
    one, other = (torch.nn.utils.parameters_to_vector(m.model.parameters()).detach() for m in (original(), reference()))
    assert found["distance"] == pytest.approx(float((one - other).double().norm()), rel=1e-5)
    middle = deep_copy(original())
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters((one + other) / 2, middle.model.parameters())
    assert found["accuracy"]["0.5"] == ask(middle, some()).accuracy
    still = line(original(), original(), some())
    assert still["distance"] == 0.0 and set(still["accuracy"].values()) == {ask(original(), some()).accuracy}


def test_a_report_shows_them_where_facts_are_given():
    given = {"edited": writing.nudged(original()), "original": original(), "reference": reference()}
    models = {role: Audited(role, model) for role, model in given.items()}
    found = with_examples_and_diagnostics(replace(report(), examples=(), diagnostics={}), models, some(16))
    assert set(found.diagnostics) == {"update", "survival", "line", "uds"}
    assert found.diagnostics["uds"]["score"] == pytest.approx(0.0, abs=0.05)
    models["edited"].hooked = True
    assert set(
        with_examples_and_diagnostics(replace(report(), examples=(), diagnostics={}), models, some(16)).diagnostics
    ) == {"uds"}
