"""Collections made by hand: random activations and gradients of two sites, without a model."""

from __future__ import annotations

import torch

import repedit as rp
from repedit.activations.collection import Collection

WIDTHS = {"0.mlp.neurons": 6, "1.mlp.neurons": 5}


def rows_of(seed=0, scale=1.0, dead=(), widths=WIDTHS, n=40):
    """(activations, gradients) by site; layer-wise means and signs differ between neurons."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for site, width in widths.items():
        spread = torch.rand(width, generator=generator) + 0.2
        z = (torch.randn(n, width, generator=generator) + torch.randn(width, generator=generator)) * spread * scale
        z[:, list(dead)] = 0.0
        found[rp.Site.parse(site)] = (z.double(), torch.randn(n, width, generator=generator).double())
    return found


def collection(rows, name, *, gradients=True, first=None, **changes):
    found = {}
    for site, (z, grad) in rows.items():
        found[site] = rp.Activity.zeros(z.shape[1], gradients=gradients).update(z, grad=grad if gradients else None)
        if first is not None:
            found[site].update(first[site], torch.zeros(1, dtype=torch.bool), first=torch.ones(1, dtype=torch.bool))
    options = {"model": "m" * 64, "corpus": name, "data_hash": name, "rule": {}, "seen": 50, "counted": 40}
    return Collection(found, **(options | {"group_sizes": {site: {} for site in found}, "gated": False} | changes))


def pair(seed=0, **options):
    rows = rows_of(seed), rows_of(seed + 1)
    return rows, tuple(collection(r, name, **options) for r, name in zip(rows, ("forget", "retain"), strict=True))
