"""A classifier in eval mode, and the tensor that goes into one of its modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repedit.errors import UnknownName, nearest
from repedit.hooks import Hook, installed


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module with a path.

    Raises:
        UnknownName: with the nearest paths.
    """
    modules = dict(model.named_modules())
    if path not in modules:
        raise UnknownName(f"the model has no module {path!r}; {nearest(path, [name for name in modules if name])}")
    return modules[path]


def input_of(model: nn.Module, path: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What goes into a module when the model reads x, and the model's output.

    Raises:
        HookError: if the forward pass does not reach the module.
    """
    seen: list[Tensor] = []
    with installed(model, [Hook(module_at(model, path), "input", seen.append)]):
        output = model(x)
    return seen[-1], output


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device
