"""Images grouped into buckets by class and feature, and one image chosen or synthesized for each bucket."""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from repedit.errors import TrainingError
from repedit.vision.data import BATCH, Images, Task, frozen

log = logging.getLogger(__name__)


def buckets(model: nn.Module, task: Task, images: Images, k: int, *, seed: int = 0) -> Int[Tensor, " b"]:
    """The bucket 0, 1, 2, ... of each image: k-means with k centres within each class, on the model's features.

    A class with fewer than k images gets as many clusters as it has images; a warning names these classes.
    """
    from sklearn.cluster import KMeans

    features = task.feature(model, images).double().cpu().numpy()
    ids = torch.zeros(len(images), dtype=torch.int64)
    small: dict[int, int] = {}
    for label in sorted(images.classes):
        rows = (images.y == label).nonzero()[:, 0]
        clusters = min(k, len(rows))
        small |= {label: clusters} if clusters < k else {}
        fit = KMeans(n_clusters=clusters, n_init=1, random_state=seed).fit(features[rows.numpy()])
        ids[rows] = label * k + torch.from_numpy(fit.labels_).long()
    if small:
        log.warning(
            "k=%d is above the size of %d classes; they get as many clusters as images: %s", k, len(small), small
        )
    return renumbered(ids)


def renumbered(ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """The same buckets numbered 0, 1, 2, ... without gaps, in the same order."""
    return torch.unique(ids, return_inverse=True)[1]


def labels_of(images: Images, ids: Int[Tensor, " b"]) -> Int[Tensor, " B"]:
    """The label of each bucket, which all of its images share."""
    labels = torch.zeros(int(ids.max()) + 1, dtype=torch.int64)
    labels[ids] = images.y
    return labels


def synthetic_index(count: int) -> Int[Tensor, " count"]:
    """Negative indices, which mark images that are in no data set."""
    return -1 - torch.arange(count)


def medoids(model: nn.Module, task: Task, images: Images, ids: Int[Tensor, " b"]) -> Images:
    """The real image of each bucket whose feature is nearest to the bucket's mean feature."""
    features = task.feature(model, images).double().cpu()
    distance = (features - means(features, ids)[ids]).square().sum(1)
    members = ids.argsort(stable=True).split(ids.bincount().tolist())
    return images[torch.stack([rows[distance[rows].argmin()] for rows in members])]


def means(rows: Float[Tensor, "b ..."], ids: Int[Tensor, " b"]) -> Float[Tensor, "B ..."]:
    """The mean row of each bucket."""
    counts = ids.bincount().to(rows).reshape(-1, *(1,) * (rows.ndim - 1))
    return rows.new_zeros(len(counts), *rows.shape[1:]).index_add_(0, ids, rows) / counts


def match_features(
    model: nn.Module,
    task: Task,
    images: Images,
    ids: Int[Tensor, " b"],
    *,
    steps: int = 100,
    lr: float = 1e-3,
    weights: str = "free",
) -> tuple[Images, Float[Tensor, " steps"]]:
    """For each bucket one weighted sum of its images whose feature matches the bucket's mean; and the loss of each step.

    x~_b = sum_i w_i x_i over the images of b, starting at w = 1 / |b|; Adam minimizes sum_b |mean_i phi(x_i) - phi(x~_b)|^2
    over w, where phi is the model's feature. All buckets are solved at once: the loss is a sum over buckets and Adam
    treats every entry separately, so a loop over buckets gives the same result. A bucket of one image is that image.

    Args:
        weights: "free", any real number, so pixels may leave [0, 1]; "simplex", the softmax of free numbers within a
            bucket, which keeps them in [0, 1].
    Raises:
        TrainingError: if the loss is not finite; no image is returned.
    Reference: Khan 2024, arXiv:2402.00195 (free weights).
    """
    phi = frozen(model)
    like = next(phi.parameters())
    order = ids.argsort(stable=True)
    x, ids = images.x[order].to(like), ids[order].to(like.device)
    counts = ids.bincount()
    alone = counts[ids] == 1
    target = means(task.feature(phi, images[order]), ids)
    start = torch.zeros(len(ids)) if weights == "simplex" else 1.0 / counts[ids].cpu().float()
    free = start.to(like).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=lr)
    losses = torch.zeros(steps, dtype=torch.float64)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        # At most 512 synthetic images are in memory at once.
        for first in range(0, len(counts), BATCH):
            rows = slice(*torch.searchsorted(ids, ids.new_tensor([first, first + BATCH])).tolist())
            part = bucket_sums(x[rows], ids[rows] - first, free[rows], weights)
            loss = (target[first : first + BATCH] - task.phi(phi, part)).square().sum()
            loss.backward()
            losses[step] += float(loss.detach())
        if not bool(torch.isfinite(losses[step])):
            raise TrainingError(
                f"step {step}: the loss of feature matching is {float(losses[step])} at lr {lr:g}; lower lr"
            )
        # A bucket of one image matches already; its gradient is rounding error, which Adam would scale up to lr.
        free.grad[alone] = 0  # type: ignore[index]
        optimizer.step()
    with torch.no_grad():
        pixels = bucket_sums(x, ids, free, weights).cpu().to(images.x.dtype)
    pixels = pixels.clamp(0, 1) if weights == "simplex" else pixels
    labels = labels_of(images[order], ids.cpu())
    return Images(pixels, labels, synthetic_index(len(counts)), weights == "simplex"), losses


def bucket_sums(x: Tensor, ids: Tensor, free: Tensor, weights: str) -> Tensor:
    """The weighted sum of each bucket's images; for "simplex" the weights are the softmax of `free` within the bucket."""
    count = int(ids.max()) + 1
    if weights == "simplex":
        largest = free.new_full((count,), -torch.inf).scatter_reduce(0, ids, free.detach(), "amax")
        powers = (free - largest[ids]).exp()
        free = powers / powers.new_zeros(count).index_add(0, ids, powers)[ids]
    return x.new_zeros(count, *x.shape[1:]).index_add(0, ids, free[:, None, None, None] * x)
