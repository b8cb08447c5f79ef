"""Several gloo processes on this machine that run one function together, and what each of them returns."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SECONDS = 300
"""How long the ranks may take."""
# Imports take most of the time of a fresh process; the server makes them once and every rank is a fork of it.
CONTEXT = torch.multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.unlearning_cases", "repedit", "torch.distributed.fsdp", "torch.distributed.tensor"]
)


def together(function: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """What `function(*args)` returns on each rank; it must be importable.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(target=_run, args=(rank, size, port, folder, function, args), daemon=True)
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(SECONDS)
        finally:
            for process in ranks:
                process.kill()
        files = [Path(folder, str(rank)) for rank in range(size)]
        found = [torch.load(path, weights_only=False) if path.exists() else ("no answer", None) for path in files]
    for error, _ in found:
        if error:
            raise RuntimeError(error)
    return [value for _, value in found]


def _run(rank: int, size: int, port: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """As torchrun starts a process: its place in the environment, no process group yet."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        torch.save(("", function(*args)), Path(folder, str(rank)))
    except BaseException:
        torch.save((traceback.format_exc(), None), Path(folder, str(rank)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
