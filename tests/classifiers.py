"""Random images and small classifiers for the tests of vision."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from repedit.vision import Images, ImageSplits, Task, small_cnn, train
from repedit.vision.data import class_splits

# Hooked against folded, measured: float64 4e-15, float32 2e-6.
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-4}


def drawn(n=60, *, channels=1, size=8, labels=4, seed=0, dtype=torch.float64) -> Images:
    """Random images whose classes differ by where they are bright, so that they can be learnt."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(labels, (n,), generator=draw)
    y[:labels] = torch.arange(labels)
    shape = torch.rand(labels, channels, size, size, generator=torch.Generator().manual_seed(99))
    x = 0.6 * shape[y] + 0.4 * torch.rand(n, channels, size, size, generator=draw)
    return Images(x.to(dtype), y, torch.arange(n))


def request(label=1, *, n=160, train=100, remember=20, labels=4, seed=0, dtype=torch.float32, **options) -> ImageSplits:
    """The request to forget one class of random images."""
    return class_splits(
        drawn(n, labels=labels, seed=seed, dtype=dtype, **options), label, train=train, remember=remember, seed=seed
    )


def original(splits: ImageSplits, *, epochs=3, seed=0) -> tuple[nn.Module, Task]:
    """A small network trained on a request's images, and its task."""
    model = small_cnn(splits.retain, width=4, hidden=12, labels=splits.labels, seed=seed).to(splits.retain.x.dtype)
    task = Task.of(model, splits.retain)
    return train(model, task, splits.retain + splits.forget, epochs=epochs, lr=3e-3, seed=seed), task


def normed(labels=4, seed=0) -> nn.Module:
    """A classifier with BatchNorm and dropout in its parts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        begin = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2))
        middle = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 9), nn.BatchNorm1d(9), nn.ReLU())
        return nn.Sequential(OrderedDict(beginning=begin, intermediate=middle, final=nn.Linear(9, labels)))


def reading(layer: nn.Module, channels: int, dtype: torch.dtype, seed=0) -> nn.Module:
    """A network in which `layer`, called "place", reads what a convolution with `channels` channels writes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = nn.Conv2d(2, channels, 3)
        inner = [("flat", nn.Flatten())] if isinstance(layer, nn.Linear) else []
        net = nn.Sequential(OrderedDict([("first", first), ("act", nn.ReLU()), *inner, ("place", layer)]))
        for p in net.parameters():
            nn.init.normal_(p, std=0.4)
    return net.to(dtype).eval()
