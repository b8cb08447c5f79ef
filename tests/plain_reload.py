"""Load checkpoints with transformers in a process where importing repedit fails, and return their logits on fixed ids.

This file is run as a script in that process; it imports nothing of repedit or of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def reloaded_logits(checkpoints: Mapping[str, tuple[Path, str]], ids: Tensor, folder: Path) -> dict[str, Tensor | str]:
    """The logits of each checkpoint, or the error that loading or running it raised.

    Args:
        checkpoints: a directory, and the name of the class of transformers that loads it, by any name.
        folder: where the process writes its results.
    """
    task = {
        "ids": ids.tolist(),
        "folder": str(folder),
        "checkpoints": {n: [str(p), c] for n, (p, c) in checkpoints.items()},
    }
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, __file__], input=json.dumps(task), text=True, capture_output=True, env=environment
    )
    assert process.returncode == 0, process.stderr[-2000:]
    errors: dict[str, str] = json.loads((folder / "errors.json").read_text(encoding="utf-8"))
    return load_file(folder / "logits.safetensors") | errors  # type: ignore[return-value]


@torch.no_grad()
def main() -> None:
    """What the process does: the task is on standard input."""
    sys.modules["repedit"] = None  # type: ignore[assignment]
    try:
        import repedit  # noqa: F401
    except ImportError:
        import transformers
    torch.set_num_threads(1)
    task = json.load(sys.stdin)
    ids, logits, errors = torch.tensor(task["ids"]), {}, {}
    for name, (directory, loader) in task["checkpoints"].items():
        try:
            model, info = getattr(transformers, loader).from_pretrained(
                directory, dtype="auto", output_loading_info=True, attn_implementation="eager", experts_implementation="eager",
            )  # fmt: skip
            lost = {
                key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]
            }
            assert not lost, lost
            logits[name] = model.eval()(input_ids=ids, use_cache=False).logits.float().contiguous()
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    save_file(logits, Path(task["folder"]) / "logits.safetensors")
    (Path(task["folder"]) / "errors.json").write_text(json.dumps(errors), encoding="utf-8")


if __name__ == "__main__":
    main()
