"""Rows with known structure, and their statistics, for the tests of closed forms."""

import torch

import repedit as rp
from repedit.fit import FITS, linalg
from repedit.stats import CrossMoments, Moments

D, K = 24, 3
PAIRED = ("residual_pca", "cpca", "gen_eig", "oblique")
EXACT = 1e-12


def normal(*shape, seed=0):
    """Standard normal float64 values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spanning(d, k, seed=0):
    """A random orthonormal basis (d, k)."""
    return torch.linalg.qr(normal(d, k, seed=seed)).Q


def moments_of(rows):
    """The moments of rows."""
    return Moments(rows.shape[1]).update(rows)


def cosine(map_, own):
    """The smallest cosine of a principal angle between what a map removes and a span."""
    return float(rp.fit.principal_angles(map_.u, own).min())


def pair(seed=0, n=2000):
    """Two sets with unlike, anisotropic covariances and means."""
    scale = torch.logspace(0, -1.5, D, dtype=torch.float64)
    sides = [
        (normal(n, D, seed=s) * scale) @ normal(D, D, seed=s + 1) + normal(D, seed=s + 2) for s in (seed, seed + 7)
    ]
    return moments_of(sides[0]), moments_of(sides[1])


def fitted(name, forget, retain, **options):
    """A fit by name, of rank K where it takes a rank."""
    if name in ("mean_difference", "lda"):
        return FITS[name](forget, retain, **options)
    return FITS[name](forget, retain, rank=K, **options)


def projects(map_):
    """The map is idempotent and removes as many directions as it has columns."""
    p = map_.as_matrix()
    assert float((p @ p - p).abs().max()) <= EXACT * max(1.0, float(p.norm()) ** 2), "not idempotent"
    assert map_.rank_removed == map_.u.shape[1]


def earlier():
    """A projection of rank 5 that an earlier task has made."""
    return linalg.projector(spanning(D, 5, seed=9), torch.float64)


def labelled(n=1500, classes=4, d=D, seed=0):
    """Rows whose class shows in their means and covariances, and their one-hot labels."""
    z = torch.nn.functional.one_hot(torch.arange(n) % classes, classes).double()
    rows = normal(n, d, seed=seed) @ normal(d, d, seed=seed + 1)
    return rows + 2.0 * z @ normal(classes, d, seed=seed + 2), z


def statistics_of(x, z):
    """(moments of x, cross moments with z)."""
    return Moments(x.shape[1]).update(x), CrossMoments(x.shape[1], z.shape[1]).update(x, z)
