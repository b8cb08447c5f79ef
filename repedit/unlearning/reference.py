"""The reference that losses compare with: by default the model given, which is never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repedit.activations.forward import inputs_of
from repedit.arch import HookFn, hooks_at
from repedit.arch.infer import output_embeddings
from repedit.data import Batch
from repedit.errors import ShapeError
from repedit.hooks import installed
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from repedit.training.sampler import collate, label_logits, label_mask, logits_for

_HALF = (torch.bfloat16, torch.float16)
_BATCH_SIZE = 8


class Reference:
    """Forward passes of the reference, without gradients and without a second copy of any tensor."""

    def __init__(self, subject: Subject, rows: Mapping[str, Sequence[Batch]] | None = None) -> None:
        """Rows by role are those that `row_nll` and `top_log_probs` number."""
        tensors = [*subject.model.parameters(), *subject.model.buffers()]
        # Modules of its own, so that hooks and the mode of the subject are not touched; the tensors are the subject's.
        model = copy.deepcopy(subject.model, memo={id(tensor): tensor for tensor in tensors}).eval()
        self.subject = Subject(model, subject.tokenizer, subject.architecture)
        self.passes = 0
        """Forward passes made so far."""
        self._rows = dict(rows or {})
        self._row_nll = dict[str, Tensor]()
        self._top = dict[tuple[str, int], list[tuple[Tensor, Tensor]]]()

    def logits(self, batch: Batch) -> Float[Tensor, "b t v"]:
        """The logits of a batch."""
        self.passes += 1
        with torch.no_grad(), autocast(self.subject.model.dtype, self.subject.device):
            return self.subject.model(**inputs_of(batch)).logits

    def label_logits(self, batch: Batch) -> Float[Tensor, "n v"]:
        """The logits that predict the labels of a batch."""
        self.passes += 1
        labels = label_mask(batch)
        with torch.no_grad(), autocast(self.subject.model.dtype, self.subject.device):
            return label_logits(logits_for(self.subject, batch, labels), labels)

    def states(self, batch: Batch, layers: Sequence[int]) -> dict[int, Float[Tensor, "b t d"]]:
        """The residual stream after each of some layers."""
        states: dict[int, Tensor] = {}
        with recording_states(self.subject, layers, states):
            self.logits(batch)
        return states

    def row_nll(self, role: str, indices: Sequence[int]) -> Float[Tensor, " b"]:
        """Summed NLL of some rows of a role, in float64; all rows of the role are evaluated once, on the first call."""
        if role not in self._row_nll:
            self._row_nll[role] = torch.cat([self._batch_nll(part) for part in self._batches(role)])
        return self._row_nll[role][list(indices)]

    def top_log_probs(
        self, role: str, indices: Sequence[int], k: int
    ) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k1"]]:
        """The k most likely tokens at each label of some rows, their log-probabilities and that of all others together.

        All rows of the role are evaluated once, on the first call; from then on a label takes 12 k bytes.
        """
        if (role, k) not in self._top:
            self._top[role, k] = [row for part in self._batches(role) for row in self._batch_top(part, k)]
        tokens, log_probs = zip(*(self._top[role, k][i] for i in indices), strict=True)
        return torch.cat(tokens), torch.cat(log_probs)

    def _batches(self, role: str) -> list[Sequence[Batch]]:
        rows = self._rows[role]
        return [rows[i : i + _BATCH_SIZE] for i in range(0, len(rows), _BATCH_SIZE)]

    def _batch_nll(self, rows: Sequence[Batch]) -> Float[Tensor, " b"]:
        batch = collate(rows)
        labels = label_mask(batch)
        token_nll = nn.functional.cross_entropy(
            self.label_logits(batch), batch.input_ids[labels], reduction="none"
        ).double()
        return token_nll.new_zeros(len(rows)).index_add(0, labels.nonzero()[:, 0], token_nll)

    def _batch_top(self, rows: Sequence[Batch], k: int) -> list[tuple[Tensor, Tensor]]:
        batch = collate(rows)
        labels = label_mask(batch)
        log_probs = self.label_logits(batch).log_softmax(-1)
        tokens = log_probs.topk(k, dim=-1).indices
        sizes = labels.sum(1).tolist()
        return list(zip(tokens.split(sizes), with_rest(log_probs, tokens).split(sizes), strict=True))


def check_vocabulary(subject: Subject, reference: Subject) -> None:
    """Refuse a reference whose logits are about other tokens.

    Raises:
        ShapeError: with both vocabulary sizes.
    """
    sizes = [output_embeddings(s.model).weight.shape[0] for s in (subject, reference)]
    tokens = [None if s.tokenizer is None else s.tokenizer.get_vocab() for s in (subject, reference)]
    if sizes[0] != sizes[1] or (None not in tokens and tokens[0] != tokens[1]):
        raise ShapeError(
            f"the reference model has a vocabulary of {sizes[1]} tokens, the subject one of {sizes[0]}"
            + (", with other tokens" if sizes[0] == sizes[1] else "")
            + "; their predictions cannot be compared, give a reference of the same family"
        )


def recording_states(
    subject: Subject, layers: Sequence[int], states: dict[int, Tensor]
) -> AbstractContextManager[object]:
    """Enter the residual stream after each of some layers into `states` while a forward pass runs."""

    def record(layer: int) -> HookFn:
        def visit(x: Tensor, _channels: slice, _tokens: Tensor | None) -> None:
            states[layer] = x

        return visit

    hooks = [
        hook
        for layer in layers
        for hook in hooks_at(
            subject.model, subject.layout, Site(layer, Point.RESID_POST), record(layer), replaces=False
        )
    ]
    return installed(subject.model, hooks) if hooks else nullcontext()


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Compute in the half precision of the model although the trained tensors are float32."""
    return torch.autocast(device.type, dtype=dtype) if dtype in _HALF else nullcontext()


def with_rest(log_probs: Float[Tensor, "n v"], tokens: Int[Tensor, "n k"]) -> Float[Tensor, "n k1"]:
    """The log-probabilities of some tokens, and that of all other tokens together."""
    rest = log_probs.scatter(1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(1, tokens), rest], 1)
