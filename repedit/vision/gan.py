"""Forgetting with drawn images: small adversarial networks, one for the retain set and one for the forget set."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from repedit.delta import Delta
from repedit.errors import ArgumentError, NotEnoughRows, TrainingError, UnknownName, nearest
from repedit.vision.data import Images, ImageSplits, Task, device_of
from repedit.vision.editing import apply
from repedit.vision.recipes import Relabel, made, training_images
from repedit.vision.recipes import relabel as relabelled
from repedit.vision.training import train

# --- Images like those of a set, drawn by a small generative adversarial network


log = logging.getLogger(__name__)
FEWEST = 16
"""Images that a pair of networks needs at least."""
REAL = 0.9
"""What the discriminator is to say of a real image: one-sided label smoothing."""


@dataclass(frozen=True)
class GanConfig:
    """How a pair of networks is built and trained; None takes the value for the image size.

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
    batch: int = 64

    def __post_init__(self) -> None:
        low = min(self.latent or 1, 1 if self.steps is None else self.steps, self.batch)
        if low < 1 or self.latent == 0 or not self.lr > 0:
            raise ArgumentError(
                f"latent={self.latent}, steps={self.steps}, batch={self.batch}, lr={self.lr}: give numbers of at least 1 and a "
                "rate above 0"
            )


@dataclass(frozen=True, eq=False)
class Gan:
    """A trained generator."""

    generator: nn.Module
    latent: int

    @torch.no_grad()
    def draw(self, count: int, *, seed: int) -> Float[Tensor, "count c H W"]:
        """Images for standard normal z; pixels lie in [0, 1]."""
        z = torch.randn(count, self.latent, generator=torch.Generator().manual_seed(seed))
        device = next(self.generator.parameters()).device
        return torch.cat([self.generator(part.to(device)).cpu() for part in z.split(512)])


def train_gan(
    images: Images, config: GanConfig | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Gan:
    """A generator trained on the images with the non-saturating loss.

    The discriminator descends BCE(D(x), 0.9) + BCE(D(G(z)), 0), the generator BCE(D(G(z)), 1), each with Adam. Up to
    16x16 both are multilayer perceptrons, at 28x28 and 32x32 convolutional.

    Raises:
        NotEnoughRows: if there are fewer than 16 images. ArgumentError: if no network is made for their size.
        TrainingError: if a loss is not finite; no generator is returned.
    """
    check_count(images)
    config, built = config or GanConfig(), _built(tuple(images.x.shape[1:]))
    latent = config.latent or built.latent
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = (net.to(device) for net in built.networks(tuple(images.x.shape[1:]), latent))
    optimisers = [
        torch.optim.Adam(net.parameters(), lr=config.lr, betas=config.betas) for net in (discriminator, generator)
    ]
    real = images.x.float().to(device)
    for step in range(built.steps if config.steps is None else config.steps):
        rows = torch.randint(len(real), (min(config.batch, len(real)),), generator=draw)
        z = torch.randn(len(rows), latent, generator=draw).to(device)
        fake = generator(z)
        with torch.no_grad():
            still = fake.clone()
        first = _bce(discriminator(real[rows]), REAL) + _bce(discriminator(still), 0.0)
        _step(optimisers[0], first, step, seed, config.lr)
        _step(optimisers[1], _bce(discriminator(fake), 1.0), step, seed, config.lr)
    log.info("GAN on %d images: discriminator loss %.3g", len(images), float(first.detach()))
    return Gan(generator.eval().requires_grad_(False), latent)


def check_count(images: Images) -> None:
    """Refuse a set that is too small to train a pair of networks on.

    Raises:
        NotEnoughRows: with the numbers.
    """
    if len(images) < FEWEST:
        raise NotEnoughRows(f"a GAN was asked for on {len(images)} images; give at least {FEWEST}")


def _step(optimiser: torch.optim.Optimizer, loss: Tensor, step: int, seed: int, lr: float) -> None:
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"step {step}, seed {seed}: the loss of the GAN is {float(loss.detach())} at lr {lr:g}; lower lr"
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    optimiser.step()


def _bce(logits: Tensor, target: float) -> Tensor:
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Built:
    networks: Callable[[Shape, int], tuple[nn.Module, nn.Module]]
    latent: int
    steps: int


def _built(shape: Shape) -> _Built:
    if max(shape[1:]) <= 16:
        return _Built(_perceptrons, 32, 300)
    if shape[1:] in ((28, 28), (32, 32)):
        return _Built(_convolutional, 64, 1500)
    raise ArgumentError(
        f"images are {shape[1]}x{shape[2]}; generators are made for sizes up to 16x16, and for 28x28 and 32x32: resize them"
    )


def _perceptrons(shape: Shape, latent: int) -> tuple[nn.Module, nn.Module]:
    size = shape[0] * shape[1] * shape[2]
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
    begin = 7 if shape[1] == 28 else 4
    widths = (128, 64, shape[0]) if begin == 7 else (128, 64, 32, shape[0])
    up: list[nn.Module] = [nn.Linear(latent, widths[0] * begin**2), nn.LeakyReLU(0.2)]
    up.append(nn.Unflatten(1, (widths[0], begin, begin)))
    down: list[nn.Module] = []
    for level, (wide, narrow) in enumerate(pairwise(widths), 2):
        last = level == len(widths)
        up += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1), nn.Sigmoid() if last else nn.LeakyReLU(0.2)]
        down = [nn.Conv2d(narrow, wide, 4, 2, 1), nn.LeakyReLU(0.2), *down]
    return nn.Sequential(*up), nn.Sequential(*down, nn.Flatten(), nn.Linear(widths[0] * begin**2, 1))


# --- Forgetting with drawn images: one generator for the retain set, one for the forget set, labels by the original model


log = logging.getLogger(__name__)
SETS = ("retain", "forget")
Gans = Mapping[str, Gan]
"""Trained generators by set."""


@dataclass(frozen=True)
class Synthesize:
    """Drawn images added to a set, labelled by the model.

    Args:
        which: "retain" or "forget".
        count: images to draw; 0 changes nothing.
        gan: how the generator is trained.
        trained: a generator to use in place of training one.
    Raises:
        UnknownName, ArgumentError: for a set that does not exist, or a count below 0.
    """

    which: Literal["retain", "forget"] | str
    count: int
    gan: GanConfig = field(default_factory=GanConfig)
    trained: Gan | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.which not in SETS:
            raise UnknownName(f"which={self.which!r}; {nearest(self.which, SETS)}")
        if self.count < 0:
            raise ArgumentError(f"count={self.count}; give 0 or more images to draw")

    def __call__(self, model: nn.Module, task: Task, splits: ImageSplits, seed: int) -> ImageSplits:
        """The splits with the drawn images after the real ones of the set.

        Raises:
            NotEnoughRows, ArgumentError, TrainingError: as `train_gan`.
        """
        if not self.count:
            return splits
        images = splits.named[self.which]
        gan = self.trained or train_gan(images, self.gan, seed=seed, device=device_of(model))
        pixels = gan.draw(self.count, seed=seed + 1).to(images.x.dtype)
        blank = torch.zeros(self.count, dtype=torch.int64)
        drawn = Images(pixels, blank, -1 - torch.arange(self.count))
        drawn = drawn.labelled(task.logits(model, drawn).argmax(1).cpu())
        return replace(splits, **{self.which: images + drawn}, plans=(*splits.plans, repr(self)))  # type: ignore[arg-type]


def train_gans(
    splits: ImageSplits, gan: GanConfig | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Gan]:
    """A generator for the retain and one for the forget set, as `multi_gan` trains them.

    Raises:
        NotEnoughRows, ArgumentError, TrainingError: as `train_gan`.
    """
    for which in SETS:
        check_count(splits.named[which])
    return {
        which: train_gan(splits.named[which], gan, seed=seed + number, device=device)
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
    gans: Gans | None = None,
    epochs: int = 5,
    lr: float = 1e-3,
    seed: int = 0,
) -> Delta:
    """Relabel real and drawn forget images, add drawn retain images, and go on training on all of them.

    A quarter as many images as retain has, and as many as forget has, are drawn, times `synthetic`. The model labels them;
    then every forget label is replaced as in `Relabel`. The provenance holds the accuracies, and beside them those of the
    same recipe without drawn images, which is `relabel`: only the difference is due to the networks. It also holds how many
    images were drawn by the label that the model gave them: a poor generator draws for retain what the model takes for a
    forgotten class, and those images teach it again; that is logged.

    Args:
        synthetic: 0 draws nothing and gives the same bits as `relabel`.
        gan: GanConfig() when None.
        gans: generators from `train_gans`, which then cost this recipe nothing.
    Raises:
        ArgumentError: if synthetic is negative, or no network is made for images of this size.
        NotEnoughRows: if retain or forget has fewer than 16 images.
        TrainingError: if a loss is not finite; no result is returned.
    Reference: Hatua, Nguyen, Sung 2024, arXiv:2407.18467.
    """
    if not 0 <= synthetic < math.inf:
        raise ArgumentError(f"synthetic={synthetic}; give 0 or more drawn images for each of the usual number")
    if gans is not None and set(gans) != set(SETS):
        raise ArgumentError(f"gans has {', '.join(gans) or 'no keys'}; give a generator for retain and one for forget")
    begin = perf_counter()
    counts = {"retain": round(synthetic * len(splits.retain) / 4), "forget": round(synthetic * len(splits.forget))}
    planned = splits
    if any(counts.values()):
        pair = train_gans(splits, gan, seed=seed, device=device_of(model)) if gans is None else gans
        for which in SETS:
            planned = Synthesize(which, counts[which], gan or GanConfig(), pair[which])(model, task, planned, seed)
    labels = {which: _drawn_labels(planned.named[which]) for which in SETS}
    strange = {label: n for label, n in labels["retain"].items() if int(label) not in splits.retain.classes}
    if strange:
        log.warning("images drawn for retain have labels that retain lacks, by the model: %s (label: images)", strange)
    planned = Relabel(mode)(model, task, planned, seed)
    trained = train(model, task, training_images(planned), epochs=epochs, lr=lr, seed=seed)
    done = perf_counter()
    plain = relabelled(model, task, splits, mode=mode, epochs=epochs, lr=lr, seed=seed)
    findings: dict[str, Any] = {
        "drawn": labels,
        "accuracy": _accuracies(trained, task, splits),
        "ablation": {
            "synthetic": 0,
            "accuracy": _accuracies(apply(plain, model), task, splits),
            "seconds": plain.provenance["seconds"],
        },
    }
    options: dict[str, Any] = {
        "mode": mode,
        "synthetic": synthetic,
        "epochs": epochs,
        "lr": lr,
        "gans": "given" if gans else "trained",
    }
    # The ablation is a measurement and no part of what the recipe costs.
    begin += perf_counter() - done
    return made("multi_gan", model, trained, begin, seed, plan=planned.plans, findings=findings, **options)


def _drawn_labels(images: Images) -> dict[str, int]:
    found = images.y[images.index < 0].tolist()
    return {str(label): found.count(label) for label in sorted(set(found))}


def _accuracies(model: nn.Module, task: Task, splits: ImageSplits) -> dict[str, float]:
    return {name: task.accuracy(model, images) for name, images in splits.named.items() if len(images)}
