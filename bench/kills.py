"""SIGKILL at random points of a training, of a run and of an audit: the same command, again, ends with the same result.

Each job is killed 50 times. After a kill the same job starts over what was left, and is killed again, until one ends by
itself; then what it wrote is compared with that of a job nobody disturbed, to the byte but for durations, and the next
round begins in an empty folder. `python -m bench.streaming --part kill` does the same to an export.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import repedit as rp
from bench.record import record
from repedit.cli import app
from repedit.io.files import file_hashes

KILLS = 50
RUN = """
model = "../model"

[[step]]
verb = "score"
limit_tokens = 400
out = "scores.safetensors"

[[step]]
verb = "prune"
fraction = 0.1
limit_tokens = 400
out = "edit.safetensors"

[[step]]
verb = "apply"
edit = "edit.safetensors"
verify = false
out = "edited"

[[step]]
verb = "unlearn"
forget = "../facts.jsonl"
recipe = "grad_diff"
steps = 4
set = ["batch_size=4", "lr=1e-3"]
resume = "training"
out = "delta.safetensors"

[[step]]
verb = "diff"
base = "../model"
edited = "edited"
"""


def model(folder: Path, seed: int) -> Path:
    """A tiny random Llama with a tokenizer of bytes."""
    torch.manual_seed(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(("<pad>", "<s>", *letters))}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def facts(path: Path, count: int = 24) -> None:
    """Facts to forget and to retain, in a file."""
    sides = [(f, "forget") for f in rp.data.facts("capitals").forget[:count]]
    sides += [(f, "retain") for f in rp.data.facts("symbols").forget[:count]]
    rows = ({"id": f.id, "prompt": f.prompt, "answer": f.answer, "role": r, "domain": f.domain} for f, r in sides)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def unlearn() -> None:
    """48 steps; the state is saved every 20."""
    app(
        ["unlearn", "../model", "--forget", "../facts.jsonl", "--recipe", "grad_diff", "--steps", "48", "--set", "batch_size=4", "--set", "lr=1e-3",
         "--resume", "training", "--log", "log.jsonl", "--out", "delta.safetensors"],
        standalone_mode=False,
    )  # fmt: skip


def run() -> None:
    """Five steps, of which one trains."""
    Path("run.toml").write_text(RUN)
    app(["run", "run.toml"], standalone_mode=False)


def audit() -> None:
    """Three attacks on two models."""
    app(
        ["audit", "../other", "--original", "../model", "--facts", "../facts.jsonl", "--attacks", "direct,strip,paraphrase", "--allow-small",
         "--sites", "1.mlp.out", "--out", "audit"],
        standalone_mode=False,
    )  # fmt: skip


JOBS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "unlearn": (unlearn, ("delta.safetensors", "log.jsonl")),
    "run": (run, ("scores.safetensors", "edit.safetensors", "edited", "delta.safetensors")),
    "audit": (audit, ("audit/audit.json", "audit/findings")),
}
"""Job -> (what carries it out in the folder where the process stands, what it writes)."""


def killed(name: str, folder: Path, kills: int) -> dict[str, Any]:
    """Kill a job so many times; how often what it wrote in the end was that of an undisturbed one."""
    job, outs = JOBS[name]
    rng, start = random.Random(0), time.time()
    _in_child(job, folder / "whole", None)
    length = time.time() - start
    whole = written(folder / "whole", outs)
    count, rounds, same, differ = 0, 0, 0, set[str]()
    while count < kills or (folder / "killed").exists():
        late = None if count >= kills else rng.uniform(0, length)
        if _in_child(job, folder / "killed", late):
            now = written(folder / "killed", outs)
            rounds, same = rounds + 1, same + (now == whole)
            differ |= {part for part in {*now, *whole} if now.get(part) != whole.get(part)}
            shutil.rmtree(folder / "killed")
        else:
            count += 1
    status = "pass" if same == rounds and whole and count >= kills else "fail"
    return {
        "name": name,
        "kills": count,
        "finished": rounds,
        "same": same,
        "differ": sorted(differ),
        "seconds": round(length, 1),
        "status": status,
    }


def written(folder: Path, outs: tuple[str, ...]) -> dict[str, str]:
    """Hashes of what a job wrote; of JSON the text, without durations and the cost that holds them."""
    found = {}
    for out in outs:
        for part, digest in file_hashes(folder / out).items():
            path = folder / out / part if part else folder / out
            plain = path.suffix in (".json", ".jsonl")
            # The hash that a stored finding carries covers its duration.
            volatile = "seconds|run|sha256" if "findings" in path.parts else "seconds|run"
            found[f"{out}/{part}"] = re.sub(rf'"({volatile})": [^,}}\n]*', "", path.read_text()) if plain else digest
    return found


def _in_child(job: Callable[[], None], folder: Path, after: float | None) -> bool:
    """Carry a job out in a forked process that is killed after so many seconds; whether it ended by itself."""
    folder.mkdir(exist_ok=True)
    child = multiprocessing.get_context("fork").Process(target=_quietly, args=(job, folder))
    child.start()
    child.join(after)
    if child.pid is not None and child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    if child.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{job.__name__} ended with {child.exitcode}: {(folder / 'stderr').read_text()[-3000:]}")
    return child.exitcode == 0


def _quietly(job: Callable[[], None], folder: Path) -> None:
    os.chdir(folder)
    os.environ["REPEDIT_CACHE"] = str(folder / "cache")
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    try:
        job()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(0 if job is audit else int(end.code or 0))
    except BaseException as error:
        code = getattr(error, "exit_code", None)  # an audit ends with the code of its verdict
        if job is not audit or code is None:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    os._exit(0)


def main() -> None:
    """Kill, compare, record."""
    parser = argparse.ArgumentParser(prog="python -m bench.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--jobs", default=",".join(JOBS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.jobs.split(","):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model(folder / "model", 0)
            model(folder / "other", 1)
            facts(folder / "facts.jsonl")
            rows.append(killed(name, folder, given.kills))
        print(rows[-1], flush=True)
    if given.kills >= KILLS and set(given.jobs.split(",")) == set(JOBS):
        print(record("kills", rows, seed=0))


if __name__ == "__main__":
    main()
