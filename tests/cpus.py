"""Run the numeric tests under every ATEN_CPU_CAPABILITY that this CPU has, with 1 and 2 threads: a line each.

python -m tests.cpus [capability,threads ...]      such as avx512,2; all of them by default
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tolerances import TABLE

X86 = ("default", "avx2", "avx512")
"""Each CPU that has one has those before it; others have their own beside the default."""
MARKED = [str(p) for p in sorted(Path("tests").rglob("test_*.py")) if "mark.numeric" in p.read_text()]
PARTS = [[p for p in MARKED if ("kernels" in p) == kernels] for kernels in (False, True)]
"""Triton's interpreter wants a process of its own."""


def capabilities(widest: str) -> list[str]:
    """Those that a CPU of this widest one has.

    torch obeys a wish without asking the CPU, which then stops at its first unknown instruction: the widest is asked for
    in a process that wishes nothing.
    """
    return list(X86[: X86.index(widest) + 1]) if widest in X86 else ["default", widest]


def widest_capability() -> str:
    """What torch chooses by itself on this CPU."""
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    return subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.strip().lower()


def tried(capability: str, threads: int) -> bool:
    """Run the tests, print their line, and all of their output where one failed."""
    begun, counts, shares, ok = time.time(), [], {}, True
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(PARTS):
            written = Path(folder) / f"{number}.json"
            environment = os.environ | {
                "ATEN_CPU_CAPABILITY": capability,
                "REPEDIT_TEST_THREADS": str(threads),
                "OMP_WAIT_POLICY": "passive",
                "REPEDIT_TEST_SHARES": str(written),
            }
            command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric and not slow and not gpu", *part]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            ok = ok and run.returncode == 0
            if run.returncode:
                print(run.stdout, run.stderr, sep="\n")
            counts.append((run.stdout.strip().splitlines() or ["no output"])[-1].split(" in ")[0])
            for name, share in (json.loads(written.read_text()) if written.exists() else {}).items():
                shares[name] = max(share, shares.get(name, 0.0))
    worst = max(shares, key=lambda name: shares[name], default=None)
    near = (
        ""
        if worst is None
        else f"; nearest to its limit: {worst}, {shares[worst] * TABLE[worst].limit:.1e} of {TABLE[worst].limit:.0e}"
    )
    print(
        f"{capability}, {threads} thread{'s' * (threads > 1)}: {' and '.join(counts)} in {time.time() - begun:.0f} s{near}",
        flush=True,
    )
    if os.environ.get("REPEDIT_TEST_TABLE"):
        for name, share in sorted(shares.items()):
            print(f"    {name}: {share * TABLE[name].limit:.1e} of {TABLE[name].limit:.0e}")
    return ok


def main(wishes: list[str]) -> int:
    """0 where every combination passed."""
    here = capabilities(widest_capability())
    pairs = [wish.split(",") for wish in wishes] or [[name, n] for name in here for n in ("1", "2")]
    print(f"this CPU has {', '.join(here)}", flush=True)
    passed = [tried(name, int(threads)) for name, threads in pairs if name in here]
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
