"""Architectures as data, matched against real tensors and proved on real forward passes."""

from repedit.arch import families as _families  # fills the table
from repedit.arch.anatomy import Anatomy, Branch, Neurons, anatomy
from repedit.arch.architecture import Architecture, BiasFlag, Experts, Reader, Writer, families, register, resolve
from repedit.arch.shrinking import Shrink
from repedit.arch.taps import Visit, hooks_at
from repedit.arch.views import Specs, TensorSpec, View

__all__ = [
    "Anatomy",
    "Architecture",
    "BiasFlag",
    "Branch",
    "Experts",
    "Neurons",
    "Reader",
    "Shrink",
    "Specs",
    "TensorSpec",
    "View",
    "Visit",
    "Writer",
    "anatomy",
    "families",
    "hooks_at",
    "register",
    "resolve",
]
del _families
