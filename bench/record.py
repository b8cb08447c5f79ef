"""Write what a benchmark measured, with everything needed to run it again."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def record(name: str, rows: list[dict[str, Any]], *, module: str | None = None, **context: Any) -> Path:
    """bench/results/NAME.json: rows, command, commit, date, host and versions; `module` "" is the package itself."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root
    ).stdout.strip()
    called = name if module is None else module
    content = {
        "bench": name,
        "command": f"python -m {'.'.join(['bench', called] if called else ['bench'])} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit,
        "date": date.today().isoformat(),
        "host": {
            "cpu": _processor(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
        },
        "versions": {p: version(p) for p in ("torch", "transformers", "numpy")},
        "rows": rows,
        **context,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_strict(content), indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def _strict(value: Any) -> Any:
    """The value as JSON knows it: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds, and the values."""
    array = np.array(values, dtype=float)
    return {
        "mean": round(float(array.mean()), 2),
        "sd": round(float(array.std(ddof=1)), 2) if len(array) > 1 else None,
        "values": [round(v, 2) for v in values],
    }
