"""The verb that writes facts as tasks of lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repedit.cli.options import Json


def tasks(
    out: Annotated[Path, typer.Argument(help="Folder to write a YAML and a JSONL file a task to.")],
    facts: Annotated[
        str | None, typer.Option(help="Built-in domains or .jsonl files, joined by commas; every domain by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Write facts as tasks of lm-evaluation-harness, which count what repedit counts and run without it."""
    import shlex

    from repedit import console
    from repedit.data import DOMAINS
    from repedit.metrics.harness import TAG, write_tasks

    names = write_tasks(out, DOMAINS if facts is None else facts.split(","))
    chosen = TAG if facts is None else ",".join(names)
    command = (
        f"lm-eval run --model hf --model_args pretrained=MODEL --include_path {shlex.quote(str(out))} --tasks {chosen}"
    )
    if json:
        console.show_json({"tasks": names, "tag": TAG, "command": command})
        return
    console.out.print(f"{len(names)} tasks in {out}; run them with", soft_wrap=True)
    console.out.print(command, soft_wrap=True)
