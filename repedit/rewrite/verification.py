"""Compare what was written: files with their manifest, a checkpoint loaded without repedit with the model, and two checkpoints tensor by tensor.

Loading takes place in a process that cannot import repedit.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repedit.arguments import checked
from repedit.errors import CheckpointError, FingerprintError
from repedit.io.checkpoint import open_shards
from repedit.io.files import file_hash, user_path
from repedit.io.targets import CARD, MANIFEST, folder_entries, read_manifest
from repedit.io.text import parse_json
from repedit.models.loading import auto_class, read_config, typed_errors
from repedit.models.subject import Subject
from repedit.rewrite.checkpoint_architecture import checkpoint_directory

# --- Whether a directory still holds what its manifest says was exported


@dataclass(frozen=True)
class Verification:
    """The files of an export beside its manifest."""

    manifest: Mapping[str, Any]
    files: Mapping[str, int]
    """Bytes of every file of the manifest that is there, and of the manifest and the card."""
    changed: tuple[str, ...]
    """Files with another hash than in the manifest, or replaced by links or special files."""
    missing: tuple[str, ...]
    unlisted: tuple[str, ...]
    """Files, including those in subfolders, that the manifest does not list."""

    @property
    def whole(self) -> bool:
        """Whether every file of the manifest is there as it was exported; other files may be present."""
        return not self.changed and not self.missing

    def describe(self) -> str:
        """One line."""
        problems = {
            "changed since the export": self.changed,
            "missing": self.missing,
            "not of the export": self.unlisted,
        }
        parts = [f"{problem}: {', '.join(names)}" for problem, names in problems.items() if names]
        return "; ".join(parts) or f"all {len(self.manifest['files'])} files are as they were exported"


def verification(directory: str | Path) -> Verification:
    """Hash the files of an exported directory and compare them with its repedit.json.

    Raises:
        NotFound: if there is no manifest. CheckpointError: if it is damaged, or names files outside the directory.
    """
    root = user_path(directory)
    record, expected = read_manifest(root)
    present = folder_entries(root)
    listed = sorted(name for name in (*expected, MANIFEST, CARD) if name in present)

    def changed(name: str) -> bool:
        if not stat.S_ISREG(present[name].st_mode):
            return True
        return name in expected and file_hash(root / name) != expected[name]

    return Verification(
        manifest=record,
        files={name: present[name].st_size for name in listed},
        changed=tuple(filter(changed, listed)),
        missing=tuple(name for name in sorted(expected) if name not in present),
        unlisted=tuple(name for name in present if name not in listed),
    )


# --- Load an exported directory in a process where importing repedit fails


_SCRIPT = """
import sys, json
sys.modules["repedit"] = None
import hashlib, torch, transformers
torch.set_num_threads(1)
loader = getattr(transformers, sys.argv[2])
model, info = loader.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
ids = torch.arange(3, 3 + 16).remainder(model.config.get_text_config(decoder=True).vocab_size)[None]
with torch.no_grad():
    logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
print(json.dumps({
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "finite": bool(torch.isfinite(logits).all()), "parameters": sum(p.numel() for p in model.parameters()),
    "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
}))
"""


@dataclass(frozen=True)
class Reload:
    """What a fresh process loaded."""

    parameters: int
    logits: str
    """sha256 of the float32 logits on fixed ids, one thread."""


@checked
def reload_check(directory: str | Path) -> Reload:
    """Load an exported checkpoint with transformers in a fresh process that cannot import repedit.

    Raises:
        CheckpointError: if it does not load, keys are missing or unexpected, or the logits are not finite.
    """
    with typed_errors(Path(directory)):
        loader = auto_class(read_config(directory, trust_remote_code=False)).__name__
    command = [sys.executable, "-c", _SCRIPT, str(Path(directory).absolute()), loader]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if process.returncode:
        raise CheckpointError(
            f"{directory} does not load with plain transformers: {process.stderr.strip().splitlines()[-1:]}"
        )
    lines = process.stdout.strip().splitlines() or [""]
    result = parse_json(lines[-1], "what the process printed", CheckpointError)
    missing, unexpected, finite = result["missing"], result["unexpected"], result["finite"]
    if missing or unexpected or not finite:
        raise CheckpointError(
            f"{directory} loads, but {len(missing)} keys are missing ({missing[:3]}), "
            f"{len(unexpected)} unexpected ({unexpected[:3]}), logits finite: {finite}"
        )
    return Reload(result["parameters"], result["logits"])


# --- The tensors that differ between two checkpoints or models


@dataclass(frozen=True)
class Difference:
    """One tensor that differs."""

    tensor: str
    norm: float
    """||edited - base||, Frobenius."""
    relative: float
    """norm / ||base||."""
    rank: int | None
    """Numerical rank of the difference, for matrices of at most 4096 x 4096."""
    rows: int
    """Rows with a change."""
    columns: int
    """Columns with a change."""


@checked
def diff(base: Subject | str | Path, edited: Subject | str | Path) -> list[Difference]:
    """Every tensor whose values differ, largest relative change first; the list is empty for equal weights.

    Raises:
        FingerprintError: if the two do not hold the same tensors in the same shapes, except for added biases and heads.
    """
    (first, read_first), (last, read_last) = _tensors(base), _tensors(edited)
    missing = sorted(set(first) - set(last))
    reshaped = sorted(n for n in set(first) & set(last) if first[n] != last[n])
    if missing or reshaped:
        raise FingerprintError(
            f"the checkpoints are of different models: {len(missing)} tensors are missing, {len(reshaped)} have another shape "
            f"({(missing + reshaped)[0]}); give the checkpoint that was edited. What an edit made smaller (slim, slice) is compared "
            "by what it computes: repedit compare, or repedit.compare"
        )
    differences = []
    for name in sorted(last):
        new = read_last(name).double()
        old = read_first(name).double() if name in first else torch.zeros_like(new)
        if not torch.equal(old, new):
            differences.append(_difference(name, old, new))
    return sorted(differences, key=lambda d: -d.relative)


def _difference(name: str, old: Tensor, new: Tensor) -> Difference:
    delta = new - old
    norm, base = float(delta.norm()), float(old.norm())
    matrix = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta[:, None]
    small = delta.ndim == 2 and max(delta.shape) <= 4096
    return Difference(
        tensor=name,
        norm=norm,
        relative=norm / base if base else float("inf"),
        rank=int(torch.linalg.matrix_rank(delta, rtol=1e-5)) if small else None,
        rows=int((matrix != 0).any(1).sum()),
        columns=int((matrix != 0).any(0).sum()),
    )


def _tensors(source: Subject | str | Path) -> tuple[Mapping[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes by name, and a function that reads a tensor."""
    if isinstance(source, Subject):
        shapes = {name: tuple(p.shape) for name, p in source.model.named_parameters()}
        return shapes, lambda name: source.value(name).cpu()
    shards = open_shards(checkpoint_directory(source))
    return {name: spec.shape for name, spec in shards.specs.items()}, shards.read
