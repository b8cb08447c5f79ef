"""Recipes written in TOML."""

import pytest

import repedit as rp
from repedit.errors import ArgumentError, DataError, UnknownName

WHOLE = """
lr = 1
steps = 3
[[terms]]
loss = "npo"
role = "forget"
beta = 1
[[terms]]
loss = "nll"
role = "retain"
weight = 2
[combiner]
name = "blur"
gamma = 2
[sampler]
name = "chunked"
chunk = 4
[[stop]]
name = "loss_above"
role = "retain"
value = 3
[parameters]
layers = "20-29"
modules = ["mlp.out"]
lora = {rank = 4}
[optimiser]
weight_decay = 0.1
betas = [0.9, 0.95]
[schedule]
warmup = 0.1
[saliency]
percentile = 95
loss = "wga"
"""


@pytest.fixture
def read(tmp_path):
    def write(text):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return rp.recipes.read(path)

    return write


def test_every_key_arrives(read):
    found = read(WHOLE)
    assert found.name == "mine" and found.lr == 1.0 and found.steps == 3
    assert [(repr(t.loss), t.role, t.weight) for t in found.terms] == [
        ("npo(beta=1.0)", "forget", 1.0),
        ("nll()", "retain", 2.0),
    ]
    assert repr(found.combiner).startswith("blur(gamma=2.0") and "chunk=4" in repr(found.sampler)
    assert [repr(rule) for rule in found.stop] == ["loss_above(role=retain, value=3.0)"]
    assert found.parameters.layers == "20-29" and found.parameters.modules == ("mlp.out",)
    assert found.parameters.lora is not None and found.parameters.lora.rank == 4
    assert found.optimizer.betas == (0.9, 0.95) and found.schedule.warmup == 0.1
    assert found.saliency is not None and found.saliency.percentile == 95.0 and found.saliency.loss.name == "wga"


def test_a_base_keeps_what_the_file_does_not_say(read):
    base = rp.recipes.by_name("small:npo_gdr", beta=0.5)
    found = read('base = "small:npo_gdr"\nlr = 1\n[options]\nbeta = 0.5\n[parameters]\nlayers = "3"')
    differ = {key for key, value in base.plain().items() if found.plain()[key] != value}
    assert differ == {"recipe", "lr", "parameters"} and found.lr == 1.0
    assert found.parameters.modules == base.parameters.modules and found.parameters.layers == "3"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("lr = ", DataError, "no readable TOML"),
        ("lr = 1", ArgumentError, "names no base"),
        ('base = "npo_gdr"\nlearning_rate = 1', UnknownName, "no key 'learning_rate'"),
        ('base = "npo_gdr"\n[options]\nbetta = 1', UnknownName, "beta"),
        ('base = "npo_gdd"', UnknownName, "npo_gdr"),
        ('base = "zju_merge"', ArgumentError, "merges several"),
        ('[[terms]]\nloss = "npoo"\nrole = "forget"', UnknownName, r"loss='npoo'.*npo"),
        ('[[terms]]\nloss = "npo"\nrole = "forgot"', UnknownName, r"role='forgot'.*forget"),
        ('[[terms]]\nloss = "npo"\nrole = "forget"\ngamma = 1', UnknownName, "loss 'npo' has no option 'gamma'"),
        ('[[terms]]\nloss = "signed_nll"\nrole = "forget"', ArgumentError, "loss 'signed_nll' needs factor"),
        ('base = "npo_gdr"\n[combiner]\nname = "blurr"', UnknownName, r"combiner name='blurr'.*blur"),
        ('base = "npo_gdr"\n[combiner]\nname = "primal_dual"', ArgumentError, "needs epsilon"),
        ('base = "npo_gdr"\n[parameters]\nlayer = "3"', UnknownName, "layers"),
        ('base = "npo_gdr"\n[parameters]\nmask = "x"', UnknownName, "made of tensors"),
        ('base = "npo_gdr"\nlr = -1', ArgumentError, "lr=-1"),
    ],
)
def test_what_is_wrong_is_named(read, text, error, match):
    with pytest.raises(error, match=match):
        read(text)


def test_both_spellings_of_the_optimizer_are_read(read):
    for key in ("optimizer", "optimiser"):
        assert read(f'base = "npo"\n[{key}]\nname = "sgd"').optimizer.name == "sgd"
    with pytest.raises(ArgumentError, match=r"has both \[optimizer\] and \[optimiser\]; keep the first"):
        read('base = "npo"\n[optimiser]\nname = "sgd"\n[optimizer]\nname = "sgd"')


def test_no_file(tmp_path):
    with pytest.raises(DataError, match=r"absent\.toml"):
        rp.recipes.read(tmp_path / "absent.toml")


def test_small_reaches_the_states_a_recipe_is_about():
    steered, plain = (rp.recipes.by_name(f"small:{name}") for name in ("rmu", "npo_gdr"))
    assert steered.parameters.layers == rp.recipes.rmu().parameters.layers != "20-29"
    assert plain.parameters.layers == "20-29" and steered.steps == plain.steps == 60
