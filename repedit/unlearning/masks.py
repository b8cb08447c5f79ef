"""Masks of what may move: the units most salient for the forget set, or the weights of chosen neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repedit.activations.forward import inputs_of
from repedit.arch import MatrixView
from repedit.data import Batch
from repedit.errors import SelectionError
from repedit.models.subject import Subject
from repedit.sites import Site
from repedit.training.sampler import collated
from repedit.unlearning.losses import Loss, Seen, count, nll
from repedit.unlearning.parameters import Mask, Parameters, Trainee
from repedit.unlearning.recipe import Saliency, Term, UnlearnRecipe
from repedit.unlearning.reference import Reference, precision
from repedit.unlearning.training_data import material


def saliency(
    subject: Subject,
    forget: Any,
    *,
    loss: Loss | None = None,
    unit: str = "row",
    percentile: float = 90.0,
    parameters: Parameters | None = None,
    batch_size: int = 8,
    length: int = 256,
) -> Mask:
    """The units whose gradient of the forget loss is largest at the start weights, taken once over the whole set.

    G_i = ||dL / dtheta_i||_2 for each output row (or module), gamma the percentile of G over the units of the selected
    parameters, m_i = 1[G_i >= gamma]. Of a vector (a bias, a norm) each entry is a row.

    Args:
        loss: the NLL when None; it must need nothing but logits and labels.
        unit: "row" or "module".
    Raises:
        ArgumentError, UnknownName: if the percentile or the unit is out of range.
        SelectionError: if no gradient reaches the selected parameters.
    Reference: SURE, arXiv:2410.16454, section 5.
    """
    options = Saliency(percentile, unit, loss or nll())
    recipe = UnlearnRecipe("saliency", (Term(options.loss, "forget"),), length=length)
    rows = material(subject, recipe, forget=forget).rows["forget"]
    return salient(subject, rows, options, parameters or Parameters(), batch_size)


def salient(
    subject: Subject, rows: Sequence[Batch], options: Saliency, parameters: Parameters, batch_size: int
) -> Mask:
    """The same for rows that are gathered already."""
    trainee = Trainee(subject, parameters)
    reference = Reference(subject)
    units = sum(count(options.loss.unit, row) for row in rows)
    for start in range(0, len(rows), batch_size):
        batch = collated(rows[start : start + batch_size])
        with torch.enable_grad(), precision(trainee.dtype, subject.device):
            logits = trainee.subject.model(**inputs_of(batch)).logits
        (options.loss.sum(Seen(batch, logits, reference)) / units).backward()
    sizes = {
        name: _unit_norms(p.grad, name, options.unit, subject)
        for name, p in trainee.tensors.items()
        if p.grad is not None
    }
    if options.unit == "module":
        sizes = _by_module(sizes)
    if not sizes or not any(bool(size.any()) for size in sizes.values()):
        raise SelectionError(
            "no gradient of the forget loss reaches the selected parameters; select earlier layers, or others"
        )
    gamma = float(
        np.percentile(
            torch.cat([s.flatten() for s in _distinct(sizes, options.unit)]).cpu().numpy(), options.percentile
        )
    )
    tensors = {name: size >= gamma for name, size in sizes.items()}
    chosen = sum(int(mask.sum()) for mask in _distinct(tensors, options.unit))
    total = sum(mask.numel() for mask in _distinct(tensors, options.unit))
    record = {
        "method": "saliency",
        "unit": options.unit,
        "percentile": options.percentile,
        "gamma": gamma,
        "loss": repr(options.loss),
    }
    return Mask(
        tensors, record | {"units": total, "chosen": chosen, "by_tensor": {n: int(m.sum()) for n, m in tensors.items()}}
    )


def neurons(keep: Mapping[Site, Tensor], subject: Subject) -> Mask:
    """Trains only what feeds, and what is written by, the neurons that keep-masks of `rp.top` mark False."""
    named = dict(subject.model.named_parameters())
    found: dict[str, Tensor] = {}

    def mark(view: MatrixView, chosen: Tensor, *, columns: bool) -> None:
        mask = found.setdefault(view.tensor, torch.zeros_like(named[view.tensor], dtype=torch.bool))
        view.change(mask, lambda w: w | (chosen[None, :] if columns else chosen[:, None]))

    for site, kept in keep.items():
        branch = subject.layout.branch(site.layer, site.point)
        for part in branch.parts:
            chosen = ~kept[part.start : part.stop].to(subject.device)
            mark(part.out, chosen, columns=True)
            for reader in part.readers:
                shared = (
                    chosen.unflatten(0, (-1, branch.group, branch.head_width)).any(1).flatten()
                    if branch.group > 1
                    else chosen
                )
                mark(reader, shared, columns=False)
    count = sum(int((~kept).sum()) for kept in keep.values())
    return Mask(found, {"method": "neurons", "neurons": count, "sites": [str(site) for site in sorted(keep)]})


def _unit_norms(grad: Tensor, name: str, unit: str, subject: Subject) -> Tensor:
    """Norms by unit, in a shape that broadcasts against the tensor."""
    squares = grad.double().square()
    if unit == "module":
        return squares.sum()
    if grad.ndim == 1:
        return squares.sqrt()
    inside = any(name.startswith(f"{path}.") for path in subject.layout.block_paths)
    inputs = 0 if subject.architecture.transposed and inside and grad.ndim == 2 else -1
    return squares.sum(inputs, keepdim=True).sqrt()


def _by_module(squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One norm a module, under the name of each of its tensors."""
    total: dict[str, Tensor] = {}
    for name, value in squares.items():
        module = name.rpartition(".")[0]
        total[module] = total[module] + value if module in total else value
    return {name: total[name.rpartition(".")[0]].sqrt() for name in squares}


def _distinct(values: Mapping[str, Tensor], unit: str) -> list[Tensor]:
    """The values of each unit once."""
    if unit == "row":
        return list(values.values())
    return list({name.rpartition(".")[0]: value for name, value in values.items()}.values())
