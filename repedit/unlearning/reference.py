"""The reference of the losses: the start weights, which are still there, because the subject is never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repedit.activations.forward import at_least_float32, inputs_of
from repedit.arch import hooks_at
from repedit.data import Batch
from repedit.errors import ShapeError
from repedit.fit.mrp_training import targets_of
from repedit.hooks import installed
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from repedit.training.sampler import collated

_HALF = (torch.bfloat16, torch.float16)


class Reference:
    """Forward passes of the start weights, without gradients and without a second copy of any tensor."""

    def __init__(self, subject: Subject, rows: Mapping[str, Sequence[Batch]] | None = None) -> None:
        tensors = [*subject.model.parameters(), *subject.model.buffers()]
        # Its own modules, so that neither hooks nor train mode of the subject are touched; the tensors are the subject's.
        model = copy.deepcopy(subject.model, memo={id(tensor): tensor for tensor in tensors}).eval()
        self.subject = Subject(model, subject.tokenizer, subject.architecture)
        self.passes = 0
        """Forward passes made so far."""
        self._rows, self._known = dict(rows or {}), dict[str, Float[Tensor, " n"]]()
        self._coarse = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]()

    def logits(self, batch: Batch) -> Float[Tensor, "b t v"]:
        """The logits of a batch."""
        self.passes += 1
        with torch.no_grad(), precision(self.subject.model.dtype, self.subject.device):
            return self.subject.model(**inputs_of(batch)).logits

    def states(self, batch: Batch, layers: Sequence[int]) -> dict[int, Float[Tensor, "b t d"]]:
        """The residual stream after some layers."""
        self.passes += 1
        seen: dict[int, Tensor] = {}
        with (
            torch.no_grad(),
            precision(self.subject.model.dtype, self.subject.device),
            watching(self.subject, layers, seen),
        ):
            self.subject.model(**inputs_of(batch))
        return seen

    def rows(self, role: str, indices: Sequence[int]) -> Float[Tensor, " b"]:
        """l_i of some rows of a role, in float64; all rows of the role are read once, on the first call."""
        if role not in self._known:
            self._known[role] = torch.cat([self._summed(part) for part in _eights(self._rows[role])])
        return self._known[role][list(indices)]

    def coarse(self, role: str, indices: Sequence[int], k: int) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k1"]]:
        """The k likeliest tokens at each label of some rows, their log-probabilities and that of all others together.

        All rows of the role are read once, on the first call; a label takes 12 k bytes from there on.
        """
        if (role, k) not in self._coarse:
            self._coarse[role, k] = [row for part in _eights(self._rows[role]) for row in self._likeliest(part, k)]
        tokens, logs = zip(*(self._coarse[role, k][i] for i in indices), strict=True)
        return torch.cat(tokens), torch.cat(logs)

    def _likeliest(self, rows: Sequence[Batch], k: int) -> list[tuple[Tensor, Tensor]]:
        batch = collated(rows)
        labels = targets_of(batch)
        logs = at_least_float32(self.logits(batch)[:, :-1][labels[:, 1:]]).log_softmax(-1)
        tokens = logs.topk(k, dim=-1).indices
        sizes = labels.sum(1).tolist()
        return list(zip(tokens.split(sizes), bucketed(logs, tokens).split(sizes), strict=True))

    def _summed(self, rows: Sequence[Batch]) -> Float[Tensor, " b"]:
        batch = collated(rows)
        labels = targets_of(batch)
        picked = at_least_float32(self.logits(batch)[:, :-1][labels[:, 1:]])
        each = nn.functional.cross_entropy(picked, batch.input_ids[labels], reduction="none").double()
        return each.new_zeros(len(rows)).index_add(0, labels.nonzero()[:, 0], each)


def check_vocabulary(subject: Subject, reference: Subject) -> None:
    """Refuse a reference whose logits are about other tokens.

    Raises:
        ShapeError: with both vocabularies.
    """
    mine, theirs = (s.model.get_output_embeddings().weight.shape[0] for s in (subject, reference))
    tokens = [None if s.tokenizer is None else s.tokenizer.get_vocab() for s in (subject, reference)]
    if mine != theirs or (None not in tokens and tokens[0] != tokens[1]):
        raise ShapeError(
            f"the reference model has a vocabulary of {theirs} tokens, the subject one of {mine}"
            + (", with other tokens" if mine == theirs else "")
            + "; their predictions cannot be compared, give a reference of the same family"
        )


def watching(subject: Subject, layers: Sequence[int], into: dict[int, Tensor]) -> AbstractContextManager[Any]:
    """Put the residual stream after some layers into a mapping while a forward pass runs."""

    def keep(layer: int) -> Any:
        def visit(x: Tensor, _at: slice, _tokens: Tensor | None) -> None:
            into[layer] = x

        return visit

    hooks = [
        hook
        for layer in layers
        for hook in hooks_at(subject.model, subject.layout, Site(layer, Point.RESID_POST), keep(layer), replaces=False)
    ]
    return installed(subject.model, hooks) if hooks else nullcontext()


def precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """A model of a half type computes in it although what is trained is held in float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype in _HALF else nullcontext()


def bucketed(logs: Float[Tensor, "n v"], tokens: Int[Tensor, "n k"]) -> Float[Tensor, "n k1"]:
    """The log-probabilities of some tokens, and that of all others together."""
    rest = logs.scatter(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(1, tokens), rest], 1)


def _eights(rows: Sequence[Batch]) -> list[Sequence[Batch]]:
    return [rows[i : i + 8] for i in range(0, len(rows), 8)]
