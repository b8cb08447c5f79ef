"""A training on disk: what it needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.errors import FingerprintError
from repedit.io import archive
from repedit.io.text import plain
from repedit.unlearning.sharding import divided, whole
from repedit.unlearning.trainer import Training


def save(path: Path, training: Training, key: Mapping[str, Any]) -> None:
    """Write trained tensors, optimiser, combiner memory and log, by one rename; of several ranks the first writes."""
    tensors = {f"w/{name}": whole(p.detach()) for name, p in training.trainee.tensors.items()}
    for number, values in training.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{name}": whole(v) for name, v in values.items() if isinstance(v, Tensor)}
    if not training.ranks.first:
        return
    archive.write(
        path,
        "training",
        tensors,
        {"log": training.log, "memory": training.memory, "key": dict(key), "parts": sorted(tensors)},
    )


def restore(path: Path, training: Training, key: Mapping[str, Any]) -> None:
    """Go on from a file that `save` wrote.

    Raises:
        CheckpointError: if the file is damaged.
        FingerprintError: if it is of another model, recipe, data or seed, naming the fields.
    """
    tensors, header = archive.read(path, "training")
    with archive.rebuilding(path, "training"):
        held = _leaves(header["key"])
    mine = _leaves(plain(dict(key), "the settings of a training"))
    different = sorted(name for name in {*held, *mine} if held.get(name) != mine.get(name))
    if different:
        first = different[0]
        raise FingerprintError(
            f"{path} holds a training that differs in {', '.join(different[:5])}: {first} was {held.get(first)}, it is "
            f"{mine.get(first)} now. Remove the file, or name another"
        )
    with archive.rebuilding(path, "training"):
        _restored(tensors, header, training)


def _restored(tensors: Mapping[str, Tensor], header: Mapping[str, Any], training: Training) -> None:
    odd = sorted(set(header["parts"]) ^ set(tensors))
    if odd:
        raise ValueError(f"the tensor {odd[0]!r} is missing, or is one too many")
    with torch.no_grad():
        for name, p in training.trainee.tensors.items():
            p.copy_(divided(archive.tensor_like(tensors, f"w/{name}", p).to(p.device), p))
    groups: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, number, part = name.split("/")
            like = training.parameters[int(number)]
            own = divided(value.to(like.device), like) if value.shape == like.shape else value
            groups.setdefault(int(number), {})[part] = own
    training.optimiser.load_state_dict({**training.optimiser.state_dict(), "state": groups})
    training.log.extend(dict(record) for record in header["log"])
    training.memory.update(header["memory"])


def _leaves(key: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of nested mappings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in key.items():
        found |= _leaves(value, f"{path}{name}.") if isinstance(value, Mapping) else {f"{path}{name}": value}
    return found
