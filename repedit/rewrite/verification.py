"""Whether an exported directory holds what its manifest says, and loads where repedit cannot be imported."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repedit.errors import CheckpointError
from repedit.io.files import file_hash, user_path
from repedit.io.targets import CARD, MANIFEST, entries, read_manifest
from repedit.io.text import parse_json

# --- Whether a directory still holds what its manifest says was exported


@dataclass(frozen=True)
class Verification:
    """The files of an export beside its manifest."""

    manifest: Mapping[str, Any]
    files: Mapping[str, int]
    """Bytes of every file of the manifest that is there, and of the manifest and the card."""
    changed: tuple[str, ...]
    """Files with another hash than the manifest has, or links and special files in their place."""
    missing: tuple[str, ...]
    unlisted: tuple[str, ...]
    """Files, also of folders below, that the manifest does not know."""

    @property
    def whole(self) -> bool:
        """Whether every file of the manifest is there as it was exported; others may lie beside them."""
        return not self.changed and not self.missing

    def describe(self) -> str:
        """One line."""
        parts = [
            f"{word}: {', '.join(names)}"
            for word, names in (
                ("changed since the export", self.changed), ("missing", self.missing), ("not of the export", self.unlisted),
            )
            if names
        ]  # fmt: skip
        return "; ".join(parts) or f"all {len(self.manifest['files'])} files are as they were exported"


def verification(directory: str | Path) -> Verification:
    """Hash the files of an exported directory and compare them with its repedit.json.

    Raises:
        NotFound: if there is no manifest. CheckpointError: if it is none, or names files outside the directory.
    """
    place = user_path(directory)
    record, expected = read_manifest(place)
    there = entries(place)
    regular = [name for name, status in there.items() if stat.S_ISREG(status.st_mode)]
    known = [name for name in (*expected, MANIFEST, CARD) if name in there]
    return Verification(
        record,
        {name: there[name].st_size for name in sorted(known)},
        tuple(n for n in sorted(known) if n not in regular or (n in expected and file_hash(place / n) != expected[n])),
        tuple(name for name in sorted(expected) if name not in there),
        tuple(name for name in there if name not in known),
    )


# --- Prove that an exported directory stands on its own: load it where importing repedit fails


_SCRIPT = """
import sys, json
sys.modules["repedit"] = None
import hashlib, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", output_loading_info=True)
ids = torch.arange(3, 3 + 16).remainder(model.config.vocab_size)[None]
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
    """What a fresh process saw."""

    parameters: int
    logits: str
    """sha256 of the float32 logits on fixed ids, one thread."""


def reload_check(directory: str | Path) -> Reload:
    """Load an exported checkpoint with plain transformers in a fresh process that cannot import repedit.

    Raises:
        CheckpointError: if it does not load, keys are missing or unexpected, or the logits are not finite.
    """
    command = [sys.executable, "-c", _SCRIPT, str(Path(directory).absolute())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise CheckpointError(
            f"{directory} does not load with plain transformers: {done.stderr.strip().splitlines()[-1:]}"
        )
    found = parse_json((done.stdout.strip().splitlines() or [""])[-1], "what the process printed", CheckpointError)
    if found["missing"] or found["unexpected"] or not found["finite"]:
        raise CheckpointError(
            f"{directory} loads, but {len(found['missing'])} keys are missing ({found['missing'][:3]}), "
            f"{len(found['unexpected'])} unexpected ({found['unexpected'][:3]}), logits finite: {found['finite']}"
        )
    return Reload(found["parameters"], found["logits"])
