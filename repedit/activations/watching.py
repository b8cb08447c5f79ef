"""The observing hooks of one collection: they see exactly the tensor that an edit at the same site would be given."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.activations.passes import inputs_of, loss_of
from repedit.arch import hooks_at
from repedit.data import Batch
from repedit.errors import ArgumentError, NoGradient, NotFinite, QuantizedModel, ShapeError, TooLarge, UnknownSite
from repedit.hooks import Hook
from repedit.models import Subject
from repedit.sites import Point, Site
from repedit.stats import Activity, CrossMoments, Moments

Labels = Callable[[Batch], Float[Tensor, "b t z"]]


class Watch:
    """What is summed at which site, the hooks that sum it, and the pass that feeds them."""

    def __init__(
        self, subject: Subject, sites: tuple[Site, ...], statistic: type[Any], gradients: bool, labels: Labels | None
    ) -> None:
        _check_statistic(statistic, gradients, labels)
        _check_sites(subject, sites, statistic)
        _check_gradients(subject, sites, gradients)
        self.subject, self.sites, self.statistic = subject, sites, statistic
        self.gradients, self.labels = gradients, labels
        self.found: dict[Site, Any] = {}
        self.mask = self.first = torch.empty(0)
        self.labelled: Tensor | None = None
        self.held: dict[Site, Tensor] = {}
        self.seconds = 0.0
        if labels is None:
            self._begin(None)

    def hooks(self) -> list[Hook]:
        """Observers at every site; resid.mid, a sum that no module gives out, is put back to be part of the graph."""
        plan, model = self.subject.anatomy, self.subject.model
        back = {site: self.gradients and site.point is Point.RESID_MID for site in self.sites}
        return [h for s in self.sites for h in hooks_at(model, plan, s, self._visit(s, back[s]), replaces=back[s])]

    def run(self, batch: Batch, mask: Tensor, first: Tensor) -> None:
        """One forward pass, and a backward pass for gradients."""
        self.mask, self.first = mask, first
        if self.labels is not None:
            self._label(batch, self.labels(batch))
        inputs = inputs_of(batch)
        if not self.gradients:
            with torch.no_grad():
                self.subject.model.base_model(**inputs)
            return
        # The embeddings carry the graph even where every weight is frozen.
        embedded = self.subject.model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        with torch.enable_grad():
            logits = self.subject.model(inputs_embeds=embedded, **inputs).logits
            loss = loss_of(logits, batch, mask)
        if not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss is {loss.item()}; load the model in float32?")
        held = list(self.held.values())
        for (site, z), grad in zip(self.held.items(), torch.autograd.grad(loss, held), strict=True):
            self._update(site, z.detach(), slice(None), None, grad)
        self.held.clear()

    def empty(self) -> None:
        """Forget what was seen and keep what second moments were shifted by."""
        for found in self.found.values():
            if not isinstance(found, Activity):
                found.empty()

    def _begin(self, other: int | None) -> None:
        """Empty statistics at every site, once the width of the labels is known."""
        plan = self.subject.anatomy
        widths = {site: plan.width_of(site.layer, site.point) for site in self.sites}
        place = {site: self.subject.device_at(site.layer) for site in self.sites}
        if self.statistic is Activity:
            gradients = self.gradients
            self.found = {s: Activity.zeros(d, gradients=gradients, device=place[s]) for s, d in widths.items()}
            return
        for device in dict.fromkeys(place.values()):
            here = [d for site, d in widths.items() if place[site] == device]
            _check_memory(sum(8 * d * (d if other is None else other) for d in here), len(here), device)
        if self.statistic is Moments:
            self.found = {site: Moments(d, place[site]) for site, d in widths.items()}
        else:
            self.found = {s: CrossMoments(d, d if other is None else other, place[s]) for s, d in widths.items()}

    def _label(self, batch: Batch, labelled: Tensor) -> None:
        if labelled.ndim != 3 or labelled.shape[:2] != batch.input_ids.shape:
            raise ShapeError(
                f"the labels of a batch have shape {tuple(labelled.shape)}, its tokens {tuple(batch.input_ids.shape)}; "
                "give one row of labels for each token, (b, t, z)"
            )
        if not self.found:
            self._begin(labelled.shape[2])
        self.labelled = labelled

    def _visit(self, site: Site, back: bool) -> Callable[[Tensor, slice, Tensor | None], Tensor | None]:
        def visit(x: Tensor, at: slice, tokens: Tensor | None) -> Tensor | None:
            if self.gradients:
                self.held[site] = x
                return x if back else None
            start = time.thread_time()
            self._update(site, x, at, tokens, self.labelled)
            self.seconds += time.thread_time() - start
            return None

        return visit

    def _update(self, site: Site, x: Tensor, at: slice, tokens: Tensor | None, other: Tensor | None) -> None:
        # OPT flattens its tokens before the MLP, so the rows of x may be (b t) as well as (b, t).
        mask, first = (
            (m if tokens is None else m.reshape(-1)[tokens.to(m.device)]).reshape(x.shape[:-1]).to(x.device)
            for m in (self.mask, self.first)
        )
        try:
            match self.found[site]:
                case Activity() as activity:
                    activity.update(x, mask, grad=other, first=first, at=at)
                case Moments() as moments:
                    moments.update(x, mask)
                case CrossMoments() as cross:
                    assert other is not None
                    cross.update(x, other.reshape(*x.shape[:-1], cross.other), mask)
        except NotFinite as error:
            raise NotFinite(f"{site}: {error}") from error


def _check_statistic(statistic: type[Any], gradients: bool, labels: Labels | None) -> None:
    if statistic not in (Activity, Moments, CrossMoments):
        raise ArgumentError(f"statistic={statistic.__name__}: it must be Activity, Moments or CrossMoments")
    if statistic is CrossMoments and gradients == (labels is not None):
        raise ArgumentError(
            "statistic=CrossMoments pairs the tensor of a site with its gradients or with labels: "
            "give gradients=True or labels=, one of them"
        )
    if statistic is not CrossMoments and labels is not None:
        raise ArgumentError(f"labels= play no part in {statistic.__name__}; use statistic=CrossMoments")
    if statistic is Moments and gradients:
        raise ArgumentError("gradients=True plays no part in Moments; use statistic=CrossMoments for E[x g^T]")


def _check_sites(subject: Subject, sites: tuple[Site, ...], statistic: type[Any]) -> None:
    for site in sites:
        if statistic is Activity and site.point not in (Point.MLP_NEURONS, Point.ATTN_NEURONS):
            raise UnknownSite(
                f"{site} is not made of neurons: activity is collected at mlp.neurons and attn.neurons; "
                "try '*.mlp.neurons'"
            )
        if statistic is not Activity and _routed(subject, site):
            raise UnknownSite(
                f"{site} holds the neurons of several experts, which no single token passes together: they have no "
                f"covariance. Collect {statistic.__name__} at {site.layer}.mlp.out, or Activity here"
            )


def _check_gradients(subject: Subject, sites: tuple[Site, ...], gradients: bool) -> None:
    if not gradients:
        return
    if torch.is_inference_mode_enabled():
        raise NoGradient(
            "gradients were asked for under torch.inference_mode, where no tensor has one; leave that context"
        )
    if subject.quantizer:
        raise QuantizedModel(
            f"the weights are quantised ({subject.quantizer}); gradients need the unquantised base, or load with dequantisation"
        )
    routed = [site for site in sites if _routed(subject, site)]
    if routed:
        raise NoGradient(
            f"{routed[0]} holds expert neurons, which are recomputed outside the graph; collect without gradients"
        )


def _routed(subject: Subject, site: Site) -> bool:
    return site.point is Point.MLP_NEURONS and subject.anatomy.branch(site.layer, site.point).routed


def _check_memory(asked: int, sites: int, device: torch.device) -> None:
    free = _free(device)
    if asked > free:
        raise TooLarge(
            f"float64 moments of {sites} sites take {asked / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
            "choose fewer sites, or collect layer groups one after another"
        )


def _free(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if known.exists():
        # Free pages alone leave out the file cache, which the kernel gives back.
        return next(int(line.split()[1]) * 1024 for line in known.read_text().splitlines() if "MemAvailable" in line)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
