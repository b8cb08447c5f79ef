"""One forward loop over a corpus: statistics at chosen sites.

Statistics are reduced inside the hook, so memory does not grow with tokens.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from repedit.activations.counting import Count, CountingRule
from repedit.arch import hooks_at
from repedit.data import Batch, Batches
from repedit.edit import Edit
from repedit.errors import (
    FingerprintError,
    NoGradient,
    NotEnoughRows,
    NotFinite,
    QuantizedModel,
    RepeditError,
    UnknownSite,
)
from repedit.hooks import Hook, installed
from repedit.models import Subject
from repedit.sites import Point, Site
from repedit.stats import Activity


@dataclass(frozen=True, eq=False)
class Collection(Mapping[Site, Activity]):
    """Statistics by site, with the model and the text they come from."""

    statistics: Mapping[Site, Activity]
    model: str
    """Fingerprint of the model's weights."""
    corpus: str
    data_hash: str
    rule: Mapping[str, bool]
    """Which tokens counted."""
    seen: int
    counted: int
    units: Mapping[Site, Mapping[str, int]]
    """Neurons a unit: {"head": e, "kv_group": G e} for attention sites."""
    gated: bool
    seconds_in_hooks: float = field(default=0.0, compare=False)
    edit: str = ""
    """Hash of the edit that was active, empty where none was."""

    def __getitem__(self, site: Site | str) -> Activity:
        return self.statistics[Site.parse(site)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.statistics)

    def __len__(self) -> int:
        return len(self.statistics)

    def only(self, point: str | Point) -> Collection:
        """The part of the collection at one point, such as "attn.neurons"."""
        kept = {site: value for site, value in self.items() if site.point == point}
        return replace(self, statistics=kept, units={site: self.units[site] for site in kept})

    def __add__(self, other: Collection) -> Collection:
        """Both collections as one: the sums of every site are added.

        Raises:
            FingerprintError: if they were not collected at the same sites of one model, by one rule.
        """
        for what in ("model", "edit", "rule", "units"):
            mine, theirs = (getattr(side, what) for side in (self, other))
            if mine != theirs:
                raise FingerprintError(f"cannot merge collections: {what} is {mine} and {theirs}; collect both alike")
        return replace(
            self,
            statistics={site: self[site] + other[site] for site in self},
            corpus=self.corpus if self.corpus == other.corpus else f"{self.corpus}+{other.corpus}",
            data_hash=hashlib.sha256("+".join(sorted((self.data_hash, other.data_hash))).encode()).hexdigest(),
            seen=self.seen + other.seen,
            counted=self.counted + other.counted,
            seconds_in_hooks=self.seconds_in_hooks + other.seconds_in_hooks,
        )


def collect(
    subject: Subject,
    corpus: Batches,
    sites: str | Site | list[str | Site] = "*.mlp.neurons",
    *,
    gradients: bool = False,
    count: Count | None = None,
    first_position: bool = False,
    special_tokens: bool = False,
    edit: Edit | None = None,
    length: int = 128,
    batch_size: int = 8,
    limit_tokens: int | None = None,
    progress: bool | None = None,
) -> Collection:
    """Activity statistics of a corpus at the selected sites, in one pass.

    Padding never counts; the first position of a chunk and special tokens do not count unless asked for. Without
    gradients the language-model head is not run.

    Args:
        gradients: also sum z * dL/dz, with L the summed loss of the predictions of counted tokens.
        count: a rule of your own: batch -> mask (b, t), replacing the default one (padding still never counts).
        edit: an edit that is active during the pass.
        limit_tokens: stop after the batch that reaches this many counted tokens.
    Raises:
        UnknownSite: if the selector names a site this model has not, or a site that is not made of neurons.
        NotEnoughRows: if no token counts.
        NotFinite: if an activation or the loss is not finite.
        NoGradient: if gradients are asked for where none can be had.
    """
    chosen = subject.select(sites)
    _check_neurons(chosen)
    _check_gradients(subject, chosen, gradients)
    plan = subject.anatomy
    found = {
        site: Activity.zeros(plan.width_of(site.layer, site.point), gradients=gradients, device=subject.device)
        for site in chosen
    }
    watch = _Watch(subject, found, gradients)
    rule = CountingRule(subject.tokenizer, first_position, special_tokens, count)
    seen = counted = 0
    with edit.hooked(subject) if edit else nullcontext(), installed(watch.hooks()):
        for number, batch in enumerate(batches(subject, corpus, length, batch_size, progress, "collect")):
            with named_batch(number):
                mask, first = rule(batch)
                watch.run(batch, mask, first)
            seen, counted = seen + int(batch.attention_mask.sum()), counted + int(mask.sum())
            if limit_tokens is not None and counted >= limit_tokens:
                break
    if not counted:
        raise NotEnoughRows(
            f"corpus {corpus.name!r}: {seen} tokens seen, 0 counted ({rule.describe()}); give longer text"
        )
    return Collection(
        statistics={site: value.cpu() for site, value in found.items()},
        model=subject.fingerprint(),
        corpus=corpus.name,
        data_hash=corpus.hash,
        rule=rule.plain(),
        seen=seen,
        counted=counted,
        units={site: _units(subject, site) for site in chosen},
        gated=subject.architecture.gated,
        seconds_in_hooks=watch.seconds,
        edit=edit.hash if edit else "",
    )


class _Watch:
    """The observing hooks of one collection, and the pass that feeds them."""

    def __init__(self, subject: Subject, found: Mapping[Site, Activity], gradients: bool) -> None:
        self.subject, self.found, self.gradients = subject, found, gradients
        self.mask = self.first = torch.empty(0)
        self.held: dict[Site, Tensor] = {}
        self.seconds = 0.0

    def hooks(self) -> list[Hook]:
        plan, model = self.subject.anatomy, self.subject.model
        return [hook for site in self.found for hook in hooks_at(model, plan, site, self._visit(site), replaces=False)]

    def run(self, batch: Batch, mask: Tensor, first: Tensor) -> None:
        self.mask, self.first = mask, first
        inputs = inputs_of(batch)
        if not self.gradients:
            with torch.no_grad():
                self.subject.model.base_model(**inputs)
            return
        # The embeddings carry the graph even where every weight is frozen.
        embedded = self.subject.model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        with torch.enable_grad():
            logits = self.subject.model(inputs_embeds=embedded, **inputs).logits
            loss = _loss(logits, batch, mask)
        if not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss is {loss.item()}; load the model in float32?")
        held = list(self.held.values())
        for (site, z), grad in zip(self.held.items(), torch.autograd.grad(loss, held), strict=True):
            self._update(site, z.detach(), slice(None), None, grad)
        self.held.clear()

    def _visit(self, site: Site) -> Callable[[Tensor, slice, Tensor | None], None]:
        def visit(x: Tensor, at: slice, tokens: Tensor | None) -> None:
            if self.gradients:
                self.held[site] = x
                return
            start = time.thread_time()
            self._update(site, x, at, tokens, None)
            self.seconds += time.thread_time() - start

        return visit

    def _update(self, site: Site, x: Tensor, at: slice, tokens: Tensor | None, grad: Tensor | None) -> None:
        # OPT flattens its tokens before the MLP, so the rows of x may be (b t) as well as (b, t).
        mask, first = (
            (m if tokens is None else m.reshape(-1)[tokens.to(m.device)]).reshape(x.shape[:-1]).to(x.device)
            for m in (self.mask, self.first)
        )
        try:
            self.found[site].update(x, mask, grad=grad, first=first, at=at)
        except NotFinite as error:
            raise NotFinite(f"{site}: {error}") from error


def batches(
    subject: Subject, corpus: Batches, length: int, batch_size: int, progress: bool | None, label: str
) -> Iterator[Batch]:
    """The batches of a corpus on the subject's device, with a progress bar where the output is a terminal."""
    tokenizer = subject.tokenizer if not hasattr(corpus, "documents") else subject.need_tokenizer()
    items = list(corpus.batches(tokenizer, length=length, batch_size=batch_size))
    for batch in tqdm(
        items, desc=f"{label} {corpus.name}", disable=None if progress is None else not progress, leave=False
    ):
        yield replace(
            batch, input_ids=batch.input_ids.to(subject.device), attention_mask=batch.attention_mask.to(subject.device)
        )


def inputs_of(batch: Batch) -> dict[str, Any]:
    """What the forward pass of a model takes for a batch.

    Positions are spelled out where a row is padded on the left: GPT-2 and GPT-Neo would count the padding.
    """
    mask = batch.attention_mask
    found = {"input_ids": batch.input_ids, "attention_mask": mask.long(), "use_cache": False}
    return found if bool(mask[:, 0].all()) else found | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half types widened: log-probabilities of bfloat16 are coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _loss(logits: Float[Tensor, "b t v"], batch: Batch, mask: Tensor) -> Tensor:
    """Summed negative log-likelihood of the counted tokens, each predicted from the position before it."""
    use = batch.attention_mask[:, :-1] & mask[:, 1:]
    picked = at_least_float32(logits[:, :-1][use]).log_softmax(-1)
    return -picked.gather(1, batch.input_ids[:, 1:][use][:, None]).sum()


def _check_neurons(sites: tuple[Site, ...]) -> None:
    for site in sites:
        if site.point not in (Point.MLP_NEURONS, Point.ATTN_NEURONS):
            raise UnknownSite(
                f"{site} is not made of neurons: activity is collected at mlp.neurons and attn.neurons; "
                "try '*.mlp.neurons'"
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
    routed = [s for s in sites if s.point is Point.MLP_NEURONS and subject.anatomy.branch(s.layer, s.point).routed]
    if routed:
        raise NoGradient(
            f"{routed[0]} holds expert neurons, which are recomputed outside the graph; collect without gradients"
        )


def _units(subject: Subject, site: Site) -> dict[str, int]:
    if site.point is not Point.ATTN_NEURONS:
        return {}
    branch = subject.anatomy.branch(site.layer, site.point)
    return {"head": branch.head_width, "kv_group": branch.head_width * branch.group}


@contextmanager
def named_batch(number: int) -> Iterator[None]:
    """Say which batch failed; nothing is skipped."""
    try:
        yield
    except RepeditError as error:
        raise type(error)(f"batch {number}: {error}") from error
    except Exception as error:
        error.add_note(f"in batch {number} of the corpus; no batch was skipped")
        raise
