"""Findings on disk: an interrupted audit resumes where it stopped, and an original model is attacked once for many audits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repedit.auditing.attack import Attack, Finding
from repedit.auditing.report import finding_json, finding_of
from repedit.auditing.selftest_record import environment
from repedit.data import Splits
from repedit.data.rows import row_hash
from repedit.io.store import JsonStore, cache_path, cache_store, content_hash


def key_of(attack: Attack, model: str, splits: Splits, extra: Mapping[str, Any] | None = None) -> str:
    """sha256 over everything that decides a finding: attack, settings, seed, weights, data, code and versions."""
    text = [getattr(part, "hash", None) or repr(part) for part in (splits.unrelated, splits.holdout)]
    content = {
        "attack": attack.name, "options": dict(attack.options), "seed": attack.seed, "model": model,
        "facts": [row_hash(part) for part in (splits.train, splits.test, splits.retain)], "text": text,
        "environment": environment(), **(extra or {}),
    }  # fmt: skip
    return content_hash(content)


class FindingStore:
    """Findings in a folder of the audit, and those that other audits share in the user's cache.

    A damaged entry counts as absent. Without a cache an audit continues, and a warning says so once.
    """

    def __init__(self, folder: Path | None, shared: bool = True) -> None:
        self._own = JsonStore(None if folder is None else folder / "findings")
        self._shared = cache_store("findings") if shared else JsonStore(None)

    def get(self, name: str, key: str, *, sharing: bool) -> Finding | None:
        """The finding stored under a name, or in the shared cache, if its key is this one."""
        stored = self._own.get(name, key)
        if stored is None and sharing:
            stored = self._shared.get(key, key)
        try:
            return None if stored is None else finding_of(stored)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):  # written by another version
            return None

    def put(self, name: str, key: str, finding: Finding, *, sharing: bool) -> None:
        """Store a finding; a file is whole or absent.

        Raises:
            CheckpointError: if the folder of the audit cannot be written.
        """
        self._own.put(name, key, finding_json(finding))
        if sharing:
            self._shared.put(key, key, finding_json(finding))


def private_folder(out: Path) -> Path | None:
    """Where an audit whose items are hidden stores its findings: in the cache, not beside pages that may be published.

    None if there is no cache; such an audit cannot be resumed after an interruption.
    """
    return cache_path(f"audits/{hashlib.sha256(os.fsencode(out.absolute())).hexdigest()[:16]}")
