"""A plan: which stored tensors an edit changes and how, made from names and shapes alone.

`Plan.apply` is pure; `rewrite.apply` carries a plan out on a model in memory, and `rewrite.export` on checkpoint files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from repedit.arch import MatrixView, Specs, TensorSpec
from repedit.arch.storage import Piece, StoredIn, StoredSpecs
from repedit.arguments import checked
from repedit.errors import DtypeError, FingerprintError, NotFinite, NotFoldable, PlanMismatch
from repedit.hashing import value_hash
from repedit.linear_maps import AffineMap, not_finite_at
from repedit.sites import Site

TensorReader = Callable[[str], Tensor]
"""Name -> the tensor before the plan."""


class LoweringOptions(TypedDict, total=False):
    """Options of `repedit.lower.lower`, which every function that takes an edit passes on."""

    tied: Literal["untie", "both"]
    """What happens to an output head that is tied to an edited embedding: "untie" keeps the head, "both" edits it too."""
    sides: Literal["all", "output"]
    """Whether the rows that feed a pruned neuron are zeroed too, or only the columns it writes with."""
    any_model: bool
    """Accept weights other than those the edit or delta was made for."""


# --- Operations on one tensor


@dataclass(frozen=True, eq=False)
class Operation:
    """One change of a logical matrix W (out, in), or of a bias b read as (out, 1).

    "outputs": W -> M W, or D^-1 M D W with D the gain of a post-norm, plus `constant` on every column.
    "inputs":  W -> W M.
    "carry":   b -> b + W c, with W read from `weight` and c the `constant`: a constant input moved into the bias.
    "gain":    g -> 1 where g is zero or too small to divide by; the rows of W that it multiplied become zero.
    "add":     W -> W + D, with D the `constant`, in the shape of the view.
    """

    kind: Literal["outputs", "inputs", "carry", "add", "gain"]
    view: MatrixView
    map: AffineMap | None = None
    constant: Tensor | None = None
    weight: MatrixView | None = None
    gain: str | None = None
    """Weight of the norm that follows."""
    inner_gain: str | None = None
    """Weight of a norm before that one, when outputs of several projections are normalised apart and then together."""
    unit_gain: bool = False
    start: str | None = None
    """Hash of the values that a difference was computed from; other values are refused."""

    def __call__(self, tensor: Tensor, read: TensorReader) -> None:
        """Apply the change to `tensor`, in place.

        Raises:
            FingerprintError: if a difference was computed from other values.
        """
        if self.kind == "add":
            self._add(tensor)
        elif self.kind == "gain":
            unit = 1.0 if self.unit_gain else 0.0
            tensor[_too_small(tensor + unit)] = 1.0 - unit
        else:
            self.view.change(tensor, lambda w: self._edited(w, read))

    def describe(self) -> str:
        """A short description for the summary."""
        if self.kind == "add":
            return "add: a difference found by training"
        if self.kind == "gain":
            return "gain: 1 where it was 0"
        what = f"{type(self.map).__name__} of rank {self.map.rank_removed}" if self.map else "constant"
        return f"{self.kind}: {what}" + (f" within gain {' and '.join(self.gains)}" if self.gains else "")

    def _add(self, tensor: Tensor) -> None:
        assert self.constant is not None
        if self.start is not None and value_hash(tensor) != self.start:
            raise FingerprintError(
                f"{self.view.tensor} holds other values (hash {value_hash(tensor)}) than those the difference was trained from "
                f"({self.start}): this is another model, or an edited one; pass any_model=True to add it anyway"
            )
        if self.view == MatrixView(self.view.tensor):
            tensor += self.constant.to(tensor)
        else:
            self.view.change(tensor, lambda w: w + self.constant.to(w).reshape(w.shape))  # type: ignore[union-attr]

    def _edited(self, w: Tensor, read: TensorReader) -> Tensor:
        if self.kind == "carry":
            assert self.weight is not None and self.constant is not None
            carried = self.weight.read(read(self.weight.tensor)).to(w) @ self.constant.to(w)
            # One value per output; those of a convolution's kernel add up, because all of them see the constant.
            return w + carried.reshape(len(w), -1).sum(1, keepdim=True)
        assert self.map is not None
        if self.kind == "inputs":
            return self.map.right(w, out=w)
        gain = self.gain_of(read, w)
        if gain is None:
            out = self.map.left(w, out=w)
        else:
            scaled = w * self._stored_gain(read, w)
            out = self.map.left(scaled, out=scaled).div_(gain)
        return out if self.constant is None else out + self.constant.to(out)[:, None]

    def gain_of(self, read: TensorReader, like: Tensor) -> Tensor | None:
        """The gain of the post-norm as a column, with 1 in place of values too small to divide by; None without a norm."""
        if not self.gains:
            return None
        gain = self._stored_gain(read, like)
        return torch.where(_too_small(gain), 1.0, gain)

    @property
    def gains(self) -> tuple[str, ...]:
        """The weights of the norms that follow."""
        return tuple(name for name in (self.inner_gain, self.gain) if name)

    def _stored_gain(self, read: TensorReader, like: Tensor) -> Tensor:
        product = torch.ones_like(like[:, :1])
        for name in self.gains:
            product = product * (read(name).to(like) + (1.0 if self.unit_gain else 0.0))[:, None]
        return product


def _too_small(gain: Tensor) -> Tensor:
    # A row divided by a gain of 1e-30 overflows in the norm's mean square; float32 keeps 7 digits of the others beside 1e-6.
    return gain.abs() <= 1e-6 * gain.abs().max()


class Resize(ABC):
    """A change of a stored tensor's shape, after its operations."""

    @abstractmethod
    def __call__(self, tensor: Tensor, read: TensorReader) -> Tensor:
        """The tensor in its new shape, in the same dtype."""

    @abstractmethod
    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The new shape."""

    def of_piece(self, piece: Piece, stored: TensorSpec, name: Callable[[str], str]) -> Resize:
        """The same change of a tensor on disk, which holds a piece of the tensor in memory.

        Args:
            name: the name in memory of another tensor -> its name on disk.
        """
        return self

    @abstractmethod
    def describe(self) -> str:
        """A short description for the summary."""


# --- The plan of a whole model


@dataclass(frozen=True, eq=False)
@checked
class Plan:
    """Operations by tensor name, with everything else that must change."""

    operations: Mapping[str, tuple[Operation, ...]]
    exactness: Mapping[Site, str]
    store: Literal["live", "disk"]
    """Whether names are those of a model in memory or of checkpoint files."""
    unties: Mapping[str, str] = field(default_factory=dict)
    """Output head -> embedding whose original values the head keeps if it has no values of its own."""
    added: Mapping[str, TensorSpec] = field(default_factory=dict)
    """New tensors (biases), which start at zero."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the model's config that change."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[Site, str] = field(default_factory=dict)
    """Description of the map at each site."""
    ranks: Mapping[Site, int] = field(default_factory=dict)
    """Directions removed at each site."""
    resized: Mapping[str, Resize] = field(default_factory=dict)
    """Tensors whose shape changes."""
    structure: Literal["keep", "slim", "slice"] = "keep"
    """Whether the model keeps its shape, loses neurons and heads, or gets a narrower residual stream."""
    stream: tuple[int, int] | None = None
    """Width of the residual stream before and after, if it is sliced."""

    @property
    def rewritten(self) -> tuple[str, ...]:
        """Tensors whose values `apply` computes."""
        return tuple(dict.fromkeys([*self.operations, *self.resized]))

    @property
    def touched(self) -> frozenset[str]:
        """Every tensor that is written, added or untied."""
        return frozenset(self.rewritten) | frozenset(self.added) | frozenset(self.unties)

    @checked
    def check(self, specs: Specs) -> None:
        """Refuse a model or checkpoint that lacks a planned tensor.

        Raises:
            PlanMismatch: naming the tensors.
        """
        absent = sorted(set(self.rewritten) - set(specs) - set(self.added) - set(self.unties))
        if absent:
            raise PlanMismatch(
                f"the plan names tensors this {self.store} store does not hold: {absent[:5]} ({len(absent)} in all)"
            )

    @checked
    def check_touched(self, names: AbstractSet[str], ignore: AbstractSet[str] = frozenset()) -> None:
        """Refuse other tensors than those planned.

        Args:
            names: the tensors that were written, added or untied.
            ignore: names to leave out of the comparison.
        Raises:
            PlanMismatch: naming the tensors.
        """
        missed, extra = sorted(self.touched - names - ignore), sorted(names - self.touched - ignore)
        if missed or extra:
            raise PlanMismatch(f"planned but untouched: {missed[:5]}; touched but not planned: {extra[:5]}")

    @checked
    def resolved(self, read: TensorReader) -> Plan:
        """The plan for the actual gains of post-norms: a gain of 0 becomes 1, and the row of the weight before it 0.

        Raises:
            NotFoldable: if two edits of one tensor pass such a norm, or another operation changes the norm.
        """
        gains: dict[str, Operation] = {}
        for name, operations in self.operations.items():
            folded = [
                op
                for op in operations
                if op.gains and bool(_too_small(op._stored_gain(read, read(op.gains[0])[:, None])).any())
            ]
            if len(folded) > 1 or any(len(op.gains) > 1 or op.gains[0] in self.operations for op in folded):
                raise NotFoldable(
                    f"{name} passes the post-norm {folded[0].gains[0]}, some of whose gains are 0, more than once in this plan; apply "
                    "the edits one after the other: apply(b, apply(a, subject))"
                )
            gains |= {op.gains[0]: Operation("gain", MatrixView(op.gains[0]), unit_gain=op.unit_gain) for op in folded}
        if not gains:
            return self
        return replace(self, operations={**self.operations, **{name: (op,) for name, op in gains.items()}})

    @checked
    def apply(self, name: str, tensor: Tensor, read: TensorReader) -> Tensor:
        """The tensor after the plan; computed in float32 (float64 for float64) and rounded once.

        Args:
            read: gives other tensors as they were before the plan (the weight of a bias, the gain of a norm).
        Raises:
            NotFinite: if the tensor is not finite, or the result is not in the tensor's dtype.
        """
        return cast_tensor(name, self.computed(name, tensor, read), tensor.dtype)

    @checked
    @torch.no_grad()
    def computed(self, name: str, tensor: Tensor, read: TensorReader, out: Tensor | None = None) -> Tensor:
        """The tensor after the plan before it is rounded: float32, or float64 for float64 and for counts.

        Args:
            out: memory to compute in, at least as many float32 numbers; new memory costs more than the arithmetic.
        Raises:
            NotFinite: if the tensor is not finite. DtypeError: if it holds integers, to which no map applies.
        """
        check_finite_tensor(name, tensor)
        if not tensor.is_floating_point() and any(op.kind != "add" for op in self.operations.get(name, ())):
            raise DtypeError(
                f"{name} holds {tensor.dtype}, and an edit changes floating-point weights only; is it quantised?"
            )
        wide = torch.float32 if tensor.is_floating_point() and tensor.dtype != torch.float64 else torch.float64
        if out is None or out.dtype != wide:
            work = tensor.detach().to(wide, copy=True)
        else:
            work = out[: tensor.numel()].view(tensor.shape).copy_(tensor.detach())
        for operation in self.operations.get(name, ()):
            operation(work, read)
        return self.resized[name](work, read) if name in self.resized else work

    @checked
    def spec(self, name: str, before: TensorSpec) -> TensorSpec:
        """Shape and dtype of a tensor after the plan."""
        return replace(before, shape=self.resized[name].shape(before.shape)) if name in self.resized else before

    @checked
    def describe(self, name: str) -> list[str]:
        """What is done to a tensor, in order."""
        resize = [self.resized[name].describe()] if name in self.resized else []
        return [operation.describe() for operation in self.operations.get(name, ())] + resize

    @checked
    def summary(self, specs: Specs | None = None) -> str:
        """A dry run: what applying the plan would do."""
        lines = [f"{site}: {self.maps.get(site, 'edited')}; {kind}" for site, kind in self.exactness.items()]
        total = 0
        for name in sorted(self.rewritten):
            before, changes = (specs or {}).get(name) or self.added.get(name), self.describe(name)
            spec = self.spec(name, before) if before else None
            total += spec.nbytes if spec else 0
            lines.append(
                f"  {name} {tuple(spec.shape) if spec else ''} {changes[-1 if name in self.resized else 0]}"
                + (f" and {len(changes) - 1} more" if len(changes) > 1 else "")
            )
        lines += [f"  {head}: untied, keeps the original {source}" for head, source in self.unties.items()]
        lines += [f"  {name}: added" for name in sorted(set(self.added) - set(self.rewritten))]
        lines += [f"config: {key} = {json.dumps(value)}" for key, value in self.config.items()]
        return "\n".join([*lines, f"{len(self.touched)} tensors touched, {total / 1e6:.1f} MB rewritten"])


# --- The plan for the files of a checkpoint


def plan_for_files(plan: Plan, specs: Specs) -> Plan:
    """A plan that names tensors on disk, if the specs are those of files; otherwise the plan itself.

    Raises:
        NotFoldable: if files hold an edited tensor in a form in which it cannot be edited.
    """
    if not isinstance(specs, StoredSpecs):
        return plan
    files = _Files(plan, specs)
    operations: dict[str, list[Operation]] = {}
    for name in plan.operations:
        for operation in files.operations(name):
            operations.setdefault(operation.view.tensor, []).append(operation)
    return replace(
        plan,
        operations={name: tuple(several) for name, several in operations.items()},
        resized=dict(resize for name in plan.resized for resize in files.resized(name)),
        unties={files.name(head): files.name(embedding) for head, embedding in plan.unties.items()},
        added={files.name(name): spec for name, spec in plan.added.items()},
        store="live" if all(files.same(name) for name in plan.rewritten) else "disk",
    )


class _Files:
    """Where the files of a checkpoint hold what a plan names."""

    def __init__(self, plan: Plan, specs: StoredSpecs) -> None:
        self.plan, self.specs = plan, specs

    def same(self, name: str) -> bool:
        """Whether a tensor has the same name and form on disk."""
        return self._new(name) == name or self._entry(name).pieces == (Piece(name),)

    def name(self, name: str) -> str:
        """The tensor on disk that is a whole tensor in memory."""
        view = self.view(MatrixView(name))
        if view != MatrixView(view.tensor):
            raise self._unsupported(name)
        return view.tensor

    def view(self, view: MatrixView) -> MatrixView:
        """The view of a tensor on disk that shows the same."""
        new = self._new(view.tensor)
        result = replace(view, tensor=new) if new is not None else self._entry(view.tensor).view(view)
        if result is None:
            raise self._unsupported(view.tensor)
        return result

    def operations(self, name: str) -> Iterator[Operation]:
        """The operations on a tensor, on the tensors on disk that hold it."""
        if self._new(name) is None and self._entry(name).tied in self.plan.operations:
            return  # the tied tensor has the same operations, and the files hold one of the two
        for op in self.plan.operations[name]:
            if op.kind == "add" and op.view == MatrixView(name):
                yield from self._additions(name, op)
                continue
            gain, inner = (None if n is None else self.name(n) for n in (op.gain, op.inner_gain))
            weight = None if op.weight is None else self.view(op.weight)
            yield replace(op, view=self.view(op.view), weight=weight, gain=gain, inner_gain=inner)

    def _additions(self, name: str, op: Operation) -> Iterator[Operation]:
        assert op.constant is not None
        for piece in self._pieces(name):
            view = MatrixView(piece.name, parts=piece.stored_parts, part=piece.stored_part)
            if piece.stored_parts > 1 and (piece.axis or piece.transposed):
                raise self._unsupported(name)
            part = piece.in_memory(op.constant)
            # Another form has another hash.
            start = op.start if piece.whole else None
            yield replace(op, view=view, constant=part.mT if piece.transposed else part, start=start)

    def resized(self, name: str) -> Iterator[tuple[str, Resize]]:
        """The change of shape of a tensor, for the tensors on disk that hold it."""
        resize, new = self.plan.resized[name], self._new(name)
        for piece in self._pieces(name) if new is None else [Piece(new)]:
            if piece.transposed or piece.stored_parts > 1:
                raise self._unsupported(name)
            spec = self.specs.files.get(piece.name) or self.plan.added.get(name) or self.specs[name]
            yield piece.name, resize.of_piece(piece, spec, self.name)

    def _new(self, name: str) -> str | None:
        """The name of a tensor that the plan adds to the files; None for another one."""
        if name in self.plan.added:
            weight = self.name(f"{name.removesuffix('.bias')}.weight")
            return f"{weight.removesuffix('.weight')}.bias"
        held = name not in self.plan.unties or (name in self.specs and not self._entry(name).tied)
        return None if held else name

    def _entry(self, name: str) -> StoredIn:
        return self.specs.stored[name]

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        if not self._entry(name).pieces:
            raise self._unsupported(name)
        return self._entry(name).pieces

    def _unsupported(self, name: str) -> NotFoldable:
        reason = self._entry(name).reason or "the files divide it in another way than the edit does"
        return NotFoldable(
            f"{name} cannot be edited in the files ({', '.join(self._entry(name).names[:2])}): {reason}; edit the model in memory and "
            "save it: repedit.apply(edit, repedit.load(...)).model.save_pretrained(...)"
        )


def check_finite_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a stored tensor that is not finite.

    Raises:
        NotFinite: with the first index.
    """
    index = not_finite_at(tensor)
    if index is not None:
        raise NotFinite(f"{name} is not finite at {index}; the checkpoint is damaged, download it again")


def cast_tensor(name: str, tensor: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A tensor in another dtype; `out` is memory for it, if there is some.

    Raises:
        NotFinite: naming a value that the dtype cannot represent.
    """
    result = tensor.to(dtype) if out is None else out.copy_(tensor)
    if not_finite_at(result) is not None:
        index = tuple((~torch.isfinite(result)).nonzero()[0].tolist())
        raise NotFinite(
            f"{name} would hold {tensor[index].item():.6g} at {index}, and {dtype} holds finite numbers up to "
            f"{torch.finfo(dtype).max:.6g}; choose a wider dtype, or a smaller edit"
        )
    return result
