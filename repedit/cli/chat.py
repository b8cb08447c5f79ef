"""The verb that talks to two models at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from repedit.cli.options import Device, Dtype, Seed, opened

COLUMNS = ("original", "edited")
Writings = Iterator[tuple[Any, ...]]
"""What `repedit.metrics.generation.side_by_side` gives."""
HELP = "/reset begins anew, /quit ends; Ctrl-C stops an answer"


def chat(
    edited: Annotated[str, typer.Argument(help="The edited checkpoint: directory, GGUF file or hub id.")],
    original: Annotated[str, typer.Option(help="The model that was edited.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One prompt; without it, lines of standard input, or you are asked for them.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue each prompt as text, alone; no chat template.")
    ] = False,
    tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, tokens are drawn.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON a prompt.")] = False,
) -> None:
    """Ask the original and the edited model the same, and see both answers as they are written, side by side.

    Each model sees its own answers as the conversation goes on; /reset begins anew, /quit ends it, and Ctrl-C an answer.
    Prompts from an argument or a pipe are asked alone.
    """
    from repedit.cli import output

    subjects = [opened(name, device, dtype) for name in (original, edited)]
    if not plain and not all(subject.need_tokenizer().chat_template for subject in subjects):
        output.err.print("no chat template with these models: prompts are continued as plain text")
        plain = True
    talk = Talk(subjects, plain, {"max_new_tokens": tokens, "temperature": temperature}, seed)
    if prompt is None and sys.stdin.isatty() and not json:
        _converse(talk)
        return
    for number, line in enumerate([prompt] if prompt is not None else _lines()):
        talk.reset()
        if json:
            _json_line(line, talk.ask(line, _last))
            continue
        output.out.print(f"{'' if not number else chr(10)}> {line}", soft_wrap=True)
        talk.ask(line, _beside)


@dataclass
class Talk:
    """A conversation with several models; each remembers what it said itself."""

    subjects: list[Any]
    plain: bool
    options: dict[str, Any]
    seed: int
    turns: list[list[dict[str, str]]] = field(default_factory=list)
    asked: int = 0

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = [[] for _ in self.subjects]

    def ask(self, line: str, show: Callable[[Writings], Sequence[Any]]) -> Sequence[Any]:
        """Let every model answer, show the answers as they come, and keep them."""
        from repedit.metrics.generation import side_by_side

        turns = [[*own, {"role": "user", "content": line}] for own in self.turns]
        prompts = [line] * len(turns) if self.plain else turns
        # Another prompt draws other numbers; the same list of prompts draws the same.
        answers = show(side_by_side(self.subjects, prompts, seed=self.seed + self.asked, **self.options))
        self.asked += 1
        self.turns = [
            [*own, {"role": "assistant", "content": answer.text}] for own, answer in zip(turns, answers, strict=True)
        ]
        return answers


def _converse(talk: Talk) -> None:
    """Ask for prompts until there are no more."""
    from repedit.cli import output
    from repedit.errors import RepeditError

    output.out.print(HELP, style="dim")
    talk.reset()
    while True:
        try:
            line = output.out.input("> ", markup=False).strip()
        except (EOFError, KeyboardInterrupt):
            line = "/quit"
        if line == "/quit":
            return
        if line == "/reset":
            talk.reset()
            output.out.print("both models begin anew", style="dim")
        elif line.startswith("/"):
            output.out.print(HELP, style="dim")
        elif line:
            try:
                talk.ask(line, _beside)
            except KeyboardInterrupt:
                output.out.print("nothing was written yet; the prompt is forgotten", style="dim")
            except RepeditError as error:
                output.err.print(f"{type(error).__name__}: {error}")


def _lines() -> list[str]:
    """The prompts of standard input."""
    return [line.strip() for line in sys.stdin if line.strip()]


def _beside(writings: Writings) -> Sequence[Any]:
    from repedit.cli import output

    return output.show_beside(COLUMNS, writings)


def _last(writings: Writings) -> Sequence[Any]:
    *_, last = writings
    return last


def _json_line(prompt: str, writings: Sequence[Any]) -> None:
    """One line of JSON a prompt."""
    from repedit.cli import output

    answers = {
        name: {"text": writing.text, "tokens": len(writing.tokens), "ended": writing.ended}
        for name, writing in zip(COLUMNS, writings, strict=True)
    }
    output.show_json({"prompt": prompt, **answers}, indent=None)
