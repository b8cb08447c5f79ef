"""Attack by removing everything that wraps the weights: hooks, adapters, parametrizations, replaced forwards.

A checkpoint directory has no wrappers: it is loaded with the classes of transformers alone, without hooks, adapters or
code that lies beside the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repedit.auditing.attack import Attack, AttackRecord, AttackResult, Work, ask, deep_copy, register
from repedit.data import Splits
from repedit.models.modifications import of_library as _of_library
from repedit.models.subject import Subject

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def strip() -> Attack:
    """Remove forward hooks, pre-hooks, parametrizations, adapters and replaced forwards from a copy, then ask.

    The only setting is "prompt". Hooks that transformers, accelerate and torch.distributed install stay. A PeftModel
    is not a Subject; adapters that were injected into a transformers model are replaced by their base layers. The
    reason names the parametrizations that were kept because they store no original tensor.
    """

    def run(subject: Subject, splits: Splits, seed: int) -> AttackResult:
        bare, removed, without_original = stripped(subject)
        return _result(removed, without_original)._replace(answers={"prompt": ask(bare, splits.test)})

    return Attack(STRIP, {}, run, Work(1.0))


def _unchanged(subject: Subject) -> AttackResult | None:
    if wrapped(subject):
        return None
    _, removed, without_original = stripped(subject)
    return None if any(removed.values()) else _result(removed, without_original)


def _result(removed: Mapping[str, int], without_original: Sequence[str]) -> AttackResult:
    total = ", ".join(f"{count} {what}" for what, count in removed.items() if count)
    reason = f"removed: {total}" if total else "no hooks, no wrappers"
    reason += f"; kept, since nothing lies under them: {', '.join(without_original)}" if without_original else ""
    return AttackResult({}, reason, details={"removed": removed, "kept": without_original})


STRIP = register(
    AttackRecord(
        "strip", cost=10, budget="fast", build=lambda setup: [strip()], level="W", draws=False, unchanged=_unchanged
    )
)


def stripped(subject: Subject) -> tuple[Subject, dict[str, int], list[str]]:
    """A copy without wrappers, the number of removed wrappers by kind, and the names of those that had to be kept.

    The given model is unchanged.
    """
    bare = deep_copy(subject)
    model = bare.model
    without_original: list[str] = []
    removed = {
        "adapters": _bare_layers(model),
        "hooks": sum(_unhook(module) for module in model.modules()),
        "replaced forwards": sum(_unwrap(module) for module in model.modules()),
        "parametrizations": sum(_unparametrize(name, m, without_original) for name, m in list(model.named_modules())),
        "masks": sum(_unmask(module) for module in model.modules()),
    }
    return bare, removed, without_original


def wrapped(subject: Subject) -> bool:
    """Whether `stripped` would remove anything; checked on the model itself, without a copy."""
    wrappers = (_hooks(m) or _is_replaced(m) or _originals(m) or _masks(m) for m in subject.model.modules())
    return bool(_adapters(subject.model)) or any(wrappers)


def _adapters(model: nn.Module) -> list[tuple[str, Any]]:
    """The adapters of PEFT by name."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def _bare_layers(model: nn.Module) -> int:
    """Replace every adapter by its base layer; returns how many there were."""
    layers = _adapters(model)
    for name, layer in layers:
        if layer.merged:
            layer.unmerge()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    return len(layers)


def _hooks(module: nn.Module) -> list[tuple[str, int]]:
    """(attribute, key) of the hooks that no library installed."""
    return [(where, key) for where in _HOOKS for key, hook in getattr(module, where).items() if not _of_library(hook)]


def _unhook(module: nn.Module) -> int:
    hooks = _hooks(module)
    for where, key in hooks:
        for name in (where, f"{where}_with_kwargs", f"{where}_always_called"):
            getattr(module, name, {}).pop(key, None)
    return len(hooks)


def _is_replaced(module: nn.Module) -> bool:
    """Whether a forward was set on the instance by anything but Accelerate, which moves tensors that way."""
    own = vars(module).get("forward")
    return own is not None and not hasattr(module, "_hf_hook") and not _of_library(own)


def _unwrap(module: nn.Module) -> int:
    if not _is_replaced(module):
        return 0
    del module.forward
    return 1


def _computed(module: nn.Module) -> dict[str, Any]:
    """The parametrizations of a module by the name of the tensor that they compute."""
    parametrizations: Any = getattr(module, "parametrizations", None)
    return dict(parametrizations) if torch.nn.utils.parametrize.is_parametrized(module) else {}


def _originals(module: nn.Module) -> dict[str, Tensor]:
    """The original tensors of a module's parametrizations; empty if one of these stores no original."""
    tensors: dict[str, Any] = {key: getattr(part, "original", None) for key, part in _computed(module).items()}
    return {} if any(value is None for value in tensors.values()) else tensors


def _unparametrize(name: str, module: nn.Module, without_original: list[str]) -> int:
    """Replace computed tensors by their originals; returns how many parametrizations were removed.

    torch's own removal deletes the property from the class, which the copy shares with the model it was made from.
    """
    computed, tensors = _computed(module), _originals(module)
    if not tensors:
        without_original += [f"{name}.{key}" for key in computed]
        return 0
    del module._modules["parametrizations"]
    module.__class__ = type(module).__bases__[0]
    for key, value in tensors.items():
        _register(module, key, value)
    return sum(len(part) for part in computed.values())


def _masks(module: nn.Module) -> list[str]:
    """The tensors whose originals torch.nn.utils.prune and spectral_norm store under a name that ends in `_orig`."""
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
