"""Whether the self-test passed here: kept by code, versions and machine, so that an audit can say that it did not."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from repedit.errors import CheckpointError
from repedit.fetching import cache_folder
from repedit.io.files import write_text
from repedit.io.text import read_json

_PACKAGES = ("torch", "transformers", "numpy")
_ROOMS = ("attacks", "metrics", "activations", "data")


@cache
def environment() -> str:
    """sha256 over everything that decides what an attack finds beside its arguments: code, versions and machine."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(json.dumps([[name, version(name)] for name in _PACKAGES]).encode())
    digest.update(platform.machine().encode())
    for path in sorted(path for room in _ROOMS for path in (package / room).rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def remember(failures: str, checks: Sequence[Mapping[str, Any]]) -> None:
    """Keep what a self-test found; empty failures are a pass."""
    path = _record()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"failures": failures, "checks": list(checks)}, indent=1, sort_keys=True))


def recorded() -> str | None:
    """The failures of the self-test that was last run in this environment; None where none was."""
    try:
        return str(read_json(_record(), finite=False)["failures"])
    except (CheckpointError, KeyError):
        return None


def _record() -> Path:
    return cache_folder() / "selftest" / f"{environment()}.json"
