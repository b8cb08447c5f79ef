"""Prove a row of the family table on a real forward pass.

For every branch of every layer: zeroing neurons by a hook, by the columns they write with, and by the rows that feed
them must give the same logits, and logits that differ from the original's; mapping the output by a hook and in the
weights must agree too (for post-norm families: must erase the same subspace).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from repedit.arch.anatomy import Anatomy, Branch, Neurons, TensorSpec, View, anatomy
from repedit.arch.architecture import resolve
from repedit.arch.taps import hooks_at
from repedit.errors import UnknownArchitecture
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
    """Largest logit change the edit makes, over the spread of the logits."""
    error: float
    """Largest difference between hook and weights, on the same scale."""
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class ArchitectureReport:
    """One proof for each tap."""

    model_type: str
    proofs: tuple[Proof, ...]

    @property
    def passed(self) -> bool:
        """Whether every proof passed."""
        return all(proof.passed for proof in self.proofs)


@torch.no_grad()
def check_architecture(model: Any, *, tolerance: float = TOLERANCE) -> ArchitectureReport:
    """Check the model's row of the family table on the model itself; the model is not changed.

    Raises:
        UnknownArchitecture: if a tap does not do what the row says, naming the sites.
    """
    specs = {n: TensorSpec(tuple(p.shape), p.dtype) for n, p in model.named_parameters(remove_duplicate=False)}
    check = _Check(model, anatomy(resolve(model.config), specs), tolerance)
    proofs = []
    for layer, pair in enumerate(check.plan.layers):
        for branch in pair:
            proofs += [check.neurons(layer, branch), check.out(layer, branch)]
    report = ArchitectureReport(check.plan.architecture.model_type, tuple(proofs))
    if not report.passed:
        bad = [
            f"{p.site} (moved {p.moved:.1e}, hook against weights {p.error:.1e}{p.note})"
            for p in proofs
            if not p.passed
        ]
        raise UnknownArchitecture(f"the {report.model_type} row does not describe this model at {'; '.join(bad[:4])}")
    return report


class _Check:
    def __init__(self, model: Any, plan: Anatomy, tolerance: float) -> None:
        self.model, self.plan, self.tolerance = model, plan, tolerance
        self.parameters = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
        self.generator = torch.Generator().manual_seed(0)
        device = model.get_input_embeddings().weight.device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.ids = torch.randint(vocabulary, (2, 12), generator=self.generator).to(device)
        self.base = self.logits()
        self.spread = float(self.base.std()) or 1.0

    def logits(self, changed: Mapping[str, Tensor] | None = None, hooks: list[Hook] | None = None) -> Tensor:
        inputs = {"input_ids": self.ids, "use_cache": False}
        with installed(hooks or []):
            return functional_call(self.model, dict(changed or {}), (), inputs, tie_weights=True).logits.float()

    def neurons(self, layer: int, branch: Branch) -> Proof:
        """Zero half of the neurons (whole shared heads) three ways."""
        site = Site(layer, branch.inner)
        size = branch.head_width if branch.inner is Point.ATTN_NEURONS else 1
        keep = self._half(branch.width // (size * branch.group), size * branch.group)
        hooks = hooks_at(self.model, self.plan, site, lambda x, at, _: x * keep[at].to(x), replaces=True)
        hooked = self.logits(hooks=hooks)
        columns = self._edited((p.out, keep[p.start : p.stop], True) for p in branch.parts)
        rows = self._edited((view, self._feeding(branch, p, keep), False) for p in branch.parts for view in p.readers)
        error = max(float((self.logits(t) - hooked).abs().max()) for t in (columns, rows))
        return self._proof(site, hooked, error, "" if branch.parts[0].readers else "; no readers")

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

    def _leak(self, site: Site, map_: LowRank, changed: Mapping[str, Tensor]) -> float:
        seen: list[Tensor] = []
        watch = hooks_at(self.model, self.plan, site, lambda x, at, _: seen.append(x.float()), replaces=False)
        self.logits(changed, watch)
        return float((seen[0] @ map_.v).norm() / seen[0].norm())

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
