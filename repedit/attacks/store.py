"""Findings on disk: an interrupted audit goes on where it stopped, and an original is attacked once for many audits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repedit.attacks.attack import Attack, Finding
from repedit.attacks.judging.evidence import finding_json, finding_of
from repedit.attacks.soundness import environment
from repedit.data import Splits
from repedit.data.rows import row_hash
from repedit.errors import CheckpointError
from repedit.fetching import cache_folder
from repedit.io.files import write_text
from repedit.io.text import read_json


def key_of(attack: Attack, model: str, splits: Splits, extra: Mapping[str, Any] | None = None) -> str:
    """sha256 over everything that decides a finding: attack, settings, seed, weights, data, code and versions."""
    text = [getattr(part, "hash", None) or repr(part) for part in (splits.unrelated, splits.holdout)]
    content = {
        "attack": attack.name, "settings": dict(attack.settings), "seed": attack.seed, "model": model,
        "facts": [row_hash(part) for part in (splits.train, splits.test, splits.retain)], "text": text,
        "environment": environment(), **(extra or {}),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


class Store:
    """Findings in a folder of the audit, and those that other audits share in the user's cache."""

    def __init__(self, folder: Path | None, shared: Path | None = None) -> None:
        self.folder = folder
        self.shared = shared

    def get(self, name: str, key: str, *, sharing: bool) -> Finding | None:
        """The finding kept under a name, or in the shared cache, if its key is this one."""
        for path in self._paths(name, key, sharing):
            try:  # a damaged file is a finding that is not there: the attack runs again
                value = read_json(path, finite=False)
                if value.get("key") == key:
                    return finding_of(value["finding"])
            except (CheckpointError, LookupError, TypeError, ValueError, AttributeError, OverflowError):
                continue
        return None

    def put(self, name: str, key: str, finding: Finding, *, sharing: bool) -> None:
        """Keep a finding; a file is whole or absent."""
        text = json.dumps({"key": key, "finding": finding_json(finding)}, indent=1, sort_keys=True)
        for path in self._paths(name, key, sharing):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    def _paths(self, name: str, key: str, sharing: bool) -> list[Path]:
        found = [] if self.folder is None else [self.folder / "findings" / f"{name}.json"]
        return found + ([] if self.shared is None or not sharing else [self.shared / f"{key}.json"])


def shared_folder() -> Path:
    """Where findings of unchanged originals and references are kept for other audits."""
    return cache_folder() / "findings"
