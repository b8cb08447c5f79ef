"""Verify a row of the family table: compare it with the modules of a model, and with a real forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repedit.arch.hooks import hooks_at, routed_to
from repedit.arch.layout import Branch, MatrixView, ModelLayout, Neurons, TensorSpec, match_layout
from repedit.arch.offload import check_in_memory, offloaded_tensor
from repedit.arch.passes import Call, Passes
from repedit.arch.spec import Architecture, families
from repedit.distributed import local_tensor
from repedit.errors import ShapeError, UnknownArchitecture
from repedit.hooks import Hook, evaluating
from repedit.linear_maps import Diagonal, LowRank
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
            module, fused = _submodule(model, path, row.model_type), parts[0].fused
            kind, is_mlp = type(module).__name__, branch.kind == "mlp"
            if fused is not None:
                stored = {
                    "is_transposed": fused.transposed, "is_concatenated": not fused.interleaved, "has_gate": fused.gated,
                }  # fmt: skip
                wrong = {k: getattr(module, k, v) for k, v in stored.items() if getattr(module, k, v) != v}
                if wrong:
                    raise UnknownArchitecture(f"{path} stores its experts with {wrong}, the row expects {stored}")
            elif (kind == "Conv1D") != row.transposed or not (row.transposed or isinstance(module, nn.Linear)):
                raise UnknownArchitecture(
                    f"{path} is a {kind}; the {row.model_type} row says transposed={row.transposed}"
                )
            weights = (view for view in parts[0].readers if not view.tensor.endswith("bias"))
            count, needed = len({(view.tensor, view.part) for view in weights}), 2 if row.gated and is_mlp else 1
            if count != needed and (count or (is_mlp and row.model_type in families())):
                raise UnknownArchitecture(
                    f"{path} has {count} readers; the {row.model_type} row with gated={row.gated} needs {needed} different ones"
                )


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


class _ForwardCheck:
    """The proofs of one model; each runs one block alone."""

    def __init__(self, model: nn.Module, layout: ModelLayout, tolerance: float) -> None:
        self.model, self.layout, self.tolerance = model, layout, tolerance
        self.generator = torch.Generator().manual_seed(0)
        self.passes = Passes(model, _without_pruned(model, layout, self.generator), layout.block_paths)
        self.parameters = self.passes.parameters
        blocks = [call for call in self.passes.calls if call.path in layout.block_paths]
        if len(blocks) != len(layout.block_paths):
            raise UnknownArchitecture(
                f"{len(layout.block_paths)} blocks ran {len(blocks)} times in one forward pass; each must run once"
            )
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
        for parts in _portions(idle, self.passes.ids.numel()):
            with routed_to(self.model, parts):
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
        site, size = Site(layer, branch.inner), (branch.head_width or 1) * branch.group
        keep = torch.ones(branch.width // size, dtype=torch.bool)
        keep[torch.randperm(len(keep), generator=self.generator)[: max(1, len(keep) // 2)]] = False
        keep = keep.repeat_interleave(size)

        def zero(x: Tensor, neurons: slice, _tokens: Tensor | None) -> Tensor:
            used.add(neurons.start)
            return x * keep[neurons].to(x)

        columns = {p.start: (p.out, Diagonal.mask(keep[p.start : p.stop]).right) for p in branch.parts}
        # Where a part has no reader, its columns alone are zeroed.
        rows = [columns[p.start] for p in branch.parts if not p.readers]
        for part in branch.parts:
            shared = keep[part.start : part.stop].unflatten(0, (-1, branch.group, branch.head_width or 1))
            rows += [(view, Diagonal.mask(shared[:, 0].flatten()).left) for view in part.readers]
        hooked = self._outputs(layer, hooks=hooks_at(self.model, self.layout, site, zero, replaces=True))
        folded = [self._outputs(layer, rewritten(self.parameters, ways)) for ways in (columns.values(), rows)]
        return self._proof(site, hooked, sum(_distance(x, hooked) for x in folded))

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
        hooked = self._outputs(layer, hooks=self._hooks(site, map_))
        changes: list[Change] = []
        for part in branch.parts:
            gains = [self._gain(name) for name in (part.gain, branch.gain) if name]
            fold = partial(_folded, map_, torch.stack(gains).prod(0) if gains else None)
            changes += [(view, fold) for view in (part.out, part.bias) if view is not None]
        changed = rewritten(self.parameters, changes)
        if not branch.gains:
            return self._proof(site, hooked, _distance(self._outputs(layer, changed), hooked))
        x = self._added(branch, self._calls(layer, changed))
        leak = float((x @ map_.v.to(x.device)).norm() / x.norm())
        return self._proof(site, hooked, leak, "; leak of the subspace")

    def _gain(self, name: str) -> Tensor:
        return self.parameters[name].float() + (1.0 if self.layout.architecture.unit_gain else 0.0)

    def stream(self, layer: int) -> Proof:
        """resid.post = resid.pre + what the branches add reaches the next layer; the MLP reads the attention unless parallel."""
        branches, row = self.layout.layers[layer], self.layout.architecture
        # Every site is hooked, and replaced by itself.
        sites = [Site(layer, point) for point in self.layout.points_at(layer) if not point.endswith("neurons")]
        same = [self._hooks(site, lambda x: x) for site in sites]
        path, *later = self.layout.block_paths[layer:]
        calls = self._calls(layer, hooks=[hook for hooks in same for hook in hooks])
        pre, post = (x.flatten(0, -2) for x in (calls[path].received, calls[path].returned))
        outputs = [self._added(branch, calls) for branch in branches]
        added = sum(branch.scale * x for branch, x in zip(branches, outputs, strict=True))
        scale: Any = row.block_scale
        if isinstance(scale, str):
            scale = self.model.get_submodule(path).get_buffer(scale)
        following = self.passes.by_path[later[0]].received.flatten(0, -2) if later else post
        error = _distance(scale * (pre + added), post) + _distance(following.to(post), post)
        note = f"; parallel={bool(row.parallel)}, sum of the outputs against the stream"
        moved, passed = 0.0, error <= self.tolerance
        if Point.RESID_MID in self.layout.points_at(layer) or row.parallel:
            turned = self._calls(layer, hooks=self._hooks(Site(layer, branches[0].outer), lambda x: x.flip(-1)))
            moved = _distance(self._added(branches[1], turned), outputs[1])
            passed = passed and (moved > 1e-6) != bool(row.parallel)
        return Proof(Site(layer, Point.RESID_POST), moved, error, passed, note)

    def embeddings(self) -> Proof:
        """Mapping every embedding, and shifting the token table, does the same to the stream."""
        first, names = self.layout.block_paths[0], self.layout.embeddings
        before = self.passes.by_path[first].received
        map_ = LowRank.projection(torch.randn(self.layout.width, 2, generator=self.generator))
        shift = torch.randn(self.layout.width, generator=self.generator)
        changed = {name: map_(self.parameters[name].float()).to(self.parameters[name].dtype) for name in names}
        for name in names[:1]:
            changed[name] += (shift / self.layout.embedding_scale).to(changed[name])
        after = next(call.received for call in self.passes.run(changed) if call.path == first)
        error = _distance(after, map_(before) + shift.to(before))
        return Proof(Site(0, Point.RESID_PRE), _distance(after, before), error, error <= self.tolerance)

    def _hooks(self, site: Site, function: Callable[[Tensor], Tensor]) -> list[Hook]:
        return hooks_at(self.model, self.layout, site, lambda x, at, _: function(x), replaces=True)

    def _calls(
        self, layer: int, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()
    ) -> dict[str, Call]:
        calls = self.passes.run_block(self.layout.block_paths[layer], changed, hooks)
        return {call.path: call for call in calls}

    def _added(self, branch: Branch, calls: Mapping[str, Call]) -> Tensor:
        """What a branch adds to the stream, before its scale; one row per token."""
        terms = [calls[path].returned for path in branch.outputs]
        wrong = [tuple(x.shape) for x in terms if x.shape[-1] != self.layout.width]
        if wrong:
            raise ShapeError(f"{', '.join(branch.outputs)} gives {wrong[0]}, the stream has width {self.layout.width}")
        return torch.stack([x.flatten(0, -2) for x in terms]).sum(0)

    def _outputs(self, layer: int, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()) -> Tensor:
        """What the branches of a layer add to the stream, one row per token."""
        calls = self._calls(layer, changed, hooks)
        return torch.cat([self._added(branch, calls) for branch in self.layout.layers[layer]])

    def _proof(self, site: Site, hooked: Tensor, error: float, note: str = "") -> Proof:
        """The proof of a site; an edit must move the output."""
        moved = _distance(hooked, self.unedited[site.layer])
        return Proof(site, moved, error, moved > 1e-6 and error <= self.tolerance, note)


Change = tuple[MatrixView, Callable[[Tensor], Tensor]]


def rewritten(tensors: Mapping[str, Tensor], changes: Iterable[Change]) -> dict[str, Tensor]:
    """Copies of tensors in which functions have changed some matrices."""
    result: dict[str, Tensor] = {}
    for view, function in changes:
        if view.tensor not in result:
            result[view.tensor] = tensors[view.tensor].clone()
        view.change(result[view.tensor], function)
    return result


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
