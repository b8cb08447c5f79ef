"""The taught models of one seed, trained once and kept on disk for every test that needs them."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import transformers
from filelock import FileLock

from repedit.auditing.controls import CONTROLS, AuditInputs, edited, taught
from repedit.data import Fact, Facts, corpus, fact_sets, generated
from repedit.models.subject import Subject, load

CACHE = Path(__file__).parents[1] / ".cache" / "taught"
RECIPE = (taught, fact_sets, generated, corpus)
TRAINED = ("PC3a", "PC3b", "PC3c", "PC4", "PC6", "PC7", "PC11", "NC2a", "NC2b", "NC2c", "NC4a")


@cache
def world(seed: int = 0) -> taught.World:
    """The world of a seed; do not change its models, copy them."""
    folder = CACHE / f"{_key(*RECIPE)}-{seed}"

    def made() -> dict[str, Subject]:
        found = taught.world(seed)
        return {role: getattr(found, role) for role in taught.TAUGHT}

    found = _kept(folder, taught.TAUGHT, made)
    return taught.World(*taught.questions(seed), *(found[role] for role in taught.TAUGHT), seed=seed)


def kept_model(role: str, seed: int = 0) -> Subject:
    """One of the models of a seed, in the place of `taught_model`."""
    found: Subject = getattr(world(seed), role)
    return found


@cache
def case(name: str, seed: int = 0) -> AuditInputs:
    """What a control gives an audit; do not change its models. Those that are trained are kept on disk."""
    here = world(seed)
    if name not in TRAINED:
        return CONTROLS[name].build(here)
    folder = CACHE / f"{_key(*RECIPE, edited)}-{seed}-{name}"
    model = _kept(folder, ("edited",), lambda: {"edited": CONTROLS[name].build(here).edited})["edited"]
    start = edited.on_grid(here.original) if name == "PC4" else here.original
    return AuditInputs(model, start, here.reference, here.facts, here.attributes)


def original(seed: int = 0) -> Subject:
    """Knows all facts."""
    return world(seed).original


def reference(seed: int = 0) -> Subject:
    """Was never taught the facts to forget."""
    return world(seed).reference


def facts(seed: int = 0) -> Facts:
    """160 to forget and 96 to retain, sixteen choices each."""
    return world(seed).facts


def strangers(seed: int = 0) -> tuple[Fact, ...]:
    """Facts about people that no model has met."""
    return world(seed).strangers


def _kept(folder: Path, names: Iterable[str], make: Callable[[], dict[str, Subject]]) -> dict[str, Subject]:
    """Models by name, made once and read from the folder ever after."""
    CACHE.mkdir(parents=True, exist_ok=True)
    # Workers of one run would each train the same models.
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            for name, subject in make().items():
                subject.model.save_pretrained(folder / name)
                subject.tokenizer.save_pretrained(folder / name)
            (folder / "done").touch()
    return {name: load(folder / name) for name in names}


def _key(*modules: ModuleType) -> str:
    """Hash of everything that decides what the models are; comments and docstrings do not."""
    versions = [torch.__version__, transformers.__version__, torch.backends.cpu.get_cpu_capability()]
    digest = hashlib.sha256(json.dumps(versions).encode())
    for module in modules:
        tree = ast.parse(Path(str(module.__file__)).read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [part for part in node.body if not _is_text(part)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
