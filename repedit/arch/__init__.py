"""Architectures as data, matched against real tensors and proved on real forward passes."""

from repedit.arch import table as _families  # fills the table
from repedit.arch.hooks import Visit, hooks_at
from repedit.arch.layout import Anatomy, Branch, Neurons, Specs, TensorSpec, View, anatomy
from repedit.arch.spec import Architecture, BiasFlag, Experts, Reader, Shrink, Writer, families, register, resolve

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
