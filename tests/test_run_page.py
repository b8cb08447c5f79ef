"""The page of a run tells what was asked, done, measured and not shown, and notices whatever is not as the run left it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import ChoiceLoader, DictLoader
from typer.testing import CliRunner

import repedit as rp
from repedit import runs
from repedit.cli import app, output
from repedit.errors import ArgumentError, CheckpointError, DataError, NotFound
from repedit.io.files import file_hash, file_hashes
from repedit.plot.reports import bars, course, drops, ranges
from repedit.report import pages
from repedit.report.run_pages import rendered
from repedit.rewrite.verification import Verification
from repedit.runs import Journal, StepRecord, journal_path, run_report, step_tables
from tests.conftest import reload_here
from tests.handmade_reports import CITIES, report
from tests.saved_models import saved
from tests.test_report import BROWSER, HOSTILE, Elements, measured, spoiled
from tests.test_run import lines

pytestmark = [
    pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning"),
    pytest.mark.usefixtures("reloaded_here"),
]
RUN = """# Is it only the rivers?
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
fraction = 0.1
seed = 3
out = "edited"

[[step]]
verb = "compare"
base = "tiny"
edited = "edited"
text = ["mine.jsonl"]
limit_tokens = 300
prompt = ["def f(n):", "A <b>bold</b> claim"]

[[step]]
verb = "diff"
base = "tiny"
edited = "edited"
"""
AUDIT = '\n[[step]]\nverb = "audit"\nedited = "edited"\noriginal = "tiny"\nfacts = "capitals"\nout = "audit"\n'
PARTS = (
    "What was asked", "The model", "How it was found", "How neurons were scored", "What was selected", "How it was trained",
    "What changed in the weights", "How exact it is", "Before and after", "Under attack", "What has not been shown", "How to make it again",
)  # fmt: skip


def ran(file: Path, *words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["run", str(file), *words])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder in which a run was carried out once."""
    folder = tmp_path_factory.mktemp("made")
    saved(folder / "tiny")
    (folder / "mine.jsonl").write_text(lines("rivers"))
    (folder / "run.toml").write_text(RUN)
    with pytest.MonkeyPatch.context() as patch:
        reload_here(patch)
        ran(folder / "run.toml")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def audited(folder, monkeypatch) -> Path:
    """The same with an audit, which was made by hand."""
    (folder / "run.toml").write_text(RUN + AUDIT)
    report().save(folder / "audit")
    monkeypatch.chdir(folder)
    record(5, "audit", exit_code=3)
    return folder


def record(number: int, out: str | None, exit_code: int = 0) -> None:
    """Enter a step of run.toml, in the current folder, in its journal."""
    table = step_tables(Path("run.toml"))[number - 1]
    files = {} if out is None else file_hashes(Path(out))
    done = StepRecord(number, table["verb"], "k", table, (table["verb"],), exit_code, 1.0, out, files, {}, (), {})
    Journal(Path("run.toml")).add(done)


def text(folder: Path, **options: Any) -> str:
    return Elements(rp.report.run_page(folder, **options)).text


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


# What it holds.


def test_a_run_leaves_its_page(made):
    page = (made / "run.report.html").read_text()
    assert page == rp.report.run_page(made) == rp.report.run_page(made / "run.toml")
    assert [title for title in headings(page) if title != "In brief"] == list(PARTS)
    assert spoiled(page) == [] and "http" not in page and "<style>" in page


def test_everything_that_was_asked_and_done_is_told(made):
    shown, manifest = text(made), json.loads((made / "edited" / "repedit.json").read_text())
    origin = manifest["edit"]
    for words in (
        "# Is it only the rivers?", "NOT AUDITED", "4 of 4 steps carried out", "seed, step 2, prune 3", "Every file that the steps were given",
        "repedit prune tiny --out edited --fraction 0.1 --forget code --retain mine.jsonl --limit-tokens 400 --seed 3",
        origin["model"], origin["method"], origin["data"]["forget"]["hash"], file_hash(made / "mine.jsonl"),
        "llama", f"{len(manifest['plan'])} tensors changed", *manifest["plan"], *manifest["base"]["files"].values(), *manifest["sites"],
        "neurons zeroed", "exact", f"all {len(manifest['files'])} files are as they were exported", rp.__version__, manifest["versions"]["torch"],
        "relative drop (95 % interval)", "def f(n):", "A <b>bold</b> claim", "Most specific neurons", "pruned", "tensors differ", "repedit reproduce run.toml",
    ):  # fmt: skip
        assert words in shown, words


def absent(page: str) -> set[str]:
    """Parts of the page that say why they are empty."""
    return set(re.findall(r"<h2>([^<]*)</h2>\s*<p class=\"absent\">", page))


def test_what_was_not_done_is_said(made, tmp_path):
    assert absent(rp.report.run_page(made)) == {"How it was trained", "Under attack"}
    assert "The edited model was not attacked" in text(made)
    (tmp_path / "run.toml").write_text('[[step]]\nverb = "diff"\nbase = "a"\nedited = "b"\n')
    bare = rp.report.run_page(tmp_path / "run.toml")
    always = {"What was asked", "The model", "What has not been shown", "How to make it again"}
    assert absent(bare) == {*PARTS} - always
    assert [title for title in headings(bare) if title != "In brief"] == list(PARTS)
    assert "0 of 1 steps carried out" in Elements(bare).text and "not run repedit diff" in Elements(bare).text


def test_an_absence_that_is_not_said_would_be_caught(tmp_path, monkeypatch):
    (tmp_path / "run.toml").write_text('[[step]]\nverb = "diff"\nbase = "a"\nedited = "b"\n')
    environment = pages.ENVIRONMENT
    source = environment.loader.get_source(environment, "parts.html.jinja2")[0]
    silent = DictLoader({"parts.html.jinja2": source.replace("content or otherwise", "content")})
    loader = ChoiceLoader([silent, environment.loader])
    monkeypatch.setattr(pages, "ENVIRONMENT", environment.overlay(loader=loader))
    assert "Under attack" not in headings(rp.report.run_page(tmp_path / "run.toml"))


def test_everything_an_export_did_is_told():
    row = {"map": "removes rank 2", "exactness": "subspace-exact"}
    leak = {"rank": 2, "leak_computed": 1e-9, "leak": 2e-3, "residue": 0.25, "dtype": "bfloat16"}
    manifest: dict[str, Any] = {
        "sites": {"10.mlp.out": row, "2.mlp.out": row | {"exactness": "exact"}}, "dtype": "bfloat16", "files": {},
        "plan": {"w.10": {"relative_change": 0.125, "operations": ["fold", "round"]}, "w.2": {"relative_change": None, "operations": ["slice"]}},
        "parameters": {"before": 12_000, "after": 9_000}, "unties": {"head": "embed"}, "added": ["bias"], "ranks": {"q": 2, "v": 3},
        "certificate": {"form": "folded", "exactness": "subspace-exact", "rank": 2, "worst_leak": 2e-3, "tensors": {"w.10": leak, "w.2": leak}},
    }  # fmt: skip
    export = Verification(manifest, {}, (), (), ("notes.txt",))
    audits = {"audit": replace(report(), context={"seeds": [0]})}
    shown = Elements(rendered(runs.RunReport(Path("run.toml"), "", (), {"edited": export}, {}, audits, {}))).text
    for words in (
        "2.mlp.out removes rank 2 exact 10.mlp.out", "edited: 1 sites exact, 1 sites subspace-exact", "4 directions removed at mlp.out of 2 layers",
        "every tensor was converted to bfloat16", "w.2 slice new or another shape w.10 fold; round 0.1250", "0.125 at most, 0.125 at least",
        "12,000 numbers in the files before, 9,000 after", "Untied: head from embed", "New tensors: bias", "An adapter of 2 modules, rank 3 at most",
        "subspace-exact, largest leak along a removed direction 2.0e-03", "w.2 2 1.0e-09 2.0e-03 2.5e-01 bfloat16 w.10", "not of the export: notes.txt",
        "at some sites the subspace is erased", "the certificate of edited is about tensors", "Where these files of edited", "there was one",
        "at the budget unknown", "Anything about attacks on edited", "no step compared the two models",
    ):  # fmt: skip
        assert words in shown, words


def test_an_audit_is_told_with_its_figure_and_tables(audited):
    page = rp.report.run_page(audited)
    shown = Elements(page).text
    assert "run: HIDDEN" in shown and report().verdict.sentence in shown and page.count("recovered fraction R") == 2
    for words in (
        "0.82 [0.73, 0.91]",
        "no budget tries it",
        "distillation of the model",
        "audit/audit.html",
        "holds for the attacks that ran, at the budget fast",
    ):
        assert words in shown
    assert not run_report(audited).faults and "Under attack" not in absent(page)


def test_texts_are_left_out_on_request(audited):
    assert any(city in text(audited) for city in CITIES) and "def f(n):" in Elements(rp.report.run_page(audited)).text
    hidden = rp.report.run_page(audited, hide_items=True)
    assert not any(city in hidden for city in CITIES) and "the texts of the facts are withheld" in hidden
    assert "def f(n):" not in Elements(hidden).text and "(withheld)" in hidden


def test_the_audit_of_another_checkpoint_is_said_to_be_that(audited):
    (audited / "run.toml").write_text(
        (audited / "run.toml").read_text().replace('edited = "edited"\noriginal', 'edited = "other"\noriginal')
    )
    assert "no audit of this run attacked it" in text(audited)


def test_no_text_of_a_run_becomes_markup(audited):
    file = audited / "run.toml"
    file.write_text("# " + HOSTILE.replace("\n", " ") + "\n" + file.read_text())
    rows = [json.loads(line) for line in journal_path(file).read_text().splitlines()]
    for row in rows:
        row["command"] = [word + HOSTILE for word in row["command"]]
        row["display"] = json.loads(json.dumps(row["display"]).replace("code", json.dumps(HOSTILE)[1:-1]))
        row["display"] += [{"kind": "json", "value": {HOSTILE: [HOSTILE]}}, {"kind": "line", "text": HOSTILE}]
    journal_path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = rp.report.run_page(audited)
    assert spoiled(page) == [] and Elements(page).text.count("<script>alert(1)</script>") > 10


def test_unescaped_text_is_caught(audited, monkeypatch):
    monkeypatch.setattr(pages, "ENVIRONMENT", pages.ENVIRONMENT.overlay(autoescape=False))
    assert "b" in spoiled(rp.report.run_page(audited))


# Whether it still holds.


def manifest_of(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "edited" / "repedit.json"
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


ALTERED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (lambda f: flipped(f / "edited" / "model.safetensors"), r"edited/model\.safetensors: changed since the run, its sha256 is another"),
    "a number of the manifest": (lambda f: manifest_of(f, lambda m: m["edit"].update(method="nothing")), r"edited/repedit\.json: changed since the run"),
    "a hash of the manifest": (lambda f: manifest_of(f, lambda m: m["files"].update({"config.json": "0" * 64})), r"edited is not what its repedit\.json says: changed since the export: config\.json"),
    "a manifest of another shape": (
        lambda f: manifest_of(f, lambda m: m.update(sites={"0.mlp.neurons": 3})),
        r"edited cannot be read: its repedit\.json is not one of an export: TypeError",
    ),
    "no manifest": (lambda f: (f / "edited" / "repedit.json").unlink(), r"edited/repedit\.json: gone"),
    "a torn manifest": (lambda f: (f / "edited" / "repedit.json").write_text("{"), r"edited cannot be read: .*cannot be read as JSON"),
    "no checkpoint": (lambda f: shutil.rmtree(f / "edited"), "edited is gone"),
    "a file more": (lambda f: (f / "edited" / "notes.txt").write_text("x"), r"edited/notes\.txt: new since the run"),
    "scores": (lambda f: flipped(f / "scores.safetensors"), r"scores\.safetensors: changed since the run"),
    "the data": (lambda f: (f / "mine.jsonl").write_text(lines("hills")), r"its input mine\.jsonl is not the one it read"),
    "no data": (lambda f: (f / "mine.jsonl").unlink(), r"its input mine\.jsonl is gone"),
    "what is asked": (lambda f: (f / "run.toml").write_text(RUN.replace("0.1", "0.2")), r"Step 2, prune: the file asks for something else now .*fraction was 0\.1, is 0\.2"),
    "a verb": (lambda f: (f / "run.toml").write_text(RUN.replace('"diff"', '"compare"')), r"Step 4, diff: the file asks for something else now .*verb was diff, is compare"),
}  # fmt: skip


def faults(folder: Path) -> str:
    """What stands first on the page."""
    page = rp.report.run_page(folder)
    return (
        ""
        if "CHANGED SINCE THE RUN" not in page
        else Elements(page).text.split("Not as the run left it")[1].split("In brief")[0]
    )


@pytest.mark.parametrize("what", ALTERED)
def test_whatever_is_altered_stands_first(what, folder):
    assert faults(folder) == ""
    alter, words = ALTERED[what]
    alter(folder)
    assert re.search(words, faults(folder)), faults(folder)
    assert "still has the sha256 it had then" not in text(folder)


def test_hashes_that_are_believed_unseen_would_be_caught(folder, monkeypatch):
    held = {record.out: record.files for record in Journal(folder / "run.toml").records}
    ALTERED["weights"][0](folder)
    monkeypatch.setattr(runs, "file_hashes", lambda path: held[path.relative_to(folder).as_posix()])
    monkeypatch.setattr(
        "repedit.rewrite.verification.file_hash",
        lambda path: json.loads((folder / "edited" / "repedit.json").read_text())["files"][path.name],
    )
    assert faults(folder) == ""


def test_an_audit_that_was_altered_or_torn_is_noticed(audited):
    path = audited / "audit" / "audit.json"
    path.write_text(path.read_text().replace('"HIDDEN"', '"NO RECOVERY FOUND"'))
    assert "audit/audit.json: changed since the run" in faults(audited)
    assert "audit (not as the run left it): NO RECOVERY FOUND" in text(audited)
    path.write_text("{")
    assert re.search("audit cannot be read: .*the audit: not JSON", faults(audited))
    assert str(audited) not in text(audited)


def test_a_step_that_is_older_than_what_it_speaks_of_is_noticed(audited, monkeypatch):
    monkeypatch.chdir(audited)
    record(2, "edited")
    assert "Step 5, audit was carried out before step 2 was last carried out" in faults(audited)


def test_a_step_that_failed_is_told(folder):
    (folder / "run.toml").write_text(RUN.replace("seed = 3", "seed = 3\nmax_retain_drop = -1000.0"))
    said = ran(folder / "run.toml", code=3)
    assert f"page: {folder / 'run.report.html'}" in said
    shown = Elements((folder / "run.report.html").read_text()).text
    assert "ended with code 3" in shown and "Anything that rests on steps that were not carried out: 2, prune" in shown


def test_a_dry_run_and_a_refused_file_leave_nothing(folder):
    (folder / "run.report.html").unlink()
    ran(folder / "run.toml", "--dry-run")
    assert not (folder / "run.report.html").exists()
    (folder / "run.toml").write_text('[[step]]\nverb = "nothing"\n')
    ran(folder / "run.toml", code=1)
    assert not (folder / "run.report.html").exists()


def test_steps_that_are_done_keep_what_they_showed(folder):
    before = rp.report.run_page(folder)
    assert "done" in ran(folder / "run.toml") and rp.report.run_page(folder) == before


# The journal.


def test_a_line_that_was_cut_off_is_none(folder, monkeypatch):
    monkeypatch.chdir(folder)
    path = folder / "run.journal.jsonl"
    path.write_text(path.read_text() + '{"number": 4, "ver')
    assert len(Journal(folder / "run.toml").records) == 4
    record(4, None)
    assert Journal(folder / "run.toml").latest()[4].seconds == 1.0


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "nothing": (lambda f: run_report(f / "none.toml"), NotFound, r"none\.toml does not exist; give the TOML file of a run"),
    "no run": (lambda f: run_report(f / "edited"), NotFound, r"edited holds no journal of a run \(\*\.journal\.jsonl\)"),
    "two runs": (lambda f: (shutil.copy(f / "run.journal.jsonl", f / "b.journal.jsonl"), run_report(f)), ArgumentError, r"holds 2 runs; name one: b\.toml, run\.toml"),
    "no steps": (lambda f: ((f / "run.toml").write_text("model = 'tiny'"), run_report(f)), DataError, r"run\.toml is not the file of a run: it holds no \[\[step\]\] tables"),
    "steps without verbs": (lambda f: ((f / "run.toml").write_text("[[step]]\nout = 'a'"), run_report(f)), DataError, r"it holds no \[\[step\]\] tables with a verb"),
    "no TOML": (lambda f: ((f / "run.toml").unlink(), run_report(f)), NotFound, r"run\.toml is not a file; give the TOML file of a run"),
    "another journal": (lambda f: ((f / "run.journal.jsonl").write_text('{"a": 1}\n'), run_report(f)), CheckpointError, r"is not the journal of a run: line 1 must hold number, verb.*; found \['a'\]; move it away"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_run_is_refused(what, folder):
    call, error, match = REFUSED[what]
    with pytest.raises(error, match=match):
        call(folder)


def test_only_what_is_shown_while_somebody_listens_is_kept(capsys):
    with output.recorded() as found:
        output.table("A [b]title[/b]", ("x", "y"), [["a", 0.12345], ["b", 2]])
        output.out.print("[bold]so[/bold] it is [b]")
        output.show_generations(["p"], [" "], ["x\ny"])
        output.show_json({"path": Path("a")})
    output.table("later", ("x",), [["a"]])
    assert found[0] == {
        "kind": "table",
        "title": "A [b]title[/b]",
        "columns": ["x", "y"],
        "rows": [["a", "0.123"], ["b", "2"]],
    }
    assert found[1] == {"kind": "line", "text": "[bold]so[/bold] it is [b]"}
    assert [item["kind"] for item in found[2:]] == ["generations", "json"] and found[2]["rows"] == [
        ["p", "(nothing)", "x\ny"]
    ]
    assert found[3]["value"] == {"path": "a"}


# The charts.


def test_bars_are_as_high_as_their_numbers():
    figure = bars({0: 4.0, 3: 1.0, 5: 2.0}, "layer", "neurons")
    assert [(bar.get_center()[0], bar.get_height()) for bar in figure.axes[0].patches] == [(0, 4), (3, 1), (5, 2)]
    assert figure.get_label() == "neurons by layer: 3 values, the largest 4 at layer 0"


def test_a_course_has_a_gap_where_nothing_is_known():
    figure = course("forget loss", [3.0, 2.0, float("nan"), 1.0, float("inf")])
    line, points = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [3, 2, float("nan"), 1, float("nan")])
    assert list(points.get_xdata()) == [4], "a value between two gaps is a point"
    assert figure.get_label() == "forget loss: 3 at the first of 5 steps, n/a at the last; 2 not finite"
    assert course("one", [1.0]).axes[0].lines[1].get_ydata() == [1.0]


def test_ranges_stand_where_their_numbers_do():
    (lines, strokes) = (
        axes := ranges({0: (-1.0, 0.0, 1.0, 3.0), 2: (-1.5, 0.5, 1.0, 1.0)}, "layer", "score").axes[0]
    ).collections
    assert [segment.tolist() for segment in lines.get_segments()] == [[[0, -1], [0, 1]], [[2, -1.5], [2, 1]]]
    assert [segment[0, 1] for segment in strokes.get_segments()] == [0.0, 0.5]
    assert axes.lines[0].get_xydata().tolist() == [[0, 3], [2, 1]]


def test_drops_stand_where_their_numbers_do():
    figure = drops([("pruned", "forget", 40.0, 35.0, 45.0), ("pruned", "retain", 2.0, float("nan"), float("nan"))])
    interval, dot, missing, other = figure.axes[0].lines[:4]
    assert (list(interval.get_xdata()), list(dot.get_xdata()), list(other.get_xdata())) == ([35, 45], [40], [2])
    assert np.isnan(missing.get_xdata()).all()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["pruned: forget", "pruned: retain"]


def test_a_pruning_has_its_map_and_its_drops(made):
    page = rp.report.run_page(made)
    assert "the score of every neuron, one column per layer" in page and "<image" in page
    assert "Step 2, prune: drop, with 95 % intervals" in page and "Step 3, compare: drop" in page
    hidden = rp.report.run_page(made, hide_items=True)
    assert "one column per layer" not in hidden and "drop, with" not in hidden


def test_scores_of_which_every_neuron_is_protected_have_no_map(folder):
    scores = rp.Scores.load(folder / "scores.safetensors")
    protected = {
        site: replace(score, values=torch.full_like(score.values, -torch.inf)) for site, score in scores.items()
    }
    (folder / "scores.safetensors").unlink()
    replace(scores, by_site=protected).save(folder / "scores.safetensors")
    assert "one column per layer" not in rp.report.run_page(folder)


def test_a_training_is_drawn_from_what_was_kept(tmp_path):
    edit = rp.Edit({rp.Site.parse("1.mlp.out"): rp.LowRank.projection(torch.eye(8)[:, :2])},
                   {"method": "mrp", "history": {"forget": [3.0, 2.0], "divergence": [0.1, 0.2]}, "stopped": "all steps"})  # fmt: skip
    delta = rp.Delta(
        {"w": torch.ones(2, 2)},
        {"method": "npo"},
        ({"losses": {"forget": 1.0, "retain": None}}, {"losses": {"forget": 0.5, "retain": 2.0}}),
    )
    edit.save(tmp_path / "e.safetensors")
    delta.save(tmp_path / "d.safetensors")
    (tmp_path / "run.toml").write_text(
        '[[step]]\nverb = "project"\nout = "e.safetensors"\n[[step]]\nverb = "unlearn"\nout = "d.safetensors"\n'
    )
    page = rp.report.run_page(tmp_path / "run.toml")
    says = [str(a["aria-label"]) for a in Elements(page).of("svg")]
    assert {words for words in says if "first of 2 steps" in words} == {
        "forget loss, nats: 3 at the first of 2 steps, 2 at the last", "divergence on retain, nats: 0.1 at the first of 2 steps, 0.2 at the last",
        "forget loss: 1 at the first of 2 steps, 0.5 at the last", "retain loss: n/a at the first of 2 steps, 2 at the last; 1 not finite",
    }  # fmt: skip
    assert (
        "2 directions removed at mlp.out of 1 layers" in Elements(page).text
        and "mrp; it stopped because of: all steps" in Elements(page).text
    )


# The command line.


def shown(*words: object) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, words)])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def test_report_writes_the_page_of_a_run(folder, tmp_path):
    assert "not as" not in shown(folder, "-o", tmp_path / "page.html").lower()
    assert (tmp_path / "page.html").read_text() == rp.report.run_page(folder)
    assert json.loads(shown(folder / "run.toml", "--json"))["steps"][1] == {"step": 2, "verb": "prune", "state": "done"}
    flipped(folder / "edited" / "model.safetensors")
    assert "Not as the run left it: Step 2, prune: edited/model.safetensors" in shown(folder, "-o", tmp_path).replace(
        "\n", " "
    )
    assert (tmp_path / "report.html").exists()


def test_a_run_is_shown_alone(folder):
    with pytest.raises(ArgumentError, match=r"2 paths were given and one of them is a run; a run is shown alone"):
        CliRunner().invoke(app, ["report", str(folder), str(folder)], catch_exceptions=False)


# A browser.


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the PATH")
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (500, True)])
def test_a_browser_lays_the_page_out_without_a_word(audited, tmp_path, width, dark):
    flags = (
        ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
        if dark
        else ["--blink-settings=preferredColorScheme=1"]
    )
    page = rp.report.run_page(audited)
    found = measured(page, tmp_path, width, *flags)
    assert found["pairs"] == [] and found["out"] == [] and found["scroll"] <= found["width"] and found["size"] >= 10
    assert found["paper"] == ("rgb(22, 24, 27)" if dark else "rgb(255, 255, 255)")
    assert complaints(page, tmp_path) == []
    assert complaints(page.replace("</body>", "<script>console.error('told')</script></body>"), tmp_path)


def complaints(page: str, place: Path) -> list[str]:
    """What the console of a browser says while it opens a page."""
    (place / "silent.html").write_text(page)
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={place / 'other'}",
        "--enable-logging=stderr",
        "--v=0",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", (place / "silent.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_page_of_a_gathered_run_is_its_page(made):
    assert rendered(run_report(made)) == rp.report.run_page(made)
