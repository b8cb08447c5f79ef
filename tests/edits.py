"""The edits that tests apply to every family."""

from __future__ import annotations

import torch

import repedit as rp
from repedit.edit import Edit
from repedit.models.subject import Subject
from repedit.sites import Site


def mask(subject: Subject, site: str, share: float = 0.5, seed: int = 0) -> Edit:
    """Zero a random share of the neurons of a site."""
    where = Site.parse(site)
    width = subject.layout.width_of(where.layer, where.point)
    keep = torch.rand(width, generator=torch.Generator().manual_seed(seed)) > share
    return Edit({where: rp.Diagonal.mask(keep)}, {"method": "test"})


def fill(subject: Subject, site: str, seed: int = 0) -> Edit:
    """Hold half of the neurons of a site at random values."""
    where = Site.parse(site)
    width = subject.layout.width_of(where.layer, where.point)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(width, generator=generator) > 0.5
    return Edit({where: rp.Diagonal.fill(keep, torch.randn(width, generator=generator))}, {"method": "test"})


def projection(subject: Subject, site: str, rank: int = 3, *, center: bool = False, seed: int = 0) -> Edit:
    """Remove a random subspace from a site."""
    where = Site.parse(site)
    width = subject.layout.width_of(where.layer, where.point)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    offset = torch.randn(width, generator=generator, dtype=torch.float64) if center else None
    return Edit({where: rp.LowRank.projection(basis, offset)}, {"method": "test"})


def pruned_layers(subject: Subject) -> Edit:
    """Another share of the MLP neurons of each layer zeroed."""
    layers = range(len(subject.layout.layers))
    found = [mask(subject, f"{i}.mlp.neurons", share=0.3 + 0.3 * i, seed=i) for i in layers]
    return Edit({site: map_ for edit in found for site, map_ in edit.maps.items()}, {"method": "test"})


def pruned_groups(subject: Subject, count: int = 1) -> Edit:
    """Some groups of heads of every layer zeroed, others in each layer."""
    maps = {}
    for site in subject.select("*.attn.neurons"):
        branch = subject.layout.branch(site.layer, site.point)
        keep = torch.ones(branch.width // (branch.group * branch.head_width), dtype=torch.bool)
        keep[[(site.layer + i) % len(keep) for i in range(count)]] = False
        maps[site] = rp.Diagonal.mask(keep.repeat_interleave(branch.group * branch.head_width))
    return Edit(maps, {"method": "test"})
