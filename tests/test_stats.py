"""Running statistics equal one naive float64 pass, however the tokens arrive."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import repedit as rp
from repedit.data.corpus import tokens
from repedit.errors import MissingStatistic, NotFinite, ShapeError
from repedit.hooks import Hook, installed
from tests.laws import FLOAT32_ATTENTION, seen_at, wide
from tests.tiny import FAMILIES, ids, tiny
from tests.tolerances import within

SIGNED = {"total": "abs", "gxa": "gxa_abs", "grad": "grad_abs"}


def _normal(*shape, seed=0, mean=0.0, std=1.0):
    return mean + std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _naive(z, mask, grad=None):
    z = z[mask].double()
    found = {"total": z.sum(0), "abs": z.abs().sum(0), "square": (z**2).sum(0), "positive": (z > 0).double().sum(0)}
    if grad is not None:
        g = grad[mask].double()
        found |= {"gxa_abs": (z * g).abs().sum(0), "gxa": (z * g).sum(0), "gxa_square": ((z * g) ** 2).sum(0)}
        found |= {"grad": g.sum(0), "grad_abs": g.abs().sum(0)}
    return found | {"count": torch.full_like(found["total"], len(z))}


def _assert_is(stat, naive, tolerance="sums in float32"):
    raw = rp.Activity.zeros(stat.width, gradients=stat.has_gradients) + stat
    for name, expected in naive.items():
        if name != "grad_abs":
            scale = naive[SIGNED.get(name, name)].clamp(min=1e-300)
            error = float(((getattr(raw, name) - expected) / scale).abs().max())
            if name in ("count", "positive"):
                assert error == 0, name
            else:
                within(error, tolerance)


def _values(stat):
    raw = rp.Activity.zeros(stat.width) + stat
    names = ("count", "total", "abs", "square", "positive", "first_count", "first_abs", "first_square")
    return {name: getattr(raw, name) for name in names}


def _assert_same(a, b, tolerance="sums in float32"):
    a, b = _values(a), _values(b)
    for name in a:
        scale = a[SIGNED.get(name, name)].clamp(min=1e-300)
        within(float(((a[name] - b[name]) / scale).abs().max()), tolerance)


@given(n=st.integers(1, 300), f=st.integers(1, 9), seed=st.integers(0, 10**6), mean=st.sampled_from([0.0, -3.0, 500.0]))
@settings(max_examples=30, deadline=None)
def test_sums_equal_a_naive_float64_pass(n, f, seed, mean):
    z, grad = _normal(n, f, seed=seed, mean=mean), _normal(n, f, seed=seed + 1)
    mask = _normal(n, seed=seed + 2) > -0.5
    _assert_is(rp.Activity.zeros(f, gradients=True).update(z, mask, grad=grad), _naive(z, mask, grad))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_other_dtypes_equal_a_naive_float64_pass_over_9000_rows(dtype):
    z, mask = _normal(9000, 5).to(dtype), _normal(9000, seed=1) > 0
    _assert_is(
        rp.Activity.zeros(5).update(z, mask),
        _naive(z, mask),
        "sums in float64" if dtype == torch.float64 else "sums in float32",
    )


@given(cuts=st.lists(st.integers(0, 400), max_size=5), mean=st.sampled_from([0.0, 100.0]))
@settings(max_examples=20, deadline=None)
def test_batch_size_and_merge_order_do_not_matter(cuts, mean):
    z, mask = _normal(400, 4, mean=mean), _normal(400, seed=1) > 0
    whole = rp.Activity.zeros(4).update(z, mask, first=~mask)
    edges = [0, *sorted(cuts), 400]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    stream, merged = rp.Activity.zeros(4), rp.Activity.zeros(4)
    for part in parts:
        stream.update(z[part], mask[part], first=~mask[part])
        merged = rp.Activity.zeros(4).update(z[part], mask[part], first=~mask[part]) + merged
    _assert_same(whole, stream)
    _assert_same(whole, merged)


@pytest.mark.numeric
def test_merging_different_shifts_is_exact():
    near, far, other = (rp.Activity.zeros(3).update(_normal(50, 3, mean=m, seed=int(m))) for m in (0.0, 1e4, -1e3))
    assert near.shift is None and far.shift is not None and other.shift is not None
    for a, b in ((near, far), (far, other)):
        _assert_same(a + b, b + a, "sums in float64")
        torch.testing.assert_close((a + b).variance, (b + a).variance, rtol=1e-9, atol=0)
    _assert_same((near + far) + other, near + (far + other), "sums in float64")


def test_std_is_the_standard_deviation():
    stat = rp.Activity.zeros(4).update(_normal(60_000, 4, std=3.0))
    torch.testing.assert_close(stat.variance.sqrt(), torch.full((4,), 3.0).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(stat.rms, torch.full((4,), 3.0).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("mean", [0.0, 29.0, 31.0, 1e3, -1e4])
def test_variance_survives_a_large_mean(mean):
    z = _normal(60_000, 4, mean=mean)
    stat = rp.Activity.zeros(4)
    for rows in z.split(1000):
        stat.update(rows)
    torch.testing.assert_close(stat.variance, z.double().var(0, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(stat.variance.sqrt(), torch.ones(4).double(), rtol=0.01, atol=0)
    torch.testing.assert_close(stat.mean, z.double().mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_counted_may_be_anything(bad):
    z, mask = _normal(200, 3), _normal(200, seed=1) > 0
    dirty = torch.where(mask[:, None], z, bad)
    grad = torch.where(mask[:, None], z + 1, bad)
    _assert_is(rp.Activity.zeros(3, gradients=True).update(dirty, mask, grad=grad), _naive(z, mask, z + 1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_counted_must_be_finite(bad):
    z = _normal(200, 3)
    z[150, 2] = bad
    with pytest.raises(NotFinite, match="of neuron 2 is not finite; load the model in float32"):
        rp.Activity.zeros(3).update(z)


def test_first_positions_are_summed_apart():
    z = _normal(4, 6, 3)
    first = torch.zeros(4, 6, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    stat = rp.Activity.zeros(3).update(z, ~first, first=first)
    assert stat.first_count.tolist() == [4, 4, 4] and stat.count.tolist() == [20, 20, 20]
    torch.testing.assert_close(stat.first_abs, z[:, 0].double().abs().sum(0))
    torch.testing.assert_close(stat.first_square, z[:, 0].double().square().sum(0))


def test_nothing_counted_is_nothing():
    stat = rp.Activity.zeros(3).update(_normal(5, 3), torch.zeros(5, dtype=torch.bool))
    assert not any(bool(value.any()) for value in (stat.count, stat.mean, stat.variance, stat.rms))


def test_parts_of_a_site_count_for_themselves():
    z, stat = _normal(10, 6), rp.Activity.zeros(6)
    stat.update(z[:4, :2], at=slice(0, 2)).update(z[4:, 2:], at=slice(2, 6))
    assert stat.count.tolist() == [4, 4, 6, 6, 6, 6]
    torch.testing.assert_close(stat.mean, torch.cat([z[:4, :2].double().mean(0), z[4:, 2:].double().mean(0)]))


def test_what_does_not_fit_is_refused():
    stat = rp.Activity.zeros(3)
    with pytest.raises(ShapeError, match="statistic has width 3, the activations have width 4"):
        stat.update(_normal(5, 4))
    with pytest.raises(ShapeError, match=r"mask \(4,\) must have the leading shape of the activations, \(5,\)"):
        stat.update(_normal(5, 3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="cannot merge statistics of widths 3 and 4; are they of one site"):
        stat + rp.Activity.zeros(4)
    with pytest.raises(MissingStatistic, match="one statistic has gradient sums, the other has none"):
        stat + rp.Activity.zeros(3, gradients=True)


# On a model: the same laws through collect.


def _padded(x, before, after):
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    return tokens([{k: torch.nn.functional.pad(v, (before, after)) for k, v in batch.items()}])


def _assert_same_activity(subject, x, name):
    where = ["*.mlp.neurons", "*.attn.neurons"]
    whole = rp.collect(subject, _padded(x, 0, 0), where)
    singly = tokens([{"input_ids": row[None]} for row in x])
    for other in (_padded(x, 0, 3), _padded(x, 0, 17), _padded(x, 4, 0), _padded(x, 2, 5), singly):
        again = rp.collect(subject, other, where)
        for site in whole:
            _assert_same(whole[site], again[site], name)


@pytest.mark.numeric
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_batch_size_do_not_matter_to_a_model(family):
    with wide(subject := tiny(family, torch.float64)):
        exact = family not in FLOAT32_ATTENTION
        _assert_same_activity(subject, ids(4, 9), "padding, float64" if exact else "padding, float32 attention")


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["llama", "opt", "gptj", "mixtral"])
def test_padding_does_not_matter_to_a_model_in_float32(family):
    _assert_same_activity(tiny(family), ids(4, 9), "padding, float32")


def test_collecting_equals_a_naive_pass():
    subject, x = tiny("llama"), ids()
    found = rp.collect(subject, tokens([{"input_ids": x}]))
    mask = torch.ones_like(x).bool().index_fill(1, torch.tensor([0]), False)
    for site, stat in found.items():
        _assert_is(stat, _naive(seen_at(subject, site), mask))


def _loss(subject, x, mask):
    """Negative log-likelihood of the tokens of the mask, each predicted from the position before it."""
    found = subject.model(input_ids=x).logits[:, :-1].log_softmax(-1).gather(2, x[:, 1:, None])[..., 0]
    return -found[mask[:, 1:]].sum()


@pytest.mark.parametrize("stop", [11, 4], ids=["all", "first positions"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_gradient_sums_equal_autograd(family, stop):
    subject, x, seen = tiny(family, torch.float64), ids(), []
    mask = ((torch.arange(11) > 0) & (torch.arange(11) < stop)).expand(3, 11)
    writer = subject.model.get_submodule(subject.layout.branch(0, rp.Point.MLP_NEURONS).writer)
    with installed(subject.model, [Hook(writer, "input", lambda z: seen.append(z))]):
        loss = _loss(subject, x, mask)
    z, grad = (t.reshape(*x.shape, -1) for t in (seen[0].detach(), torch.autograd.grad(loss, seen)[0]))
    found = rp.collect(subject, tokens([{"input_ids": x}]), count=lambda _: mask, gradients=True)["0.mlp.neurons"]
    _assert_is(found, _naive(z, mask, grad), "sums in float64")


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_expert_neurons_count_the_tokens_routed_to_them(family):
    subject, x, seen = tiny(family, torch.float64), ids(), []
    branch = subject.layout.branch(1, rp.Point.MLP_NEURONS)
    experts = subject.model.get_submodule(branch.writer)
    note = Hook(experts, "call", lambda module, args, kwargs, output: seen.append((*args, *kwargs.values())))
    with installed(subject.model, [note]):
        found = rp.collect(subject, tokens([{"input_ids": x}]))["1.mlp.neurons"]
    hidden, index = seen[0][:2]
    counted = torch.ones_like(x).bool().index_fill(1, torch.tensor([0]), False).reshape(-1)
    for e, part in enumerate(branch.parts):
        gate, up = (hidden @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
        naive = _naive(experts.act_fn(gate) * up, counted & (index == e).any(1))
        torch.testing.assert_close(found.abs[part.start : part.stop], naive["abs"], rtol=1e-9, atol=0)
        assert torch.equal(found.count[part.start : part.stop], naive["count"])


@pytest.mark.parametrize("gradients", [False, True])
def test_no_activation_outlives_its_hook(gradients):
    subject, seen, alive = tiny("llama"), [], []
    writers = [subject.model.get_submodule(b.writer) for pair in subject.layout.layers for b in pair]

    def at_the_start_of_a_batch(_x):
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))

    start = Hook(subject.model.get_submodule("model.layers.0"), "input", at_the_start_of_a_batch)
    corpus = tokens([{"input_ids": ids(2, 9, seed)} for seed in range(3)])
    gc.collect()
    gc.freeze()  # what is there before the run need not be looked through again at every batch
    try:
        notes = [Hook(writer, "input", lambda x: seen.append(weakref.ref(x))) for writer in writers]
        with installed(subject.model, [start, *notes]):
            found = rp.collect(subject, corpus, ["*.mlp.neurons", "*.attn.neurons"], gradients=gradients)
    finally:
        gc.unfreeze()
    assert len(seen) == 12 and alive == [0, 0, 0]
    assert not any(ref() is not None for ref in seen)
    assert max(v.numel() for s in found.values() for v in vars(s).values() if v is not None) == 40
