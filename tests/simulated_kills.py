"""A process that is gone at its k-th write, with no clean-up, as after `kill -9`."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.chmod")


def dies(k: int, run: Callable[[], object], below: Path) -> bool:
    """Run in a forked child that ends just before the k-th change it makes below a folder; whether it got to the end."""
    child = os.fork()
    if not child:
        count = itertools.count(1)

        def watch(event: str, args: tuple[object, ...]) -> None:
            writes = event == "open" and isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
            if (writes or event in CHANGES) and str(args[0]).startswith(str(below)) and next(count) == k:
                os._exit(9)

        sys.addaudithook(watch)
        try:
            run()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), f"the child ended with {status}"
    return status == 0


def each_kill(run: Callable[[], object], below: Path) -> Iterator[int]:
    """Kill a job before its first change, its second, and so on, until it ends by itself; yields after every kill."""
    for k in itertools.count(1):
        if dies(k, run, below):
            return
        yield k
