"""The options and arguments that several verbs share, and the model that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from repedit.models.subject import Subject

Model = Annotated[str, typer.Argument(help="Directory, GGUF file, 'smollm2-135m' or hub id.")]
EditedModel = Annotated[str, typer.Argument(help="The other checkpoint.")]
JSON_HELP = "Print one JSON document instead of tables."
Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Dtype = Annotated[
    Literal["auto", "float64", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the weights; auto keeps that of the checkpoint."),
]
Dequantize = Annotated[
    bool,
    typer.Option("--dequantize", help="Turn quantised weights (fp8, MXFP4, ...) into ordinary ones, to edit them."),
]
BatchSize = Annotated[int, typer.Option(help="Chunks of text in one forward pass.")]
LimitTokens = Annotated[int, typer.Option(help="Counted tokens to collect, and to evaluate, on each set.")]
Text = Annotated[str, typer.Option(help="'code', 'prose', or a .txt, .jsonl or .parquet file.")]
TextOrCollection = Annotated[
    str, typer.Option(help="'code', 'prose', a .txt, .jsonl or .parquet file, or a file of `repedit collect`.")
]
Sites = Annotated[str, typer.Option(help="Where the neurons are: '*.mlp.neurons', '4-9.attn.neurons', ...")]
Importance = Annotated[str, typer.Option(help="abs, rms, std, gxa, fisher, ...")]
Combine = Annotated[str, typer.Option(help="difference, ratio, logratio, rank, setdiff.")]
Structure = Annotated[
    Literal["keep", "slim", "slice"],
    typer.Option(help="slim removes pruned neurons from the tensors; slice narrows an erased residual stream."),
]
Layout = Annotated[
    Literal["uniform", "ragged"],
    typer.Option(help="Of slim: uniform widths, or ragged ones that only repedit.load reads."),
]
Multiple = Annotated[int | None, typer.Option(help="New widths are multiples of this; 8 for slim, 1 for slice.")]
EditOut = Annotated[Path, typer.Option(help="x.safetensors writes the edit, a directory the edited checkpoint.")]
Budget = Annotated[
    Literal["quick", "fast", "standard", "full"],
    typer.Option(help="How many attacks, settings and seeds are tried; quick never passes."),
]
PageOut = Annotated[Path | None, typer.Option(help="Also write a page without network requests (.html).")]
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
