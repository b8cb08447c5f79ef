"""Ways to damage a checkpoint directory: each makes, or is, a function of the directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from repedit.io.checkpoint import INDEX, SINGLE

Damage = Callable[[Path], object]
UP = "model.layers.1.mlp.up_proj.weight"


def sha(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def config(**changes: Any) -> Damage:
    """Other values in config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def index(change: Callable[[Any], Any]) -> Damage:
    """Another index."""
    return lambda folder: (folder / INDEX).write_text(json.dumps(change(json.loads((folder / INDEX).read_text()))))


def mapped(file: object) -> Damage:
    """The index sends one tensor to another file."""
    return index(lambda content: content | {"weight_map": content["weight_map"] | {UP: file}})


def weights(change: Callable[[bytes], bytes]) -> Damage:
    """Other bytes in the weight file."""
    return lambda folder: (folder / SINGLE).write_bytes(change((folder / SINGLE).read_bytes()))


def header(table: object) -> Damage:
    """A file of one header and 64 bytes."""
    text = json.dumps(table).encode()
    return weights(lambda _: len(text).to_bytes(8, "little") + text + bytes(64))


def tensor(**fields: object) -> Damage:
    """A file that claims to hold one float32 number."""
    return header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields})


def pickled(folder: Path) -> None:
    """Only a pickle is left."""
    (folder / SINGLE).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def not_a_number(folder: Path) -> None:
    """One weight is NaN."""
    tensors = load_file(folder / SINGLE)
    tensors[UP][3, 4] = torch.nan
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
