"""Prove a row of the family table on a real forward pass.

For every branch of every layer: zeroing neurons by a hook, by the columns they write with, and by the rows that feed
them must give the same logits, and logits that differ from the original's; mapping the output by a hook and in the
weights must agree too (for post-norm families: must erase the same subspace). For every layer: the block adds the two
outputs to the stream and nothing else, and the MLP sees the attention unless the row says parallel. The embeddings
add up to 0.resid.pre.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repedit.arch.anatomy import Anatomy, Branch, Neurons, anatomy
from repedit.arch.architecture import resolve
from repedit.arch.taps import hooks_at
from repedit.arch.views import TensorSpec, View
from repedit.errors import ShapeError, UnknownArchitecture
from repedit.hooks import Hook, installed
from repedit.maps import LowRank
from repedit.sites import Point, Site

# Largest logit difference between hook and weights, over the logits' spread: 4e-6 was seen over all rows of the table
# in float32 (tests/test_arch.py); a wrong row moves logits by more than 1e-2 of the spread.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Proof:
    """What the forward pass said of one site."""

    site: Site
    moved: float
    """Largest change the edit makes to the logits (resid.pre: to itself; resid.post: to mlp.out), over their spread."""
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
def check_architecture(model: Any, *, tolerance: float = TOLERANCE) -> ArchitectureReport:
    """Check the model's row of the family table on the model itself; the model is not changed.

    A model in a half type is checked in float32, which takes a copy of its weights.

    Raises:
        UnknownArchitecture: if a tap does not do what the row says, naming the sites.
    """
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    plan = anatomy(resolve(model.config), specs)
    check_modules(model, plan)
    try:
        proofs = _proofs(_Check(model, plan, tolerance))
    except ShapeError as error:
        raise UnknownArchitecture(
            f"the {plan.architecture.model_type} row points at a tensor of another width: {error}"
        ) from error
    report = ArchitectureReport(plan.architecture.model_type, tuple(proofs))
    if not report.passed:
        bad = [f"{p.site} (moved {p.moved:.1e}, error {p.error:.1e}{p.note})" for p in proofs if not p.passed]
        raise UnknownArchitecture(f"the {report.model_type} row does not describe this model at {'; '.join(bad[:4])}")
    return report


def check_modules(model: nn.Module, plan: Anatomy) -> None:
    """Compare a row with the live modules: they exist, store weights the way it says, and have as many readers.

    Raises:
        UnknownArchitecture: naming the first module that disagrees.
    """
    row = plan.architecture
    _module(model, row.head, row.model_type)
    for branch in (b for pair in plan.layers for b in pair):
        module = _module(model, branch.writer, row.model_type)
        _module(model, branch.joined, row.model_type)
        kind = type(module).__name__
        if branch.routed:
            layout = {"is_transposed": False, "is_concatenated": True, "has_bias": False, "has_gate": True}
            wrong = {k: getattr(module, k, v) for k, v in layout.items() if getattr(module, k, v) != v}
            if wrong:
                raise UnknownArchitecture(f"{branch.writer} stores its experts with {wrong}, the row expects {layout}")
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


def _module(model: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnknownArchitecture(f"the {model_type} row names the module {path!r}, which the model lacks") from error


def _proofs(check: _Check) -> list[Proof]:
    proofs = [check.embeddings()]
    for layer, pair in enumerate(check.plan.layers):
        for branch in pair:
            proofs += [check.neurons(layer, branch), check.out(layer, branch)]
        proofs.append(check.stream(layer))
    return proofs


class _Check:
    def __init__(self, model: Any, plan: Anatomy, tolerance: float) -> None:
        self.model, self.plan, self.tolerance = model, plan, tolerance
        # A rounding can send a token to another expert, so half types are checked in float32.
        self.wide = {n: p.float() for n, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)}
        self.parameters = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)} | self.wide
        self.generator = torch.Generator().manual_seed(0)
        device = model.get_input_embeddings().weight.device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.ids = torch.randint(vocabulary, (2, 12), generator=self.generator).to(device)
        self.base = self.logits()
        self.spread = float(self.base.std()) or 1.0

    def logits(self, changed: Mapping[str, Tensor] | None = None, hooks: list[Hook] | None = None) -> Tensor:
        inputs = {"input_ids": self.ids, "use_cache": False}
        with installed(hooks or []):
            weights = self.wide | dict(changed or {})
            return functional_call(self.model, weights, (), inputs, tie_weights=True).logits.float()

    def neurons(self, layer: int, branch: Branch) -> Proof:
        """Zero half of the neurons (whole shared heads) three ways."""
        site = Site(layer, branch.inner)
        size = branch.head_width if branch.inner is Point.ATTN_NEURONS else 1
        keep = self._half(branch.width // (size * branch.group), size * branch.group)
        used: set[int | None] = set()

        def silence(x: Tensor, at: slice, _tokens: Tensor | None) -> Tensor:
            used.add(at.start)
            return x * keep[at].to(x)

        hooked = self.logits(hooks=hooks_at(self.model, self.plan, site, silence, replaces=True))
        columns = self._edited((p.out, keep[p.start : p.stop], True) for p in branch.parts)
        rows = self._edited((view, self._feeding(branch, p, keep), False) for p in branch.parts for view in p.readers)
        error = max(float((self.logits(t) - hooked).abs().max()) for t in (columns, rows))
        idle = [e for e, p in enumerate(branch.parts) if branch.routed and p.start not in used]
        return self._proof(site, hooked, error, f"; experts {idle} received no token" if idle else "")

    def out(self, layer: int, branch: Branch) -> Proof:
        """Remove a random plane from what the branch adds to the stream, by a hook and in the weights."""
        site = Site(layer, branch.outer)
        map_ = LowRank.projection(torch.randn(self.plan.width, 2, generator=self.generator).to(self.base.device))
        hooked = self.logits(hooks=hooks_at(self.model, self.plan, site, lambda x, at, _: map_(x), replaces=True))
        gain = None
        if branch.gain is not None:
            gain = self.parameters[branch.gain].float() + (1.0 if self.plan.architecture.unit_gain else 0.0)
        views = [p.out for p in branch.parts] + ([View(branch.bias)] if branch.bias else [])
        changed: dict[str, Tensor] = {}
        for view in views:
            stored = changed.get(view.tensor, self.parameters[view.tensor])
            changed[view.tensor] = view.edit(stored, lambda w: _within(map_, w, gain))
        if gain is None:
            return self._proof(site, hooked, float((self.logits(changed) - hooked).abs().max()))
        return self._proof(site, hooked, self._leak(site, map_, changed) * self.spread, "; leak of the subspace")

    def stream(self, layer: int) -> Proof:
        """resid.post = resid.pre + attn.out + mlp.out, and mlp.out depends on attn.out unless they are parallel."""
        sites = [Site(layer, p) for p in (Point.RESID_PRE, Point.ATTN_OUT, Point.MLP_OUT, Point.RESID_POST)]
        pre, attention, mlp, post = self._seen(sites)
        # Some families flatten batch and tokens around the MLP.
        error = float((pre + attention + mlp.reshape(post.shape) - post).abs().max() / post.std())
        turn = hooks_at(self.model, self.plan, sites[1], lambda x, at, _: x.flip(-1), replaces=True)
        moved = float((self._seen([sites[2]], hooks=turn)[0] - mlp).abs().max() / mlp.std())
        parallel = bool(self.plan.architecture.parallel)
        note = f"; parallel={parallel}, sum of the outputs against the stream"
        return Proof(sites[3], moved, error, error <= self.tolerance and (moved > 1e-6) != parallel, note)

    def embeddings(self) -> Proof:
        """Mapping every embedding, and shifting the token table, does the same to the stream."""
        site, width = Site(0, Point.RESID_PRE), self.plan.width
        map_ = LowRank.projection(torch.randn(width, 2, generator=self.generator).to(self.base.device))
        shift = torch.randn(width, generator=self.generator).to(self.base.device)
        scale = width**0.5 if self.plan.architecture.embedding_scaled else 1.0
        changed = {}
        for name in self.plan.embeddings:
            constant = shift / scale if name == self.plan.embeddings[0] else 0.0
            changed[name] = (map_(self.parameters[name].float()) + constant).to(self.parameters[name].dtype)
        before, after = self._seen([site])[0], self._seen([site], changed)[0]
        error, moved = after - map_(before) - shift, after - before
        spread = before.std()
        relative = float(error.abs().max() / spread)
        return Proof(site, float(moved.abs().max() / spread), relative, relative <= self.tolerance)

    def _seen(self, sites: list[Site], changed: Mapping[str, Tensor] | None = None, hooks: Any = ()) -> list[Tensor]:
        """The tensors at some sites, in the order given."""
        seen: dict[Site, Tensor] = {}

        def watch(site: Site) -> list[Hook]:
            return hooks_at(
                self.model, self.plan, site, lambda x, at, _: seen.update({site: x.float()}), replaces=False
            )

        self.logits(changed, [*hooks, *(hook for site in sites for hook in watch(site))])
        return [seen[site] for site in sites]

    def _leak(self, site: Site, map_: LowRank, changed: Mapping[str, Tensor]) -> float:
        x = self._seen([site], changed)[0]
        return float((x @ map_.v).norm() / x.norm())

    def _edited(self, items: Any) -> dict[str, Tensor]:
        changed: dict[str, Tensor] = {}
        for view, keep, columns in items:
            stored = changed.get(view.tensor, self.parameters[view.tensor])
            factor = keep[None, :] if columns else keep[:, None]
            changed[view.tensor] = view.edit(stored, lambda w, f=factor: w * f.to(w))
        return changed

    def _feeding(self, branch: Branch, part: Neurons, keep: Tensor) -> Tensor:
        if branch.inner is Point.MLP_NEURONS:
            return keep[part.start : part.stop]
        return keep.unflatten(0, (-1, branch.group, branch.head_width))[:, 0].flatten()

    def _half(self, count: int, size: int) -> Tensor:
        keep = torch.ones(count, dtype=torch.bool)
        keep[torch.randperm(count, generator=self.generator)[: max(1, count // 2)]] = False
        return keep.repeat_interleave(size).to(self.base.device)

    def _proof(self, site: Site, hooked: Tensor, error: float, note: str = "") -> Proof:
        moved = float((hooked - self.base).abs().max()) / self.spread
        relative = error / self.spread
        return Proof(site, moved, relative, moved > 1e-6 and relative <= self.tolerance, note)


def _within(map_: LowRank, w: Tensor, gain: Tensor | None) -> Tensor:
    work = w.float() if gain is None else w.float() * gain[:, None]
    out = map_.left(work)
    return (out if gain is None else out / gain[:, None]).to(w.dtype)
