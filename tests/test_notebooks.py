"""Every notebook runs from top to bottom on a tiny model, and is committed as it ran on the real one."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest

import repedit as rp
from tests.saved_models import saved

FILES = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL: dict[str, Any] = {
    "TOKENS": 300,
    "STEPS": 1,
    "COUNT": 16,
    "RELEARN": 8,
    "RANK": 2,
    "ATTACKS": ["quantize"],
    "TASKS": ["capitals", "symbols"],
    "LAYER": 1,
    "EPOCHS": 3,
    "GROUPS": "0,0-1",
    "FIT": {"steps": 2, "rows": 32, "retain_rows": 32, "vocabulary": 64},
}
"""What the cells of parameters say for a tiny model."""


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(source: str, model: Path) -> dict[str, Any]:
    """The names of a cell of parameters with small values; one that is not known here keeps its own."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    namespace.pop("__builtins__")
    return namespace | {name: value for name, value in SMALL.items() if name in namespace} | {"MODEL": str(model)}


def run(source: str, namespace: dict[str, Any]) -> None:
    """Run a cell and have its last value shown, as a front end does."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    exec(compile(tree, "cell", "exec"), namespace)
    value = eval(compile(last, "cell", "eval"), namespace) if last else None
    for show in ("_repr_mimebundle_", "_repr_png_", "__repr__"):
        if hasattr(value, show):
            assert getattr(value, show)()
            break


@pytest.fixture
def tiny_facts(monkeypatch):
    """A few facts of each domain."""
    whole = rp.data.facts

    def few(name: str) -> Any:
        found = whole(name)
        some = tuple(fact for part in rp.data.by_domain(found.retain).values() for fact in part[:4])
        forget = tuple(replace(fact, paraphrases=fact.paraphrases[:5]) for fact in found.forget[:16])
        return rp.data.Facts(forget, some, name)

    monkeypatch.setattr(rp.data, "facts", few)


@pytest.fixture
def few_digits(monkeypatch):
    """700 digits, of which 400 are trained on."""
    some = rp.vision.digits()[slice(700)]
    monkeypatch.setattr(rp.vision, "digits", lambda: some)
    for name in ("class_splits", "mislabelled_splits"):
        monkeypatch.setattr(rp.vision, name, partial(getattr(rp.vision, name), train=400))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("reloaded_here", "few_digits")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, tiny_facts, monkeypatch):
    model = saved(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    first, *rest = code(read(path))
    assert first.metadata.get("tags") == ["parameters"]
    namespace = parameters(first.source, model)
    for cell in rest:
        run(cell.source, namespace)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_committed_is_one_whole_run(path):
    cells = code(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 2**20
    text = re.sub(r'"[A-Za-z0-9+/=\\n]{1000,}"', "", path.read_text())
    assert not re.search(r"/(?:tmp|root|home|work)/", text), "a path of the machine it ran on"


def test_there_is_a_notebook_for_every_question():
    assert [path.name[:2] for path in FILES] == ["1_", "2_", "3_", "4_", "5_", "6_", "7_"]
    titles = [read(path).cells[0].source.splitlines()[0] for path in FILES]
    assert all(title.startswith("# ") for title in titles) and len(set(titles)) == len(titles)
