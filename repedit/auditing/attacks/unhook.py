"""Stripping: what is left of an edit when everything that only wraps the weights is taken off.

A directory needs none of it: it is loaded with the classes of transformers alone, so hooks, adapters and code that lay
beside its weights never come along.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, ask, deep_copy, register
from repedit.data import Splits
from repedit.models.subject import Subject

# Who may hook a model for its own ends: recording outputs, moving tensors between devices.
_LIBRARIES = ("transformers.", "accelerate.", "torch.distributed.", "kernels.")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def strip() -> Attack:
    """Takes forward hooks, pre-hooks, parametrizations, adapters and replaced forwards off a copy, then asks.

    The only setting is "prompt". Hooks that transformers, accelerate and torch.distributed install stay. A PeftModel
    is no Subject; adapters that were injected into a transformers model are replaced by their base layers. The reason
    says what was kept because nothing lies under it.
    """

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        bare, removed, kept = stripped(subject)
        total = ", ".join(f"{count} {what}" for what, count in removed.items() if count)
        reason = f"removed: {total}" if total else "no hooks, no wrappers"
        reason += f"; kept, since nothing lies under them: {', '.join(kept)}" if kept else ""
        return AttackResult({"prompt": ask(bare, splits.test)}, reason, details={"removed": removed, "kept": kept})

    return Attack(STRIP, {}, run, Work(1.0))


STRIP = register(AttackRecord("strip", cost=10, budget="fast", build=lambda setup: [strip()], level="W", draws=False))


def stripped(subject: Subject) -> tuple[Subject, dict[str, int], list[str]]:
    """A copy with its weights alone, how many of each kind were removed, and what had to be kept.

    The model given keeps all of it.
    """
    bare = deep_copy(subject)
    model = bare.model
    kept: list[str] = []
    removed = {
        "adapters": _bare_layers(model),
        "hooks": sum(_unhook(module) for module in model.modules()),
        "replaced forwards": sum(_unwrap(module) for module in model.modules()),
        "parametrizations": sum(_unparametrize(name, m, kept) for name, m in list(model.named_modules())),
        "masks": sum(_unmask(module) for module in model.modules()),
    }
    return bare, removed, kept


def wrapped(subject: Subject) -> bool:
    """Whether stripping would take anything off; found on the model itself, without a copy."""
    wrappers = (_hooks(m) or _is_replaced(m) or _originals(m) or _masks(m) for m in subject.model.modules())
    return bool(_adapters(subject.model)) or any(wrappers)


def _adapters(model: nn.Module) -> list[tuple[str, Any]]:
    """The adapters of peft by name."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _bare_layers(model: nn.Module) -> int:
    """Put the base layer in the place of every adapter."""
    layers = _adapters(model)
    for name, layer in layers:
        if layer.merged:
            layer.unmerge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return len(layers)


def _hooks(module: nn.Module) -> list[tuple[str, int]]:
    """(where, key) of the hooks that are not a library's own."""
    return [(where, key) for where in _HOOKS for key, hook in getattr(module, where).items() if not _of_library(hook)]


def _unhook(module: nn.Module) -> int:
    hooks = _hooks(module)
    for where, key in hooks:
        for name in (where, f"{where}_with_kwargs", f"{where}_always_called"):
            getattr(module, name, {}).pop(key, None)
    return len(hooks)


def _is_replaced(module: nn.Module) -> bool:
    """Whether a forward was set on the instance, but for that by which accelerate moves tensors."""
    own = vars(module).get("forward")
    return own is not None and not hasattr(module, "_hf_hook") and not _of_library(own)


def _unwrap(module: nn.Module) -> int:
    if not _is_replaced(module):
        return 0
    del module.forward
    return 1


def _of_library(function: Callable[..., Any]) -> bool:
    inner = getattr(function, "__func__", function)
    # The globals of a function are those of the file it was written in; its __module__ can be set to anything.
    own = getattr(inner, "__globals__", {}).get("__name__") or type(function).__module__
    return str(own).startswith(_LIBRARIES)


def _computed(module: nn.Module) -> dict[str, Any]:
    """The parametrizations of a module by the name of the tensor that they compute."""
    parametrizations = vars(module).get("_modules", {}).get("parametrizations")
    return (
        dict(parametrizations)
        if parametrizations is not None and torch.nn.utils.parametrize.is_parametrized(module)
        else {}
    )


def _originals(module: nn.Module) -> dict[str, Tensor]:
    """The tensors under a module's parametrizations; none where one of them keeps no original."""
    tensors: dict[str, Any] = {key: getattr(part, "original", None) for key, part in _computed(module).items()}
    return {} if any(value is None for value in tensors.values()) else tensors


def _unparametrize(name: str, module: nn.Module, kept: list[str]) -> int:
    """Put the original tensors back where parametrizations compute them.

    torch's own removal deletes the property from the class, which the copy shares with the model it was made from.
    """
    computed, tensors = _computed(module), _originals(module)
    if not tensors:
        kept += [f"{name}.{key}" for key in computed]
        return 0
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for key, value in tensors.items():
        _register(module, key, value)
    return sum(len(part) for part in computed.values())


def _masks(module: nn.Module) -> list[str]:
    """The tensors of which torch.nn.utils.prune and spectral_norm keep what lies under them as `weight_orig`."""
    names = [key.removesuffix("_orig") for key in module._parameters if key.endswith("_orig")]
    return [key for key in names if isinstance(vars(module).get(key), Tensor)]


def _unmask(module: nn.Module) -> int:
    names = _masks(module)
    for key in names:
        value = module._parameters.pop(f"{key}_orig")
        module._buffers.pop(f"{key}_mask", None)
        delattr(module, key)
        _register(module, key, value)
    return len(names)


def _register(module: nn.Module, name: str, value: Tensor | None) -> None:
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)
