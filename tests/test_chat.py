"""Two models in one conversation: each remembers its own answers, and what is shown is what was written."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app, output
from repedit.cli import inspect as chatting
from repedit.cli.inspect import Conversation
from repedit.errors import ArgumentError
from repedit.metrics.generation import Writing, generate
from tests.saved_models import saved
from tests.test_metrics_generation import CHAT


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Two models of one family with different weights; the second has a chat template."""
    folder = tmp_path_factory.mktemp("models")
    first = saved(folder / "one")
    other = rp.load(first)
    with torch.no_grad():
        other.model.lm_head.weight.add_(torch.randn(260, 24, generator=torch.Generator().manual_seed(5)))
    other.tokenizer.chat_template = CHAT
    for part in (other.model, other.tokenizer):
        part.save_pretrained(folder / "two")
    return str(first), str(folder / "two")


def run(*words: str, lines: str = "") -> str:
    result = CliRunner().invoke(app, ["chat", *map(str, words)], input=lines)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


def written(model: str, prompt: str, chat: bool = False) -> str:
    return generate(rp.load(model), [prompt], max_new_tokens=9, chat=chat)[0]


def test_both_answers_to_a_prompt_are_printed(models):
    one, two = models
    found = run(two, "hello", "--original", one, "--max-new-tokens", "9")
    expected = f"> hello\noriginal: {written(one, 'hello').strip()}\nedited: {written(two, 'hello').strip()}\n"
    assert found.splitlines() == expected.splitlines() and written(one, "hello") != written(two, "hello")


def test_lines_of_a_pipe_are_asked_alone_and_answered_in_lines_of_json(models):
    one, two = models
    found = run(two, "--original", two, "--max-new-tokens", "9", "--json", lines="hello\n\nzz top\n").splitlines()
    assert [json.loads(line)["prompt"] for line in found] == ["hello", "zz top"]
    for line in map(json.loads, found):
        assert line["original"] == line["edited"] and line["edited"]["text"] == written(two, line["prompt"], chat=True)
    plain = json.loads(run(two, "hello", "--original", one, "--max-new-tokens", "9", "--json", "--plain"))
    assert (plain["original"]["text"], plain["edited"]["text"]) == (written(one, "hello"), written(two, "hello"))
    assert plain["edited"]["tokens"] == 9 and plain["edited"]["ended"] == "length"


def test_draws_are_repeated_by_a_seed(models):
    given = (models[1], "hello", "--original", models[0], "--max-new-tokens", "9", "--json", "--temperature", "3")
    assert run(*given) == run(*given) != run(*given, "--seed", "1")


def talk(models, plain: bool = False) -> Conversation:
    found = Conversation([rp.load(models[1]), rp.load(models[1])], plain, max_new_tokens=4, temperature=0.0, seed=0)
    found.reset()
    return found


def test_each_model_remembers_its_own_answers(models):
    here = talk(models)
    with torch.no_grad():
        here.subjects[0].model.lm_head.weight.copy_(rp.load(models[0]).model.lm_head.weight)
    first = here.ask("hi", chatting._last)
    second = here.ask("and?", chatting._last)
    assert first[0].text != first[1].text
    for number, subject in enumerate(here.subjects):
        said = f"<s>user: hi\n<s>assistant: {first[number].text}\n<s>user: and?\nassistant:"
        assert second[number].text == generate(subject, [said], max_new_tokens=4)[0]
    here.reset()
    assert [w.text for w in here.ask("hi", chatting._last)] == [w.text for w in first]


def terminal(monkeypatch, lines: list[str]) -> io.StringIO:
    """A terminal on which somebody types."""
    shown, typed = io.StringIO(), iter(lines)

    class Typed(output.Output):
        def input(self, *a, **k) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

    monkeypatch.setattr(output, "out", Typed(file=shown, force_terminal=True, width=70, height=20))
    return shown


def test_the_conversation_goes_on_until_it_is_ended(models, monkeypatch):
    here, asked = talk(models), []
    shown = terminal(monkeypatch, ["hi", "  ", "/help", "and?", "/reset", "hi", "/quit", "never"])
    plain = Conversation.ask
    monkeypatch.setattr(
        Conversation,
        "ask",
        lambda self, line, show: asked.append((line, len(self.turns[0]))) or plain(self, line, show),
    )
    chatting._converse(here)
    assert asked == [("hi", 0), ("and?", 2), ("hi", 0)]
    assert "both models begin anew" in shown.getvalue() and shown.getvalue().count(chatting.HELP) == 2


def test_a_prompt_that_is_too_long_does_not_end_the_conversation(models, monkeypatch, capsys):
    here = talk(models, plain=True)
    terminal(monkeypatch, ["a" * 300, "hi"])
    monkeypatch.setattr(output, "err", output.Output(stderr=True, width=200))
    chatting._converse(here)
    assert "no room for max_new_tokens=4; shorten either" in capsys.readouterr().err and len(here.turns[0]) == 2


def growing(*texts: str):
    for text in texts:
        yield Writing((1,), text, ""), Writing((1,), text[:6] + text[6:].upper(), "")


def test_texts_grow_in_columns_and_what_they_share_is_dim(monkeypatch):
    shown = terminal(monkeypatch, [])
    last = output.show_side_by_side(("original", "edited"), growing("It is ", "It is paris", "It is paris, France."))
    assert last[1].text == "It is PARIS, FRANCE."
    assert shown.getvalue().rstrip().splitlines()[-1].count("\x1b[2mIt is ") == 2
    assert "original" in shown.getvalue() and "\x1b[2K" in shown.getvalue(), "lines were drawn again"


def test_a_long_text_shows_its_end_while_it_grows(monkeypatch):
    terminal(monkeypatch, [])
    text = "\n".join(f"line {i}" for i in range(40))
    cells = [next(iter(column.cells)).plain for column in output.side_by_side(("a", "b"), [text, text], 5).columns]
    assert cells == ["\n".join(f"line {i}" for i in range(35, 40))] * 2
    assert next(iter(output.side_by_side(("a",), [text]).columns[0].cells)).plain == text


def test_an_interrupted_answer_is_kept(monkeypatch):
    def interrupted():
        yield from growing("It is ")
        raise KeyboardInterrupt

    shown = terminal(monkeypatch, [])
    assert output.show_side_by_side(("original", "edited"), interrupted())[0].text == "It is "
    assert "It is" in shown.getvalue()


def test_an_answer_interrupted_before_it_began_is_forgotten(models, monkeypatch):
    here = talk(models)
    shown = terminal(monkeypatch, ["hi"])

    def nothing(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr("repedit.metrics.generation._step", nothing)
    chatting._converse(here)
    assert here.turns == [[], []] and "the prompt is forgotten" in shown.getvalue()


def test_compare_streams_its_prompts_on_a_terminal(models, monkeypatch):
    given = ["compare", *models, "--text", "prose", "--prompt", "A river", "--limit-tokens", "400"]
    said = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)["generations"][0]
    shown = terminal(monkeypatch, [])
    names = []
    plain = output.show_side_by_side
    monkeypatch.setattr(output, "show_side_by_side", lambda *a: names.append((a[0], plain(*a))))
    assert CliRunner().invoke(app, given).exit_code == 0
    ((titles, last),) = names
    assert titles == models and [w.text for w in last] == [said["base"], said["edited"]]
    assert "> A river" in shown.getvalue()


def test_what_cannot_be_asked_is_refused(models):
    with pytest.raises(ArgumentError, match="temperature=-1"):
        CliRunner().invoke(
            app, ["chat", models[1], "a", "--original", models[0], "--temperature", "-1"], catch_exceptions=False
        )
    assert CliRunner().invoke(app, ["chat", models[1], "a"]).exit_code == 2, "--original is needed"


@pytest.mark.slow
def test_a_real_terminal_is_talked_to(models):
    main, side = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "repedit",
        "chat",
        models[1],
        "--original",
        models[0],
        "--max-new-tokens",
        "5",
        "--plain",
    ]
    process = subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    )
    os.close(side)
    os.write(main, b"hello\n/quit\n")
    try:
        shown = until_closed(main, 300.0)
    finally:
        process.kill()  # which an ended process does not feel
    assert process.wait() == 0, shown
    assert chatting.HELP[:20] in shown and "original" in shown and "edited" in shown and "Traceback" not in shown


def until_closed(main: int, seconds: float) -> str:
    """What a terminal shows until the other side is closed; for so long at most."""
    shown, end = b"", time.monotonic() + seconds
    while select.select([main], [], [], max(0.0, end - time.monotonic()))[0]:
        try:
            part = os.read(main, 4096)
        except OSError:  # Linux says so when it is closed
            break
        if not part:
            break
        shown += part
    return shown.decode()
