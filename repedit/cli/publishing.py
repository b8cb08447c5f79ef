"""The verb that uploads an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repedit.cli.options import Json

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
    from repedit import console
    from repedit.rewrite.publishing import push as pushed

    found = pushed(directory, repository, yes=yes, private=not public, overwrite=overwrite, message=message)
    if json:
        console.show_json(
            {
                "repository": repository,
                "private": found.private,
                "files": dict(found.files),
                "left": list(found.left),
                "url": found.url,
            }
        )
    else:
        console.table("Files", ("file", "bytes"), [[name, size] for name, size in found.files.items()])
        console.out.print(found.describe(), soft_wrap=True)
        if not yes:
            console.out.print("Add --yes to upload it.")
    if not yes:
        raise typer.Exit(DRY)
