"""Whether llama.cpp's format has a place for every tensor of a checkpoint, and which of its quantisations fit the widths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from repedit.arch import TensorSpec, match_layout
from repedit.errors import NotFound, UnknownArchitecture
from repedit.io.checkpoint import open_shards
from repedit.io.files import is_folder, user_path
from repedit.models.ragged import ragged_widths
from repedit.rewrite.checkpoint_architecture import architecture_of, used_specs

_CALLED = {
    "mistral": "llama", "mixtral": "llama", "gpt_neox": "gptneox", "phi": "phi2", "cohere": "command-r",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss", "gemma3_text": "gemma3",
}  # fmt: skip
"""Families that llama.cpp has under another name."""
_PLAIN = ("F32", "F16", "BF16")
_BLOCKED = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")


@dataclass(frozen=True)
class GgufCheck:
    """What the format can hold of a checkpoint; llama.cpp itself is not run."""

    architecture: str
    """Its name for the family."""
    unnamed: tuple[str, ...]
    """Tensors it has no name for."""
    widths: Mapping[int, int]
    """Neurons of each layer where they differ, which only some of its families can say; empty else."""
    unfit: Mapping[str, tuple[str, ...]]
    """By quantisation: matrices whose rows are no multiple of its block; llama-quantize takes another type for those."""

    @property
    def convertible(self) -> bool:
        """Whether every tensor has a name and every layer one width."""
        return not self.unnamed and not self.widths

    def describe(self) -> str:
        """A few lines."""
        lines = [
            f"{self.architecture}: {'every tensor has a name' if not self.unnamed else 'no name for ' + ', '.join(self.unnamed[:3])}"
        ]
        if self.widths:
            lines.append(
                f"layers of different widths ({min(self.widths.values())} to {max(self.widths.values())}): slim with layout='uniform'"
            )
        lines.append(f"fits {', '.join(_PLAIN + tuple(name for name, bad in self.unfit.items() if not bad))}")
        lines += [
            f"{name}: {len(bad)} matrices have rows that are no multiple of {_block(name)}, such as {bad[0]}; slim or slice with multiple={_block(name)}"
            for name, bad in self.unfit.items()
            if bad
        ]
        return "\n".join(lines)


def gguf_check(directory: str | Path) -> GgufCheck:
    """Match a checkpoint's tensors with llama.cpp's names and its quantisation blocks, from headers alone.

    A row of a block quantisation holds a whole number of blocks: 32 numbers for Q8_0 and Q4_0, 256 for Q4_K and Q6_K.

    Raises:
        NotFound, CheckpointError: if there is no checkpoint.
        UnknownArchitecture: if llama.cpp's format has no such family.
    """
    root = user_path(directory)
    if not is_folder(root):
        raise NotFound(f"{root.absolute()} is not a directory; give the one that export wrote")
    architecture, specs = architecture_of(root), used_specs(open_shards(root))
    name = _CALLED.get(architecture.model_type, architecture.model_type)
    known = {called: number for number, called in gguf.MODEL_ARCH_NAMES.items()}
    if name not in known:
        raise UnknownArchitecture(
            f"the gguf package has no family {name!r} ({architecture.model_type}); export to safetensors alone"
        )
    names = gguf.get_tensor_name_map(known[name], architecture.n_layers)
    unnamed = tuple(
        n for n in specs if names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", n), (".weight", ".bias")) is None
    )
    return GgufCheck(
        architecture=name,
        unnamed=unnamed,
        widths=ragged_widths(match_layout(architecture, specs)),
        unfit={kind: tuple(n for n, spec in specs.items() if _splits(spec, kind)) for kind in _BLOCKED},
    )


def _block(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def _splits(spec: TensorSpec, kind: str) -> bool:
    return len(spec.shape) > 1 and spec.shape[-1] % _block(kind) != 0
