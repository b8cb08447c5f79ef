"""Affine maps x -> Mx + c on the last axis: the value every edit is made of.

`LowRank` (projections, steering), `Diagonal` (pruning) and `Chain` (the rest) stay factored: none of them forms a
d x d matrix unless `as_matrix` is called. `a @ b` applies b first, as matrices do.
"""

from repedit.maps.affine import AffineMap, check_dense, not_finite_at
from repedit.maps.composition import Chain
from repedit.maps.diagonal import Diagonal
from repedit.maps.lowrank import LowRank

__all__ = ["AffineMap", "Chain", "Diagonal", "LowRank", "check_dense", "not_finite_at"]
