"""Findings on disk by hashed key, and the record that the self-test passed with this code."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from repedit.auditing.attack import Attack, Finding
from repedit.auditing.report import finding_json, finding_of
from repedit.data import Splits
from repedit.data.corpus import row_hash
from repedit.io.store import JsonStore, cache_path, cache_store, content_hash

# --- The record of the self-test: whether it passed with this code, these versions and this machine

PACKAGE = Path(__file__).parents[1]


@cache
def environment() -> str:
    """sha256 over everything that decides what an attack finds beside its arguments: code, versions and machine.

    The code is every module of repedit that the audit imports, and the versions are those of every package that these
    modules import, quantizers included; a package that is not installed counts as absent.
    """
    paths, packages = sources()
    distributions = packages_distributions()
    held = {name: version(distributions[name][0]) if name in distributions else None for name in packages}
    machine = [platform.machine(), list(sys.version_info[:2])]
    digest = hashlib.sha256(json.dumps([held, machine], sort_keys=True).encode())
    for path in paths:
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@cache
def sources() -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The modules that the audit imports, its own included, and the packages that those import, in order of name."""
    reached: set[Path] = set()
    packages: set[str] = set()
    waiting = list((PACKAGE / "auditing").rglob("*.py"))
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for name in _imported(path):
            if name.partition(".")[0] == PACKAGE.name:
                waiting += _files(name)
            else:
                packages.add(name.partition(".")[0])
    return tuple(sorted(reached)), tuple(sorted(packages - sys.stdlib_module_names))


def save_selftest(failures: str, checks: Sequence[Mapping[str, Any]]) -> None:
    """Store what a self-test found; empty failures are a pass. Without a cache it is not stored, and a warning says so."""
    cache_store("selftest").put(environment(), environment(), {"failures": failures, "checks": list(checks)})


def selftest_failures() -> str | None:
    """The failures of the self-test that was last run in this environment; None where none was."""
    record = cache_store("selftest").get(environment(), environment())
    return str(record["failures"]) if isinstance(record, Mapping) and "failures" in record else None


def _imported(path: Path) -> Iterator[str]:
    """Dotted names of every import of a module, also inside functions."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(name: str) -> list[Path]:
    """The files that importing a dotted name of repedit runs, but for the package's own, which exports everything."""
    parts = name.split(".")[1:]
    places = [PACKAGE.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()]


# --- Findings: an interrupted audit resumes where it stopped, and an original model is attacked once for many audits


def key_of(attack: Attack, model: str, splits: Splits) -> str:
    """sha256 over everything that decides a finding: attack, settings, seed, weights, data, code and versions."""
    text = [getattr(part, "hash", None) or repr(part) for part in (splits.unrelated, splits.holdout)]
    content = {
        "attack": attack.name, "options": dict(attack.options), "seed": attack.seed, "model": model,
        "facts": [row_hash(part) for part in (splits.train, splits.test, splits.retain, splits.attributes)], "text": text,
        "environment": environment(),
    }  # fmt: skip
    return content_hash(content)


class FindingStore:
    """Findings in a folder of the audit, and those that other audits share in the user's cache.

    A damaged entry counts as absent. Without a cache an audit continues, and a warning says so once.
    """

    def __init__(self, folder: Path | None) -> None:
        self._own = JsonStore(None if folder is None else folder / "findings")
        self._shared = cache_store("findings")

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
