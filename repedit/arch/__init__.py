"""Architectures as data, matched against the tensors of a model and verified on forward passes."""

from repedit.arch import table as _families  # fills the table
from repedit.arch.hooks import HookFn, hooks_at
from repedit.arch.infer import infer
from repedit.arch.layout import Branch, MatrixView, ModelLayout, Neurons, Specs, TensorSpec, match_layout
from repedit.arch.spec import (
    Architecture,
    BiasFlag,
    BranchRow,
    Experts,
    ModelConfig,
    Reader,
    Shrink,
    Writer,
    attention,
    families,
    mlp,
    register,
    resolve,
    resolved,
    row_code,
    text_config,
)  # fmt: skip

__all__ = [
    "Architecture", "BiasFlag", "Branch", "BranchRow", "Experts", "HookFn", "MatrixView", "ModelConfig",
    "ModelLayout", "Neurons", "Reader", "Shrink", "Specs", "TensorSpec", "Writer", "attention", "families",
    "hooks_at", "infer", "match_layout", "mlp", "register", "resolve", "resolved", "row_code", "text_config",
]  # fmt: skip
del _families
