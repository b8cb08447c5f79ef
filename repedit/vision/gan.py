"""Forgetting with synthetic images: one small GAN for the retain set and one for the forget set."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from repedit.delta import Delta
from repedit.errors import ArgumentError, NotEnoughRows, check_choice
from repedit.vision.data import Images, ImageSplits, Task, synthetic_index
from repedit.vision.editing import apply
from repedit.vision.recipes import Relabel, relabel, trained_delta, training_images
from repedit.vision.training import generator as random_generator
from repedit.vision.training import take_step, train

log = logging.getLogger(__name__)
MIN_IMAGES = 16
"""Images that a GAN needs at least."""
REAL = 0.9
"""Target of the discriminator for real images: one-sided label smoothing."""
SETS = ("retain", "forget")
Shape = tuple[int, ...]

# --- A small generative adversarial network


@dataclass(frozen=True)
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
        counts = [value for value in (self.latent, self.steps, self.batch_size) if value is not None]
        if min(counts) < 1 or not self.lr > 0:
            raise ArgumentError(
                f"latent={self.latent}, steps={self.steps}, batch_size={self.batch_size}, lr={self.lr}: give numbers of at "
                "least 1 and a positive lr"
            )


@dataclass(frozen=True, eq=False)
class Gan:
    """A trained generator."""

    generator: nn.Module
    latent: int

    @torch.no_grad()
    def draw(self, count: int, *, seed: int) -> Float[Tensor, "count c H W"]:
        """Images for standard normal z; pixels lie in [0, 1]."""
        z = torch.randn(count, self.latent, generator=random_generator(seed))
        device = next(self.generator.parameters()).device
        return torch.cat([self.generator(part.to(device)).cpu() for part in z.split(512)])


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
