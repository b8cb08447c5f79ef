"""The verb that talks to two models at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from repedit.cli.options import Device, Dtype, Seed, load_model

if TYPE_CHECKING:
    from repedit.metrics.generation import Writing
    from repedit.models.subject import Subject

    Writings = Iterator[tuple[Writing, ...]]

COLUMNS = ("original", "edited")
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
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, tokens are drawn.")] = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each prompt.")] = False,
) -> None:
    """Ask the original and the edited model the same, and see both answers side by side as they are written.

    Each model sees its own answers as the conversation goes on; /reset begins anew, /quit ends it, and Ctrl-C an
    answer. Each prompt from an argument or a pipe begins a new conversation.
    """
    from repedit.cli import output

    subjects = [load_model(name, device, dtype) for name in (original, edited)]
    if not plain and not all(subject.need_tokenizer().chat_template for subject in subjects):
        output.err.print("no chat template with these models: prompts are continued as plain text")
        plain = True
    conversation = Conversation(subjects, plain, max_new_tokens, temperature, seed)
    if prompt is None and sys.stdin.isatty() and not json:
        _converse(conversation)
        return
    lines = [prompt] if prompt is not None else [line.strip() for line in sys.stdin if line.strip()]
    for number, line in enumerate(lines):
        conversation.reset()
        if json:
            _show_json_line(line, conversation.ask(line, _last))
            continue
        output.out.print(f"{'' if not number else chr(10)}> {line}", soft_wrap=True)
        conversation.ask(line, _show)


@dataclass
class Conversation:
    """A conversation with several models; each of them remembers its own answers."""

    subjects: list[Subject]
    plain: bool
    """Continue each prompt as text, without a chat template."""
    max_new_tokens: int
    temperature: float
    seed: int
    turns: list[list[dict[str, str]]] = field(default_factory=list)
    """For each model, the messages so far."""
    prompts: int = 0
    """Number of prompts so far."""

    def reset(self) -> None:
        """Forget all messages."""
        self.turns = [[] for _ in self.subjects]

    def ask(self, prompt: str, show: Callable[[Writings], Sequence[Writing]]) -> Sequence[Writing]:
        """Let every model answer, show the answers as they grow, and remember them."""
        from repedit.metrics.generation import side_by_side

        turns = [[*messages, {"role": "user", "content": prompt}] for messages in self.turns]
        answers = show(side_by_side(
            self.subjects, [prompt] * len(turns) if self.plain else turns, max_new_tokens=self.max_new_tokens,
            # The same list of prompts draws the same numbers, another prompt draws others.
            temperature=self.temperature, seed=self.seed + self.prompts,
        ))  # fmt: skip
        self.prompts += 1
        self.turns = [
            [*messages, {"role": "assistant", "content": answer.text}]
            for messages, answer in zip(turns, answers, strict=True)
        ]
        return answers


def _converse(conversation: Conversation) -> None:
    """Ask for prompts until there are no more."""
    from repedit.cli import output
    from repedit.errors import RepeditError

    output.out.print(HELP, style="dim")
    conversation.reset()
    while True:
        try:
            line = output.out.input("> ", markup=False).strip()
        except (EOFError, KeyboardInterrupt):
            line = "/quit"
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            output.out.print("both models begin anew", style="dim")
        elif line.startswith("/"):
            output.out.print(HELP, style="dim")
        elif line:
            try:
                conversation.ask(line, _show)
            except KeyboardInterrupt:
                output.out.print("nothing was written yet; the prompt is forgotten", style="dim")
            except RepeditError as error:
                output.err.print(f"{type(error).__name__}: {error}")


def _show(writings: Writings) -> Sequence[Writing]:
    from repedit.cli import output

    return output.show_side_by_side(COLUMNS, writings)


def _last(writings: Writings) -> Sequence[Writing]:
    *_, last = writings
    return last


def _show_json_line(prompt: str, writings: Sequence[Writing]) -> None:
    """Show the answers to a prompt as one line of JSON."""
    from repedit.cli import output

    answers = {
        name: {"text": writing.text, "tokens": len(writing.tokens), "ended": writing.ended}
        for name, writing in zip(COLUMNS, writings, strict=True)
    }
    output.show_json({"prompt": prompt, **answers}, indent=None)
