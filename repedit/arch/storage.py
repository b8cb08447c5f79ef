"""Where the files of a checkpoint hold each tensor of a model.

transformers renames tensors when it loads a checkpoint, stacks one tensor an expert, joins and divides projections. The
answers come from its own table of conversions, so that a new model type needs no line here. Nothing is guessed: a tensor
that is converted in another way, or whose shapes do not fit, has no pieces and a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from repedit.arch.layout import MatrixView
from repedit.io.safetensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in memory, and the tensor on disk that holds it."""

    name: str
    """The tensor on disk."""
    expert: int | None = None
    """The index on the first axis of the tensor in memory; None if the piece covers all of them."""
    part: int = 0
    """Which of `parts` equal slices along `axis` of the tensor in memory, or of the expert's matrix in it."""
    parts: int = 1
    axis: int = 0
    """Of an expert's matrix where there is one: [gate; up] of shape (2f, d) is divided along axis 0."""
    transposed: bool = False
    """Whether the last two axes are exchanged on disk."""
    stored_part: int = 0
    """Which of `stored_parts` equal slices along `axis` of the tensor on disk; the others belong to other tensors."""
    stored_parts: int = 1

    def in_memory(self, tensor: Tensor) -> Tensor:
        """The piece as a view of the tensor in memory."""
        return _slice(tensor if self.expert is None else tensor[self.expert], self.axis, self.part, self.parts)

    def on_disk(self, stored: Tensor) -> Tensor:
        """The piece as a view of the tensor on disk, in the shape that it has in memory."""
        return _slice(stored.mT if self.transposed else stored, self.axis, self.stored_part, self.stored_parts)

    @property
    def whole(self) -> bool:
        """Whether the tensor on disk is the tensor in memory, but for its name."""
        return self == Piece(self.name)


@dataclass(frozen=True)
class StoredIn:
    """Where files hold a tensor of a model: whole, or in pieces that cover it."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]
    """In memory: that of the pieces, which the config may contradict, or that of the model if there are none."""
    names: tuple[str, ...]
    """The tensors on disk that hold it."""
    reason: str = ""
    """Why there are no pieces: the operations of the conversion, or the shape that does not fit."""
    tied: str = ""
    """The tensor in memory that the files hold in its place."""

    def read(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor in memory, made of its pieces; there must be some.

        Args:
            read: the name of a tensor on disk -> the tensor.
        """
        if len(self.pieces) == 1:
            return self.pieces[0].on_disk(read(self.pieces[0].name))
        result = torch.empty(self.shape, dtype=read(self.pieces[0].name).dtype)
        for piece in self.pieces:
            piece.in_memory(result).copy_(piece.on_disk(read(piece.name)))
        return result

    def view(self, view: MatrixView) -> MatrixView | None:
        """The view of a tensor on disk that shows what a view of the tensor in memory shows; None if no view does."""
        for piece in (
            self.pieces if view.expert is None else [p for p in self.pieces if p.expert in (None, view.expert)]
        ):
            fused = view.expert is not None and piece.expert is None
            shape = self.shape if piece.expert is None else self.shape[1:]
            rows = fused + (view.transposed and len(shape) - fused == 2)
            new = replace(
                view,
                tensor=piece.name,
                expert=view.expert if fused else None,
                transposed=view.transposed != piece.transposed,
            )
            if piece.parts * piece.stored_parts == 1:
                return new
            size, part = (shape[rows] - view.start) // view.parts, shape[rows] // piece.parts
            same = (view.start + view.part * size, size) == (piece.part * part, part)
            if same and view.groups == 1 and piece.axis == rows:
                return replace(new, start=0, parts=piece.stored_parts, part=piece.stored_part)
        return None


class StoredSpecs(dict[str, TensorSpec]):
    """Shape and dtype of the parameters of a model by their name in memory, and the files that hold them.

    Shapes are those of the files, which need not be those of the config.
    """

    @classmethod
    def of(cls, model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> StoredSpecs:
        """Of a model, which may be on the meta device, and the specs of every tensor on disk."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return cls({name: entry for name, entry in storage(model, specs).items() if name in parameters}, specs)

    def __init__(self, stored: Mapping[str, StoredIn], specs: Mapping[str, TensorSpec]) -> None:
        super().__init__({name: TensorSpec(entry.shape, specs[entry.names[0]].dtype) for name, entry in stored.items()})
        self.stored = stored
        used = {name for entry in stored.values() for name in entry.names}
        self.files = {name: spec for name, spec in specs.items() if name in used}
        """Shape and dtype of the tensors on disk that the model reads."""

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor | None:
        """A tensor by its name in memory; None if the files hold none, or no pieces of it."""
        entry = self.stored.get(name)
        return entry.read(read) if entry is not None and entry.pieces else None


def storage(model: PreTrainedModel, specs: Mapping[str, TensorSpec]) -> dict[str, StoredIn]:
    """Where the files of a checkpoint hold each tensor of a model, by its name in memory.

    A tensor that the files lack has no entry, unless it is tied to one that they hold. Tensors on disk that transformers
    ignores are in no piece.

    Args:
        model: may be on the meta device.
        specs: shape and dtype of the tensors on disk by name, as `open_shards(directory).specs` has them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    result = {name: _stored_in(sources, shapes[name], specs) for name, sources in _sources(model, specs).items()}
    return result | _tied(model, result)


class _Source(NamedTuple):
    """A tensor on disk that goes into a tensor in memory."""

    name: str
    conversion: WeightConverter | None
    """What transformers does with it; None if it is only renamed."""
    pattern: str | None = None
    """Which of the patterns of the conversion the name matches."""
    target: int = 0
    """Which of the results of the conversion the tensor in memory is."""


def _sources(model: PreTrainedModel, names: Iterable[str]) -> dict[str, list[_Source]]:
    """The tensors on disk by the name in memory that they go into.

    This follows `convert_and_load_state_dict_in_model` of transformers step by step, in its order, which numbers the experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, in_memory = model.base_model_prefix, model.state_dict()
    sources: dict[str, list[_Source]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, in_memory)
        if renamed not in in_memory and name in in_memory:
            renamed, pattern = rename_source_key(name, [], [], prefix, in_memory)
        conversion = None if pattern is None else by_pattern[pattern]
        targets = [""] if conversion is None else conversion.target_patterns
        for i, target in enumerate(targets if renamed in in_memory else ()):
            target_name = renamed.replace(targets[0], target, 1)
            if target_name in in_memory:
                sources.setdefault(target_name, []).append(_Source(name, conversion, pattern, i))
    return sources


def _stored_in(sources: Sequence[_Source], shape: tuple[int, ...], specs: Mapping[str, TensorSpec]) -> StoredIn:
    """The pieces if they have the shapes on disk that cover a tensor of this shape in memory."""
    names, conversion = tuple(source.name for source in sources), sources[0].conversion
    without = StoredIn((), shape, names)
    if any(source.conversion is not conversion for source in sources) or (conversion is None and len(sources) > 1):
        # transformers reads one of them, and the values under the other name would stay in the files.
        return replace(without, reason=f"the files hold it under two names: {names[0]} and {names[-1]}")
    pieces = [Piece(names[0])] if conversion is None else _pieces(conversion, sources, shape, specs)
    if conversion is not None and not pieces:
        operations = ", ".join(map(str, conversion.operations))
        return replace(without, reason=f"transformers converts it by {operations}")
    shapes = [_shape_in_memory(piece, specs[piece.name].shape, shape[:1]) for piece in pieces]
    whole = shapes[0] if shapes[0] and len(shapes[0]) == len(shape) else shape
    other = next((piece.name for piece, made in zip(pieces, shapes, strict=True) if made != whole), None)
    if other is not None:
        reason = f"{other} of shape {specs[other].shape} does not fit the tensor of shape {whole} in memory"
        return replace(without, reason=reason)
    count = pieces[0].parts * (1 if pieces[0].expert is None else shape[0])
    if len(pieces) != count or any(piece.expert is not None and piece.expert >= shape[0] for piece in pieces):
        named = f"{len(pieces)} tensors from {pieces[0].name} to {pieces[-1].name}"
        return replace(without, reason=f"{named} do not make up the tensor of shape {shape} in memory")
    return StoredIn(tuple(pieces), whole, names)


def _shape_in_memory(piece: Piece, stored: tuple[int, ...], experts: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the tensor that pieces of this shape on disk make up; None if it cannot be divided so."""
    shape, rest = list(stored), 0
    if piece.transposed:
        shape[-2:] = shape[:-3:-1]
    if piece.parts * piece.stored_parts > 1:
        shape[piece.axis], rest = divmod(shape[piece.axis] * piece.parts, piece.stored_parts)
    return None if rest else (*(experts if piece.expert is not None else ()), *shape)


def _pieces(
    conversion: WeightConverter, sources: Sequence[_Source], shape: tuple[int, ...], specs: Mapping[str, TensorSpec]
) -> list[Piece]:
    """The pieces that a conversion of the sources makes a tensor of; none if it is not understood."""
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose

    # Parts are joined in the order of the patterns, which need not be the order of the names.
    grouped = [[source.name for source in sources if source.pattern == p] for p in conversion.source_patterns]
    match conversion.operations[0]:
        case MergeModulelist(dim=0):
            stacked, tensors = 1, [[Piece(name, i) for i, name in enumerate(names)] for names in grouped if names]
        case _:
            stacked, tensors = 0, [[Piece(name)] for names in grouped for name in names]
    parts = len(conversion.target_patterns)
    match conversion.operations[stacked:]:
        case [Chunk(dim=dim, num_shards_attribute=None)] if not stacked:
            return [replace(p, axis=dim, stored_part=sources[0].target, stored_parts=parts) for [p] in tensors]
        case _ if parts > 1:
            return []
        case []:
            return [piece for pieces in tensors for piece in pieces]
        case [Concatenate(dim=dim)] if dim >= stacked:
            joined = {"parts": len(tensors) + sum(not names for names in grouped), "axis": dim - stacked}
            return [replace(piece, part=i, **joined) for i, pieces in enumerate(tensors) for piece in pieces]
        case [Transpose(dim0=a, dim1=b) as operation] if not stacked and {a, b} == {len(shape) - 2, len(shape) - 1}:
            keep = operation.check_dims and specs[sources[0].name].shape == shape
            return [replace(piece, transposed=not keep) for [piece] in tensors]
    return []


def _tied(model: PreTrainedModel, result: Mapping[str, StoredIn]) -> dict[str, StoredIn]:
    """Entries of the names that the files lack and that are tied to a tensor that they hold."""
    groups: dict[str, list[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(name)
    held = ((names, [name for name in names if name in result]) for names in groups.values())
    return {n: replace(result[own[0]], tied=own[0]) for names, own in held if own for n in names if n not in result}


def _slice(tensor: Tensor, axis: int, part: int, parts: int) -> Tensor:
    return tensor if parts == 1 else tensor.chunk(parts, axis)[part]
