"""repedit beside others on this machine: one table of ratios, bench/results/peers.json and figures/bench.png.

Run as `make bench` or `python -m bench`: ten to fifteen minutes on two cores; `--full` adds what takes long. A ratio is
what the other costs over what ours costs on the same input, so above 1 ours costs less. It is the median of rounds in
which both run in shuffled order, with the 20 and 80 % quantiles. "not resolved": the quantiles, or ours against itself,
spread over the bar. "missed" is a miss; what is not installed is "skipped" with how to install it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.peers import PARTS
from bench.peers_figure import draw
from bench.record import record
from bench.streaming import NOTE as EXPORTS

PEERS = ("concept-erasure", "scikit-learn", "scipy", "safetensors")
NOTE = f"median, q20 and q80 are theirs over ours on the same input, control is ours over ours; rp.export: {EXPORTS}"
TAKER = {"taker": "1.2.3", "welford-torch": "0.2.5"}


def measured(part: str, full: bool) -> list[dict[str, Any]]:
    """The rows of one part, from a process of its own; a part that breaks is a row that says how."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.peers", part, "--out", str(out), *(["--full"] if full else [])]
        single = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, env=single, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            rows = [{"ours": part, "peer": "", "what": "", "bar": None, "status": f"failed: {last}"}]
        else:
            rows = json.loads(out.read_text())
    load = round(os.getloadavg()[0], 2)
    print(f"{part}: {len(rows)} rows, {time.time() - start:.0f} s, load {load}", flush=True)
    return [{"part": part, **row, "load": load} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row."""
    lines = ["| ours | against | what | theirs / ours | 20 to 80 % | bar | |", "|---" * 7 + "|"]
    for row in rows:
        ratio, spread = ("", "")
        if "median" in row:
            ratio, spread = _short(row["median"]), f"{_short(row['q20'])} to {_short(row['q80'])}"
        bar = "" if row["bar"] is None else f">= {row['bar']:g}"
        cells = (row["ours"], row["peer"], row["what"], ratio, spread, bar, row["status"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"


def versions() -> dict[str, str]:
    """Of the peers; taker is read from the folder it is installed to."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    folder = Path(__file__).parents[1] / ".cache" / "peers"
    for name, asked in TAKER.items():
        present = (folder / f"{name.replace('-', '_')}-{asked}.dist-info").exists()
        found[name] = asked if present else "absent"
    return found


def main() -> int:
    """Measure every part; 1 if one broke."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="3.6 GB of checkpoint, wider covariances, more rounds.")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help="Some of them, joined by commas; nothing is written then."
    )
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    start = time.time()
    rows = [row for part in parts for row in measured(part, options.full)]
    print(table(rows))
    broken = [row for row in rows if row["status"].startswith("failed")]
    if set(parts) != set(PARTS) or broken:
        print("Nothing is written: " + ("a part broke." if broken else "only some parts were measured."))
        return 1 if broken else 0
    minutes = round((time.time() - start) / 60, 1)
    path = record("peers", rows, module="", seed=0, peers=versions(), minutes=minutes, note=NOTE)
    print(f"{path}\n{draw(path)}\n{minutes} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
