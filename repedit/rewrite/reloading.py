"""Prove that an exported directory stands on its own: load it where importing repedit fails."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from repedit.errors import CheckpointError
from repedit.io.text import parse_json

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
