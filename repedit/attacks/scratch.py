"""A copy of a model that an attack may change, and put back between its settings."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from repedit.models import Subject, subject_of


class Scratch:
    """One deep copy of a model, hooks included, whose weights can be put back to what they were.

    Only tensors named to `keep` are remembered, on the CPU; naming none keeps all.
    """

    def __init__(self, subject: Subject, keep: Iterable[str] | None = None) -> None:
        self.subject = subject_of(copy.deepcopy(subject.model), subject.tokenizer)
        self.subject.model.eval()
        named = dict(self.subject.model.named_parameters())
        self._before = {name: named[name].detach().cpu().clone() for name in (named if keep is None else keep)}

    def restore(self) -> Subject:
        """The copy with every remembered tensor as it was, without gradients."""
        named = dict(self.subject.model.named_parameters())
        with torch.no_grad():
            for name, value in self._before.items():
                named[name].copy_(value)
        for p in named.values():
            p.grad = None
            p.requires_grad_(False)
        return self.subject
