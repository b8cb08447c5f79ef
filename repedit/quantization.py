"""Quantised weights: the rounding of every storage format, and the one check that refuses weights stored in few bits.

Rounding is what PyTorch calls fake quantisation: the values that a weight has after it is stored in few bits and read
again. Weights are (out, in) and groups lie along the inputs.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from inspect import signature

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.errors import ArgumentError, MissingDependency, QuantizedModel, UnknownName, nearest
from repedit.io.safetensors import TensorSpec

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
_PACKED_NAMES = (".weight", "_proj", "_blocks", "_scales", "_packed", ".qweight")
"""How the names of integer tensors end that hold weights; other integers are masks and positions of old checkpoints."""


# --- The one check against quantised weights


def quantizer_name(config: object) -> str | None:
    """The quantiser that a `quantization_config` names, an object or a dictionary; None where there is none."""
    if not config:
        return None
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else getattr(config, "quant_method", "")
    return str(getattr(method, "value", method) or "unknown")


def dequantized_when(quantizer: str) -> str | None:
    """When transformers can turn the weights of a quantiser into ordinary tensors: on "loading", once "loaded", or None."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer

    # bitsandbytes is one quantiser in a config, and two in transformers.
    name = quantizer if quantizer in AUTO_QUANTIZER_MAPPING else f"{quantizer}_4bit"
    if name not in AUTO_QUANTIZER_MAPPING:
        return None
    if "dequantize" in signature(AUTO_QUANTIZATION_CONFIG_MAPPING[name]).parameters:
        return "loading"
    return "loaded" if AUTO_QUANTIZER_MAPPING[name]._dequantize is not HfQuantizer._dequantize else None


def check_unquantized(
    quantizer: str | None, specs: Mapping[str, TensorSpec], operation: str, *, where: str = ""
) -> None:
    """Refuse weights that are stored in few bits: those of a quantiser, and integers or floats of 8 bits without one.

    Args:
        quantizer: what the config names, see `quantizer_name`.
        specs: the tensors to look at; integers other than weights are masks and positions of old checkpoints, and pass.
        operation: what is refused, such as "edited exactly".
        where: the model or directory, for the message.
    Raises:
        QuantizedModel: naming the quantiser or the first tensor, and how to make a plain copy.
    """
    packed = next((name for name, spec in specs.items() if is_packed(name, spec)), None)
    if quantizer is None and packed is None:
        return
    if quantizer is None:
        reason = f"{packed} holds {specs[str(packed)].dtype}, and the config names no quantiser"
        remedy = "use the unquantised base, or the config.json that belongs to these files"
    else:
        reason, remedy = quantizer, f"{plain_copy(quantizer, where)}. Measuring without gradients works"
    raise QuantizedModel(
        f"the weights{' of ' * bool(where)}{where} are quantised ({reason}) and cannot be {operation}; {remedy}"
    )


def is_packed(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor stores weights in few bits: a float of 8 bits, or integers under the name of a weight."""
    if spec.dtype.is_floating_point:
        return spec.dtype.itemsize == 1
    return name.endswith(_PACKED_NAMES)


def plain_copy(quantizer: str, where: str) -> str:
    """How to get ordinary weights in place of quantised ones: a call and a command, or that there is no way but the base."""
    if not dequantized_when(quantizer):
        return f"use the unquantised base: transformers cannot dequantise {quantizer}"
    place = where or "MODEL"
    return (
        f"make a plain copy and use that: rp.load({place!r}, dequantize=True).save('plain'), or on the command line: "
        f"repedit apply none {shlex.quote(place)} --dequantize --out plain"
    )


# --- Rounding by formula


def step_size(weight: Float[Tensor, "*rows i"], scheme: str, group: int = GROUP) -> Float[Tensor, "*rows groups 1"]:
    """The distance between neighbouring values of an integer scheme: max|w| / (2^(bits - 1) - 1) of each group.

    int8 has one group a row, and so has a row that `group` does not divide.
    """
    return _largest(_groups(weight, scheme, group)) / _largest_integer(scheme)


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
