"""A target that cannot be written is refused before any work, and what was computed is kept where writing fails late."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app, apply
from repedit.data import facts
from repedit.delta import Delta
from repedit.errors import ArgumentError, CheckpointError, RepeditError, TargetExists
from repedit.unlearning import trainer
from tests.saved_models import saved
from tests.unlearning_cases import sides, subject

VERBS = {
    "collect": "collect {model}", "score": "score {model}", "prune": "prune {model} --fraction 0.1", "project": "project {model}",
    "unlearn": "unlearn {model} --forget {facts}", "apply": "apply {edit} {model}",
}  # fmt: skip
SMALL = {"recipe": rp.recipes.grad_diff(), "steps": 3, "batch_size": 3, "lr": 1e-3, "progress": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def rows(tmp_path) -> Path:
    """Facts to forget and to retain, in a file."""
    held = [(f, "forget") for f in facts("capitals").forget[:6]] + [(f, "retain") for f in facts("symbols").forget[:6]]
    lines = ({"id": f.id, "prompt": f.prompt, "answer": f.answer, "role": role} for f, role in held)
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "facts.jsonl"


def taken(folder: Path, model: Path) -> dict[str, tuple[Path, str]]:
    """Targets that cannot be meant, and what is said of them."""
    (folder / "there").mkdir()
    (folder / "there" / "file").write_text("mine")
    (folder / "weights.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (folder / "dir.safetensors").mkdir()
    (folder / "link").symlink_to(folder / "there")
    (folder / "plain").write_text("mine")
    return {
        "a folder with something in it": (folder / "there", r"there"),
        "weights": (folder / "weights.safetensors", r"exists and repedit did not write it"),
        "a folder of that name": (folder / "dir.safetensors", r"is a directory, where a file is to be written"),
        "a link": (folder / "link", r"is a link|there is a directory, where a file is to be written"),
        "below a file": (folder / "plain" / "x", r"is not a directory"),
        "the model": (model, r""),
        "inside the model": (model / "edited", r"lies inside the other"),
    }


@pytest.mark.parametrize("verb", VERBS)
def test_a_target_is_checked_before_work(verb, model, rows, tmp_path, monkeypatch):
    for place in ("neurons", "unlearn", "apply"):
        monkeypatch.setattr(f"repedit.cli.{place}.load_model", lambda *a: pytest.fail("the model was opened"))
    monkeypatch.setattr("repedit.edit.Edit.load", lambda path: pytest.fail("the edit was read"))
    words = VERBS[verb].format(model=model, facts=rows, edit=rows).split()
    for name, (target, match) in taken(tmp_path, model).items():
        if verb in ("collect", "score") and "model" in name:  # these write files, wherever
            continue
        before = sorted(str(p) for p in tmp_path.rglob("*"))
        with pytest.raises((TargetExists, CheckpointError), match=match):
            CliRunner().invoke(app, [*words, "--out", str(target)], catch_exceptions=False)
        assert sorted(str(p) for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["collect", "score"])
def test_a_verb_that_writes_a_file_refuses_a_folder_of_any_name(verb, model, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetExists, match=r"empty is a directory, where a file is to be written"):
        CliRunner().invoke(app, [verb, str(model), "--out", str(tmp_path / "empty")], catch_exceptions=False)


def test_links_that_lead_back_to_themselves_are_refused(model, rows, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for words in (
        ["apply", str(rows), str(model)],
        ["audit", str(model), "--original", str(model), "--facts", str(rows)],
        ["audit", str(tmp_path / "loop"), "--original", str(model), "--facts", str(rows)],
        ["vision", "demo"],
    ):
        with pytest.raises(TargetExists, match=r"loop is (a link|read by)|loop and the source"):
            out = ["--out", str(tmp_path / "loop")]
            CliRunner().invoke(app, [*words, *out], catch_exceptions=False)
    with pytest.raises(RepeditError, match=r"loop is not a directory"):
        rp.diff(tmp_path / "loop", model)


@pytest.mark.parametrize("out", [".", "/", ".."])
def test_the_second_directory_of_the_demo_needs_a_name(out):
    with pytest.raises(ArgumentError, match=r"has no name that the second directory could be named after"):
        CliRunner().invoke(app, ["demo", "--out", out], catch_exceptions=False)


def test_tasks_are_written_into_a_folder_or_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "repedit_capitals.yaml").symlink_to("nowhere")
    for out, error, match in (
        ("file", TargetExists, r"is a file, where a folder"),
        ("file/x", CheckpointError, r"is not a directory"),
        ("loop", TargetExists, r"is a link, where a folder"),
        ("x" * 300, CheckpointError, r"is too long"),
        ("a\nb", ArgumentError, r"control characters"),
        ("folder", RepeditError, r"repedit_capitals\.yaml cannot be opened"),
    ):
        with pytest.raises(error, match=match):
            words = ["tasks", str(tmp_path / out), "--facts", "capitals"]
            CliRunner().invoke(app, words, catch_exceptions=False)
    assert not (tmp_path / "folder" / "nowhere").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_value_is_saved_where_a_link_leads(tmp_path):
    (tmp_path / "d.safetensors").symlink_to("new/d.safetensors")
    apply.save(Delta({"w": __import__("torch").ones(3)}, {"method": "test"}), tmp_path / "d.safetensors")
    assert (tmp_path / "d.safetensors").is_symlink() and (tmp_path / "new" / "d.safetensors").is_file()


def test_a_file_that_is_read_is_not_written(model, tmp_path):
    edit = tmp_path / "edit.safetensors"
    rp.Edit(
        {
            rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(
                rp.load(model).value("lm_head.weight")[0, :1].repeat(128) > 9
            )
        }
    ).save(edit)
    with pytest.raises(TargetExists, match=r"is read by this command and cannot be written by it"):
        CliRunner().invoke(
            app, ["project", str(model), "--previous", str(edit), "--out", str(edit)], catch_exceptions=False
        )


def test_an_audit_checks_its_folder_first(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").write_text("mine")
    for out, match in (
        ("there", r"holds something else than findings or audit\.json"),
        ("there/notes", r"is a file, where a folder"),
    ):
        with pytest.raises(TargetExists, match=match):
            rp.audit("nowhere", original="nowhere", facts=facts("capitals"), out=tmp_path / out)


def failing(monkeypatch, after: int) -> None:
    """The disk is full after so many files."""
    honest, count = rp.Delta.save, iter(range(100))

    def save(self, path):
        if next(count) < after:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, path)

    monkeypatch.setattr(rp.Delta, "save", save)


@pytest.mark.parametrize("after", [1, 2])
def test_what_was_computed_is_kept_beside_a_target_that_fails(after, tmp_path, monkeypatch):
    """Where nothing fits beside it either, elsewhere."""
    delta = Delta({"w": __import__("torch").ones(3)}, {"method": "test"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    failing(monkeypatch, after)
    with pytest.raises(
        CheckpointError, match=r"No space left.*what was computed is kept in \S*d\.rescued\.safetensors: repedit apply"
    ):
        apply.save(delta, tmp_path / "full" / "d.safetensors")
    (kept,) = tmp_path.rglob("*.rescued.safetensors")
    assert Delta.load(kept).tensors["w"].sum() == 3 and (kept.parent == tmp_path) == (after == 2)


def test_a_target_that_appears_during_the_training_costs_nothing(tmp_path):
    out = tmp_path / "new" / "d.safetensors"
    delta = Delta({"w": __import__("torch").ones(3)}, {"method": "test"})
    out.mkdir(parents=True)
    with pytest.raises(RepeditError, match=r"kept in \S*rescued"):
        apply.save(delta, out)
    apply.save(delta, tmp_path / "other" / "d.safetensors")
    assert len(list(tmp_path.rglob("d*.safetensors"))) == 3


def test_a_log_or_state_of_something_else_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Training, "run", lambda *a, **o: pytest.fail("it was trained"))
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\n')
    (tmp_path / "folder").mkdir()
    for name, error, match in (
        ({"log": tmp_path / "notes.jsonl"}, TargetExists, r"is not the log of a training"),
        ({"log": tmp_path / "folder"}, TargetExists, r"is a directory"),
        ({"resume": tmp_path / "notes.jsonl"}, TargetExists, r"is a file, and resume= takes a folder"),
        ({"log": tmp_path / "notes.jsonl" / "x"}, CheckpointError, r"is not a directory"),
        ({"log": tmp_path / "x", "resume": tmp_path / "x"}, ArgumentError, r"log and resume are both"),
    ):
        with pytest.raises(error, match=match):
            rp.unlearn(subject(), **sides(), **SMALL, **name)
    assert (tmp_path / "notes.jsonl").read_text() == '{"mine": 1}\n'


def test_a_log_whose_first_line_was_cut_off_is_written_anew(tmp_path):
    for text in ("", '{"c', '{"c": null, "step": 0}\n{"c"'):
        (tmp_path / "log").write_text(text)
        delta = rp.unlearn(subject(), **sides(), **SMALL, log=tmp_path / "log")
        assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [0, 1, 2]
        assert len(delta.log) == 3


def test_a_state_that_cannot_be_saved_leaves_what_was_trained(tmp_path, monkeypatch):
    def full(*args, **options):
        raise CheckpointError("the disk is full")

    monkeypatch.setattr("repedit.training.resume.save", full)
    with pytest.raises(CheckpointError, match=r"stopped after 3 steps.*the disk is full; error\.delta holds") as caught:
        rp.unlearn(subject(), **sides(), **SMALL, resume=tmp_path / "state")
    assert caught.value.delta.tensors


READ = (
    "inspect {0}", "diff {model} {0}", "compare {model} {0}", "unlearn {model} --out d.safetensors --forget {0}", "unlearn {model} --out d.safetensors --recipe {0}.toml",
    "project {model} --out d.safetensors --forget {facts} --previous {0}", "prune {model} --out d.safetensors --fraction 0.1 --scores {0}", "collect {model} --out d.safetensors --text {0}",
    "apply --out o {0} {model}", "apply --out o {facts} {0}", "audit {0} --original {model} --facts {facts} --attacks direct", "audit {model} --original {model} --facts {0}",
    "report {0}", "report {0}.toml", "run {0}", "reproduce {0}", "push {0} me/x", "compare {model} {model} --metrics tofu --data {0}", "tasks t --facts {0}",
)  # fmt: skip


@pytest.mark.parametrize("words", READ)
def test_an_input_at_which_nothing_can_be_is_an_error_of_ours(words, model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for name in ("x" * 300, "loop", "facts.jsonl/x", "~nobody/x"):
        with pytest.raises(RepeditError):
            CliRunner().invoke(app, words.format(name, model=model, facts=rows).split(), catch_exceptions=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "loop"]
