"""Subspaces to remove from hidden states, in closed form or by optimization, and overwritten values; no fit changes a weight.

Each closed form takes statistics from `rp.collect` and returns a `LowRank`; `FITS` holds all of them by name. What a
projection does to rows is measured by `norm_ratio` (how much longer they become), `distortion` (how much it changes them)
and `spectra` (where the energy of two sets lies).
"""

from repedit.fit.closed_form import (
    FITS,
    cpca,
    gen_eig,
    grad_pca,
    lda,
    leace,
    mean_difference,
    oblique,
    random_basis,
    residual_pca,
    shrunk,
)
from repedit.fit.gates import gates
from repedit.fit.linalg import (
    Spectra,
    capped,
    distortion,
    extend,
    norm_ratio,
    orthonormal,
    principal_angles,
    spectra,
    top_eigenvectors,
    union,
)
from repedit.fit.local_regression import Regression
from repedit.fit.merging import MergeCertificate, Merging, merge
from repedit.fit.overwrite import LayerCertificate, OverwriteCertificate, overwrite

__all__ = [
    "FITS", "LayerCertificate", "MergeCertificate", "Merging", "OverwriteCertificate", "Regression", "Spectra", "capped", "cpca",
    "distortion", "extend", "gates", "gen_eig", "grad_pca", "lda", "leace", "mean_difference", "merge", "norm_ratio", "oblique",
    "orthonormal", "overwrite", "principal_angles", "random_basis", "residual_pca", "shrunk", "spectra",
    "top_eigenvectors", "union",
]  # fmt: skip
