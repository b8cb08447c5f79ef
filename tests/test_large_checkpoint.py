"""A checkpoint larger than the machine is planned from its headers alone."""

import pytest
import torch

import repedit as rp
from bench.checkpoints import LLAMA_70B, llama
from repedit.errors import ShapeError
from repedit.io.checkpoint import Shards, open_shards
from repedit.rewrite.export import dry_run


@pytest.fixture(scope="module")
def giant(tmp_path_factory):
    """The shape of Llama-70B: 141 GB in sparse files."""
    return llama(tmp_path_factory.mktemp("giant") / "in", **LLAMA_70B, shard_bytes=5_000_000_000, sparse=True)


@pytest.fixture
def unread(monkeypatch):
    """No value of a tensor can be read."""

    def read(shards, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Shards, "read", read)


def erased(layers, width):
    basis = torch.randn(width, 8, generator=torch.Generator().manual_seed(0))
    sites = [rp.Site.parse(f"{layer}.{point}") for layer in layers for point in ("attn.out", "mlp.out")]
    return rp.Edit(dict.fromkeys(sites, rp.LowRank.projection(basis)), {"method": "test"})


def test_seventy_billion_parameters_are_planned_from_headers(giant, unread):
    shards = open_shards(giant)
    assert sum(spec.nbytes for spec in shards.specs.values()) > 141e9
    assert sum((giant / file).stat().st_blocks * 512 for file in shards.files) < 1e7
    text = dry_run(erased((3, 60), 8192), giant)
    touched = [line.split()[0] for line in text.splitlines() if line.startswith("  model.")]
    writers = ("mlp.down_proj", "self_attn.o_proj")
    assert touched == [f"model.layers.{layer}.{leaf}.weight" for layer in (3, 60) for leaf in writers]
    files = {shards.entries[name].file for name in touched}
    gigabytes = sum((giant / file).stat().st_size for file in files) / 1e9
    assert (
        f"{len(files)} of {len(shards.files)} files rewritten, {gigabytes:.2f} of 141.11 GB; the others are shared or copied"
        in text
    )


def test_what_does_not_fit_is_refused_from_headers(giant, unread):
    with pytest.raises(ShapeError, match=r"4096.*8192"):
        dry_run(erased((3,), 4096), giant)


def test_reading_a_tensor_to_plan_would_be_caught(giant, unread, monkeypatch):
    monkeypatch.setattr(
        "repedit.rewrite.export.check_planned", lambda plan, shards, *_: shards.read("model.norm.weight")
    )
    with pytest.raises(AssertionError, match=r"model\.norm\.weight was read"):
        dry_run(erased((3,), 8192), giant)
