"""Two published baselines: distillation that turns away from the forget images, and relabelling of salient weights only."""

from __future__ import annotations

import copy
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.delta import Delta
from repedit.errors import ArgumentError
from repedit.vision.grouping import frozen
from repedit.vision.recipes import made
from repedit.vision.relabelling import Relabel, training_images
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import adam, cross_entropy, descend, generator, learning


def scrub(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    epochs: int = 5,
    max_epochs: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
) -> Delta:
    """Leave the original model on the forget images and follow it on the retain images.

    In the first `max_epochs` epochs KL(f_0 || f) on forget is ascended first; in every epoch KL(f_0 || f) + CE on retain is
    descended. One Adam for both.

    Raises:
        ArgumentError: if max_epochs is not in 0 to epochs. TrainingError: if a loss is not finite.
    Reference: Kurmanji et al. 2023, arXiv:2302.09880.
    """
    if not 0 <= max_epochs <= epochs:
        raise ArgumentError(f"max_epochs={max_epochs} with epochs={epochs}; give 0 to {epochs} epochs that ascend")
    task.check(model)
    begin, teacher = perf_counter(), frozen(model)

    def away(student: nn.Module, images: Images) -> Tensor:
        return -_divergence(teacher, student, images)

    def near(student: nn.Module, images: Images) -> Tensor:
        return _divergence(teacher, student, images) + cross_entropy(student, images)

    trained, order = copy.deepcopy(model), generator(seed)
    optimiser = adam(trained, task, None, lr)
    with learning(trained, task, None, seed):
        for epoch in range(epochs):
            if epoch < max_epochs:
                descend(trained, optimiser, splits.forget, away, epochs=1, batch=64, order=order)
            descend(trained, optimiser, splits.retain, near, epochs=1, batch=64, order=order)
    return made("scrub", model, trained, begin, seed, epochs=epochs, max_epochs=max_epochs, lr=lr)


def salun(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    percentile: float | int = 50,
    epochs: int = 5,
    lr: float = 1e-3,
    seed: int = 0,
) -> Delta:
    """Relabel the forget images, and let only those weights move on which the forget loss depends most.

    A weight moves if its |dL_f/dw| is above the percentile of all weights; the others keep their bits. Statistics of
    BatchNorm follow the data.

    Raises:
        ArgumentError: if the percentile is not in [0, 100). TrainingError: if a loss is not finite.
    Reference: Fan et al. 2023, arXiv:2310.12508.
    """
    if not 0 <= percentile < 100:
        raise ArgumentError(f"percentile={percentile}: the share of weights that stay lies in [0, 100)")
    task.check(model)
    begin = perf_counter()
    masks = _salient(model, splits.forget, percentile / 100)
    planned = Relabel()(model, task, splits, seed)
    trained = copy.deepcopy(model)
    held = dict(trained.named_parameters())

    def keep() -> None:
        # Adam without decay leaves a weight alone whose gradient was always 0: its moments stay 0.
        for name, mask in masks.items():
            if held[name].grad is not None:
                held[name].grad.mul_(mask)  # type: ignore[union-attr]

    with learning(trained, task, None, seed):
        descend(
            trained,
            adam(trained, task, None, lr),
            training_images(planned),
            epochs=epochs,
            batch=64,
            order=generator(seed),
            before_step=keep,
        )
    moved = sum(float(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    findings = {"salient": moved}
    return made("salun", model, trained, begin, seed, plan=planned.plans, findings=findings, percentile=percentile, epochs=epochs, lr=lr)  # fmt: skip


def _divergence(teacher: nn.Module, student: nn.Module, images: Images) -> Tensor:
    """KL(teacher || student), mean over the batch."""
    with torch.no_grad():
        goal = teacher(images.x).log_softmax(1)
    return functional.kl_div(student(images.x).log_softmax(1), goal, reduction="batchmean", log_target=True)


def _salient(model: nn.Module, forget: Images, share: float) -> dict[str, Tensor]:
    """True where the gradient of the forget loss, in eval mode, is above the given quantile of all entries."""
    still = frozen(model).requires_grad_(True)
    like = next(still.parameters())
    for part in forget.batches():
        logits = still(part.x.to(like))
        loss = functional.cross_entropy(logits, part.y.to(like.device), reduction="sum") / len(forget)
        loss.backward()
    sizes = {n: torch.zeros_like(p) if p.grad is None else p.grad.abs() for n, p in still.named_parameters()}
    every = torch.cat([size.flatten() for size in sizes.values()])
    limit = (
        every.kthvalue(round(share * every.numel())).values if round(share * every.numel()) else every.new_tensor(-1.0)
    )
    return {name: size > limit for name, size in sizes.items()}
