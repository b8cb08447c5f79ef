"""The plan of a change for each structure a checkpoint can be written in: as it was, slimmed or sliced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repedit.arch import Architecture, Specs
from repedit.edit import Edit
from repedit.errors import ArgumentError, NotSliceable, NotSlimmable
from repedit.lower import EditOrDelta, lower
from repedit.plan import Plan
from repedit.rewrite.slice import slice_plan
from repedit.rewrite.slim import slim_plan

STRUCTURES = ("keep", "slim", "slice")


def structured(
    change: EditOrDelta | Plan | Sequence[EditOrDelta],
    architecture: Architecture,
    specs: Specs,
    *,
    structure: str = "keep",
    layout: str = "uniform",
    multiple: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that carries a change out in a structure.

    Args:
        structure: "keep" every shape; "slim": cut pruned neurons and heads out; "slice": narrow an erased stream.
        layout: of "slim", see `slimmed`.
        multiple: what a width must be a multiple of; None is 8 for "slim" and 1 for "slice".
        options: passed to lowering.
    Raises:
        ArgumentError: if an option does not belong to the structure.
        NotFoldable, NotSlimmable, NotSliceable: if the change cannot be carried out so.
    """
    options = dict(options or {})
    if structure not in STRUCTURES:
        raise ArgumentError(f"structure={structure!r} is 'keep', 'slim' or 'slice'")
    if (layout != "uniform" and structure != "slim") or (multiple is not None and structure == "keep"):
        raise ArgumentError(
            f"layout={layout!r}, multiple={multiple} with structure={structure!r}: layout belongs to 'slim', multiple to 'slim' and 'slice'"
        )
    if isinstance(change, Plan):
        if structure not in ("keep", change.structure):
            raise ArgumentError(
                f"the plan has structure {change.structure!r}, {structure!r} was asked for; pass the edit"
            )
        return change
    if structure == "slim":
        edit = _composed(change, structure)
        return slim_plan(
            edit, architecture, specs, layout=layout, multiple=8 if multiple is None else multiple, **options
        )
    if structure == "slice":
        edit = _composed(change, structure)
        return slice_plan(edit, architecture, specs, multiple=1 if multiple is None else multiple, **options)
    return lower(change, architecture, specs, **options)


def _composed(change: EditOrDelta | Sequence[EditOrDelta], structure: str) -> Edit:
    """One edit."""
    found: Edit | None = None
    for stage in [change] if not isinstance(change, Sequence) else change:
        if not isinstance(stage, Edit):
            raise (NotSlimmable if structure == "slim" else NotSliceable)(
                f"a delta changes values and removes nothing that structure={structure!r} could cut; apply it first, and export the edit "
                "of the result"
            )
        found = stage if found is None else found | stage
    if found is None:
        raise ArgumentError("no edit was given")
    return found
