"""The safetensors format: headers read as strictly as the safetensors library reads them, tensors read and written.

Only headers are parsed, so a file of any size opens at once. A tensor that was read is a copy in memory: it does not
change when the file does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import ArgumentError, CheckpointError
from repedit.io.files import atomic_write, open_regular
from repedit.io.text import parse_json

HEADER_LIMIT = 100_000_000
"""Bytes of the longest header, as in the safetensors library."""
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
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
@checked
class TensorSpec:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `stop` are absolute byte positions."""

    file: str
    spec: TensorSpec
    start: int
    stop: int


def floating_dtype(name: str | torch.dtype) -> torch.dtype:
    """A floating dtype by its name in torch.

    Raises:
        ArgumentError: if there is no such dtype, it is not a floating one, or weights of it need scales.
    """
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize == 1:
        raise ArgumentError(
            f"dtype={name!r} holds weights only beside scales, which repedit does not write; give 'float32', 'bfloat16' or "
            "'float16', and quantise the result with a tool made for it"
        )
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"dtype={name!r} is not a floating dtype; give 'float32', 'bfloat16' or 'float16'")
    return dtype


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """(entries by tensor name, metadata) of a file.

    Raises:
        CheckpointError: if the file cannot be read, the safetensors library would refuse its header, or
            a dtype is not supported.
    """
    with open_regular(path) as file:
        return read_open_header(file, path)


def read_open_header(file: BufferedReader, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """`read_header` of an open file."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, HEADER_LIMIT):
        raise CheckpointError(f"{path} is corrupt: header length {length} in a file of {size} bytes; download it again")
    try:
        text = file.read(length).decode()
        if not text.startswith("{"):
            raise ValueError("the header does not begin with '{'")
        table = parse_json(text, "header", CheckpointError)
        metadata = table.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds something else than texts")
        entries = {name: _entry(path, name, item, 8 + length) for name, item in table.items()}
    except (ValueError, CheckpointError) as reason:
        message = str(reason).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path} is corrupt: {message}; download it again") from reason
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata


def read_tensor(file: BufferedReader, path: Path, name: str, entry: Entry) -> Tensor:
    """One tensor of an open file, as a copy in memory.

    Raises:
        CheckpointError: if the file has become shorter.
    """
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    read_fully(file, data.numpy().data, path, name, entry.start)
    return stored_tensor(data, entry.spec)


def read_fully(file: BufferedReader, data: memoryview, path: Path, name: str, start: int) -> None:
    """Fill a buffer with the next bytes of a file, which are those of a tensor from byte `start` of the file on.

    Raises:
        CheckpointError: if the file has become shorter.
    """
    done = 0
    while done < len(data):
        count = file.readinto(data[done:])
        if not count:
            raise CheckpointError(f"{path} ended at byte {start + done}, within {name!r}")
        done += count


def stored_tensor(data: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor whose bytes are in a buffer of uint8, which it shares."""
    if not len(data):
        return torch.empty(spec.shape, dtype=spec.dtype)
    return data.view(spec.dtype).reshape(spec.shape)


def header_bytes(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file of these tensors, and the absolute byte range of each tensor."""
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


def write_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata as one file, atomically.

    Raises:
        CheckpointError: if the file cannot be written, or a dtype is not supported; what was there before is unchanged.
    """
    # Widest dtype first, so that each tensor begins at a multiple of its element size.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    wrong = next((name for name, value in ordered.items() if value.dtype not in CODES), None)
    if wrong is not None:
        raise CheckpointError(f"{path} cannot hold {wrong!r}, whose dtype is {ordered[wrong].dtype}; convert it first")
    start, _ = header_bytes({name: TensorSpec(tuple(v.shape), v.dtype) for name, v in ordered.items()}, metadata)
    if len(start) - 8 > HEADER_LIMIT:
        raise CheckpointError(f"{path} would have a header of {len(start):,} bytes; a file can have {HEADER_LIMIT:,}")
    with atomic_write(path) as file:
        file.write(start)
        for value in ordered.values():
            file.write(raw_bytes(value))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The little-endian bytes of a tensor, as safetensors stores them; a view if memory has the same layout."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _entry(path: Path, name: str, item: object, base: int) -> Entry:
    if not isinstance(item, dict) or not {"dtype", "shape", "data_offsets"} <= set(item):
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, shape {shape!r} and data_offsets {offsets!r}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {name!r} has dtype {dtype}, which is not supported; is it quantised? Use the base"
        )
    count = DTYPES[dtype].itemsize
    for number in shape:
        count *= max(number, 1)  # strides are computed even for tensors without elements
        if count >= 1 << 63:
            raise ValueError(f"tensor {name!r} has shape {shape}, of more elements than a file can hold")
    return Entry(path.name, TensorSpec(tuple(shape), DTYPES[dtype]), base + offsets[0], base + offsets[1])


def _is_sizes(value: object) -> bool:
    """Whether a value is a list of sizes, neither negative nor of another type."""
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 64 for number in value)


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Refuse tensors that overlap, leave a gap, do not have the size of their shape, or do not end with the file."""
    end = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        length = entry.stop - entry.start
        if entry.stop > size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {entry.stop} of {size}; download it again"
            )
        if length != entry.spec.nbytes:
            raise CheckpointError(
                f"{path} is corrupt: tensor {name!r} of shape {list(entry.spec.shape)} and {entry.spec.dtype} has {length} "
                f"bytes, {entry.spec.nbytes} were expected; download it again"
            )
        if entry.start != end:
            what = "overlaps the one before it" if entry.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path} is corrupt: tensor {name!r} {what}, at byte {entry.start}; download it again"
            )
        end = entry.stop
    if end != size:
        raise CheckpointError(
            f"{path} is corrupt: its tensors end at byte {end}, the file at {size}; download it again"
        )
