"""The files that an export copies with the weights (tokenizer, licence, templates), and those it leaves out, with the reason.

Exports are published, so no file outside the checkpoint is copied through a link.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from repedit.errors import CheckpointError
from repedit.io.checkpoint import INDEX, Shards
from repedit.io.targets import CARD, MANIFEST

_LEFT_OUT = {
    "weights that the export does not use": (
        ".safetensors", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".tflite", ".ot", ".mlmodel", ".pb",
    ),
    "a pickle or a training state, which can run code when opened": (
        ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill",
    ),
    "code, which the exported model does not need": (
        ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".ps1", ".ipynb", ".js", ".cu", ".whl", ".jar",
    ),
    "a lock": (".lock",),
}  # fmt: skip
_QUANTIZER_CONFIGS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Files with which ModelOpt, GPTQ and AWQ describe quantised weights beside config.json; other programs read them."""
_REPLACED = ("config.json", CARD, MANIFEST)
_TRAINING = re.compile(r"checkpoint-\d+|__pycache__|runs|wandb")


@dataclass(frozen=True)
class Companions:
    """Files of a checkpoint beside its weights, its config and its card, by their path in it."""

    files: Mapping[str, Path] = field(default_factory=dict)
    """Files to copy, each with the regular file to read, links resolved."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files left out, each with the reason. Hidden files and folders are ignored."""


def companions(directory: Path, used: frozenset[str], *, trusted: bool = False) -> Companions:
    """The files to copy with the weights of a checkpoint.

    Args:
        used: files of weights that are read, which are not companions.
        trusted: follow every link, because the directory is in the hub's cache and the links were made by its client.
    Raises:
        CheckpointError: if a file to copy, the config or the card is a link to a file outside the checkpoint.
    """
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    outside: list[str] = []
    for name, path in _walk(directory, left_out):
        real = Path(os.path.realpath(path))
        reason = _reason(name, used) or _special_file(real)
        if reason is None and path.is_symlink() and not trusted:
            inside = _path_inside(real, directory)
            if inside is None:
                outside.append(f"{name} -> {real}")
                continue
            hidden = any(part.startswith(".") for part in PurePosixPath(inside).parts)
            reason = "a link to a hidden file" if hidden else _reason(inside, used)
        if reason is None and name not in used and name not in _REPLACED:
            files[name] = real
        elif reason is not None:
            left_out[name] = reason
    if outside:
        raise CheckpointError(
            f"{directory} holds links to files outside it: {', '.join(outside[:5])}; those would be published with the export. "
            "Replace the links with the files (cp -L), or remove them"
        )
    return Companions(files, left_out)


def used_files(shards: Shards) -> frozenset[str]:
    """The files that hold the weights of a checkpoint."""
    return frozenset((*shards.files, *([INDEX] if shards.indexed else [])))


def copy_companions(others: Companions, folder: Path) -> None:
    """Copy the files into a folder; files that exist there are kept."""
    for name, path in others.files.items():
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _walk(folder: Path, left_out: dict[str, str], prefix: str = "") -> list[tuple[str, Path]]:
    """Every file below a folder that is not hidden, by its path; adds folders that are left out to `left_out`."""
    entries: list[tuple[str, Path]] = []
    for path in sorted(folder.iterdir()):
        name = f"{prefix}{path.name}"
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            entries.append((name, path))
        elif path.is_symlink():
            left_out[f"{name}/"] = "a link to a directory"
        elif _TRAINING.fullmatch(path.name):
            left_out[f"{name}/"] = "of a training, not of the model"
        else:
            entries += _walk(path, left_out, f"{name}/")
    return entries


def _reason(name: str, used: frozenset[str]) -> str | None:
    """Why a file is left out, by its name; None if it is not."""
    if name in used:
        return None
    path = PurePosixPath(name.lower())
    if path.name.endswith(".index.json"):
        return "an index of weights that the export does not use"
    if path.name == "adapter_config.json":
        return "the config of an adapter"
    if path.name in _QUANTIZER_CONFIGS:
        return "the config of a quantiser, and the exported weights are plain"
    return next((reason for reason, suffixes in _LEFT_OUT.items() if path.suffix in suffixes), None)


def _special_file(real: Path) -> str | None:
    try:
        regular = stat.S_ISREG(real.stat().st_mode)
    except OSError:
        return "a link that leads nowhere"
    return None if regular else "no regular file"


def _path_inside(real: Path, directory: Path) -> str | None:
    """The path of a file inside a checkpoint or among the blobs of the hub's cache; None for a file anywhere else."""
    root = Path(os.path.realpath(directory))
    if real.is_relative_to(root):
        return real.relative_to(root).as_posix()
    cache = root.parent.parent
    blobs = cache / "blobs"
    snapshot = root.parent.name == "snapshots" and cache.name.startswith("models--")
    return real.name if snapshot and real.parent == blobs else None
