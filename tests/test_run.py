"""A run from one file: every step once, again only where something before it changed, and nothing of others is replaced."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from repedit import cli
from repedit.cli import app, steps
from repedit.errors import ArgumentError, DataError, NotFound, RepeditError, TargetExists, UnknownName
from tests.saved import saved

pytestmark = pytest.mark.filterwarnings("ignore::repedit.importance.scoring.CollinearWarning")
RUN = """
model = "tiny"

[[step]]
verb = "score"
forget = "code"
retain = "mine.jsonl"
tokens = 400
out = "scores.safetensors"

[[step]]
verb = "prune"
forget = "code"
retain = "mine.jsonl"
tokens = 400
fraction = {fraction}
out = "edited"

[[step]]
verb = "diff"
base = "tiny"
edited = "edited"
"""


def lines(word: str) -> str:
    """Documents of plain words."""
    texts = (
        f"Document {i} is about {word}, and about the people who live beside {word} number {i}. " * 4 for i in range(40)
    )
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def file(tmp_path) -> Path:
    saved(tmp_path / "tiny")
    (tmp_path / "mine.jsonl").write_text(lines("rivers"))
    (tmp_path / "run.toml").write_text(RUN.format(fraction=0.1))
    return tmp_path / "run.toml"


def ran(file, *words, code=0):
    """States of the steps, as the run says them."""
    result = CliRunner().invoke(app, ["run", str(file), *words])
    if isinstance(result.exception, RepeditError):
        raise result.exception
    assert result.exit_code == code, result.output + str(result.exception)
    return [line.split(", ")[1] for line in result.stderr.splitlines() if " of 3, " in line]


TODO, DONE = (
    [
        f"{verb}: {state}{out}"
        for verb, out in (("score", " -> scores.safetensors"), ("prune", " -> edited"), ("diff", ""))
    ]
    for state in ("to do", "done")
)


def test_a_run_is_carried_out_once(file):
    assert ran(file, "--dry-run") == TODO and not (file.parent / "edited").exists()
    assert ran(file) == TODO
    before = steps.tree_hash(file.parent / "edited")
    assert (file.parent / "scores.safetensors").exists() and (file.parent / "edited" / "repedit.json").exists()
    assert ran(file) == DONE and steps.tree_hash(file.parent / "edited") == before


def test_what_changed_and_what_follows_is_done_again(file):
    ran(file)
    file.write_text(RUN.format(fraction=0.2))
    before = steps.tree_hash(file.parent / "edited")
    assert ran(file) == [DONE[0], *TODO[1:]] and steps.tree_hash(file.parent / "edited") != before
    (file.parent / "mine.jsonl").write_text(lines("hills"))
    assert ran(file, "--dry-run") == TODO
    (file.parent / "mine.jsonl").unlink()
    assert ran(file, "--dry-run") == TODO


def test_a_run_that_was_cut_off_goes_on(file):
    ran(file)
    log = file.with_suffix(".done.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]) + '{"step": 2, "ver')
    with pytest.raises(
        TargetExists, match=r"step 2, prune: edited exists and is not what an earlier run of this file left"
    ):
        ran(file)
    (file.parent / "edited").rename(file.parent / "kept")
    assert ran(file) == [DONE[0], *TODO[1:]]


LISTED = """
[[step]]
verb = "compare"
base = "tiny"
edited = "tiny"
text = ["code", "mine.jsonl"]
"""


def step_of(file) -> steps.Step:
    commands = cli.verbs()
    return steps.read(file, commands)[0]


@pytest.fixture
def listed(file):
    file.write_text(LISTED)
    return file


def follows(file) -> bool:
    """Whether another text in the file that a repeated option names makes another step."""
    before = step_of(file).key
    (file.parent / "mine.jsonl").write_text(lines("hills"))
    return step_of(file).key != before


def test_files_of_a_repeated_option_count_too(listed, monkeypatch):
    assert follows(listed)
    monkeypatch.chdir(listed.parent)
    moved = step_of(listed).moved(Path("/elsewhere"), [Path("tiny")])
    assert moved.options["text"] == ["code", str(listed.parent / "mine.jsonl")]
    assert moved.options["edited"] == "/elsewhere/tiny"


def test_a_repeated_option_that_is_not_looked_into_would_be_caught(listed, monkeypatch):
    monkeypatch.setattr(steps, "_words", lambda value: [value] if isinstance(value, str) else [])
    assert not follows(listed)


def test_an_output_that_somebody_changed_is_not_replaced(file):
    ran(file)
    (file.parent / "edited" / "notes.txt").write_text("mine")
    with pytest.raises(TargetExists, match=r"move it away, or give another out"):
        ran(file)
    assert (file.parent / "edited" / "notes.txt").read_text() == "mine"


def test_a_log_that_is_believed_unseen_would_be_caught(file, monkeypatch):
    ran(file)
    (file.parent / "edited" / "notes.txt").write_text("mine")
    rows = [json.loads(line) for line in file.with_suffix(".done.jsonl").read_text().splitlines()]
    held = {row["out"]: row["output"] for row in rows if row["out"]}
    plain = steps.tree_hash
    monkeypatch.setattr(steps, "tree_hash", lambda path: held.get(str(path)) or plain(path))
    assert ran(file) == DONE


def test_a_run_is_reproduced_to_the_byte(file):
    ran(file)
    result = CliRunner().invoke(app, ["reproduce", str(file)])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert result.stdout.count("is the same") == 2 and "3, diff: not compared" in result.stdout


def test_what_comes_out_otherwise_is_said_to_differ(file):
    ran(file)
    log = file.with_suffix(".done.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[1]["output"] = "0" * 64
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["reproduce", str(file)])
    assert (
        result.exit_code == 1
        and "edited differs" in result.stdout
        and "scores.safetensors is the same" in result.stdout
    )


def test_a_run_that_was_not_made_cannot_be_reproduced(file):
    with pytest.raises(ArgumentError, match=r"step 1, score, was not run, or it or something before it changed"):
        CliRunner().invoke(app, ["reproduce", str(file)], catch_exceptions=False)


BAD = {
    "no steps": ('model = "tiny"', DataError, r"holds no \[\[step\]\] tables with a verb"),
    "no TOML": ("step = [", DataError, r"run\.toml is no TOML"),
    "another key": ('models = "tiny"\n[[step]]\nverb = "diff"', UnknownName, r"did you mean 'model'"),
    "no verb": ('[[step]]\nverb = "prun"', UnknownName, r"step 1: a run has no verb 'prun'; did you mean 'prune'"),
    "itself": ('[[step]]\nverb = "run"', UnknownName, r"a run has no verb 'run'"),
    "an option": ('[[step]]\nverb = "prune"\nfractoin = 1', UnknownName, r"step 1, prune, has no option 'fractoin'; did you mean 'fraction'"),
    "missing": ('[[step]]\nverb = "diff"\nbase = "tiny"', ArgumentError, r"step 1, diff, needs edited"),
    "the same place": (
        'model = "tiny"\n[[step]]\nverb = "score"\nout = "a"\n[[step]]\nverb = "collect"\nout = "a"', ArgumentError,
        r"several steps write a; give each its own out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_meant_is_refused_before_anything_is_done(name, tmp_path):
    text, error, match = BAD[name]
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(error, match=match):
        ran(tmp_path / "run.toml")
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


def test_a_value_of_another_kind_names_its_step(file):
    file.write_text(RUN.format(fraction='"much"'))
    with pytest.raises(ArgumentError, match=r"step 2, prune: Invalid value for '--fraction'"):
        ran(file)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"none\.toml is not a file; give a TOML file"):
        ran(tmp_path / "none.toml")


def test_flags_and_lists_become_words():
    commands = cli.verbs()
    step = steps.Step(1, "prune", {"model": "m", "fraction": 0.1, "json": True, "out": "x"}, "k")
    assert step.arguments(commands["prune"], overwrite=True)[:1] == ["m"]
    words = step.arguments(commands["prune"], overwrite=True)
    assert {"--json", "--overwrite"} <= set(words) and words[words.index("--fraction") + 1] == "0.1"
    off = steps.Step(1, "apply", {"edit": "e", "model": "m", "verify": False}, "k")
    assert "--no-verify" in off.arguments(commands["apply"], overwrite=False)


def test_names_are_those_of_the_command_line(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[[step]]\nverb = "compare"\nbase = "a"\nedited = "b"\ndata = "folder"\nbatch_size = 2'
    )
    (step,) = steps.read(tmp_path / "run.toml", cli.verbs())
    words = step.arguments(cli.verbs()["compare"], overwrite=False)
    assert words == ["a", "b", "--data", "folder", "--batch-size", "2"]


def test_the_run_in_the_readme_can_be_read(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```toml\n(.*?)```", readme, flags=re.S)
    (tmp_path / "run.toml").write_text(block)
    found = steps.read(tmp_path / "run.toml", cli.verbs())
    assert [step.verb for step in found] == ["prune", "compare"] and found[0].options["model"] == "smollm2-135m"
