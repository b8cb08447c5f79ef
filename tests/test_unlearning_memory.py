"""What a step of BLUR takes in memory beside a step of the plain difference."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import sys, torch
from dataclasses import replace
import repedit as rp
from repedit.unlearning.combiners import weighted_sum
from tests.teachable_models import blank
from tests.unlearning_cases import sides
torch.set_num_threads(1)
lm = blank("llama", hidden_size=768, intermediate_size=2304, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=8)
# A child begins with the ru_maxrss of its parent; this is its own.
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
base = peak()
recipe = {"sum": rp.recipes.grad_diff(combiner=weighted_sum(1.0, 1.0, separate=False)), "pair": rp.recipes.grad_diff(),
          "blur": rp.recipes.blur_ga()}[sys.argv[1]]
from tests.unlearning_cases import training
run = training(replace(recipe, steps=2, batch_size=4, lr=1e-4), lm, clip=1.0, **sides())
run.run(after_step=lambda: None, progress=False)
size = sum(p.nbytes for p in lm.model.parameters()) / 1024
print(peak() - base, size)
"""


def taken(kind: str) -> tuple[float, float]:
    """(what a training takes beside the model, size of the model), in KB."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT, kind], capture_output=True, text=True, check=True)
    extra, size = map(float, done.stdout.split()[-2:])
    return extra, size


@pytest.mark.slow
def test_blur_takes_at_most_a_quarter_more():
    """Weights, model in training, two moments and one gradient against one gradient more: measured 1.19."""
    (plain, size), (blur, _) = taken("sum"), taken("blur")
    assert plain > 3.5 * size, "the measurement misses what training takes"
    assert (blur + size) / (plain + size) <= 1.25
