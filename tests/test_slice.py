"""Sliced equals stream-erased: the coordinates are gone and the logits are those of the erasure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.arch import families
from repedit.errors import ArgumentError, NotSliceable, PlanMismatch, RankError
from repedit.fit.mrp import stream_sites
from repedit.rewrite.apply import rebuilt
from repedit.rewrite.slice import Constant, Observe, Scaled, Write, coordinates, slice_plan
from tests import laws
from tests.edits import mask, projection
from tests.test_sabotage import caught
from tests.tiny import FAMILIES, tiny

pytestmark = pytest.mark.numeric


SLICEABLE = tuple(f for f in FAMILIES if not families()[f].shrink.whole_stream)
WHOLE = tuple(f for f in FAMILIES if f not in SLICEABLE)
every_sliceable = pytest.mark.parametrize("family", SLICEABLE)


def basis(width: int = 24, rank: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def erasure(subject: rp.Subject, rank: int = 4) -> rp.Edit:
    return rp.erase_stream(subject, basis(subject.layout.width, rank))


def stressed(family: str, dtype: torch.dtype = torch.float64, epsilon: float = 1e-2) -> rp.Subject:
    """A model whose epsilon is large enough to show a wrong one."""
    return tiny(family, dtype, **{families()[family].shrink.epsilon: epsilon})


@every_sliceable
def test_a_narrower_stream_gives_the_logits_of_the_erasure(family):
    subject = stressed(family)
    laws.sliced_equals_erased(subject, erasure(subject))


@every_sliceable
def test_the_same_as_shipped_with_norms_in_float32(family):
    subject = tiny(family)
    small = laws.sliced_equals_erased(subject, erasure(subject))
    assert small.model.config.hidden_size == subject.layout.width - 4
    assert not small.model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("mixtral", {"tie_word_embeddings": True}),
        ("starcoder2", {"use_bias": False}),
        ("smollm3", {"tie_word_embeddings": False}),
    ],
)
def test_variants_of_a_family_slice_too(family, options):
    subject = tiny(family, torch.float64, **options)
    laws.sliced_equals_erased(subject, erasure(subject))


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3_moe"])
def test_an_oblique_erasure_slices_too(family):
    subject = tiny(family, torch.float64)
    edit = rp.erase_stream(subject, rp.LowRank.oblique(basis(), basis(seed=1)))
    laws.sliced_equals_erased(subject, edit)


def test_two_erasures_slice_as_one():
    subject = tiny("mistral", torch.float64)
    both = rp.erase_stream(subject, basis(rank=2)) | rp.erase_stream(
        subject, torch.cat([basis(rank=2), basis(seed=1)], 1)
    )
    assert laws.sliced_equals_erased(subject, both).layout.width == 18


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
def test_the_coordinates_are_orthonormal_and_carry_the_mean(family):
    subject = tiny(family, torch.float64)
    map_ = next(iter(erasure(subject).maps.values()))
    v = coordinates(map_, centered=subject.architecture.centered)
    d, s = v.shape
    assert torch.allclose(v.T @ v, torch.eye(s, dtype=torch.float64), atol=1e-12)
    assert float((v.T @ map_.v).abs().max()) < 1e-12
    if subject.architecture.centered:
        x = torch.randn(5, d, dtype=torch.float64) @ v @ v.T
        assert torch.allclose((x @ v).mean(1), x.mean(1) * (d / s) ** 0.5, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])
def test_half_types_hold_the_norms_exactly(family):
    subject = tiny(family, torch.bfloat16)
    edit = erasure(subject)
    small = laws.sliced_equals_erased(subject, edit)
    unit = 0.0 if family == "gemma" else 1.0
    norms = [p for n, p in small.model.named_parameters() if "norm" in n]
    assert norms and all(bool((p == unit).all()) for p in norms)


@pytest.mark.parametrize("family", ["llama", "starcoder2", "qwen3_moe"])
def test_a_sliced_model_generates_what_the_erased_one_does(family):
    subject = tiny(family)
    edit = erasure(subject)
    assert torch.equal(laws.generated(rp.sliced(edit, subject)), laws.generated(rp.apply(edit, subject)))


def test_a_ragged_model_is_sliced_too():
    subject = tiny("llama", torch.float64)
    ragged = rp.slimmed(mask(subject, "1.mlp.neurons"), subject, layout="ragged")
    laws.sliced_equals_erased(ragged, erasure(ragged))


def test_directions_are_added_until_the_width_is_a_multiple():
    for family in ("llama", "starcoder2"):
        subject = tiny(family, torch.float64)
        retain = rp.Moments(24)
        retain.update(torch.randn(200, 24, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 24))
        edit = rp.erase_stream(subject, basis(rank=3), multiple=8, retain=retain)
        u = next(iter(edit.maps.values())).u
        given = torch.linalg.qr(basis(rank=3) - (basis(rank=3).mean(0) if family == "starcoder2" else 0.0)).Q
        assert u.shape == (24, 8) and torch.allclose(u @ (u.T @ given), given, atol=1e-10)
        laws.sliced_equals_erased(subject, edit, lambda e, s: rp.sliced(e, s, multiple=8))


def test_added_directions_need_moments_and_an_orthogonal_basis():
    subject = tiny("llama")
    with pytest.raises(
        ArgumentError, match="21 is not a multiple of 8, so 5 more directions must be removed; pass retain=Moments"
    ):
        rp.erase_stream(subject, basis(rank=3), multiple=8)
    with pytest.raises(
        ArgumentError, match="multiple=8 adds directions to an orthogonal basis; the map given is oblique"
    ):
        rp.erase_stream(subject, rp.LowRank.oblique(basis(rank=3), basis(rank=3, seed=1)), multiple=8)
    with pytest.raises(ArgumentError, match="multiple=0; give at least 1"):
        rp.erase_stream(subject, basis(), multiple=0)
    with pytest.raises(RankError, match="rank 24 was asked for"):
        rp.erase_stream(subject, basis(rank=3), multiple=32, retain=rp.Moments(24))


def wrong(change, config=None):
    """A `sliced` some of whose tensors are changed otherwise."""

    def slice_(edit, subject):
        plan = slice_plan(edit, subject.architecture, subject.specs)
        changed = {name: change(name, resize) for name, resize in plan.resized.items()}
        return rebuilt(replace(plan, resized=changed, config={**plan.config, **(config or {})}), subject)

    return slice_


def factor(value):
    return wrong(lambda n, r: replace(r, factor=value(r.factor)) if isinstance(r, Observe) else r)


@pytest.mark.parametrize("value", [lambda f: 1.0, lambda f: 1 / f], ids=["g = 1", "g = sqrt(s / d)"])
def test_a_wrong_gain_is_caught(value):
    subject = tiny("llama", torch.float64)
    caught(laws.sliced_equals_erased, subject, erasure(subject), factor(value))


@pytest.mark.parametrize("value", [1e-2, 1e-2 * 20 / 24], ids=["not scaled", "the inverse"])
def test_a_wrong_epsilon_is_caught(value):
    subject = stressed("llama", torch.float32)
    plain = wrong(lambda n, r: r, {"rms_norm_eps": value})
    caught(laws.sliced_equals_erased, subject, erasure(subject), plain)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_head_norms_without_compensation_are_caught(family):
    subject = stressed(family)
    plain = wrong(lambda n, r: replace(r, extra=1.0) if isinstance(r, Observe) else r)
    caught(laws.sliced_equals_erased, subject, erasure(subject), plain)


def test_a_bias_before_a_head_norm_without_compensation_is_caught():
    subject = tiny("qwen3", torch.float64, attention_bias=True, rms_norm_eps=1e-2)
    plain = wrong(lambda n, r: Scaled(1.0) if isinstance(r, Scaled) else r)
    caught(laws.sliced_equals_erased, subject, erasure(subject), plain)


def test_an_embedding_scale_of_the_old_width_is_caught():
    subject = tiny("gemma", torch.float64)
    plain = wrong(lambda n, r: replace(r, factor=1.0) if isinstance(r, Write) else r)
    caught(laws.sliced_equals_erased, subject, erasure(subject), plain)


def test_norm_biases_left_at_zero_are_caught():
    subject = tiny("starcoder2", torch.float64)
    plain = wrong(lambda n, r: Constant(r.width, 0.0) if isinstance(r, Constant) and n.endswith("bias") else r)
    caught(laws.sliced_equals_erased, subject, erasure(subject), plain)


def test_coordinates_that_lose_the_mean_are_caught(monkeypatch):
    monkeypatch.setattr("repedit.rewrite.slice.coordinates", lambda map_, centered: coordinates(map_, centered=False))
    subject = tiny("phi", torch.float64)
    caught(laws.sliced_equals_erased, subject, erasure(subject))


def test_a_head_left_tied_is_caught():
    subject = tiny("llama", torch.float64)

    def tied(edit, s):
        small = rp.sliced(edit, s)
        small.model.lm_head.weight = small.model.model.embed_tokens.weight
        return small

    caught(laws.sliced_equals_erased, subject, erasure(subject), tied)


@pytest.mark.parametrize("family", WHOLE)
def test_these_families_keep_their_stream(family):
    subject = tiny(family)
    with pytest.raises(
        NotSliceable, match=rf"the stream of {family} cannot be made narrower: .*; use structure='keep'"
    ):
        rp.sliced(erasure(subject), subject)


def other(site: str, map_):
    return lambda s: rp.Edit({**erasure(s).maps, rp.Site.parse(site): map_(s)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: projection(s, "1.mlp.out"), r"0\.resid\.pre is not edited, so the stream still receives"),
        (other("1.mlp.neurons", lambda s: rp.LowRank.projection(basis(40))), r"1\.mlp\.neurons is not a writer of the stream"),
        (other("1.attn.out", lambda s: rp.LowRank.projection(basis(seed=1))), r"1\.attn\.out removes other directions than 0\.resid"),
        (other("0.mlp.out", lambda s: rp.LowRank.projection(basis(rank=8))), r"0\.mlp\.out removes other directions than"),
        (other("1.mlp.out", lambda s: rp.LowRank(basis(), basis())), r"1\.mlp\.out holds a LowRank that is not a linear projection"),
        (other("1.mlp.out", lambda s: rp.Diagonal(torch.ones(24))), r"1\.mlp\.out holds a Diagonal that is not a linear"),
        (
            other("0.attn.out", lambda s: rp.LowRank.projection(basis(), torch.ones(24, dtype=torch.float64))),
            r"0\.attn\.out holds a LowRank that is not a linear projection; build it with erase_stream",
        ),
        (
            lambda s: erasure(s, 5),
            r"leaves a width of 19, which is not a multiple of 4 .* requires a multiple of its 4 heads\).* ranks that do are \[4, 8\]",
        ),
    ],
)  # fmt: skip
def test_what_is_no_stream_erasure_is_refused(edit, message):
    subject = tiny("llama")
    with pytest.raises(NotSliceable, match=message):
        rp.sliced(edit(subject), subject)


def test_widths_and_means_that_do_not_fit_are_refused():
    subject, centred = tiny("mistral"), tiny("starcoder2")
    with pytest.raises(NotSliceable, match=r"not a multiple of 16; the nearest ranks that do are \[8\]: erase_stream"):
        rp.sliced(erasure(subject), subject, multiple=16)
    with pytest.raises(ArgumentError, match="multiple=0: at least 1"):
        rp.sliced(erasure(subject), subject, multiple=0)
    raw = rp.Edit(dict.fromkeys(stream_sites(centred), rp.LowRank.projection(basis())))
    with pytest.raises(NotSliceable, match="starcoder2 subtracts the mean, which is in the span of the directions"):
        rp.sliced(raw, centred)
    bare = replace(subject, architecture=replace(subject.architecture, shrink=None))
    with pytest.raises(NotSliceable, match=r"mistral cannot be made narrower: its row does not say what changes"):
        rp.sliced(erasure(bare), bare)


@pytest.mark.parametrize(("family", "name"), [("cohere", "use_qk_norm"), ("phi", "qk_layernorm")])
def test_a_tensor_that_the_row_does_not_know_is_refused(family, name):
    subject = tiny(family, **{name: True})
    with pytest.raises(
        NotSliceable, match=rf"self_attn\.(q|k)_(layer)?norm\.\S+ .* may read or write .* row of {family} does not say"
    ):
        rp.sliced(erasure(subject), subject)
    row = replace(subject.architecture, shrink=replace(subject.architecture.shrink, final_norm="nowhere"))
    lost = replace(subject, architecture=row)
    with pytest.raises(
        NotSliceable, match=rf"the row of {family} names model\.nowhere\.weight, which this model does not hold"
    ):
        rp.sliced(erasure(subject), lost)


def test_the_certificate_of_a_slice_is_its_shape():
    subject = tiny("llama")
    edit = erasure(subject)
    found = rp.certificate(rp.sliced(edit, subject), edit, subject)
    assert (found.form, found.exactness, found.worst_leak, found.widths) == ("sliced", "exact", 0.0, (24, 20))
    assert found.rank == 4 * 5 and not found.tensors
    assert "the coordinates themselves are gone.\nThe stream has 20 coordinates where it had 24" in found.describe()
    assert "copies of the knowledge in those that stay" in found.describe()


def test_a_narrow_model_of_another_origin_gets_no_certificate():
    subject = tiny("llama")
    edit = erasure(subject)
    mistaken = rp.sliced(rp.erase_stream(subject, basis(seed=5)), subject)
    with pytest.raises(PlanMismatch, match=r"\(61, 20\) is not what slicing makes of the original \(relative error"):
        rp.certificate(mistaken, edit, subject)
    narrower = rp.sliced(erasure(subject, 8), subject)
    with pytest.raises(
        PlanMismatch, match=r"\(61, 16\) is not what slicing makes of the original \(relative error inf\)"
    ):
        rp.certificate(narrower, edit, subject)
