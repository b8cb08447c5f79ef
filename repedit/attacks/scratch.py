"""A copy of a model that an attack may change, and put back between its settings."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from repedit.models import Subject


def copied(subject: Subject) -> Subject:
    """A deep copy, with everything somebody put on the model: hooks, parametrizations, masks.

    It is not wrapped anew: a parametrised weight has another name than the family table gives it.
    """
    # torch copies no tensor that carries a graph, such as the masked weight that torch.nn.utils.prune leaves behind.
    graphs = [v for m in subject.model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    model = copy.deepcopy(subject.model, {id(v): v.detach().clone() for v in graphs})
    return replace(subject, model=model, source=None)


class Scratch:
    """One deep copy of a model whose weights can be put back to those of the model it was made from.

    The model itself is the memory of what the weights were: it is never changed, so no second copy is kept.
    """

    def __init__(self, subject: Subject) -> None:
        self._source = subject
        self.subject = copied(subject)
        self.subject.model.eval()

    def restore(self) -> Subject:
        """The copy with every parameter as it was, without gradients."""
        named = dict(self.subject.model.named_parameters())
        with torch.no_grad():
            for name, value in self._source.model.named_parameters():
                named[name].copy_(value)
        for p in named.values():
            p.grad = None
            p.requires_grad_(False)
        return self.subject
