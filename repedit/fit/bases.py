"""Orthonormal bases as trainable parameters: what MRP moves, one a site or one for the whole stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.arch import hooks_at
from repedit.fit.subspace import union
from repedit.hooks import Hook
from repedit.maps import LowRank
from repedit.models import Subject
from repedit.sites import Site


class Bases:
    """W, (d, k) a site; the edit removes span(W) and what earlier tasks removed, jointly orthonormal.

    Q = qr((I - B B^T) W) with B the basis of the earlier tasks, in float32 (float64 for W in float64). Only span(W)
    matters, so the parametrisation is free of scale and of the choice of basis; gradients pass through the QR.
    """

    def __init__(
        self,
        subject: Subject,
        starts: Mapping[Site, LowRank],
        previous: Mapping[Site, LowRank],
        *,
        shared: bool = False,
    ) -> None:
        self.subject, self.sites, self.previous, self.shared = subject, tuple(starts), previous, shared
        chosen = list(starts.items())[:1] if shared else starts.items()
        device = subject.device
        self.weights = {site: map_.u.to(device, copy=True).requires_grad_() for site, map_ in chosen}
        self.earlier = {site: previous[site].u.to(device) for site in self.weights if site in previous}
        self.start = {site: w.detach().clone() for site, w in self.weights.items()}
        self.now: dict[Site, Tensor] = {}
        self.only: Tensor | None = None
        """Positions (b, t) that the hooks project at; None for all."""
        self.refresh()

    def refresh(self) -> None:
        """Recompute the orthonormal bases from the parameters; once a step, before the forward passes."""
        self.now = {site: self._orthonormal(site, w) for site, w in self.weights.items()}

    def hooks(self) -> list[Hook]:
        """Hooks that project with the current bases, and gradients flow to the parameters."""
        model, plan = self.subject.model, self.subject.anatomy
        return [h for s in self.sites for h in hooks_at(model, plan, s, self._visit(s), replaces=True)]

    def maps(self) -> dict[Site, LowRank]:
        """What is removed at each site: the union of the earlier tasks' span and the trained one."""
        self.refresh()
        found = {}
        for site in self.sites:
            new = self.now[self._key(site)].detach().double().cpu()
            parts = [LowRank(new, new)] if site not in self.previous else [self.previous[site], LowRank(new, new)]
            u = union(*parts).u.float().contiguous()
            found[site] = LowRank(u, u)
        return found

    def overlap(self) -> float:
        """||U_0^T U||^2 / k, mean over the bases: 1 where training stayed in the span it began with."""
        shares = [
            float(
                (torch.linalg.qr(w0.double())[0].T @ self.now[site].detach().double()).square().sum()
                / max(w0.shape[1], 1)
            )
            for site, w0 in self.start.items()
        ]
        return sum(shares) / len(shares)

    def _orthonormal(self, site: Site, w: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        basis = self.earlier.get(site)
        return torch.linalg.qr(w if basis is None else w - basis @ (basis.T @ w))[0]

    def _key(self, site: Site) -> Site:
        return self.sites[0] if self.shared else site

    def _visit(self, site: Site) -> Any:
        key = self._key(site)

        def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> Tensor:
            work = x.to(torch.promote_types(x.dtype, torch.float32))
            q = self.now[key].to(work)
            if key in self.earlier:
                q = torch.cat([self.earlier[key].to(work), q], 1)
            new = (work - (work @ q) @ q.T).to(x.dtype)
            return new if self.only is None else torch.where(self.only.reshape(*x.shape[:-1], 1), new, x)

        return visit
