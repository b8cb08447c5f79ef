"""Masks of the entries to train: the units most salient for the forget set, or the weights of chosen neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from repedit.arch import MatrixView
from repedit.data import Batch
from repedit.errors import SelectionError
from repedit.hooks import check_differentiable
from repedit.models.subject import Subject
from repedit.sites import Site
from repedit.training.sampler import collate, label_mask, logits_for
from repedit.unlearning.losses import ForwardPass, Loss, Reference, autocast, nll, unit_count
from repedit.unlearning.parameters import Mask, Parameters, TrainableCopy
from repedit.unlearning.recipe import Saliency, Term, UnlearnRecipe
from repedit.unlearning.training_data import Sources, prepare_data


def saliency(
    subject: Subject,
    forget: Sources,
    *,
    loss: Loss | None = None,
    unit: str = "row",
    percentile: float = 90.0,
    parameters: Parameters | None = None,
    batch_size: int = 8,
    length: int = 256,
) -> Mask:
    """The units with the largest gradient of the forget loss at the start weights, taken once over the whole set.

    G_i = ||dL / dtheta_i||_2 for each output row (or module), gamma the percentile of G over the units of the selected
    parameters, m_i = 1[G_i >= gamma]. Each entry of a vector (a bias, a norm) is a row.

    Args:
        loss: the NLL when None; it may use only logits and labels.
        unit: "row" or "module".
    Raises:
        ArgumentError, UnknownName: if the percentile or the unit is out of range.
        SelectionError: if no gradient reaches the selected parameters.
    Reference: SURE, arXiv:2410.16454, section 5.
    """
    options = Saliency(percentile, unit, loss or nll())
    recipe = UnlearnRecipe("saliency", (Term(options.loss, "forget"),), length=length)
    rows = prepare_data(subject, recipe, forget=forget).rows["forget"]
    return saliency_of_rows(subject, rows, options, parameters or Parameters(), batch_size)


@torch.enable_grad()
def saliency_of_rows(
    subject: Subject, rows: Sequence[Batch], options: Saliency, parameters: Parameters, batch_size: int
) -> Mask:
    """The same for rows that are tokenized already."""
    check_differentiable(subject.model)
    trainable = TrainableCopy(subject, parameters)
    reference = Reference(subject)
    units = sum(unit_count(options.loss.unit, row) for row in rows)
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size])
        with autocast(trainable.dtype, subject.device):
            logits = logits_for(trainable.subject, batch, label_mask(batch))
        (options.loss.sum(ForwardPass(batch, logits, reference)) / units).backward()
    gradients = {name: p.grad for name, p in trainable.tensors.items() if p.grad is not None}
    norms = {name: _row_norms(grad, name, options.unit, subject) for name, grad in gradients.items()}
    if options.unit == "module":
        norms = _module_norms(norms)
    if not norms or not any(bool(norm.any()) for norm in norms.values()):
        raise SelectionError(
            "no gradient of the forget loss reaches the selected parameters; select earlier layers, or others"
        )
    flat = torch.cat([norm.flatten() for norm in _by_unit(norms, options.unit)])
    gamma = float(np.percentile(flat.cpu().numpy(), options.percentile))
    tensors = {name: norm >= gamma for name, norm in norms.items()}
    masks = _by_unit(tensors, options.unit)
    return Mask(
        tensors,
        {
            "method": "saliency",
            "unit": options.unit,
            "percentile": options.percentile,
            "gamma": gamma,
            "loss": repr(options.loss),
            "units": sum(mask.numel() for mask in masks),
            "chosen": sum(int(mask.sum()) for mask in masks),
            "by_tensor": {name: int(mask.sum()) for name, mask in tensors.items()},
        },
    )


def neuron_mask(keep: Mapping[Site, Tensor], subject: Subject) -> Mask:
    """Train only the input and output weights of the neurons that the keep-masks of `rp.top` mark False.

    Give it to `rp.unlearn` as `parameters=Parameters(mask=neuron_mask(keep, subject))`.
    """
    parameters = dict(subject.model.named_parameters())
    masks: dict[str, Tensor] = {}

    def mark(view: MatrixView, neurons: Tensor, *, columns: bool) -> None:
        mask = masks.setdefault(view.tensor, torch.zeros_like(parameters[view.tensor], dtype=torch.bool))
        view.change(mask, lambda w: w | (neurons[None, :] if columns else neurons[:, None]))

    for site, keep_mask in keep.items():
        branch = subject.layout.branch(site.layer, site.point)
        for part in branch.parts:
            neurons = ~keep_mask[part.start : part.stop].to(subject.device)
            mark(part.out, neurons, columns=True)
            for reader in part.readers:
                inputs = neurons
                if branch.group > 1:  # several query heads share a key-value head
                    inputs = neurons.unflatten(0, (-1, branch.group, branch.head_width)).any(1).flatten()
                mark(reader, inputs, columns=False)
    count = sum(int((~keep_mask).sum()) for keep_mask in keep.values())
    return Mask(masks, {"method": "neurons", "neurons": count, "sites": [str(site) for site in sorted(keep)]})


def _row_norms(grad: Tensor, name: str, unit: str, subject: Subject) -> Tensor:
    """Norms by row, in a shape that broadcasts against the tensor; for modules the sum of squares."""
    squares = grad.double().square()
    if unit == "module":
        return squares.sum()
    if grad.ndim == 1:
        return squares.sqrt()
    inside = any(name.startswith(f"{path}.") for path in subject.layout.block_paths)
    inputs = 0 if subject.architecture.transposed and inside and grad.ndim == 2 else -1
    return squares.sum(inputs, keepdim=True).sqrt()


def _module_norms(squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One norm for each module, under the name of each of its tensors."""
    total: dict[str, Tensor] = {}
    for name, value in squares.items():
        module = name.rpartition(".")[0]
        total[module] = total[module] + value if module in total else value
    return {name: total[name.rpartition(".")[0]].sqrt() for name in squares}


def _by_unit(values: Mapping[str, Tensor], unit: str) -> list[Tensor]:
    """The values of each unit once."""
    if unit == "row":
        return list(values.values())
    return list({name.rpartition(".")[0]: value for name, value in values.items()}.values())
