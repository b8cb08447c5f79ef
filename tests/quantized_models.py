"""Tiny quantised checkpoints, encoded by hand from the definitions of the formats, and the values that they encode."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.safetensors"
BLOCK = (16, 8)
"""Rows and columns of a block of the tiny fp8 checkpoints."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The magnitudes of a float of 4 bits: 1 sign, 2 exponent, 1 mantissa."""


def fp8(folder: Path, shift: int = 0, scales: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Store the projections of a plain checkpoint as fine-grained fp8; returns the values that are stored, in float32.

    The last blocks of a matrix need not be full: 24 rows are a block of 16 and one of 8, 40 columns are 5 blocks of 8.

    Args:
        shift: by how many blocks the scales are stored beside their place, for a broken twin.
        scales: their dtype; all are powers of two.
    """
    generator = torch.Generator().manual_seed(0)

    def encoded(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        rows, columns = weight.shape
        grid = -(-rows // BLOCK[0]), -(-columns // BLOCK[1])
        codes = (50 * weight).to(torch.float8_e4m3fn)
        steps = torch.exp2(torch.randint(-8, -2, grid, generator=generator).float())
        spread = steps.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
        return {name: codes, f"{name}_scale_inv": steps.roll(shift, 1).to(scales)}, codes.float() * spread

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return _store(folder, settings, lambda name: name.endswith("_proj.weight"), encoded)


def mxfp4(folder: Path, shift: int = 0) -> dict[str, Tensor]:
    """Store the experts of a gpt-oss checkpoint as MXFP4: two 4-bit codes a byte, the first in the low bits, and for each 32 inputs an exponent.

    In memory a matrix is (experts, inputs, outputs), in the file (experts, outputs, blocks of inputs, bytes).
    """
    generator = torch.Generator().manual_seed(0)

    def encoded(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        experts, inputs, outputs = weight.shape
        codes = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator)
        exponents = torch.randint(118, 130, codes.shape[:-1], generator=generator)
        values = E2M1[codes % 8] * torch.where(codes < 8, 1.0, -1.0) * torch.exp2(exponents[..., None] - 127.0)
        stored = {
            f"{name}_blocks": (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
            f"{name}_scales": exponents.to(torch.uint8).roll(shift, 1),
        }
        return stored, rearrange(values, "n o b i -> n (b i) o")

    return _store(folder, {"quant_method": "mxfp4"}, lambda name: name.endswith(("gate_up_proj", "down_proj")), encoded)


def _store(
    folder: Path,
    settings: Mapping[str, Any],
    chosen: Callable[[str], bool],
    encoded: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]],
) -> dict[str, Tensor]:
    """Replace the chosen tensors of a checkpoint, and name the quantiser in its config."""
    tensors, values = load_file(folder / FILE), {}
    for name in filter(chosen, list(tensors)):
        stored, values[name] = encoded(name, tensors.pop(name).float())
        tensors |= stored
    assert values
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    set_quantization(folder, settings)
    return values


def set_quantization(folder: Path, settings: Any) -> None:
    """Name a quantiser in the config, or none."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": settings}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
