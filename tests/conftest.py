"""Shared set-up: shape-checked imports, one thread unless REPEDIT_TEST_THREADS says otherwise, no network."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Without bytecode every worker and child process compiles 200 modules again: 10 s each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import jaxtyping  # noqa: E402

from tests import shape_checks  # noqa: E402

shape_checks.install()

import pytest  # noqa: E402
import torch  # noqa: E402

from repedit.io import known_hashes  # noqa: E402

# No test depends on what an earlier one exported: only those about it remember hashes.
known_hashes.SETTLED = 1 << 30
torch.set_num_threads(int(os.environ.get("REPEDIT_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The tiny Llama in three shards, among files that travel with a model and files that do not; not to be written."""
    from tests.tiny import tiny

    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny("llama").model.save_pretrained(folder, max_shard_size="20KB")
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_own.py",
        "optimizer.pt",
        "pytorch_model.bin",
        ".git",
    ):
        (folder / name).write_text(f"content of {name}")
    for name in ("adapter_config.json", "pytorch_model.bin.index.json", "extra.safetensors"):
        (folder / name).write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe card of the base.\n")
    return folder


@pytest.fixture
def unchecked():
    """Without the shape-checked imports of the tests, which would refuse first: what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def reloaded_here(monkeypatch):
    """What verbs export is loaded again in this process: a fresh one imports torch for seconds.

    The fresh process has tests of its own (test_cli, test_structures, test_export_safety).
    """
    reload_here(monkeypatch)


def reload_here(monkeypatch) -> None:
    """The fixture for wider scopes: call it with a MonkeyPatch of their own."""
    import repedit
    from repedit.rewrite import verification

    def check(directory: str | Path) -> verification.Reload:
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        return verification.Reload(sum(p.numel() for p in model.parameters()), "")

    monkeypatch.setattr(repedit, "reload_check", check)  # first: the package remembers what it looked up
    monkeypatch.setattr(verification, "reload_check", check)


def pytest_configure(config) -> None:
    """A collinear score is an error unless a test says otherwise; named here, after the import hook is in place."""
    config.addinivalue_line("filterwarnings", "error::repedit.neurons.scores.CollinearWarning")


def pytest_sessionfinish() -> None:
    """Write what share of each tolerance was used, for tests/cpus.py."""
    if path := os.environ.get("REPEDIT_TEST_SHARES"):
        from tests.tolerances import SHARES

        Path(path).write_text(json.dumps(SHARES))
