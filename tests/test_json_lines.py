"""Lines of JSON outlive a kill: whatever is cut off, what was whole is read, and what is added next is whole too."""

import hashlib

import pytest

from repedit.errors import CheckpointError
from repedit.io import files
from repedit.io.files import file_hash
from repedit.io.text import JsonLines

ROWS = [{"a": 1}, {"text": "two\nlines, and an é"}, {"c": [1, None]}]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "log.jsonl"
    for row in ROWS:
        JsonLines(path).add(row)
    return path


def test_what_was_added_is_read(written):
    assert JsonLines(written).rows == ROWS and JsonLines(written.parent / "none").rows == []


def reread(path, data, kept):
    """Rows a third reader finds, after a cut and one row more by a second."""
    path.write_bytes(data[:kept])
    JsonLines(path).add({"new": True})
    return JsonLines(path).rows


def test_wherever_a_kill_cuts_the_rows_before_it_and_after_it_are_read(written):
    data = written.read_bytes()
    for kept in range(len(data) + 1):
        whole = data[:kept].count(b"\n")
        assert reread(written, data, kept) == [*ROWS[:whole], {"new": True}]


def test_a_rest_of_a_line_that_stays_would_be_caught(written, monkeypatch):
    monkeypatch.setattr(files.os, "truncate", lambda *a: None)
    data = written.read_bytes()
    with pytest.raises(CheckpointError, match="line 3: not JSON"):
        reread(written, data, len(data) - 3)


def test_the_hash_of_a_file_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1000)
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"abc" * 1000).hexdigest()
