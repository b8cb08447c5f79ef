"""The safetensors files of a checkpoint directory: which file holds which tensor, and at which bytes.

Only headers are read, so a checkpoint of any size opens at once. Anything that cannot be trusted is refused here:
pickled weights, an index that names absent files, paths that leave the directory, truncated shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from repedit.errors import CheckpointError, NotFound
from repedit.io.files import FileState, cached_hash, file_state, is_folder, open_regular
from repedit.io.safetensors import Entry, TensorSpec, read_header, read_tensor
from repedit.io.text import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
"""Files of settings that transformers reads, each a JSON object."""
_OPENED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".safetensors")


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
        path = self.directory / entry.file
        with open_regular(path) as file:
            return read_tensor(file, path, name, entry)


def open_shards(directory: str | Path) -> Shards:
    """Read the index and every header of a checkpoint directory.

    Raises:
        NotFound: if the directory does not exist.
        CheckpointError: if weights are missing, pickled, corrupt, or lie outside the directory, or `check_files` refuses
            another file.
    """
    root = Path(directory)
    if not is_folder(root):
        raise NotFound(f"{root.absolute()} is not a directory")
    check_files(root)
    if (root / SINGLE).exists():  # transformers reads this file and no other, even beside an index
        return Shards(root, read_header(root / SINGLE)[0], indexed=False)
    index = root / INDEX
    if not index.exists():
        raise CheckpointError(_no_weights(root))
    weight_map = _weight_map(index)
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index} names {file!r}, which leaves the directory; nothing was read")
        if not file.endswith(".safetensors"):  # transformers would open it as a pickle
            raise CheckpointError(f"{index} names {file!r}, which is not a .safetensors file; nothing was read")
        if not (root / file).exists():
            raise CheckpointError(f"{index} names the shard {file!r}, which is absent from {root}; download it again")
    return Shards(root, _entries_of(root, weight_map), indexed=True)


def _entries_of(root: Path, weight_map: Mapping[str, str]) -> dict[str, Entry]:
    """Every tensor of the shards that an index names; transformers reads tensors that the index omits, too."""
    headers = {file: read_header(root / file)[0] for file in sorted(set(weight_map.values()))}
    absent = sorted(name for name, file in weight_map.items() if name not in headers[file])
    if absent:
        name = absent[0]
        raise CheckpointError(
            f"{root / INDEX} says that {weight_map[name]} holds {name}, and it does not ({len(absent)} such tensors in all); download "
            "the checkpoint again, or save the model again"
        )
    counts = Counter(name for header in headers.values() for name in header)
    double = sorted(name for name, count in counts.items() if count > 1)
    if double:
        raise CheckpointError(
            f"{root} holds tensors twice: {double[:5]} ({len(double)} in all) are in more than one shard, and which one a program "
            "reads is left to it; download it again"
        )
    return {name: entry for header in headers.values() for name, entry in header.items()}


def check_files(root: Path) -> None:
    """Refuse files on which transformers or tokenizers would hang, or fail without a reason.

    Raises:
        CheckpointError: if a file is no regular file, cannot be read, is a Git LFS pointer, or is one of `CONFIGS` and no JSON
            object.
    """
    for path in sorted((*root.iterdir(), *root.glob("*chat_templates/*"))):
        if path.suffix in _OPENED and not path.is_dir():
            open_regular(path).close()
    for name in CONFIGS:
        if (root / name).exists():
            # finite=False: some published configs hold Infinity, and transformers reads it.
            read_json(root / name, finite=False)


def _no_weights(root: Path) -> str:
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return (
            f"{root} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when opened and are refused; "
            "convert them to safetensors, or load them yourself and pass the model to repedit.wrap"
        )
    return f"{root} holds no {SINGLE} and no {INDEX}; is it a model directory?"


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names; download it again")
    if not isinstance(content.get("metadata"), dict):  # transformers reads it
        raise CheckpointError(f"{index} has no metadata, a JSON object beside the weight_map; download it again")
    return weight_map


# --- Whether the files of a model changed

_OTHERS = ("config.json", "generation_config.json", "special_tokens_map", "added_tokens", "chat_template", INDEX)
TOKENIZERS = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges", "tekken")
"""Beginnings of the names of tokenizer files."""

FileStates = Mapping[str, FileState]


def file_states(directory: Path) -> FileStates:
    """The state of every file that a model and its tokenizer are read from, by name: of weights see `file_state`, of others their hash.

    A file that is replaced, rewritten, added or removed changes the result; notes and licences beside the model do not.
    """
    states: dict[str, FileState] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".safetensors" or path.name.startswith((*TOKENIZERS, *_OTHERS)):
            with suppress(FileNotFoundError):  # a link to nothing, or removed this moment
                weights = path.suffix == ".safetensors" or not path.is_file()
                states[path.name] = file_state(path) if weights else (int(cached_hash(path), 16),)
    return states


def check_unchanged(
    directory: Path, before: FileStates, since: str, remedy: str, *, touched: Container[str] = ()
) -> None:
    """Refuse a directory whose files changed.

    Args:
        touched: files of weights whose time of change does not count.
    Raises:
        CheckpointError: naming them.
    """
    now = file_states(directory) if directory.is_dir() else {}
    parts = {name: slice(None, -1 if name in touched else None) for name in sorted({*before, *now})}
    changed = [name for name, part in parts.items() if before.get(name, ())[part] != now.get(name, ())[part]]
    if changed:
        names = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise CheckpointError(f"files of {directory} changed {since}: {names}; {remedy}")
