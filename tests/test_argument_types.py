"""What is given in place of a model, an edit or a path is refused with what to give instead."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

import repedit as rp
from repedit.errors import ArgumentError, NotAModel, NotFound, RepeditError
from repedit.lower import lower, stages
from tests.edits import mask, projection
from tests.tiny import logits, tiny

SPACES = (rp, rp.fit, rp.metrics, rp.plot)
FUNCTIONS = {
    f"{space.__name__}.{name}": function
    for space in SPACES
    for name in space.__all__
    if inspect.isfunction(function := getattr(space, name))
    and any(p.annotation in ("Subject", rp.Subject) for p in inspect.signature(function).parameters.values())
}
"""The public functions that take a Subject and no path in its place."""


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """The types that the tests otherwise check in every call are what a user may get wrong."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def filled(function: Callable[..., Any], model: object) -> dict[str, Any]:
    """A value for every argument that has no default, which is the model where a Subject is expected."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: model if p.annotation in ("Subject", rp.Subject) else None for p in required}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "model", [tiny("llama").model, "smollm2-135m", Path("model"), None], ids=["model", "name", "path", "none"]
)
def test_what_is_no_subject_is_refused(name, model):
    with pytest.raises(NotAModel, match=r"was given where a Subject is needed; make one with repedit.load\(path\) or"):
        inspect.unwrap(FUNCTIONS[name])(**filled(FUNCTIONS[name], model))


def test_the_functions_that_take_a_subject_are_found():
    assert {"repedit.collect", "repedit.apply", "repedit.fit.overwrite", "repedit.plot.delta"} <= set(FUNCTIONS)


def test_an_edit_is_not_hooked_into_what_is_no_subject():
    with pytest.raises(NotAModel, match="a PosixPath was given where a Subject is needed"):
        projection(tiny("llama"), "0.mlp.out").hooked(Path("model")).__enter__()


def no_edit_is_lost(given, apply=rp.apply):
    """The law: several edits are all applied, or refused, whatever holds them."""
    lm = tiny("llama")
    edits = [projection(lm, "0.mlp.out"), mask(lm, "1.mlp.neurons")]
    try:
        found = apply(given(edits), lm)
    except RepeditError:
        return
    assert logits(found).equal(logits(rp.apply(edits, lm)))


HOLDERS = {"list": list, "tuple": tuple, "iterator": iter, "map": lambda edits: map(rp.Edit, [e.maps for e in edits]), "dict": dict.fromkeys}  # fmt: skip


@pytest.mark.parametrize("name", HOLDERS)
def test_no_edit_is_lost(name):
    no_edit_is_lost(HOLDERS[name])


def test_an_edit_that_a_check_takes_from_an_iterator_is_caught():
    def apply(change, lm):
        next(iter(change))
        return rp.apply(list(change), lm)

    with pytest.raises(AssertionError):
        no_edit_is_lost(iter, apply)


@pytest.mark.parametrize(
    "change", [None, "edit.safetensors", "", Path("edit.safetensors"), {}, 5, ["edit.safetensors"], iter([])]
)
def test_what_is_no_change_is_refused(change, tmp_path):
    lm = tiny("llama")
    calls = (
        lambda: rp.apply(change, lm), lambda: rp.export(change, lm, tmp_path / "out"), lambda: stages(change),
        lambda: lower(change, lm.architecture, lm.specs), lambda: rp.export(change, lm, tmp_path / "out", structure="slim"),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(
            ArgumentError, match=r"a change of type .* was given; give an Edit or a Delta, or a list of them"
        ):
            call()


@pytest.mark.parametrize("target", [None, 5, tiny("llama")])
def test_what_is_no_path_is_refused(target):
    lm = tiny("llama")
    with pytest.raises(ArgumentError, match=r"the target .* cannot be a path: .*; give another name"):
        rp.export(mask(lm, "1.mlp.neurons"), lm, target)
    with pytest.raises(
        NotFound, match=r"^LlamaForCausalLM.{0,60} cannot be a path: .*; give the path of a file or directory"
    ) as caught:
        rp.export(mask(lm, "1.mlp.neurons"), lm.model, "out")
    assert len(str(caught.value)) < 300
