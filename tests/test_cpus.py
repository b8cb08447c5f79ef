"""The numeric tests are run under no capability that the CPU lacks: torch would enter it, and stop at an illegal instruction."""

import os
import subprocess
import sys

import pytest

from tests.cpus import capabilities, widest_capability


@pytest.mark.parametrize(
    ("widest", "expected"),
    [
        ("default", ["default"]),
        ("avx2", ["default", "avx2"]),
        ("avx512", ["default", "avx2", "avx512"]),
        ("sve256", ["default", "sve256"]),
    ],
)
def test_a_cpu_has_what_stands_before_its_widest(widest, expected):
    assert capabilities(widest) == expected


def test_a_wish_does_not_change_what_the_cpu_has(monkeypatch):
    honest = widest_capability()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx512" if honest != "avx512" else "default")
    assert widest_capability() == honest
    ask = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    wished = subprocess.run(ask, env=os.environ, capture_output=True, text=True, check=True).stdout.strip().lower()
    assert wished != honest  # the broken twin: asked with the wish in place, torch repeats it
