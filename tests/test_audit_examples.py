"""What a report shows beside its verdict: what the models write, and how much of an edit rounding leaves."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest

from repedit.auditing.controls import edited as writing
from repedit.auditing.diagnostics import with_examples_and_diagnostics
from repedit.auditing.runner import Audited
from repedit.models.subject import subject_of
from tests.handmade_reports import report
from tests.taught_models import facts, original, reference

ROLES = ("edited", "original", "reference")


@pytest.fixture
def opened(monkeypatch):
    """The roles of the models that were opened, in turn."""
    roles, whole = [], Audited.opened

    @contextmanager
    def counted(self):
        roles.append(self.role)
        with whole(self) as subject:
            yield subject

    monkeypatch.setattr(Audited, "opened", counted)
    return roles


def models(edited):
    return {role: Audited(role, m) for role, m in zip(ROLES, (edited, original(), reference()), strict=True)}


def examples():
    return tuple({"id": fact.id, "prompt": fact.prompt, "answer": fact.answer} for fact in facts().forget[:2])


def test_every_model_is_opened_once_for_all_that_is_shown(opened):
    given = models(writing.nudged(original()))
    opened.clear()
    found = with_examples_and_diagnostics(replace(report(), examples=examples(), diagnostics={}), given)
    assert sorted(opened) == sorted(ROLES)
    assert all({*ROLES, "attacked"} <= set(example) for example in found.examples)
    assert set(found.diagnostics) == {"update", "survival"}


def test_nothing_is_opened_where_nothing_is_shown(opened):
    given = models(writing.nudged(original()))
    given["edited"].hooked = True
    opened.clear()
    assert (
        with_examples_and_diagnostics(replace(report(), examples=(), diagnostics={}), given).diagnostics == {}
        and opened == []
    )


def test_a_head_that_was_untied_has_no_difference_to_show():
    """It is no parameter of the original, which reads its embeddings in the head's place."""
    tied = subject_of(copy.deepcopy(original().model), original().tokenizer)
    tied.model.lm_head.weight = tied.model.model.embed_tokens.weight
    given = models(writing.nudged(original())) | {"original": Audited("original", tied)}
    found = with_examples_and_diagnostics(
        replace(report(), examples=examples(), diagnostics={}), given, facts().forget[:8]
    )
    assert set(found.diagnostics) == {"uds"}
