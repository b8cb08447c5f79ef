"""Architectures as data, matched against the tensors of a model and verified on forward passes."""

from repedit.arch import table as _families  # fills the table
from repedit.arch.hooks import HookFn, hooks_at
from repedit.arch.layout import Branch, MatrixView, ModelLayout, Neurons, Specs, TensorSpec, match_layout
from repedit.arch.spec import (
    Architecture,
    BiasFlag,
    Experts,
    ModelConfig,
    Reader,
    Shrink,
    Writer,
    families,
    register,
    resolve,
)

__all__ = [
    "Architecture",
    "BiasFlag",
    "Branch",
    "Experts",
    "HookFn",
    "MatrixView",
    "ModelConfig",
    "ModelLayout",
    "Neurons",
    "Reader",
    "Shrink",
    "Specs",
    "TensorSpec",
    "Writer",
    "families",
    "hooks_at",
    "match_layout",
    "register",
    "resolve",
]
del _families
