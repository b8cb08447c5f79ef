"""Verify a row of the family table: compare it with the modules of a model, and with a real forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from repedit.arch.hooks import hooks_at, routed_to
from repedit.arch.layout import Branch, MatrixView, ModelLayout, Neurons, TensorSpec, match_layout
from repedit.arch.offload import check_in_memory, execution_device, offloaded_tensor
from repedit.arch.spec import Architecture, Experts, families, text_config
from repedit.distributed import local_tensor
from repedit.errors import ShapeError, UnknownArchitecture
from repedit.hooks import Hook, evaluating, installed
from repedit.linear_maps import LowRank
from repedit.sites import Point, Site

# --- Compare a row with the modules of a model, without a forward pass; every wrapped model is checked so


def check_modules(model: nn.Module, layout: ModelLayout) -> None:
    """Compare a row with the modules: they exist, store weights as the row says, and have as many readers.

    Raises:
        UnknownArchitecture: naming the first module that differs.
    """
    row = layout.architecture
    _submodule(model, row.head, row.model_type)
    for branch in (b for layer in layout.layers for b in layer):
        for path in branch.outputs:
            _submodule(model, path, row.model_type)
        for path, parts in branch.by_writer.items():
            module = _submodule(model, path, row.model_type)
            if parts[0].expert is not None:
                _check_experts(module, path, row.experts_at(path))
            else:
                _check_dense(module, path, row)
            readers = {
                (v.tensor.rpartition(".")[0], v.part) for v in parts[0].readers if not v.tensor.endswith("_bias")
            }
            needed = 2 if row.gated and branch.kind == "mlp" else 1
            if len(readers) not in (
                (needed,) if branch.kind == "mlp" and row.model_type in families() else (0, needed)
            ):
                raise UnknownArchitecture(
                    f"{path} has {len(readers)} readers; the {row.model_type} row with gated={row.gated} needs {needed} different ones"
                )


def _check_experts(module: nn.Module, path: str, row: Experts) -> None:
    stored = {"is_transposed": row.transposed, "is_concatenated": not row.interleaved, "has_gate": row.gated}
    wrong = {k: getattr(module, k, v) for k, v in stored.items() if getattr(module, k, v) != v}
    if wrong:
        raise UnknownArchitecture(f"{path} stores its experts with {wrong}, the row expects {stored}")


def _check_dense(module: nn.Module, path: str, row: Architecture) -> None:
    kind = type(module).__name__
    if (kind == "Conv1D") != row.transposed or not (row.transposed or isinstance(module, nn.Linear)):
        raise UnknownArchitecture(f"{path} is a {kind}; the {row.model_type} row says transposed={row.transposed}")


def _submodule(model: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnknownArchitecture(f"the {model_type} row names the module {path!r}, which the model lacks") from error


# --- Compare a row with a real forward pass
#
# For every branch of every layer: zeroing neurons by a hook, by the columns they write with, and by the rows that feed
# them must change what the layer adds to the stream, and by the same amount; mapping the output by a hook and in the
# weights must agree too (post-norm families: must erase the same subspace). For every layer: the block adds the two outputs
# to the stream and nothing else, the next layer receives the sum, and the MLP reads the output of the attention unless the
# row is parallel. The embeddings add up to 0.resid.pre.

# Over all rows of the table in float32 the largest error seen is 4e-6 (tests/test_arch.py); a wrong row gives more than 1e-2.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Proof:
    """The result of the forward pass at one site."""

    site: Site
    moved: float
    """Largest change that the edit makes to the output of the layer, over its standard deviation."""
    error: float
    """Largest difference between hook and weights, on the same scale."""
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class ArchitectureReport:
    """Two proofs for each branch of each layer (neurons and output), one for its stream and one for the embeddings."""

    model_type: str
    proofs: tuple[Proof, ...]

    @property
    def passed(self) -> bool:
        """Whether every proof passed."""
        return all(proof.passed for proof in self.proofs)


@torch.no_grad()
def prove(model: nn.Module, architecture: Architecture, *, tolerance: float = TOLERANCE) -> ArchitectureReport:
    """Check a resolved row on a model; the model is not changed.

    A model in a half type is checked in float32, with a copy of its weights.

    Raises:
        UnknownArchitecture: if a site does not behave as the row says, naming the sites.
        OffloadedTensors: if weights are not in memory.
    """
    check_in_memory(model, "load the model without device_map to check it")
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    layout = match_layout(architecture, specs)
    check_modules(model, layout)
    check_unshared(model, layout)
    try:
        with evaluating(model):
            proofs = _ForwardCheck(model, layout, tolerance).proofs()
    except ShapeError as error:
        raise UnknownArchitecture(
            f"the {layout.architecture.model_type} row names a tensor of another width: {error}"
        ) from error
    report = ArchitectureReport(layout.architecture.model_type, tuple(proofs))
    if not report.passed:
        bad = [f"{p.site} (moved {p.moved:.1e}, error {p.error:.1e}{p.note})" for p in proofs if not p.passed]
        raise UnknownArchitecture(f"the {report.model_type} row does not describe this model at {'; '.join(bad[:4])}")
    return report


def check_unshared(model: nn.Module, layout: ModelLayout) -> None:
    """Refuse a model in which a tensor that edits change shares memory with another, where the edit would act too.

    Embeddings may be tied to the head, which lowering knows.

    Raises:
        UnknownArchitecture: naming both tensors.
    """
    stored: dict[object, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        held = offloaded_tensor(model.get_submodule(path), leaf) if parameter.device.type == "meta" else None
        tensor = local_tensor(parameter if held is None else held)
        key = id(tensor) if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()
        stored.setdefault((tensor.device, key), []).append((name, tensor))
    changed = {view.tensor for p in layout.parts for view in (p.out, p.bias, *p.readers) if view is not None}
    for first, second in (pair for group in stored.values() for pair in combinations(group, 2)):
        if changed & {first[0], second[0]} and _share_memory(first[1], second[1]):
            raise UnknownArchitecture(
                f"{second[0]} and {first[0]} are one tensor, so that an edit of one layer edits another"
            )


def _share_memory(first: Tensor, second: Tensor) -> bool:
    """Whether tensors of one storage have a number in common; parts of one tensor, such as its halves, have none."""
    return first is second or bool(np.shares_memory(_addresses(first), _addresses(second)))


def _addresses(x: Tensor) -> Any:
    """An array of the same places in memory; nothing is read, so that they may lie on another device."""
    size = x.element_size()
    strides = tuple(stride * size for stride in x.stride())
    data = {
        "data": (x.data_ptr(), True),
        "shape": tuple(x.shape),
        "strides": strides,
        "typestr": f"|V{size}",
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=data))


class BlockRuns:
    """One forward pass of the model records the inputs of each block; each block can then run alone on them, in float32.

    Tensors named in `changed` take the place of the model's in every pass.
    """

    def __init__(
        self, model: nn.Module, block_paths: Sequence[str], changed: Mapping[str, Tensor] | None = None
    ) -> None:
        self.model, self.block_paths = model, block_paths
        # A rounding can send a token to another expert, so half types are checked in float32.
        wide = {id(p): p.float() for p in model.parameters() if p.dtype.itemsize < 4}
        named = list(model.named_parameters(remove_duplicate=False))
        self.parameters = {n: wide.get(id(p), p.detach()) for n, p in named} | dict(changed or {})
        # Under every name: a block may hold a tensor that the model names after another block.
        self.wide = {n: self.parameters[n] for n, p in named if id(p) in wide or n in (changed or {})}
        self.wide_once = {n: self.wide[n] for n, _ in model.named_parameters() if n in self.wide}
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
        self.ids = text_ids(model)
        self.embedded = self.run_model([Hook(self.block(i), "call", self._record) for i in range(len(block_paths))])
        if len(self.calls) != len(block_paths):
            raise UnknownArchitecture(
                f"{len(block_paths)} blocks ran {len(self.calls)} times in one forward pass; each must run once"
            )

    def block(self, layer: int) -> nn.Module:
        """The block of a layer."""
        return self.model.get_submodule(self.block_paths[layer])

    def run_model(self, hooks: list[Hook], changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the whole model; returns 0.resid.pre."""
        inputs = {"input_ids": self.ids, "use_cache": False}
        streams: list[Tensor] = []
        first = Hook(self.block(0), "input", lambda x: streams.append(x.float()))
        with installed(self.model, [*hooks, first]):
            functional_call(self.model, self.wide_once | dict(changed or {}), (), inputs, tie_weights=True)
        return streams[0]

    def run_block(self, layer: int, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()) -> object:
        """Run a block on the inputs it received in the whole model, with other tensors or hooks; returns its output."""
        path, (args, kwargs) = self.block_paths[layer], self.calls[layer]
        tensors = self.wide | dict(changed or {})
        weights = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
        with installed(self.block(layer), hooks):
            return functional_call(self.block(layer), weights, args, kwargs)

    def _record(self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], _output: object) -> None:
        self.calls.append((args, kwargs))


def text_ids(model: nn.Module) -> Tensor:
    """Two rows of 12 token ids, none of which the config names as special."""
    config = text_config(model.config)  # type: ignore[arg-type]
    fields = {**vars(model.config), **vars(config)}
    special = {v for k, v in fields.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    usable = torch.tensor([i for i in range(min(table.shape[0], 4096)) if i not in special])
    chosen = torch.randint(len(usable), (2, 12), generator=torch.Generator().manual_seed(0))
    return usable[chosen].to(execution_device(model.get_input_embeddings()))  # type: ignore[operator]


class _ForwardCheck:
    """The proofs of one model; each runs one block alone."""

    def __init__(self, model: nn.Module, layout: ModelLayout, tolerance: float) -> None:
        self.model, self.layout, self.tolerance = model, layout, tolerance
        self.generator = torch.Generator().manual_seed(0)
        self.runs = BlockRuns(model, layout.block_paths, _without_pruned(model, layout, self.generator))
        self.parameters, self.embedded = self.runs.parameters, self.runs.embedded
        self.unedited = [self._outputs(layer) for layer in range(len(layout.layers))]

    def proofs(self) -> list[Proof]:
        proofs = [self.embeddings()] if self.layout.architecture.embedding_exact else []
        for layer, branches in enumerate(self.layout.layers):
            for branch in branches:
                proofs += self.branch(layer, branch)
            proofs.append(self.stream(layer))
        return proofs

    def branch(self, layer: int, branch: Branch) -> list[Proof]:
        """Both proofs of a branch, as the model routes its tokens, and with tokens sent to each expert that then received none."""
        used: set[int | None] = set()
        proofs = [self.neurons(layer, branch, used), self.output(layer, branch)]
        idle = [part for part in branch.parts if part.expert is not None and part.start not in used]
        unedited = self.unedited[layer]
        for parts in _portions(idle, self.runs.ids.numel()):
            with routed_to(self.model, self.layout, parts):
                self.unedited[layer] = self._outputs(layer)
                proofs += [self.neurons(layer, branch, used), self.output(layer, branch)]
        self.unedited[layer] = unedited
        idle = [part for part in idle if part.start not in used]
        if idle:
            raise UnknownArchitecture(
                f"{idle[0].writer}: experts {[part.expert for part in idle]} received no token, so that nothing can be proved of them"
            )
        return [_worst(proofs[::2]), _worst(proofs[1::2])]

    def neurons(self, layer: int, branch: Branch, used: set[int | None]) -> Proof:
        """Zero half of the neurons (whole shared heads) three ways; `used` gets the first neuron of each expert with a token."""
        site = Site(layer, branch.inner)
        size = branch.head_width if branch.inner is Point.ATTN_NEURONS else 1
        keep = self._half_mask(branch.width // (size * branch.group), size * branch.group)

        def zero(x: Tensor, neurons: slice, _tokens: Tensor | None) -> Tensor:
            used.add(neurons.start)
            return x * keep[neurons].to(x)

        hooked = self._outputs(layer, hooks=hooks_at(self.model, self.layout, site, zero, replaces=True))
        columns = self._masked((p.out, keep[p.start : p.stop], True) for p in branch.parts)
        rows = self._masked(
            (view, self._reader_mask(branch, p, keep), False) for p in branch.parts for view in p.readers
        )
        # Where a part has no reader, its columns alone are zeroed.
        rows |= self._masked((p.out, keep[p.start : p.stop], True) for p in branch.parts if not p.readers)
        error = max(_distance(self._outputs(layer, changed), hooked) for changed in (columns, rows))
        return self._proof(site, hooked, error)

    def output(self, layer: int, branch: Branch) -> Proof:
        """Remove a random plane from what the branch adds to the stream, by a hook and in the weights."""
        site = Site(layer, branch.outer)
        basis = torch.randn(self.layout.width, 2, generator=self.generator)
        for name in branch.gains:
            # A channel that a norm multiplies by 0 never reaches the stream, so the plane lies within the other channels.
            basis[_is_zero_gain(self._gain(name)).cpu()] = 0
        basis = basis[:, : int(basis.any(1).sum())]
        if not basis.shape[1]:
            raise UnknownArchitecture(
                f"{branch.gains[0]} multiplies every channel by zero, so {site} adds nothing to the stream and its row cannot be "
                "checked; was the model saved completely?"
            )
        map_ = LowRank.projection(basis)
        hooks = hooks_at(self.model, self.layout, site, lambda x, at, _: map_(x), replaces=True)
        hooked = self._outputs(layer, hooks=hooks)
        changed: dict[str, Tensor] = {}
        for part in branch.parts:
            names = [name for name in (part.gain, branch.gain) if name]
            gain = torch.stack([self._gain(name) for name in names]).prod(0) if names else None
            for view in (part.out, part.bias):
                if view is not None:
                    stored = changed.setdefault(view.tensor, self.parameters[view.tensor].clone())
                    view.change(stored, partial(_folded, map_, gain))
        if not branch.gains:
            return self._proof(site, hooked, _distance(self._outputs(layer, changed), hooked))
        x = self._tensors_at(layer, [branch.outer], changed)[0]
        leak = float((x @ map_.v.to(x.device)).norm() / x.norm())
        return self._proof(site, hooked, leak, "; leak of the subspace")

    def _gain(self, name: str) -> Tensor:
        return self.parameters[name].float() + (1.0 if self.layout.architecture.unit_gain else 0.0)

    def stream(self, layer: int) -> Proof:
        """resid.post = resid.pre + what the branches add reaches the next layer; the MLP reads the attention unless parallel."""
        branches, row = self.layout.layers[layer], self.layout.architecture
        points = [branch.outer for branch in branches]
        pre, post, *outputs = self._tensors_at(layer, [Point.RESID_PRE, Point.RESID_POST, *points])
        following = self._tensors_at(layer + 1, [Point.RESID_PRE])[0] if layer + 1 < len(self.unedited) else post
        # Some families flatten batch and tokens around the MLP.
        added = sum(b.scale * x.reshape(post.shape) for b, x in zip(branches, outputs, strict=True))
        scale = row.block_scale
        factor = dict(self.runs.block(layer).named_buffers())[scale] if isinstance(scale, str) else scale
        error = _distance(factor * (pre + added), post) + _distance(following.to(post), post)
        note = f"; parallel={bool(row.parallel)}, sum of the outputs against the stream"
        site, moved, passed = Site(layer, Point.RESID_POST), 0.0, error <= self.tolerance
        if Point.RESID_MID in self.layout.points_at(layer) or row.parallel:
            turn = hooks_at(self.model, self.layout, Site(layer, points[0]), lambda x, at, _: x.flip(-1), replaces=True)
            moved = _distance(self._tensors_at(layer, [points[1]], hooks=turn)[0], outputs[1])
            passed = passed and (moved > 1e-6) != bool(row.parallel)
        return Proof(site, moved, error, passed, note)

    def embeddings(self) -> Proof:
        """Mapping every embedding, and shifting the token table, does the same to the stream."""
        width, before = self.layout.width, self.embedded
        map_ = LowRank.projection(torch.randn(width, 2, generator=self.generator))
        shift = torch.randn(width, generator=self.generator).to(before.device)
        scale = self.layout.embedding_scale
        changed = {}
        for name in self.layout.embeddings:
            constant = shift / scale if name == self.layout.embeddings[0] else torch.zeros_like(shift)
            table = self.parameters[name]
            changed[name] = (map_(table.float()) + constant.to(table.device)).to(table.dtype)
        after = self.runs.run_model([], changed)
        error = _distance(after, map_(before) + shift)
        return Proof(Site(0, Point.RESID_PRE), _distance(after, before), error, error <= self.tolerance)

    def _outputs(self, layer: int, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()) -> Tensor:
        """What the branches of a layer add to the stream, one row per token."""
        points = [branch.outer for branch in self.layout.layers[layer]]
        return torch.cat([x.reshape(-1, self.layout.width) for x in self._tensors_at(layer, points, changed, hooks)])

    def _tensors_at(
        self,
        layer: int,
        points: Sequence[Point],
        changed: Mapping[str, Tensor] | None = None,
        hooks: Sequence[Hook] = (),
    ) -> list[Tensor]:
        """The tensors at some points of a layer, which runs on the inputs it received in the whole model."""
        tensors: dict[Point, Tensor] = {}

        def observe(point: Point) -> list[Hook]:
            def store(x: Tensor, _neurons: slice, _tokens: Tensor | None) -> None:
                tensors[point] = x.float().clone()  # Falcon adds to it in place

            return hooks_at(self.model, self.layout, Site(layer, point), store, replaces=False)

        self.runs.run_block(layer, changed, [*hooks, *(hook for point in points for hook in observe(point))])
        return [tensors[point] for point in points]

    def _masked(self, masks: Iterable[tuple[MatrixView, Tensor, bool]]) -> dict[str, Tensor]:
        """Tensors with some columns or rows set to zero, by (view, mask, whether the mask is of columns)."""
        changed: dict[str, Tensor] = {}
        for view, keep, columns in masks:
            if view.tensor not in changed:
                changed[view.tensor] = self.parameters[view.tensor].clone()
            factor = keep[None, :] if columns else keep[:, None]
            view.change(changed[view.tensor], partial(torch.mul, factor.to(changed[view.tensor])))
        return changed

    def _reader_mask(self, branch: Branch, part: Neurons, keep: Tensor) -> Tensor:
        if branch.inner is Point.MLP_NEURONS:
            return keep[part.start : part.stop]
        return keep.unflatten(0, (-1, branch.group, branch.head_width))[:, 0].flatten()

    def _half_mask(self, count: int, size: int) -> Tensor:
        keep = torch.ones(count, dtype=torch.bool)
        keep[torch.randperm(count, generator=self.generator)[: max(1, count // 2)]] = False
        return keep.repeat_interleave(size)

    def _proof(self, site: Site, hooked: Tensor, error: float, note: str = "") -> Proof:
        """The proof of a site; an edit must move the output."""
        moved = _distance(hooked, self.unedited[site.layer])
        return Proof(site, moved, error, moved > 1e-6 and error <= self.tolerance, note)


def _without_pruned(model: nn.Module, layout: ModelLayout, generator: torch.Generator) -> dict[str, Tensor]:
    """Tensors, in float32, with random numbers where pruned neurons have zeros, of which an edit would show nothing."""
    parameters, filled = dict(model.named_parameters(remove_duplicate=False)), dict[str, Tensor]()
    views = [(view, axis) for p in layout.parts for view, axis in ((p.out, 0), *((reader, 1) for reader in p.readers))]
    for view, axis in views:
        matrix = view.read(filled.get(view.tensor, parameters[view.tensor]))
        if matrix.ndim == 1 or bool((nonzero := matrix.any(axis, keepdim=True)).all()):
            continue  # a bias of zeros is one that was never trained
        if view.tensor not in filled:
            filled[view.tensor] = parameters[view.tensor].detach().float().clone()
        noise = torch.randn(matrix.shape, generator=generator).to(filled[view.tensor])
        noise *= float(matrix.float().std()) or matrix.shape[1] ** -0.5
        view.change(filled[view.tensor], lambda w, nonzero=nonzero, noise=noise: w.where(nonzero, noise))  # type: ignore[misc]
    return filled


def _portions(parts: Sequence[Neurons], size: int) -> Iterator[Sequence[Neurons]]:
    """Parts of one module, at most some at a time."""
    for writer in dict.fromkeys(part.writer for part in parts):
        own = [part for part in parts if part.writer == writer]
        yield from (own[i : i + size] for i in range(0, len(own), size))


def _worst(proofs: Sequence[Proof]) -> Proof:
    """Several proofs of one site as one."""
    worst = max(proofs, key=lambda proof: proof.error)
    passed, moved = all(proof.passed for proof in proofs), min(proof.moved for proof in proofs)
    return Proof(worst.site, moved, worst.error, passed, worst.note)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the standard deviation of the expected tensor."""
    return float((actual - expected).abs().max() / expected.std())


def _folded(map_: LowRank, gain: Tensor | None, w: Tensor) -> Tensor:
    """A weight with a map of its outputs, through the gain of the post-norm if there is one."""
    if gain is None:
        return map_.left(w.float()).to(w.dtype)
    column = gain[:, None]
    out = map_.left(w.float() * column) / column
    return torch.where(_is_zero_gain(column), w.float(), out).to(w.dtype)


def _is_zero_gain(gain: Tensor) -> Tensor:
    """Where a norm multiplies by zero, or by a number negligible beside its largest gain."""
    return gain.abs() <= 1e-6 * gain.abs().max()
