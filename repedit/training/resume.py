"""The state of a training in a folder: what a later call needs to continue as if the training had not been interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from repedit.distributed import full_tensor, shard_like
from repedit.errors import FingerprintError, TargetExists
from repedit.io import archive
from repedit.io.files import is_file, make_folder, user_path
from repedit.io.targets import check_file_target
from repedit.io.text import json_copy

Header = dict[str, Any]
"""JSON values."""
FILE = "training.safetensors"
"""The file in a resume folder."""
_P = TypeVar("_P", bound=Tensor)


def state_path(folder: str | Path) -> Path:
    """The file of a resume folder, which is made if it does not exist.

    Raises:
        TargetExists: if the path is a file, or the folder holds a file of that name that repedit did not write.
        CheckpointError: if it cannot be written.
    """
    folder = user_path(folder)
    if is_file(folder):
        raise TargetExists(
            f"{folder} is a file, and resume= takes a folder; give another path, or move a saved training to <folder>/{FILE}"
        )
    path = make_folder(folder) / FILE
    check_file_target(path)
    archive.check_replaceable(path)
    return path


def save(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    header: Mapping[str, object],
    *,
    key: Mapping[str, object],
    other: Mapping[str, Tensor] | None = None,
    is_writer: bool = True,
) -> None:
    """Write weights, optimizer state and a header by one rename.

    Args:
        key: what must be equal when the training is resumed: model, data, options, seed.
        other: further tensors, by names that begin neither with "w/" nor with "optimizer/".
        is_writer: False on ranks that only contribute their shards.
    """
    tensors = {f"w/{name}": full_tensor(p.detach()) for name, p in weights.items()} | dict(other or {})
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{name}": full_tensor(v) for name, v in state.items() if isinstance(v, Tensor)}
    if is_writer:
        archive.write(path, "training", tensors, {**header, "key": dict(key), "parts": sorted(tensors)})


def restore(
    path: Path, weights: Mapping[str, _P], optimizer: torch.optim.Optimizer, *, key: Mapping[str, object]
) -> tuple[Header, dict[str, Tensor]]:
    """Load weights and optimizer state from a file that `save` wrote; its header and all its tensors.

    Raises:
        CheckpointError: if the file is damaged.
        FingerprintError: if it is of another training, naming the values that differ.
    """
    tensors, header = archive.read(path, "training")
    with archive.rebuilding(path, "training"):
        saved = _flat(header["key"])
    current = _flat(json_copy(dict(key), "the settings of a training"))
    different = sorted(name for name in {*saved, *current} if saved.get(name) != current.get(name))
    if different:
        name = different[0]
        raise FingerprintError(
            f"{path} holds a training that differs in {', '.join(different[:5])}: {name} was {saved.get(name)}, it is "
            f"{current.get(name)} now. Remove the file, or give another folder"
        )
    with archive.rebuilding(path, "training"):
        unexpected = sorted(set(header.get("parts", tensors)) ^ set(tensors))
        if unexpected:
            raise ValueError(f"the tensor {unexpected[0]!r} is missing, or is one too many")
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(shard_like(archive.tensor_like(tensors, f"w/{name}", p).to(p.device), p))
        _load_optimizer(optimizer, tensors, list(weights.values()))
    return header, tensors


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], weights: list[_P]) -> None:
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        # Files of earlier versions spell it "optimiser".
        if name.startswith(("optimizer/", "optimiser/")):
            _, number, part = name.split("/")
            like = weights[int(number)]
            state = shard_like(value.to(like.device), like) if value.shape == like.shape else value
            states.setdefault(int(number), {})[part] = state
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _flat(value: object, path: str = "") -> dict[str, object]:
    """The values of nested mappings under dotted names."""
    if isinstance(value, Mapping):
        return {
            k: v for name, part in value.items() for k, v in _flat(part, f"{path}.{name}" if path else name).items()
        }
    return {path: value}
