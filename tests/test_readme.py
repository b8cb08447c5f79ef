"""The code of the README runs, as it stands there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import repedit as rp
from repedit.auditing.controls import edited as writing
from tests.edits import projection
from tests.saved_models import saved
from tests.taught_models import facts as known
from tests.taught_models import original, reference
from tests.tiny import ids, logits, tiny

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")
def test_the_first_example_runs(tmp_path: Path, monkeypatch):
    model = saved(tmp_path / "tiny")
    original = rp.load
    monkeypatch.setattr(
        rp, "load", lambda name="smollm2-135m", **o: original(model if name == "smollm2-135m" else name, **o)
    )
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[0], {})
    assert (tmp_path / "edited" / "repedit.json").exists()


def test_the_second_example_runs(tmp_path: Path, monkeypatch, capsys):
    model = saved(tmp_path / "tiny")
    load, train, whole = rp.load, rp.mrp, rp.data.facts("capitals")
    some = tuple(fact for part in rp.data.by_domain(whole.retain).values() for fact in part[:4])
    few = rp.data.Facts(whole.forget[:4], some, "capitals")
    monkeypatch.setattr(rp, "load", lambda name: load(model))
    monkeypatch.setattr(rp.data, "facts", lambda name: few)
    monkeypatch.setattr(
        rp, "mrp", lambda *args, **options: train(*args, **{**options, "rank": 4, "config": {"steps": 1}})
    )
    exec(BLOCKS[1], {})
    assert "FactsAccuracy" in capsys.readouterr().out
    named = re.search(r"# (\d+) capitals to forget, (\w+) other domains", BLOCKS[1])
    assert named and int(named[1]) == len(whole.forget)
    assert named[2] == {7: "seven", 8: "eight"}[len(rp.data.by_domain(whole.retain))]


def test_the_unlearning_example_runs(tmp_path: Path, monkeypatch):
    model, load, whole = saved(tmp_path / "tiny"), rp.load, rp.data.facts("capitals")
    few = rp.data.Facts(whole.forget[:4], whole.retain[:4], "capitals")
    monkeypatch.setattr(rp, "load", lambda name: load(model))
    monkeypatch.setattr(rp.data, "facts", lambda name: few)
    # The small setting names layers that a tiny model lacks.
    monkeypatch.setattr(rp.recipes, "small", lambda recipe: replace(recipe, steps=1, batch_size=2))
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[2], {})
    assert (tmp_path / "unlearned" / "repedit.json").exists()
    others = re.findall(r"(\w+)\(", BLOCKS[2].split("# or ")[1].split("\n")[0])
    assert others and all(hasattr(rp.recipes, name) for name in others)


def test_the_smaller_example_runs(tmp_path: Path, monkeypatch):
    lm = tiny("llama")
    monkeypatch.chdir(tmp_path)
    keep = rp.Diagonal.mask(torch.arange(lm.layout.width_of(0, rp.Point.MLP_NEURONS)) > 9)
    edit = rp.Edit(dict.fromkeys(lm.select("*.mlp.neurons"), keep), {"method": "test"})
    exec(BLOCKS[3], {"rp": rp, "lm": lm, "edit": edit, "basis": torch.randn(24, 4)})
    assert all((tmp_path / name / "repedit.json").exists() for name in ("slim", "narrow", "lora"))


@pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")
def test_the_exploring_example_runs(tmp_path: Path):
    lm, sets = rp.load(saved(tmp_path / "tiny")), {"forget": rp.data.code(), "retain": rp.data.prose()}
    scores = rp.score(*(rp.collect(lm, text, limit_tokens=300) for text in sets.values()))
    given = {"rp": rp, "lm": lm, "scores": scores, **sets}
    exec(BLOCKS[4].replace("3000", "300"), given)
    assert [found.corpus for found in given["examples"]] == ["code", "prose"]


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_example_runs():
    lm = tiny("llama")
    edit = projection(lm, "1.mlp.out")
    expected, given = logits(rp.apply(edit, lm)), {"rp": rp, "lm": lm, "edit": edit, "ids": ids()}
    exec(BLOCKS[5], given)
    with torch.no_grad():
        assert torch.equal(given["lens"](ids()), expected) and torch.equal(logits(lm), expected)
    assert given["nn"]._module is lm.model


def test_the_audit_example_runs(tmp_path: Path, monkeypatch, capsys):
    edited, plain, source = writing.nudged(original()), rp.audit, original
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rp.data, "facts", lambda name: known())
    options = {"reference": reference(), "retain": known().retain, "attacks": ("direct",)}
    monkeypatch.setattr(
        rp, "audit", lambda _, original, facts, out: plain(edited, original=source(), facts=facts, out=out, **options)
    )
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[6], {"rp": rp})
    assert "NOT FORGOTTEN" in capsys.readouterr().out
    files = re.findall(r"audit\.\w+|recovery\.png", BLOCKS[6])
    assert files and all((tmp_path / "audit" / name).exists() for name in files)


def test_the_example_of_images_runs(capsys):
    exec(BLOCKS[7], {"rp": rp})
    assert "HIDDEN" in capsys.readouterr().out


def test_the_first_example_is_fifteen_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 15


def test_everything_that_a_page_links_to_is_there():
    root = Path(__file__).parents[1]
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        named = [name.split("#")[0] for name in re.findall(r"\]\(((?!http)[^)]+)\)", page.read_text())]
        assert named or page.name != "README.md"
        assert not [name for name in named if not (page.parent / name).exists()]


def test_every_verb_is_in_the_readme():
    from repedit.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert all(f"repedit {verb}" in README for verb in verbs)
