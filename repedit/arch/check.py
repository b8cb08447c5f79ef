"""Verify a row of the family table: compare it with the modules of a model, and with a real forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from repedit.arch.hooks import hooks_at
from repedit.arch.layout import Branch, MatrixView, ModelLayout, Neurons, TensorSpec, match_layout
from repedit.arch.offload import check_in_memory
from repedit.arch.spec import resolve
from repedit.errors import NotAModel, ShapeError, UnknownArchitecture
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
    for branch in (b for pair in layout.layers for b in pair):
        module = _submodule(model, branch.writer, row.model_type)
        _submodule(model, branch.joined, row.model_type)
        kind = type(module).__name__
        if branch.routed:
            expected = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
            wrong = {k: getattr(module, k, v) for k, v in expected.items() if getattr(module, k, v) != v}
            if wrong:
                raise UnknownArchitecture(
                    f"{branch.writer} stores its experts with {wrong}, the row expects {expected}"
                )
        elif (kind == "Conv1D") != row.transposed or not (row.transposed or isinstance(module, nn.Linear)):
            raise UnknownArchitecture(
                f"{branch.writer} is a {kind}; the {row.model_type} row says transposed={row.transposed}"
            )
        readers = {(v.tensor.rpartition(".")[0], v.part) for v in branch.parts[0].readers}
        needed = 2 if row.gated and branch.inner is Point.MLP_NEURONS else 1
        if len(readers) != needed:
            raise UnknownArchitecture(
                f"{branch.writer} has {len(readers)} readers; the {row.model_type} row with gated={row.gated} needs {needed} different ones"
            )


def check_plain_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are computed from other tensors, by an adapter, a parametrization or a pruning mask.

    Raises:
        NotAModel: naming the first module, with the call that makes its weight an ordinary parameter.
    """
    for name, module in model.named_modules():
        hooks = (type(hook).__module__ for hook in module._forward_pre_hooks.values())
        check_no_adapter(module, name)
        if parametrize.is_parametrized(module):
            raise NotAModel(
                f"{name} is parametrized: its weight is computed from other tensors. Remove the parametrization first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )
        if any(where.startswith("torch.nn.utils.") for where in hooks):
            raise NotAModel(
                f"the weight of {name} is computed by torch.nn.utils from other tensors. Make it permanent first: prune.remove, "
                "remove_weight_norm or remove_spectral_norm"
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise NotAModel(f"{type(model).__name__} {_ADAPTER}")


def check_no_adapter(module: object, name: str = "") -> None:
    """Refuse a model or module of PEFT.

    Raises:
        NotAModel: with what to do.
    """
    if type(module).__module__.startswith("peft."):
        raise NotAModel(f"{name or type(module).__name__} {_ADAPTER}")


_ADAPTER = (
    "holds an adapter of peft, which is not part of the weights. Merge it first: PeftModel.from_pretrained(model, "
    "adapter).merge_and_unload(), or use the model without it; learned prompts and prefixes cannot be merged"
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
OUTPUTS = (Point.ATTN_OUT, Point.MLP_OUT)
STREAM = (Point.RESID_PRE, *OUTPUTS, Point.RESID_POST)


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
    """Four proofs a layer (neurons and output of both branches), one for its stream and one for the embeddings."""

    model_type: str
    proofs: tuple[Proof, ...]

    @property
    def passed(self) -> bool:
        """Whether every proof passed."""
        return all(proof.passed for proof in self.proofs)


@torch.no_grad()
def check_architecture(model: nn.Module, *, tolerance: float = TOLERANCE) -> ArchitectureReport:
    """Check a model's row of the family table on the model itself; the model is not changed.

    A model in a half type is checked in float32, with a copy of its weights.

    Raises:
        UnknownArchitecture: if a site does not behave as the row says, naming the sites.
        OffloadedTensors: if weights are not in memory.
    """
    check_in_memory(model, "load the model without device_map to check it")
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    layout = match_layout(resolve(model.config), specs)  # type: ignore[arg-type]
    check_modules(model, layout)
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


class _ForwardCheck:
    """One forward pass of the model records the inputs of each block; each proof then runs its block alone."""

    def __init__(self, model: nn.Module, layout: ModelLayout, tolerance: float) -> None:
        self.model, self.layout, self.tolerance = model, layout, tolerance
        # A rounding can send a token to another expert, so half types are checked in float32.
        self.wide = {n: p.float() for n, p in model.named_parameters() if p.dtype.itemsize < 4}
        self.parameters = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)} | self.wide
        self.generator = torch.Generator().manual_seed(0)
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
        blocks = [model.get_submodule(path) for path in layout.block_paths]
        self.embedded = self._run_model([Hook(block, "call", self._record_call) for block in blocks])
        self.unedited = [self._outputs(layer) for layer in range(len(blocks))]

    def proofs(self) -> list[Proof]:
        proofs = [self.embeddings()]
        for layer, branches in enumerate(self.layout.layers):
            for branch in branches:
                proofs += [self.neurons(layer, branch), self.output(layer, branch)]
            proofs.append(self.stream(layer))
        return proofs

    def neurons(self, layer: int, branch: Branch) -> Proof:
        """Zero half of the neurons (whole shared heads) three ways."""
        site = Site(layer, branch.inner)
        size = branch.head_width if branch.inner is Point.ATTN_NEURONS else 1
        keep = self._half_mask(branch.width // (size * branch.group), size * branch.group)
        used: set[int | None] = set()

        def zero(x: Tensor, neurons: slice, _tokens: Tensor | None) -> Tensor:
            used.add(neurons.start)
            return x * keep[neurons].to(x)

        hooked = self._outputs(layer, hooks=hooks_at(self.model, self.layout, site, zero, replaces=True))
        columns = self._masked((p.out, keep[p.start : p.stop], True) for p in branch.parts)
        rows = self._masked(
            (view, self._reader_mask(branch, p, keep), False) for p in branch.parts for view in p.readers
        )
        error = max(_distance(self._outputs(layer, changed), hooked) for changed in (columns, rows))
        idle = [e for e, p in enumerate(branch.parts) if branch.routed and p.start not in used]
        return self._proof(site, hooked, error, f"; experts {idle} received no token" if idle else "")

    def output(self, layer: int, branch: Branch) -> Proof:
        """Remove a random plane from what the branch adds to the stream, by a hook and in the weights."""
        site = Site(layer, branch.outer)
        basis, gain = torch.randn(self.layout.width, 2, generator=self.generator), None
        if branch.gain is not None:
            gain = self.parameters[branch.gain].float() + (1.0 if self.layout.architecture.unit_gain else 0.0)
            # A channel that a norm multiplies by 0 never reaches the stream, so the plane lies within the other channels.
            dead = _is_zero_gain(gain).cpu()
            basis[dead] = 0
            basis = basis[:, : int((~dead).sum())]
            if not basis.shape[1]:
                raise UnknownArchitecture(
                    f"{branch.gain} multiplies every channel by zero, so {site} adds nothing to the stream and its row cannot be "
                    "checked; was the model saved completely?"
                )
        map_ = LowRank.projection(basis)
        hooks = hooks_at(self.model, self.layout, site, lambda x, at, _: map_(x), replaces=True)
        hooked = self._outputs(layer, hooks=hooks)
        views = [p.out for p in branch.parts] + ([MatrixView(branch.bias)] if branch.bias else [])
        changed: dict[str, Tensor] = {}
        for view in views:
            stored = changed.get(view.tensor, self.parameters[view.tensor])
            changed[view.tensor] = view.edit(stored, lambda w: _folded(map_, w, gain))
        if gain is None:
            return self._proof(site, hooked, _distance(self._outputs(layer, changed), hooked))
        x = self._tensors_at(layer, [branch.outer], changed)[0]
        leak = float((x @ map_.v.to(x.device)).norm() / x.norm())
        return self._proof(site, hooked, leak, "; leak of the subspace")

    def stream(self, layer: int) -> Proof:
        """resid.post = resid.pre + attn.out + mlp.out reaches the next layer; mlp.out needs attn.out unless parallel."""
        pre, attention, mlp, post = self._tensors_at(layer, STREAM)
        following = self._tensors_at(layer + 1, [Point.RESID_PRE])[0] if layer + 1 < len(self.unedited) else post
        # Some families flatten batch and tokens around the MLP.
        error = _distance(pre + attention + mlp.reshape(post.shape), post) + _distance(following.to(post), post)
        site = Site(layer, Point.ATTN_OUT)
        turn = hooks_at(self.model, self.layout, site, lambda x, at, _: x.flip(-1), replaces=True)
        moved = _distance(self._tensors_at(layer, [Point.MLP_OUT], hooks=turn)[0], mlp)
        parallel = bool(self.layout.architecture.parallel)
        note = f"; parallel={parallel}, sum of the outputs against the stream"
        passed = error <= self.tolerance and (moved > 1e-6) != parallel
        return Proof(Site(layer, Point.RESID_POST), moved, error, passed, note)

    def embeddings(self) -> Proof:
        """Mapping every embedding, and shifting the token table, does the same to the stream."""
        width, before = self.layout.width, self.embedded
        map_ = LowRank.projection(torch.randn(width, 2, generator=self.generator))
        shift = torch.randn(width, generator=self.generator).to(before.device)
        scale = width**0.5 if self.layout.architecture.embedding_scaled else 1.0
        changed = {}
        for name in self.layout.embeddings:
            constant = shift / scale if name == self.layout.embeddings[0] else torch.zeros_like(shift)
            table = self.parameters[name]
            changed[name] = (map_(table.float()) + constant.to(table.device)).to(table.dtype)
        after = self._run_model([], changed)
        error = _distance(after, map_(before) + shift)
        return Proof(Site(0, Point.RESID_PRE), _distance(after, before), error, error <= self.tolerance)

    def _run_model(self, hooks: list[Hook], changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the whole model; 0.resid.pre."""
        embedding = self.parameters[self.layout.embeddings[0]]
        ids = torch.randint(embedding.shape[0], (2, 12), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids.to(embedding.device), "use_cache": False}
        block = self.model.get_submodule(self.layout.block_paths[0])
        streams: list[Tensor] = []
        with installed(self.model, [*hooks, Hook(block, "input", lambda x: streams.append(x.float()))]):
            functional_call(self.model, self.wide | dict(changed or {}), (), inputs, tie_weights=True)
        return streams[0]

    def _record_call(
        self, _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], _output: object
    ) -> None:
        self.calls.append((args, kwargs))

    def _outputs(self, layer: int, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()) -> Tensor:
        """attn.out and mlp.out of a layer, one row per token."""
        return torch.cat([x.reshape(-1, self.layout.width) for x in self._tensors_at(layer, OUTPUTS, changed, hooks)])

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
                tensors[point] = x.float()

            return hooks_at(self.model, self.layout, Site(layer, point), store, replaces=False)

        path, (args, kwargs) = self.layout.block_paths[layer], self.calls[layer]
        weights = {
            n.removeprefix(f"{path}."): t
            for n, t in (self.wide | dict(changed or {})).items()
            if n.startswith(f"{path}.")
        }
        block = self.model.get_submodule(path)
        with installed(block, [*hooks, *(hook for point in points for hook in observe(point))]):
            functional_call(block, weights, args, kwargs)
        return [tensors[point] for point in points]

    def _masked(self, masks: Iterable[tuple[MatrixView, Tensor, bool]]) -> dict[str, Tensor]:
        """Tensors with some columns or rows set to zero, by (view, mask, whether the mask is of columns)."""
        changed: dict[str, Tensor] = {}
        for view, keep, columns in masks:
            if view.tensor not in changed:
                changed[view.tensor] = self.parameters[view.tensor].clone()
            factor = keep[None, :] if columns else keep[:, None]
            view.change(changed[view.tensor], partial(_times, factor))
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
        moved = _distance(hooked, self.unedited[site.layer])
        return Proof(site, moved, error, moved > 1e-6 and error <= self.tolerance, note)


def _times(factor: Tensor, w: Tensor) -> Tensor:
    return w * factor.to(w)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the standard deviation of the expected tensor."""
    return float((actual - expected).abs().max() / expected.std())


def _folded(map_: LowRank, w: Tensor, gain: Tensor | None) -> Tensor:
    """A weight with a map of its outputs, through the gain of the post-norm if there is one."""
    if gain is None:
        return map_.left(w.float()).to(w.dtype)
    column = gain[:, None]
    out = map_.left(w.float() * column) / column
    return torch.where(_is_zero_gain(column), w.float(), out).to(w.dtype)


def _is_zero_gain(gain: Tensor) -> Tensor:
    """Where a norm multiplies by zero, or by a number negligible beside its largest gain."""
    return gain.abs() <= 1e-6 * gain.abs().max()
