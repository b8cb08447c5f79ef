"""Recipes that forget images by training; each returns the change of the weights as a delta that records how it was made."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from repedit.arguments import checked
from repedit.delta import Delta
from repedit.errors import ArgumentError, NotEnoughRows, check_choice, check_positive, check_whole, given
from repedit.vision.data import Images, ImageSplits, Task, frozen, other_labels, random_generator, synthetic_index
from repedit.vision.editing import apply, difference, recipe_record
from repedit.vision.training import adam, cross_entropy, descend, learning, take_step, train

# --- Data plans: what a request does to the data before an ordinary fine-tune

DataPlan = Callable[[nn.Module, Task, ImageSplits, int], ImageSplits]
"""(model, task, splits, seed) -> new splits; the arguments do not change."""


@dataclass(frozen=True)
@checked
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
        y = MODES[self.mode](splits.forget.y, logits, random_generator(seed))
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


@checked
def training_images(splits: ImageSplits) -> Images:
    """Retain, then forget."""
    return splits.retain + splits.forget


# --- Recipes


@checked
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


@checked
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


@checked
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


@checked
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


@checked
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


@checked
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

    trained, order = copy.deepcopy(model), random_generator(seed)
    optimizer = adam(trained, task, None, lr)
    with learning(trained, task, None, seed):
        for epoch in range(epochs):
            if epoch < max_epochs:
                descend(trained, optimizer, splits.forget, forget_loss, epochs=1, batch_size=64, order=order)
            descend(trained, optimizer, splits.retain, retain_loss, epochs=1, batch_size=64, order=order)
    options = {"epochs": epochs, "max_epochs": max_epochs, "lr": lr}
    return trained_delta("scrub", model, trained, begin, seed, options)


@checked
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
            trained, adam(trained, task, None, lr), training_images(planned), epochs=epochs, batch_size=64,
            order=random_generator(seed), before_step=mask_gradients,
        )  # fmt: skip
    salient = sum(float(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    options = {"percentile": percentile, "epochs": epochs, "lr": lr}
    findings = {"salient": salient}
    return trained_delta("salun", model, trained, begin, seed, options, plan=planned.plans, findings=findings)


def _divergence(teacher: nn.Module, student: nn.Module, images: Images) -> Tensor:
    """KL(teacher || student), mean over the batch."""
    with torch.no_grad():
        target = teacher(images.x).log_softmax(1)
    return functional.kl_div(student(images.x).log_softmax(1), target, reduction="batchmean", log_target=True)


@torch.enable_grad()
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


# --- A small generative adversarial network


log = logging.getLogger(__name__)
MIN_IMAGES = 16
"""Images that a GAN needs at least."""
REAL = 0.9
"""Target of the discriminator for real images: one-sided label smoothing."""
SETS = ("retain", "forget")
Shape = tuple[int, ...]


@dataclass(frozen=True)
@checked
class GanConfig:
    """How a GAN is built and trained; None takes the value for the image size.

    Args:
        latent: entries of z, 32 up to 16x16 and 64 for 28x28 and 32x32.
        steps: 300 up to 16x16, 1500 above.
    Raises:
        ArgumentError: for a number out of range.
    """

    latent: int | None = None
    steps: int | None = None
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_whole(batch_size=self.batch_size, **given(latent=self.latent, steps=self.steps))
        check_positive(lr=self.lr)


@dataclass(frozen=True, eq=False)
@checked
class Gan:
    """A trained generator."""

    generator: nn.Module
    latent: int

    @checked
    @torch.no_grad()
    def draw(self, count: int, *, seed: int) -> Float[Tensor, "count c H W"]:
        """Images for standard normal z; pixels lie in [0, 1]."""
        z = torch.randn(count, self.latent, generator=random_generator(seed))
        device = next(self.generator.parameters()).device
        return torch.cat([self.generator(part.to(device)).cpu() for part in z.split(512)])


@checked
@torch.enable_grad()
def train_gan(
    images: Images, config: GanConfig | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Gan:
    """A generator trained on the images with the non-saturating loss.

    The discriminator minimizes BCE(D(x), 0.9) + BCE(D(G(z)), 0), the generator BCE(D(G(z)), 1), each with Adam. Up to
    16x16 both are multilayer perceptrons, at 28x28 and 32x32 they are convolutional.

    Raises:
        NotEnoughRows: if there are fewer than 16 images. ArgumentError: if there is no network for their size.
        TrainingError: if a loss is not finite; no generator is returned.
    """
    check_count(images)
    shape = tuple(images.x.shape[1:])
    small = max(shape[1:]) <= 16
    if not small and shape[1:] not in ((28, 28), (32, 32)):
        raise ArgumentError(
            f"images are {shape[1]}x{shape[2]}; generators exist for sizes up to 16x16, and for 28x28 and 32x32: resize them"
        )
    config = config or GanConfig()
    latent, steps = config.latent or (32 if small else 64), config.steps or (300 if small else 1500)
    random = random_generator(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = (_perceptrons if small else _convolutional)(shape, latent)
        generator, discriminator = (network.to(device) for network in networks)
    update_discriminator, update_generator = (
        torch.optim.Adam(net.parameters(), lr=config.lr, betas=config.betas) for net in (discriminator, generator)
    )
    real = images.x.float().to(device)
    for step in range(steps):
        rows = torch.randint(len(real), (min(config.batch_size, len(real)),), generator=random)
        z = torch.randn(len(rows), latent, generator=random).to(device)
        fake = generator(z)
        loss = _bce(discriminator(real[rows]), REAL) + _bce(discriminator(fake.detach().clone()), 0.0)
        name = f"step {step}, seed {seed}: the loss of the GAN"
        take_step(update_discriminator, loss, name)
        take_step(update_generator, _bce(discriminator(fake), 1.0), name)
    log.info("GAN on %d images: discriminator loss %.3g", len(images), float(loss.detach()))
    return Gan(generator.eval().requires_grad_(False), latent)


@checked
def check_count(images: Images) -> None:
    """Refuse a set that is too small for a GAN.

    Raises:
        NotEnoughRows: with the numbers.
    """
    if len(images) < MIN_IMAGES:
        raise NotEnoughRows(f"a GAN was asked for on {len(images)} images; give at least {MIN_IMAGES}")


def _bce(logits: Tensor, target: float) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _perceptrons(shape: Shape, latent: int) -> tuple[nn.Module, nn.Module]:
    size = math.prod(shape)
    generator = nn.Sequential(
        nn.Linear(latent, 128), nn.LeakyReLU(0.2), nn.Linear(128, 256), nn.LeakyReLU(0.2),
        nn.Linear(256, size), nn.Sigmoid(), nn.Unflatten(1, shape),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Flatten(), nn.Linear(size, 256), nn.LeakyReLU(0.2), nn.Linear(256, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1)
    )
    return generator, discriminator


def _convolutional(shape: Shape, latent: int) -> tuple[nn.Module, nn.Module]:
    """28: 7 -> 14 -> 28; 32: 4 -> 8 -> 16 -> 32, halving the channels from 128; the discriminator is the mirror image."""
    start = 7 if shape[1] == 28 else 4
    widths = (128, 64, shape[0]) if start == 7 else (128, 64, 32, shape[0])
    up: list[nn.Module] = [nn.Linear(latent, widths[0] * start**2), nn.LeakyReLU(0.2)]
    up.append(nn.Unflatten(1, (widths[0], start, start)))
    down: list[nn.Module] = []
    for level, (wide, narrow) in enumerate(pairwise(widths), 2):
        last = level == len(widths)
        up += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.Sigmoid() if last else nn.LeakyReLU(0.2)]
        down = [nn.Conv2d(narrow, wide, 4, 2, 1), nn.LeakyReLU(0.2), *down]
    return nn.Sequential(*up), nn.Sequential(*down, nn.Flatten(), nn.Linear(widths[0] * start**2, 1))


# --- Multi-GAN unlearning: synthetic images in both sets, labelled by the original model


@dataclass(frozen=True)
@checked
class Synthesize:
    """A data plan that adds synthetic images to a set, labelled by the model.

    Args:
        which: "retain" or "forget".
        count: images to draw; 0 changes nothing.
        gan: how the generator is trained.
        trained: a generator to use instead of training one.
    Raises:
        UnknownName, ArgumentError: for a set that does not exist, or a count below 0.
    """

    which: Literal["retain", "forget"] | str
    count: int
    gan: GanConfig = field(default_factory=GanConfig)
    trained: Gan | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice(SETS, which=self.which)
        if self.count < 0:
            raise ArgumentError(f"count={self.count}; give 0 or more images to draw")

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with the synthetic images after the real ones of the set.

        Raises:
            NotEnoughRows, ArgumentError, TrainingError: as `train_gan`.
        """
        if not self.count:
            return splits
        images = splits.sets[self.which]
        gan = self.trained or train_gan(images, self.gan, seed=seed, device=next(model.parameters()).device)
        pixels = gan.draw(self.count, seed=seed + 1).to(images.x.dtype)
        blank = torch.zeros(self.count, dtype=torch.int64)
        drawn = Images(pixels, blank, synthetic_index(self.count))
        drawn = drawn.labelled(task.logits(model, drawn).argmax(1).cpu())
        return replace(splits, **{self.which: images + drawn}, plans=(*splits.plans, repr(self)))  # type: ignore[arg-type]


@checked
def train_gans(
    splits: ImageSplits, gan: GanConfig | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Gan]:
    """A generator for the retain set and one for the forget set, as `multi_gan` trains them.

    Raises:
        NotEnoughRows, ArgumentError, TrainingError: as `train_gan`.
    """
    for which in SETS:
        check_count(splits.sets[which])
    return {
        which: train_gan(splits.sets[which], gan, seed=seed + number, device=device)
        for number, which in enumerate(SETS)
    }


@checked
def multi_gan(
    model: nn.Module,
    task: Task,
    splits: ImageSplits,
    *,
    mode: str = "random_other",
    synthetic: float = 1.0,
    gan: GanConfig | None = None,
    gans: Mapping[str, Gan] | None = None,
    epochs: int = 5,
    lr: float = 1e-3,
    seed: int = 0,
) -> Delta:
    """Relabel real and synthetic forget images, add synthetic retain images, and continue training on all of them.

    `synthetic` times a quarter of the number of retain images, and `synthetic` times the number of forget images, are
    drawn. The model labels them; then every forget label is replaced as in `Relabel`.

    The provenance holds the accuracies of the result and, under "ablation", those of the same recipe without synthetic
    images, which is `relabel`: only the difference is due to the GANs. Under "drawn" it counts the synthetic images by
    the label that the model gave them. A poor generator draws images for retain that the model takes for a forgotten
    class, and those images teach the class again; a warning reports this.

    Args:
        synthetic: 0 draws nothing and gives exactly the result of `relabel`.
        gan: GanConfig() when None.
        gans: generators from `train_gans`, by set; their training does not count as time of this recipe.
    Raises:
        ArgumentError: if synthetic is negative, or there is no network for images of this size.
        NotEnoughRows: if retain or forget has fewer than 16 images.
        TrainingError: if a loss is not finite; no result is returned.
    Reference: Hatua, Nguyen, Sung 2024, arXiv:2407.18467.
    """
    if not 0 <= synthetic < math.inf:
        raise ArgumentError(f"synthetic={synthetic}; give 0 or more synthetic images for each of the usual number")
    if gans is not None and set(gans) != set(SETS):
        raise ArgumentError(f"gans has {', '.join(gans) or 'no keys'}; give a generator for retain and one for forget")
    begin = perf_counter()
    counts = {"retain": round(synthetic * len(splits.retain) / 4), "forget": round(synthetic * len(splits.forget))}
    planned = splits
    if any(counts.values()):
        pair = gans or train_gans(splits, gan, seed=seed, device=next(model.parameters()).device)
        for which in SETS:
            planned = Synthesize(which, counts[which], gan or GanConfig(), pair[which])(model, task, planned, seed)
    labels = {which: _synthetic_labels(planned.sets[which]) for which in SETS}
    foreign = {label: n for label, n in labels["retain"].items() if int(label) not in splits.retain.classes}
    if foreign:
        log.warning("images drawn for retain have labels that retain lacks, by the model: %s (label: images)", foreign)
    planned = Relabel(mode)(model, task, planned, seed)
    trained = train(model, task, training_images(planned), epochs=epochs, lr=lr, seed=seed)
    end = perf_counter()
    ablation = relabel(model, task, splits, mode=mode, epochs=epochs, lr=lr, seed=seed)
    findings = {
        "drawn": labels,
        "accuracy": _accuracies(trained, task, splits),
        "ablation": {
            "synthetic": 0,
            "accuracy": _accuracies(apply(ablation, model), task, splits),
            "seconds": ablation.provenance["seconds"],
        },
    }
    source = "given" if gans else "trained"
    options = {"mode": mode, "synthetic": synthetic, "epochs": epochs, "lr": lr, "gans": source}
    # The ablation is a measurement; it does not count as time of the recipe.
    begin += perf_counter() - end
    return trained_delta("multi_gan", model, trained, begin, seed, options, plan=planned.plans, findings=findings)


def _synthetic_labels(images: Images) -> dict[str, int]:
    """The number of synthetic images by label."""
    counts = Counter(images.y[images.index < 0].tolist())
    return {str(label): counts[label] for label in sorted(counts)}


def _accuracies(model: nn.Module, task: Task, splits: ImageSplits) -> dict[str, float]:
    return {name: task.accuracy(model, images) for name, images in splits.sets.items() if len(images)}
