"""An architecture matched against the tensors of one model, in memory or on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from repedit.arch.spec import Architecture, Experts, Reader, Writer
from repedit.errors import UnknownArchitecture, nearest
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


# --- An architecture matched against the tensors of one model, in memory or on disk
#
# The same row serves a model in memory and a directory of headers: only names and shapes are read. Every expected tensor
# must exist; a layer that matches in no way or in two ways is an error, never a choice.

Store = Literal["live", "disk"]


@dataclass(frozen=True)
class Neurons:
    """Neurons start..stop of a branch: the columns they write with and the rows (and biases) that feed them."""

    start: int
    stop: int
    out: MatrixView
    readers: tuple[MatrixView, ...]


@dataclass(frozen=True)
class Branch:
    """The attention or the MLP of one layer."""

    inner: Point
    outer: Point
    width: int
    parts: tuple[Neurons, ...]
    """One for a dense branch, otherwise one per expert; together they cover 0..width."""
    writer: str
    """Module whose input holds the neurons; the fused experts module where `routed`."""
    joined: str
    """Module whose output is added to the stream."""
    bias: str | None
    """Bias tensor of the writer."""
    bias_name: str | None
    """Name that a bias of the writer has or would have; None for experts, which have none."""
    gain: str | None
    """Weight of the post-norm between the writer and the stream."""
    routed: bool
    head_width: int = 0
    group: int = 1
    """Query heads that share one value head."""


@dataclass(frozen=True)
class ModelLayout:
    """Every branch of every layer, with the tensor names in memory or on disk."""

    architecture: Architecture
    store: Store
    width: int
    layers: tuple[tuple[Branch, Branch], ...]
    """(attention, mlp) of each layer."""
    block_paths: tuple[str, ...]
    embeddings: tuple[str, ...]
    head: str

    def branch(self, layer: int, point: Point) -> Branch:
        """The branch that holds a neurons or out point."""
        return next(b for b in self.layers[layer] if point in (b.inner, b.outer))

    def routed(self, site: Site) -> bool:
        """Whether a site holds the neurons of several experts, of which each token passes some."""
        return site.point is Point.MLP_NEURONS and self.branch(site.layer, site.point).routed

    def width_of(self, layer: int, point: Point) -> int:
        """Size of the last axis at a point."""
        inner = {b.inner: b.width for b in self.layers[layer]}
        return inner.get(point, self.width)


def match_layout(architecture: Architecture, specs: Specs) -> ModelLayout:
    """Match a resolved architecture against tensor names and shapes.

    Raises:
        UnknownArchitecture: if a tensor the row names is missing, a layer matches twice, or shapes contradict the config.
    """
    prefix = f"{architecture.base}."  # old checkpoints leave it out
    base = prefix if any(name.startswith(f"{prefix}{architecture.blocks}.") for name in specs) else ""
    blocks = f"{base}{architecture.blocks}"
    numbers = {int(m[1]) for name in specs if (m := re.match(rf"{re.escape(blocks)}\.(\d+)\.", name))}
    if numbers != set(range(architecture.n_layers)):
        raise UnknownArchitecture(
            f"the config has {architecture.n_layers} layers, the weights hold layers {sorted(numbers)} under {blocks!r}; "
            "is a shard missing?"
        )
    matcher = _Matcher(architecture, specs)
    block_paths = tuple(f"{blocks}.{layer}" for layer in sorted(numbers))
    layers = tuple((matcher.attention(f"{path}."), matcher.mlp(f"{path}.")) for path in block_paths)
    embeddings = tuple(matcher.need(f"{base}{name}.weight") for name in architecture.embeddings)
    store: Store = "disk" if any(matcher.on_disk) or base != prefix else "live"
    head = architecture.disk_head if f"{architecture.disk_head}.weight" in specs else architecture.head
    return ModelLayout(
        architecture=architecture,
        store=store,
        width=specs[embeddings[0]].shape[1],
        layers=layers,
        block_paths=block_paths,
        embeddings=embeddings,
        head=f"{head}.weight",
    )


class _Matcher:
    """Finds the tensors of one block at a time."""

    def __init__(self, architecture: Architecture, specs: Specs) -> None:
        self.architecture, self.specs = architecture, specs
        self.on_disk: list[bool] = []

    def need(self, name: str) -> str:
        if name not in self.specs:
            raise UnknownArchitecture(
                f"tensor {name!r} of the {self.architecture.model_type} row is missing; {nearest(name, self.specs)}"
            )
        return name

    def attention(self, block: str) -> Branch:
        row = self.architecture
        out = MatrixView(self.need(f"{block}{row.attention.module}.weight"), transposed=row.transposed)
        width = self._columns(out)
        if width % row.n_heads:
            raise UnknownArchitecture(
                f"{out.tensor} has {width} inputs, not a multiple of the config's {row.n_heads} heads"
            )
        head_width = width // row.n_heads
        values, group = self._values(block, row.values, head_width)
        parts = (Neurons(0, width, out, values),)
        return self._branch(block, row.attention, parts, Point.ATTN_NEURONS, head_width, group)

    def mlp(self, block: str) -> Branch:
        row = self.architecture
        dense = row.mlp is not None and f"{block}{row.mlp.module}.weight" in self.specs
        live = row.experts is not None and f"{block}{row.experts.module}.down_proj" in self.specs
        disk = row.experts is not None and f"{block}{row.experts.down.format(e=0)}" in self.specs
        if dense + live + disk != 1:
            raise UnknownArchitecture(
                f"the MLP of {block[:-1]} must match one way, it matches {dense + live + disk}: dense {dense}, "
                f"fused experts {live}, experts on disk {disk}"
            )
        if row.experts is not None and not dense:
            self.on_disk.append(disk)
            return self._routed(block, row.experts, disk)
        assert row.mlp is not None
        out = MatrixView(self.need(f"{block}{row.mlp.module}.weight"), transposed=row.transposed)
        readers = tuple(view for reader in row.readers for view in self._rows(block, reader, self._columns(out)))
        return self._branch(block, row.mlp, (Neurons(0, self._columns(out), out, readers),), Point.MLP_NEURONS)

    def _branch(
        self, block: str, writer: Writer, parts: tuple[Neurons, ...], inner: Point, head_width: int = 0, group: int = 1
    ) -> Branch:
        bias = f"{block}{writer.module}.bias"
        return Branch(
            inner=inner,
            outer=Point.ATTN_OUT if inner is Point.ATTN_NEURONS else Point.MLP_OUT,
            width=parts[-1].stop,
            parts=parts,
            writer=f"{block}{writer.module}",
            joined=f"{block}{writer.norm or writer.module}",
            bias=bias if bias in self.specs else None,
            bias_name=bias,
            gain=None if writer.norm is None else self.need(f"{block}{writer.norm}.weight"),
            routed=False,
            head_width=head_width,
            group=group,
        )

    def _routed(self, block: str, experts: Experts, disk: bool) -> Branch:
        parts: list[Neurons] = []
        for e in range(self._expert_count(block, experts, disk)):
            out, readers = self._expert(block, experts, disk, e)
            start = parts[-1].stop if parts else 0
            parts.append(Neurons(start, start + self.specs[out.tensor].shape[-1], out, readers))
        return Branch(
            inner=Point.MLP_NEURONS,
            outer=Point.MLP_OUT,
            width=parts[-1].stop,
            parts=tuple(parts),
            writer=f"{block}{experts.module}",
            joined=f"{block}{experts.block}",
            bias=None,
            bias_name=None,
            gain=None,
            routed=True,
        )

    def _expert_count(self, block: str, experts: Experts, disk: bool) -> int:
        if disk:
            pattern = re.escape(block + experts.down).replace(r"\{e\}", r"(\d+)")
            numbers = {int(m[1]) for name in self.specs if (m := re.fullmatch(pattern, name))}
            count = len(numbers) if numbers == set(range(len(numbers))) else -1
        else:
            count = self.specs[f"{block}{experts.module}.down_proj"].shape[0]
        if count != self.architecture.n_experts:
            raise UnknownArchitecture(
                f"{block[:-1]}: the config has {self.architecture.n_experts} experts, the weights hold {count if count >= 0 else sorted(numbers)}"
            )
        return count

    def _expert(self, block: str, experts: Experts, disk: bool, e: int) -> tuple[MatrixView, tuple[MatrixView, ...]]:
        if disk:
            names = (experts.gate, experts.up, experts.down)
            gate, up, down = (MatrixView(self.need(block + name.format(e=e))) for name in names)
            return down, (gate, up)
        fused = self.need(f"{block}{experts.module}.gate_up_proj")
        gate, up = (MatrixView(fused, expert=e, parts=2, part=part) for part in (0, 1))
        return MatrixView(f"{block}{experts.module}.down_proj", expert=e), (gate, up)

    def _values(self, block: str, reader: Reader, head_width: int) -> tuple[tuple[MatrixView, ...], int]:
        """Views of the value rows (kv_heads * head_width of them) and the number of query heads that share each."""
        heads = self.architecture.n_heads
        rows = self._outputs(self.need(f"{block}{reader.module}.weight"))
        if reader.layout == "per_head":
            views = self._views(block, reader, groups=heads, parts=reader.parts, part=reader.part)
            return views, 1
        kv_heads = rows // head_width if reader.layout == "stacked" else (rows // head_width - heads) // 2
        if kv_heads < 1 or heads % kv_heads:
            raise UnknownArchitecture(
                f"{block}{reader.module} has {rows} rows, which {heads} heads of width {head_width} cannot share"
            )
        start = 0 if reader.layout == "stacked" else rows - kv_heads * head_width
        return self._views(block, reader, start=start), heads // kv_heads

    def _rows(self, block: str, reader: Reader, width: int) -> tuple[MatrixView, ...]:
        rows = self._outputs(self.need(f"{block}{reader.module}.weight"))
        if rows != width * reader.parts:
            raise UnknownArchitecture(
                f"{block}{reader.module} has {rows} rows, {reader.parts} x {width} neurons were expected"
            )
        return self._views(block, reader, parts=reader.parts, part=reader.part)

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
