"""Recipes that forget images by training: each returns what changed, as a delta with how it was made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.delta import Delta
from repedit.errors import ArgumentError, UnknownName, nearest
from repedit.vision.data import Images, ImageSplits, Task, other_labels
from repedit.vision.editing import difference
from repedit.vision.grouping import frozen
from repedit.vision.training import adam, cross_entropy, descend, generator, learning, train

# --- Data plans, and the plan that gives the forget images other labels


DataPlan = Callable[[nn.Module, Task, ImageSplits, int], ImageSplits]
"""What a request does to the data before an ordinary fine-tune: (model, task, splits, seed) -> new splits; pure."""


@dataclass(frozen=True)
class Relabel:
    """Another label for every forget image.

    Args:
        mode: "random_other", uniform over the C - 1 other classes; "runner_up" and "least_likely", the most and the least
            likely other class by the model; "mirror", C - 1 - y, for even C.
    """

    mode: str = "random_other"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UnknownName(f"mode={self.mode!r}; {nearest(self.mode, MODES)}")

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with new labels on forget.

        Raises:
            ArgumentError: if the model has one class, a label is none of its classes, or C is odd for "mirror".
        """
        logits = task.logits(model, splits.forget).cpu()
        classes, top = logits.shape[1], int(splits.forget.y.max())
        if classes < 2 or top >= classes:
            raise ArgumentError(
                f"the model has C = {classes} classes and forget the label {top}; relabelling needs two classes and labels below C"
            )
        y = MODES[self.mode](splits.forget.y, logits, torch.Generator().manual_seed(seed))
        return replace(splits, forget=splits.forget.labelled(y), plans=(*splits.plans, repr(self)))


def _random_other(y: Tensor, logits: Tensor, draw: torch.Generator) -> Tensor:
    return other_labels(y, logits.shape[1], draw)


def _runner_up(y: Tensor, logits: Tensor, _draw: torch.Generator) -> Tensor:
    return logits.masked_fill(_own(y, logits), -torch.inf).argmax(1)


def _least_likely(y: Tensor, logits: Tensor, _draw: torch.Generator) -> Tensor:
    return logits.masked_fill(_own(y, logits), torch.inf).argmin(1)


def _mirror(y: Tensor, logits: Tensor, _draw: torch.Generator) -> Tensor:
    classes = logits.shape[1]
    if classes % 2:
        raise ArgumentError(
            f"mode='mirror' with C = {classes} classes: the middle class maps to itself; use random_other"
        )
    return classes - 1 - y


def _own(y: Tensor, logits: Tensor) -> Tensor:
    return functional.one_hot(y, logits.shape[1]).bool()


MODES: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "random_other": _random_other,
    "runner_up": _runner_up,
    "least_likely": _least_likely,
    "mirror": _mirror,
}


def training_images(splits: ImageSplits) -> Images:
    """Retain and forget, in this order."""
    return splits.retain + splits.forget


# --- Recipes: each forgets by training and returns what changed, as a delta with how it was made


def finetune(
    model: nn.Module, task: Task, splits: ImageSplits, *, epochs: int = 5, lr: float = 1e-3, seed: int = 0
) -> Delta:
    """Go on training on the retain images; what is not rehearsed may fade.

    Raises:
        TrainingError: if the loss is not finite; no result is returned.
    """
    begin = perf_counter()
    trained = train(model, task, splits.retain, epochs=epochs, lr=lr, seed=seed)
    return made("finetune", model, trained, begin, seed, epochs=epochs, lr=lr)


def ascend(
    model: nn.Module, task: Task, splits: ImageSplits, *, epochs: int = 2, lr: float = 3e-4, seed: int = 0
) -> Delta:
    """Raise the loss of the forget images.

    Raises:
        TrainingError: if the loss is not finite; no result is returned.
    """
    begin = perf_counter()
    trained = train(model, task, splits.forget, epochs=epochs, lr=lr, seed=seed, ascend=True)
    return made("ascend", model, trained, begin, seed, epochs=epochs, lr=lr)


def relabel(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    mode: str = "random_other",
    epochs: int = 5,
    lr: float = 1e-3,
    seed: int = 0,
) -> Delta:
    """Go on training with another label on every forget image, modes as in `Relabel`.

    Raises:
        UnknownName, ArgumentError: for a mode that does not exist, or that these labels do not allow.
        TrainingError: if the loss is not finite; no result is returned.
    """
    begin, plan = perf_counter(), Relabel(mode)
    planned = plan(model, task, splits, seed)
    trained = train(model, task, training_images(planned), epochs=epochs, lr=lr, seed=seed)
    return made("relabel", model, trained, begin, seed, plan=planned.plans, mode=mode, epochs=epochs, lr=lr)


def retrain(
    build: Callable[[], nn.Module],
    task: Task,
    splits: ImageSplits,
    *,
    epochs: int = 20,
    lr: float = 1e-3,
    seed: int = 1,
) -> nn.Module:
    """The reference: a fresh model trained on the retain images alone; `trained_on(model)` says which those are.

    Args:
        build: makes an untrained model, with a seed other than the original's.
    Raises:
        TrainingError: if the loss is not finite; no result is returned.
    """
    return train(build(), task, splits.retain, epochs=epochs, lr=lr, seed=seed)


def made(
    method: str,
    model: nn.Module,
    trained: nn.Module,
    begin: float,
    seed: int,
    *,
    offline: float = 0.0,
    plan: tuple[str, ...] = (),
    schedule: object = None,
    findings: dict[str, Any] | None = None,
    **options: Any,
) -> Delta:
    """The delta of a recipe; `begin` is when its online part began, `offline` the seconds before a request is known."""
    seconds = {"offline": round(offline, 4), "online": round(perf_counter() - begin, 4)}
    record = {"method": method, "options": options, "plan": list(plan), "schedule": schedule, "seed": seed}
    return difference(model, trained, record | {"seconds": seconds} | (findings or {}))


# --- Two published baselines: distillation that turns away from the forget images, and relabelling of salient weights only


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
