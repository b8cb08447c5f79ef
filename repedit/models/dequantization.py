"""Quantised weights: the one check that refuses them, what their files must hold, and their values as ordinary tensors.

transformers does the dequantisation. This module asks for it, and refuses or corrects what transformers would read wrongly
without an error.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from repedit.arch import Specs, TensorSpec
from repedit.errors import CheckpointError, QuantizedModel

_FP8 = ("fp8", "mxfp8")
"""Quantisers whose weights are float8 beside a grid of scales."""
_PACKED_NAMES = (".weight", "_proj", "_blocks", "_scales", "_packed", ".qweight")
"""How the names of integer tensors end that hold weights; other integers are masks and positions of old checkpoints."""


def quantization_of(config: Any) -> Any:
    """The quantisation that a config describes, in itself or in the config of its text model; None if there is none."""
    configs = (config, config.get_text_config(decoder=True))
    return next((q for c in configs if (q := getattr(c, "quantization_config", None)) is not None), None)


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


def plain_copy(quantizer: str, where: str) -> str:
    """How to get ordinary weights in place of quantised ones: a call and a command, or that there is no way but the base."""
    if not dequantized_when(quantizer):
        return f"use the unquantised base: transformers cannot dequantise {quantizer}"
    source = where or "MODEL"
    return (
        f"make a plain copy and use that: rp.load({source!r}, dequantize=True).save('plain'), or on the command line: "
        f"repedit apply none {shlex.quote(source)} --dequantize --out plain"
    )


def is_packed(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor stores weights in few bits: a float of 8 bits, or integers under the name of a weight."""
    if spec.dtype.is_floating_point:
        return spec.dtype.itemsize == 1
    return name.endswith(_PACKED_NAMES)


# --- Whether the files are stored as the config says


def check_stored(quantization: Any, specs: Specs, where: Path | str) -> None:
    """Refuse files that are not stored as the quantisation of their config says, where transformers would not notice.

    Formats that transformers does not dequantise are left to their own packages.

    Raises:
        CheckpointError: with what the files hold.
    """
    name = quantizer_name(quantization)
    # A compressed-tensors checkpoint may be dense.
    if name in (None, "compressed-tensors") or not isinstance(quantization, Mapping) or not dequantized_when(name):
        return
    if not any(is_packed(tensor, spec) for tensor, spec in specs.items()):
        kinds = ", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs.values()}))
        raise CheckpointError(
            f"the config of {where} says that the weights are quantised ({name}), and the {len(specs)} tensors of its files are "
            f"plain ({kinds}); remove quantization_config from config.json, or download the files again"
        )
    fault = ""
    if name in _FP8:
        fault = _fault_in_fp8(specs, quantization.get("weight_block_size"))
    elif name == "mxfp4":
        fault = _fault_in_mxfp4(specs)
    if fault:
        raise CheckpointError(
            f"{where} is not stored as its config says ({name}): {fault}; download the files and config.json again"
        )


def _fault_in_fp8(specs: Specs, block: Any) -> str:
    """Why transformers would read wrong weights from float8 tensors and their scales; empty if it would not."""
    for name, spec in specs.items():
        if name.endswith("_scale_inv"):
            weight = specs.get(name.removesuffix("_scale_inv"))
            if weight is not None and not is_packed(name, weight):
                return f"{name.removesuffix('_scale_inv')} holds {weight.dtype} and has scales, {name}"
        elif spec.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and len(spec.shape) > 1:
            module = name.removesuffix(".weight")
            names = (f"{name}_scale_inv", f"{module}.scale", f"{module}.qscale_weight")
            scales = next((specs[other] for other in names if other in specs), None)
            if scales is None:
                return f"{name} holds {spec.dtype}, and there is no {names[0]}"
            grid = _grid(spec, block) if block else None
            if grid is not None and scales.shape[-2:] != grid:
                return f"{name} of shape {list(spec.shape)} has {list(scales.shape)} scales, blocks of {list(block)} need {list(grid)}"
    return ""


def _fault_in_mxfp4(specs: Specs) -> str:
    """Why the blocks and scales of MXFP4 do not belong together; empty if they do."""
    blocks = {name.removesuffix("_blocks") for name in specs if name.endswith("_blocks")}
    scales = {name.removesuffix("_scales") for name in specs if name.endswith("_scales")}
    for name in sorted(blocks ^ scales):
        has, lacks = ("_blocks", "_scales") if name in blocks else ("_scales", "_blocks")
        return f"there is {name}{has}, and no {name}{lacks}"
    for name in sorted(blocks):
        one, other = specs[f"{name}_blocks"], specs[f"{name}_scales"]
        if one.shape[:-1] != other.shape or {one.dtype, other.dtype} != {torch.uint8}:
            return (
                f"{name}_blocks is {one.dtype} of shape {list(one.shape)}, {name}_scales {other.dtype} of shape {list(other.shape)}; "
                "both are uint8, with one scale for each block"
            )
    return "" if blocks else "there is no tensor of blocks"


def _grid(weight: TensorSpec, block: Any) -> tuple[int, int]:
    """The number of blocks along the rows and columns of a matrix; the last ones may not be full."""
    rows, columns = weight.shape[-2:]
    return -(-rows // block[0]), -(-columns // block[1])


# --- Their weights as ordinary tensors


def dequantizing(config: Any, location: Path | str) -> Any:
    """A config with which transformers dequantises on loading, or loads what it can dequantise afterwards.

    Raises:
        QuantizedModel: if transformers cannot dequantise the format.
    """
    quantization = quantization_of(config)
    name = quantizer_name(quantization) or "unknown"
    when = dequantized_when(name)
    if when is None:
        raise QuantizedModel(
            f"{location} is quantised ({name}), and transformers cannot dequantise that format; load the unquantised base"
        )
    if when == "loading":
        config.quantization_config = {**quantization, "dequantize": True}
    return config


def ordinary(model: Any, location: Path | str) -> Any:
    """A model that was read with `dequantizing`, without anything that remembers the quantiser.

    Raises:
        QuantizedModel: if transformers left a weight quantised.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize()
    forget_conversions(model)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for name, parameter in model.named_parameters():
        spec = TensorSpec(tuple(parameter.shape), parameter.dtype)
        if is_packed(name, spec) or type(parameter) is not nn.Parameter:
            raise QuantizedModel(
                f"transformers left {name} of {location} quantised ({type(parameter).__name__}, {spec.dtype}); load the unquantised base"
            )
    return model


def forget_conversions(model: Any) -> None:
    """Let `save_pretrained` write weights that transformers dequantised as they are.

    It reverses what was done on loading: it would write float8 and scales again, or bfloat16 under the names of blocks.
    """
    operations = [
        op for way in getattr(model, "_weight_conversions", None) or () for op in getattr(way, "operations", ())
    ]
    if any(hasattr(operation, "hf_quantizer") for operation in operations):
        del model._weight_conversions


@contextmanager
def partial_blocks() -> Iterator[None]:
    """Let transformers dequantise float8 whose last blocks are not full, as in the 576 rows of DeepSeek-V3 with blocks of 128.

    transformers 5.23 divides the rows by the number of their blocks: it refuses 576 rows in 5 blocks, and reads 192 rows in 2
    blocks as blocks of 96 (tests/test_dequantization.py::test_blocks_that_are_not_full_are_dequantised).
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    of_full_blocks = Fp8Dequantize._dequantize_one

    def dequantize_one(self: Any, weight: torch.Tensor, scales: torch.Tensor, output_dtype: Any = None) -> torch.Tensor:
        block = self.hf_quantizer.quantization_config.weight_block_size
        spec = TensorSpec(tuple(weight.shape), weight.dtype)
        if not block or not weight.is_floating_point() or scales.shape[-2:] != _grid(spec, block):
            return of_full_blocks(self, weight, scales, output_dtype)
        rows, columns = spec.shape[-2:]
        full = nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
        return of_full_blocks(self, full, scales, output_dtype)[..., :rows, :columns].contiguous()

    Fp8Dequantize._dequantize_one = dequantize_one
    try:
        yield
    finally:
        Fp8Dequantize._dequantize_one = of_full_blocks
