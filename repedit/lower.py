"""Lowering: from edits and deltas to the plan of weights that reproduce them exactly, or an error that says why none can.

Only tensor names and shapes are needed, so the plan for a checkpoint of any size is made from its headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from einops import rearrange
from torch import Tensor

from repedit.arch import Architecture, Branch, MatrixView, ModelLayout, Specs, TensorSpec, match_layout
from repedit.delta import Delta
from repedit.edit import Edit, check_made_for, check_widths, describe_map, exactness
from repedit.errors import ArgumentError, FingerprintError, NoBiasSlot, NotFoldable, nearest
from repedit.linear_maps import AffineMap, Diagonal
from repedit.plan import Operation, Plan, plan_for_files
from repedit.sites import Point, Site

EditOrDelta = Edit | Delta
Change = EditOrDelta | Plan | Sequence[EditOrDelta]
"""What can be applied and exported: one edit or delta, several in order, or a plan."""


def lower(
    change: EditOrDelta | Sequence[EditOrDelta],
    architecture: Architecture | None,
    specs: Specs,
    *,
    tied: Literal["untie", "both"] = "untie",
    sides: Literal["all", "output"] = "all",
    any_model: bool = False,
) -> Plan:
    """The plan that puts an edit or a delta into weights.

    Args:
        change: an edit or a delta, or several of them, applied left to right.
        architecture: None for a model that is not a language model; only deltas can be lowered for it.
        specs: shape and dtype by name in memory; the plan is one for files if they say where files hold the tensors
            (`StoredSpecs`).
        tied: what happens to an output head that is tied to an edited embedding: "untie" keeps the head as it is, "both"
            edits it too (no hook equals that).
        sides: "all" also zeroes the rows that feed a pruned neuron, so that ordinary fine-tuning cannot revive it;
            "output" zeroes only the columns it writes with.
        any_model: add a delta to weights other than those it was trained from. Tensors that files hold in another form,
            such as experts stored one by one, are compared by name and shape only.
    Raises:
        NotFoldable: if no weight equals the edit at a site; NoBiasSlot if only a bias is missing.
        ShapeError, UnknownSite: if the edit was made for another model. FingerprintError: if the delta was.
        ArgumentError: if an option does not exist, or something else than edits and deltas is given.
    """
    if tied not in ("untie", "both") or sides not in ("all", "output"):
        raise ArgumentError(f"tied={tied!r}, sides={sides!r}: tied is 'untie' or 'both', sides is 'all' or 'output'")
    changes = _merged_edits(stages(change))
    if architecture is None:
        return _lower_by_name(changes, specs, any_model)
    layout = match_layout(architecture, specs)
    builder = _PlanBuilder(layout, specs, tied, sides)
    for stage in changes:
        if isinstance(stage, Delta):
            builder.add_delta(stage, any_model)
        else:
            check_widths(stage, layout)
            for site, map_ in stage.maps.items():
                builder.add_map(site, map_)
    maps = [item for stage in changes if isinstance(stage, Edit) for item in stage.maps.items()]
    plan = Plan(
        operations={name: tuple(operations) for name, operations in builder.operations.items()},
        exactness={site: exactness(site, layout) for site, _ in maps}, store="live", unties=builder.unties,
        added=builder.added, config=builder.config, provenance={**_plan_provenance(changes), "sides": sides},
        maps={site: describe_map(map_) for site, map_ in maps}, ranks={site: map_.rank_removed for site, map_ in maps},
    )  # fmt: skip
    return plan_for_files(plan, specs)


def check_model(change: Change, read: Callable[[str], Tensor | None], *, any_model: bool = False) -> None:
    """Refuse edits that were made for another model; deltas are checked when they are added, and plans when they are made.

    Args:
        read: the name of a tensor in memory -> the tensor; None if there is none.
        any_model: check nothing.
    Raises:
        FingerprintError: naming the tensor that holds other values.
    """
    changed: set[str] = set()
    for stage in () if isinstance(change, Plan) else stages(change):
        if any_model or not isinstance(stage, Edit):
            return  # tensors that a delta changes hold other values afterwards
        check_made_for(stage, read, changed)
        if not stage.weights:  # it does not record what it changes, so a later edit may have been made after it
            return
        changed |= set(stage.weights)


def stages(change: object) -> Sequence[EditOrDelta]:
    """The edits and deltas of a change, in the order in which they are applied.

    Raises:
        ArgumentError: if it is something else, such as the path of a saved edit, or an iterator, which could be read only once.
    """
    several = [change] if isinstance(change, Edit | Delta) else change
    if (
        isinstance(several, Sequence)
        and not isinstance(several, str)
        and all(isinstance(stage, Edit | Delta) for stage in several)
    ):
        return several
    kinds = [type(stage).__name__ for stage in several] if isinstance(several, list | tuple) else type(several).__name__
    raise ArgumentError(
        f"a change of type {kinds} was given; give an Edit or a Delta, or a list of them, such as repedit.Edit.load(path)"
    )


def _merged_edits(changes: Sequence[EditOrDelta]) -> list[EditOrDelta]:
    """The changes in order, with consecutive edits composed into one."""
    merged: list[EditOrDelta] = []
    for change in changes:
        last = merged[-1] if merged else None
        if isinstance(change, Edit) and isinstance(last, Edit):
            merged[-1] = last | change
        else:
            merged.append(change)
    return merged


def _plan_provenance(changes: Sequence[EditOrDelta]) -> dict[str, Any]:
    """The provenance of a plan; the hashes of the tensors that a delta was trained from are in its operations."""
    records = [{k: v for k, v in change.provenance.items() if k != "start"} for change in changes]
    return records[0] if len(records) == 1 else {"method": "composition", "parents": records}


# --- The operations of a language model, by site


class _PlanBuilder:
    """Collects the operations of one plan, site by site in forward order."""

    def __init__(self, layout: ModelLayout, specs: Specs, tied: str, sides: str) -> None:
        self.layout, self.specs, self.tied, self.sides = layout, specs, tied, sides
        self.operations: dict[str, list[Operation]] = {}
        self.unties: dict[str, str] = {}
        self.added: dict[str, TensorSpec] = {}
        self.config: dict[str, Any] = {}

    def add_map(self, site: Site, map_: AffineMap) -> None:
        """Add the map of one site."""
        if site == Site(0, Point.RESID_PRE) and exactness(site, self.layout) == "hook-only":
            raise NotFoldable(
                f"{site}: a norm or another function of the embeddings of {self.layout.architecture.model_type} comes before the stream, or "
                "features of images enter it there, so no weight equals an edit there. Edit the branches alone, or use edit.hooked(subject)"
            )
        if exactness(site, self.layout) == "hook-only":
            raise NotFoldable(
                f"{site} is a residual stream: every later layer still receives what earlier layers wrote, so no weight equals an "
                f"edit there. Edit the writers ({', '.join(f'{site.layer}.{b.outer}' for b in self.layout.layers[site.layer])}), or "
                "use edit.hooked(subject)"
            )
        if site.point is Point.RESID_PRE:
            self._embeddings(map_)
            return
        branch = self.layout.branch(site.layer, site.point)
        if site.point is branch.inner:
            self._neurons(site, branch, map_)
        else:
            self._output(site, branch, map_)

    def add_delta(self, delta: Delta, any_model: bool) -> None:
        """Add the differences of a delta."""
        start_hashes = {} if any_model else delta.provenance.get("start", {})
        for name, value in delta.tensors.items():
            spec, hint = self.specs.get(name), nearest(name, self.specs)
            if spec is None:
                raise FingerprintError(
                    f"the delta was made for another model: no tensor is called {name!r} here; {hint}"
                )
            if tuple(value.shape) != tuple(spec.shape):
                raise FingerprintError(
                    f"the delta was made for another model: its {name} has shape {tuple(value.shape)}, here it has {tuple(spec.shape)}"
                )
            tied = (
                name == self.layout.embeddings[0] and self.layout.architecture.tied and self.layout.head in self.specs
            )
            # Files may hold the head although it is tied, so both names are written.
            for target in (name, self.layout.head) if tied else (name,):
                if target in (*self.unties, *self.unties.values()):
                    raise NotFoldable(
                        f"an edit before the delta unties {target}, which was one tensor when the delta was trained; apply "
                        "the delta first, or apply them one after the other"
                    )
                start = None if self.operations.get(target) else start_hashes.get(name)
                operation = Operation("add", MatrixView(target), constant=value, start=start)
                self.operations.setdefault(target, []).append(operation)

    def _add(self, operation: Operation) -> None:
        reads = (operation.gain, operation.inner_gain, operation.weight and operation.weight.tensor)
        changed = next((name for name in reads if name and self._changed_by_delta(name)), None)
        if changed:
            raise NotFoldable(
                f"the edit of {operation.view.tensor} depends on {changed}, which a delta before it changes; apply them one after "
                "the other: apply(edit, apply(delta, subject))"
            )
        self.operations.setdefault(operation.view.tensor, []).append(operation)

    def _changed_by_delta(self, name: str) -> bool:
        return any(operation.kind == "add" for operation in self.operations.get(name, ()))

    def _neurons(self, site: Site, branch: Branch, map_: AffineMap) -> None:
        for part in branch.parts:
            part_map = map_
            if len(branch.parts) > 1:
                assert isinstance(map_, Diagonal)
                part_map = Diagonal(map_.scale[part.start : part.stop])
            self._add(Operation("inputs", part.out, part_map))
            if isinstance(part_map, Diagonal) and part_map.is_mask and self.sides == "all":
                self._zero_readers(branch, part.readers, part_map.kept)
        if map_.offset is not None:
            bias = self._bias(site, branch, "a fill value other than zero (use fill='zero')")
            self._add(Operation("carry", MatrixView(bias), constant=map_.offset, weight=branch.parts[0].out))

    def _zero_readers(self, branch: Branch, readers: tuple[MatrixView, ...], keep: Tensor) -> None:
        """Zero the rows that feed pruned neurons; a value row only when every query head that shares it is pruned."""
        if branch.group > 1:
            keep = rearrange(keep, "(kv g e) -> kv g e", g=branch.group, e=branch.head_width).any(1).reshape(-1)
        if bool(keep.all()):
            return
        for view in readers:
            self._add(Operation("outputs", view, Diagonal.mask(keep)))

    def _output(self, site: Site, branch: Branch, map_: AffineMap) -> None:
        offset, unit = map_.offset, self.layout.architecture.unit_gain
        if offset is not None and branch.gains:
            raise NotFoldable(
                f"{site} follows the post-norm {branch.gains[0]}, which has no bias to hold the map's offset; "
                "fit without a center (affine=False), or use the hook"
            )
        added = self.added if branch.bias_name in self.added else ()
        for part in branch.parts:
            bias = MatrixView(str(branch.bias_name)) if added else part.bias
            for view in (part.out, bias if offset is None else None):
                if view is not None:
                    self._add(Operation("outputs", view, map_, gain=branch.gain, inner_gain=part.gain, unit_gain=unit))
        if offset is not None:
            if not branch.plain:
                raise NoBiasSlot(
                    f"{site}: outputs of {branch.writer} are weighted or scaled before they are added, so that no bias can hold "
                    "the map's offset (fit without a center, affine=False); or use edit.hooked(subject)"
                )
            name = self._bias(site, branch, "the map's offset (fit without a center, affine=False)")
            self._add(Operation("outputs", MatrixView(name), map_, constant=offset))

    def _bias(self, site: Site, branch: Branch, reason: str) -> str:
        """The bias of a writer; adds the family's biases, as zeros in every layer, if a config flag allows that."""
        if branch.bias is not None:
            return branch.bias
        slot = self.layout.architecture.bias_flags.get(branch.outer)
        if slot is None or branch.bias_name is None:
            raise NoBiasSlot(
                f"{site}: {self.layout.architecture.model_type} has no bias at {branch.writer} to hold {reason}; or use edit.hooked(subject)"
            )
        for block in self.layout.block_paths:
            for module in slot.modules:
                weight = self.specs.get(f"{block}.{module}.weight")
                if weight is not None and f"{block}.{module}.bias" not in self.specs:
                    self.added[f"{block}.{module}.bias"] = TensorSpec((weight.shape[0],), weight.dtype)
        self.config[slot.flag] = True
        return branch.bias_name

    def _embeddings(self, map_: AffineMap) -> None:
        """0.resid.pre is the sum of the embeddings: each takes the linear part, and the token table takes the offset."""
        offset = map_.offset
        tokens, *others = self.layout.embeddings
        constant = None if offset is None else offset / self.layout.embedding_scale
        self._add(Operation("outputs", MatrixView(tokens, transposed=True), map_, constant=constant))
        for name in others:
            self._add(Operation("outputs", MatrixView(name, transposed=True), map_))
        if not self.layout.architecture.tied:
            return
        if self.tied == "untie" and self._changed_by_delta(tokens):
            raise NotFoldable(
                f"the edit unties {tokens}, which a delta before it changes; apply them one after the other: apply(edit, "
                "apply(delta, subject))"
            )
        head = self.layout.head
        if self.tied == "untie":
            self.config["tie_word_embeddings"] = False
            self.unties[head] = tokens
        elif head in self.specs:
            # Files may hold the head although it is tied; transformers unties the two where their values differ.
            self.operations[head] = [
                replace(operation, view=replace(operation.view, tensor=head)) for operation in self.operations[tokens]
            ]


# --- The plan of deltas for a model without an architecture, by tensor name


def _lower_by_name(changes: Sequence[EditOrDelta], specs: Specs, any_model: bool) -> Plan:
    """The plan that adds each difference to the tensor of its name; tensors that a delta adds to the model start at zero.

    Raises:
        ArgumentError: if a change is an edit, whose sites need an architecture.
        FingerprintError: if a tensor has another name or shape here.
    """
    operations: dict[str, list[Operation]] = {}
    added: dict[str, TensorSpec] = {}
    for delta in changes:
        if not isinstance(delta, Delta):
            raise ArgumentError(
                f"{type(delta).__name__} names sites of a language model, and this model has no architecture; fold a map at a "
                "module instead: repedit.vision.fold(model, module, map)"
            )
        start_hashes = {} if any_model else delta.provenance.get("start", {})
        for name, value in delta.tensors.items():
            shape = tuple(value.shape)
            if name in _added_tensors(delta.provenance) and name not in specs:
                weight = specs.get(f"{name.removesuffix('.bias')}.weight")
                added[name] = TensorSpec(shape, weight.dtype if weight else value.dtype)
            spec = specs.get(name) or added.get(name)
            if spec is None or tuple(spec.shape) != shape:
                missing = f"no tensor is called {name!r}; {nearest(name, specs)}"
                raise FingerprintError(
                    f"the delta was made for another model: it holds {name} {shape}, and here "
                    + (f"{name} has shape {tuple(spec.shape)}" if spec else missing)
                )
            start = None if name in operations else start_hashes.get(name)
            operations.setdefault(name, []).append(Operation("add", MatrixView(name), constant=value, start=start))
    return Plan(
        {name: tuple(several) for name, several in operations.items()}, {}, "live", added=added,
        provenance=_plan_provenance(changes),
    )  # fmt: skip


def _added_tensors(provenance: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that a delta, or one it was combined from, adds to the model."""
    return set(provenance.get("added", ())).union(*(_added_tensors(parent) for parent in provenance.get("parents", ())))
