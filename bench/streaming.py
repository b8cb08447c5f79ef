"""Export of an edited SmolLM2-135M: peak memory above the imports, bytes, and CPU against cp. Run as `python -m bench.streaming`.

Each mode runs in a fresh process, so that its peak is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.record import record

_SCRIPT = """
import json, resource, sys, time
sys.argv, mode, source, target, edit = sys.argv[:1], *sys.argv[1:]
import torch, transformers, repedit as rp
from repedit.edit import Edit
from repedit.rewrite.checkpoint import export
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
base, start = peak(), time.process_time()
change = Edit.load(edit)
if mode == "stream":
    export(change, source, target, link=False)
elif mode == "load-edit-save":
    subject = rp.apply(change, rp.load(source))
    subject.model.save_pretrained(target)
elif mode == "cp":
    import shutil
    shutil.copytree(source, target)
print(json.dumps({"peak": peak() - base, "cpu": time.process_time() - start}))
"""


def run(mode: str, source: Path, edit: Path) -> dict[str, float]:
    """One mode in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _SCRIPT, mode, str(source), f"{folder}/out", str(edit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure, print, record."""
    import torch

    import repedit as rp
    from repedit.fetching import cached
    from repedit.shards import open_shards

    source = cached()
    largest = max(torch.Size(s.shape).numel() * 4 for s in open_shards(source).specs.values())
    sites = [rp.Site.parse(f"{layer}.mlp.neurons") for layer in range(0, 30, 3)]
    keep = torch.rand(1536, generator=torch.Generator().manual_seed(0)) > 0.05
    edit = rp.Edit({site: rp.Diagonal.mask(keep) for site in sites}, {"method": "bench"})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edit.save(path)
        found = {mode: run(mode, source, path) for mode in ("cp", "stream", "load-edit-save")}
    limit = 4 * largest + 64e6
    for mode, result in found.items():
        row: dict[str, Any] = {"name": mode, "peak_mb": result["peak"] / 1e6, "cpu_s": result["cpu"]}
        if mode == "stream":
            row |= {
                "bar": f"peak <= 4 x largest tensor + 64 MB = {limit / 1e6:.0f} MB",
                "status": "pass" if result["peak"] <= limit else "fail",
            }
        rows.append(row)
        print(row)
    print(record("streaming", rows, seed=0, note="cpu_s includes hashing every file for the manifest"))


if __name__ == "__main__":
    main()
