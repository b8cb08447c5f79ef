"""Names of sites: repedit's and TransformerLens's, one at a time and by selector."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import repedit as rp
from repedit.errors import UnknownSite
from repedit.sites import HOOK_NAMES, Point, select
from tests.tiny import tiny

sites = st.builds(rp.Site, st.integers(0, 200), st.sampled_from(Point))


@given(site=sites)
def test_every_site_is_read_back_from_its_name(site):
    assert rp.Site.parse(str(site)) == site
    assert rp.Site.parse(site) is site


@given(site=sites)
def test_transformer_lens_names_are_read_and_written(site):
    assert rp.Site.parse(site.hook_name) == site
    assert rp.Site.parse(f"{site.layer}.{HOOK_NAMES[site.point]}") == site


def test_names_are_spelled_as_in_the_readme():
    assert str(rp.Site(7, Point.MLP_NEURONS)) == "7.mlp.neurons"
    assert rp.Site.parse("blocks.7.mlp.hook_post") == rp.Site.parse("7.mlp.neurons")
    assert rp.Site.parse("blocks.0.attn.hook_z").hook_name == "blocks.0.attn.hook_z"
    assert rp.Site.parse("3.resid.mid").point is Point.RESID_MID


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("1.mlp.out", ["1.mlp.out"]),
        ("*.mlp.neurons", ["0.mlp.neurons", "1.mlp.neurons", "2.mlp.neurons", "3.mlp.neurons"]),
        ("1-2.attn.out", ["1.attn.out", "2.attn.out"]),
        ("2-2.attn.out", ["2.attn.out"]),
        ("3.mlp.out, 0.attn.neurons", ["0.attn.neurons", "3.mlp.out"]),
        (["1.mlp.out", rp.Site.parse("1.attn.out"), "1.mlp.out"], ["1.attn.out", "1.mlp.out"]),
        (["0-1.mlp.out", "1-2.mlp.out"], ["0.mlp.out", "1.mlp.out", "2.mlp.out"]),
        ("blocks.*.hook_mlp_out", ["0.mlp.out", "1.mlp.out", "2.mlp.out", "3.mlp.out"]),
        ("blocks.1-2.attn.hook_z", ["1.attn.neurons", "2.attn.neurons"]),
        (rp.Site.parse("3.resid.post"), ["3.resid.post"]),
    ],
    ids=str,
)
def test_selectors_expand_in_forward_order_each_site_once(selector, expected):
    assert [str(site) for site in select(selector, 4)] == expected


def test_sites_sort_by_layer_then_by_the_forward_pass():
    names = ["1.resid.pre", "0.resid.post", "0.mlp.neurons", "0.attn.out", "0.resid.pre", "0.resid.mid"]
    expected = ["0.resid.pre", "0.attn.out", "0.resid.mid", "0.mlp.neurons", "0.resid.post", "1.resid.pre"]
    assert [str(site) for site in sorted(map(rp.Site.parse, names))] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7.mlp.neuron", "no point is called 'mlp.neuron'; did you mean 'mlp.neurons'"),
        ("0.atn.out", "did you mean 'attn.out'"),
        ("blocks.1.mlp.hook_pots", "no point is called 'mlp.hook_pots'; .*All: resid.pre"),
        ("mlp.neurons", "'mlp.neurons' is not a site; write layer.point such as '7.mlp.neurons'"),
        ("-1.mlp.out", "'-1.mlp.out' is not a site"),
        ("", "'' is not a site"),
        ("7", "'7' is not a site"),
        ("7.", "'7.' is not a site"),
        ("*.mlp.out", r"names several layers, one site is needed; use select\(\)"),
        ("4-9.mlp.out", "names several layers"),
    ],
)
def test_a_name_that_is_no_site_says_what_is(text, message):
    with pytest.raises(UnknownSite, match=message):
        rp.Site.parse(text)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("4.mlp.out", r"'4.mlp.out' asks for layers 4..4; layers are 0..3"),
        ("2-9.mlp.out", r"asks for layers 2..9; layers are 0..3"),
        ("3-1.mlp.out", r"asks for layers 3..1"),
        ("1.mlp.out,", "'' is not a site"),
        ([], r"selector \[\] names no site; try '\*.mlp.neurons'"),
    ],
)
def test_a_selector_that_names_nothing_says_why(selector, message):
    with pytest.raises(UnknownSite, match=message):
        select(selector, 4)


def test_a_site_with_a_negative_layer_is_refused():
    with pytest.raises(UnknownSite, match=r"layer -1 does not exist; layer 0 is the first block"):
        rp.Site(-1, Point.MLP_OUT)


def test_a_subject_selects_among_its_own_points():
    assert len(tiny("llama").select("*.resid.mid")) == 2
    with pytest.raises(
        UnknownSite, match=r"'0.resid.mid': this family has no resid.mid; its points are resid.pre, attn"
    ):
        tiny("gptj").select("0.resid.mid")
