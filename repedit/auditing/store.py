"""Findings on disk: an interrupted audit resumes where it stopped, and an original model is attacked once for many audits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repedit.auditing.attack import Attack, Finding
from repedit.auditing.report import finding_json, finding_of
from repedit.auditing.selftest_record import environment
from repedit.data import Splits
from repedit.data.rows import row_hash
from repedit.errors import CheckpointError
from repedit.io.files import make_folder, write_text
from repedit.io.text import read_json
from repedit.models.default_model import cache_path, in_cache, write_cache


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
    """Findings in a folder of the audit, and those that other audits share in the user's cache.

    An entry that is damaged counts as absent. Without a cache an audit goes on, and a warning says so once.
    """

    def __init__(self, folder: Path | None, shared: bool = True) -> None:
        self.folder = folder
        self.shared = shared

    def get(self, name: str, key: str, *, sharing: bool) -> Finding | None:
        """The finding stored under a name, or in the shared cache, if its key is this one."""
        held = [] if self.folder is None else [_read(self._own(name))]
        held += [in_cache(_shared(key))] if sharing and self.shared else []
        return next((finding for entry in held if (finding := _finding(entry, key)) is not None), None)

    def put(self, name: str, key: str, finding: Finding, *, sharing: bool) -> None:
        """Store a finding; a file is whole or absent.

        Raises:
            CheckpointError: if the folder of the audit cannot be written.
        """
        value = finding_json(finding)
        text = json.dumps({"key": key, "sha256": _digest(value), "finding": value}, indent=1, sort_keys=True)
        if self.folder is not None:
            make_folder(self._own(name).parent)
            write_text(self._own(name), text)
        if sharing and self.shared:
            write_cache(_shared(key), text)

    def _own(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "findings" / f"{name}.json"


def private_folder(out: Path) -> Path | None:
    """Where an audit whose items are hidden stores its findings: in the cache, not beside pages that may be published.

    None where there is no cache; such an audit cannot go on after an interruption.
    """
    place = hashlib.sha256(os.fsencode(out.absolute())).hexdigest()[:16]
    return cache_path(f"audits/{place}")


def _shared(key: str) -> str:
    return f"findings/{key}.json"


def _read(path: Path) -> Any:
    try:
        return read_json(path, finite=False)
    except CheckpointError:
        return None


def _finding(entry: Any, key: str) -> Finding | None:
    """The finding of an entry that is whole and has this key."""
    if (
        not isinstance(entry, Mapping)
        or entry.get("key") != key
        or entry.get("sha256") != _digest(entry.get("finding"))
    ):
        return None
    try:
        return finding_of(entry["finding"])
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError):  # written by another version
        return None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
