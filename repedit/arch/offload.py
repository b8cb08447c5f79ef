"""Where the weights of a model are: in memory on one or several devices, or offloaded by Accelerate until a module runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repedit.errors import OffloadedTensors


def parameters_with_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under each of its names, with its values even if Accelerate has offloaded them to memory or disk.

    Only a parameter that has no values anywhere is on the meta device.
    """
    for name, _ in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        yield name, values(model.get_submodule(path), leaf)


def check_in_memory(model: nn.Module, instead: str) -> None:
    """Refuse a model with offloaded weights, saying what to do instead.

    Raises:
        OffloadedTensors: naming the first of them.
    """
    offloaded = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if offloaded:
        raise OffloadedTensors(
            f"{len(offloaded)} tensors are not in memory ({', '.join(offloaded[:3])}, ...); {instead}"
        )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module runs: the device of its parameters, or the one that offloaded parameters are brought to."""
    first = next(module.parameters(), None)
    if first is not None and first.device.type != "meta":
        return first.device
    for hook in (hook for part in module.modules() for hook in _hooks(part)):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return torch.device("cpu") if first is None else first.device


def values(module: nn.Module, leaf: str) -> Tensor:
    """A parameter of a module with its values, even if they are offloaded."""
    parameter: Tensor = getattr(module, leaf)
    if parameter.device.type == "meta":
        for store, key in _stores(module, leaf):
            return torch.as_tensor(store[key])
    return parameter


def offloaded_tensor(module: nn.Module, leaf: str) -> Tensor | None:
    """The values of an offloaded parameter if they are in memory; None if they are on disk or nowhere."""
    for store, key in _stores(module, leaf):
        tensor = getattr(store, "state_dict", store if isinstance(store, dict) else {}).get(key)
        if isinstance(tensor, Tensor):
            return tensor
    return None


def offloaded_file(module: nn.Module, leaf: str) -> Path | None:
    """The file that holds the values of an offloaded parameter; None if they are in memory or nowhere."""
    for store, key in _stores(module, leaf):
        entry = getattr(store, "index", {}).get(key)
        if entry is not None:
            folder = getattr(store, "save_folder", None) or "."
            return Path(entry.get("safetensors_file") or Path(folder, f"{key}.dat"))
    return None


def _stores(module: nn.Module, leaf: str) -> Iterator[tuple[Any, str]]:
    """Where the hooks of Accelerate look for an offloaded parameter, and its key there."""
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            store, key = getattr(weights, "dataset", weights), f"{getattr(weights, 'prefix', '')}{leaf}"
            if key in store:
                yield store, key


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks of Accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", () if hook is None else (hook,)))
