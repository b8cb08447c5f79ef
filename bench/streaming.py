"""Export of edited checkpoints: CPU, time and memory against cp and save_pretrained; what a kill leaves; a plan from headers.

`python -m bench.streaming --part smollm2` edits the real model, in turn with what one would write by hand;
`--part large` a generated checkpoint of 3.6 GB in eight shards, all of which are touched, in turn with cp, with cp and a
sha256 of both sides, with cp and fsync, and without hashes or certificates; `--cold` drops the source from the page cache
before each run. "stream" begins with an empty cache, "stream again" remembers the source from an earlier export.
`--part floor` measures each operation that the guarantees of an export of the default model need, alone. `--part hashes` compares algorithms of hashes. `--part kill` kills 50 exports at random points, some of which go on where
others were; `--part plan` plans for a checkpoint of the shape of Llama-70B, as sparse files. Each mode runs in a process of
its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.checkpoints import LLAMA_3B, LLAMA_70B, llama
from bench.record import record
from bench.timing import cpu
from repedit.distributed import usable_cores
from repedit.io.checkpoint import open_shards
from repedit.io.files import file_hash
from repedit.io.known_hashes import SETTLED
from repedit.io.safetensors import Entry, raw_bytes
from repedit.linear_maps import not_finite_at
from repedit.lower import lower

_SCRIPT = """
import json, resource, subprocess, sys, time
sys.argv, mode, source, target, edit = sys.argv[:1], *sys.argv[1:]
if not mode.startswith("cp"):
    import torch, transformers, repedit as rp
    from repedit.edit import Edit
    from repedit.rewrite.export import dry_run, export
    torch.set_num_threads(1)
if mode == "save_pretrained":
    from bench.by_hand import load_edit_save
    from transformers import AutoModelForCausalLM, LlamaForCausalLM
both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
spent = lambda: sum(sum(resource.getrusage(who)[:2]) for who in both)
change = None if mode.startswith("cp") else Edit.load(edit)
if mode.startswith("stream"):
    dry_run(change, source)  # what it imports is not what it costs
base, start, wall = peak(), spent(), time.time()
if mode == "stream without hashes":
    from types import SimpleNamespace
    from repedit.rewrite import manifest, streaming
    manifest.file_hash = streaming.file_hash = lambda path: "0" * 64
    unhashed = SimpleNamespace(update=lambda data: None, hexdigest=lambda: "0" * 64)
    unhashed.copy = lambda: unhashed
    streaming.hashlib = SimpleNamespace(sha256=lambda data=b"": unhashed)
if mode == "stream without certificates":
    from repedit.rewrite import streaming
    streaming.certified = lambda *arguments: None
if mode.startswith("stream"):
    workers = 1 if mode == "stream with one worker" else None
    export(change, source, target, link=False, allow_identity=mode == "stream without hashes", workers=workers)
elif mode == "load-edit-save":
    subject = rp.apply(change, rp.load(source))
    subject.model.save_pretrained(target)
elif mode == "save_pretrained":
    load_edit_save(change, source, target)
elif mode == "plan":
    dry_run(change, source)
else:
    subprocess.run(["cp", "-rL", source, target], check=True)
    if mode == "cp and fsync":
        import os, pathlib
        for path in pathlib.Path(target).iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if mode == "cp with hashes":
        import hashlib, pathlib
        for path in (*pathlib.Path(source).iterdir(), *pathlib.Path(target).iterdir()):
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256")
print(json.dumps({"peak_mb": 0.0 if mode.startswith("cp") else (peak() - base) / 1e6, "cpu_s": spent() - start, "wall_s": time.time() - wall}))
"""
KILLS, ROUNDS = 50, 3
NOTE = (
    "stream includes a sha256 of every file of the source and the target and of every touched tensor before and after, "
    "certificates, and fsync; cp has none of them, cp with hashes has a sha256 of every file of the source and the target"
)


def run(mode: str, source: Path, edit: Path, *, cold: bool = False) -> dict[str, float]:
    """One mode in a fresh process, once nothing waits to be written; with `cold` the source is not in the page cache."""
    os.sync()
    for path in filter(Path.is_file, source.iterdir()) if cold else ():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    with tempfile.TemporaryDirectory(dir=edit.parent) as folder:
        command = [sys.executable, "-c", _SCRIPT, mode, str(source), f"{folder}/out", str(edit)]
        cache = edit.parent / "cache" if mode == "stream again" else Path(folder) / "cache"
        options = os.environ | {"REPEDIT_CACHE": str(cache)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=options)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def smollm2(folder: Path, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """The real model, with pruned neurons in every third layer."""
    source, edit = smollm2_edit(folder)
    modes = (
        "cp",
        "cp with hashes",
        "cp and fsync",
        "stream",
        "stream again",
        "stream without hashes",
        "save_pretrained",
    )
    return _compared(source, edit, modes, rounds=rounds, cold=cold)


def large(folder: Path, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """16 directions removed from everything that writes the stream: a third of all bytes, in every shard."""
    source = llama(folder / "source", **LLAMA_3B, shard_bytes=500_000_000)
    parts = ("stream again", "stream with one worker", "stream without hashes", "stream without certificates")
    modes = ("cp", "cp with hashes", "cp and fsync", "stream", *(() if cold else parts))
    return _compared(source, projection_edit(folder, LLAMA_3B), modes, rounds=rounds, cold=cold)


def hashes(folder: Path, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """CPU of a hash of 64 MB in memory, in turn."""
    data = random.Random(0).randbytes(1 << 26)
    algorithms: dict[str, Callable[[bytes], Any]] = {"sha256": hashlib.sha256, "blake2b": hashlib.blake2b}
    with suppress(ImportError):
        algorithms["blake3"] = importlib.import_module("blake3").blake3
    seconds = [{name: cpu(lambda: hash_of(data)) for name, hash_of in algorithms.items()} for _ in range(rounds)]  # noqa: B023
    return [
        {
            "name": name,
            "gb_per_cpu_s": len(data) / 1e9 / statistics.median(each[name] for each in seconds),
            "ratio_to_sha256": statistics.median(each[name] / each["sha256"] for each in seconds),
        }
        for name in algorithms
    ]


def floor(folder: Path, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """CPU of each operation that an export of the default model cannot do without, alone and in turn; pieces of 1 MB."""
    source, edit = smollm2_edit(folder)
    files = [source / name for name in open_shards(source).files]
    touched = _touched(source, edit)
    entries = {name: entry for name, entry in open_shards(source).entries.items() if name in touched}
    seconds = [_operations(files, entries, source, folder) for _ in range(rounds)]
    peers = [run("save_pretrained", source, edit)["cpu_s"] for _ in range(rounds)]
    limit = statistics.median(peers)
    rows = [
        {"name": name, "rounds": rounds, "cpu_s": (value := statistics.median(each[name] for each in seconds)), "ratio": value / limit}
        for name in seconds[0]
    ]  # fmt: skip
    return [*rows, {"name": "save_pretrained", "rounds": rounds, "cpu_s": limit, "ratio": 1.0}]


def _operations(files: list[Path], entries: dict[str, Entry], source: Path, folder: Path) -> dict[str, float]:
    """Seconds of CPU by operation."""
    piece = bytearray(1 << 20)

    def pieces() -> Iterator[memoryview]:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(piece):
                    yield memoryview(piece)[:count]

    def write() -> None:
        with open(folder / "copy", "wb", buffering=0) as out:
            for _ in pieces():
                for start in range(0, len(piece), 1 << 18):
                    out.write(memoryview(piece)[start : start + (1 << 18)])
        (folder / "copy").unlink()

    def hashed(new: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            digest = new()
            for data in pieces():
                digest.update(data)

        return run

    values = [open_shards(source).read(name) for name in entries]
    read = cpu(lambda: deque(pieces(), maxlen=0))
    found = {"read": read, "write": cpu(write) - read, "sha256 of all bytes": cpu(hashed(hashlib.sha256)) - read}
    with suppress(ImportError):
        found["blake3 of all bytes"] = cpu(hashed(importlib.import_module("blake3").blake3)) - read
    found["sha256 of changed tensors, before and after"] = 2 * cpu(
        lambda: [hashlib.sha256(raw_bytes(value)) for value in values]
    )
    words = torch.frombuffer(piece, dtype=torch.float32)
    count = sum(path.stat().st_size for path in files) // len(piece)
    found["numbers are finite"] = cpu(lambda: [not_finite_at(words) for _ in range(count)])
    return found


def _touched(source: Path, edit: Path) -> set[str]:
    """The tensors that an edit changes."""
    lm = rp.load(source)
    return set(lower(rp.Edit.load(edit), lm.architecture, lm.specs).rewritten)


def plan(folder: Path, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """Only headers are there to be read."""
    source = llama(folder / "source", **LLAMA_70B, shard_bytes=5_000_000_000, sparse=True)
    found = run("plan", source, projection_edit(folder, LLAMA_70B))
    shards = open_shards(source)
    sizes = {"tensors": len(shards.entries), "files": len(shards.files)}
    return [{"name": "plan of 70B", "gb": sum(s.nbytes for s in shards.specs.values()) / 1e9, **sizes, **found}]


def kill(folder: Path, cold: bool, rounds: int) -> list[dict[str, Any]]:
    """SIGKILL at random points of an export; the same export is tried again, over what the kill left, until it ends."""
    source, path = smollm2_edit(folder)
    edit, rng = rp.Edit.load(path), random.Random(0)
    rp.export(edit, source, folder / "whole", link=False)
    whole, out, length = _content(folder / "whole"), folder / "out", 10.0
    found = {"absent": 0, "whole": 0, "broken": 0, "ended before the kill": 0}
    while found["absent"] + found["whole"] + found["broken"] < KILLS:
        start = time.time()
        killed = _killed(rng.uniform(0, length), edit, source, out)
        state = "absent" if not out.exists() else "whole" if _content(out) == whole else "broken"
        if not killed:
            length = min(length, time.time() - start)
            state = "ended before the kill" if state == "whole" else "broken"
        found[state] += 1
        if out.exists():
            _remove(out)
    rp.export(edit, source, out, link=False)
    last = "whole" if _content(out) == whole else "broken"
    left = [p.name for p in folder.glob(".out.partial-*")]
    status = "pass" if not found["broken"] and last == "whole" and not left else "fail"
    return [
        {
            "name": "kill",
            "kills": KILLS,
            "seconds": length,
            **found,
            "export after them": last,
            "left": left,
            "status": status,
        }
    ]


def _killed(after: float, edit: rp.Edit, source: Path, out: Path) -> bool:
    """Export in a child that is killed after so many seconds; whether it was still running."""
    child = multiprocessing.get_context("fork").Process(
        target=rp.export, args=(edit, source, out), kwargs={"link": False}
    )
    child.start()
    child.join(after)
    if child.pid is not None and child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode == -signal.SIGKILL


BARS = {
    "save_pretrained": [("cpu_s", 0.8)],
    "cp": [("cpu_s", 2.5), ("wall_s", 2.0)],
    "cp with hashes": [("cpu_s", 2.5), ("wall_s", 2.0)],
    "cp and fsync": [("wall_s", 2.0)],
}
"""What an export may cost, as a multiple of what the other costs in the same round."""
COLD = 1.5
"""The same for the time of a source that is not in the page cache."""


def _compared(
    source: Path, edit: Path, modes: tuple[str, ...], rounds: int, *, cold: bool = False
) -> list[dict[str, Any]]:
    """Medians of every mode over rounds that take the modes in shuffled order, and ratios within a round."""
    time.sleep(max(0.0, 1 + SETTLED - (time.time() - max(path.stat().st_ctime for path in source.iterdir()))))
    for mode in ("cp", "stream again"):
        run(mode, source, edit)  # from here on the files are in the page cache, and remembered
    rng = random.Random(0)
    orders = [rng.sample(modes, len(modes)) for _ in range(rounds)]
    found = [{mode: run(mode, source, edit, cold=cold) for mode in order} for order in orders]
    rows = []
    for mode in modes:
        of = {key: [each[mode][key] for each in found] for key in ("peak_mb", "cpu_s", "wall_s")}
        rows.append({"name": mode, "rounds": rounds, **{key: statistics.median(v) for key, v in of.items()}})
    for name in ("stream", "stream again"):
        mine = next((row for row in rows if row["name"] == name), None)
        if mine is not None:
            mine |= _bars(name, found, source, modes, cold)
    print(json.dumps(rows, indent=1), flush=True)
    return rows


def _bars(
    name: str, found: list[dict[str, dict[str, float]]], source: Path, modes: tuple[str, ...], cold: bool
) -> dict[str, Any]:
    """What one mode cost as a multiple of others in the same round, against the bars."""
    mine: dict[str, Any] = {}
    workers = min(usable_cores(), len(open_shards(source).files))
    limit, peak = memory_limit(source, workers), max(each[name]["peak_mb"] for each in found)
    bar = f"peak <= 4 x largest tensor x {workers} workers + 64 MB = {limit:.0f} MB"
    mine["memory"] = {"bar": bar, "most": peak, "status": "pass" if peak <= limit else "fail"}
    small = sum(spec.nbytes for spec in open_shards(source).specs.values()) < 1e9  # where most of it is a fixed cost
    for peer in (peer for peer in BARS if peer in modes):
        for key, least in BARS[peer]:
            bar_of = COLD if cold and key == "wall_s" else least
            ratios = [each[name][key] / each[peer][key] for each in found]
            sure = {ratio <= bar_of for ratio in ratios}
            status = "not resolved" if len(sure) > 1 else "pass" if sure == {True} else "fail"
            row = {"bar": f"<= {bar_of} x {peer}", "ratios": ratios, "median": statistics.median(ratios)}
            mine[f"{key} / {peer}"] = row | {"status": "recorded" if small and peer.startswith("cp") else status}
    return mine


def memory_limit(source: Path, workers: int = 1) -> float:
    """Megabytes above the imports that an export may take: 4 x the largest tensor for each worker + 64."""
    return 4 * workers * max(spec.nbytes for spec in open_shards(source).specs.values()) / 1e6 + 64


def smollm2_edit(folder: Path) -> tuple[Path, Path]:
    """The default model's directory, and an edit that prunes neurons in every third layer."""
    from repedit.models.default_model import cached

    sites = [rp.Site.parse(f"{layer}.mlp.neurons") for layer in range(0, 30, 3)]
    keep = torch.rand(1536, generator=torch.Generator().manual_seed(0)) > 0.05
    path = folder / "edit.safetensors"
    rp.Edit({site: rp.Diagonal.mask(keep) for site in sites}, {"method": "bench"}).save(path)
    return cached(), path


def projection_edit(folder: Path, shape: dict[str, int]) -> Path:
    """An edit that takes 16 directions out of everything that writes the stream."""
    basis = torch.randn(shape["d"], 16, generator=torch.Generator().manual_seed(0))
    sites = [rp.Site.parse(f"{layer}.{point}") for layer in range(shape["layers"]) for point in ("attn.out", "mlp.out")]
    path = folder / "edit.safetensors"
    rp.Edit(dict.fromkeys(sites, rp.LowRank.projection(basis)), {"method": "bench"}).save(path)
    return path


def _content(folder: Path) -> dict[str, str]:
    return {path.name: file_hash(path) for path in folder.iterdir()}


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


PARTS: dict[str, Callable[[Path, bool, int], list[dict[str, Any]]]] = {
    "smollm2": smollm2,
    "large": large,
    "floor": floor,
    "hashes": hashes,
    "kill": kill,
    "plan": plan,
}


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=__doc__)
    parser.add_argument("--part", choices=PARTS, default="smollm2")
    parser.add_argument("--cold", action="store_true", help="The source is not in the page cache.")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = PARTS[given.part](Path(folder), given.cold, given.rounds)
    print(json.dumps(rows, indent=1))
    print(record(f"streaming-{given.part}{'-cold' if given.cold else ''}", rows, module="streaming", seed=0, note=NOTE))


if __name__ == "__main__":
    main()
