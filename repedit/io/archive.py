"""Files of edits, deltas, collections and the like: safetensors with a JSON header that names the kind of value.

They are read from a path, or from the hub: hf://owner/name/path, or hf://owner/name@revision/path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from repedit.errors import ArgumentError, CheckpointError, HubError, RepeditError, TargetExists
from repedit.io.files import is_file, open_regular, user_path
from repedit.io.safetensors import read_header, read_open_header, read_tensor, write_file
from repedit.io.text import parse_json

FORMAT = 1
_KINDS = {
    "edit": ("a saved edit", "is not a saved edit", "write one with edit.save(path)"),
    "delta": ("a saved delta", "is not a saved delta", "write one with delta.save(path)"),
    "training": ("a saved training state", "does not hold a training state", "let resume= write one"),
    "collection": ("a saved collection", "does not hold a collection", "write one with collection.save(path)"),
    "scores": ("saved scores", "does not hold scores", "write them with scores.save(path)"),
}
# A Path has one slash where the address has two.
_ADDRESS = re.compile(
    r"hf:/{1,2}(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?/(?P<file>.+)"
)


def check_replaceable(path: str | Path) -> None:
    """Refuse to overwrite a file that does not hold a value of repedit, such as the weights of a model.

    Raises:
        TargetExists: if there is such a file.
    """
    target = user_path(path)
    if is_file(target) and target.stat().st_size and kind_of(target) is None:
        raise TargetExists(f"{target} exists and repedit did not write it; move it away, or give another path")


def write(path: str | Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header of plain JSON values, atomically; `kind` is a key of the table above.

    Raises:
        TargetExists: if a file is there that repedit did not write. ArgumentError: if it is an address of the hub.
        CheckpointError: if the file cannot be written; what was there before is unchanged.
    """
    if _is_address(path):
        raise ArgumentError(f"{path} is an address of the hub; write a file, or upload the value with repedit.push")
    check_replaceable(path)
    text = json.dumps({"format": FORMAT, "kind": kind, **header}, sort_keys=True)
    write_file(user_path(path), tensors, {"repedit": text})


def kind_of(path: str | Path) -> str | None:
    """The kind of value in a file or at an address of the hub; None if it does not name one or cannot be read."""
    try:
        kind = header_of(path).get("kind")
    except CheckpointError:
        return None
    return kind if isinstance(kind, str) else None


def header_of(path: str | Path) -> dict[str, Any]:
    """The header of a file, without its tensors; empty if it has none.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    return _parsed(path, read_header(local_file(path))[1])


def read(path: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of a file that `write` made, on disk or at an address of the hub; the tensors are copies in memory.

    Raises:
        CheckpointError: if the file cannot be read, or holds something else. HubError: if it cannot be downloaded.
    """
    name, other, remedy = _KINDS[kind]
    local = local_file(path)
    try:
        with open_regular(local) as file:
            entries, metadata = read_open_header(file, local)
            header = _parsed(path, metadata)
            tensors = {key: read_tensor(file, local, key, entry) for key, entry in sorted(entries.items())}
    except (OSError, RepeditError) as error:
        raise CheckpointError(f"{path} cannot be read as {name}: {error}") from error
    if header.get("kind") != kind or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} {other} of format {FORMAT}; {remedy}")
    return tensors, header


def tensor_like(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor of a name; a ValueError if it is missing or has another shape, see `rebuilding`."""
    if name not in tensors or tensors[name].shape != like.shape:
        state = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
        raise ValueError(f"the tensor {name!r} {state}, {tuple(like.shape)} was expected")
    return tensors[name]


@contextmanager
def rebuilding(path: str | Path, kind: str) -> Iterator[None]:
    """Name the file whose header and tensors do not make a value.

    Raises:
        CheckpointError: instead of the errors of missing fields and of constructors.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        name, _, remedy = _KINDS[kind]
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged and cannot be read as {name}: {what}; {remedy}") from error


def _parsed(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    # finite=False: the losses and correlations of a log may be NaN.
    header = parse_json(metadata.get("repedit", "{}"), f"the header of {path}", CheckpointError, finite=False)
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is a {type(header).__name__}, an object was expected")
    return header


def _is_address(path: str | Path) -> bool:
    return str(path).startswith("hf:/")


def local_file(path: str | Path) -> Path:
    """The path itself, with the home folder in place of ~; for an address of the hub, the file in the cache of huggingface_hub, downloaded if it is not there.

    Raises:
        ArgumentError: if the address is not complete. HubError: if the file is not there, or the hub cannot be reached.
    """
    if not _is_address(path):
        return user_path(path)
    text = str(path)
    address = _ADDRESS.fullmatch(text)
    if address is None:
        raise ArgumentError(f"{text!r} is no file of the hub; write hf://owner/name/file.safetensors")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(address["repository"], address["file"], revision=address["revision"]))
    except Exception as error:
        raise HubError(
            f"{text} could not be downloaded: {type(error).__name__}: {str(error).strip() or 'no reason given'}; check the "
            "address, and log in with `hf auth login` if the repository is private"
        ) from error
