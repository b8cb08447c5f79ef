"""An architecture matched against the tensors of one model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from repedit.arch.spec import Architecture, BranchRow, Experts, Reader, Writer
from repedit.errors import UnknownArchitecture, UnknownSite, nearest
from repedit.io.safetensors import TensorSpec
from repedit.sites import Point, Site

# --- The logical matrix inside a stored tensor

Specs = Mapping[str, TensorSpec]
"""Shape and dtype by tensor name: all that a plan needs of a model."""


@dataclass(frozen=True)
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

    def edit(self, stored: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy of the stored tensor in which this matrix is replaced by function(matrix); a vector becomes (out, 1)."""
        result = stored.clone()
        self.change(result, function)
        return result

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


@dataclass(frozen=True)
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

    def find(self, layer: int, point: Point) -> Branch | None:
        """The branch of a layer that holds a neurons or out point; None if the layer has none."""
        return next((b for b in self.layers[layer] if point in (b.inner, b.outer)), None)

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

    def routed(self, site: Site) -> bool:
        """Whether a site holds the neurons of experts, of which each token passes some, or of several projections."""
        branch = self.find(site.layer, site.point)
        return branch is not None and site.point is branch.inner and (branch.routed or len(branch.parts) > 1)

    def width_of(self, layer: int, point: Point) -> int:
        """Size of the last axis at a point."""
        inner = {b.inner: b.width for b in self.layers[layer]}
        return inner.get(point, self.width)

    @property
    def embedding_scale(self) -> float:
        """What multiplies the token embedding in the forward pass."""
        scaled = self.architecture.embedding_scaled
        return self.width**0.5 if scaled is True else float(scaled or 1.0)


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


def _described(rows: tuple[BranchRow, ...]) -> str:
    return ", ".join(f"{row.kind} {'+'.join(w.module for w in row.writers)}" for row in rows)


def _writers(rows: tuple[BranchRow, ...]) -> set[str]:
    return {w.module for row in rows for w in row.writers}


def _readers(rows: tuple[BranchRow, ...]) -> set[str]:
    """The modules beside the writers that a list of branches names."""
    dense = [w for row in rows for w in row.writers if isinstance(w, Writer)]
    norms = {name for row in rows for name in (row.norm, *(w.norm for w in row.writers)) if name}
    return norms | {reader.module for w in dense for reader in w.readers}


class _Matcher:
    """Finds the tensors of one block at a time."""

    def __init__(self, architecture: Architecture, specs: Specs) -> None:
        self.architecture, self.specs = architecture, specs
        self.heads = architecture.n_heads

    def need(self, name: str) -> str:
        if name not in self.specs:
            raise UnknownArchitecture(
                f"tensor {name!r} of the {self.architecture.model_type} row is missing; {nearest(name, self.specs)}"
            )
        return name

    def block(self, block: str, layer: int) -> tuple[Branch, ...]:
        """The branches of a block: of the one list of the row whose writers this block holds."""
        alternatives, row = self.architecture.block, self.architecture
        self.heads = row.layer_heads[layer] if row.layer_heads else row.n_heads
        if len(alternatives) == 1:
            for writer in (w for row in alternatives[0] for w in row.writers if isinstance(w, Writer)):
                self.need(f"{block}{writer.module}.weight")
        matches = [rows for rows in alternatives if all(self._holds(block, w) for row in rows for w in row.writers)]
        # Experts alone are a part of experts with a shared expert, and a block without some readers of one that has them.
        matches = [m for m in matches if not any(_writers(m) < _writers(other) for other in matches)]
        complete = matches[: len(alternatives) == 1] or [
            m for m in matches if all(f"{block}{name}.weight" in self.specs for name in _readers(m))
        ]
        complete = [m for m in complete if not any(_readers(m) < _readers(other) for other in complete)]
        ways = complete if len({frozenset(_writers(x)) for x in matches}) == 1 else matches
        if len(ways) != 1:
            raise UnknownArchitecture(
                f"{block[:-1]} must match one way, it matches {len(ways)}: {'; '.join(map(_described, ways))}. The row of "
                f"{self.architecture.model_type} has {'; '.join(map(_described, alternatives))}"
            )
        return tuple(self._branch(block, row) for row in (complete or matches)[0])

    def _holds(self, block: str, writer: Writer | Experts) -> bool:
        leaf = "weight" if isinstance(writer, Writer) else "down_proj"
        return f"{block}{writer.module}.{leaf}" in self.specs

    def _branch(self, block: str, row: BranchRow) -> Branch:
        parts: list[Neurons] = []
        head_width, group = 0, 1
        for writer in row.writers:
            if isinstance(writer, Experts):
                parts += self._experts(block, writer, parts[-1].stop if parts else 0)
                continue
            out = MatrixView(f"{block}{writer.module}.weight", transposed=self.architecture.transposed)
            width = self._columns(out)
            if row.kind == "attn":
                head_width = self._head_width(out, width)
                readers, group = self._values(block, writer.readers, head_width)
            else:
                readers = tuple(view for reader in writer.readers for view in self._rows(block, reader, width))
            parts.append(self._part(block, writer, parts[-1].stop if parts else 0, width, out, readers))
        only = row.writers[0].module if len(row.writers) == 1 and isinstance(row.writers[0], Writer) else None
        outputs = (row.norm,) if row.norm else row.outputs or (only,)
        return Branch(
            kind=row.kind,
            parts=tuple(parts),
            outputs=tuple(f"{block}{module}" for module in outputs),
            bias_name=f"{block}{only}.bias" if only else None,
            gain=self.need(f"{block}{row.norm}.weight") if row.norm else None,
            scale=float(row.scale),
            head_width=head_width,
            group=group,
        )

    def _part(
        self, block: str, writer: Writer, start: int, width: int, out: MatrixView, readers: tuple[MatrixView, ...]
    ) -> Neurons:
        bias, module = f"{block}{writer.module}.bias", f"{block}{writer.module}"
        gain = self.need(f"{block}{writer.norm}.weight") if writer.norm else None
        return Neurons(
            start, start + width, out, readers, module, MatrixView(bias) if bias in self.specs else None, None, gain
        )

    def _head_width(self, out: MatrixView, width: int) -> int:
        if width % self.heads:
            raise UnknownArchitecture(
                f"{out.tensor} has {width} inputs, not a multiple of the config's {self.heads} heads"
            )
        return width // self.heads

    def _experts(self, block: str, experts: Experts, start: int) -> list[Neurons]:
        gain = self.need(f"{block}{experts.norm}.weight") if experts.norm else None
        count = self.specs[f"{block}{experts.module}.down_proj"].shape[0]
        parts: list[Neurons] = []
        if count != self.architecture.n_experts:
            raise UnknownArchitecture(
                f"{block[:-1]}: the config has {self.architecture.n_experts} experts, the weights hold {count}"
            )
        for e in range(count):
            out, readers, bias = self._expert(block, experts, e)
            begin = parts[-1].stop if parts else start
            stop = begin + self._expert_width(out)
            parts.append(Neurons(begin, stop, out, readers, f"{block}{experts.module}", bias, e, gain))
        return parts

    def _expert_width(self, out: MatrixView) -> int:
        return self.specs[out.tensor].shape[-2 if out.transposed else -1]

    def _expert(
        self, block: str, experts: Experts, e: int
    ) -> tuple[MatrixView, tuple[MatrixView, ...], MatrixView | None]:
        """Output, inputs (with their biases) and output bias of one expert."""
        module, count = f"{block}{experts.module}", 2 if experts.gated else 1
        name = self.need(f"{module}.{'gate_up_proj' if experts.gated else 'up_proj'}")
        down = MatrixView(f"{module}.down_proj", expert=e, transposed=experts.transposed)
        width = self._expert_width(down)
        view = MatrixView(
            name, e, groups=width if experts.interleaved else 1, parts=count, transposed=experts.transposed
        )
        stored = [n for n in (name, f"{name}_bias") if n in self.specs]
        readers = tuple(replace(view, tensor=n, part=part) for part in range(count) for n in stored)
        bias = f"{module}.down_proj_bias"
        return down, readers, MatrixView(bias, expert=e) if bias in self.specs else None

    def _values(self, block: str, readers: tuple[Reader, ...], head_width: int) -> tuple[tuple[MatrixView, ...], int]:
        """Views of the value rows (kv_heads * head_width of them) and the number of query heads that share each."""
        if not readers:
            return (), 1
        (reader,), heads = readers, self.heads
        rows = self._outputs(self.need(f"{block}{reader.module}.weight"))
        count = rows // head_width
        kv_heads = {"stacked": count, "tail": (count - heads) // 2, "per_head": count // reader.parts}[reader.layout]
        if kv_heads < 1 or heads % kv_heads or rows % head_width:
            raise UnknownArchitecture(
                f"{block}{reader.module} has {rows} rows, which {heads} heads of width {head_width} cannot share"
            )
        if reader.layout == "per_head":
            views = self._views(block, reader, groups=kv_heads, parts=reader.parts, part=reader.part)
        else:
            start = 0 if reader.layout == "stacked" else rows - kv_heads * head_width
            views = self._views(block, reader, start=start)
        return views, heads // kv_heads

    def _rows(self, block: str, reader: Reader, width: int) -> tuple[MatrixView, ...]:
        rows = self._outputs(self.need(f"{block}{reader.module}.weight"))
        if rows != width * reader.parts:
            raise UnknownArchitecture(
                f"{block}{reader.module} has {rows} rows, {reader.parts} x {width} neurons were expected"
            )
        groups = width if reader.layout == "interleaved" else 1
        return self._views(block, reader, groups=groups, parts=reader.parts, part=reader.part)

    def _views(
        self, block: str, reader: Reader, *, start: int = 0, groups: int = 1, parts: int = 1, part: int = 0
    ) -> tuple[MatrixView, ...]:
        """Views of the weight and, if there is one, the bias of a reader."""
        names = (f"{block}{reader.module}.weight", f"{block}{reader.module}.bias")
        view = MatrixView("", None, start, groups, parts, part, self.architecture.transposed)
        return tuple(replace(view, tensor=name) for name in names if name in self.specs)

    def _columns(self, view: MatrixView) -> int:
        return self.specs[view.tensor].shape[0 if view.transposed else 1]

    def _outputs(self, name: str) -> int:
        return self.specs[name].shape[1 if self.architecture.transposed else 0]
