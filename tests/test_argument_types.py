"""What is given in place of a model, an edit or a path is refused with what to give instead."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import repedit as rp
from repedit.errors import (
    ArgumentError,
    DataError,
    DtypeError,
    NotAModel,
    OffloadedTensors,
    RepeditError,
    ShapeError,
    UnknownName,
)
from repedit.lower import lower, stages
from repedit.neurons.selection import check_fraction
from repedit.plan import Plan
from tests.edits import mask, projection
from tests.saved_models import byte_tokenizer, saved
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
    """A value for every argument that has no default: first the model where a Subject is expected."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    subjects = {p.name: model for p in required if p.annotation in ("Subject", rp.Subject)}
    return subjects | {p.name: None for p in required if p.name not in subjects}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "model", [tiny("llama").model, "smollm2-135m", Path("model"), None], ids=["model", "name", "path", "none"]
)
def test_what_is_no_subject_is_refused(name, model):
    with pytest.raises(NotAModel, match=r"was given where a Subject is needed; make one with repedit.load\(path\) or"):
        FUNCTIONS[name](**filled(FUNCTIONS[name], model))


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
            ArgumentError,
            match=r"a change of type .* was given; give an Edit or a Delta|change.* was given where an Edit.* a Delta.* is needed; .*Edit.load",
        ):
            call()


@pytest.mark.parametrize("target", [None, 5, tiny("llama")])
def test_what_is_no_path_is_refused(target):
    lm = tiny("llama")
    with pytest.raises(ArgumentError, match=r"target.*: .* was given where a str or a path is needed"):
        rp.export(mask(lm, "1.mlp.neurons"), lm, target)
    with pytest.raises(
        NotAModel,
        match=r"^source: a LlamaForCausalLM was given where a Subject, a str or a path is needed; make one with",
    ) as caught:
        rp.export(mask(lm, "1.mlp.neurons"), lm.model, "out")
    assert len(str(caught.value)) < 300


# --- Values of other types


BASIS = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
TEXT = rp.data.read([f"the quick brown fox {i} jumps over" for i in range(8)], name="text")
WRONG = {
    "fraction True": (lambda lm: check_fraction("fraction", True), ArgumentError, "fraction=True: a fraction lies in"),
    "fraction text": (lambda lm: check_fraction("fraction", "0.1"), ArgumentError, "fraction='0.1': a fraction lies in"),
    "mask of indices": (lambda lm: rp.Diagonal.mask(torch.tensor([0, 3, 17])), DtypeError, "keep is torch.int64; give a boolean tensor"),
    "mask of shares": (lambda lm: rp.Diagonal.mask(torch.full((4,), 0.5)), DtypeError, "keep is torch.float32; give a boolean"),
    "mask list": (lambda lm: rp.Diagonal.mask([True, False]), ArgumentError, "keep: a list was given where a tensor is needed"),
    "fill of indices": (lambda lm: rp.Diagonal.fill(torch.tensor([0, 3]), torch.ones(2)), DtypeError, "keep is torch.int64"),
    "seed": (lambda lm: rp.random_like(mask(lm, "1.mlp.neurons"), seed=-1), ArgumentError, "seed=-1; give a whole number from 0"),
    "collect name": (lambda lm: rp.collect(lm, "code"), DataError, "corpus='code': a str was given where a corpus is needed; give a corpus, such as"),
    "collect texts": (lambda lm: rp.collect(lm, ["a", "b"]), DataError, "corpus: a list was given where a corpus is needed"),
    "predictions": (lambda lm: rp.predictions(lm, None), DataError, "corpus: None was given where a corpus is needed"),
    "recipe": (lambda lm: rp.unlearn(lm, recipe="npo", forget=TEXT), ArgumentError, r"recipe='npo': a str was given where an UnlearnRecipe, .*; give one of .*npo\(\)"),
    "facts": (lambda lm: rp.data.facts(["capitals"]), ArgumentError, "name: a list was given where a str or a path is needed"),
    "layers": (lambda lm: rp.locate(lm, (), layers=[0]), ArgumentError, r"layers\[0\]=0: an int was given where a str is needed"),
    "selector": (lambda lm: lm.select(None), ArgumentError, "selector: None was given where a str, a Site or a list of str or Site is needed; give a site such as"),
    "one direction": (lambda lm: rp.erase_stream(lm, BASIS[:, 0]), ShapeError, r"the basis is \(24,\); give a tensor \(width, rank\)"),
    "an array": (lambda lm: rp.erase_stream(lm, BASIS.numpy()), ArgumentError, "basis: a ndarray was given where a LowRank or a tensor is needed"),
    "steps": (lambda lm: rp.mrp(lm, forget=TEXT, retain=TEXT, rank=1, config={"steps": "2"}), ArgumentError, "steps='2': a str was given where a whole number or None is needed"),
    "no edited model": (lambda lm: rp.audit(None, original=lm, facts=()), NotAModel, "edited: None was given where a Subject, a str or a path is needed; make one with"),
    "a name of a tokenizer": (lambda lm: rp.wrap(lm.model, "gpt2"), ArgumentError, "tokenizer='gpt2': a str was given where a Tokenizer or None is needed; give what .*AutoTokenizer"),
    "a row without a type": (lambda lm: rp.register(replace(lm.architecture, model_type=" ")), ArgumentError, "model_type=' '; give the model_type of the config"),
    "an option of a lowering": (lambda lm: rp.apply(mask(lm, "1.mlp.neurons"), lm, tyed="both"), UnknownName, "apply has no option 'tyed'; did you mean 'tied'"),
    "an option of a recipe": (lambda lm: rp.recipes.npo(betta=1.0), UnknownName, "npo has no option 'betta'; did you mean 'beta'"),
    "two texts of one name": (lambda lm: rp.compare(lm, lm, [TEXT, TEXT]), ArgumentError, "do not have a name each; give one"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_meant_is_refused(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call(tiny("llama", vocab_size=260))


def test_a_model_without_values_is_not_measured():
    lm = replace(tiny("llama", vocab_size=260), tokenizer=byte_tokenizer())
    lm = replace(lm, model=type(lm.model)(lm.model.config).to("meta"))
    with pytest.raises(
        OffloadedTensors, match=r"on the meta device, where weights have shapes and no values; load its"
    ):
        rp.predictions(lm, TEXT)


def a_trained_basis_is_applied(apply=rp.apply):
    """The law: a map whose tensors have gradients goes into the weights as one without."""
    lm, basis = tiny("llama"), BASIS.clone().requires_grad_()
    edit = rp.Edit({"0.mlp.out": rp.LowRank.projection(basis)})
    plain = rp.Edit({"0.mlp.out": rp.LowRank.projection(basis.detach())})
    found = apply(edit, lm).model
    assert not any(p.requires_grad and p.grad_fn is not None for p in found.parameters())
    assert logits(apply(edit, lm)).equal(logits(apply(plain, lm)))


def test_a_trained_basis_is_applied():
    a_trained_basis_is_applied()


def test_a_plan_that_records_gradients_is_caught(monkeypatch):
    monkeypatch.setattr(Plan, "computed", inspect.unwrap(Plan.computed))
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        a_trained_basis_is_applied()


def test_a_device_is_named_or_given(tmp_path):
    source = saved(tmp_path / "model")
    assert rp.load(source, device=torch.device("cpu")).device == rp.load(source, device="cpu").device
    with pytest.raises(ArgumentError, match=r"^device=0: an int was given where a str or a device is needed$"):
        rp.load(source, device=0)


def test_a_table_of_drops_is_a_list_or_an_array():
    table = [[9.0, 1.0], [2.0, 8.0]]
    drawn = [rp.plot.transfer(values, ["a", "b"], overlap=values) for values in (table, np.array(table))]
    assert drawn[0].axes[0].images[0].get_array().tolist() == drawn[1].axes[0].images[0].get_array().tolist()
