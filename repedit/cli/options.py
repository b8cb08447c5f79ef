"""The options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Model = Annotated[str, typer.Argument(help="Directory, GGUF file, 'smollm2-135m' or hub id.")]
JSON = "Print one JSON document instead of tables."
Json = Annotated[bool, typer.Option("--json", help=JSON)]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[str, typer.Option(help="auto keeps the checkpoint's; or float32, bfloat16, float16.")]
BatchSize = Annotated[int, typer.Option(help="Chunks of text at a time.")]
Tokens = Annotated[int, typer.Option(help="Counted tokens to collect, and to evaluate, on each set.")]
Text = Annotated[str, typer.Option(help="'code', 'prose', or a .txt, .jsonl or .parquet file.")]
Side = Annotated[str, typer.Option(help="'code', 'prose', a .txt, .jsonl or .parquet file, or what collect wrote.")]
Sites = Annotated[str, typer.Option(help="Where the neurons are: '*.mlp.neurons', '4-9.attn.neurons', ...")]
Structure = Annotated[str, typer.Option(help="keep; slim cuts pruned neurons out; slice narrows an erased stream.")]
Layout = Annotated[str, typer.Option(help="Of slim: uniform widths, or ragged ones that only repedit.load reads.")]
Multiple = Annotated[int | None, typer.Option(help="What new widths are multiples of; 8 for slim, 1 for slice.")]


Given = Mapping[str, Any]
IDLE: Mapping[str, tuple[tuple[str, Callable[[Given], bool], tuple[str, ...]], ...]] = {
    "collect": (("--statistic moments", lambda o: o["statistic"] == "moments", ("gradients",)),),
    "score": (
        ("two saved collections", lambda o: _saved(o["forget"], o["retain"]), ("sites", "tokens", "batch_size")),
    ),
    "prune": (
        ("--learned", lambda o: o["learned"], ("fraction", "scores", "importance", "combine", "steps", "cap_per_layer")),
        ("--scores", lambda o: o["scores"] is not None, ("sites", "importance", "combine", "steps")),
        ("--structure keep", lambda o: o["structure"] == "keep", ("layout", "multiple")),
    ),
    "project": (("a --method that fits at once", lambda o: o["method"] != "mrp", ("steps", "resume", "batch_size")),),
    "apply": (("--structure keep", lambda o: o["structure"] == "keep", ("layout", "multiple")),),
    "audit": (
        ("--selftest", lambda o: o["selftest"], ("edited", "original", "facts", "retain", "reference", "attacks", "out", "hide_items")),
        ("an audit without --selftest", lambda o: not o["selftest"], ("seed",)),
        ("--dry-run", lambda o: o["dry_run"], ("hide_items",)),
    ),
    "compare": (
        ("--metrics", lambda o: bool(o["metrics"]), ("text", "prompt", "tokens", "batch_size")),
        ("no --metrics", lambda o: not o["metrics"], ("limit",)),
    ),
    "demo": (
        ("--act code", lambda o: o["act"] == "code", ("steps",)),
        ("--act capitals", lambda o: o["act"] == "capitals", ("tokens",)),
    ),
}  # fmt: skip
"""Verb -> (beside what, when, options that would change nothing there); one that is given nevertheless is refused.

Everywhere else the rule is: an option of the command line wins over --set, --set over the settings of `small`, these over
the defaults of a recipe; --steps wins over a number of epochs, and steps and epochs in two --set are refused.
"""


class Verb(TyperCommand):
    """A verb: an option that is given changes the result, or is refused."""

    def invoke(self, ctx: Any) -> Any:
        """Carry the verb out.

        Raises:
            ArgumentError: if an option is empty, or changes nothing beside another one.
        """
        from repedit.errors import ArgumentError

        asked = {p.name: p for p in self.params if _is_asked(ctx, p.name)}
        for name, parameter in asked.items():
            values = ctx.params[name] if isinstance(ctx.params[name], list | tuple) else [ctx.params[name]]
            if any(isinstance(value, str) and not value.strip() for value in values):
                raise ArgumentError(f"{_shown(parameter)} is empty; leave it out, or give it a value")
        for beside, applies, names in IDLE.get(str(self.name), ()):
            for name in names:
                if name in asked and applies(ctx.params):
                    raise ArgumentError(f"{_shown(asked[name])} changes nothing beside {beside}; leave one of them out")
        return super().invoke(ctx)


def _is_asked(ctx: Any, name: str) -> bool:
    return getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _shown(parameter: Any) -> str:
    return parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()


def _saved(*names: str) -> bool:
    return all(name.endswith(".safetensors") for name in names)


def quiet() -> None:
    """Hide the loading bars of transformers: they say nothing a user of these commands needs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def opened(model: str, device: str, dtype: str) -> Any:
    """The model a verb works on."""
    from repedit.models import load

    quiet()

    return load(model, device=device, dtype=dtype)
