"""Stream erasure: nothing along the basis at any point, in every family, as hook and as weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import repedit as rp
from repedit.errors import ArgumentError, NoBiasSlot, NotFoldable, RankError, ShapeError
from repedit.fit import mrp
from repedit.fit.mrp import centred_basis, stream_sites
from repedit.models.subject import subject_of
from tests import laws
from tests.every_causal_type import tiny_causal
from tests.test_laws import PRE_NORM, every_dtype, every_family
from tests.test_sabotage import caught
from tests.tiny import tiny


def basis(width: int = 24, rank: int = 3) -> torch.Tensor:
    return torch.randn(width, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@every_dtype
@every_family
def test_the_stream_is_empty_after_erasure(family, dtype):
    subject = tiny(family, dtype)
    laws.stream_is_empty(subject, basis(subject.layout.width))


INFERRED = (
    "gemma4_text",
    "llama4_text",
    "jamba",
    "nemotron_h",
    "qwen3_next",
    "falcon_h1",
    "granitemoehybrid",
    "zamba2",
)


@pytest.mark.parametrize("family", INFERRED)
def test_every_branch_of_an_inferred_family_is_a_writer(family):
    subject = subject_of(tiny_causal(family))
    laws.stream_is_empty(subject, basis(subject.layout.width))


@pytest.mark.parametrize("family", ["jamba", "gemma4_text"])
def test_a_mixer_or_a_per_layer_embedding_that_is_left_out_is_seen(family, monkeypatch):
    """The twin of the test before: a stream erasure of attention and MLPs alone."""
    sites = [site for site in stream_sites(subject_of(tiny_causal(family))) if not str(site.point).startswith(LATER)]
    monkeypatch.setattr(mrp, "stream_sites", lambda subject: tuple(sites))
    subject = subject_of(tiny_causal(family))
    with pytest.raises(AssertionError):
        laws.stream_is_empty(subject, basis(subject.layout.width))


LATER = ("mixer", "ple")


def test_embeddings_that_pass_a_norm_are_not_erased_in_weights():
    subject = subject_of(tiny_causal("bloom"))
    edit = rp.erase_stream(subject, basis(subject.layout.width))
    with pytest.raises(NotFoldable, match=r"0\.resid\.pre: a norm or another function of the embeddings of bloom"):
        rp.apply(edit, subject)


@pytest.mark.parametrize("family", PRE_NORM)
def test_erasure_as_hooks_equals_erasure_in_weights(family):
    subject = tiny(family, torch.float64)
    laws.hooked_equals_rewritten(subject, rp.erase_stream(subject, basis(subject.layout.width)))


@every_family
def test_an_exported_erasure_equals_the_rewritten_one(family, tmp_path: Path):
    subject = tiny(family)
    laws.rewritten_equals_exported(subject, rp.erase_stream(subject, basis(subject.layout.width)), tmp_path)


def test_an_oblique_map_erases_too():
    subject = tiny("llama", torch.float64)
    u, v = basis(rank=2), basis(rank=4)[:, 2:]
    edit = rp.erase_stream(subject, rp.LowRank.oblique(u, v))
    edited = rp.apply(edit, subject)
    for site in subject.select("*.resid.post"):
        assert laws.leak(laws.seen_at(edited, site), torch.linalg.qr(v).Q) < 1e-12
    laws.hooked_equals_rewritten(subject, edit)


@every_family
def test_the_table_says_whether_norms_take_the_mean_away(family):
    """A norm that centres does not see a constant added to its input."""
    subject = tiny(family, torch.float64)
    block = subject.model.get_submodule(subject.layout.block_paths[0])
    norm = next(m for name, m in block.named_children() if "norm" in type(m).__name__.lower())
    x = torch.randn(3, subject.layout.width, dtype=torch.float64)
    with torch.no_grad():
        moved = float((norm(x + 7.0) - norm(x)).abs().max())
    assert (moved < 1e-3) == subject.architecture.centered


def test_a_writer_left_out_is_caught():
    subject = tiny("llama")

    def partial(s, u):
        edit = rp.erase_stream(s, u)
        return rp.Edit({site: m for site, m in edit.maps.items() if str(site) != "1.attn.out"})

    caught(laws.stream_is_empty, subject, basis(), partial)


def test_an_embedding_left_out_is_caught():
    subject = tiny("gpt2")

    def partial(s, u):
        edit = rp.erase_stream(s, u)
        return rp.Edit({site: m for site, m in edit.maps.items() if str(site) != "0.resid.pre"})

    caught(laws.stream_is_empty, subject, basis(), partial)


def test_a_basis_with_the_mean_in_it_is_caught():
    subject = tiny("gpt2")

    def uncentred(s, u):
        return rp.Edit(dict.fromkeys(stream_sites(s), rp.LowRank.projection(u)))

    caught(laws.stream_is_empty, subject, basis(), uncentred)


def test_the_centred_basis_is_orthogonal_to_the_mean_and_drops_it():
    u = centred_basis(torch.cat([torch.ones(24, 1, dtype=torch.float64), basis()], 1))
    assert u.shape == (24, 3) and float(u.sum(0).abs().max()) < 1e-12


def test_refusals():
    llama, gpt2 = tiny("llama"), tiny("gpt2")
    with pytest.raises(ShapeError, match="the basis has width 12, the stream has width 24"):
        rp.erase_stream(llama, basis(12))
    with pytest.raises(RankError, match="removes rank 0 of a stream of width 24; give 1 to 23"):
        rp.erase_stream(llama, torch.zeros(24, 0))
    with pytest.raises(RankError, match="that are not the mean"):
        rp.erase_stream(gpt2, torch.ones(24, 1))
    with pytest.raises(ArgumentError, match="fit without a center"):
        rp.erase_stream(llama, rp.LowRank.projection(basis(), torch.ones(24, dtype=torch.float64)))
    with pytest.raises(ArgumentError, match="gpt2 has LayerNorm"):
        rp.erase_stream(gpt2, rp.LowRank.oblique(basis(rank=1), basis(rank=2)[:, 1:]))
    site = rp.Site.parse("0.resid.post")
    with pytest.raises(NotFoldable, match=r"Edit the writers \(0\.attn\.out, 0\.mlp\.out\)"):
        rp.apply(rp.Edit({site: rp.LowRank.projection(basis())}), llama)
    affine = rp.Edit({rp.Site.parse("0.mlp.out"): rp.LowRank.projection(basis(), torch.ones(24, dtype=torch.float64))})
    with pytest.raises(NoBiasSlot, match=r"mistral has no bias at .*affine=False"):
        rp.apply(affine, tiny("mistral"))
