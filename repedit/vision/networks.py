"""Two small classifiers whose three parts a schedule can train in turn."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from repedit.vision.data import Images


def small_cnn(images: Images, *, width: int = 16, hidden: int = 64, labels: int = 10, seed: int = 0) -> nn.Module:
    """Two 3x3 convolutions, a pool and two linear layers, for images of this size; features have `hidden` entries.

    beginning: conv(c, width); intermediate: conv(width, 2 width), pool by 2, linear to `hidden`; final: linear to `labels`.
    Images above 16x16 are also pooled by 2 in the beginning.
    """
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


def small_mlp(images: Images, *, hidden: int = 256, labels: int = 10, seed: int = 0) -> nn.Module:
    """Three linear layers with ReLU; it memorizes wrong labels, which the small CNN does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        begin = nn.Sequential(nn.Flatten(), nn.Linear(images.x[0].numel(), hidden), nn.ReLU())
        return _three_parts(begin, nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU()), nn.Linear(hidden, labels))


def _three_parts(begin: nn.Module, middle: nn.Module, final: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(beginning=begin, intermediate=middle, final=final))
