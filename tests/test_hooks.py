"""Hooks: containers keep their type, observers change nothing, nothing is left behind."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

import repedit as rp
from repedit.arch import hooks_at
from repedit.data.corpus import tokens
from repedit.edit import Edit
from repedit.errors import HookError, UnknownArchitecture, UnknownSite
from repedit.hooks import Hook, installed, primary, with_primary
from tests.edits import mask, projection
from tests.laws import generated, hooks_act_or_refuse, seen_at
from tests.tiny import ids, logits, tiny

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
    with pytest.raises(HookError, match=f"a tuple that begins with one, and got a {type(output).__name__}"):
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
@pytest.mark.parametrize("point", [p for p in rp.Point if not p.startswith(("mixer", "ple"))])
def test_observing_a_site_does_not_change_the_logits(family, point):
    subject = tiny(family)
    base = logits(subject)
    assert seen_at(subject, rp.Site(1, point)).abs().sum() > 0
    hooks = hooks_at(subject.model, subject.layout, rp.Site(1, point), lambda x, at, tokens: None, replaces=False)
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
            subject.model, subject.layout, rp.Site.parse("0.resid.mid"), lambda x, at, tokens: None, replaces=False
        )


def test_a_layer_that_does_not_exist_has_no_hooks():
    subject = tiny("llama")
    with pytest.raises(UnknownSite, match=r"2.mlp.out: layers are 0..1"):
        hooks_at(subject.model, subject.layout, rp.Site.parse("2.mlp.out"), lambda x, at, tokens: None, replaces=False)


# Code that passes over hooks.


def _compiled_part(lm, name):
    parent = lm.model.model.layers[1]
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))


def _compiled_forward(lm):
    lm.model.forward = torch.compile(lm.model.forward, backend="eager")


PASSED_OVER = {
    "model.compile": lambda lm: lm.model.compile(backend="eager"),
    "base.compile": lambda lm: lm.model.model.compile(backend="eager"),
    "block.compile": lambda lm: lm.model.model.layers[1].compile(backend="eager"),
    "compiled forward": _compiled_forward,
    "compiled mlp": lambda lm: _compiled_part(lm, "mlp"),
}


@pytest.mark.parametrize("way", PASSED_OVER)
def test_hooks_act_on_compiled_code(way):
    plain, lm = tiny("llama"), tiny("llama")
    PASSED_OVER[way](lm)
    edit = projection(lm, "1.mlp.out")
    hooks_act_or_refuse(lm, edit, lambda: logits(lm))
    with edit.hooked(lm), edit.hooked(plain):
        torch.testing.assert_close(logits(lm), logits(plain))


def test_hooks_act_in_a_model_that_is_compiled_as_a_part_of_another_one():
    lm = tiny("llama")
    whole = torch.compile(nn.Sequential(lm.model), backend="eager")
    with torch.no_grad():
        hooks_act_or_refuse(lm, projection(lm, "1.mlp.out"), lambda: whole(ids()).logits)


def test_measuring_sees_a_compiled_model():
    lm = tiny("llama")
    lm.model.compile(backend="eager")
    corpus, edit = tokens([{"input_ids": ids(), "attention_mask": torch.ones_like(ids())}]), projection(lm, "1.mlp.out")
    plain, edited = rp.predictions(lm, corpus), rp.predictions(lm, corpus, edit=edit)
    assert edited.mean_loss == pytest.approx(rp.predictions(rp.apply(edit, lm), corpus).mean_loss, rel=1e-5)
    assert abs(edited.mean_loss - plain.mean_loss) > 1e-3
    assert rp.collect(lm, corpus, "1.mlp.neurons").counted and rp.check_architecture(lm.model).passed


def test_what_torch_compile_returned_is_wrapped_as_the_model_in_it():
    model = tiny("llama").model
    assert rp.wrap(torch.compile(model, backend="eager"), None).model is model
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    with pytest.raises(UnknownArchitecture, match=r"model.layers.0 was returned by torch.compile\(module\)"):
        rp.wrap(model, None)


def test_the_stance_of_the_compiler_comes_back_when_the_last_context_is_left():
    lm, counted = tiny("llama"), []

    def count(graph, _inputs):
        counted.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x.sin() + 1, backend=count)
    edit = projection(lm, "1.mlp.out")
    with pytest.raises(KeyError, match="a fault"), edit.hooked(lm), edit.hooked(tiny("gpt2")):
        function(X)
        assert not counted
        raise KeyError("a fault")
    function(X)
    assert counted


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_modules_are_refused_by_name():
    lm, plain = tiny("llama"), nn.Sequential(nn.Linear(3, 3), nn.Identity())
    lm.model.model.layers[1].mlp = torch.jit.trace(lm.model.model.layers[1].mlp, torch.randn(3, 11, 24))
    named = r"'model.layers.1.mlp.down_proj' is scripted by torch.jit, where hooks do not run"
    with pytest.raises(HookError, match=named), projection(lm, "1.mlp.out").hooked(lm):
        pass
    for scripted in (torch.jit.script(plain), torch.jit.trace(plain, X)):
        with (
            pytest.raises(HookError, match=r"is scripted by torch.jit"),
            installed(scripted, [Hook(dict(scripted.named_modules())["0"], "input", print)]),
        ):
            pass


def test_a_module_that_is_never_called_is_refused_at_the_end_of_the_pass():
    part = nn.Linear(3, 3)
    model = nn.Sequential(part, nn.Identity()).eval()
    model.forward = lambda x: nn.functional.linear(x, part.weight)
    with (
        pytest.raises(HookError, match="the forward pass never calls '0'"),
        installed(model, [Hook(part, "input", print)]),
    ):
        model(X)


def test_a_compiled_function_installs_no_hooks():
    model = nn.Sequential(nn.Identity()).eval()

    @torch.compile(backend="eager")
    def changed(x):
        with installed(model, [Hook(model[0], "output", lambda x: x + 1)]):
            return model(x)

    with pytest.raises(HookError, match=r"by a function that torch.compile compiles; install them around it"):
        changed(X)
    with installed(model, [Hook(model[0], "output", lambda x: x + 1)]):  # nothing is left of the refusal
        assert torch.equal(model(X), NEW)


# Every hook runs in every pass that ends.


class Skipping(nn.Module):
    """Its second part runs where it is told to, and it can fail between the two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.skip, self.fail = nn.Identity(), nn.Identity(), False, False

    def forward(self, x):
        x = self.first(x)
        if self.fail:
            raise KeyError("stopped early")
        return x if self.skip else self.second(x)


@pytest.fixture
def skipping():
    model = Skipping().eval()
    return model, [Hook(part, "output", lambda x: x + 1) for part in (model.first, model.second)]


def test_a_hook_that_ran_before_must_run_in_every_pass(skipping):
    model, hooks = skipping
    with installed(model, hooks):
        assert torch.equal(model(X), X + 2)
        model.skip = True
        with pytest.raises(HookError, match="the forward pass never calls 'second'"):
            model(X)


def test_a_pass_that_stops_early_or_is_of_another_model_or_never_comes_is_no_fault(skipping):
    model, hooks = skipping
    model.fail = True
    with installed(model, hooks):
        with pytest.raises(KeyError, match="stopped early"):
            model(X)
        Skipping()(X)
        model.first(X)
    with installed(model, hooks):
        pass


def test_in_training_mode_a_hook_may_miss_passes_but_not_all(skipping):
    model, hooks = skipping
    model.train().skip = True
    with installed(model, hooks):
        model(X)
        model.skip = False
        model(X)
    model.skip = True
    with pytest.raises(HookError, match="'second'"), installed(model, hooks):
        model(X)


def test_an_exception_in_the_context_is_not_hidden_by_a_hook_that_never_ran(skipping):
    model, hooks = skipping
    model.train().skip = True
    with pytest.raises(KeyError, match="the caller's"), installed(model, hooks):
        model(X)
        raise KeyError("the caller's")


def test_an_early_exit_of_a_model_is_refused_as_its_last_layers_go_unedited():
    lm = tiny("llama")
    lm.model.config.num_hidden_layers = 1
    with pytest.raises(HookError, match=r"'model.layers.1.mlp.down_proj'"):
        rp.collect(lm, tokens([{"input_ids": ids(), "attention_mask": torch.ones_like(ids())}]), "1.mlp.neurons")


def test_a_hook_outside_the_model_is_refused():
    with (
        pytest.raises(HookError, match="a hook is on a Linear that is not part of the Identity"),
        installed(nn.Identity(), [Hook(nn.Linear(2, 2), "input", print)]),
    ):
        pass


def test_a_module_that_is_called_without_hidden_states_is_refused():
    module = Chatty()
    module.forward = lambda other: other
    with (
        pytest.raises(HookError, match=r"Chatty was called without hidden states, with \['other'\]"),
        installed(module, [Hook(module, "input", lambda x: x)]),
    ):
        module(other=X)


def test_generation_runs_every_hook_in_every_step():
    lm = tiny("llama")
    edit = projection(lm, "1.mlp.out")
    with edit.hooked(lm):
        hooked = generated(lm)
    assert torch.equal(hooked, generated(rp.apply(edit, lm)))


def test_the_middle_of_a_block_needs_the_block_to_run():
    lm = tiny("llama")
    edit, attention = projection(lm, "1.resid.mid"), lm.model.model.layers[1].self_attn
    with edit.hooked(lm):
        expected = logits(lm)
        attention.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("a fault")))
        with pytest.raises(KeyError, match="a fault"):
            logits(lm)
        attention._forward_pre_hooks.clear()
        assert torch.equal(logits(lm), expected)  # nothing of the pass that failed is left
        with pytest.raises(
            HookError, match=r"1.resid.mid: the attn branch ran outside its block.*gradient_checkpointing_disable"
        ):
            lm.model.get_submodule(lm.layout.branch(1, rp.Point.ATTN_OUT).outputs[0])(torch.zeros(1, 24))


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("site", ["1.mlp.out", "1.mlp.neurons", "0.resid.mid", "0.resid.pre", "1.attn.neurons"])
def test_hooks_under_autocast_compute_as_the_maps_alone_do(site, dtype):
    lm, given = tiny("llama"), []
    edit = mask(lm, site) | projection(lm, site, center=True)
    (map_,) = edit.maps.values()
    spied = Edit({edit_site: Spied(map_, given) for edit_site in edit.maps})
    with torch.autocast("cpu", dtype=dtype), edit.hooked(lm):
        logits(lm)
    with torch.autocast("cpu", dtype=dtype), spied.hooked(lm):
        logits(lm)
    assert given, "the map was never called"
    for x, y in given:
        assert torch.equal(y, map_(x)) and y.dtype == x.dtype


class Spied(rp.AffineMap):
    """A map that keeps what it was given and what it gave."""

    def __init__(self, inner, given) -> None:
        self.inner, self.given = inner, given

    width = property(lambda self: self.inner.width)
    rank_removed = offset = property(lambda self: None)
    left = right = None
    tensors = property(lambda self: self.inner.tensors)

    def __call__(self, x):
        y = self.inner(x)
        self.given.append((x.clone(), y.clone()))
        return y


def test_expert_neurons_are_masked_under_autocast():
    lm = tiny("mixtral")
    edit = mask(lm, "1.mlp.neurons")
    with edit.hooked(lm):
        exact = logits(lm)
        with torch.autocast("cpu", dtype=torch.float16):
            rough = logits(lm)
    assert float((rough - exact).abs().max() / exact.std()) < 0.1  # 0.011 measured; the edit moves 2.6


def test_statistics_under_autocast_are_sums_of_what_the_model_computed():
    lm, seen = tiny("llama"), []
    corpus = tokens([{"input_ids": ids(), "attention_mask": torch.ones_like(ids())}])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rp.collect(lm, corpus, "1.mlp.neurons", first_position=True)["1.mlp.neurons"]
        hook = Hook(lm.model.model.layers[1].mlp.down_proj, "input", lambda x: seen.append(x.clone()))
        with installed(lm.model, [hook]):
            logits(lm)
    torch.testing.assert_close(found.square, seen[0].double().square().sum((0, 1)), rtol=1e-5, atol=1e-6)
