"""Hooks: containers keep their type, observers change nothing, nothing is left behind."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import repedit as rp
from repedit.arch import hooks_at
from repedit.errors import HookError, UnknownSite
from repedit.hooks import Hook, installed, primary, with_primary
from tests.laws import seen_at
from tests.tiny import logits, tiny

X, NEW = torch.zeros(2, 3), torch.ones(2, 3)


class Pair(NamedTuple):
    hidden: torch.Tensor
    weights: str


class Chatty(nn.Module):
    """A block in the style of old transformers: keyword input, tuple output."""

    def forward(self, hidden_states, scale=2.0):
        return hidden_states * scale, "attention"


@pytest.mark.parametrize("output", [X, (X, "rest"), [X, 1, 2], Pair(X, "rest"), (X,)], ids=lambda o: type(o).__name__)
def test_replacing_the_primary_tensor_keeps_the_container(output):
    replaced = with_primary(output, NEW)
    assert primary(output) is X and primary(replaced) is NEW
    assert type(replaced) is type(output)
    assert isinstance(output, torch.Tensor) or list(replaced[1:]) == list(output[1:])


@pytest.mark.parametrize("output", [("text", X), None, {"hidden": X}], ids=str)
def test_an_output_without_a_tensor_in_front_is_refused(output):
    with pytest.raises(HookError, match=f"a tuple that begins with one, found {type(output).__name__}"):
        primary(output)


@pytest.mark.parametrize("call", [lambda m: m(X + 1), lambda m: m(hidden_states=X + 1)], ids=["positional", "keyword"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_hook_replaces_and_an_observer_does_not(side, call):
    module, seen = Chatty(), []
    with installed(module, [Hook(module, side, lambda x: x + 10)]):
        hidden, rest = call(module)
    assert torch.equal(hidden, NEW * (22 if side == "input" else 12)) and rest == "attention"
    with installed(module, [Hook(module, side, lambda x: seen.append(x.clone()))]):
        assert torch.equal(call(module)[0], NEW * 2)
    assert torch.equal(seen[0], NEW * (1 if side == "input" else 2))


def test_an_observed_output_is_the_very_same_object():
    module, output = nn.Identity(), Pair(X, "rest")
    with installed(module, [Hook(module, "output", lambda x: None)]):
        assert module(output) is output


def test_hooks_of_one_module_act_in_the_order_given():
    module = Chatty()
    with installed(module, [Hook(module, "output", lambda x: x + 1), Hook(module, "output", lambda x: x * 3)]):
        assert torch.equal(module(X)[0], NEW * 3)


class Logged(nn.Module):
    """A module that is its own handle and notes when a hook comes and goes."""

    def __init__(self, name: str, log: list[str]) -> None:
        super().__init__()
        self.name, self.log = name, log

    def register_forward_hook(self, *_args, **_options):
        self.log.append(f"+{self.name}")
        return self

    def remove(self):
        self.log.append(f"-{self.name}")


def test_hooks_are_removed_in_reverse_order_also_after_an_exception():
    log: list[str] = []
    parts = nn.ModuleList(Logged(name, log) for name in "abc")
    hooks = [Hook(part, "output", print) for part in parts]
    with pytest.raises(KeyError, match="as it happens"), installed(parts, hooks):
        raise KeyError("as it happens")
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]


class Fixed(nn.Identity):
    """A module that takes no hook."""

    def register_forward_hook(self, *_args, **_options):
        raise RuntimeError("no hook here")


def test_hooks_already_installed_are_removed_when_a_later_one_fails():
    model = nn.Sequential(nn.Identity(), Fixed())
    with (
        pytest.raises(RuntimeError, match="no hook here"),
        installed(model, [Hook(model[0], "output", print), Hook(model[1], "output", print)]),
    ):
        pass
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("point", list(rp.Point))
def test_observing_a_site_does_not_change_the_logits(family, point):
    subject = tiny(family)
    base = logits(subject)
    assert seen_at(subject, rp.Site(1, point)).abs().sum() > 0
    hooks = hooks_at(subject.model, subject.anatomy, rp.Site(1, point), lambda x, at, tokens: None, replaces=False)
    with installed(subject.model, hooks):
        assert torch.equal(logits(subject), base)


def test_the_middle_of_a_block_is_its_input_and_the_attention_output():
    subject = tiny("llama", torch.float64)
    pre, out, mid = (seen_at(subject, rp.Site.parse(f"1.{point}")) for point in ("resid.pre", "attn.out", "resid.mid"))
    torch.testing.assert_close(mid, pre + out, rtol=0, atol=0)
    mlp, post = (seen_at(subject, rp.Site.parse(f"1.{point}")) for point in ("mlp.out", "resid.post"))
    torch.testing.assert_close(mid + mlp, post, rtol=1e-12, atol=1e-12)


def test_a_parallel_block_has_no_middle():
    subject = tiny("gptj")
    with pytest.raises(UnknownSite, match=r"0.resid.mid: gptj adds attention and MLP in parallel"):
        hooks_at(
            subject.model, subject.anatomy, rp.Site.parse("0.resid.mid"), lambda x, at, tokens: None, replaces=False
        )


def test_a_layer_that_does_not_exist_has_no_hooks():
    subject = tiny("llama")
    with pytest.raises(UnknownSite, match=r"2.mlp.out: layers are 0..1"):
        hooks_at(subject.model, subject.anatomy, rp.Site.parse("2.mlp.out"), lambda x, at, tokens: None, replaces=False)
