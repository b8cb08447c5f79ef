"""Whether the GGUF format of llama.cpp can hold a checkpoint, and which of its quantisations fit the widths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf

from repedit.arch import TensorSpec, match_layout
from repedit.arguments import checked
from repedit.errors import NotFound, UnknownArchitecture
from repedit.io.checkpoint import open_shards
from repedit.io.files import is_folder, user_path
from repedit.models.loading import ragged_widths
from repedit.rewrite.checkpoint_architecture import architecture_of, used_specs

_UNQUANTIZED = ("F32", "F16", "BF16")
_BLOCKED = ("Q8_0", "Q4_0", "Q4_K", "Q6_K")


@dataclass(frozen=True)
class GgufCheck:
    """What the format can hold of a checkpoint; llama.cpp itself is not run."""

    architecture: str
    """Name of the family in llama.cpp."""
    unnamed: tuple[str, ...]
    """Tensors that the format has no name for."""
    widths: Mapping[int, int]
    """Neurons of each layer if they differ, which only some families of llama.cpp support; otherwise empty."""
    unfit: Mapping[str, tuple[str, ...]]
    """By quantisation: matrices whose rows are not a multiple of its block; llama-quantize uses another type for those."""

    @property
    def convertible(self) -> bool:
        """Whether every tensor has a name and every layer one width."""
        return not self.unnamed and not self.widths

    def describe(self) -> str:
        """A few lines."""
        names = f"no name for {', '.join(self.unnamed[:3])}" if self.unnamed else "every tensor has a name"
        lines = [f"{self.architecture}: {names}"]
        if self.widths:
            span = f"{min(self.widths.values())} to {max(self.widths.values())}"
            lines.append(f"layers of different widths ({span}): slim with layout='uniform'")
        lines.append(f"fits {', '.join(_UNQUANTIZED + tuple(name for name, bad in self.unfit.items() if not bad))}")
        for name, bad in self.unfit.items():
            if bad:
                block = _block_size(name)
                lines.append(
                    f"{name}: {len(bad)} matrices have rows that are not a multiple of {block}, such as {bad[0]}; slim or slice "
                    f"with multiple={block}"
                )
        return "\n".join(lines)


@checked
def gguf_check(directory: str | Path) -> GgufCheck:
    """Compare the tensors of a checkpoint with the names and quantisation blocks of llama.cpp, from headers alone.

    A row of a block quantisation holds a whole number of blocks: 32 numbers for Q8_0 and Q4_0, 256 for Q4_K and Q6_K.

    Raises:
        NotFound, CheckpointError: if there is no checkpoint.
        UnknownArchitecture: if the format has no such family.
    """
    root = user_path(directory)
    if not is_folder(root):
        raise NotFound(f"{root.absolute()} is not a directory; give the one that export wrote")
    architecture, specs = architecture_of(root), used_specs(open_shards(root))
    name = architecture.gguf or architecture.model_type
    families = {family: number for number, family in gguf.MODEL_ARCH_NAMES.items()}
    if name not in families:
        raise UnknownArchitecture(
            f"the gguf package has no family {name!r} ({architecture.model_type}); export to safetensors alone"
        )
    names = gguf.get_tensor_name_map(families[name], architecture.n_layers)
    unnamed = tuple(
        n
        for n in specs.files
        if names.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", n), (".weight", ".bias")) is None
    )
    return GgufCheck(
        architecture=name,
        unnamed=unnamed,
        widths=ragged_widths(match_layout(architecture, specs)),
        unfit={kind: tuple(n for n, spec in specs.files.items() if _splits_block(spec, kind)) for kind in _BLOCKED},
    )


def _block_size(kind: str) -> int:
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0])


def _splits_block(spec: TensorSpec, kind: str) -> bool:
    return len(spec.shape) > 1 and spec.shape[-1] % _block_size(kind) != 0
