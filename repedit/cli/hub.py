"""Verbs between this machine and others: fetch downloads, push uploads, tasks writes tasks for lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repedit.cli.application import Json, hide_progress_bars

NOT_UPLOADED = 3
"""The exit code of a push without --yes."""


def fetch(
    name: Annotated[str, typer.Argument(help="Built-in model.")] = "smollm2-135m",
    force: Annotated[bool, typer.Option(help="Download and convert again.")] = False,
    json: Json = False,
) -> None:
    """Download, check and convert the default model once; it is available offline afterwards."""
    from repedit.cli import output
    from repedit.models.default_model import fetch as fetch_model

    output.stage(f"{name}: about 93 MB to download, 540 MB on disk; under two minutes, at once if it is there already")
    hide_progress_bars()
    path = fetch_model(name, force=force)
    output.show_json({"path": str(path)}) if json else output.out.print(str(path), soft_wrap=True)


def push(
    source: Annotated[Path, typer.Argument(help="A directory that repedit exported, or a saved edit or delta.")],
    repository: Annotated[str, typer.Argument(help="Where to: owner/name on the Hugging Face hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it nothing leaves this machine.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="A repository everybody can read; private by default.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of a repository that exists; its history keeps them.")
    ] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "",
    json: Json = False,
) -> None:
    """Check an exported checkpoint against its manifest and upload exactly its files to the hub; or upload an edit or a delta."""
    from repedit.cli import output
    from repedit.rewrite.hub import push as push_checkpoint

    upload = push_checkpoint(source, repository, yes=yes, private=not public, overwrite=overwrite, message=message)
    if json:
        output.show_json({
            "repository": repository, "private": upload.private, "files": dict(upload.files), "left": list(upload.unlisted), "url": upload.url,
        })  # fmt: skip
    else:
        output.table("Files", ("file", "bytes"), [[name, size] for name, size in upload.files.items()])
        output.out.print(upload.describe(), soft_wrap=True)
        if not yes:
            output.out.print("Add --yes to upload it.")
    if not yes:
        raise typer.Exit(NOT_UPLOADED)


def tasks(
    out: Annotated[Path, typer.Argument(help="Folder for a YAML and a JSONL file of each task.")],
    facts: Annotated[
        str | None, typer.Option(help="Built-in domains or .jsonl files, joined by commas; every domain by default.")
    ] = None,
    json: Json = False,
) -> None:
    """Write facts as tasks of lm-evaluation-harness, which grade as repedit does and run without repedit."""
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
