"""Verbs that change nothing: doctor, inspect, diff, compare, and chat with two models at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repedit.cli.application import (
    BatchSize,
    Dequantize,
    Device,
    Dtype,
    EditedModel,
    Json,
    LimitTokens,
    Model,
    PageOut,
    Seed,
    load_model,
)
from repedit.cli.apply import check_page
from repedit.sites import Point, Site

if TYPE_CHECKING:
    from repedit.metrics.generation import Writing
    from repedit.models.subject import Subject

    Writings = Iterator[tuple[Writing, ...]]


CHECK_FAILED = 3
"""The exit code of `repedit doctor` if a check of the installation fails."""


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory, GGUF file, 'smollm2-135m' or hub id; without one, the installation is checked."
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    json: Json = False,
) -> None:
    """Prove on a real forward pass that repedit edits this model where it says it does; or check the installation.

    For a model without a row in the family table, show the row that was inferred from it, as code. Without a model, show
    versions, cache, device and kernels, which a report of a fault should contain.
    """
    if model is None:
        _check_installation(json)
    else:
        _check_model(load_model(model, device, dtype, dequantize), json)


def _check_installation(json: bool) -> None:
    """Show what was tried, and what to paste into an issue; exit code 3 if a check failed."""
    from repedit.cli import output
    from repedit.installation import check_installation

    installation = check_installation()
    if json:
        checks = {c.name: {"passed": c.passed, "detail": c.detail} for c in installation.checks}
        output.show_json({"passed": installation.passed, "checks": checks, "versions": installation.versions})
    else:
        rows = [[check.name, "ok" if check.passed else "FAILED", check.detail] for check in installation.checks]
        output.table("The installation", ("check", "", "what was found"), rows)
        output.out.print(", ".join(f"{name} {version}" for name, version in installation.versions.items()))
        output.out.print(
            "Paste all of this into a report of a fault; repedit doctor MODEL proves the edits of a model in the same way."
        )
    if not installation.passed:
        raise typer.Exit(CHECK_FAILED)


def _check_model(subject: Subject, json: bool) -> None:
    """Show the proof of every tap of a model."""
    from repedit.arch.infer import check_architecture, inferred_row
    from repedit.arch.spec import row_code
    from repedit.cli import output
    from repedit.installation import system_versions
    from repedit.kernels.dispatch import choose

    report, inferred = check_architecture(subject.model), inferred_row(subject.model)
    code = None if inferred is None else row_code(inferred)
    largest = max((proof.error for proof in report.proofs), default=0.0)
    rows = [[str(p.site), p.moved, p.error, p.note.strip("; ")] for p in report.proofs]
    widths = sorted({row["width"] for row in subject.sites()})
    kernels = {width: choose(subject.device, subject.model.dtype, (width, 16)) for width in widths}
    if json:
        output.show_json({
            "model_type": report.model_type, "passed": report.passed, "proofs": rows, "largest_error": largest,
            "inferred_row": code, "kernels": kernels, "versions": system_versions(),
        })  # fmt: skip
        return
    output.table(
        f"{report.model_type}: every tap edited by hook and in the weights (shares of the spread of what the layer adds)",
        ("site", "moved", "hook against weights", "note"),
        rows,
    )
    output.out.print(
        f"{len(rows)} taps passed, largest error {largest:.1e}; dtype {subject.model.dtype}, device {subject.device}, "
        f"quantiser {subject.quantizer}"
    )
    if code is not None:
        output.out.print(
            f"no row of the family table; inferred from the model and proved on it:\n{code}",
            markup=False,
            highlight=False,
        )
    for width, (name, reason) in kernels.items():
        output.out.print(f"projection of rank 16 at width {width}: {name} ({reason})")
    output.out.print(", ".join(f"{name} {version}" for name, version in system_versions().items()))


def inspect(
    model: Model,
    sites: Annotated[
        str,
        typer.Option(
            help="Which sites to list; by default each point that weights can edit, in the first layer that has it."
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Show where this model can be edited: sites, module paths, tensors, widths and exactness."""
    from repedit.cli import output
    from repedit.edit import exactness

    subject = load_model(model)
    selected = {str(site): site for site in (subject.select(sites) if sites else _first_sites(subject))}
    rows = [
        row | {"exactness": exactness(selected[row["site"]], subject.layout)}
        for row in subject.sites()
        if row["site"] in selected
    ]
    architecture, layout = subject.architecture, subject.layout
    if json:
        fingerprint = subject.fingerprint()
        output.show_json({"model_type": architecture.model_type, "fingerprint": fingerprint, "sites": rows})
        return
    columns = ("site", "hook", "tensor", "width", "experts", "exactness")
    output.table(
        f"{architecture.model_type}: {len(layout.layers)} layers of width {layout.width}, {architecture.n_heads} heads, "
        f"tied {architecture.tied}", columns, [[row[c] for c in columns] for row in rows],
    )  # fmt: skip


def _first_sites(subject: Subject) -> list[Site]:
    """The first site of each point that weights can edit: neurons and outputs of every kind of branch, and 0.resid.pre."""
    first: dict[Point, Site] = {Point.RESID_PRE: Site(0, Point.RESID_PRE)}
    for layer, branches in enumerate(subject.layout.layers):
        for point in (p for branch in branches for p in (branch.inner, branch.outer)):
            first.setdefault(point, Site(layer, point))
    return list(first.values())


def diff(
    base: Annotated[str, typer.Argument(help="Directory, or 'smollm2-135m'.")],
    edited: EditedModel,
    out: PageOut = None,
    json: Json = False,
) -> None:
    """List every tensor that differs between two checkpoints."""
    from dataclasses import asdict

    from repedit.cli import output
    from repedit.rewrite.verification import diff as tensor_differences

    check_page(out)
    differing = tensor_differences(base, edited)
    if out is not None:
        from repedit.io.files import write_text
        from repedit.report import difference_page

        write_text(out, difference_page(differing, (base, edited)))
    differences = [asdict(difference) for difference in differing]
    if json:
        output.show_json(differences)
        return
    columns = ("tensor", "norm", "relative", "rank", "rows", "columns")
    rows = [["" if row[column] is None else row[column] for column in columns] for row in differences]
    output.table(f"{len(differences)} tensors differ", columns, rows)
    output.show_files([out] if out is not None else [])


def compare(
    base: Model,
    edited: EditedModel,
    text: Annotated[list[str] | None, typer.Option(help="A corpus to measure; repeat for several.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt to continue; repeat for several.")] = None,
    metrics: Annotated[
        str,
        typer.Option(help="Benchmarks instead: tofu, semeval, muse, membership; several with commas. Needs --data."),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Folder with the data of --metrics, or with the folders tofu, semeval, muse and mmlu."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each part of --metrics; all by default.")] = None,
    limit_tokens: LimitTokens = 4000,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: PageOut = None,
    json: Json = False,
) -> None:
    """Show perplexity, top-1 accuracy and generations of two checkpoints side by side; or run published benchmarks."""
    from repedit import data
    from repedit.cli import output
    from repedit.demo import PRUNING_PROMPTS
    from repedit.errors import ArgumentError
    from repedit.metrics.benchmarks import check_suites
    from repedit.metrics.benchmarks import compare as compare_models

    if bool(metrics) != (folder is not None):
        raise ArgumentError(f"--metrics {metrics!r} with --data {folder}; give both, or neither")
    check_page(out)
    if folder is not None:
        check_suites(metrics.split(","), folder)
    corpora = [data.read(name) for name in text or ["code", "prose"]] if folder is None else []
    subjects = [load_model(name, device, dtype) for name in (base, edited)]
    if folder is not None:
        _show_benchmarks(subjects, metrics.split(","), folder, limit, json)
        return
    prompts = tuple(prompt or PRUNING_PROMPTS)
    streamed = output.out.is_terminal and not json and out is None  # the same texts, shown as they are written
    comparison = compare_models(
        subjects[0], subjects[1], corpora, prompts=() if streamed else prompts, limit_tokens=limit_tokens, batch_size=batch_size
    )  # fmt: skip
    if out is not None:
        from repedit.io.files import write_text
        from repedit.report import comparison_page

        write_text(out, comparison_page(comparison, (base, edited)))
    if json:
        output.show_json(output.comparison_json(comparison))
        return
    output.show_comparison(f"{base} against {edited}", comparison)
    if streamed:
        _stream(subjects, (base, edited), prompts)
    else:
        output.show_generations(comparison.prompts, comparison.base_text, comparison.edited_text)
    output.show_files([out] if out is not None else [])


def _stream(subjects: Sequence[Subject], names: Sequence[str], prompts: Sequence[str]) -> None:
    """Show what both models write after each prompt, side by side as it is written."""
    from repedit.cli import output
    from repedit.metrics.generation import side_by_side

    for prompt in prompts:
        output.out.print(f"> {prompt}")
        output.show_side_by_side(names, side_by_side(subjects, [prompt, prompt], max_new_tokens=40))


def _show_benchmarks(
    subjects: Sequence[Subject], names: Sequence[str], folder: Path, limit: int | None, json: bool
) -> None:
    """Show every part of each benchmark before and after, with the verdict."""
    from repedit.cli import output
    from repedit.metrics.benchmarks import compare_benchmarks

    results = compare_benchmarks(subjects[0], subjects[1], names, folder, limit=limit)
    if json:
        output.show_json({name: {"values": dict(b.values), "verdict": b.verdict} for name, b in results.items()})
        return
    for name, benchmark in results.items():
        rows = [[part, f"{before:.3f}", f"{after:.3f}"] for part, (before, after) in benchmark.values.items()]
        output.table(name, ("part", "base", "edited"), rows)
        output.out.print(benchmark.verdict)


# --- chat: two models at once


COLUMNS = ("original", "edited")
HELP = "/reset begins anew, /quit ends; Ctrl-C stops an answer"


def chat(
    edited: Annotated[str, typer.Argument(help="The edited checkpoint: directory, GGUF file or hub id.")],
    original: Annotated[str, typer.Option(help="The model that was edited.")],
    prompt: Annotated[
        str | None, typer.Argument(help="One prompt; without it, lines of standard input, or you are asked for them.")
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain", help="Continue each prompt as plain text: no chat template, and no memory of earlier prompts."
        ),
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
