"""Results on disk under a key, so that interrupted work is resumed and finished work is shared.

The key of a result is the hash of everything that it depends on, see `content_hash`. A `JsonStore` holds one JSON file for
each result and a `JsonLog` one line; a kill leaves a result complete or absent. `cache_store` is a store in the user's
cache, without which all work continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

from repedit.errors import CheckpointError, NotFound
from repedit.io.files import exists, make_folder, user_path, write_text
from repedit.io.text import JsonLines, check_fields, read_json


def content_hash(value: object) -> str:
    """sha256 of a value as JSON with sorted keys; values that JSON does not have count by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class JsonStore:
    """JSON values in a folder, one file NAME.json each, written by one rename, each valid for one key.

    Args:
        folder: created when the first value is stored; None stores nothing.
        remedy: what the user can do about a damaged file, which is then refused; without a remedy it counts as absent.
        optional: if nothing can be written there, continue and warn once.
    """

    def __init__(self, folder: Path | None, *, remedy: str = "", optional: bool = False) -> None:
        self.folder = folder
        self._remedy = remedy
        self._optional = optional

    def get(self, name: str, key: str) -> Any:
        """The value that was stored under a name with this key; None if there is none.

        A store with a remedy also returns values that earlier versions stored without a key; the caller checks them.

        Raises:
            CheckpointError: if the file is damaged and the store has a remedy.
        """
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or not exists(path):
            return None
        try:
            entry = read_json(path, finite=False, remedy=self._remedy)
            if self._remedy and not {"key", "sha256", "value"} & set(entry):
                return entry  # earlier versions stored the value alone
            if entry.get("key") == key and entry.get("sha256") == content_hash(entry.get("value")):
                return entry["value"]
            if self._remedy:
                raise CheckpointError(f"{path} is damaged, or was written for something else; {self._remedy}")
        except CheckpointError:
            if self._remedy:
                raise
        return None

    def put(self, name: str, key: str, value: object) -> None:
        """Store a value under a name, in place of an earlier one.

        Raises:
            CheckpointError: if the folder cannot be written and the store is not optional.
        """
        if self.folder is None:
            return
        entry = {"key": key, "sha256": content_hash(value), "value": value}
        try:
            make_folder(self.folder)
            write_text(self.folder / f"{name}.json", json.dumps(entry, indent=1, sort_keys=True))
        except CheckpointError as error:
            if not self._optional:
                raise
            _warn_without_cache(error)


class JsonLog:
    """JSON objects in a file, one line each, appended one at a time; an incomplete last line does not count.

    Args:
        types: the type of every field of a row, see `repedit.io.text.check_fields`.
        what: what the file is, for messages, such as "the journal of a run".
        remedy: what the user can do about a damaged file.
    Raises:
        CheckpointError: if a complete line is not such a row.
    """

    def __init__(self, path: Path, types: Mapping[str, Any], what: str, remedy: str) -> None:
        self._lines = JsonLines(path)
        for number, row in enumerate(self.rows, 1):
            try:
                check_fields(row, types, f"line {number}")
            except CheckpointError as error:
                raise CheckpointError(f"{path.absolute()} is not {what}: {error}; {remedy}") from error

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, in order."""
        return self._lines.rows

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on the disk when this returns."""
        self._lines.add(row)


# --- The cache of the user: models that were fetched, and results that several audits share


class CacheWarning(UserWarning):
    """The cache cannot be written, and the work continues without it."""


def cache_folder() -> Path:
    """The folder of the cache: $REPEDIT_CACHE, or "repedit" in the user's cache directory, such as ~/.cache.

    Raises:
        NotFound: if neither is set and the user has no home directory.
    """
    if os.environ.get("REPEDIT_CACHE"):
        return user_path(os.environ["REPEDIT_CACHE"])
    folder = Path()
    with suppress(RuntimeError):  # without a home, platformdirs raises, or returns a path that begins with "~"
        folder = platformdirs.user_cache_path("repedit", appauthor=False)
    if not folder.is_absolute():
        raise NotFound("this user has no home directory; set REPEDIT_CACHE to a folder to write to")
    return folder


def cache_path(name: str) -> Path | None:
    """A path in the cache, whose parent exists; None if the cache cannot be written, with one warning."""
    try:
        path = cache_folder() / name
        make_folder(path.parent)
        return path
    except (CheckpointError, NotFound) as error:
        _warn_without_cache(error)
        return None


def cache_store(name: str) -> JsonStore:
    """A store in a folder of the cache; if that cannot be written, it stays empty and one warning says so."""
    try:
        return JsonStore(cache_folder() / name, optional=True)
    except NotFound as error:
        _warn_without_cache(error)
        return JsonStore(None)


_warned: set[str] = set()
"""The values of $REPEDIT_CACHE for which the warning was given."""


def _warn_without_cache(error: Exception) -> None:
    folder = os.environ.get("REPEDIT_CACHE", "")
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(
            f"the cache cannot be written, and the work goes on without it ({error}); set REPEDIT_CACHE to a folder to write to",
            CacheWarning, stacklevel=4,
        )  # fmt: skip
