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
from repedit.data.rows import row_hash
from repedit.errors import CheckpointError
from repedit.io.files import make_folder, write_text
from repedit.io.text import read_json
from repedit.models.default_model import cache_path, in_cache, write_cache

# --- Whether the self-test passed here: stored by code, versions and machine, so that an audit can say that it did not


PACKAGE = Path(__file__).parents[1]


@cache
def environment() -> str:
    """sha256 over everything that decides what an attack finds beside its arguments: code, versions and machine.

    The code is every module of repedit that the attacks import, and the versions are those of every package that these
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
    """The modules that the attacks import, themselves included, and the packages that those import, in order of name."""
    reached: set[Path] = set()
    packages: set[str] = set()
    waiting = list((PACKAGE / "attacks").rglob("*.py"))
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


def remember(failures: str, checks: Sequence[Mapping[str, Any]]) -> None:
    """Store what a self-test found; empty failures are a pass. Without a cache it is not stored, and a warning says so."""
    write_cache(_record(), json.dumps({"failures": failures, "checks": list(checks)}, indent=1, sort_keys=True))


def recorded() -> str | None:
    """The failures of the self-test that was last run in this environment; None where none was."""
    value = in_cache(_record())
    return str(value["failures"]) if isinstance(value, Mapping) and "failures" in value else None


def _record() -> str:
    return f"selftest/{environment()}.json"


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


# --- Findings on disk: an interrupted audit goes on where it stopped, and an original is attacked once for many audits


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
