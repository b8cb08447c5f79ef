"""The quantisers that models are shipped with, torchao and hqq, where they are installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.errors import MissingDependency

Matrix = Float[Tensor, "o i"]


def _torchao(weight: Matrix, group: int, config: Callable[[int], Any]) -> Matrix:
    from torchao.quantization import quantize_

    module = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    module[0].weight = nn.Parameter(weight.clone())
    quantize_(module, config(group))
    return module[0].weight.dequantize()


def _int8(group: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4(group: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))  # type: ignore[attr-defined]


def _hqq(weight: Matrix, group: int) -> Matrix:
    from hqq.core.quantize import Quantizer

    stored = Quantizer.quantize(
        weight, nbits=4, group_size=group, axis=1, compute_dtype=torch.float32, device=str(weight.device)
    )
    return Quantizer.dequantize(*stored)


SHIPPED: Mapping[str, tuple[str, Callable[[Matrix, int], Matrix]]] = {
    "torchao-int8": ("torchao", lambda w, group: _torchao(w, group, _int8)),
    "torchao-int4": ("torchao", lambda w, group: _torchao(w, group, _int4)),
    "hqq-int4": ("hqq", _hqq),
}
"""By scheme the package, and what is left of a float32 matrix (out, in) after its default weight-only rounding."""


def available() -> tuple[str, ...]:
    """The schemes whose package is installed here."""
    return tuple(scheme for scheme, (package, _) in SHIPPED.items() if find_spec(package) is not None)


def stored(weight: Float[Tensor, "*rows i"], scheme: str, group: int) -> Float[Tensor, "*rows i"]:
    """A weight (out, in) as it is after another package's quantiser, in the weight's own type; row by row where the group
    does not divide the width.

    Raises:
        MissingDependency: if the package is not installed.
    """
    package, rounding = SHIPPED[scheme]
    if find_spec(package) is None:
        raise MissingDependency(
            f"scheme {scheme!r} is that of {package}: pip install {package}, or leave the scheme out"
        )
    width = weight.shape[-1]
    found = rounding(weight.reshape(-1, width).float(), width if width % group else group)
    return found.reshape(weight.shape).to(weight.dtype)
