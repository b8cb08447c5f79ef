"""Verbs that hand results on: upload a checkpoint, write tasks for lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repedit.cli.options import Json

# --- The verb that uploads an exported checkpoint


DRY = 3
"""The exit code of a push that uploaded nothing."""


def push(
    directory: Annotated[Path, typer.Argument(help="A directory that repedit exported, with its repedit.json.")],
    repository: Annotated[str, typer.Argument(help="Where to: owner/name on the Hugging Face hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it nothing leaves this machine.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repository everybody can read; private by default.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of a repository that exists; its history keeps them.")
    ] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload an edited checkpoint",
    json: Json = False,
) -> None:
    """Check an exported checkpoint against its manifest and upload it to the hub, what the manifest lists and nothing else."""
    from repedit.cli import output
    from repedit.rewrite.hub import push as pushed

    found = pushed(directory, repository, yes=yes, private=not public, overwrite=overwrite, message=message)
    if json:
        output.show_json(
            {
                "repository": repository,
                "private": found.private,
                "files": dict(found.files),
                "left": list(found.unlisted),
                "url": found.url,
            }
        )
    else:
        output.table("Files", ("file", "bytes"), [[name, size] for name, size in found.files.items()])
        output.out.print(found.describe(), soft_wrap=True)
        if not yes:
            output.out.print("Add --yes to upload it.")
    if not yes:
        raise typer.Exit(DRY)


# --- The verb that writes facts as tasks of lm-evaluation-harness


def tasks(
    out: Annotated[Path, typer.Argument(help="Folder to write a YAML and a JSONL file a task to.")],
    facts: Annotated[
        str | None, typer.Option(help="Built-in domains or .jsonl files, joined by commas; every domain by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Write facts as tasks of lm-evaluation-harness, which count what repedit counts and run without it."""
    import shlex

    from repedit.cli import output
    from repedit.data import DOMAINS
    from repedit.metrics.harness import TAG, write_tasks

    names = write_tasks(out, DOMAINS if facts is None else facts.split(","))
    chosen = TAG if facts is None else ",".join(names)
    command = (
        f"lm-eval run --model hf --model_args pretrained=MODEL --include_path {shlex.quote(str(out))} --tasks {chosen}"
    )
    if json:
        output.show_json({"tasks": names, "tag": TAG, "command": command})
        return
    output.out.print(f"{len(names)} tasks in {out}; run them with", soft_wrap=True)
    output.out.print(command, soft_wrap=True)
