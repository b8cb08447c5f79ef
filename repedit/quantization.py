"""The rounding of every format that stores weights in few bits.

Rounding is what PyTorch calls fake quantisation: the values that a weight has after it is stored in few bits and read
again. Weights are (out, in) and groups lie along the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.errors import ArgumentError, MissingDependency, UnknownName, nearest

GROUP = 64
"""Inputs that share a step, in the schemes of 4 bits and below."""
BITS = {"int8": 8, "int4": 4, "int3": 3}
"""Integer schemes."""
_FP4 = (0.0, 0.00520833, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0)
LEVELS = {
    "nf4": (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
            0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0),
    "fp4": (*(-level for level in _FP4[:0:-1]), *_FP4),
}  # fmt: skip
"""Schemes with a table of levels, as fractions of the largest magnitude of a group."""


# --- Rounding by formula


def step_size(weight: Float[Tensor, "*rows i"], scheme: str) -> Float[Tensor, "*rows groups 1"]:
    """The distance between neighbouring values of an integer scheme: max|w| / (2^(bits - 1) - 1) of each group.

    int8 has one group a row, and so has a row that the group size does not divide.
    """
    return _largest(_groups(weight, scheme, GROUP)) / _largest_integer(scheme)


def fake_quantize(weight: Float[Tensor, "*rows i"], scheme: str, group: int = GROUP) -> Float[Tensor, "*rows i"]:
    """A weight after it is stored in few bits and read again, computed in float32 and returned in its own dtype.

    int8: D = max|w| / 127 of each row, round(w / D) D. int4, int3: the same with 7 and 3 in groups along the inputs.
    nf4, fp4: the level nearest to w / max|w| of its group, times max|w|. A group of zeros stays zero; where `group`
    does not divide the width, each row is a group. torchao-int8, torchao-int4, hqq-int4: as those packages store it.

    Raises:
        UnknownName: if there is no such scheme.
        ArgumentError: if the group is below 1.
        MissingDependency: if the scheme is that of a package that is not installed.
    """
    check_scheme(scheme)
    if group < 1:
        raise ArgumentError(f"group={group}; give the number of inputs that share a step, at least 1")
    if scheme in PACKAGED:
        return _packaged(weight, scheme, group)
    groups = _groups(weight, scheme, group)
    largest = _largest(groups)
    if scheme in BITS:
        most = _largest_integer(scheme)
        step = largest / most
        # A fraction of the maximum, not a number of steps: the maximum stays as it is, so rounding twice changes nothing.
        fraction = (groups / step.where(step > 0, 1)).round() / most
    else:
        levels = torch.tensor(LEVELS[scheme], dtype=groups.dtype, device=groups.device)
        fractions = (groups / largest.where(largest > 0, 1)).contiguous()
        fraction = levels[torch.bucketize(fractions, (levels[1:] + levels[:-1]) / 2)]
    return (fraction * largest).flatten(-2).to(weight.dtype)


def update_cosine(before: Float[Tensor, "*rows i"], after: Float[Tensor, "*rows i"], scheme: str) -> float:
    """Cosine of Q(after) - Q(before) with after - before: how much of an update survives rounding; 0 where nothing does."""
    exact = (after - before).double()
    rounded = (fake_quantize(after, scheme) - fake_quantize(before, scheme)).double()
    size = float(exact.norm() * rounded.norm())
    return float((exact * rounded).sum()) / size if size else 0.0


def check_scheme(scheme: str) -> None:
    """Refuse a scheme that does not exist.

    Raises:
        UnknownName: with the nearest names.
    """
    if scheme not in SCHEMES:
        raise UnknownName(f"scheme {scheme!r}; {nearest(scheme, SCHEMES)}")


def _groups(weight: Tensor, scheme: str, group: int) -> Float[Tensor, "*rows groups size"]:
    width = weight.shape[-1]
    size = width if scheme == "int8" or width % group else group
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, size))


def _largest_integer(scheme: str) -> int:
    return 2 ** (BITS[scheme] - 1) - 1


def _largest(groups: Tensor) -> Float[Tensor, "*rows groups 1"]:
    return groups.abs().amax(-1, keepdim=True)


# --- Rounding by the packages that models are shipped with, torchao and hqq, where they are installed

Matrix = Float[Tensor, "o i"]


def _torchao(weight: Matrix, config: object) -> Matrix:
    from torchao.quantization import quantize_

    module = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    module[0].weight = nn.Parameter(weight.clone())
    quantize_(module, config)
    return module[0].weight.dequantize()


def _torchao_int8(weight: Matrix, group: int) -> Matrix:
    from torchao.quantization import Int8WeightOnlyConfig

    return _torchao(weight, Int8WeightOnlyConfig())


def _torchao_int4(weight: Matrix, group: int) -> Matrix:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return _torchao(weight, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)))  # type: ignore[attr-defined]


def _hqq_int4(weight: Matrix, group: int) -> Matrix:
    from hqq.core.quantize import Quantizer

    stored = Quantizer.quantize(
        weight, nbits=4, group_size=group, axis=1, compute_dtype=torch.float32, device=str(weight.device)
    )
    return Quantizer.dequantize(*stored)


PACKAGED: Mapping[str, tuple[str, Callable[[Matrix, int], Matrix]]] = {
    "torchao-int8": ("torchao", _torchao_int8),
    "torchao-int4": ("torchao", _torchao_int4),
    "hqq-int4": ("hqq", _hqq_int4),
}
"""Scheme -> (package, float32 matrix and group -> the matrix after the package's default weight-only rounding)."""
SCHEMES = (*BITS, *LEVELS, *PACKAGED)


def installed_schemes() -> tuple[str, ...]:
    """The schemes of other packages that are installed."""
    return tuple(scheme for scheme, (package, _) in PACKAGED.items() if find_spec(package) is not None)


def _packaged(weight: Float[Tensor, "*rows i"], scheme: str, group: int) -> Float[Tensor, "*rows i"]:
    """A weight after another package's quantiser; row by row where the group does not divide the width."""
    package, rounding = PACKAGED[scheme]
    if find_spec(package) is None:
        raise MissingDependency(
            f"scheme {scheme!r} is that of {package}: pip install {package}, or leave the scheme out"
        )
    width = weight.shape[-1]
    values = rounding(weight.reshape(-1, width).float(), width if width % group else group)
    return values.reshape(weight.shape).to(weight.dtype)
