"""Modular training: which part of a classifier learns when, on which images and at which rate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from repedit.errors import ArgumentError, DataError, UnknownName, nearest
from repedit.vision.task import PARTS, Images, Task
from repedit.vision.training import adam, descend, generator, learning, seen_by, trained_on

SETS = ("reduced", "remember", "all")


@dataclass(frozen=True)
class Row:
    """One stretch of training; everything outside its parts stays bit by bit."""

    parts: tuple[str, ...]
    data: str
    """"reduced", the condensed retain set; "remember", the remembrance set; "all", retain and forget."""
    epochs: int
    lr: float
    batch: int | None = None
    """Images a step; None takes all of them in one step."""
    reset: bool = False
    """Whether the parts start again from the model given."""

    def __post_init__(self) -> None:
        for name, valid in ((self.data, SETS), *((part, PARTS) for part in self.parts)):
            if name not in valid:
                raise UnknownName(f"a row of a schedule names {name!r}; {nearest(name, valid)}")
        if not self.parts or self.epochs < 1 or not self.lr > 0 or (self.batch is not None and self.batch < 1):
            raise ArgumentError(
                f"a row of a schedule has parts={self.parts}, epochs={self.epochs}, lr={self.lr}, batch={self.batch}; give at "
                "least one part and one epoch, a rate above 0, and a batch of at least 1 or None"
            )


@dataclass(frozen=True)
class Schedule:
    """Rows that are carried out in order."""

    rows: tuple[Row, ...]
    fresh: bool = True
    """Whether each row has a new Adam; otherwise one for each choice of parts goes on where it stopped."""

    def plain(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)


def overture(
    *,
    epochs: int = 15,
    hold: int = 8,
    final_steps: int = 10,
    lr: float = 1e-3,
    lr_intermediate: float = 1e-4,
    batch: int = 64,
    remember_batch: int | None = None,
    fresh: bool = True,
) -> Schedule:
    """Beginning and final in turn, `epochs` times, and at last the intermediate part for one epoch.

    Epoch e = 0, 1, ...: the beginning, one epoch on the reduced set; then, while e < epochs - hold, the final part,
    `final_steps` passes over the remembrance set. The defaults are for the digits; `PUBLISHED` has those of the paper.

    Raises:
        ArgumentError: if hold is not in 0 to epochs, or another number is out of range.
    Reference: Khan 2024, arXiv:2402.00195.
    """
    if not 0 <= hold <= epochs:
        raise ArgumentError(
            f"hold={hold} with epochs={epochs}: the final part is held in the last 0 to {epochs} epochs"
        )
    rows = []
    for epoch in range(epochs):
        rows.append(Row(("beginning",), "reduced", 1, lr, batch))
        if epoch < epochs - hold:
            rows.append(Row(("final",), "remember", final_steps, lr, remember_batch))
    return Schedule((*rows, Row(("intermediate",), "reduced", 1, lr_intermediate, batch)), fresh)


def preparation(
    *, rounds: int = 10, epochs: int = 20, lr_final: float = 1e-4, lr_intermediate: float = 1e-5, batch: int = 256
) -> Schedule:
    """What the paper trains before any request: `rounds` of a reset final part on the remembrance set, then the intermediate on all.

    By its number of epochs it costs more than the retraining it saves, and pays over many requests only.

    Reference: Khan 2024, arXiv:2402.00195.
    """
    final = Row(("final",), "remember", epochs, lr_final, 32, reset=True)
    return Schedule((final, Row(("intermediate",), "all", epochs, lr_intermediate, batch)) * rounds)


PUBLISHED: Mapping[str, Schedule] = {
    name: overture(epochs=30, hold=hold, final_steps=steps, lr=lr, lr_intermediate=later, batch=256, remember_batch=32,
                   fresh=False)
    for name, hold, steps, lr, later in (
        ("mlp", 15, 15, 1e-3, 1e-4), ("resnet18", 15, 15, 1e-3, 1e-4), ("cnn", 25, 10, 3e-3, 3e-3), ("vgg16", 15, 10, 1e-3, 1e-4),
    )
}  # fmt: skip
"""The settings of the paper by network, each part with one Adam of its own."""


def scheduled(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    sets: Mapping[str, Images],
    *,
    seed: int = 0,
    origin: nn.Module | None = None,
) -> nn.Module:
    """A copy of the model trained by a schedule; the argument is untouched.

    Args:
        sets: images by the names that the rows use.
        origin: the model that a reset goes back to; the one given when None.
    Raises:
        DataError: if a row needs images that are not there. TrainingError: if a loss is not finite.
    """
    task.check(model)
    trained, order = copy.deepcopy(model), generator(seed)
    kept: dict[tuple[str, ...], Any] = {}
    for number, row in enumerate(schedule.rows):
        images = sets.get(row.data)
        if images is None or not len(images):
            raise DataError(
                f"row {number} of the schedule trains on {row.data!r}, which has no images; there are {sorted(sets)}"
            )
        if row.reset:
            _reset(trained, model if origin is None else origin, task, row.parts)
        optimiser = kept.get(row.parts) or adam(trained, task, row.parts, row.lr)
        for group in optimiser.param_groups:
            group["lr"] = row.lr
        if not schedule.fresh:
            kept[row.parts] = optimiser
        with learning(trained, task, row.parts, seed * 1009 + number):
            descend(trained, optimiser, images, epochs=row.epochs, batch=row.batch, order=order)
        trained.trained_on = trained_on(trained) | seen_by(images)  # type: ignore[assignment]
    return trained


def _reset(trained: nn.Module, origin: nn.Module, task: Task, parts: tuple[str, ...]) -> None:
    for mine, first in zip(task.modules(trained, parts), task.modules(origin, parts), strict=True):
        mine.load_state_dict(first.state_dict())
