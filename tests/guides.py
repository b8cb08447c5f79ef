"""The fenced blocks of the documentation, and small stand-ins with which a tiny model can run them."""

from __future__ import annotations

import linecache
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

import repedit as rp
from repedit import cli
from repedit.auditing.attack import records
from tests.saved_models import saved

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```" in path.read_text())
"""Every page with a fenced block."""
PYTHON, SHELL, FILE = ("python",), ("bash",), ("toml", "json")
ATTACKS = frozenset(records())
"""Those of the package; attacks that a guide registers are all carried out."""
PLAIN = ("", "text", "tree", "layers", "inside")
"""Blocks that are not code: diagrams, and tables that tests of the design read."""


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, its title, its text and its first line in the page."""

    language: str
    title: str
    text: str
    line: int


def fences(page: str) -> list[Fence]:
    """The fenced blocks of a page in their order."""
    found = []
    for token in MarkdownIt().parse(page):
        if token.type == "fence":
            title = re.search(r'title="([^"]+)"', token.info)
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Fence(language, title[1] if title else "", token.content, (token.map or [0])[0] + 1))
    return found


def run_page(page: str, name: str, folder: Path) -> dict[str, Any]:
    """Write the titled files of a page, run its Python blocks in one namespace, and parse its commands; returns the namespace.

    Raises:
        AssertionError: if a block is neither code that is run, nor a file, nor plain text.
    """
    namespace: dict[str, Any] = {"__name__": "guide"}
    for fence in fences(page):
        where = f"{name}:{fence.line}"
        if fence.language in PYTHON:
            run_python("\n" * fence.line + fence.text, where, namespace)
        elif fence.language in SHELL:
            for line in commands(fence.text):
                parse_command(line)
        elif fence.language in FILE:
            assert fence.title, f"{where}: a block of {fence.language} needs title=, under which the test writes it"
            (folder / fence.title).write_text(fence.text)
        else:
            assert fence.language in PLAIN, f"{where}: a block of {fence.language} is not tested"
    return namespace


def run_python(text: str, name: str, namespace: dict[str, Any]) -> None:
    """Execute a block whose source tools can read back, as nnsight does."""
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), namespace)


def commands(text: str) -> Iterator[str]:
    """The lines of a shell block that call repedit, without what precedes its name."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|-m )(repedit .*)", line.partition("  #")[0])
        if found:
            yield found[1]


def parse_command(line: str) -> dict[str, Any]:
    """The parameters of a command, parsed as the command line would; nothing is run."""
    _, *words = shlex.split(line)
    verbs = cli.verbs()
    verb = " ".join(words[:2]) if " ".join(words[:2]) in verbs else words[0]
    assert verb in verbs, f"{line}: there is no verb {verb}"
    return verbs[verb].make_context(verb, words[len(verb.split()) :]).params


# --- Stand-ins: the names of a guide on a tiny model, with little data


def small_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, model: Path | str | None = None) -> None:
    """The default model becomes `model`, by default a tiny one, with few facts, tokens, steps and attacks; and `folder`
    is the working directory.
    """
    model = saved(folder / "tiny-model") if model is None else model
    load, audit, facts, mrp, merge = rp.load, rp.audit, rp.data.facts, rp.mrp, rp.fit.merge

    def named(name: Any = "smollm2-135m", **options: Any) -> Any:
        return load(model if name == "smollm2-135m" else name, **options)

    def few(name: Any, **options: Any) -> Any:
        found = facts(name, **options)
        some = tuple(fact for part in rp.data.by_domain(found.retain).values() for fact in part[:3])
        cut = [tuple(replace(f, paraphrases=f.paraphrases[:2]) for f in side) for side in (found.forget[:18], some)]
        return rp.data.Facts(*cut, found.name)

    def audited(edited: Any, *, original: Any, **options: Any) -> Any:
        asked = options.get("attacks") or ["direct"]
        few_attacks = [name for name in asked if name not in ATTACKS] or asked[:1]
        small = {**options, "attacks": few_attacks, "allow_small": True, "steps": 8}
        return audit(edited, original=named(original), **small)

    def trained(*args: Any, **options: Any) -> Any:
        return mrp(*args, **{**options, "rank": 2, "config": {"steps": 1}, "text": None})

    def merged(*args: Any, **options: Any) -> Any:
        few = {"steps": 2, "blocks": 1, "rare": 3, "written_names": 0, "written_sentences": 1}
        return merge(*args, **{**options, "config": few})

    series = rp.ContinualMRP
    monkeypatch.setattr(rp.fit, "merge", merged)
    monkeypatch.setattr(rp, "load", named)
    monkeypatch.setattr(rp, "audit", audited)
    monkeypatch.setattr(rp, "mrp", trained)
    monkeypatch.setattr(rp, "ContinualMRP", lambda lm, rank: series(lm, rank=2, config={"steps": 1}, text=None))
    monkeypatch.setattr(rp.data, "facts", few)
    # The setting for SmolLM2 names layers that a tiny model lacks.
    monkeypatch.setattr(rp.recipes, "small", lambda recipe: replace(recipe, steps=2, batch_size=2))
    for name in ("collect", "predictions", "max_activating", "compare"):
        monkeypatch.setattr(rp, name, _limited(getattr(rp, name)))
    monkeypatch.setattr(rp, "trajectory", _short(rp.trajectory))
    monkeypatch.setattr(rp.fit, "gates", partial(_few_steps, rp.fit.gates))
    monkeypatch.chdir(folder)


def saved_edit(folder: Path) -> None:
    """A checkpoint of the tiny model with its first neurons pruned."""
    lm = rp.load()
    keep = rp.Diagonal.mask(torch.arange(lm.layout.width_of(0, rp.Point.MLP_NEURONS)) > 9)
    rp.export(rp.Edit({rp.Site.parse("0.mlp.neurons"): keep}, {"method": "test"}), lm, folder)


def _limited(function: Any) -> Any:
    return lambda *args, **options: function(*args, **{**options, "limit_tokens": 200})


def _short(function: Any) -> Any:
    few = {"steps": 2, "collect_options": {"limit_tokens": 200}, "evaluate_options": {"limit_tokens": 200}}
    return lambda *args, **options: function(*args, **{**options, **few})


def _few_steps(function: Any, *args: Any, **options: Any) -> Any:
    return function(*args, **{**options, "steps": 2, "lr": 2.0, "retain_weight": 0.0})
