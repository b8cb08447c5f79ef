"""The public names, and that importing them costs nothing."""

import subprocess
import sys

import repedit as rp

NAMES = {
    "Activity", "AffineMap", "Certificate", "Chain", "CollinearWarning", "ContinualMRP", "CrossMoments", "Diagonal",
    "Delta", "Edit", "LowRank", "MRPConfig", "Moments", "Plan", "Point", "Report", "Score", "Scores", "Site", "Step", "Subject",
    "Trajectory", "agreement", "apply", "audit", "audit_classifier", "certificate", "check_architecture", "collect", "compare", "diff",
    "erase_stream", "export", "export_adapter", "facts_accuracy", "fetch", "gguf_check", "lens_hooks", "load", "max_activating", "mrp", "peaks", "predictions", "prune", "push",
    "random_like", "register", "reload_check", "resolve", "score", "sliced", "slimmed", "to_lens", "to_nnsight", "top", "trajectory", "unlearn", "wrap",
}  # fmt: skip
ROOMS = {"arch", "data", "errors", "explore", "fit", "metrics", "plot", "recipes", "report", "vision"}
HEAVY = ("torch", "transformers", "transformer_lens", "nnsight", "matplotlib", "plotly", "scipy")


def loaded_by(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after running some code."""
    script = f"import sys\n{code}\nprint('loaded', *(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.strip().splitlines()[-1].split()[1:])


def test_public_names_are_pinned():
    assert set(rp.__all__) == NAMES | ROOMS | {"__version__"}


def test_every_public_name_is_there():
    for name in NAMES | ROOMS:
        assert getattr(rp, name) is not None


def test_public_functions_are_documented():
    for name in NAMES:
        assert (getattr(rp, name).__doc__ or "").strip(), name


def test_import_is_cheap():
    assert loaded_by("import repedit") == set()


HELPED = """
import typer.main
from typer.testing import CliRunner
from repedit.cli import app
for words in [[], *([verb] for verb in typer.main.get_command(app).commands)]:
    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0
"""


def test_no_help_imports_torch():
    assert loaded_by(HELPED) == set()


def test_import_does_load_what_it_needs():
    assert "torch" in loaded_by("import repedit; repedit.LowRank")


def test_no_module_hides_a_public_callable():
    import importlib.util

    rooms = {name for name in NAMES if importlib.util.find_spec(f"repedit.{name}")}
    assert rooms == set()
