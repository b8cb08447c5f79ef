"""A run from one file: every step once, again only where something before it changed, and nothing of others is replaced."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import typer
from filelock import FileLock
from typer.testing import CliRunner

from repedit import cli, runs
from repedit.cli import app
from repedit.cli import run as verb
from repedit.errors import ArgumentError, CheckpointError, DataError, NotFound, RepeditError, TargetExists, UnknownName
from repedit.io.files import file_hashes
from tests.conftest import reload_here
from tests.saved_models import saved
from tests.simulated_kills import dies, each_kill

pytestmark = [
    pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning"),
    pytest.mark.usefixtures("reloaded_here"),
]
RUN = """
model = "tiny"

[[step]]
verb = "score"
forget = "code"
retain = "mine.jsonl"
limit_tokens = 400
out = "scores.safetensors"

[[step]]
verb = "prune"
forget = "code"
retain = "mine.jsonl"
limit_tokens = 400
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


def written(folder: Path) -> Path:
    """The file of a run, beside what it asks for."""
    saved(folder / "tiny")
    (folder / "mine.jsonl").write_text(lines("rivers"))
    (folder / "run.toml").write_text(RUN.format(fraction=0.1))
    return folder / "run.toml"


@pytest.fixture
def file(tmp_path) -> Path:
    return written(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which the run was carried out, dry and then in earnest."""
    file = written(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        reload_here(patch)
        assert ran(file, "--dry-run") == TODO and not (file.parent / "edited").exists()
        assert ran(file) == TODO
    return file.parent


@pytest.fixture
def done(finished, tmp_path) -> Path:
    """The file of the finished run, in a copy of its folder."""
    return Path(shutil.copytree(finished, tmp_path / "run")) / "run.toml"


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


def test_a_run_is_carried_out_once(done):
    before = file_hashes(done.parent / "edited")
    assert (done.parent / "scores.safetensors").exists() and (done.parent / "edited" / "repedit.json").exists()
    assert ran(done) == DONE and file_hashes(done.parent / "edited") == before


def test_what_changed_and_what_follows_is_done_again(done):
    done.write_text(RUN.format(fraction=0.2))
    before = file_hashes(done.parent / "edited")
    assert ran(done) == [DONE[0], *TODO[1:]] and file_hashes(done.parent / "edited") != before
    (done.parent / "mine.jsonl").write_text(lines("hills"))
    assert ran(done, "--dry-run") == TODO
    (done.parent / "mine.jsonl").unlink()
    assert ran(done, "--dry-run") == TODO


def test_a_run_that_was_cut_off_goes_on(done):
    log = done.with_suffix(".journal.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:1]) + '{"number": 2, "ver')
    with pytest.raises(
        TargetExists, match=r"step 2, prune: edited exists and is not what an earlier run of this file left"
    ):
        ran(done)
    (done.parent / "edited").rename(done.parent / "kept")
    assert ran(done) == [DONE[0], *TODO[1:]]


LISTED = """
[[step]]
verb = "compare"
base = "tiny"
edited = "tiny"
text = ["code", "mine.jsonl"]
"""


def step_of(file) -> runs.Step:
    commands = cli.verbs()
    return runs.read_steps(file, commands)[0]


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
    moved = step_of(listed).relocated(Path("/elsewhere"), [Path("tiny")])
    assert moved.options["text"] == ["code", str(listed.parent / "mine.jsonl")]
    assert moved.options["edited"] == "/elsewhere/tiny"


def test_a_repeated_option_that_is_not_looked_into_would_be_caught(listed, monkeypatch):
    monkeypatch.setattr(runs, "_texts", lambda value: [value] if isinstance(value, str) else [])
    assert not follows(listed)


def test_an_output_that_somebody_changed_is_not_replaced(done):
    (done.parent / "edited" / "notes.txt").write_text("mine")
    with pytest.raises(TargetExists, match=r"move it away, or give another out"):
        ran(done)
    assert (done.parent / "edited" / "notes.txt").read_text() == "mine"


def test_a_log_that_is_believed_unseen_would_be_caught(done, monkeypatch):
    (done.parent / "edited" / "notes.txt").write_text("mine")
    rows = [json.loads(line) for line in done.with_suffix(".journal.jsonl").read_text().splitlines()]
    held = {row["out"]: row["files"] for row in rows if row["out"]}
    monkeypatch.setattr(runs, "file_hashes", lambda path: held.get(str(path)) or file_hashes(path))
    assert ran(done) == DONE


def test_a_run_is_reproduced_to_the_byte(done):
    result = CliRunner().invoke(app, ["reproduce", str(done)])
    assert result.exit_code == 0, result.output + str(result.exception)
    assert result.stdout.count("is the same") == 2 and "3, diff: not compared" in result.stdout


@pytest.mark.parametrize(("changes", "same"), [({"hard_links": []}, True), ({"dtype": "float16"}, False)])
def test_an_export_whose_shards_could_not_be_linked_again_is_the_same(changes, same, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    for folder, other in ((first, {}), (again, changes)):
        folder.mkdir()
        (folder / "repedit.json").write_text(json.dumps({"hard_links": ["model.safetensors"], "dtype": None} | other))
    assert runs._equal_files(again, first, file_hashes(first)) is same
    (again / "more").write_text("of another file")
    assert not runs._equal_files(again, first, file_hashes(first))


def test_what_comes_out_otherwise_is_said_to_differ(done):
    log = done.with_suffix(".journal.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows[1]["files"]["config.json"] = "0" * 64
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(app, ["reproduce", str(done)])
    assert (
        result.exit_code == 1
        and "edited differs" in result.stdout
        and "scores.safetensors is the same" in result.stdout
    )


def test_a_run_that_was_not_made_cannot_be_reproduced(file):
    with pytest.raises(ArgumentError, match=r"step 1, score, was not run, or it or something before it changed"):
        CliRunner().invoke(app, ["reproduce", str(file)], catch_exceptions=False)


FILE = """
[[step]]
verb = "write"
text = "first"
out = "one.txt"

[[step]]
verb = "fill"
text = "{text}"
out = "two"
"""


@pytest.fixture
def short(tmp_path, monkeypatch):
    """A run of two verbs that write at once, one a file, the other a folder, neither of them by one rename."""
    app = typer.Typer()

    @app.command()
    def write(out: Path, text: str = "") -> None:
        out.write_text(text)

    @app.command()
    def fill(out: Path, text: str = "") -> None:
        out.mkdir()
        for name in ("a", "b"):
            (out / name).write_text(text)

    commands = typer.main.get_command(app).commands
    monkeypatch.setattr(verb, "verbs", lambda: commands)
    monkeypatch.setattr("repedit.report.write_run", lambda file: file)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.toml").write_text(FILE.format(text="second"))
    return folder / "run.toml"


def carried_out(file):
    """Carry a run out in this process."""
    result = CliRunner().invoke(app, ["run", str(file)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output


def outputs(file) -> dict[str, str]:
    """What lies beside the file of a run, without its journals."""
    paths = (p for p in sorted(file.parent.rglob("*")) if p.is_file())
    return {str(p.relative_to(file.parent)): p.read_text() for p in paths if not p.name.endswith((".jsonl", ".lock"))}


def test_a_run_goes_on_from_a_kill_at_any_write(short):
    expected = outputs(short) | {"one.txt": "first", "two/a": "second", "two/b": "second"}
    for k in each_kill(lambda: carried_out(short), short.parent):
        for name, text in outputs(short).items():  # whole at its target, or not there
            assert name.startswith(".") or expected[name] == text
        if k % 2:  # and so do kills of what goes on
            continue
        carried_out(short)
        assert outputs(short) == expected
        for name in ("one.txt", "run.journal.jsonl"):
            (short.parent / name).unlink()
        shutil.rmtree(short.parent / "two")
    carried_out(short)
    assert outputs(short) == expected


def test_a_changed_step_that_is_killed_at_any_write_goes_on(short):
    for k in itertools.count(1):
        short.write_text(FILE.format(text="second"))
        carried_out(short)
        short.write_text(FILE.format(text=f"third {k}"))
        done = dies(k, lambda: carried_out(short), short.parent)
        carried_out(short)
        assert outputs(short)["two/b"] == f"third {k}" and len(outputs(short)) == 4
        if done:
            break


@pytest.mark.parametrize("event", ["before", "after"])
def test_what_comes_to_the_target_of_a_killed_step_is_refused(event, short, monkeypatch):
    """Before its output is entered, and after: what a step made is moved nowhere else, and nothing is replaced."""
    honest = runs.Journal.add

    def add(journal, record):
        if event == "after":
            honest(journal, record)
        if record.verb == "fill":
            os._exit(9)
        if event == "before":
            honest(journal, record)

    monkeypatch.setattr(runs.Journal, "add", add)
    assert not dies(10_000, lambda: carried_out(short), short.parent)
    monkeypatch.setattr(runs.Journal, "add", honest)
    (short.parent / "two").mkdir()
    (short.parent / "two" / "notes").write_text("mine")
    with pytest.raises(TargetExists, match=r"step 2, fill: two exists and is not what an earlier run"):
        carried_out(short)
    assert [p.name for p in (short.parent / "two").iterdir()] == ["notes"]
    shutil.rmtree(short.parent / "two")
    carried_out(short)
    assert outputs(short)["two/a"] == "second"


def test_an_incomplete_last_line_of_the_journal_is_ignored(short):
    carried_out(short)
    before, journal = outputs(short), short.with_name("run.journal.jsonl")
    journal.write_text(journal.read_text()[:-7])
    shutil.rmtree(short.parent / "two")  # it is moved only after its line is complete, so no kill leaves it there
    carried_out(short)
    assert outputs(short) == before


@pytest.mark.parametrize("ending", runs.EARLIER_JOURNALS)
def test_a_run_of_an_earlier_version_is_refused(ending, short):
    short.with_suffix(ending).write_text("{}\n")
    with pytest.raises(
        CheckpointError, match=r"run\.toml was begun by an earlier version .* move them .*away and run it"
    ):
        carried_out(short)
    assert not outputs(short).keys() - {"run.toml"}


def test_two_processes_do_not_carry_out_one_file(short):
    with (
        FileLock(short.with_name(".run.toml.lock")),
        pytest.raises(TargetExists, match=r"run\.toml is being carried out"),
    ):
        carried_out(short)
    carried_out(short)


def test_values_are_never_options(short):
    step = runs.Step(1, "write", {"out": "--help", "text": "--version"}, "k")
    assert step.arguments(verb.verbs()["write"]) == ["--text=--version", "--", "--help"]
    short.write_text('[[step]]\nverb = "write"\ntext = "--help"\nout = "--help"')
    carried_out(short)
    assert outputs(short)["--help"] == "--help"


@pytest.mark.parametrize("value", ['""', '"."', "3", "[]", "true"])
def test_an_output_is_a_path(value, short):
    short.write_text(f'[[step]]\nverb = "write"\nout = {value}')
    with pytest.raises(ArgumentError, match=r"step 1, write: out = .*; give the path of a file or folder"):
        carried_out(short)


def test_a_file_of_a_folder_that_was_rewritten_and_made_to_look_unchanged_is_another_input(tmp_path):
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(b"old")
    (tmp_path / "run.toml").write_text('[[step]]\nverb = "inspect"\nmodel = "m"')
    before, times = step_of(tmp_path / "run.toml").key, file.stat()
    assert step_of(tmp_path / "run.toml").key == before
    file.write_bytes(b"new")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert step_of(tmp_path / "run.toml").key != before


def test_what_a_step_writes_besides_is_no_input(tmp_path):
    """Its log and the state it goes on from: a step that wrote them would else be another one the next time."""
    table = '[[step]]\nverb = "unlearn"\nmodel = "m"\nout = "d.safetensors"\nlog = "log.jsonl"\nresume = "state"'
    (tmp_path / "run.toml").write_text(table)
    before = step_of(tmp_path / "run.toml").key
    for name in ("log.jsonl", "state"):
        (tmp_path / name).write_text("written")
    assert step_of(tmp_path / "run.toml").key == before
    (tmp_path / "run.toml").write_text(f"{table}\n{table}".replace("d.", "e.", 1))
    with pytest.raises(ArgumentError, match=r"several steps write log\.jsonl"):
        step_of(tmp_path / "run.toml")


LATER = (
    '[[step]]\nverb = "score"\nmodel = "m"\nout = "s.safetensors"\n[[step]]\nverb = "prune"\nmodel = "m"\nout = "e"\n'
)
"""Two steps; what follows are options of the second."""
BAD = {
    "a number that is none": (f'{LATER}fraction = "much"', ArgumentError, r"step 2, prune: Invalid value for '--fraction'"),
    "a number out of range": (f"{LATER}fraction = 0.1\nmultiple = 0\nstructure = 'slim'", ArgumentError, r"step 2, prune: --multiple=0; give at"),
    "a fraction": (f"{LATER}fraction = 2.0", ArgumentError, r"step 2, prune: --fraction=2\.0: a fraction lies in"),
    "a name": (f"{LATER}fraction = 0.1\nimportance = 'asb'", UnknownName, r"step 2, prune: --importance='asb'; did you mean 'abs'"),
    "no effect": (f"{LATER}fraction = 0.1\nmultiple = 4", ArgumentError, r"step 2, prune: --multiple has no effect with --structure keep"),
    "a text": (f"{LATER}fraction = 0.1\nforget = 'cdoe'", UnknownName, r"step 2, prune: --forget='cdoe'; did you mean 'code'"),
    "facts": (f"{LATER}fraction = 0.1\n[[step]]\nverb = 'project'\nmodel = 'm'\nforget = 'symbols+capitols'\nout = 'p'", UnknownName,
              r"step 3, project: --forget='capitols'; did you mean 'capitals'"),
    "a recipe": (f"{LATER}fraction = 0.1\n[[step]]\nverb = 'unlearn'\nmodel = 'm'\nrecipe = 'small:nop_klr'\nout = 'p'", UnknownName,
                 r"step 3, unlearn: no recipe is called 'nop_klr'; did you mean 'npo_klr'"),
    "a setting of a recipe": (f"{LATER}fraction = 0.1\n[[step]]\nverb = 'unlearn'\nmodel = 'm'\nset = ['betta=1.0']\nout = 'p'", UnknownName,
                              r"step 3, unlearn: .*betta"),
    "empty": (f"{LATER}fraction = 0.1\nsites = ''", ArgumentError, r"step 2, prune: --sites is empty; leave it out"),
    "no steps": ('model = "tiny"', DataError, r"it holds no \[\[step\]\] tables with a verb"),
    "no TOML": ("step = [", DataError, r"run\.toml is no readable TOML"),
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


def test_files_of_facts_are_left_to_the_step_that_reads_them(tmp_path):
    (tmp_path / "facts").mkdir()
    for value in ("mine.jsonl", "facts", "capitals+symbols", "code"):
        verb._check_sources("project", {"forget": value} if value != "facts" else {"forget": str(tmp_path / value)})
    with pytest.raises(UnknownName, match=r"--retain='capitol'; did you mean 'capitals'"):
        verb._check_sources("project", {"forget": "capitals", "retain": "capitol"})


def test_a_value_of_another_kind_names_its_step(file):
    file.write_text(RUN.format(fraction='"much"'))
    with pytest.raises(ArgumentError, match=r"step 2, prune: Invalid value for '--fraction'"):
        ran(file)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"none\.toml is not a file; give the TOML file of a run"):
        ran(tmp_path / "none.toml")


def test_flags_and_lists_become_words():
    commands = cli.verbs()
    step = runs.Step(1, "prune", {"model": "m", "fraction": 0.1, "json": True, "overwrite": True, "out": "x"}, "k")
    assert step.arguments(commands["prune"])[:1] == ["m"]
    words = step.arguments(commands["prune"])
    assert {"--json", "--overwrite"} <= set(words) and words[words.index("--fraction") + 1] == "0.1"
    off = runs.Step(1, "apply", {"edit": "e", "model": "m", "verify": False}, "k")
    assert "--no-verify" in off.arguments(commands["apply"])


def test_names_are_those_of_the_command_line(tmp_path):
    (tmp_path / "run.toml").write_text(
        '[[step]]\nverb = "compare"\nbase = "a"\nedited = "b"\ndata = "folder"\nbatch_size = 2'
    )
    (step,) = runs.read_steps(tmp_path / "run.toml", cli.verbs())
    words = step.arguments(cli.verbs()["compare"])
    assert words == ["a", "b", "--data", "folder", "--batch-size", "2"]


def test_the_run_in_the_guide_can_be_read(tmp_path):
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "resume.md").read_text()
    (block,) = re.findall(r"```toml[^\n]*\n(.*?)```", guide, flags=re.S)
    (tmp_path / "run.toml").write_text(block)
    steps = runs.read_steps(tmp_path / "run.toml", cli.verbs())
    assert [step.verb for step in steps] == ["prune", "compare"] and steps[0].options["model"] == "smollm2-135m"
