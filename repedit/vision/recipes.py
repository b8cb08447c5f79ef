"""Recipes that forget images by training; each returns the change of the weights as a delta that records how it was made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.delta import Delta
from repedit.errors import ArgumentError, check_choice
from repedit.vision.data import Images, ImageSplits, Task, frozen, other_labels
from repedit.vision.editing import difference, recipe_record
from repedit.vision.training import adam, cross_entropy, descend, generator, learning, train

# --- Data plans: what a request does to the data before an ordinary fine-tune

DataPlan = Callable[[nn.Module, Task, ImageSplits, int], ImageSplits]
"""(model, task, splits, seed) -> new splits; the arguments do not change."""


@dataclass(frozen=True)
class Relabel:
    """A data plan that gives every forget image another label.

    Args:
        mode: "random_other", uniform over the C - 1 other classes; "runner_up" and "least_likely", the other class to
            which the model gives the highest and the lowest logit; "mirror", C - 1 - y, for even C.
    """

    mode: str = "random_other"

    def __post_init__(self) -> None:
        check_choice(MODES, mode=self.mode)

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with new labels on forget.

        Raises:
            ArgumentError: if the model has one class, a label is not one of its classes, or C is odd for "mirror".
        """
        logits = task.logits(model, splits.forget).cpu()
        classes, largest = logits.shape[1], int(splits.forget.y.max())
        if classes < 2 or largest >= classes:
            raise ArgumentError(
                f"the model has C = {classes} classes and forget has the label {largest}; relabelling needs two classes "
                "and labels below C"
            )
        y = MODES[self.mode](splits.forget.y, logits, generator(seed))
        return replace(splits, forget=splits.forget.labelled(y), plans=(*splits.plans, repr(self)))


def _random_other(y: Tensor, logits: Tensor, random: torch.Generator) -> Tensor:
    return other_labels(y, logits.shape[1], random)


def _runner_up(y: Tensor, logits: Tensor, _random: torch.Generator) -> Tensor:
    return logits.masked_fill(_one_hot(y, logits), -torch.inf).argmax(1)


def _least_likely(y: Tensor, logits: Tensor, _random: torch.Generator) -> Tensor:
    return logits.masked_fill(_one_hot(y, logits), torch.inf).argmin(1)


def _mirror(y: Tensor, logits: Tensor, _random: torch.Generator) -> Tensor:
    classes = logits.shape[1]
    if classes % 2:
        raise ArgumentError(
            f"mode='mirror' with C = {classes} classes: the middle class maps to itself; use random_other"
        )
    return classes - 1 - y


def _one_hot(y: Tensor, logits: Tensor) -> Tensor:
    return functional.one_hot(y, logits.shape[1]).bool()


MODES: Mapping[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "random_other": _random_other,
    "runner_up": _runner_up,
    "least_likely": _least_likely,
    "mirror": _mirror,
}
"""New labels by mode, from (labels, logits, random generator)."""


def training_images(splits: ImageSplits) -> Images:
    """Retain, then forget."""
    return splits.retain + splits.forget


# --- Recipes


def finetune(
    model: nn.Module, task: Task, splits: ImageSplits, *, epochs: int = 5, lr: float = 1e-3, seed: int = 0
) -> Delta:
    """Continue training on the retain images only; what is not rehearsed may fade.

    Raises:
        TrainingError: if the loss is not finite; no result is returned.
    """
    begin = perf_counter()
    trained = train(model, task, splits.retain, epochs=epochs, lr=lr, seed=seed)
    return trained_delta("finetune", model, trained, begin, seed, {"epochs": epochs, "lr": lr})


def ascend(
    model: nn.Module, task: Task, splits: ImageSplits, *, epochs: int = 2, lr: float = 3e-4, seed: int = 0
) -> Delta:
    """Raise the loss of the forget images by gradient ascent.

    Raises:
        TrainingError: if the loss is not finite; no result is returned.
    """
    begin = perf_counter()
    trained = train(model, task, splits.forget, epochs=epochs, lr=lr, seed=seed, ascend=True)
    return trained_delta("ascend", model, trained, begin, seed, {"epochs": epochs, "lr": lr})


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
    """Continue training with another label on every forget image; the modes are those of `Relabel`.

    Raises:
        UnknownName, ArgumentError: for a mode that does not exist, or that these labels do not allow.
        TrainingError: if the loss is not finite; no result is returned.
    """
    begin, plan = perf_counter(), Relabel(mode)
    planned = plan(model, task, splits, seed)
    trained = train(model, task, training_images(planned), epochs=epochs, lr=lr, seed=seed)
    options = {"mode": mode, "epochs": epochs, "lr": lr}
    return trained_delta("relabel", model, trained, begin, seed, options, plan=planned.plans)


def retrain(
    build: Callable[[], nn.Module],
    task: Task,
    splits: ImageSplits,
    *,
    epochs: int = 20,
    lr: float = 1e-3,
    seed: int = 1,
) -> nn.Module:
    """The reference: a new model trained on the retain images alone; `trained_on(model)` lists them.

    Args:
        build: makes an untrained model, with a seed other than the original's.
    Raises:
        TrainingError: if the loss is not finite; no result is returned.
    """
    return train(build(), task, splits.retain, epochs=epochs, lr=lr, seed=seed)


def trained_delta(
    method: str,
    model: nn.Module,
    trained: nn.Module,
    begin: float,
    seed: int,
    options: Mapping[str, object],
    *,
    offline: float = 0.0,
    plan: tuple[str, ...] = (),
    schedule: object = None,
    findings: Mapping[str, object] | None = None,
) -> Delta:
    """The delta of a recipe, with its record; see `recipe_record` for the arguments."""
    record = recipe_record(method, begin, options, offline=offline, plan=plan, schedule=schedule, seed=seed)
    return difference(model, trained, record | dict(findings or {}))


# --- Two published baselines: SCRUB (distillation away from the forget images) and SalUn (training of salient weights)


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
    """Move away from the original model on the forget images and stay close to it on the retain images.

    Each of the first `max_epochs` epochs begins with ascent on KL(f_0 || f) over forget; every epoch descends
    KL(f_0 || f) + CE over retain. Both use the same Adam.

    Raises:
        ArgumentError: if max_epochs is not in 0 to epochs. TrainingError: if a loss is not finite.
    Reference: Kurmanji et al. 2023, arXiv:2302.09880.
    """
    if not 0 <= max_epochs <= epochs:
        raise ArgumentError(f"max_epochs={max_epochs} with epochs={epochs}; give 0 to {epochs} epochs that ascend")
    task.check(model)
    begin, teacher = perf_counter(), frozen(model)

    def forget_loss(student: nn.Module, images: Images) -> Tensor:
        return -_divergence(teacher, student, images)

    def retain_loss(student: nn.Module, images: Images) -> Tensor:
        return _divergence(teacher, student, images) + cross_entropy(student, images)

    trained, order = copy.deepcopy(model), generator(seed)
    optimizer = adam(trained, task, None, lr)
    with learning(trained, task, None, seed):
        for epoch in range(epochs):
            if epoch < max_epochs:
                descend(trained, optimizer, splits.forget, forget_loss, epochs=1, batch_size=64, order=order)
            descend(trained, optimizer, splits.retain, retain_loss, epochs=1, batch_size=64, order=order)
    options = {"epochs": epochs, "max_epochs": max_epochs, "lr": lr}
    return trained_delta("scrub", model, trained, begin, seed, options)


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
    """Relabel the forget images and train only the weights on which the forget loss depends most.

    A weight is trained if its |dL_f/dw| is above the percentile over all weights; the others keep their exact values.
    The statistics of BatchNorm follow the data.

    Raises:
        ArgumentError: if the percentile is not in [0, 100). TrainingError: if a loss is not finite.
    Reference: Fan et al. 2023, arXiv:2310.12508.
    """
    if not 0 <= percentile < 100:
        raise ArgumentError(f"percentile={percentile}: the percentage of weights that stay lies in [0, 100)")
    task.check(model)
    begin = perf_counter()
    masks = _salient(model, splits.forget, percentile / 100)
    planned = Relabel()(model, task, splits, seed)
    trained = copy.deepcopy(model)
    parameters = dict(trained.named_parameters())

    def mask_gradients() -> None:
        # Adam without decay does not change a weight whose gradient was always 0: its moments stay 0.
        for name, mask in masks.items():
            if parameters[name].grad is not None:
                parameters[name].grad.mul_(mask)  # type: ignore[union-attr]

    with learning(trained, task, None, seed):
        descend(
            trained,
            adam(trained, task, None, lr),
            training_images(planned),
            epochs=epochs,
            batch_size=64,
            order=generator(seed),
            before_step=mask_gradients,
        )
    salient = sum(float(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    options = {"percentile": percentile, "epochs": epochs, "lr": lr}
    findings = {"salient": salient}
    return trained_delta("salun", model, trained, begin, seed, options, plan=planned.plans, findings=findings)


def _divergence(teacher: nn.Module, student: nn.Module, images: Images) -> Tensor:
    """KL(teacher || student), mean over the batch."""
    with torch.no_grad():
        target = teacher(images.x).log_softmax(1)
    return functional.kl_div(student(images.x).log_softmax(1), target, reduction="batchmean", log_target=True)


def _salient(model: nn.Module, forget: Images, quantile: float) -> dict[str, Tensor]:
    """True where the gradient of the forget loss, in eval mode, is above the given quantile of all entries."""
    model = frozen(model).requires_grad_(True)
    like = next(model.parameters())
    for batch in forget.batches():
        logits = model(batch.x.to(like))
        loss = functional.cross_entropy(logits, batch.y.to(like.device), reduction="sum") / len(forget)
        loss.backward()
    sizes = {n: torch.zeros_like(p) if p.grad is None else p.grad.abs() for n, p in model.named_parameters()}
    entries = torch.cat([size.flatten() for size in sizes.values()])
    k = round(quantile * entries.numel())
    limit = entries.kthvalue(k).values if k else entries.new_tensor(-1.0)
    return {name: size > limit for name, size in sizes.items()}
