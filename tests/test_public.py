"""The public names, and that importing them costs nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import repedit as rp

NAMES = {
    "Activity", "AffineMap", "Certificate", "Chain", "CollinearWarning", "ContinualMRP", "CrossMoments", "Diagonal",
    "Delta", "Edit", "LowRank", "MRPConfig", "Moments", "Plan", "Point", "Report", "Score", "Scores", "Site", "Step", "Subject",
    "Trajectory", "agreement", "apply", "audit", "audit_classifier", "certificate", "check_architecture", "collect", "compare", "diff",
    "erase_stream", "export", "export_adapter", "facts_accuracy", "fetch", "gguf_check", "import_adapter", "lens_hooks", "load", "locate", "max_activating", "mrp", "peaks", "predictions", "prune", "push",
    "random_like", "register", "reload_check", "resolve", "score", "sliced", "slimmed", "to_lens", "to_nnsight", "top", "trainer_callback", "trajectory", "unlearn", "wrap",
}  # fmt: skip
ROOMS = {"arch", "attack", "data", "errors", "explore", "fit", "metrics", "plot", "recipes", "report", "vision"}
HEAVY = ("torch", "transformers", "transformer_lens", "nnsight", "matplotlib", "plotly", "scipy")


def loaded_by(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has loaded after running some code."""
    script = f"import sys\n{code}\nprint('loaded', *(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.strip().splitlines()[-1].split()[1:])


def test_public_names_are_pinned():
    assert set(rp.__all__) == NAMES | ROOMS | {"__version__"}


def names_for_type_checkers(source: str) -> dict[str, str]:
    """Public name -> module that the imports under `if TYPE_CHECKING:` of a source take it from."""
    blocks = [node.body for node in ast.parse(source).body if isinstance(node, ast.If)]
    rows = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in rows for alias in node.names}


def check_names_for_type_checkers(source: str) -> None:
    """What type checkers read equals what is imported on first use: the same names, from the same modules."""
    namespaces = {name: module.rpartition(".")[0] for name, module in rp._NAMESPACES.items()}
    assert names_for_type_checkers(source) == rp._NAMES | namespaces


SOURCE = Path(rp.__file__).read_text()


def test_type_checkers_read_the_names_that_are_imported_on_first_use():
    check_names_for_type_checkers(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    from repedit.plan import Plan\n", ""),
        ("    from repedit.plan import Plan\n", "    from repedit.plan import Plan, Operation\n"),
        ("    from repedit.plan import Plan\n", "    from repedit.edit import Plan\n"),
    ],
    ids=["missing", "added", "of another module"],
)
def test_a_name_that_only_one_of_both_knows_is_caught(old, new):
    assert old in SOURCE
    with pytest.raises(AssertionError):
        check_names_for_type_checkers(SOURCE.replace(old, new))


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
