"""Nothing that repedit did not write is ever replaced, however the target is named and whatever comes while it is written."""

import json
import multiprocessing
import os
import shutil
import socket
import threading
from pathlib import Path

import pytest

from repedit.errors import ArgumentError, CheckpointError, TargetExists
from repedit.io import targets
from repedit.io.files import file_hash
from repedit.io.targets import add_to_manifest, check_file_target, check_target, install, staging_folder


def exported(folder, **files):
    """A directory as an export leaves it: a manifest that lists the other files."""
    folder.mkdir(parents=True)
    for name, text in {"model": "weights", **files}.items():
        (folder / name).write_text(text)
    listed = {name: file_hash(folder / name) for name in ("model", *files)}
    (folder / "repedit.json").write_text(json.dumps({"files": listed}))
    return folder


def write(out, overwrite=False, meanwhile=lambda: None, text="new"):
    """Write a directory as an export does."""
    target = check_target(out, overwrite=overwrite)
    with staging_folder(target, overwrite=overwrite) as place:
        (place / "checkpoint").mkdir()
        (place / "checkpoint" / "model").write_text(text)
        meanwhile()
        install(place / "checkpoint", target, overwrite=overwrite)


def tree(folder):
    """Every path below a folder, with the content of files."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in sorted(folder.rglob("*"))
    }


def make_link(out):
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / "elsewhere")


def make_socket(out):
    here = os.open(".", os.O_RDONLY)
    os.chdir(out.parent)  # a path of a socket may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(out.name)
    finally:
        os.fchdir(here)
        os.close(here)


def home(out):
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "a.jpg").write_text("x")


FOREIGN = {
    "a home": (home, r"holds no repedit\.json"),
    "a file": (Path.touch, "is a file"),
    "a pipe": (os.mkfifo, "is a named pipe"),
    "a socket": (make_socket, "is a socket"),
    "a link to a directory": (make_link, "is a link"),
    "a link to nothing": (lambda out: out.symlink_to("nothing"), "is a link"),
    "a link to itself": (lambda out: out.symlink_to(out), "is a link"),
    "an export with a stranger": (lambda out: (exported(out) / "mine.txt").touch(), r"not of the export: mine\.txt"),
    "an export with a hidden stranger": (lambda out: (exported(out) / ".env").touch(), r"not of the export: \.env"),
    "an export with a folder": (lambda out: home(exported(out) / "sub"), r"not of the export: sub/photos/a\.jpg"),
    "an export with a link": (lambda out: (exported(out) / "link").symlink_to("/"), "not of the export: link"),
    "an export with a pipe": (lambda out: os.mkfifo(exported(out) / "pipe"), "not of the export: pipe"),
    "an export that was trained on": (lambda out: (exported(out) / "model").write_text("other"), "changed since .*: model"),
    "an export of a link": (lambda out: relinked(exported(out)), "changed since .*: model"),
    "a manifest of nothing": (lambda out: forged(out, {"files": {}}), "not of the export"),
    "a manifest of the outside": (lambda out: forged(out, {"files": {"../x": "0"}}), "no file of its directory"),
    "no manifest": (lambda out: forged(out, [1]), "an object was expected"),
    "a manifest that is a pipe": (lambda out: (out.mkdir(), os.mkfifo(out / "repedit.json")), r"holds no repedit\.json"),
}  # fmt: skip


def relinked(folder):
    (folder / "model").rename(folder.parent / "model")
    (folder / "model").symlink_to(folder.parent / "model")


def forged(out, value):
    out.mkdir()
    (out / "repedit.json").write_text(json.dumps(value))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_repedit_did_not_write_stays(kind, overwrite, tmp_path):
    make, words = FOREIGN[kind]
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(TargetExists, match=words if overwrite else "is a|out exists; pass overwrite=True"):
        write(tmp_path / "out", overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_comes_while_the_export_runs_stays_and_so_does_the_export(kind, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(TargetExists, match=r"out was taken while the export ran: .*the export is whole in .*/out-2"):
        write(out, overwrite=True, meanwhile=lambda: FOREIGN[kind][0](out))
    assert (tmp_path / "out-2" / "model").read_text() == "new" and os.path.lexists(out)
    assert not list(tmp_path.glob(".out*"))


def test_what_comes_between_the_last_check_and_the_rename_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "_check_free", lambda *_: None)
    for kind in ("a home", "a file", "a pipe", "a link to a directory", "an export with a stranger"):
        folder = tmp_path / kind
        folder.mkdir()
        FOREIGN[kind][0](folder / "out")
        before = tree(folder)
        with pytest.raises((TargetExists, CheckpointError)), staging_folder(folder / "out", overwrite=True) as place:
            (place / "checkpoint").mkdir()
            install(place / "checkpoint", folder / "out", overwrite=True)
        assert before.items() <= tree(folder).items()


def test_a_check_that_trusts_any_directory_would_be_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "reason_to_keep", lambda folder: None)
    home(tmp_path / "out")
    write(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "photos").exists()


def test_an_export_and_an_empty_directory_are_replaced(tmp_path):
    exported(tmp_path / "out", **{"README.md": "card"})
    home(tmp_path / "out" / "added")
    add_to_manifest(tmp_path / "out", ["added/photos/a.jpg"])
    write(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out": None, "out/model": b"new"}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert (tmp_path / "empty" / "model").exists()


@pytest.mark.parametrize("name", [".", "..", "here/..", "", "/"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_current_directory_and_those_above_it_are_refused(name, overwrite, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(TargetExists, match="is the current directory or lies above it"):
        check_target(name, overwrite=overwrite)


def test_a_home_is_refused_even_if_it_looks_like_an_export(tmp_path, monkeypatch):
    exported(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~", tmp_path / "home"):
        with pytest.raises(TargetExists, match="is your home directory"):
            check_target(name, overwrite=True)


def test_a_mounted_disk_is_refused(tmp_path, monkeypatch):
    exported(tmp_path / "disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(TargetExists, match="is where a disk is mounted"):
        check_target(tmp_path / "disk", overwrite=True)


def test_the_source_is_recognised_under_every_name(tmp_path):
    source = exported(tmp_path / "deep" / "source")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "up").symlink_to(tmp_path / "deep")
    for name in (
        "deep/source",
        "deep/source/in",
        "deep",
        "link/in",
        "up/source",
        "deep/../deep/source",
        "up/source/../source",
    ):
        with pytest.raises(TargetExists, match=r"the same or one lies inside the other|is a link"):
            check_target(tmp_path / name, overwrite=True, source=source)


@pytest.mark.parametrize("name", ["out", "sub/../out", "link/out", "out/"])
def test_a_target_is_locked_under_every_name(name, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    with staging_folder(tmp_path / "out"):
        with pytest.raises(TargetExists, match="is being written by another export"):
            check_target(f"{tmp_path}/{name}")
        same = targets._absolute(f"{tmp_path}/{name}")
        with pytest.raises(TargetExists, match="is being written by another export"), staging_folder(same):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "sub"]


def racer(start, out, text, results):
    """Write a target once told to; says how it went."""
    start.wait()
    try:
        write(out, text=text)
        results.put(text)
    except TargetExists:
        results.put(None)
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_of_many_writers_one_wins_and_the_others_are_told(kind, tmp_path):
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    make = context.Process if kind == "processes" else threading.Thread
    racers = [make(target=racer, args=(start, tmp_path / "out", str(n), results)) for n in range(8)]
    for one in racers:
        one.start()
    start.set()
    told = [results.get(timeout=60) for _ in racers]
    for one in racers:
        one.join()
    winners = [text for text in told if text is not None]
    assert winners == [(tmp_path / "out" / "model").read_text()]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_the_lock_two_writers_would_be_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(targets.FileLock, "acquire", lambda lock: None)
    with staging_folder(tmp_path / "out"), staging_folder(tmp_path / "out") as place:
        assert place.exists()


def test_a_folder_with_the_name_of_a_workplace_stays(tmp_path):
    for name in (".out.partial-x", ".out.partial-abc", ".other.partial-export"):
        home(tmp_path / name)
        (tmp_path / name / "lock").touch()
    before = tree(tmp_path)
    write(tmp_path / "out")
    assert before.items() <= tree(tmp_path).items()
    home(tmp_path / ".new.partial-export")
    before = tree(tmp_path)
    with pytest.raises(TargetExists, match=r"\.new\.partial-export is in the way, and repedit did not make it"):
        write(tmp_path / "new")
    assert tree(tmp_path) == before


def test_files_that_somebody_put_into_a_workplace_stay(tmp_path):
    with staging_folder(tmp_path / "out") as place:
        (place / "notes.txt").write_text("mine")
        (place / "checkpoint").mkdir()
    assert [p.name for p in place.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("a\nb", ArgumentError, "has control characters in its name"),
        ("a\x00b", ArgumentError, "has control characters in its name"),
        ("x" * 300, CheckpointError, "a name of 300 bytes is too long, 255 are allowed"),
        ("absent/" + "x" * 300, CheckpointError, "is too long"),
        ("file/out", CheckpointError, "file is not a directory"),
        ("loop/out", CheckpointError, "cannot be found|cannot be written|failed"),
    ],
)
def test_a_name_that_cannot_be_written_leaves_nothing(name, error, words, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    with pytest.raises(error, match=words):
        write(Path(f"{tmp_path}/{name}"))
    with pytest.raises(error, match=words):
        check_file_target(f"{tmp_path}/{name}")
    assert tree(tmp_path) == before


def test_the_longest_name_is_written(tmp_path):
    write(tmp_path / ("x" * 255))
    assert [p.name for p in tmp_path.iterdir()] == ["x" * 255]


def test_a_directory_that_may_not_be_written_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"{tmp_path} is not writable; give another target"):
        check_target(tmp_path / "deep" / "out")


def test_parents_are_made_and_removed_again_where_nothing_came_of_it(tmp_path):
    with (
        pytest.raises(CheckpointError, match="disk; nothing was written"),
        staging_folder(tmp_path / "a" / "b" / "out"),
    ):
        raise OSError("disk")
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "model").exists()


def test_a_check_writes_nothing_and_keeps_what_a_kill_left(tmp_path):
    with targets._locked_staging(tmp_path / "out") as place:
        targets._mark_job(place, "job")
        (place / "checkpoint").mkdir()
    before = tree(tmp_path)
    check_target(tmp_path / "out")
    assert tree(tmp_path) == before


def test_an_early_check_sees_the_target_that_a_kill_moved_aside(tmp_path):
    with targets._locked_staging(tmp_path / "out") as place:
        targets._mark_job(place, "job")
        exported(tmp_path / "out").rename(place / "replaced")
    with pytest.raises(TargetExists, match="out exists"):
        check_target(tmp_path / "out")
    assert (tmp_path / "out" / "model").exists()


def test_a_kill_while_the_replaced_target_is_removed_leaves_the_new_one_alone(tmp_path, monkeypatch):
    exported(tmp_path / "out")

    def killed():
        monkeypatch.setattr(shutil, "rmtree", lambda path, **_: ((path / "repedit.json").unlink(), os._exit(9)))
        write(tmp_path / "out", overwrite=True)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == 9 and tree(tmp_path / "out") == {"model": b"new"}
    with pytest.raises(TargetExists, match="out is not replaced"):  # this one has no manifest
        write(tmp_path / "out", overwrite=True)
    write(tmp_path / "other")
    shutil.rmtree(tmp_path / "out")
    write(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("kind", ["a home", "a pipe", "a socket", "a link to a directory"])
def test_a_file_replaces_a_regular_file_only(kind, tmp_path):
    FOREIGN[kind][0](tmp_path / "out")
    with pytest.raises(TargetExists, match="where a file is to be written"):
        check_file_target(tmp_path / "out")
    (tmp_path / "file").touch()
    assert check_file_target(tmp_path / "file") == tmp_path / "file"
    with pytest.raises(TargetExists, match="file exists; pass overwrite=True"):
        check_file_target(tmp_path / "file", overwrite=False)
