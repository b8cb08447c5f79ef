"""Find what to remove by optimisation or in closed form; every fit returns a value and changes no weight."""

from repedit.fit.closed_form import (
    FITS,
    NEEDS,
    choose,
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
from repedit.fit.energy import Spectra, capped, distortion, norm_ratio, spectra
from repedit.fit.gates import gates
from repedit.fit.linalg import extend, orthonormal, principal_angles, top_eigenvectors, union

__all__ = [
    "FITS",
    "NEEDS",
    "Spectra",
    "capped",
    "choose",
    "cpca",
    "distortion",
    "extend",
    "gates",
    "gen_eig",
    "grad_pca",
    "lda",
    "leace",
    "mean_difference",
    "norm_ratio",
    "oblique",
    "orthonormal",
    "principal_angles",
    "random_basis",
    "residual_pca",
    "shrunk",
    "spectra",
    "top_eigenvectors",
    "union",
]
