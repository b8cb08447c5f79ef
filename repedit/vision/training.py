"""Training classifiers: two small networks, one loop, and the schedule of which part learns when."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from repedit.arguments import checked
from repedit.errors import ArgumentError, DataError, TrainingError, UnknownName, check_seed, nearest
from repedit.training.optimizers import set_lr
from repedit.vision.data import PARTS, Images, Task, random_generator

# --- Two small classifiers whose three parts a schedule can train in turn


@checked
def small_cnn(images: Images, *, width: int = 16, hidden: int = 64, labels: int = 10, seed: int = 0) -> nn.Module:
    """Two 3x3 convolutions, a pool and two linear layers, for images of this size; features have `hidden` entries.

    beginning: conv(c, width); intermediate: conv(width, 2 width), pool by 2, linear to `hidden`; final: linear to
    `labels`. Images above 16x16 are also pooled by 2 in the beginning.
    """
    check_seed(seed=seed)
    channels, height, wide = images.x.shape[1:]
    halvings = 2 if max(height, wide) > 16 else 1
    flat = 2 * width * (height >> halvings) * (wide >> halvings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        begin: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        begin += [nn.MaxPool2d(2)] if halvings == 2 else []
        middle = [nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        middle += [nn.Linear(flat, hidden), nn.ReLU()]
        return _three_parts(nn.Sequential(*begin), nn.Sequential(*middle), nn.Linear(hidden, labels))


@checked
def small_mlp(images: Images, *, hidden: int = 256, labels: int = 10, seed: int = 0) -> nn.Module:
    """Three linear layers with ReLU; it memorizes wrong labels, which the small CNN does not."""
    check_seed(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        begin = nn.Sequential(nn.Flatten(), nn.Linear(images.x[0].numel(), hidden), nn.ReLU())
        return _three_parts(begin, nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()), nn.Linear(hidden, labels))


def _three_parts(begin: nn.Module, middle: nn.Module, final: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(beginning=begin, intermediate=middle, final=final))


# --- The training loop: selected parts, one Adam over their parameters, shuffled batches

Loss = Callable[[nn.Module, Images], Tensor]
"""Returns the scalar to minimize on a batch."""


@checked
def train(
    model: nn.Module,
    task: Task,
    images: Images,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int | None = 64,
    seed: int = 0,
    parts: Sequence[str] | None = None,
    ascend: bool = False,
) -> nn.Module:
    """A copy of the model, trained with Adam on the cross-entropy; the model itself does not change.

    Args:
        batch_size: images in a step; None takes all of them in one step.
        parts: the parts to train. The other parts run in eval mode; their parameters and buffers do not change.
        ascend: maximize the loss instead.
    Raises:
        TrainingError: if the loss is not finite; no result is returned.
        UnknownName, ArgumentError: if the task does not describe the model, or there is no such part.
        DataError: if there are no images.
    """
    task.check(model)
    trained = copy.deepcopy(model)
    optimizer = adam(trained, task, parts, lr)
    loss = (lambda m, batch: -cross_entropy(m, batch)) if ascend else cross_entropy
    with learning(trained, task, parts, seed):
        descend(trained, optimizer, images, loss, epochs=epochs, batch_size=batch_size, order=random_generator(seed))
    trained.trained_on = trained_on(model) | source_indices(images)  # type: ignore[assignment]
    return trained


@checked
def trained_on(model: nn.Module) -> frozenset[int]:
    """Indices of the images that `train` used for this model and for the model it started from; empty if not recorded."""
    return getattr(model, "trained_on", frozenset())


def source_indices(images: Images) -> frozenset[int]:
    """Indices of the images in the data set they come from; synthetic images have none."""
    return frozenset(i for i in images.index.tolist() if i >= 0)


def adam(model: nn.Module, task: Task, parts: Sequence[str] | None, lr: float) -> torch.optim.Adam:
    """Adam over the parameters of the given parts, of all parts when None.

    Raises:
        ArgumentError: if lr is not positive, or none of the parameters requires a gradient.
    """
    if not lr > 0:
        raise ArgumentError(f"lr={lr}; give a learning rate above 0")
    parameters = [p for m in task.modules(model, parts or PARTS) for p in m.parameters()]
    if not any(p.requires_grad for p in parameters):
        raise ArgumentError(
            f"nothing in {', '.join(parts or PARTS)} can be trained: none of {len(parameters)} parameters requires a "
            "gradient; call requires_grad_() on some"
        )
    return torch.optim.Adam(parameters, lr=lr)


def cross_entropy(model: nn.Module, images: Images) -> Tensor:
    """Mean cross-entropy of a batch."""
    return functional.cross_entropy(model(images.x), images.y)


@torch.enable_grad()
def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    loss: Loss | None = None,
    *,
    epochs: int,
    batch_size: int | None,
    order: torch.Generator,
    before_step: Callable[[], None] | None = None,
) -> int:
    """Run epochs of gradient descent on shuffled images and return the number of steps.

    Raises:
        TrainingError: at the first loss that is not finite. DataError: if there are no images.
    """
    if not len(images):
        raise DataError("there are no images to train on; give at least one")
    like, step = next(model.parameters()), 0
    images = Images(images.x.to(like), images.y.to(like.device), images.index, images.bounded)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=order).split(batch_size or len(images)):
            value = (loss or cross_entropy)(model, images[rows])
            place = f"step {step}, seed {order.initial_seed()}"
            take_step(optimizer, value, f"{place}: the loss", "lower lr. The original model is unchanged", before_step)
            step += 1
    return step


def take_step(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    name: str,
    remedy: str = "lower lr",
    before_step: Callable[[], None] | None = None,
) -> None:
    """One step of an optimizer along the gradient of a loss.

    Raises:
        TrainingError: if the loss is not finite; the parameters are unchanged.
    """
    if not bool(torch.isfinite(loss)):
        raise TrainingError(f"{name} is {float(loss.detach())} at lr {optimizer.param_groups[0]['lr']:g}; {remedy}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if before_step is not None:
        before_step()
    optimizer.step()


@contextmanager
def learning(model: nn.Module, task: Task, parts: Sequence[str] | None, seed: int) -> Iterator[None]:
    """Train mode and gradients for the given parts only, with a forked global generator; eval mode everywhere afterwards.

    Parameters that do not require a gradient are not trained.
    """
    check_seed(seed=seed)
    active = {m for top in task.modules(model, parts or PARTS) for m in top.modules()}
    requires_grad = {p: p.requires_grad for p in model.parameters()}
    model.eval().requires_grad_(False)
    for module in active:
        module.training = True
        for p in module.parameters(recurse=False):
            p.requires_grad_(requires_grad[p])
    if parts is None:
        model.training = True
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.eval()
        for p, value in requires_grad.items():
            p.requires_grad_(value)


# --- Schedules: which part of a classifier is trained when, on which images and at which learning rate

SETS = ("reduced", "remember", "all")


@dataclass(frozen=True)
@checked
class Stage:
    """One stage of a schedule; everything outside its parts keeps its values exactly."""

    parts: tuple[str, ...]
    data: str
    """"reduced", the condensed retain set; "remember", the remembrance set; "all", retain and forget."""
    epochs: int
    lr: float
    batch_size: int | None = None
    """Images in a step; None takes all of them in one step."""
    reset: bool = False
    """Whether the parts start again from the original model."""

    def __post_init__(self) -> None:
        for name, valid in ((self.data, SETS), *((part, PARTS) for part in self.parts)):
            if name not in valid:
                raise UnknownName(f"a stage of a schedule names {name!r}; {nearest(name, valid)}")
        small_batch = self.batch_size is not None and self.batch_size < 1
        if not self.parts or self.epochs < 1 or not self.lr > 0 or small_batch:
            raise ArgumentError(
                f"a stage of a schedule has parts={self.parts}, epochs={self.epochs}, lr={self.lr}, "
                f"batch_size={self.batch_size}; give at least one part and one epoch, a positive lr, and a batch_size of "
                "at least 1 or None"
            )


@dataclass(frozen=True)
@checked
class Schedule:
    """Stages that run in order."""

    stages: tuple[Stage, ...]
    fresh: bool = True
    """Whether each stage has a new Adam; otherwise each combination of parts has one that keeps its state."""

    def plain(self) -> dict[str, object]:
        """The schedule as JSON values."""
        return asdict(self)


@checked
def alternating_schedule(
    *,
    epochs: int = 15,
    hold: int = 8,
    final_steps: int = 10,
    lr: float = 1e-3,
    lr_intermediate: float = 1e-4,
    batch_size: int = 64,
    remember_batch_size: int | None = None,
    fresh: bool = True,
) -> Schedule:
    """Train the beginning and the final part alternately for `epochs` rounds, then the intermediate part for one epoch.

    In round e = 0, 1, ... the beginning is trained for one epoch on the reduced set; while e < epochs - hold, the final
    part is then trained for `final_steps` epochs on the remembrance set. The defaults suit the digits;
    `PUBLISHED_SCHEDULES` has the settings of the paper.

    Raises:
        ArgumentError: if hold is not in 0 to epochs, or another number is out of range.
    Reference: Khan 2024, arXiv:2402.00195.
    """
    if not 0 <= hold <= epochs:
        raise ArgumentError(f"hold={hold} with epochs={epochs}: the final part can be held for 0 to {epochs} epochs")
    stages = []
    for epoch in range(epochs):
        stages.append(Stage(("beginning",), "reduced", 1, lr, batch_size))
        if epoch < epochs - hold:
            stages.append(Stage(("final",), "remember", final_steps, lr, remember_batch_size))
    return Schedule((*stages, Stage(("intermediate",), "reduced", 1, lr_intermediate, batch_size)), fresh)


@checked
def offline_schedule(
    *, rounds: int = 10, epochs: int = 20, lr_final: float = 1e-4, lr_intermediate: float = 1e-5, batch_size: int = 256
) -> Schedule:
    """The training that the paper does before any request: a reset final part, then the intermediate part, `rounds` times.

    The final part is trained on the remembrance set, the intermediate part on all images. This takes more epochs than
    the retraining it saves, so it pays off over many requests only.

    Reference: Khan 2024, arXiv:2402.00195.
    """
    final = Stage(("final",), "remember", epochs, lr_final, 32, reset=True)
    return Schedule((final, Stage(("intermediate",), "all", epochs, lr_intermediate, batch_size)) * rounds)


PUBLISHED_SCHEDULES: Mapping[str, Schedule] = {
    name: alternating_schedule(epochs=30, hold=hold, final_steps=steps, lr=lr, lr_intermediate=later, batch_size=256,
                               remember_batch_size=32, fresh=False)
    for name, hold, steps, lr, later in (
        ("mlp", 15, 15, 1e-3, 1e-4), ("resnet18", 15, 15, 1e-3, 1e-4), ("cnn", 25, 10, 3e-3, 3e-3), ("vgg16", 15, 10, 1e-3, 1e-4),
    )
}  # fmt: skip
"""The settings of the paper by network; each part has one Adam throughout."""


@checked
def train_scheduled(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    sets: Mapping[str, Images],
    *,
    seed: int = 0,
    origin: nn.Module | None = None,
) -> nn.Module:
    """A copy of the model, trained by a schedule; the model itself does not change.

    Args:
        sets: images by the names that the stages use.
        origin: the model to which a reset returns; `model` when None.
    Raises:
        DataError: if a stage needs images that are missing. TrainingError: if a loss is not finite.
    """
    task.check(model)
    trained, order = copy.deepcopy(model), random_generator(seed)
    optimizers: dict[tuple[str, ...], torch.optim.Adam] = {}
    for number, stage in enumerate(schedule.stages):
        images = sets.get(stage.data)
        if images is None or not len(images):
            raise DataError(
                f"stage {number} of the schedule trains on {stage.data!r}, which has no images; there are {sorted(sets)}"
            )
        if stage.reset:
            first = task.modules(model if origin is None else origin, stage.parts)
            for module, original in zip(task.modules(trained, stage.parts), first, strict=True):
                module.load_state_dict(original.state_dict())
        optimizer = optimizers.get(stage.parts) or adam(trained, task, stage.parts, stage.lr)
        set_lr(optimizer, stage.lr)
        if not schedule.fresh:
            optimizers[stage.parts] = optimizer
        with learning(trained, task, stage.parts, seed * 1009 + number):
            descend(trained, optimizer, images, epochs=stage.epochs, batch_size=stage.batch_size, order=order)
        trained.trained_on = trained_on(trained) | source_indices(images)  # type: ignore[assignment]
    return trained
