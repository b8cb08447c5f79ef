"""The typer application: its verbs, and what the help of a verb ends with: one working example and the exit codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from typer._click.core import Context, Parameter

    from repedit.models.subject import Subject


OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "edit": ("prune", "project", "unlearn"),
    "erase": ("project",),
    "eval": ("compare",),
    "evaluate": ("compare",),
    "export": ("apply",),
    "forget": ("project", "unlearn"),
    "generate": ("chat",),
    "info": ("inspect",),
    "mrp": ("project",),
    "save": ("apply",),
    "show": ("report",),
    "train": ("unlearn",),
    "upload": ("push",),
}
"""What the package or other tools call an action -> the verbs that do it."""


class Verbs(TyperGroup):
    """The verbs; a name that other tools use is answered with the verb that does the same."""

    def resolve_command(self, ctx: Context, args: list[str]) -> Any:
        """The verb that a command line names.

        Raises:
            UsageError: if there is no such verb.
        """
        if args[0] in OTHER_NAMES and args[0] not in self.commands:
            names = " or ".join(f"'repedit {verb}'" for verb in OTHER_NAMES[args[0]])
            ctx.fail(f"No such command {args[0]!r}; use {names}.")
        return super().resolve_command(ctx, args)


app = typer.Typer(name="repedit", cls=Verbs, no_args_is_help=True, pretty_exceptions_enable=False)


def _show_version(asked: bool) -> bool:
    if asked:
        from repedit import __version__

        typer.echo(f"repedit {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find what a language model uses for a capability, remove it from the weights, and test what can be recovered."""


def verbs() -> dict[str, Any]:
    """The click command of every verb, in the order of --help; a verb of a group has both names: "vision demo"."""
    commands: dict[str, Any] = {}
    for name, command in getattr(typer.main.get_command(app), "commands", {}).items():
        group = getattr(command, "commands", None)
        commands |= {name: command} if group is None else {f"{name} {part}": verb for part, verb in group.items()}
    return commands


# --- Examples and exit codes, also for the pages of the documentation


EXAMPLES: Mapping[str, str] = {
    "demo": "repedit demo --act code --out edited/",
    "fetch": "repedit fetch smollm2-135m",
    "doctor": "repedit doctor smollm2-135m",
    "inspect": "repedit inspect smollm2-135m --sites '0-3.mlp.neurons'",
    "collect": "repedit collect smollm2-135m --text code --limit-tokens 8000 --out code.safetensors",
    "score": "repedit score smollm2-135m --forget code --retain prose --out scores.safetensors",
    "explore": "repedit explore scores.safetensors --out map.html",
    "prune": "repedit prune smollm2-135m --fraction 0.01 --forget code --retain prose --out edited/",
    "project": "repedit project smollm2-135m --forget capitals --rank 8 --out edited/",
    "unlearn": "repedit unlearn smollm2-135m --recipe small:npo_klr --forget capitals --out delta.safetensors",
    "apply": "repedit apply edit.safetensors smollm2-135m --out edited/",
    "diff": "repedit diff smollm2-135m edited/",
    "compare": "repedit compare smollm2-135m edited/ --text prose --prompt 'The capital of France is'",
    "chat": "repedit chat edited/ --original smollm2-135m",
    "audit": "repedit audit edited/ --original smollm2-135m --facts capitals --out audit/",
    "report": "repedit report audit/",
    "tasks": "repedit tasks harness/ --facts capitals,symbols",
    "run": "repedit run mine.toml",
    "reproduce": "repedit reproduce mine.toml",
    "push": "repedit push edited/ me/smollm2-edited",
    "vision demo": "repedit vision demo --forget class:3 --recipe relabel --out forgotten/",
}


INTERRUPTED, CUT_OFF = 130, 141
"""Exit codes that a shell gives to processes that SIGINT and SIGPIPE end."""
COMMON_EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "an unexpected exception",
    2: "bad input, with one message that says what to do",
    INTERRUPTED: "interrupted by Ctrl-C",
    CUT_OFF: "done, but the reader of standard output had closed it, as `head` does",
}
"""Exit codes of every verb."""
VERB_EXIT_CODES: Mapping[str, Mapping[int, str]] = {
    "doctor": {3: "a check of the installation failed"},
    "prune": {3: "the limit on what is retained was exceeded at once; nothing is written"},
    "unlearn": {3: "the model collapsed", 4: "a loss was not finite"},
    "audit": {
        0: "no recovery found", 3: "hidden, or not forgotten", 4: "inconclusive, or nothing found yet", 5: "invalid, or destroyed",
        6: "unsound: a control fails on this machine",
    },
    "run": {3: "or another: the code of the step that failed, or else of the last audit"},
    "reproduce": {1: "an output differs"},
    "push": {0: "uploaded", 3: "nothing was uploaded, since --yes was not given"},
}  # fmt: skip
"""Verb -> exit codes that it has in addition, or with another meaning."""


def exit_codes(verb: str) -> dict[int, str]:
    """The exit codes of a verb, in ascending order."""
    return dict(sorted({**COMMON_EXIT_CODES, **VERB_EXIT_CODES.get(verb, {})}.items()))


def epilog(verb: str) -> str:
    """The end of the help of a verb: its example and, if it has exit codes of its own, all exit codes."""
    lines = [f"Example: {EXAMPLES[verb]}"] if verb in EXAMPLES else []
    if verb in VERB_EXIT_CODES:
        lines.append("Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in exit_codes(verb).items()))
    return "\n\n".join(lines)


# --- A verb refuses options that would have no effect


Values = Mapping[str, Any]
INEFFECTIVE: Mapping[str, tuple[tuple[str, Callable[[Values], bool], tuple[str, ...]], ...]] = {
    "collect": (("--statistic moments", lambda o: o["statistic"] == "moments", ("gradients",)),),
    "score": (
        ("two saved collections", lambda o: _saved(o["forget"], o["retain"]), ("sites", "limit_tokens", "batch_size")),
    ),
    "explore": (("no --model", lambda o: o["model"] is None, ("text", "limit_tokens")),),
    "prune": (
        ("--learned", lambda o: o["learned"], ("fraction", "scores", "importance", "combine", "steps", "cap_per_layer")),
        ("--scores", lambda o: o["scores"] is not None, ("sites", "importance", "combine", "steps")),
        ("--structure keep", lambda o: o["structure"] == "keep", ("layout", "multiple")),
    ),
    "project": (
        ("a --method that fits at once", lambda o: o["method"] != "mrp", ("steps", "resume", "batch_size")),
        ("--method overwrite or merge", lambda o: o["method"] in ("overwrite", "merge"), ("sites", "rank", "previous", "dry_run")),
        ("a --method other than overwrite", lambda o: o["method"] != "overwrite",
         ("layers", "target", "regression", "lam", "retain_budget", "keep_rank", "contexts")),
        ("a --method other than merge", lambda o: o["method"] != "merge", ("answers", "rare")),
        ("a --method other than overwrite and merge", lambda o: o["method"] not in ("overwrite", "merge"), ("text",)),
        ("a --target other than selective", lambda o: o["target"] != "selective", ("keep_rank",)),
    ),
    "apply": (("--structure keep", lambda o: o["structure"] == "keep", ("layout", "multiple")),),
    "audit": (
        ("--selftest", lambda o: o["selftest"], ("edited", "original", "facts", "retain", "reference", "attributes", "attacks", "out", "hide_items", "until")),
        ("an audit without --selftest", lambda o: not o["selftest"], ("seed", "workers")),
        ("--dry-run", lambda o: o["dry_run"], ("hide_items", "until")),
    ),
    "compare": (
        ("--metrics", lambda o: bool(o["metrics"]), ("text", "prompt", "limit_tokens", "batch_size", "out")),
        ("no --metrics", lambda o: not o["metrics"], ("limit",)),
    ),
    "doctor": (("no MODEL", lambda o: o["model"] is None, ("device", "dtype", "dequantize")),),
    "demo": (
        ("--act code", lambda o: o["act"] == "code", ("steps",)),
        ("--act capitals", lambda o: o["act"] == "capitals", ("limit_tokens",)),
    ),
}  # fmt: skip
"""Verb -> (a condition in words, whether the values of the options meet it, options that have no effect then).

In all other cases: an option of the command line overrides --set, --set overrides the settings of `small`, and these
override the defaults of a recipe; --steps overrides a number of epochs; steps and epochs in two --set are refused.
"""


# --- A verb refuses numbers out of range, and names that do not exist, before it reads a model


WHOLE: Mapping[str, int] = {
    "at_most": 2, "batch_size": 1, "control": 0, "keep_rank": 1, "limit": 1, "limit_tokens": 1, "max_new_tokens": 1,
    "micro_batch": 1, "multiple": 1, "rank": 1, "rare": 0, "references": 1, "seed": 0, "steps": 1, "workers": 1,
}  # fmt: skip
"""Option -> the least whole number that it can be; the same in every verb."""
POSITIVE = ("lam", "retain_budget")
FINITE = ("max_retain_drop", "temperature")
NOT_NEGATIVE = ("temperature",)
FRACTIONS = ("cap_per_layer", "fraction")
"""Options with a finite number, those of them that cannot be below 0, and shares."""
REGISTERED: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "combine": ("combinations", ()), "contexts": ("contexts", ()), "importance": ("importances", ()), "method": ("fits", ("mrp", "overwrite", "merge")),
    "metrics": ("metrics", ()),
}  # fmt: skip
"""Option with names, joined by commas -> the registry of `repedit.cli.completion` that holds them, and other names."""


def _check_names(name: str, option: str, value: str) -> None:
    """Refuse names that do not exist.

    Raises:
        UnknownName: with the option and the nearest names.
    """
    from repedit.cli.completion import names
    from repedit.errors import check_choice

    registry, others = REGISTERED[name]
    for part in value.split(","):
        check_choice((*others, *names(registry)), **{option: part})


def _check_number(name: str, option: str, value: object) -> None:
    """Refuse a number that an option cannot be.

    Raises:
        ArgumentError: with the option, the number and what can be given.
    """
    from repedit.errors import (
        ArgumentError,
        FractionError,
        check_finite_numbers,
        check_positive,
        check_whole,
        is_finite,
    )

    if name in WHOLE:
        check_whole(WHOLE[name], **{option: value})
    elif name == "folds" and value not in (1, 2):
        raise ArgumentError(f"{option}={value}; give 2 to test every fact once, or 1")
    elif name in POSITIVE:
        check_positive(**{option: value})
    elif name in FINITE:
        check_finite_numbers(**{option: value})
        if name in NOT_NEGATIVE and value < 0:  # type: ignore[operator]
            raise ArgumentError(f"{option}={value}; give a number of at least 0")
    elif name in FRACTIONS and not (is_finite(value) and 0 <= value <= 1):  # type: ignore[operator]
        raise FractionError(f"{option}={value}: a fraction lies in [0, 1]")


class Verb(TyperCommand):
    """A command whose options all have an effect and can be meant, or are refused."""

    def invoke(self, ctx: Context) -> Any:
        """Call the verb; raises what `check` raises."""
        self.check(ctx)
        return super().invoke(ctx)

    def check(self, ctx: Context) -> None:
        """Refuse options that cannot be meant, whatever the model and the files are.

        Raises:
            ArgumentError: if an option is empty or a number out of range, or has no effect beside another one.
        """
        from repedit.errors import ArgumentError

        origins = {p.name: getattr(ctx.get_parameter_source(p.name), "name", "") for p in self.params}
        passed = {p.name: p for p in self.params if origins[p.name] == "COMMANDLINE"}
        for name, parameter in passed.items():
            values = ctx.params[name] if isinstance(ctx.params[name], list | tuple) else [ctx.params[name]]
            if any(isinstance(value, str) and not value.strip() for value in values):
                raise ArgumentError(f"{_option_name(parameter)} is empty; leave it out, or give it a value")
            _check_number(name, _option_name(parameter), ctx.params[name])
            if name in REGISTERED:
                _check_names(name, _option_name(parameter), ctx.params[name])
        for condition, applies, names in INEFFECTIVE.get(str(self.name), ()):
            for name in names:
                if name in passed and applies(ctx.params):
                    raise ArgumentError(
                        f"{_option_name(passed[name])} has no effect with {condition}; leave one of them out"
                    )


def _option_name(parameter: Parameter) -> str:
    return parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()


def _saved(*names: str) -> bool:
    return all(name.endswith(".safetensors") for name in names)


# --- The options and arguments that several verbs share, and the model that they name


Model = Annotated[str, typer.Argument(help="Directory, GGUF file, 'smollm2-135m' or hub id.")]
EditedModel = Annotated[str, typer.Argument(help="The other checkpoint.")]
JSON_HELP = "Print one JSON document instead of tables."
Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[
    Literal["auto", "float64", "float32", "bfloat16", "float16"],
    typer.Option(help="Data type of the weights; auto keeps that of the checkpoint."),
]
Dequantize = Annotated[
    bool,
    typer.Option("--dequantize", help="Turn quantised weights (fp8, MXFP4, ...) into ordinary ones, to edit them."),
]
BatchSize = Annotated[int, typer.Option(help="Chunks of text in one forward pass.")]
LimitTokens = Annotated[
    int, typer.Option(help="Tokens of each text that are read, without padding and first positions.")
]
Text = Annotated[str, typer.Option(help="'code', 'prose', or a .txt, .jsonl or .parquet file.")]
TextOrCollection = Annotated[
    str, typer.Option(help="'code', 'prose', a .txt, .jsonl or .parquet file, or a file of `repedit collect`.")
]
Sites = Annotated[str, typer.Option(help="Where the neurons are: '*.mlp.neurons', '4-9.attn.neurons', ...")]
Importance = Annotated[str, typer.Option(help="How active a neuron is: abs (mean |z|), rms, std, gxa, fisher, ...")]
Combine = Annotated[
    str,
    typer.Option(help="How the importances on both sets are compared: difference, ratio, logratio, rank or setdiff."),
]
Structure = Annotated[
    Literal["keep", "slim", "slice"],
    typer.Option(
        help="keep: the original shapes; slim: pruned neurons are cut out of the tensors; slice: the erased residual stream becomes narrower."
    ),
]
Layout = Annotated[
    Literal["uniform", "ragged"],
    typer.Option(
        help="Of slim. uniform: one width for all layers; ragged: a width for each layer, which only repedit.load reads."
    ),
]
Multiple = Annotated[
    int | None,
    typer.Option(help="Of slim and slice: new widths are multiples of this; by default 8 for slim and 1 for slice."),
]
EditOut = Annotated[Path, typer.Option(help="x.safetensors writes the edit, a directory the edited checkpoint.")]
Budget = Annotated[
    Literal["quick", "fast", "standard", "full"],
    typer.Option(help="How many attacks, settings and seeds are tried; quick never passes."),
]
PageOut = Annotated[Path | None, typer.Option(help="Also write the result as a page (.html), which needs no network.")]
DryRun = Annotated[bool, typer.Option(help="Show the plan and write nothing.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an existing directory.")]


def hide_progress_bars() -> None:
    """Hide the loading bars of transformers, which say nothing that a user of these verbs needs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_model(model: str, device: str = "auto", dtype: str = "auto", dequantize: bool = False) -> Subject:
    """The model of a verb."""
    from repedit.models.subject import load

    hide_progress_bars()
    return load(model, device=device, dtype=dtype, dequantize=dequantize)
