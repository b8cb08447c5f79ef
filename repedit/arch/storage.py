"""Where the files of a checkpoint hold each tensor of a model.

transformers renames tensors when it loads a checkpoint, stacks one tensor an expert, joins and divides projections. The
answers come from its own table of conversions, so that a new model type needs no line here. Nothing is guessed: a tensor
that is converted in another way, or whose shapes do not fit, has no pieces and a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

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


@dataclass(frozen=True)
class StoredIn:
    """Where files hold a tensor of a model: whole, or in pieces that cover it."""

    pieces: tuple[Piece, ...]
    reason: str = ""
    """Why there are no pieces: the operations of the conversion, or the shape that does not fit."""


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
    conversion = sources[0].conversion
    if any(source.conversion is not conversion for source in sources) or (conversion is None and len(sources) > 1):
        # transformers reads one of them, and the values under the other name would stay in the files.
        return StoredIn((), f"the files hold it under two names: {sources[0].name} and {sources[-1].name}")
    pieces = [Piece(sources[0].name)] if conversion is None else _pieces(conversion, sources, shape, specs)
    if conversion is not None and not pieces:
        return StoredIn((), f"transformers converts it by {', '.join(map(str, conversion.operations))}")
    for piece in pieces:
        needed, rest = list(shape if piece.expert is None else shape[1:]), 0
        if piece.parts * piece.stored_parts > 1:
            needed[piece.axis], rest = divmod(needed[piece.axis] * piece.stored_parts, piece.parts)
        if piece.transposed:
            needed[-2:] = needed[:-3:-1]
        if rest or specs[piece.name].shape != tuple(needed):
            stored = specs[piece.name].shape
            return StoredIn((), f"{piece.name} of shape {stored} does not fit the tensor of shape {shape} in memory")
    count = pieces[0].parts * (1 if pieces[0].expert is None else shape[0])
    if len(pieces) != count or any(piece.expert is not None and piece.expert >= shape[0] for piece in pieces):
        named = f"{len(pieces)} tensors from {pieces[0].name} to {pieces[-1].name}"
        return StoredIn((), f"{named} do not make up the tensor of shape {shape} in memory")
    return StoredIn(tuple(pieces))


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
            joined = {"parts": len(tensors), "axis": dim - stacked}
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
    entries: dict[str, StoredIn] = {}
    for names in groups.values():
        held = [result[name] for name in names if name in result]
        entries |= {name: held[0] for name in names if held and name not in result}
    return entries


def _slice(tensor: Tensor, axis: int, part: int, parts: int) -> Tensor:
    return tensor if parts == 1 else tensor.chunk(parts, axis)[part]
