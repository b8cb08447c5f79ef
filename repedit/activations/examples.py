"""Max-activating examples: the tokens with the largest activation of each neuron, with the text around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from repedit.activations.collection import CountingRule
from repedit.activations.forward import batches, inputs_of
from repedit.arch import hooks_at
from repedit.arguments import checked
from repedit.data import Batches
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, UnknownSite, check_whole, given
from repedit.hooks import evaluating, installed
from repedit.models.subject import Subject
from repedit.sites import Site


@dataclass(frozen=True)
class Example:
    """A token that activates a neuron, with the text around it."""

    before: str
    token: str
    after: str
    activation: float
    """z at the token, with its sign."""

    def __str__(self) -> str:
        return f"{self.activation:+.3g}  {self.before}[{self.token}]{self.after}"


@dataclass(frozen=True, eq=False)
class Examples(Mapping[Site, Float[Tensor, "k d"]]):
    """The k strongest tokens of every neuron of some sites, in descending order, each from another chunk of the corpus."""

    activations: Mapping[Site, Float[Tensor, "k d"]]
    """z of each, with its sign; nan where the corpus has fewer chunks."""
    rows: Mapping[Site, Int[Tensor, "k d"]]
    """The chunk that holds each; -1 where there is none."""
    positions: Mapping[Site, Int[Tensor, "k d"]]
    chunks: tuple[tuple[int, ...], ...]
    """Token ids of every chunk, without padding."""
    tokenizer: Any
    corpus: str

    def __repr__(self) -> str:
        neurons = sum(values.shape[1] for values in self.values())
        return f"Examples({neurons:,} neurons at {len(self)} sites, {len(self.chunks)} chunks of {self.corpus})"

    def __getitem__(self, site: Site | str) -> Float[Tensor, "k d"]:
        return self.activations[Site.parse(site)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def of(self, site: Site | str, neuron: int, *, context: int = 8) -> tuple[Example, ...]:
        """The examples of one neuron, with up to `context` tokens on either side.

        Raises:
            UnknownSite: if there are no examples of the site. ArgumentError: if it has no such neuron.
        """
        site = Site.parse(site)
        if site not in self.activations:
            raise UnknownSite(f"no examples were kept at {site}; there are some at {', '.join(map(str, self))}")
        if not 0 <= neuron < self[site].shape[1]:
            raise ArgumentError(f"{site} has neurons 0..{self[site].shape[1] - 1}, not {neuron}")
        columns = (values[site][:, neuron].tolist() for values in (self.activations, self.rows, self.positions))
        return tuple(
            self._example(value, row, at, context) for value, row, at in zip(*columns, strict=True) if row >= 0
        )

    def _example(self, value: float, row: int, at: int, context: int) -> Example:
        ids = self.chunks[row]
        parts = ids[max(at - context, 0) : at], ids[at : at + 1], ids[at + 1 : at + 1 + context]
        before, token, after = (self.tokenizer.decode(part) for part in parts)
        return Example(before, token, after, value)


@checked
def max_activating(
    subject: Subject,
    corpus: Batches,
    sites: str | Site | list[str | Site] = "*.mlp.neurons",
    *,
    count: int = 3,
    length: int = 128,
    batch_size: int = 8,
    limit_tokens: int | None = None,
    progress: bool | None = None,
) -> Examples:
    """The tokens of largest |z| for every neuron, at most one in each chunk.

    One pass over the corpus; memory grows with the number of neurons, not of tokens. Tokens are counted as in `collect`.

    Args:
        count: number of examples for each neuron.
        limit_tokens: stop after the batch that reaches this many counted tokens.
    Raises:
        ArgumentError: if a site holds expert neurons, which see different tokens each, or count is below 1.
        NotEnoughRows: if no token counts.
    """
    check_whole(**given(limit_tokens=limit_tokens))
    chosen, layout = subject.select(sites), subject.layout
    routed = [site for site in chosen if layout.routed(site)]
    if routed:
        raise ArgumentError(f"{routed[0]} holds expert neurons, which see different tokens each; name other sites")
    if count < 1:
        raise ArgumentError(f"count={count}; keep at least 1 example a neuron")
    tokenizer, rule, best, counted = subject.need_tokenizer(), CountingRule(subject), _StrongestTokens(count), 0
    hooks = [h for s in chosen for h in hooks_at(subject.model, layout, s, best.hook_function(s), replaces=False)]
    with evaluating(subject.model), installed(subject.model, hooks), torch.no_grad():
        for batch in batches(subject, corpus, length, batch_size, progress, "examples"):
            mask, _ = rule(batch)
            best.start_batch(mask, batch.attention_mask)
            subject.model.base_model(**inputs_of(batch))
            rows = zip(batch.input_ids, batch.attention_mask, strict=True)
            best.chunks += [tuple(ids[attended].tolist()) for ids, attended in rows]
            counted += int(mask.sum())
            if limit_tokens is not None and counted >= limit_tokens:
                break
    if not counted:
        raise NotEnoughRows(f"corpus {corpus.name!r}: 0 tokens counted ({rule.describe()}); give longer text")
    values, chunks, positions = ({site: best.by_site[site][part].cpu() for site in chosen} for part in range(3))
    return Examples(values, chunks, positions, tuple(best.chunks), tokenizer, corpus.name)


class _StrongestTokens:
    """The strongest tokens so far: activation, chunk and position of each, (k, d) for every site."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.by_site: dict[Site, tuple[Tensor, ...]] = {}
        self.chunks: list[tuple[int, ...]] = []
        self.mask = self.position = torch.empty(0)

    def start_batch(self, mask: Bool[Tensor, "b t"], attention: Bool[Tensor, "b t"]) -> None:
        """Set the masks of the next batch; positions are counted without padding."""
        self.mask, self.position = mask, attention.cumsum(1) - 1

    def hook_function(self, site: Site) -> Callable[..., None]:
        """The function that a hook calls with the tensor at the site."""

        def visit(x: Tensor, _part: slice, _tokens: Tensor | None) -> None:
            mask = self.mask.to(x.device)
            z = x.reshape(*mask.shape, -1)  # OPT flattens its tokens before the MLP
            at = z.abs().masked_fill(~mask[..., None], -1).argmax(1)
            values, some = z.gather(1, at[:, None])[:, 0].float(), mask.any(1)[:, None]
            if not bool(values.isfinite()[some[:, 0]].all()):
                raise NotFinite(f"{site}: an activation is not finite; load the model in float32?")
            rows = torch.arange(len(self.chunks), len(self.chunks) + len(z), device=x.device)
            position = self.position.to(x.device).gather(1, at)
            self._keep(site, values.masked_fill(~some, torch.nan), rows[:, None].where(some, -1), position)

        return visit

    def _keep(self, site: Site, values: Tensor, rows: Tensor, positions: Tensor) -> None:
        candidates: tuple[Tensor, ...] = (values, rows.expand_as(values), positions)
        if site in self.by_site:
            candidates = tuple(torch.cat(pair) for pair in zip(self.by_site[site], candidates, strict=True))
        sizes = candidates[0].abs().nan_to_num(nan=-1.0)
        strongest = sizes.topk(min(self.count, len(sizes)), dim=0).indices
        self.by_site[site] = tuple(part.gather(0, strongest) for part in candidates)
