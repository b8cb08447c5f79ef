"""A training on disk: what it needs to go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit import container
from repedit.errors import FingerprintError
from repedit.gradient.loop import Training


def save(path: Path, training: Training, key: Mapping[str, Any]) -> None:
    """Write trained tensors, optimiser, combiner memory and log, by one rename."""
    tensors = {f"w/{name}": p.detach() for name, p in training.trainee.tensors.items()}
    for number, values in training.optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{number}/{name}": v for name, v in values.items() if isinstance(v, Tensor)}
    temporary = path.with_name(f".{path.name}.partial")
    container.write(temporary, "training", tensors, {"log": training.log, "memory": training.memory, "key": dict(key)})
    temporary.replace(path)


def restore(path: Path, training: Training, key: Mapping[str, Any]) -> None:
    """Go on from a file that `save` wrote.

    Raises:
        FingerprintError: if it is of another model, recipe, data or seed, naming the fields.
    """
    tensors, header = container.read(path, "training")
    held = header["key"]
    different = sorted(name for name in {*held, *key} if held.get(name) != key.get(name))
    if different:
        raise FingerprintError(
            f"{path} holds a training that differs in {', '.join(different)}; it had {_short(held.get(different[0]))}, this one "
            f"has {_short(key.get(different[0]))}. Remove the file, or name another"
        )
    with torch.no_grad():
        for name, p in training.trainee.tensors.items():
            p.copy_(tensors[f"w/{name}"])
    groups: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser/"):
            _, number, part = name.split("/")
            groups.setdefault(int(number), {})[part] = value
    training.optimiser.load_state_dict({**training.optimiser.state_dict(), "state": groups})
    training.log.extend(header["log"])
    training.memory.update(header["memory"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 120 else f"{text[:117]}..."
