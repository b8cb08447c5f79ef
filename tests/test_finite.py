"""Numbers that are not finite, and dtypes that cannot hold a number, never reach a file or a model."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import repedit as rp
from repedit.delta import Delta
from repedit.edit import Edit
from repedit.errors import ArgumentError, DeviceError, DtypeError, NotFinite, QuantizedModel, RankError, ShapeError
from repedit.io.checkpoint import SINGLE
from repedit.linear_maps import not_finite_at
from tests.damaged_checkpoints import UP, not_a_number
from tests.edits import fill, mask, projection
from tests.tiny import tiny

BAD = [torch.nan, torch.inf, -torch.inf]
SITE = rp.Site.parse("1.mlp.out")


def spoiled(*shape, value):
    tensor = torch.ones(shape)
    tensor[(-1,) * len(shape)] = value
    return tensor


def first_bad(tensor):
    """The first index at which a mask of finite values is False."""
    bad = (~torch.isfinite(tensor)).nonzero()
    return None if not len(bad) else str(tuple(bad[0].tolist()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(dtype):
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 2, 15, 16, 17, 31, 64, 1000, 4099):
        for place in {0, size // 3, size // 2, size - 1} if size else ():
            for value in BAD:
                x = torch.randn(size, generator=generator).to(dtype)
                x[place] = value
                for view in (x, x.expand(3, size).contiguous().T, torch.stack([torch.zeros_like(x), x], 1)[:, 1]):
                    assert not_finite_at(view).startswith(f"{first_bad(view)} (")
        assert not_finite_at(torch.randn(size, generator=generator).to(dtype)) is None


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["u", "v", "center", "scale", "shift", "chain"])
def test_a_map_that_is_not_finite_makes_no_edit(where, value):
    good, column, vector = torch.ones(24, 1), spoiled(24, 1, value=value), spoiled(24, value=value)
    maps = {
        "u": lambda: rp.LowRank(column, good), "v": lambda: rp.LowRank(good, column),
        "center": lambda: rp.LowRank(good, good, vector), "scale": lambda: rp.Diagonal(vector),
        "shift": lambda: rp.Diagonal(torch.ones(24), vector),
        "chain": lambda: rp.Chain((rp.Diagonal(torch.ones(24)), rp.Diagonal(vector))),
    }  # fmt: skip
    name = "1.scale" if where == "chain" else where
    with pytest.raises(NotFinite, match=rf"1\.mlp\.out: {name} of the \w+ is not finite at \(23,.*; was the statistic"):
        Edit({SITE: maps[where]()})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("build", [rp.LowRank.projection, lambda b: rp.LowRank.oblique(b, torch.ones(5, 2))])
def test_a_basis_that_is_not_finite_is_refused(build, value):
    with pytest.raises(NotFinite, match=r"is not finite at \(4, 1\)"):
        build(spoiled(5, 2, value=value))


@pytest.mark.parametrize("value", BAD)
def test_a_difference_that_is_not_finite_is_refused(value):
    with pytest.raises(NotFinite, match=rf"the difference of {UP} is not finite at \(39, 23\)"):
        Delta({UP: spoiled(40, 24, value=value)})
    with pytest.raises(NotFinite, match="the difference of a is not finite"):
        Delta({"a": torch.ones(2)}) * value


def test_an_edit_that_became_not_finite_reaches_no_weight():
    subject = tiny("llama")
    edit = projection(subject, "1.mlp.out")
    edit.maps[SITE].u[0, 0] = torch.nan
    for act in (lambda: rp.apply(edit, subject), lambda: edit.hooks(subject), lambda: edit.save("never")):
        with pytest.raises(NotFinite, match=r"1\.mlp\.out: u of the LowRank is not finite at \(0, 0\)"):
            act()


@pytest.mark.parametrize("site", ["1.mlp.neurons", "0.mlp.neurons"])
def test_a_directory_with_a_weight_that_is_not_finite_is_not_exported(site, tmp_path):
    tiny("llama").model.save_pretrained(tmp_path / "in")
    not_a_number(tmp_path / "in")
    with pytest.raises(NotFinite, match=rf"tensor '{UP}' of .* is not finite at \(3, 4\) \(nan, torch\.float32\)"):
        rp.export(mask(tiny("llama"), site), tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("site", ["1.mlp.neurons", "0.mlp.neurons"])
def test_a_model_in_memory_with_such_a_weight_is_not_exported(site, tmp_path):
    subject = tiny("llama")
    subject.model.get_parameter(UP).data[3] = torch.nan
    with pytest.raises(NotFinite, match=rf"weight '{UP}' is not finite at \(3, 0\)"):
        rp.export(mask(subject, site), subject, tmp_path / "out")


def large(folder, value, dtype=torch.float32, name="model.norm.weight"):
    """A directory one of whose weights is large."""
    tiny("llama", dtype).model.save_pretrained(folder)
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "dtype", "to", "message"),
    [
        (1e6, torch.float32, "float16", r"would hold 1e\+06 at \(5,\), and torch\.float16 .* up to 65504; choose a wider"),
        (-1e5, torch.bfloat16, "float16", r"would hold -99840 at \(5,\), and torch\.float16"),
        (1e300, torch.float64, "float32", r"would hold 1e\+300 at \(5,\), and torch\.float32"),
        (1e300, torch.float64, "bfloat16", r"would hold 1e\+300 at \(5,\), and torch\.bfloat16"),
    ],
)  # fmt: skip
def test_a_cast_that_overflows_is_refused(value, dtype, to, message, tmp_path):
    folder, edit = large(tmp_path / "in", value, dtype), mask(tiny("llama"), "1.mlp.neurons")
    for source in (folder, rp.load(folder)):
        with pytest.raises(NotFinite, match=f"model.norm.weight {message}"):
            rp.export(edit, source, tmp_path / "out", dtype=to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    with pytest.raises(NotFinite, match=rf"holds a number that {to} cannot hold \(load it with dtype='auto'\)"):
        rp.load(folder, dtype=to)


def test_a_dtype_of_torch_is_as_good_as_its_name(tmp_path):
    edit, folder = mask(tiny("llama"), "1.mlp.neurons"), large(tmp_path / "in", 65504)
    for name, dtype in (("a", "float16"), ("b", torch.float16)):
        rp.export(edit, folder, tmp_path / name, dtype=dtype)
    for file in (SINGLE, "config.json", "repedit.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_an_edit_that_overflows_float16_is_refused(tmp_path):
    subject = tiny("llama", torch.float16)
    edit = Edit({rp.Site.parse("1.mlp.out"): rp.Diagonal(torch.full((24,), 1e6))})
    subject.model.save_pretrained(tmp_path / "in")
    for act in (lambda: rp.apply(edit, subject), lambda: rp.export(edit, tmp_path / "in", tmp_path / "out")):
        with pytest.raises(NotFinite, match=r"down_proj\.weight would hold .*torch\.float16 .* or a smaller edit"):
            act()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_eight_bit_floats_are_refused_at_every_door(dtype, tmp_path):
    subject = tiny("llama")
    subject.model.save_pretrained(tmp_path / "in")
    edit = projection(subject, "1.mlp.out")
    for act in (
        lambda: rp.load(tmp_path / "in", dtype=dtype),
        lambda: rp.export(edit, subject, tmp_path / "o", dtype=dtype),
    ):
        with pytest.raises(
            ArgumentError, match=f"dtype='{dtype}' holds weights only beside scales, which repedit does not"
        ):
            act()
    with pytest.raises(DtypeError, match=rf"u has dtype torch\.{dtype}; give one of float16"):
        rp.LowRank(torch.ones(24, 1).to(getattr(torch, dtype)), torch.ones(24, 1).to(getattr(torch, dtype)))
    subject.model.get_parameter(UP).data = subject.model.get_parameter(UP).data.to(getattr(torch, dtype))
    with pytest.raises(
        QuantizedModel,
        match=rf"quantised \({UP} holds torch\.{dtype}, and the config names no quantiser\) and cannot be edited",
    ):
        rp.apply(edit, subject)
    tensors = load_file(tmp_path / "in" / SINGLE)
    save_file(
        tensors | {UP: tensors[UP].to(getattr(torch, dtype))}, tmp_path / "in" / SINGLE, metadata={"format": "pt"}
    )
    for act in (rp.load, lambda folder: rp.export(edit, folder, tmp_path / "o")):
        with pytest.raises(QuantizedModel, match=rf"{UP} holds torch\.{dtype}, and the config names no quantiser"):
            act(tmp_path / "in")


@pytest.mark.usefixtures("unchecked")
def test_maps_that_do_not_hold_together_are_refused():
    one, whole = torch.ones(5, 1), torch.ones(5, 1, dtype=torch.int64)
    for value, what in (
        ([[1.0]], "a list was given where a [tT]ensor is needed"),
        (one.to("meta"), r"has no values \(it is on the meta device\); give a dense"),
        (one.to_sparse(), r"is sparse \(torch\.sparse_coo\); give a dense tensor with values"),
    ):
        makers = (
            rp.LowRank.projection,
            lambda v: rp.LowRank(v, v),
            lambda v: rp.Diagonal(v),
            lambda v: rp.Delta({"a": v}),
        )
        for make in makers:
            with pytest.raises((ArgumentError, DtypeError), match=what):
                make(value)
    with pytest.raises(ShapeError, match=r"the basis has shape \(5,\); give \(d, k\), a direction as \(d, 1\)"):
        rp.LowRank.projection(torch.ones(5))
    with pytest.raises(DtypeError, match=r"the difference of a has dtype torch\.int32; give a floating dtype"):
        rp.Delta({"a": torch.ones(5, dtype=torch.int32)})
    for maps in ({rp.Site.parse("0.mlp.out"): one}, {3: rp.Diagonal(torch.ones(5))}):
        with pytest.raises(
            ArgumentError, match=r"an edit holds a map for each site, and .* has a \w+; give a LowRank or"
        ):
            rp.Edit(maps)
    with pytest.raises(RankError, match=r"u and v of shape \(5, 9\) have rank 9, the width is 5; a map of this width"):
        rp.LowRank(torch.ones(5, 9), torch.ones(5, 9))
    for u, v in ((whole, one), (one, whole), (one.to(torch.complex64), one)):
        with pytest.raises(DtypeError, match=r"[uv] has dtype torch\.(int64|complex64); give one of"):
            rp.LowRank(u, v)
    with pytest.raises(DtypeError, match=r"scale has dtype torch\.bool"):
        rp.Diagonal(torch.ones(5, dtype=torch.bool))
    with pytest.raises(DeviceError, match="must be on one device: u is on cpu, v is on meta"):
        rp.LowRank(one, one.to("meta"))
    for build in (lambda: rp.LowRank(torch.ones(0, 0), torch.ones(0, 0)), lambda: rp.Diagonal(torch.ones(0))):
        with pytest.raises(ShapeError, match="a map needs a width of at least 1"):
            build()
    for build in (lambda: rp.LowRank(torch.ones(5), torch.ones(5)), lambda: rp.LowRank(one, one, one)):
        with pytest.raises(ShapeError, match=r"do not fit: give \(d, k\), \(d, k\), \(d,\)"):
            build()
    with pytest.raises(ShapeError, match=r"scale \(5, 1\) and shift None do not fit"):
        rp.Diagonal(one)


COPIES = [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))]


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("make", [mask, fill, projection, lambda s, site: fill(s, site) | projection(s, site)])
def test_a_copy_of_an_edit_does_the_same(duplicate, make):
    edit = make(tiny("llama"), "1.mlp.out")
    again = duplicate(edit)
    assert again.hash == edit.hash and again.provenance == edit.provenance and list(again.maps) == list(edit.maps)
    assert again != edit and len({again, edit}) == 2
    with pytest.raises(TypeError):
        again.maps[SITE] = None


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_copy_of_a_delta_and_of_a_map_does_the_same(duplicate):
    delta = Delta({"a": torch.arange(3.0)}, {"method": "test", "start": {"a": "0"}}, ({"step": 1, "loss": 2.0},))
    again = duplicate(delta)
    assert torch.equal(again.tensors["a"], delta.tensors["a"]) and again.log == delta.log
    assert again.provenance == delta.provenance and again != delta
    x = torch.randn(2, 24)
    for map_ in (
        rp.LowRank.projection(torch.randn(24, 2)),
        rp.Diagonal(torch.ones(24)),
        rp.Chain((rp.Diagonal(torch.ones(24)),)),
    ):
        map_(x)
        assert torch.equal(duplicate(map_)(x), map_(x))


def test_a_deep_copy_shares_no_tensor():
    edit = projection(tiny("llama"), "1.mlp.out")
    again = copy.deepcopy(edit)
    again.maps[SITE].u.zero_()
    assert bool(edit.maps[SITE].u.any())


def test_an_edit_that_takes_gradients_is_saved_and_hashed(tmp_path):
    u = torch.ones(24, 1, requires_grad=True)
    edit = Edit({SITE: rp.LowRank(u, u)})
    edit.save(tmp_path / "e.safetensors")
    assert Edit.load(tmp_path / "e.safetensors").hash == edit.hash
