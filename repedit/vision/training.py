"""The training loop of classifiers: some parts, one Adam that holds only them, batches in a seeded order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.errors import ArgumentError, DataError, TrainingError
from repedit.vision.task import PARTS, Images, Task

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
