"""Several workers write the files that one writes; a failure of one ends all of them, and nothing is left behind."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import repedit as rp
from repedit.errors import ArgumentError, CheckpointError, NotFinite, PlanMismatch
from repedit.io import known_hashes
from repedit.io.checkpoint import open_shards
from repedit.io.known_hashes import known_file
from repedit.io.targets import MANIFEST, add_to_manifest, read_manifest
from repedit.plan import Plan
from repedit.rewrite import shards as pool
from repedit.rewrite import streaming
from repedit.rewrite.verification import verification
from tests.damaged_checkpoints import sha
from tests.edits import fill, mask, projection
from tests.test_export_resume import killed
from tests.test_export_safety import content
from tests.tiny import tiny


@pytest.fixture
def edit():
    return projection(tiny("llama"), "0.mlp.out") | mask(tiny("llama"), "1.mlp.neurons")


EDITS = {
    "a projection and a mask": (lambda s: projection(s, "0.mlp.out") | mask(s, "1.mlp.neurons"), {}),
    "an added bias and another dtype": (lambda s: fill(s, "1.mlp.neurons"), {"dtype": "bfloat16"}),
    "an untied head": (lambda s: projection(s, "0.resid.pre"), {}),
    "neurons cut out": (lambda s: mask(s, "1.mlp.neurons"), {"structure": "slim", "layout": "ragged"}),
}


@pytest.mark.parametrize("name", EDITS)
def test_the_files_do_not_depend_on_the_number_of_workers(name, source, tmp_path):
    make, options = EDITS[name]
    for workers in (1, 2, 4, None):
        rp.export(make(tiny("llama")), source, tmp_path / str(workers), workers=workers, **options)
    assert all(content(tmp_path / str(workers)) == content(tmp_path / "1") for workers in (2, 4, None))


def the_hashes_are_those_of_the_files(source, edit, out, **options):
    record = rp.export(edit, source, out, **options)
    written = {name: value for name, value in content(out).items() if name not in ("repedit.json", "README.md")}
    assert dict(record.files) == written and record.hash == "sha256"
    assert dict(record.base["files"]) == {name: sha(source / name) for name in record.base["files"]}
    assert set(open_shards(source).files) <= record.base["files"].keys()


@pytest.mark.parametrize("link", [True, False])
@pytest.mark.parametrize("name", EDITS)
def test_the_hashes_of_the_manifest_are_those_of_the_files(name, link, source, tmp_path):
    make, options = EDITS[name]
    the_hashes_are_those_of_the_files(source, make(tiny("llama")), tmp_path / "out", workers=4, link=link, **options)


def test_a_hash_of_the_wrong_file_is_caught(source, edit, tmp_path, monkeypatch):
    right = streaming._Copy.hashes.fget
    monkeypatch.setattr(streaming._Copy, "hashes", property(lambda copy: right(copy)[::-1]))
    with pytest.raises(AssertionError):
        the_hashes_are_those_of_the_files(source, edit, tmp_path / "out")


def test_a_hash_that_leaves_out_what_changed_is_caught(source, edit, tmp_path, monkeypatch):
    differ = streaming._Copy.differ
    monkeypatch.setattr(streaming._Copy, "differ", lambda copy, old, new: differ(copy, new, new))
    with pytest.raises(AssertionError):
        the_hashes_are_those_of_the_files(source, edit, tmp_path / "out")


def test_every_byte_of_the_source_is_read_once(source, edit, tmp_path, monkeypatch):
    counts, read = [], streaming.read_fully
    monkeypatch.setattr(streaming, "read_fully", lambda *a: (counts.append(len(a[1])), read(*a))[1])
    monkeypatch.setattr(streaming, "file_hash", lambda path: pytest.fail("read for its hash alone"))
    rp.export(edit, source, tmp_path / "out", workers=4)
    assert sum(counts) == sum((source / file).stat().st_size for file in open_shards(source).files)


def test_a_worker_that_skips_a_tensor_is_caught(source, edit, tmp_path, monkeypatch):
    streamed = streaming.ShardWriter._streamed

    def skipping(writer, path, entries, touched, copy):
        return streamed(writer, path, entries, touched - {"model.layers.1.mlp.up_proj.weight"}, copy)

    monkeypatch.setattr(streaming.ShardWriter, "_streamed", skipping)
    with pytest.raises(PlanMismatch, match=r"planned but untouched: \['model\.layers\.1\.mlp\.up_proj\.weight'\]"):
        rp.export(edit, source, tmp_path / "out", workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("workers", [0, -1, 1.5, "2", True])
def test_a_number_of_workers_that_is_none_is_refused(workers, source, edit, tmp_path, unchecked):
    with pytest.raises(
        ArgumentError,
        match=rf"workers={workers!r}(; give a number of at least 1|: .* was given where a whole number or None is needed)",
    ):
        rp.export(edit, source, tmp_path / "out", workers=workers)
    assert not list(tmp_path.iterdir())


# --- Failures


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("out of memory"), CheckpointError, r"could not be exported: RuntimeError: out of memory"),
        (NotFinite("a value"), NotFinite, r"a value \(tensor 'model\.layers\.0\.mlp\.down_proj\.weight' of model-0"),
        (OSError(5, "bad block"), CheckpointError, r"bad block \(tensor 'model\.layers\.0\.mlp\.down_proj\.weight' of"),
    ],
)
def test_the_error_of_a_worker_names_its_tensor(error, kind, words, source, edit, tmp_path, monkeypatch):
    computed = Plan.computed

    def failing(plan, name, *rest):
        if name == "model.layers.0.mlp.down_proj.weight":
            raise error
        return computed(plan, name, *rest)

    monkeypatch.setattr(Plan, "computed", failing)
    with pytest.raises(kind, match=words) as caught:
        rp.export(edit, source, tmp_path / "out", workers=2)
    assert "model.layers.0.mlp.down_proj.weight" in str(caught.value) and not list(tmp_path.iterdir())


def at_work():
    return [thread for thread in threading.enumerate() if thread.name.startswith("export")]


def test_after_an_error_the_other_workers_end(source, edit, tmp_path, monkeypatch):
    ends, all_at_work = [], threading.Barrier(3)

    def shard(writer, file, target):
        all_at_work.wait(60)  # a shard that no worker has begun is cancelled
        if file.startswith("model-00001"):
            raise CheckpointError("of the first shard")
        assert writer.stop.wait(60)
        try:
            return writer.write(file, target)
        except streaming.Stopped as end:
            ends.append(end)
            raise

    monkeypatch.setattr(pool, "_shard", shard)
    with pytest.raises(CheckpointError, match="of the first shard"):
        rp.export(edit, source, tmp_path / "out", workers=3)
    assert len(ends) == 2 and not at_work() and not list(tmp_path.iterdir())


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where a shell began the tests in the background, which ignores it there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "interrupt", [lambda: os.kill(os.getpid(), signal.SIGINT), lambda: signal.raise_signal(signal.SIGINT)],
    ids=["of the process", "that another thread receives"],
)  # fmt: skip
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_all_workers_and_keeps_the_old_target(interrupt, source, edit, tmp_path, monkeypatch):
    rp.export(edit, source, tmp_path / "out")
    before, all_at_work, told = content(tmp_path / "out"), threading.Barrier(3), []

    def shard(writer, file, target):
        all_at_work.wait(60)
        if file.startswith("model-00001"):
            time.sleep(0.3)  # the main thread waits by then; the export ends as well if it does not yet
            interrupt()
        told.append(writer.stop.wait(30))
        return writer.write(file, target)

    monkeypatch.setattr(pool, "_shard", shard)
    with pytest.raises(KeyboardInterrupt):
        rp.export(edit, source, tmp_path / "out", overwrite=True, workers=3)
    assert told == [True] * 3
    assert (
        not at_work() and content(tmp_path / "out") == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    )


def test_a_disk_that_fills_up_under_several_workers_leaves_nothing(source, edit, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))  # the system itself refuses the bytes after these
    try:
        with pytest.raises(CheckpointError, match=r"writing .*out failed: .*File too large.*; nothing was written"):
            rp.export(edit, source, tmp_path / "out", workers=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    rp.export(edit, source, tmp_path / "out", workers=3)


FULL = """
import shutil, subprocess, sys
from pathlib import Path
import repedit as rp
from repedit.errors import CheckpointError
from repedit.rewrite import shards
from repedit.rewrite.verification import verification

source, edit, disk = sys.argv[1], rp.Edit.load(sys.argv[2]), Path(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
write, filler = shards._shard, disk / "filler"


def filled(*arguments):
    with open(filler, "ab") as file:  # somebody else takes what was free when the export began
        file.write(bytes(max(0, shutil.disk_usage(disk).free - int(sys.argv[4]))))
    return write(*arguments)


shards._shard = filled
try:
    rp.export(edit, source, disk / "out", workers=3)
except CheckpointError as error:
    print(error)
left = sorted(path.name for path in disk.iterdir())
filler.unlink()
shards._shard = write
rp.export(edit, source, disk / "out", workers=3)
print(left, verification(disk / "out").describe())
"""
IN_A_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
"""A command before whose mounts nobody else sees."""


@pytest.mark.skipif(
    bool(shutil.which("unshare") is None or subprocess.run([*IN_A_NAMESPACE, "true"], capture_output=True).returncode),
    reason="this system does not let a user mount a file system of its own",
)
@pytest.mark.parametrize("free", [4096, 24576])
def test_a_disk_that_is_really_full_leaves_nothing(free, source, edit, tmp_path):
    edit.save(tmp_path / "edit.safetensors")
    (tmp_path / "disk").mkdir()
    given = [source, tmp_path / "edit.safetensors", tmp_path / "disk", free]
    done = subprocess.run(
        [*IN_A_NAMESPACE, sys.executable, "-c", FULL, *map(str, given)], capture_output=True, text=True
    )
    said, left = done.stdout.splitlines()
    assert "No space left on device" in said
    assert left.startswith("['filler'] all ") and left.endswith("files are as they were exported")


@pytest.mark.parametrize("after", [1, 2, 3])
def test_what_several_workers_had_finished_is_kept_after_a_kill(after, source, edit, tmp_path, monkeypatch):
    rp.export(edit, source, tmp_path / "whole", link=False, workers=1)
    killed(source, edit, tmp_path / "out", after, workers=4)
    written, shard = [], pool._shard
    monkeypatch.setattr(pool, "_shard", lambda *a: (written.append(a), shard(*a))[1])
    rp.export(edit, source, tmp_path / "out", link=False, workers=2)
    assert len(written) == 3 - after and content(tmp_path / "out") == content(tmp_path / "whole")


# --- Hashes that are known


@pytest.fixture
def exported(source, edit, tmp_path):
    """A checkpoint with a manifest, which is a little younger than the other files."""
    rp.export(mask(tiny("llama"), "0.mlp.neurons"), source, tmp_path / "in", link=False)
    return tmp_path / "in"


def read_in_full(monkeypatch):
    """The files whose hash is computed from here on."""
    names, right = [], streaming._Copy.__init__

    def init(copy, old, new, shared, known, changes):
        names.extend([] if known else [old])
        right(copy, old, new, shared, known, changes)

    monkeypatch.setattr(streaming._Copy, "__init__", init)
    return names


def in_place(path):
    """One byte turned, a moment later."""
    time.sleep(0.02)  # the clock of a file system ticks every few milliseconds
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2), file.write(bytes([last[0] ^ 1]))


@pytest.fixture
def snapshot(source, tmp_path):
    """A snapshot of a model as the hub's client keeps it: links to blobs that are named by their hash."""
    return in_cache(source, tmp_path)


def touched(folder):
    """A shard was written, and then the manifest got a younger time."""
    in_place(folder / open_shards(folder).files[0])
    time.sleep(0.02)
    (folder / MANIFEST).touch()
    return folder


def listed_again(folder):
    """A shard was written, and then a file was added to the manifest."""
    in_place(folder / open_shards(folder).files[0])
    time.sleep(0.02)
    (folder / "notes.txt").write_text("new")
    add_to_manifest(folder, ["notes.txt"])
    return folder


def copied(folder):
    """A shard was written, and then every file was copied, the manifest as the last one."""
    in_place(folder / open_shards(folder).files[0])
    new = folder.with_name("copied")
    new.mkdir()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
        time.sleep(0.02)
        shutil.copyfile(path, new / path.name)
    return new


def linked_again(folder):
    """A blob was written through its link, and then another version of the repository linked it."""
    in_place(folder / open_shards(folder).files[0])
    time.sleep(0.02)
    new = folder.with_name("another")
    new.mkdir()
    for path in folder.iterdir():
        (new / path.name).symlink_to(path.readlink())
    return new


@pytest.mark.parametrize(
    ("kind", "change"),
    [("exported", touched), ("exported", listed_again), ("exported", copied), ("snapshot", linked_again)],
)
def test_what_a_manifest_or_a_name_says_of_a_file_is_not_believed(kind, change, edit, tmp_path, request):
    the_hashes_are_those_of_the_files(change(request.getfixturevalue(kind)), edit, tmp_path / "out")


@pytest.mark.parametrize(("kind", "change"), [("exported", touched), ("exported", copied), ("snapshot", linked_again)])
def test_believing_what_is_no_older_than_a_file_is_caught(kind, change, edit, tmp_path, monkeypatch, request):
    def believing(path):
        record = path if path.is_symlink() else path.parent / MANIFEST
        older = max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) <= record.lstat().st_mtime_ns
        said = path.resolve().name if path.is_symlink() else read_manifest(path.parent)[1].get(path.name)
        return known_hashes.KnownFile(said) if older and said else None

    folder = change(request.getfixturevalue(kind))
    monkeypatch.setattr(streaming, "known_file", believing)
    with pytest.raises(AssertionError):
        the_hashes_are_those_of_the_files(folder, edit, tmp_path / "out")


# What an export remembers of the files of its source


@pytest.fixture
def own(source, tmp_path):
    """A checkpoint that a test may change."""
    return shutil.copytree(source, tmp_path / "own")


@pytest.fixture
def remembering(tmp_path, monkeypatch):
    """A cache in which every file is remembered at once."""
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "SETTLED", 0)


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}], ids=str)
def test_a_source_is_hashed_once(options, remembering, own, edit, tmp_path, monkeypatch):
    the_hashes_are_those_of_the_files(own, edit, tmp_path / "out", **options)
    names = read_in_full(monkeypatch)
    the_hashes_are_those_of_the_files(own, edit, tmp_path / "again", **options)
    assert not names and content(tmp_path / "again") == content(tmp_path / "out")
    assert all(known_file(own / name).finite for name in open_shards(own).files)


def hidden_change(path):
    """One byte turned, and the time of modification set back."""
    before = path.stat()
    in_place(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swapped(path):
    """The file replaced by another of the same size and time of modification."""
    before, other = path.stat(), path.with_name("other")
    shutil.copyfile(path, other)
    in_place(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [in_place, hidden_change, swapped])
def test_a_file_that_changed_since_it_was_remembered_is_hashed_again(change, remembering, own, edit, tmp_path):
    rp.export(edit, own, tmp_path / "first")
    change(own / open_shards(own).files[0])
    the_hashes_are_those_of_the_files(own, edit, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "fields"), [(hidden_change, ("st_dev", "st_ino", "st_size", "st_mtime_ns")), (swapped, ("st_size", "st_mtime_ns"))]
)  # fmt: skip
def test_remembering_a_file_by_less_than_its_state_is_caught(
    change, fields, remembering, own, edit, tmp_path, monkeypatch
):
    def state(path):
        return tuple(getattr(path.stat(), field) for field in fields)

    for module in (known_hashes, streaming):
        monkeypatch.setattr(module, "settled_state", state)
    rp.export(edit, own, tmp_path / "first")
    change(own / open_shards(own).files[0])
    with pytest.raises(AssertionError):
        the_hashes_are_those_of_the_files(own, edit, tmp_path / "out")


def test_a_file_that_changed_a_moment_ago_is_not_remembered(own, edit, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "SETTLED", 60)
    rp.export(edit, own, tmp_path / "out")
    assert not any(known_file(own / name) for name in open_shards(own).files)


def test_a_file_that_changes_while_it_is_read_is_not_remembered(remembering, own, monkeypatch):
    path = own / open_shards(own).files[0]
    state = known_hashes.settled_state(path)
    in_place(path)
    known_hashes.remember(path, state, known_hashes.KnownFile("0" * 64))
    assert known_file(path) is None


def test_a_number_that_is_not_finite_is_found_again(remembering, own, edit, tmp_path):
    file = own / open_shards(own).files[0]
    name, entry = max(open_shards(own).entries.items(), key=lambda item: (item[1].file == file.name, item[1].stop))
    with open(file, "r+b") as data:
        data.seek(entry.stop - entry.spec.dtype.itemsize)
        data.write(torch.full((1,), float("nan"), dtype=entry.spec.dtype).view(torch.uint8).numpy().tobytes())
    for out in ("first", "second"):
        with pytest.raises(NotFinite, match=re.escape(name)):
            rp.export(edit, own, tmp_path / out)
    assert known_file(file) is None


def test_without_a_cache_nothing_is_remembered(remembering, own, edit, tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "file" / "cache"))
    the_hashes_are_those_of_the_files(own, edit, tmp_path / "out")
    assert known_file(own / open_shards(own).files[0]) is None and not recwarn.list


def in_cache(source, cache):
    """A snapshot of a model as the hub's client keeps it: blobs that are named by their hash, and then links to them."""
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123456789"
    (repository / "blobs").mkdir(parents=True), snapshot.mkdir(parents=True)
    for path in source.iterdir():
        shutil.copyfile(path, repository / "blobs" / sha(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{sha(path)}")
    return snapshot


# --- Manifests of other versions


def test_a_manifest_that_names_no_algorithm_has_sha256(exported):
    path = exported / "repedit.json"
    path.write_text(path.read_text().replace('"hash": "sha256",', ""))
    assert "hash" not in read_manifest(exported)[0]
    assert verification(exported).whole


def test_a_manifest_with_another_algorithm_is_refused(exported):
    path = exported / "repedit.json"
    path.write_text(path.read_text().replace('"hash": "sha256"', '"hash": "sha999"'))
    with pytest.raises(
        CheckpointError, match=r"hashes of the algorithm 'sha999', this version of repedit computes sha256"
    ):
        verification(exported)


def test_threads_follow_the_grad_mode_of_the_caller(source, edit, tmp_path, monkeypatch):
    modes, shard = [], pool._shard
    monkeypatch.setattr(pool, "_shard", lambda *a: (modes.append(torch.is_grad_enabled()), shard(*a))[1])
    with torch.no_grad():
        rp.export(edit, source, tmp_path / "out", workers=2)
    assert modes == [False] * 3


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_numbers(source, edit, tmp_path):
    rp.export(edit, source, tmp_path / "out", workers=np.int64(2))
    with pytest.raises(ArgumentError, match="multiple=True"):
        rp.export(edit, source, tmp_path / "slim", structure="slim", multiple=True)


@pytest.mark.parametrize("size", ["5 bananas", "", "0GB", 0, -1, None, True, 1.5, "-1GB"])
@pytest.mark.usefixtures("unchecked")
def test_a_size_of_shards_that_is_none_is_refused(size, source, edit, tmp_path):
    with pytest.raises(
        ArgumentError, match=r"max_shard_size.*(give a size such as '5GB'|where a whole number or a str is needed)"
    ):
        rp.export(edit, source, tmp_path / "out", max_shard_size=size)
