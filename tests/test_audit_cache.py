"""The cache: what an audit found is found again only with the same code, and without a cache everything goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from repedit.auditing import store as selftest_record
from repedit.auditing.store import PACKAGE, FindingStore, private_folder, save_selftest, selftest_failures, sources
from repedit.errors import CheckpointError, NotFound
from repedit.io import store as store_module
from repedit.io.store import CacheWarning, cache_folder
from repedit.models import default_model
from repedit.models.default_model import fetch
from tests.handmade_reports import finding

FOUND = finding("direct", {"prompt": 0.5})


def unwritable(place: Path, kind: str) -> Path:
    """A path where no cache can be."""
    if kind == "a file in its place":
        place.write_text("")
    elif kind == "a link to nothing":
        place.symlink_to(place.parent / "absent" / "folder")
    return {"a pseudo file system": Path("/proc/none"), "below a device": Path("/dev/null/cache")}.get(kind, place)


KINDS = ("a pseudo file system", "a file in its place", "below a device", "a link to nothing")


@pytest.fixture(params=KINDS)
def no_cache(request, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(unwritable(tmp_path / "cache", request.param)))
    monkeypatch.setattr(store_module, "_warned", set())


def test_without_a_cache_findings_and_self_tests_are_made_again_and_a_warning_says_so_once(no_cache, tmp_path):
    store = FindingStore(None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store.put("a", "key", FOUND, sharing=True)
        save_selftest("", [])
        store.put("b", "key", FOUND, sharing=True)
        assert (
            store.get("a", "key", sharing=True) is None
            and selftest_failures() is None
            and private_folder(tmp_path) is None
        )
    assert [w.category for w in said] == [CacheWarning] and "set REPEDIT_CACHE to a folder" in str(said[0].message)


def test_a_full_disk_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "_warned", set())
    monkeypatch.setattr(
        "repedit.io.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.warns(CacheWarning, match="No space left on device"):
        save_selftest("", [])
    assert selftest_failures() is None and not list((tmp_path / "cache").rglob("*.*"))


def test_the_folder_of_an_audit_is_no_cache(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="out/findings cannot be made: Not a directory"):
        FindingStore(tmp_path / "out").put("a", "key", FOUND, sharing=False)


def test_a_model_that_is_there_is_fetched_without_a_cache_to_write_to(tmp_path, monkeypatch):
    place = tmp_path / default_model.DEFAULT
    place.mkdir()
    (place / "config.json").write_text("{}")
    monkeypatch.setattr(default_model, "make_folder", lambda _: pytest.fail("the cache was written"))
    assert fetch(cache=tmp_path) == place


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_cannot_be_fetched_to_where_nothing_can_be_written(kind, tmp_path):
    with pytest.raises(CheckpointError, match=r"the folder .* cannot be made: "):
        fetch(cache=unwritable(tmp_path / "cache", kind))


def test_a_download_that_cannot_be_stored_is_refused_by_name(tmp_path, monkeypatch):
    def full(_folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(default_model, "_download", full)
    with pytest.raises(CheckpointError, match=r"could not be stored in .*No space left on device; give a folder"):
        fetch(cache=tmp_path)


def test_a_user_without_a_home_is_told_to_set_the_cache(monkeypatch):
    for name in ("REPEDIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where "~" has no value
    with pytest.raises(NotFound, match="set REPEDIT_CACHE"):
        cache_folder()


# Entries.


def damaged(text: str, kind: str) -> str:
    held = json.loads(text)
    if kind == "another answer":
        held["value"]["correct"][0] = held["value"]["correct"][0].translate({48: 49, 49: 48})
    return {
        "cut off": text[: len(text) // 2], "empty": "", "a list": "[]", "not JSON": "{", "deep": "[" * 100_000, "bytes": "\udcff",
        "no finding": json.dumps({"key": held["key"]}), "another answer": json.dumps(held),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["cut off", "empty", "a list", "not JSON", "deep", "bytes", "no finding", "another answer"]
)
@pytest.mark.parametrize("where", ["audit", "cache"])
def test_a_damaged_finding_is_made_again(kind, where, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    store = FindingStore(tmp_path / "out" if where == "audit" else None)
    store.put("a", "key", FOUND, sharing=where == "cache")
    assert store.get("a", "key", sharing=True).items == FOUND.items
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(damaged(path.read_text(), kind).encode("utf-8", "surrogateescape"))
    assert store.get("a", "key", sharing=True) is None


def test_a_finding_of_another_key_is_not_this_one(tmp_path):
    store = FindingStore(tmp_path)
    store.put("a", "key", FOUND, sharing=False)
    assert store.get("a", "other", sharing=False) is None
    store.put("a", "other", replace(FOUND, seed=3), sharing=False)
    assert store.get("a", "other", sharing=False).seed == 3


# The key.


def test_the_key_covers_every_module_that_an_audit_imports():
    """A change to any of them may change a verdict: nothing is listed by hand."""
    code = "import sys, repedit.auditing.api, repedit.auditing.classifier, repedit.auditing.selftest; print('\\n'.join(m.__file__ for n, m in sys.modules.items() if n.startswith('repedit.')))"
    loaded = {
        Path(line)
        for line in subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    }
    covered = set(sources()[0])
    assert {path for path in loaded if path.name != "__init__.py"} <= covered
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in covered}
    assert {"arch", "auditing", "hooks", "stats", "models", "edit", "metrics", "data", "kernels"} <= rooms
    assert not rooms & {"cli", "report", "plot", "console"}


def test_the_key_covers_the_packages_that_decide_numbers():
    assert {"torch", "transformers", "numpy", "scipy", "sklearn", "torchao", "hqq"} <= set(sources()[1])


@pytest.mark.parametrize("room", ["hooks.py", "arch/hooks.py", "stats/moments.py"])
def test_another_source_is_another_key(room, monkeypatch):
    before, read = selftest_record.environment(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + (b"#" if self == PACKAGE / room else b""))
    selftest_record.environment.cache_clear()
    try:
        assert selftest_record.environment() != before
    finally:
        selftest_record.environment.cache_clear()


def test_another_version_is_another_key(monkeypatch):
    before = selftest_record.environment()
    monkeypatch.setattr(selftest_record, "version", lambda name: "0")
    selftest_record.environment.cache_clear()
    try:
        assert selftest_record.environment() != before
    finally:
        selftest_record.environment.cache_clear()


def test_a_cache_that_only_others_may_write_is_no_cache(tmp_path, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "cache").mkdir(mode=0o500)
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store_module, "_warned", set())
    with pytest.warns(CacheWarning):
        save_selftest("", [])
