"""The shell completes verbs, options and the names that come with repedit, without loading torch."""

import os
import shutil
import subprocess
import sys
from typing import get_args

import pytest

from repedit import data
from repedit.auditing import attack
from repedit.cli import application, completion
from repedit.errors import ArgumentError
from repedit.fit.closed_form import FITS
from repedit.fit.contexts import KINDS
from repedit.io.safetensors import floating_dtype
from repedit.metrics.benchmarks import SUITES
from repedit.neurons.scores import COMBINATIONS, IMPORTANCES
from repedit.rewrite.export import STRUCTURES
from repedit.sites import Point
from repedit.unlearning.recipes import RECIPES, by_name
from tests.test_public import HEAVY

REAL = {
    "attacks": attack.records(), "combinations": COMBINATIONS, "contexts": KINDS, "domains": data.DOMAINS, "fits": FITS,
    "importances": IMPORTANCES, "metrics": SUITES, "recipes": RECIPES, "texts": data.BUILTIN,
}  # fmt: skip
SCRIPT = f"""
import sys
from repedit.cli import main
try:
    main()
finally:
    print('loaded', *(n for n in {HEAVY} if n in sys.modules), file=sys.stderr)
"""


def asked(words: str, shell: str = "bash") -> list[str]:
    """What the shell offers after some words, the last of which is incomplete."""
    parts = words.split(" ")
    given = {
        "_REPEDIT_COMPLETE": f"complete_{shell}", "COMP_WORDS": "\n".join(parts), "COMP_CWORD": str(len(parts) - 1),
        "_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **given},
    )  # fmt: skip
    assert done.stderr.split() == ["loaded"], done.stderr
    return done.stdout.split()


def check_table(table: str) -> None:
    assert completion.names(table) == tuple(REAL[table])


@pytest.mark.parametrize("table", REAL)
def test_names_that_are_completed_are_those_that_exist(table):
    assert set(REAL) == {*completion.REGISTRIES, "attacks"}
    check_table(table)


def test_a_name_that_is_missing_is_caught(monkeypatch):
    monkeypatch.setitem(REAL, "recipes", [*RECIPES, "another"])
    with pytest.raises(AssertionError):
        check_table("recipes")


def test_a_table_that_was_moved_is_reported(monkeypatch):
    monkeypatch.setitem(completion.REGISTRIES, "moved", ("data/fact_sets.py", "NOWHERE"))
    with pytest.raises(LookupError, match=r"data/fact_sets.py assigns no NOWHERE"):
        completion.names("moved")


@pytest.mark.parametrize(("words", "expected"), [
    ("repedit pru", ["prune"]),
    ("repedit prune m --impor", ["--importance"]),
    ("repedit unlearn m --recipe npo", ["npo", "npo_gdr", "npo_klr"]),
    ("repedit unlearn m --recipe small : blur_n", ["blur_npo"]),
    ("repedit unlearn m --recipe small : blur_npo --forget capi", ["capitals"]),
    ("repedit unlearn m --recipe sure:sim", ["sim_npo"]),
    ("repedit project m --forget capitals+sy", ["capitals+symbols"]),
    ("repedit audit e --attacks direct,q", ["direct,quantize"]),
    ("repedit collect m --sites 4-9.mlp", ["4-9.mlp.neurons", "4-9.mlp.out"]),
    ("repedit inspect smol", ["smollm2-135m"]),
    ("repedit prune m --fraction 0", []),
])  # fmt: skip
def test_what_bash_completes(words, expected):
    assert asked(words) == expected


def test_what_other_shells_complete():
    assert asked("repedit audit e --budget f", shell="fish") == ["fast", "full"]
    assert '"standard"' in " ".join(asked("repedit audit e --budget s", shell="zsh"))


def test_words_that_bash_took_apart_are_joined():
    for words, at, expected, place in [
        ("a small : npo", 3, "a small:npo", 1),
        ("a small :", 2, "a small:", 1),
        ("a b ", 2, "a b ", 2),
        ("a b", 2, "a b", 2),
        ("a x : y b c", 4, "a x:y b c", 2),
    ]:
        assert completion.joined(words.split(" "), at) == (expected.split(" "), place)


BASH = """
export PATH="$FOLDER:$PATH"
eval "$(_REPEDIT_COMPLETE=source_bash repedit)"
COMP_WORDS=(repedit unlearn m --recipe small : blur_n) COMP_CWORD=6
_repedit_completion repedit
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_itself_completes(tmp_path):
    (tmp_path / "repedit").write_text(f'#!/bin/bash\nexec {sys.executable} -m repedit "$@"\n')
    (tmp_path / "repedit").chmod(0o755)
    given = {**os.environ, "FOLDER": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(["bash", "--norc", "-c", BASH], capture_output=True, text=True, env=given)
    assert done.stdout.split() == ["blur_npo"], done.stderr


def test_no_name_is_offered_twice():
    assert completion.several("domains", "+")("capitals+c") == ["capitals+cities"]
    assert completion.recipe("small:sure:np") == [] and completion.recipe("small:blur_n") == ["small:blur_npo"]


def test_every_recipe_that_is_offered_exists():
    for name in completion.recipe("") + completion.recipe("sure:"):
        try:
            by_name(name)
        except ArgumentError as error:
            assert "consists of several" in str(error)
    assert completion.site("") == [f"*.{point}" for point in Point]


def test_choices_are_those_that_the_library_takes():
    choices = {name: get_args(get_args(getattr(application, name))[0]) for name in ("Structure", "Dtype")}
    assert choices["Structure"] == STRUCTURES and get_args(application.Budget.__origin__) == tuple(attack.BUDGETS)
    assert all(floating_dtype(name).is_floating_point for name in choices["Dtype"] if name != "auto")


def test_the_script_for_the_shell_is_shown():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        env={**os.environ, "_REPEDIT_COMPLETE": "source_bash"},
    )
    assert "complete -o default -F _repedit_completion repedit" in done.stdout
