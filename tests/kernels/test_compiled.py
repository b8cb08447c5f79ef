"""What the assembler makes of every kernel, without a GPU: no spills, wide loads, tensor instructions, known registers.

The compiler runs in processes of its own, without the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "bench/results/kernels-compiled.json").read_text())
TABLE = {(row["sm"], row["case"]): row for row in RECORDED["rows"]}


@cache
def compiled(sm: int, *options: str) -> dict[str, dict]:
    """Rows of `bench.kernels` for one architecture, by case."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels", "--print", "--sm", str(sm), *options]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    return {row["case"]: row for row in map(json.loads, out.stdout.splitlines())}


@pytest.mark.parametrize(("sm", "case"), TABLE, ids=lambda value: str(value))
def test_every_kernel_passes_the_gate(sm, case):
    assert compiled(sm)[case]["problems"] == []


@pytest.mark.parametrize(("sm", "case"), TABLE, ids=lambda value: str(value))
def test_registers_are_those_on_record(sm, case):
    if triton.__version__ != RECORDED["triton"]:
        pytest.skip(f"the record was made with triton {RECORDED['triton']}")
    assert compiled(sm)[case]["registers"] == pytest.approx(TABLE[sm, case]["registers"], rel=0.1)


@pytest.mark.parametrize("sm", [80, 90])
def test_a_tile_of_twice_the_rows_does_not_pass(sm):
    (row,) = compiled(sm, "--oversized").values()
    assert row["problems"] and row["problems"][0].startswith("spills: stack")
