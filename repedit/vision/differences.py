"""A trained or folded classifier as a delta from the original, and a delta carried out on a classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repedit.arch import TensorSpec
from repedit.delta import Delta
from repedit.errors import NoOpEdit
from repedit.fingerprints import module_fingerprint, value_hash
from repedit.lower import lower
from repedit.rewrite.live import new_tensors, noop_message


def apply(delta: Delta | Sequence[Delta], model: nn.Module, *, any_model: bool = False) -> nn.Module:
    """A copy of the model with the differences added, each tensor rounded once; the model itself is untouched.

    Args:
        delta: one, or several that are added left to right.
        any_model: add it to other weights than those it was made from.
    Raises:
        FingerprintError: if it was made for another model. NoOpEdit: if nothing would change.
    """
    before = tensors_of(model)
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in before.items()}
    plan = lower(delta, None, specs, any_model=any_model)
    plan.check(specs)
    new = new_tensors(plan, before)
    if all(name in before and torch.equal(value, before[name]) for name, value in new.items()):
        raise NoOpEdit(noop_message(list(plan.operations)))
    changed = copy.deepcopy(model)
    held = tensors_of(changed)
    for name, value in new.items():
        if name in held:
            held[name].data.copy_(value)
        else:
            path, _, leaf = name.rpartition(".")
            setattr(changed.get_submodule(path), leaf, nn.Parameter(value))
    return changed


def tensors_of(model: nn.Module) -> dict[str, Any]:
    """Every parameter and buffer by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def difference(model: nn.Module, changed: nn.Module, provenance: dict[str, Any]) -> Delta:
    """What changed, parameters and buffers, with the hashes of the values it changed from."""
    old, new = tensors_of(model), tensors_of(changed)
    return between(model, {name: new[name] for name in new if not torch.equal(new[name], old[name])}, provenance)


def between(model: nn.Module, new: dict[str, Tensor], provenance: dict[str, Any]) -> Delta:
    """New values of some tensors less the model's own; a tensor that it has not counts as 0."""
    old, found, start = tensors_of(model), {}, {}
    for name, value in new.items():
        # A count (of batches seen) stays exact in float64.
        wide = torch.float32 if value.is_floating_point() and value.dtype != torch.float64 else torch.float64
        found[name] = value.detach().to(wide)
        if name in old:
            found[name] = found[name] - old[name].detach().to(wide)
            start[name] = value_hash(old[name].detach().to(wide))
    added = {"added": sorted(set(new) - set(old))} if set(new) - set(old) else {}
    return Delta(found, provenance | added | {"model": module_fingerprint(model), "start": start})
