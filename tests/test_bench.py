"""What the benchmarks compare is the same work, and what they say about noise is what the protocol asks."""

import sys

import pytest
import torch
from safetensors.torch import load_file

import repedit as rp
from bench import cpu, peers
from bench.__main__ import table
from bench.by_hand import load_edit_save
from bench.peers import taken
from bench.peers_figure import draw
from bench.record import record
from bench.timing import Ratio, alternated, ratio
from repedit.sites import Point
from tests.saved_models import saved


def _edit(kind, width, d):
    if kind == "neurons":
        return rp.Edit({rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(torch.arange(width) % 3 > 0)})
    map_ = rp.LowRank.projection(torch.randn(d, 2, generator=torch.Generator().manual_seed(0)))
    return rp.Edit(dict.fromkeys(map(rp.Site.parse, ("0.attn.out", "1.mlp.out")), map_))


def _weights(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def _is_the_exported_one(kind, tmp_path):
    source = saved(tmp_path / "model")
    layout = rp.load(source).layout
    edit = _edit(kind, layout.width_of(0, Point.MLP_NEURONS), layout.width_of(0, Point.MLP_OUT))
    rp.export(edit, source, tmp_path / "ours")
    load_edit_save(edit, source, tmp_path / "theirs")
    before, ours, theirs = (_weights(tmp_path / name) for name in ("model", "ours", "theirs"))
    assert any(not torch.equal(ours[name], before[name]) for name in ours)
    assert set(theirs) <= set(ours)
    for name, value in theirs.items():
        torch.testing.assert_close(value, ours[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["neurons", "projection"])
def test_an_edit_by_hand_is_the_exported_one(kind, tmp_path):
    _is_the_exported_one(kind, tmp_path)


def test_half_of_an_edit_by_hand_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.by_hand._zero", lambda mlp, pruned: mlp.down_proj.weight[:, pruned].zero_())
    with pytest.raises(AssertionError):
        _is_the_exported_one("neurons", tmp_path)


def _found(median, spread=0.01, noise=0.01):
    return Ratio(median, median - spread, median + spread, 7, (1 - noise, 1 + noise))


def test_a_verdict_needs_both_quantiles_and_a_quieter_control():
    above = lambda value: value >= 1.0  # noqa: E731
    assert _found(1.2).verdict(above) == "pass" and _found(0.8).verdict(above) == "fail"
    assert _found(1.2, spread=0.3).verdict(above) == "not resolved"
    assert _found(1.2, noise=0.3).verdict(above) == "not resolved"


def test_rounds_run_both_and_ours_again():
    calls = []
    rounds = alternated(lambda: calls.append("a") or 2.0, lambda: calls.append("b") or 6.0, pairs=5)
    assert calls.count("a") == 1 + 2 * 5 and calls.count("b") == 1 + 5
    assert ratio(rounds) == Ratio(3.0, 3.0, 3.0, 5, (1.0, 1.0))


def test_a_peer_that_is_absent_is_a_row_that_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.cpu.PEERS", tmp_path)
    monkeypatch.setitem(sys.modules, "concept_erasure", None)
    z, mask = torch.randn(8, 4), torch.ones(8, dtype=torch.bool)
    rows = [
        cpu.against_taker(z, mask),
        *peers.streams(8, "concept-erasure 0.2.4"),
        *cpu.projections(64, 8, 2, modes=()),
    ]
    absent = [row["status"] for row in rows if row["status"].startswith("skipped")]
    assert len(absent) == 3 and all(status.startswith("skipped: pip install ") for status in absent)
    assert "taker==1.2.3" in absent[0] and "concept-erasure==0.2.4" in absent[1]


def test_the_table_names_what_is_missing(tmp_path, monkeypatch):
    skipped = taken("ours", "them", "CPU", {"name": "x", "status": "skipped: pip install them"})
    found = [
        taken("ours", "them", "CPU, |z|", _found(value).row("x", ">= 1.0", lambda r: r >= 1.0)) for value in (0.5, 12.3)
    ]
    lines = table([*found, skipped]).splitlines()
    assert lines[2] == "| ours | them | CPU, \\|z\\| | 0.50 | 0.49 to 0.51 | >= 1 | missed |"
    assert "| 12 | 12 to 12 | >= 1 | pass |" in lines[3]
    assert lines[4] == "| ours | them | CPU |  |  |  | skipped: pip install them |"
    monkeypatch.setattr("bench.record.RESULTS", tmp_path)
    path = record("peers", [*found, skipped], module="", seed=0)
    assert draw(path, tmp_path / "drawn.png").stat().st_size > 5000
