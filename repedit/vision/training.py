"""Training classifiers: one loop, and the schedule of which part learns when, on which images and at which rate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.errors import ArgumentError, DataError, TrainingError, UnknownName, nearest
from repedit.vision.data import PARTS, Images, Task

# --- The training loop of classifiers: some parts, one Adam that holds only them, batches in a seeded order


Loss = Callable[[nn.Module, Images], Tensor]
"""The scalar to descend on a batch."""


def train(
    model: nn.Module,
    task: Task,
    images: Images,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch: int | None = 64,
    seed: int = 0,
    parts: Sequence[str] | None = None,
    ascend: bool = False,
) -> nn.Module:
    """A copy of the model trained on cross-entropy with Adam; the argument is untouched.

    Args:
        batch: images a step; None takes all of them in one step.
        parts: the parts that learn; the others keep their parameters and buffers bit by bit, and run in eval mode.
        ascend: raise the loss instead.
    Raises:
        TrainingError: if the loss is not finite; there is no result then.
        UnknownName, ArgumentError: if the task does not describe the model, or there is no such part.
        DataError: if there are no images.
    """
    task.check(model)
    trained = copy.deepcopy(model)
    optimiser = adam(trained, task, parts, lr)
    loss = (lambda m, part: -cross_entropy(m, part)) if ascend else cross_entropy
    with learning(trained, task, parts, seed):
        descend(trained, optimiser, images, loss, epochs=epochs, batch=batch, order=generator(seed))
    trained.trained_on = trained_on(model) | seen_by(images)  # type: ignore[assignment]
    return trained


def trained_on(model: nn.Module) -> frozenset[int]:
    """Indices of the source images that `train` showed this model, or the one it began from; empty where none is known."""
    return getattr(model, "trained_on", frozenset())


def seen_by(images: Images) -> frozenset[int]:
    """Indices of the source images among these."""
    return frozenset(i for i in images.index.tolist() if i >= 0)


def adam(model: nn.Module, task: Task, parts: Sequence[str] | None, lr: float) -> torch.optim.Adam:
    """Adam over the parameters of some parts and no others.

    Raises:
        ArgumentError: if the rate is not above 0, or none of the parameters can learn.
    """
    if not lr > 0:
        raise ArgumentError(f"lr={lr}; give a learning rate above 0")
    held = [p for m in task.modules(model, parts or PARTS) for p in m.parameters()]
    if not any(p.requires_grad for p in held):
        raise ArgumentError(
            f"nothing in {', '.join(parts or PARTS)} can learn: {len(held)} parameters, none of which requires a gradient"
        )
    return torch.optim.Adam(held, lr=lr)


def cross_entropy(model: nn.Module, images: Images) -> Tensor:
    """Mean cross-entropy of a batch."""
    return functional.cross_entropy(model(images.x), images.y)


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that the global one stays where it is."""
    return torch.Generator().manual_seed(seed)


def descend(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Images,
    loss: Loss | None = None,
    *,
    epochs: int,
    batch: int | None,
    order: torch.Generator,
    before_step: Callable[[], None] | None = None,
) -> int:
    """Epochs of steps on shuffled images; the number of steps taken.

    Raises:
        TrainingError: at the first loss that is not finite. DataError: if there are no images.
    """
    if not len(images):
        raise DataError("there are no images to train on; give at least one")
    like, done = next(model.parameters()), 0
    own = Images(images.x.to(like), images.y.to(like.device), images.index, images.bounded)
    for _ in range(epochs):
        for rows in torch.randperm(len(own), generator=order).split(batch or len(own)):
            optimiser.zero_grad(set_to_none=True)
            value = (loss or cross_entropy)(model, own[rows])
            if not bool(torch.isfinite(value)):
                raise TrainingError(
                    f"step {done}, seed {order.initial_seed()}: the loss is {float(value.detach())} at lr "
                    f"{optimiser.param_groups[0]['lr']:g}; lower lr. The model given is unchanged"
                )
            value.backward()
            if before_step is not None:
                before_step()
            optimiser.step()
            done += 1
    return done


@contextmanager
def learning(model: nn.Module, task: Task, parts: Sequence[str] | None, seed: int) -> Iterator[None]:
    """Train mode and gradients for some parts only, with the global generator forked; eval mode everywhere on leaving.

    A parameter that did not require a gradient before does not learn.
    """
    active = {m for top in task.modules(model, parts or PARTS) for m in top.modules()}
    wanted = {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    for module in active:
        module.training = True
        for p in module.parameters(recurse=False):
            p.requires_grad_(wanted[p])
    if parts is None:
        model.training = True
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.eval()
        for p, kept in wanted.items():
            p.requires_grad_(kept)


# --- Modular training: which part of a classifier learns when, on which images and at which rate


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
