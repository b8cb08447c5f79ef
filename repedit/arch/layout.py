"""An architecture matched against the tensors of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from repedit.arch.spec import Architecture, BranchRow, Experts, Reader, Writer
from repedit.arguments import checked
from repedit.errors import UnknownArchitecture, UnknownSite, nearest
from repedit.io.safetensors import TensorSpec
from repedit.sites import Point, Site

# --- The logical matrix inside a stored tensor

Specs = Mapping[str, TensorSpec]
"""Shape and dtype by tensor name: all that a plan needs of a model."""


@dataclass(frozen=True)
@checked
class MatrixView:
    """A logical (out, in) matrix, or a vector of outputs, inside a stored tensor.

    The stored rows from `start` on are read as (groups, parts, size), and the view takes `part` of each group. With `kernel`
    the stored tensor is the (out, in, *kernel) of a convolution, read as ((out *kernel), in).
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    groups: int = 1
    parts: int = 1
    part: int = 0
    transposed: bool = False
    kernel: bool = False

    @checked
    def edit(self, stored: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy of the stored tensor in which this matrix is replaced by function(matrix); a vector becomes (out, 1)."""
        result = stored.clone()
        self.change(result, function)
        return result

    @checked
    def change(self, stored: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """The same in place; `function` may write into its argument, so that many experts in one tensor need no copies."""
        window = self._window(stored)
        if self.kernel:
            inputs = window.movedim(2, -1)
            inputs.copy_(function(inputs.flatten(0, -2).clone()).reshape(inputs.shape))
            return
        matrix = window.flatten(0, 1)
        matrix = matrix[:, None] if matrix.ndim == 1 else matrix
        new = function(matrix)
        if new.data_ptr() != window.data_ptr() or new.stride() != matrix.stride():
            window.copy_(new.reshape(window.shape))

    @checked
    def read(self, stored: Tensor) -> Tensor:
        """The matrix, or vector, itself."""
        window = self._window(stored)
        return window.movedim(2, -1).flatten(0, -2) if self.kernel else window.flatten(0, 1)

    def _window(self, stored: Tensor) -> Tensor:
        block = stored if self.expert is None else stored[self.expert]
        block = block.T if self.transposed and block.ndim == 2 else block
        return block[self.start :].unflatten(0, (self.groups, self.parts, -1))[:, self.part]


# --- An architecture matched against the tensors of one model
#
# Names are those in memory; only they and shapes are read. Every expected tensor must exist; a layer that matches in no way
# or in two ways is an error, never a choice.


@dataclass(frozen=True)
@checked
class Neurons:
    """Neurons start..stop of a branch: the columns they write with and the rows (and biases) that feed them."""

    start: int
    stop: int
    out: MatrixView
    readers: tuple[MatrixView, ...]
    writer: str
    """Module whose input holds the neurons; the fused experts module where `expert` is a number."""
    bias: MatrixView | None = None
    """Bias of the writer."""
    expert: int | None = None
    gain: str | None = None
    """Weight of the norm between the writer and the sum of its branch."""
    fused: Experts | None = None
    """The row of the fused experts where `expert` is a number."""


@dataclass(frozen=True)
@checked
class Branch:
    """One branch of one layer: attention, a mixer of tokens, an MLP or per-layer embeddings."""

    kind: str
    parts: tuple[Neurons, ...]
    """One for each projection or expert; together they cover 0..width."""
    outputs: tuple[str, ...]
    """Modules whose outputs add up to what is added to the stream."""
    bias_name: str | None
    """Name that a bias of the writer has or would have; None if several projections share the branch."""
    gain: str | None
    """Weight of the post-norm between the sum and the stream."""
    scale: float = 1.0
    """What multiplies the output before it is added."""
    head_width: int = 0
    group: int = 1
    """Query heads that share one value head."""

    @property
    def inner(self) -> Point:
        """The point of the neurons."""
        return Point(f"{self.kind}.neurons")

    @property
    def outer(self) -> Point:
        """The point of the output."""
        return Point(f"{self.kind}.out")

    @property
    def width(self) -> int:
        """The number of neurons."""
        return self.parts[-1].stop

    @property
    def routed(self) -> bool:
        """Whether a token passes some of the neurons only."""
        return any(part.expert is not None for part in self.parts)

    @property
    def writer(self) -> str:
        """The first module whose input holds neurons."""
        return self.parts[0].writer

    @property
    def by_writer(self) -> dict[str, list[Neurons]]:
        """The parts by the module whose input they are."""
        parts: dict[str, list[Neurons]] = {}
        for part in self.parts:
            parts.setdefault(part.writer, []).append(part)
        return parts

    @property
    def bias(self) -> str | None:
        """Bias tensor of the writer; None if it has none, or if several projections share the branch."""
        return self.parts[0].bias.tensor if len(self.parts) == 1 and self.parts[0].bias else None

    @property
    def plain(self) -> bool:
        """Whether the only writer's output is what the branch adds: nothing weights, scales or normalises it on the way."""
        return len(self.parts) == 1 and self.outputs == (self.writer,)

    @property
    def gains(self) -> tuple[str, ...]:
        """The weights of every norm between a writer and the stream."""
        return tuple(dict.fromkeys(gain for gain in (*(part.gain for part in self.parts), self.gain) if gain))


@dataclass(frozen=True)
@checked
class ModelLayout:
    """Every branch of every layer, with the names of tensors in memory."""

    architecture: Architecture
    width: int
    layers: tuple[tuple[Branch, ...], ...]
    """The branches of each layer in order."""
    block_paths: tuple[str, ...]
    embeddings: tuple[str, ...]
    head: str

    @property
    def parts(self) -> tuple[Neurons, ...]:
        """The neurons of every branch of every layer, in order."""
        return tuple(part for layer in self.layers for branch in layer for part in branch.parts)

    @checked
    def find(self, layer: int, point: Point) -> Branch | None:
        """The branch of a layer that holds a neurons or out point; None if the layer has none."""
        return next((b for b in self.layers[layer] if point in (b.inner, b.outer)), None)

    @checked
    def branch(self, layer: int, point: Point) -> Branch:
        """The branch of a layer that holds a neurons or out point.

        Raises:
            UnknownSite: if the layer has no such branch, with the layers that do.
        """
        branch = self.find(layer, point)
        if branch is None:
            having = [i for i in range(len(self.layers)) if self.find(i, point)]
            raise UnknownSite(
                f"{layer}.{point}: layer {layer} of this {self.architecture.model_type} has no {point}; its points are "
                f"{', '.join(self.points_at(layer))}; layers with {point}: {having}"
            )
        return branch

    @checked
    def points_at(self, layer: int) -> tuple[Point, ...]:
        """The points of one layer, in forward order."""
        branches = self.layers[layer]
        points = {Point.RESID_PRE, Point.RESID_POST, *(p for b in branches for p in (b.inner, b.outer))}
        if [b.kind for b in branches[1:2]] == ["mlp"] and branches[0].kind != "mlp" and not self.architecture.parallel:
            points.add(Point.RESID_MID)
        return tuple(sorted(points, key=lambda point: point.order))

    @cached_property
    def points(self) -> tuple[tuple[Point, ...], ...]:
        """The points of every layer."""
        return tuple(self.points_at(layer) for layer in range(len(self.layers)))

    @checked
    def routed(self, site: Site) -> bool:
        """Whether a site holds the neurons of experts, of which each token passes some, or of several projections."""
        branch = self.find(site.layer, site.point)
        return branch is not None and site.point is branch.inner and (branch.routed or len(branch.parts) > 1)

    @checked
    def width_of(self, layer: int, point: Point) -> int:
        """Size of the last axis at a point."""
        inner = {b.inner: b.width for b in self.layers[layer]}
        return inner.get(point, self.width)

    @property
    def embedding_scale(self) -> float:
        """What multiplies the token embedding in the forward pass."""
        scaled = self.architecture.embedding_scaled
        return self.width**0.5 if scaled is True else float(scaled or 1.0)


@checked
def match_layout(architecture: Architecture, specs: Specs) -> ModelLayout:
    """Match a resolved architecture against tensor names and shapes.

    Raises:
        UnknownArchitecture: if a tensor the row names is missing, a layer matches twice, or shapes contradict the config.
    """
    base = f"{architecture.base}." if architecture.base else ""
    blocks = f"{base}{architecture.blocks}"
    numbers = {int(m[1]) for name in specs if (m := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))}
    if numbers != set(range(architecture.n_layers)):
        raise UnknownArchitecture(
            f"the config has {architecture.n_layers} layers, the weights hold layers {sorted(numbers)} under {blocks!r}; "
            "is a shard missing?"
        )
    matcher = _Matcher(architecture, specs)
    block_paths = tuple(f"{blocks}.{layer}" for layer in sorted(numbers))
    layers = tuple(matcher.block(f"{path}.", layer) for layer, path in enumerate(block_paths))
    embeddings = tuple(matcher.need(f"{base}{name}.weight") for name in architecture.embeddings)
    return ModelLayout(
        architecture=architecture,
        width=specs[embeddings[0]].shape[1],
        layers=layers,
        block_paths=block_paths,
        embeddings=embeddings,
        head=f"{architecture.head}.weight",
    )


class _Matcher:
    """Finds the tensors of one block at a time."""

    def __init__(self, architecture: Architecture, specs: Specs) -> None:
        self.architecture, self.specs = architecture, specs

    def need(self, name: str) -> str:
        if name not in self.specs:
            raise UnknownArchitecture(
                f"tensor {name!r} of the {self.architecture.model_type} row is missing; {nearest(name, self.specs)}"
            )
        return name

    def block(self, block: str, layer: int) -> tuple[Branch, ...]:
        """The branches of a block: of the one list of the row whose writers this block holds."""
        alternatives, row = self.architecture.block, self.architecture
        heads = row.layer_heads[layer] if row.layer_heads else row.n_heads
        if len(alternatives) == 1:
            for writer in (w for row in alternatives[0] for w in row.writers if isinstance(w, Writer)):
                self.need(f"{block}{writer.module}.weight")
        # Experts alone are a part of experts with a shared expert, and a block without some readers of one that has them.
        matches = self._largest(alternatives, block, _writers)
        if len(alternatives) > 1 and len({frozenset(_writers(rows)) for rows in matches}) == 1:
            matches = self._largest(matches, block, _others)
        if len(matches) != 1:
            raise UnknownArchitecture(
                f"{block[:-1]} must match one way, it matches {len(matches)}: {'; '.join(map(_described, matches))}. The row of "
                f"{self.architecture.model_type} has {'; '.join(map(_described, alternatives))}"
            )
        return tuple(self._branch(block, row, heads if row.kind == "attn" else 0) for row in matches[0])

    def _largest(
        self, ways: Sequence[tuple[BranchRow, ...]], block: str, names: Callable[[tuple[BranchRow, ...]], set[str]]
    ) -> list[tuple[BranchRow, ...]]:
        """The lists of branches whose tensors a block holds, but for those whose tensors are a part of another's."""
        held = [rows for rows in ways if all(f"{block}{name}" in self.specs for name in names(rows))]
        return [rows for rows in held if not any(names(rows) < names(other) for other in held)]

    def _branch(self, block: str, row: BranchRow, heads: int) -> Branch:
        parts: list[Neurons] = []
        group = 1
        for writer in row.writers:
            more, group = self._parts(block, writer, parts[-1].stop if parts else 0, heads)
            parts += more
        only = row.writers[0].module if len(row.writers) == 1 and isinstance(row.writers[0], Writer) else None
        return Branch(
            kind=row.kind,
            parts=tuple(parts),
            outputs=tuple(f"{block}{module}" for module in row.ends),
            bias_name=f"{block}{only}.bias" if only else None,
            gain=self.need(f"{block}{row.norm}.weight") if row.norm else None,
            scale=float(row.scale),
            head_width=parts[0].stop // heads if heads else 0,
            group=group,
        )

    def _parts(self, block: str, row: Writer | Experts, start: int, heads: int) -> tuple[list[Neurons], int]:
        """The neurons of a projection, or of each expert, and the number of query heads that share a value head."""
        fused = row if isinstance(row, Experts) else None
        writer = row if isinstance(row, Writer) else row.writer
        transposed = fused.transposed if fused else self.architecture.transposed
        out, bias = self._named(f"{block}{writer.module}", fused)
        shape = self.specs[out].shape
        count, width = shape[0] if fused else 1, shape[-2 if transposed else -1]
        if fused and count != self.architecture.n_experts:
            raise UnknownArchitecture(
                f"{block[:-1]}: the config has {self.architecture.n_experts} experts, the weights hold {count}"
            )
        if heads and width % heads:
            raise UnknownArchitecture(f"{out} has {width} inputs, not a multiple of the config's {heads} heads")
        gain, readers, group = self.need(f"{block}{row.norm}.weight") if row.norm else None, [], 1
        for reader in writer.readers:
            names = self._named(f"{block}{reader.module}", fused)
            rows = self.specs[self.need(names[0])].shape[-1 if transposed else -2]
            view_and_group = rows_of(reader, rows, width, heads, transposed=transposed)
            if view_and_group is None:
                expected = f"{reader.parts} x {width} neurons were expected"
                shared = f"which {heads} heads of width {width // (heads or 1)} cannot share"
                raise UnknownArchitecture(f"{block}{reader.module} has {rows} rows, {shared if heads else expected}")
            view, group = view_and_group
            readers += [replace(view, tensor=name) for name in names if name in self.specs]
        return [
            Neurons(
                start=start + number * width,
                stop=start + (number + 1) * width,
                out=MatrixView(out, expert, transposed=transposed),
                readers=tuple(replace(view, expert=expert) for view in readers),
                writer=f"{block}{row.module}",
                bias=MatrixView(bias, expert) if bias in self.specs else None,
                expert=expert,
                gain=gain,
                fused=fused,
            )
            for number, expert in enumerate(range(count) if fused else (None,))
        ], group

    def _named(self, module: str, fused: Experts | None) -> tuple[str, str]:
        """The names of a weight and of its bias."""
        return (module, f"{module}_bias") if fused else (f"{module}.weight", f"{module}.bias")


def rows_of(
    reader: Reader, rows: int, width: int, heads: int, *, transposed: bool = False
) -> tuple[MatrixView, int] | None:
    """The rows of a projection that feed neurons, and how many heads share each; None if the numbers do not fit.

    Args:
        rows: of the projection.
        width: the number of neurons.
        heads: in which the neurons are divided; 0 if they are not those of an attention.
    """
    view = MatrixView("", parts=reader.parts, part=reader.part, transposed=transposed)
    if not heads:
        groups = width if reader.layout == "interleaved" else 1
        return (replace(view, groups=groups), 1) if rows == width * reader.parts else None
    size = width // heads
    count = rows // size
    values = {"tail": (count - heads) // 2, "per_head": count // reader.parts}.get(reader.layout, count)
    if width % heads or rows % size or values < 1 or heads % values:
        return None
    if reader.layout == "per_head":
        return replace(view, groups=values), heads // values
    if reader.layout == "tail" and count != heads + 2 * values:
        return None
    return replace(view, start=rows - values * size), heads // values


def _described(rows: tuple[BranchRow, ...]) -> str:
    return ", ".join(f"{row.kind} {'+'.join(w.module for w in row.writers)}" for row in rows)


def _writers(rows: tuple[BranchRow, ...]) -> set[str]:
    """The weights that a list of branches writes with."""
    writers = [w for row in rows for w in row.writers]
    return {w.writer.module if isinstance(w, Experts) else f"{w.module}.weight" for w in writers}


def _others(rows: tuple[BranchRow, ...]) -> set[str]:
    """The weights beside those that a list of branches names."""
    dense = [w for row in rows for w in row.writers if isinstance(w, Writer)]
    norms = {name for row in rows for name in (row.norm, *(w.norm for w in row.writers)) if name}
    return {f"{name}.weight" for name in norms | {reader.module for w in dense for reader in w.readers}}
