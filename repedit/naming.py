"""Lowering by tensor name alone: the plan of deltas for a model of which no architecture is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repedit.arch import Specs, TensorSpec, View
from repedit.delta import Delta
from repedit.errors import ArgumentError, FingerprintError, nearest
from repedit.plan import Operation, Plan


def by_name(stages: Sequence[object], specs: Specs, any_model: bool) -> Plan:
    """The plan that adds each difference to the tensor of its name; tensors that a delta brings along start at zero.

    Args:
        any_model: add a delta to weights other than those it was trained from.
    Raises:
        ArgumentError: if a stage is an edit, whose sites only an architecture places.
        FingerprintError: if a tensor has another name or shape here.
    """
    operations: dict[str, list[Operation]] = {}
    added: dict[str, TensorSpec] = {}
    for stage in stages:
        if not isinstance(stage, Delta):
            raise ArgumentError(
                f"{type(stage).__name__} names sites of a language model, and this model has no architecture; fold a map at a "
                "module instead: repedit.vision.fold(model, module, map)"
            )
        start = {} if any_model else stage.provenance.get("start", {})
        for name, value in stage.tensors.items():
            if name in _brought(stage.provenance) and name not in specs:
                weight = specs.get(f"{name.removesuffix('.bias')}.weight")
                added[name] = TensorSpec(tuple(value.shape), weight.dtype if weight else value.dtype)
            found = specs.get(name) or added.get(name)
            if found is None or tuple(found.shape) != tuple(value.shape):
                what = (
                    f"{name} has shape {tuple(found.shape)}"
                    if found
                    else f"no tensor is called {name!r}; {nearest(name, specs)}"
                )
                raise FingerprintError(
                    f"the delta was made for another model: it holds {name} {tuple(value.shape)}, and here {what}"
                )
            known = None if name in operations else start.get(name)
            operations.setdefault(name, []).append(Operation("add", View(name), constant=value, start=known))
    records = [{k: v for k, v in s.provenance.items() if k != "start"} for s in stages if isinstance(s, Delta)]
    made = records[0] if len(records) == 1 else {"method": "composition", "parents": records}
    return Plan({name: tuple(ops) for name, ops in operations.items()}, {}, "live", added=added, provenance=made)


def _brought(provenance: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that a delta, or one it was combined from, adds to the model."""
    return set(provenance.get("added", ())).union(*(_brought(parent) for parent in provenance.get("parents", ())))
