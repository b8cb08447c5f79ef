"""The safetensors files of a checkpoint directory: which file holds which tensor, and at which bytes.

Only headers are read, so a checkpoint of any size opens at once. Anything that cannot be trusted is refused here:
pickled weights, an index that names absent files, paths that leave the directory, truncated shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.arch import TensorSpec
from repedit.errors import ArgumentError, CheckpointError, NotFound

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard; `start` and `stop` are absolute byte positions in the file."""

    file: str
    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True)
class Shards:
    """Every tensor of a checkpoint directory by name."""

    directory: Path
    entries: Mapping[str, Entry]
    indexed: bool
    """Whether an index file lists the shards."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype by tensor name."""
        return {name: entry.spec for name, entry in self.entries.items()}

    @property
    def files(self) -> tuple[str, ...]:
        """Shard file names, sorted."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def read(self, name: str) -> Tensor:
        """One tensor, read from disk."""
        if name not in self.entries:
            raise CheckpointError(f"{self.directory} holds no tensor {name!r}")
        entry = self.entries[name]
        data = bytearray(entry.stop - entry.start)
        with open(self.directory / entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            done = 0
            while done < len(data):
                count = file.readinto(memoryview(data)[done:])
                if not count:
                    raise CheckpointError(
                        f"{self.directory / entry.file} ended at byte {entry.start + done}, within {name!r}"
                    )
                done += count
        return (
            torch.frombuffer(data, dtype=entry.spec.dtype).reshape(entry.spec.shape)
            if data
            else torch.empty(entry.spec.shape, dtype=entry.spec.dtype)
        )


def floating(name: str | torch.dtype) -> torch.dtype:
    """A floating dtype by its name in torch.

    Raises:
        ArgumentError: if there is no such dtype, or it is not a floating one.
    """
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ArgumentError(f"dtype={name!r} is not a floating dtype; give 'float32', 'bfloat16' or 'float16'")
    return found


def open_shards(directory: str | Path) -> Shards:
    """Read the index and every header of a checkpoint directory.

    Raises:
        NotFound: if the directory does not exist.
        CheckpointError: if weights are missing, pickled, corrupt, or lie outside the directory.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotFound(f"{root.resolve()} is not a directory")
    if (root / SINGLE).exists():  # transformers reads this file and no other, even beside an index
        return Shards(root, _entries(root, SINGLE), indexed=False)
    index = root / INDEX
    if not index.exists():
        raise CheckpointError(_no_weights(root))
    weight_map = _weight_map(index)
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index} names {file!r}, which leaves the directory; nothing was read")
        if not (root / file).exists():
            raise CheckpointError(f"{index} names the shard {file!r}, which is absent from {root}; download it again")
    entries: dict[str, Entry] = {}
    for file in sorted(set(weight_map.values())):
        entries |= {name: entry for name, entry in _entries(root, file).items() if weight_map.get(name) == file}
    absent = sorted(set(weight_map) - set(entries))
    if absent:
        raise CheckpointError(f"{index} names tensors that no shard holds: {absent[:5]} ({len(absent)} in all)")
    return Shards(root, entries, indexed=True)


def header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The bytes a shard of these tensors begins with, and the absolute byte range of each tensor."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset, ranges = 0, {}
    for name, spec in specs.items():
        table[name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        ranges[name] = (offset, offset + spec.nbytes)
        offset += spec.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (base + a, base + b) for name, (a, b) in ranges.items()}


def raw_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, as safetensors stores them; not copied where they are in memory so."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _entries(root: Path, file: str) -> dict[str, Entry]:
    path = root / file
    size = path.stat().st_size
    try:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"header length {length} in a file of {size} bytes")
            table = dict(json.loads(handle.read(length)))
        table.pop("__metadata__", None)
        entries = {name: _entry(path, name, item, 8 + length) for name, item in table.items()}
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"shard {path} is corrupt: {error}; download it again") from error
    for name, entry in entries.items():
        if entry.start < 8 + length or entry.stop > size or entry.stop - entry.start != entry.spec.nbytes:
            raise CheckpointError(
                f"shard {path} is truncated: tensor {name!r} ends at byte {entry.stop} of {size}; download it again"
            )
    return entries


def _entry(path: Path, name: str, item: Any, base: int) -> Entry:
    if item["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {item['dtype']}, which is not supported; is it quantised? Use the base"
        )
    first, last = item["data_offsets"]
    spec = TensorSpec(tuple(int(n) for n in item["shape"]), DTYPES[item["dtype"]])
    return Entry(path.name, spec, base + int(first), base + int(last))


def _no_weights(root: Path) -> str:
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{root} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are refused; "
            "convert them to safetensors, or load them yourself and pass the model to repedit.wrap"
        )
    return f"{root} holds no {SINGLE} and no {INDEX}; is it a model directory?"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object on disk.

    Raises:
        CheckpointError: if the file is absent or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, an object was expected; download it again")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names; download it again")
    return found
