"""From an edit or a delta to a plan: which weights equal each change, exactly, or a refusal that says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from einops import rearrange
from torch import Tensor

from repedit.arch import Architecture, Branch, MatrixView, ModelLayout, Specs, TensorSpec, match_layout
from repedit.delta import Delta
from repedit.edit import Edit, check_made_for, check_widths, describe_map, exactness
from repedit.errors import ArgumentError, FingerprintError, NoBiasSlot, NotFoldable, nearest
from repedit.linear_maps import AffineMap, Diagonal
from repedit.plan import Operation, Plan
from repedit.sites import Point, Site

# --- Lowering by tensor name alone: the plan of deltas for a model of which no architecture is known


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
            operations.setdefault(name, []).append(Operation("add", MatrixView(name), constant=value, start=known))
    records = [{k: v for k, v in s.provenance.items() if k != "start"} for s in stages if isinstance(s, Delta)]
    made = records[0] if len(records) == 1 else {"method": "composition", "parents": records}
    return Plan({name: tuple(ops) for name, ops in operations.items()}, {}, "live", added=added, provenance=made)


def _brought(provenance: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that a delta, or one it was combined from, adds to the model."""
    return set(provenance.get("added", ())).union(*(_brought(parent) for parent in provenance.get("parents", ())))


# --- From an edit or a delta to a plan: which weights equal each change, exactly, or a refusal that says why not
#
# Only tensor names and shapes are needed, so a plan for a checkpoint of any size is made from its headers.


EditOrDelta = Edit | Delta


def lower(
    change: EditOrDelta | Sequence[EditOrDelta],
    architecture: Architecture | None,
    specs: Specs,
    *,
    tied: Literal["untie", "both"] = "untie",
    sides: Literal["all", "output"] = "all",
    any_model: bool = False,
) -> Plan:
    """The plan that makes weights equal an edit or a delta.

    Args:
        change: an edit or a delta, or several of them, carried out left to right.
        architecture: None for a model that is no language model, of which deltas alone can be lowered.
        specs: shape and dtype by tensor name, of a live model or of checkpoint headers.
        tied: what becomes of an output head tied to an edited embedding: "untie" keeps the head as it is, "both"
            edits it too (no hook equals that).
        sides: "all" also zeroes the rows that feed a pruned neuron, so that plain fine-tuning cannot revive it;
            "output" zeroes only the columns it writes with.
        any_model: add a delta to weights other than those it was trained from. Fused experts that lie on disk one by
            one are compared by name and shape only.
    Raises:
        NotFoldable: if no weight equals the edit at a site; NoBiasSlot if only a bias is missing.
        ShapeError, UnknownSite: if the edit was made for another model. FingerprintError: if the delta was.
    """
    if tied not in ("untie", "both") or sides not in ("all", "output"):
        raise ArgumentError(f"tied={tied!r}, sides={sides!r}: tied is 'untie' or 'both', sides is 'all' or 'output'")
    stages = _stages([change] if isinstance(change, Edit | Delta) else change)
    if architecture is None:
        return by_name(stages, specs, any_model)
    layout = match_layout(architecture, specs)
    build = _Builder(layout, specs, tied, sides)
    for stage in stages:
        if isinstance(stage, Delta):
            build.delta(stage, any_model)
        else:
            check_widths(stage, layout)
            for site, map_ in stage.maps.items():
                build.site(site, map_)
    edits = [stage for stage in stages if isinstance(stage, Edit)]
    records = [{k: v for k, v in stage.provenance.items() if k != "start"} for stage in stages]
    return Plan(
        operations={name: tuple(ops) for name, ops in build.operations.items()},
        exactness={site: exactness(site, layout) for edit in edits for site in edit.maps},
        store=layout.store,
        unties=build.unties,
        added=build.added,
        config=build.config,
        provenance={
            **(records[0] if len(records) == 1 else {"method": "composition", "parents": records}),
            "sides": sides,
        },
        maps={site: describe_map(map_) for edit in edits for site, map_ in edit.maps.items()},
        ranks={site: map_.rank_removed for edit in edits for site, map_ in edit.maps.items()},
    )


def check_model(
    change: EditOrDelta | Plan | Sequence[EditOrDelta], read: Callable[[str], Tensor | None], *, any_model: bool = False
) -> None:
    """Refuse edits that were made for another model; deltas are checked where they are added, and plans were checked.

    Args:
        read: a name in memory -> the tensor; None where there is none.
        any_model: check nothing.
    Raises:
        FingerprintError: with the tensor that holds other values.
    """
    changed: set[str] = set()
    for stage in [change] if isinstance(change, Edit | Delta | Plan) else change:
        if any_model or not isinstance(stage, Edit):
            return  # what a delta changed has other values
        check_made_for(stage, read, changed)
        if not stage.weights:  # what it changes is not said, and what follows may have been made after it
            return
        changed |= set(stage.weights)


def read_by_name(
    architecture: Architecture, specs: Specs, read: Callable[[str], Tensor]
) -> Callable[[str], Tensor | None]:
    """Tensors of files by their names in memory; None for what files hold in another form, such as fused experts."""

    def tensor(name: str) -> Tensor | None:
        stored = next((n for n in _aliases(name, architecture) if n in specs), None)
        return None if stored is None else read(stored)

    return tensor


def _stages(changes: Sequence[EditOrDelta]) -> list[EditOrDelta]:
    """The changes in order, neighbouring edits composed into one."""
    found: list[EditOrDelta] = []
    for change in changes:
        last = found[-1] if found else None
        if isinstance(change, Edit) and isinstance(last, Edit):
            found[-1] = last | change
        else:
            found.append(change)
    return found


class _Builder:
    """Collects the operations of one plan, site by site in forward order."""

    def __init__(self, layout: ModelLayout, specs: Specs, tied: str, sides: str) -> None:
        self.layout, self.specs, self.tied, self.sides = layout, specs, tied, sides
        self.operations: dict[str, list[Operation]] = {}
        self.unties: dict[str, str] = {}
        self.added: dict[str, TensorSpec] = {}
        self.config: dict[str, Any] = {}

    def site(self, site: Site, map_: AffineMap) -> None:
        if exactness(site, self.layout) == "hook-only":
            raise NotFoldable(
                f"{site} is a residual stream: every later layer still receives what earlier layers wrote, so no weight equals an "
                f"edit there. Edit the writers ({site.layer}.attn.out, {site.layer}.mlp.out), or use edit.hooked(subject)"
            )
        if site.point is Point.RESID_PRE:
            self._embeddings(map_)
            return
        branch = self.layout.branch(site.layer, site.point)
        if site.point is branch.inner:
            self._neurons(site, branch, map_)
        else:
            self._out(site, branch, map_)

    def delta(self, delta: Delta, any_model: bool) -> None:
        """Add the differences of a delta."""
        start = {} if any_model else delta.provenance.get("start", {})
        for name, value in delta.tensors.items():
            for view, piece in _placed(name, value, self.layout, self.specs):
                if view.tensor in (*self.unties, *self.unties.values()):
                    raise NotFoldable(
                        f"an edit before the delta unties {view.tensor}, which was one tensor when the delta was trained; apply "
                        "the delta first, or carry them out one after the other"
                    )
                whole = piece is value and not self.operations.get(view.tensor)
                known = start.get(name) if whole else None
                self.operations.setdefault(view.tensor, []).append(Operation("add", view, constant=piece, start=known))

    def _add(self, operation: Operation) -> None:
        reads = {name for name in (operation.gain, operation.weight and operation.weight.tensor) if name}
        stale = [n for n in reads if any(op.kind == "add" for op in self.operations.get(n, ()))]
        if stale:
            raise NotFoldable(
                f"the edit of {operation.view.tensor} depends on {stale[0]}, which a delta before it changes; carry them out one "
                "after the other: apply(edit, apply(delta, subject))"
            )
        self.operations.setdefault(operation.view.tensor, []).append(operation)

    def _neurons(self, site: Site, branch: Branch, map_: AffineMap) -> None:
        offset = map_.offset
        for part in branch.parts:
            if branch.routed:
                assert isinstance(map_, Diagonal)
                piece: AffineMap = Diagonal(map_.scale[part.start : part.stop])
            else:
                piece = map_
            self._add(Operation("inputs", part.out, piece))
            if isinstance(piece, Diagonal) and piece.is_mask and self.sides == "all":
                self._silence(branch, part.readers, piece.kept)
        if offset is not None:
            bias = self._bias(site, branch, "a fill value other than zero (use fill='zero')")
            self._add(Operation("carry", MatrixView(bias), constant=offset, weight=branch.parts[0].out))

    def _silence(self, branch: Branch, readers: tuple[MatrixView, ...], kept: Tensor) -> None:
        """Zero the rows that feed pruned neurons; a value row only when every query head that shares it is pruned."""
        if branch.group > 1:
            kept = rearrange(kept, "(kv g e) -> kv g e", g=branch.group, e=branch.head_width).any(1).reshape(-1)
        if bool(kept.all()):
            return
        for view in readers:
            self._add(Operation("outputs", view, Diagonal.mask(kept)))

    def _out(self, site: Site, branch: Branch, map_: AffineMap) -> None:
        offset = map_.offset
        gain = {"gain": branch.gain, "unit_gain": self.layout.architecture.unit_gain}
        if offset is not None and branch.gain is not None:
            raise NotFoldable(
                f"{site} follows the post-norm {branch.gain}, which has no bias to hold the map's offset; "
                "fit without a center (affine=False), or use the hook"
            )
        for part in branch.parts:
            self._add(Operation("outputs", part.out, map_, **gain))  # type: ignore[arg-type]
        if offset is not None:
            bias = self._bias(site, branch, "the map's offset (fit without a center, affine=False)")
            self._add(Operation("outputs", MatrixView(bias), map_, constant=offset))
        elif branch.bias is not None or (branch.bias_name in self.added):
            self._add(Operation("outputs", MatrixView(str(branch.bias_name)), map_, **gain))  # type: ignore[arg-type]

    def _bias(self, site: Site, branch: Branch, reason: str) -> str:
        """The bias of a writer; adds the family's biases (as zeros, in every layer) where a config flag allows."""
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
        """0.resid.pre is the sum of the embeddings: each takes the linear part, the token table takes the offset."""
        offset = map_.offset
        tokens, *others = self.layout.embeddings
        scale = self.layout.width**0.5 if self.layout.architecture.embedding_scaled else 1.0
        self._add(
            Operation(
                "outputs",
                MatrixView(tokens, transposed=True),
                map_,
                constant=None if offset is None else offset / scale,
            )
        )
        for name in others:
            self._add(Operation("outputs", MatrixView(name, transposed=True), map_))
        if not self.layout.architecture.tied:
            return
        if self.tied == "untie" and any(op.kind == "add" for op in self.operations[tokens]):
            raise NotFoldable(
                f"the edit unties {tokens}, which a delta before it changes; carry them out one after the other: apply(edit, "
                "apply(delta, subject))"
            )
        if self.tied == "untie":
            self.config["tie_word_embeddings"] = False
            self.unties[self.layout.head] = tokens
        elif self.layout.head in self.specs:
            # Files may hold the head although it is tied; transformers unties the two where their values differ.
            self.operations[self.layout.head] = [
                replace(op, view=replace(op.view, tensor=self.layout.head)) for op in self.operations[tokens]
            ]


def _placed(name: str, value: Tensor, layout: ModelLayout, specs: Specs) -> Iterator[tuple[MatrixView, Tensor]]:
    """Where a store holds a tensor that has a name in memory, and the part of the tensor that belongs there.

    Raises:
        FingerprintError: if the store has no such tensor, or one of another shape.
    """
    architecture = layout.architecture
    found = next((n for n in _aliases(name, architecture) if n in specs), None)
    pieces = [(MatrixView(found), value)] if found else list(_experts(name, value, architecture, specs))
    if found == layout.embeddings[0] and architecture.tied and layout.head in specs:
        # Both names are written: files may hold the head although it is tied.
        pieces.append((MatrixView(layout.head), value))
    for view, piece in pieces:
        shape = specs[view.tensor].shape
        if tuple(piece.shape) != tuple(shape):
            raise FingerprintError(
                f"the delta was made for another model: its {name} has shape {tuple(piece.shape)}, {view.tensor} here has {tuple(shape)}"
            )
    if not pieces:
        raise FingerprintError(
            f"the delta was made for another model: no tensor is called {name!r} here; {nearest(name, specs)}"
        )
    yield from pieces


def _aliases(name: str, architecture: Architecture) -> Iterator[str]:
    """Names that files may give to a tensor: without the backbone's, and with the expert layer's of its family on disk."""
    row = architecture.experts
    for known in (name, name.removeprefix(f"{architecture.base}.")):
        yield known
        if row is not None:
            yield known.replace(f".{row.block}.", f".{row.down.partition('.experts')[0]}.")


def _experts(name: str, value: Tensor, architecture: Architecture, specs: Specs) -> Iterator[tuple[MatrixView, Tensor]]:
    """The parts of fused experts, which lie on disk as one tensor an expert."""
    row = architecture.experts
    block, _, leaf = name.rpartition(f".{row.module}.") if row else ("", "", "")
    if row is None or leaf not in ("gate_up_proj", "down_proj"):
        return
    if f"{block}.{row.down.format(e=0)}" not in specs:
        block = block.removeprefix(f"{architecture.base}.")
    names = (row.gate, row.up) if leaf == "gate_up_proj" else (row.down,)
    for e, expert in enumerate(value):
        for path, part in zip(names, expert.chunk(len(names)), strict=True):
            stored = f"{block}.{path.format(e=e)}"
            if stored in specs:
                yield MatrixView(stored), part
