"""Models with neurons planted in them that fire on one token and on nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from repedit.arch import MatrixView
from repedit.data import Tokens
from repedit.data.corpus import tokens
from repedit.models.subject import Subject
from tests.tiny import VOCABULARY, tiny

TOKEN = VOCABULARY - 1
NEURONS = (2, 11, 19, 33)
# Coordinate 0 of TOKEN's embedding, where all other embeddings are 0: after a norm 3 to 4.9, and below 0.8 elsewhere.
SIZE = 5.0
# Writers are scaled by this, so that the stream stays near the embeddings.
OUT = 0.1
# What a planted neuron reads coordinate 0 with, and the coordinate where it begins to fire if it has a bias.
GAIN, THRESHOLD = 6.0, 1.5


def planted(family: str, layer: int = 1) -> Subject:
    """A tiny model with a coordinate of the stream that only TOKEN sets and only NEURONS of one layer read."""
    subject = tiny(family)
    with torch.no_grad():
        _reserve(subject)
        for number, (_, mlp) in enumerate(subject.layout.layers):
            for view in mlp.parts[0].readers:
                _rewrite(subject, view, _reading if number == layer else _blind)
    return subject


def texts(*, forget: bool, rows: int = 12, length: int = 24) -> Tokens:
    """Random tokens, the same in both sets but that every fifth or so of the forget set is TOKEN, never the first."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, TOKEN, (rows, length), generator=generator)
    if forget:
        ids[:, 1:][torch.rand(rows, length - 1, generator=generator) < 0.2] = TOKEN
    return tokens([{"input_ids": part} for part in ids.split(4)], "forget" if forget else "retain")


def _reserve(subject: Subject) -> None:
    """Keep every embedding, writer and norm bias out of coordinate 0, but for TOKEN."""
    parameters = dict(subject.model.named_parameters())
    for name in subject.layout.embeddings:
        parameters[name][:, 0] = 0.0
    parameters[subject.layout.embeddings[0]][TOKEN, 0] = SIZE
    for branch in (b for pair in subject.layout.layers for b in pair):
        _rewrite(subject, branch.parts[0].out, lambda w: OUT * w.index_fill(0, torch.tensor([0]), 0.0))
        if branch.bias is not None:
            parameters[branch.bias][0] = 0.0
    for name, parameter in parameters.items():
        if parameter.shape == (subject.layout.width,) and ("norm" in name or "ln_" in name):
            parameter[0] = 0.0 if name.endswith("bias") else 1.0


def _reading(rows: Tensor) -> Tensor:
    new = _blind(rows).clone()
    new[list(NEURONS)] = 0.0
    new[list(NEURONS), 0] = -GAIN * THRESHOLD if rows.shape[1] == 1 else GAIN
    return new


def _blind(rows: Tensor) -> Tensor:
    return rows if rows.shape[1] == 1 else rows.index_fill(1, torch.tensor([0]), 0.0)


def _rewrite(subject: Subject, view: MatrixView, function: Callable[[Tensor], Tensor]) -> None:
    parameter = dict(subject.model.named_parameters())[view.tensor]
    parameter.copy_(view.edit(parameter, function))
