"""The file that holds a value of repedit: one safetensors file with a JSON header that says what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from repedit.errors import CheckpointError

FORMAT = 1
_KINDS = {
    "edit": ("a saved edit", "is not a saved edit", "write one with edit.save(path)"),
    "delta": ("a saved delta", "is not a saved delta", "write one with delta.save(path)"),
    "training": ("a saved training state", "does not hold a training state", "let resume= write one"),
    "collection": ("a saved collection", "does not hold a collection", "write one with collection.save(path)"),
    "scores": ("saved scores", "does not hold scores", "write them with scores.save(path)"),
}


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of plain JSON values; kind is a key of the table above."""
    from safetensors.torch import save_file

    text = json.dumps({"format": FORMAT, "kind": kind, **header}, sort_keys=True)
    # safetensors refuses tensors that share memory, as u and v of a projection do; they are small.
    own = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(own, str(path), metadata={"repedit": text})


def kind_of(path: str | Path) -> str | None:
    """What a file says it holds; None where it says nothing or cannot be read."""
    from safetensors import SafetensorError

    try:
        return header_of(path).get("kind")
    except (OSError, SafetensorError):
        return None


def header_of(path: str | Path) -> dict[str, Any]:
    """The header of a file, without its tensors; empty where it has none."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get("repedit", "{}"))
        return found


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a file that `write` made.

    Raises:
        CheckpointError: if the file cannot be read, or holds something else.
    """
    from safetensors import SafetensorError, safe_open

    name, other, remedy = _KINDS[kind]
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("repedit", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as {name}: {error}") from error
    if header.get("kind") != kind or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} {other} of format {FORMAT}; {remedy}")
    return tensors, header
