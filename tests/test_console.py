"""What the command line prints: foreign text is shown and not obeyed, JSON is one document, and a closed pipe ends it quietly."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from repedit import cli
from repedit.cli import application as examples
from repedit.cli import output
from repedit.escaping import for_terminal
from tests.saved_models import saved
from tests.test_escaping import SIGNS

NASTY = "".join(SIGNS).replace("\n", "").replace("\t", "")
HOSTILE = "\x1b]52;c;cHduZWQ\x07[/][bold]\u202e\r\udc80"


@pytest.fixture
def screen(monkeypatch):
    """A terminal, and what it was sent."""
    sent = io.StringIO()
    monkeypatch.setattr(output, "out", output.Output(file=sent, force_terminal=True, width=4000))
    return sent


PRINTED = {
    "a line": lambda text: output.out.print(text),
    "a line in a style": lambda text: output.out.print(text, style="dim"),
    "the title of a table": lambda text: output.table(text, ("a",), [["x"]]),
    "a column": lambda text: output.table("t", (text,), [["x"]]),
    "a cell": lambda text: output.table("t", ("a",), [[text]]),
    "generations": lambda text: output.show_generations([text], [text], [text]),
    "texts side by side": lambda text: output.show_side_by_side((text, "b"), [(SimpleNamespace(text=text), SimpleNamespace(text="x"))]),
}  # fmt: skip


@pytest.mark.parametrize("door", PRINTED)
# NASTY holds every sign but the two that it cannot; alone, a sign goes the same way.
@pytest.mark.parametrize("text", [NASTY, HOSTILE, "\n", "\t", *(pytest.param(s, marks=pytest.mark.slow) for s in SIGNS if s not in "\n\t")])  # fmt: skip
def test_a_terminal_shows_foreign_text_and_obeys_none_of_it(door, text, screen):
    PRINTED[door](f"<{text}>")
    sent = screen.getvalue()
    own = {"\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[3m", "\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A"}
    left = sent.replace("\r", "") if door == "texts side by side" else sent  # which it redraws
    for sequence in own:
        left = left.replace(sequence, "")
    assert left == for_terminal(left, lines=True)
    if "\n" not in text:  # whose lines stand between those of other columns
        assert "".join(for_terminal(f"<{text}>", lines=True).split()) in "".join(left.split())


def test_json_is_not_altered_and_stays_json(capsys):
    value = {NASTY: [HOSTILE, float("nan"), float("inf"), 0.5, None, True]}
    output.show_json(value)
    text = capsys.readouterr().out
    assert json.loads(text) == {NASTY: [HOSTILE, None, None, 0.5, None, True]} and text.isascii()
    assert "NaN" not in text


# The whole process.


def start(*words, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, "-m", "repedit", *map(str, words)], **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(saved(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.mark.parametrize("words", [("inspect", f"none{HOSTILE}"), ("inspect", f"--none{HOSTILE}"), (f"none{HOSTILE}",)])
def test_an_error_shows_what_was_given_and_obeys_none_of_it(words):
    words = [word.replace("\udc80", "") for word in words]
    done = start(*words)
    shown, said = done.communicate()
    assert done.returncode == 2 and shown == ""
    assert "\\x1b]52" in said and "[/][bold]" in said and said == for_terminal(said, lines=True)


# That a verb which opens a model ends in the same way, test_work_is_finished_though_nobody_reads_on shows.
@pytest.mark.parametrize("words", [pytest.param(("inspect", "M"), marks=pytest.mark.slow), ("unlearn", "--list-recipes", "--json")])  # fmt: skip
def test_a_reader_that_closes_standard_output_ends_it_quietly(model, words):
    reading, writing = os.pipe()
    os.close(reading)
    done = start(*(model if word == "M" else word for word in words), stdout=writing)
    os.close(writing)
    assert (done.communicate()[1], done.returncode) == ("", examples.CUT_OFF)


def test_work_is_finished_though_nobody_reads_on(model, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = start(
        "prune",
        model,
        "--fraction",
        "0.1",
        "--limit-tokens",
        "300",
        "--out",
        tmp_path / "edit.safetensors",
        stdout=writing,
    )
    os.close(writing)
    assert "Traceback" not in done.communicate()[1] and done.returncode == examples.CUT_OFF
    assert (tmp_path / "edit.safetensors").exists()


def test_standard_output_may_be_closed_altogether():
    done = start("unlearn", "--list-recipes", "--json", stdout=None, preexec_fn=lambda: os.close(1))
    assert (done.communicate()[1], done.returncode) == ("", 0)


def test_an_interrupt_is_one_line_and_its_own_code():
    code = (
        "import signal, sys, time, repedit.cli, repedit.models.subject\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "repedit.models.subject.load = lambda *a, **k: (print('ready', flush=True), time.sleep(60))\n"
        "sys.argv = ['repedit', 'inspect', 'x']\nrepedit.cli.main()"
    )
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.stdout.readline() == "ready\n"
    done.send_signal(signal.SIGINT)
    assert (done.communicate()[1], done.returncode) == ("Interrupted.\n", examples.INTERRUPTED)


def test_a_warning_and_a_log_show_what_was_given_and_obey_none_of_it():
    code = (
        "import logging, sys, warnings, repedit.cli, repedit.errors, repedit.models.subject\n"
        "def load(name, **options):\n"
        "    warnings.warn(name)\n"
        "    [logging.getLogger(of).warning('%s', name) for of in ('repedit', 'transformers')]\n"
        "    raise repedit.errors.NotFound(name)\n"
        "repedit.models.subject.load = load\nrepedit.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", HOSTILE.replace("\udc80", "")], capture_output=True)
    said = done.stderr.decode()
    assert said.count("\\x1b]52") == 4 and said == for_terminal(said, lines=True)


def test_every_help_that_lists_exit_codes_lists_those_of_every_verb():
    listed = [verb for verb in cli.verbs() if "Exit codes" in examples.epilog(verb)]
    assert set(listed) == set(examples.VERB_EXIT_CODES)
    for verb in listed:
        shown = " ".join(CliRunner().invoke(cli.app, [verb, "--help"]).stdout.split())
        assert "130 interrupted by Ctrl-C; 141" in shown


# JSON of every verb.


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """What verbs need: a model, an edit, an edited checkpoint, facts."""
    place = tmp_path_factory.mktemp("verbs")
    rows = [
        {"prompt": f"The code of town {n} is", "answer": f"k{n}", "entity": f"town {n}", "domain": "codes"}
        for n in range(24)
    ]
    (place / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "kept.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": row["prompt"].replace("code", "name")}) + "\n" for row in rows)
    )
    verb("prune", model, "--fraction", "0.1", "--limit-tokens", "300", "--out", place / "edit.safetensors")
    verb("apply", place / "edit.safetensors", model, "--no-verify", "--out", place / "edited")
    verb("score", model, "--limit-tokens", "300", "--out", place / "scores.safetensors")
    return place


def verb(*words):
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    assert done.exit_code in (0, 3, 4, 5), done.output + repr(done.exception)
    return done.stdout


AUDITED = "F/edited --original M --facts F/facts.jsonl --attacks direct --allow-small"
JSON_OF = {
    "inspect": ["M"], "doctor": ["M"], "diff": ["M F/edited"], "compare": ["M F/edited --text prose --prompt A --limit-tokens 200"],
    "collect": ["M --limit-tokens 300 --out T/c.safetensors"], "score": ["M --limit-tokens 300 --out T/s.safetensors"], "explore": ["F/scores.safetensors --out T/map.html"],
    "prune": ["M --fraction 0.1 --limit-tokens 300 --out T/e.safetensors", "M --fraction 0.1 --limit-tokens 300 --out T/e.safetensors --dry-run"],
    "project": ["M --forget F/facts.jsonl --retain F/kept.jsonl --rank 1 --steps 1 --sites 0.mlp.out --out T/e.safetensors",
                "M --forget F/facts.jsonl --retain F/kept.jsonl --rank 1 --sites 0.mlp.out --out T/e.safetensors --dry-run"],
    "unlearn": ["--list-recipes", "M --recipe ga --steps 1 --forget F/facts.jsonl --retain F/kept.jsonl --out T/d.safetensors"],
    "apply": ["F/edit.safetensors M --out T/a --no-verify", "F/edit.safetensors M --dry-run", "F/edit.safetensors M --dry-run --structure adapter --out T/b",
              "F/edit.safetensors M --structure adapter --out T/b"],
    "audit": [f"{AUDITED} --out T/audit", f"{AUDITED} --dry-run"], "report": ["T/audit"],
    "tasks": ["T/tasks --facts capitals"], "push": ["F/edited me/edited"],
}  # fmt: skip
"""Words after each verb that prints JSON, in every mode; M is a model, F a folder of files, T one to write to."""
SLOW = {"demo", "fetch", "vision demo"}
"""Verbs whose tests of their own read their JSON: they need the default model or train classifiers."""


def test_every_verb_that_prints_json_is_tried():
    offered = {name for name, command in cli.verbs().items() if any("--json" in p.opts for p in command.params)}
    assert offered - SLOW - {"chat"} == set(JSON_OF)  # chat prints a document a prompt


@pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")
@pytest.mark.parametrize("name", JSON_OF)
def test_json_is_the_whole_of_standard_output(name, model, files, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    if name == "report":
        verb("audit", *_words(f"{AUDITED} --out T/audit", model, files, tmp_path))
    for words in JSON_OF[name]:
        given = _words(words, model, files, tmp_path)
        for order in ([*given, "--json"], ["--json", *given]):
            json.loads(verb(name, *order), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
            if order[-1] == "--json" and "--list-recipes" not in given:
                break  # the place of an option matters to eager ones alone


def _words(text, model, files, place):
    parts = text.replace("F/", f"{files}/").replace("T/", f"{place}/").split()
    return [model if part == "M" else part for part in parts]


def test_no_verb_writes_to_standard_output_by_itself():
    for command in cli.verbs().values():
        source = inspect.getsource(inspect.getmodule(command.callback))
        assert "sys.stdout" not in source and " print(" not in source
