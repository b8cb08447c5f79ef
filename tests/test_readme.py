"""The code of the README runs, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import repedit as rp
from tests.saved import saved

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.filterwarnings("ignore::repedit.importance.scoring.CollinearWarning")
def test_the_first_example_runs(tmp_path: Path, monkeypatch):
    model = saved(tmp_path / "tiny")
    original = rp.load
    monkeypatch.setattr(
        rp, "load", lambda name="smollm2-135m", **o: original(model if name == "smollm2-135m" else name, **o)
    )
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS[0], {})
    assert (tmp_path / "edited" / "repedit.json").exists()


def test_the_first_example_is_fifteen_lines():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 15


def test_every_figure_named_in_the_readme_is_there():
    named = re.findall(r"\((figures/[^)]+)\)", README)
    assert named and all((Path(__file__).parents[1] / name).exists() for name in named)


def test_every_verb_is_in_the_readme():
    from repedit.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert all(f"repedit {verb}" in README for verb in verbs)
