"""The options that several verbs share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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


def quiet() -> None:
    """Hide the loading bars of transformers: they say nothing a user of these commands needs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def opened(model: str, device: str, dtype: str) -> Any:
    """The model a verb works on."""
    from repedit.models import load

    quiet()

    return load(model, device=device, dtype=dtype)
