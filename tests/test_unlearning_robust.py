"""What the recipes against relearning do to a tiny model that was taught facts about invented people."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.delta import Delta
from repedit.unlearning.recipe import UnlearnRecipe
from repedit.unlearning.recipes import RECIPES
from tests import taught_models
from tests.saved_models import saved

SGD = {"alpha": 1.0, "lr": 0.5, "batch_size": 16}
ADAM = {"lr": 1e-3, "batch_size": 16, "steps": 30}
MADE = {
    "localized": lambda: rp.recipes.localized(layers="0-1", reverse=False, **ADAM),
    "sam": lambda: rp.recipes.sam(rp.recipes.npo_gdr(**ADAM), rho=0.1),
    "cir": lambda: rp.recipes.cir(activations=4, gradients=4, **SGD, steps=20),
    "rep_select": lambda: rp.recipes.rep_select(components=8, relearn_steps=5, **SGD, steps=40),
    "mudman": lambda: rp.recipes.mudman(relearn_lr=0.1, **SGD, steps=60),
    "block_by_block": lambda: rp.recipes.block_by_block(size=1, rounds=1, repair_steps=15, **ADAM | {"steps": 20}),
    "undo": lambda: rp.recipes.undo(layers="0").changed(lambda part: replace(part, **ADAM)),
    "layered": lambda: rp.recipes.layered(folds=2, **ADAM | {"steps": 20}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_the_facts_are_forgotten_and_the_others_kept(name):
    """The original knows both sides; measured at seed 0: forget .02 to .20, retain 1.00."""
    lm, facts = taught_models.original(), taught_models.facts()
    recipe = MADE[name]()
    forgotten = facts.forget[:100] if name == "undo" else facts.forget  # noise needs fewer facts than the 128 inputs
    delta = rp.unlearn(lm, recipe=recipe, forget=forgotten, retain=facts.retain, progress=False)
    edited = rp.apply(delta, lm)
    forget, retain = (rp.facts_accuracy(edited, part[:40]).accuracy for part in (facts.forget, facts.retain))
    assert retain - forget > 0.4 and retain > 0.8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "lm")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Six capitals to forget and six symbols to retain, each in a file."""
    paths = {}
    for role, domain in (("forget", "capitals"), ("retain", "symbols")):
        held = rp.data.facts(domain).forget[:6]
        lines = [
            {"id": f.id, "prompt": f.prompt, "answer": f.answer, "entity": f.entity, "role": "forget"} for f in held
        ]
        paths[role] = tmp_path_factory.mktemp(role) / "facts.jsonl"
        paths[role].write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return [part for role, path in paths.items() for part in (f"--{role}", str(path))]


OPTIONS = {
    "sam:npo_gdr": ("rho=0.1",),
    "mudman": ("every=2", "relearn_steps=1"),
    "block_by_block": ("size=1", "rounds=1", "repair_steps=1"),
    "localized": ("layers=1",),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_command_line_runs_them(name, model, rows, tmp_path):
    settings = [part for option in ("batch_size=2", "lr=1e-3", *OPTIONS[name]) for part in ("--set", option)]
    verb = [
        "unlearn",
        str(model),
        "--recipe",
        name,
        *rows,
        "--steps",
        "2",
        "--out",
        str(tmp_path / "d.safetensors"),
        *settings,
    ]
    done = CliRunner().invoke(app, verb)
    assert done.exit_code == 0, done.output or done.exception
    delta = Delta.load(tmp_path / "d.safetensors")
    assert delta.provenance["method"] == name.replace("sam:npo_gdr", "sam(npo_gdr)") and len(delta.log) >= 2


def test_all_of_them_warn():
    for name in ("cir", "rep_select", "mudman", "localized", "block_by_block", "undo", "layered"):
        assert "rp.audit" in (RECIPES[name].__doc__ or "") and "arXiv" in RECIPES[name]().source
        parts = (recipe,) if isinstance(recipe := RECIPES[name](), UnlearnRecipe) else recipe.parts
        assert any("retain" in part.roles for part in parts)
