"""Images drawn for buckets by a small network that a frozen classifier teaches."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from repedit.errors import TrainingError
from repedit.vision.grouping import frozen, labels_of, made_index
from repedit.vision.task import Images

BATCH = 128


def inverted(
    model: nn.Module, images: Images, ids: Int[Tensor, " b"], *, epochs: int = 200, lr: float = 1e-3, seed: int = 0
) -> Images:
    """One image a bucket, drawn by a network g that learns CE(f(g(e_b)), y) + MSE(g(e_b), x) over the images x of b.

    f is the classifier, frozen and in eval mode; e_b is one-hot; g has layers 128-512-2048-4096-pixels with ReLU, and a
    sigmoid at its end.

    Raises:
        TrainingError: if the loss is not finite; no image is returned.
    Reference: Khan 2024, arXiv:2402.00195, the smaller of its two networks.
    """
    judge, draw = frozen(model), torch.Generator().manual_seed(seed)
    like = next(judge.parameters())
    x, y, ids = images.x.to(like), images.y.to(like.device), ids.to(like.device)
    count = int(ids.max()) + 1
    drawing = _network(count, images.x.shape[1:], seed).to(like)
    optimiser = torch.optim.Adam(drawing.parameters(), lr=lr)
    for epoch in range(epochs):
        for rows in torch.randperm(len(ids), generator=draw).split(BATCH):
            made = drawing(functional.one_hot(ids[rows], count).to(like))
            loss = functional.cross_entropy(judge(made), y[rows]) + functional.mse_loss(made, x[rows])
            if not bool(torch.isfinite(loss)):
                raise TrainingError(
                    f"epoch {epoch}, seed {seed}: the loss of inversion is {float(loss.detach())} at lr {lr:g}; lower lr"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        pixels = drawing(torch.eye(count).to(like)).cpu().to(images.x.dtype)
    return Images(pixels, labels_of(images, ids.cpu()), made_index(count))


def _network(count: int, shape: torch.Size, seed: int) -> nn.Module:
    widths = (count, 128, 512, 2048, 4096)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], shape.numel()), nn.Sigmoid(), nn.Unflatten(1, tuple(shape)))
