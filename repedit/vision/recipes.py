"""Recipes: each forgets by training and returns what changed, as a delta with how it was made."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from torch import nn

from repedit.delta import Delta
from repedit.vision.differences import difference
from repedit.vision.relabelling import Relabel, training_images
from repedit.vision.task import ImageSplits, Task
from repedit.vision.training import train


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
