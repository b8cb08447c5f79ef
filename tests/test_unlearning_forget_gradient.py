"""Laws of how the forget gradient is taken: sharpness-aware, at forks, without common directions, by agreement."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import repedit as rp
from repedit.distributed import ProcessGroup
from repedit.errors import ArgumentError, NotEnoughRows, RankError, SelectionError, TrainingError, UnknownName
from repedit.unlearning import forget_gradient, losses
from repedit.unlearning.combiners import weighted_sum
from repedit.unlearning.forget_gradient import Agreement, CommonPart, Fork, LeadingDirections, SharpnessAware
from repedit.unlearning.parameters import Lora, Parameters
from repedit.unlearning.recipe import OptimizerConfig
from repedit.unlearning.schedule import metric
from tests.unlearning_cases import rows, sides, subject, training

MLPS = Parameters("0-1", ("mlp.in", "mlp.out"))
FORK = Fork(every=2, steps=3, lr=0.3)
WAYS = {
    "sam": {"adversary": SharpnessAware(0.05)},
    "fork": {"adversary": FORK},
    "common part": {"gradient_filter": CommonPart(2, 3, every=2)},
    "leading": {"gradient_filter": LeadingDirections(3, every=2), "adversary": Fork(2, 1, 0.1, held_out=False)},
    "agreement": {"agreement": Agreement()},
}


def recipe(**fields):
    """Gradient difference by SGD on the MLPs, with another forget gradient."""
    return rp.recipes.grad_diff(
        optimizer=OptimizerConfig("sgd"), parameters=MLPS, lr=0.01, batch_size=3, steps=4, **fields
    )


def stepped(run, steps: int = 1):
    """A training after some steps."""
    run.total_steps = steps
    run.run(after_step=lambda: None, progress=False)
    return run


def watched(run, monkeypatch) -> list[dict]:
    """The weights at every forward and backward pass of the forget side."""
    seen = []
    honest = run.forget_gradient.backward

    def backward(rows, step, sums, *, relearn=False):
        weights = {name: p.detach().clone() for name, p in run.trainable.tensors.items()}
        seen.append({"rows": list(rows["forget"]), "weights": weights, "relearn": relearn})
        honest(rows, step, sums, relearn=relearn)

    monkeypatch.setattr(run.forget_gradient, "backward", backward)
    return seen


def distance(first, second) -> float:
    return float(torch.cat([(first[n] - second[n]).flatten() for n in first]).norm())


# --- Sharpness-aware


def perturbation_has_the_norm(monkeypatch, rho=0.05):
    """The second pass stands rho away, along the gradient of the first, and the weights come back to the bit."""
    run = training(recipe(adversary=SharpnessAware(rho)), **sides())
    seen = watched(run, monkeypatch)
    start = {name: p.detach().clone() for name, p in run.trainable.tensors.items()}
    kept = []
    monkeypatch.setattr(run.optimizer, "step", lambda: kept.append(run.trainable.differences()))
    stepped(run)
    assert distance(seen[1]["weights"], start) == pytest.approx(rho, rel=1e-9), "not the norm asked for"
    assert kept == [{}], "the perturbation remains"
    assert seen[0]["rows"] == seen[1]["rows"]


def test_the_perturbation_has_the_norm_asked_for_and_is_undone(monkeypatch):
    perturbation_has_the_norm(monkeypatch)


def test_a_perturbation_tensor_by_tensor_is_caught(monkeypatch):
    honest = forget_gradient._perturbed
    monkeypatch.setattr(forget_gradient, "_perturbed", lambda ps, rho: [honest([p], rho)[0] for p in ps])
    with pytest.raises(AssertionError, match="not the norm"):
        perturbation_has_the_norm(monkeypatch)


def test_a_perturbation_that_remains_is_caught(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def forgetful(parameters, values):
        for p, value in zip(parameters, values, strict=True):
            p.data = value
        yield

    monkeypatch.setattr(forget_gradient, "replaced_by", forgetful)
    with pytest.raises(AssertionError, match="remains"):
        perturbation_has_the_norm(monkeypatch)


def test_a_flat_loss_is_not_perturbed():
    """The published code divides by the norm of a gradient of zero."""
    run = training(recipe(adversary=SharpnessAware(), combiner=weighted_sum()), **sides())
    run.recipe = replace(run.recipe, terms=(replace(run.recipe.terms[0], weight=1e-300), run.recipe.terms[1]))
    assert all(torch.isfinite(p).all() for p in stepped(run).parameters)


def test_sam_of_a_vanishing_radius_is_the_recipe_itself():
    plain, near, far = (
        stepped(training(recipe(adversary=a), **sides())).trainable.differences()
        for a in (None, SharpnessAware(1e-9), SharpnessAware(0.5))
    )
    assert distance(plain, near) < 1e-6 * distance(plain, far)


# --- Forks


def fork_leaves_the_model(monkeypatch):
    """The fork relearns one half and unlearns the other; the model moves by its own step alone."""
    run = training(recipe(adversary=FORK), **sides())
    seen = watched(run, monkeypatch)
    start = {name: p.detach().clone() for name, p in run.trainable.tensors.items()}
    moved = []
    monkeypatch.setattr(run.optimizer, "step", lambda: moved.append(run.trainable.differences()))
    stepped(run)
    relearn, last = seen[:-1], seen[-1]
    assert [s["relearn"] for s in seen] == [True] * FORK.steps + [False]
    assert moved == [{}], "the fork moved the model"
    assert distance(last["weights"], start) > 0, "not at the fork"
    assert not {i for s in relearn for i in s["rows"]} & set(last["rows"]), "the halves overlap"


def test_a_fork_leaves_the_model_untouched(monkeypatch):
    fork_leaves_the_model(monkeypatch)


def test_a_fork_in_place_is_caught(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **_: self)
    with pytest.raises(AssertionError, match=r"moved the model|not at the fork"):
        fork_leaves_the_model(monkeypatch)


def test_a_fork_of_all_rows_is_caught(monkeypatch):
    monkeypatch.setattr(forget_gradient.ForgetGradient, "_halves", lambda *_: (list(range(6)), list(range(6))))
    with pytest.raises(AssertionError, match="halves overlap"):
        fork_leaves_the_model(monkeypatch)


def test_a_fork_relearns():
    """The forget loss at the fork is lower on the rows that it saw."""
    run = stepped(training(recipe(adversary=Fork(2, 10, 0.3)), **sides()))
    relearned, _ = run.forget_gradient._halves(run.recipe.adversary, 0)
    sums = [{}, {}]
    run.forget_gradient.backward({"forget": relearned}, 0, sums[0])
    with forget_gradient.replaced_by(
        run.parameters, [run.forget_gradient.state[f"fork/{n}"] for n in run.trainable.tensors]
    ):
        run.forget_gradient.backward({"forget": relearned}, 0, sums[1])
    assert float(sums[1]["nll forget"]) < 0.9 * float(sums[0]["nll forget"])


def test_all_wordings_of_a_fact_are_in_one_half():
    facts = [
        replace(row, id=f"{row.id}{wording}", prompt=f"{row.prompt}{wording}")
        for row in rows()
        for wording in ("", "#1")
    ]
    run = training(recipe(adversary=FORK), forget=facts, retain=rows(6, 12))
    first, second = ({run.forget_gradient.facts[i] for i in half} for half in run.forget_gradient._halves(FORK, 0))
    assert len(first) == len(second) == 3 and not first & second


def test_halves_are_drawn_again_and_from_the_seed():
    def halves(step, seed=0):
        return training(recipe(adversary=FORK), seed=seed, **sides()).forget_gradient._halves(FORK, step)[0]

    assert (
        halves(0) == halves(1) == halves(0)
        and len({tuple(halves(step, seed)) for step in (0, 2, 4) for seed in (0, 1)}) > 2
    )


def test_a_fork_that_diverges_is_an_error():
    with pytest.raises(TrainingError, match=r"the fork diverged at lr 1e\+300.*lower lr of the fork"):
        stepped(training(recipe(adversary=Fork(1, 8, 1e300)), **sides()))


# --- Directions


def leftover(run, matrix: str, side: str) -> float:
    """The share of the forget gradient's norm in the directions of the basis."""
    tensor, basis = run.trainable.tensors[matrix], run.forget_gradient.state[f"{side}/{matrix}"]
    gradient = run.forget_gradient.matrices[matrix].oriented(tensor.grad)
    inside = gradient @ basis if side == "in" else basis.mT @ gradient
    return float(inside.norm() / gradient.norm())


def common_part_is_orthogonal(family="llama"):
    """What remains of every gradient has nothing in the mean and the leading components of both sides."""
    only = MLPS if family == "llama" else Parameters(pattern=r"mlp\.c_(fc|proj)\.weight")
    run = training(replace(recipe(gradient_filter=CommonPart(2, 3)), parameters=only), subject(family), **sides())
    run.forget_gradient.take(0, {"forget": range(3)}, {})
    assert len(run.trainable.tensors) == {"llama": 6, "gpt2": 4}[family]
    shares = [leftover(run, name, side) for name in run.trainable.tensors for side in ("in", "out")]
    assert max(shares) < 1e-10, "a common direction remains"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_remains_is_orthogonal_to_the_common_part(family):
    common_part_is_orthogonal(family)


def test_one_direction_after_the_other_is_caught(monkeypatch):
    """A published fault: the mean and the components are not orthogonal, and the mean comes back."""

    def in_turn(matrix, basis, kept):
        for direction in basis.mT:
            matrix = matrix - torch.outer(matrix @ direction, direction)
        return matrix

    monkeypatch.setattr(forget_gradient, "without", in_turn)
    monkeypatch.setattr(forget_gradient, "orthonormal", lambda x: x / x.norm(dim=0))
    with pytest.raises(AssertionError, match="a common direction remains"):
        common_part_is_orthogonal()


def test_components_are_those_of_the_tokens():
    """Of all tokens but the first of a row and those that no loss reaches, by the dense decomposition."""
    module = torch.nn.Linear(12, 9, bias=False).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, g = (torch.randn(7, 6, n, dtype=torch.float64) * 0.7 ** torch.arange(n) + 0.3 for n in (12, 9))
    g[:, -1] = 0
    run = lambda: (module(x) * g).sum().backward()  # noqa: E731
    matrices = {"m": forget_gradient.Matrix(module, False)}
    found = forget_gradient.common_directions(matrices, {"in": 2, "out": 3}, 6, 0, run, ProcessGroup())
    for (_, side), basis in found.items():
        tokens = (x if side == "in" else g)[:, 1:-1].flatten(0, 1)
        leading = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][: basis.shape[1] - 1]
        expected = torch.linalg.qr(torch.cat([tokens.mean(0)[None], leading]).mT)[0]
        torch.testing.assert_close(basis @ basis.mT, expected @ expected.mT, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("mode", "power"), [("soft", 1), ("quadratic", 2), ("hard", None)])
def test_leading_directions_are_divided_by_their_singular_values(mode, power):
    run = training(recipe(gradient_filter=LeadingDirections(3, mode)), **sides())
    run.forget_gradient.backward({"forget": range(6)}, 0, {})
    name = "model.layers.1.mlp.up_proj.weight"
    u, s, vh = torch.linalg.svd(run.trainable.tensors[name].grad, full_matrices=False)
    run.forget_gradient.take(0, {"forget": range(6)}, {})
    kept = torch.zeros(3).to(s) if power is None else (s[2] / s[:3]) ** power
    expected = (u * torch.cat([s[:3] * kept**2, s[3:]])) @ vh
    torch.testing.assert_close(run.trainable.tensors[name].grad, expected)


def test_sgd_keeps_the_directions_out_of_the_weights():
    """Without a retain term, and with Adam as the twin: its preconditioning brings them back."""
    changes = {}
    for optimizer in ("sgd", "adamw"):
        chosen = recipe(gradient_filter=CommonPart(2, 3))
        chosen = replace(chosen, terms=chosen.terms[:1], optimizer=OptimizerConfig(optimizer))
        run = stepped(training(chosen, **sides()))
        (name, change), *_ = run.trainable.differences().items()
        changes[optimizer] = float((change @ run.forget_gradient.state[f"in/{name}"]).norm() / change.norm())
    assert changes["sgd"] < 1e-8 < 1e-3 < changes["adamw"]


# --- Agreement


def entries_agree(momentum=0.0):
    run = training(recipe(agreement=Agreement(momentum)), **sides())
    run.forget_gradient.take(0, {"forget": range(3)}, {})
    forget = [p.grad.clone() for p in run.parameters]
    run.optimizer.zero_grad()
    run._backward_side(("retain",), {"retain": range(3)}, 0, {}, run.recipe.terms)
    whole = [g.clone() for g in forget]
    run.forget_gradient.agree(forget)
    products = torch.cat([(g * p.grad).flatten() for g, p in zip(forget, run.parameters, strict=True)])
    assert bool((products >= 0).all()), "an entry opposes the retain gradient"
    assert any(bool((w != g).any()) for w, g in zip(whole, forget, strict=True)) and bool((products > 0).any())


def test_entries_that_oppose_the_retain_gradient_are_removed():
    entries_agree()


def test_the_opposite_mask_is_caught(monkeypatch):
    honest = forget_gradient.ForgetGradient.agree

    def opposite(self, forget):
        for p in self.parameters:
            p.grad.neg_()
        honest(self, forget)
        for p in self.parameters:
            p.grad.neg_()

    monkeypatch.setattr(forget_gradient.ForgetGradient, "agree", opposite)
    with pytest.raises(AssertionError, match="opposes"):
        entries_agree()


def test_the_running_mean_of_retain_gradients_decides():
    run = training(recipe(agreement=Agreement(0.9)), **sides())
    p = run.parameters[0]
    for sign in (1.0, -1.0):  # 0.1 after the first, 0.09 - 0.1 < 0 would need momentum below 0.9
        p.grad = torch.full_like(p, sign)
        forget = [torch.ones_like(p), *([None] * (len(run.parameters) - 1))]
        run.forget_gradient.agree(forget)
    name = next(iter(run.trainable.tensors))
    torch.testing.assert_close(run.forget_gradient.state[f"retain/{name}"], torch.full_like(p, 0.9 * 0.1 - 0.1))
    assert not forget[0].any()


# --- Together with the rest


def options(name):
    return {**sides(), "recipe": recipe(**WAYS[name]), "progress": False}


@pytest.mark.parametrize("name", WAYS)
def test_seeds_reproduce(name):
    first, again, other = (rp.unlearn(subject(), seed=seed, **options(name)) for seed in (0, 0, 1))
    assert all(torch.equal(v, again.tensors[n]) for n, v in first.tensors.items())
    assert dict(first.provenance) == dict(again.provenance)
    assert not all(torch.equal(v, other.tensors[n]) for n, v in first.tensors.items())
    assert "=" in first.provenance["options"][next(iter(WAYS[name]))]


class Halt(Exception):
    """A break in the middle."""


@pytest.mark.parametrize("name", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    resumed_is_whole(name, tmp_path)


def resumed_is_whole(name, tmp_path):
    """Broken after three steps, in the middle of the life of a fork or of a basis."""
    broken = True

    def ask(_subject):
        if broken:
            raise Halt
        return 0.0

    rule = metric(ask, above=1.0, every=3)
    whole = rp.unlearn(subject(), **options(name))
    files = {"resume": tmp_path / "state", "checkpoint_every": 1, "stop": (rule,)}
    with pytest.raises(Halt):
        rp.unlearn(subject(), **files, **options(name))
    broken = False
    rest = rp.unlearn(subject(), **files, **options(name))
    assert all(torch.equal(v, rest.tensors[n]) for n, v in whole.tensors.items()), "the resumed run differs"


@pytest.mark.parametrize("name", ["fork", "common part", "agreement"])
def test_a_state_without_the_fork_is_caught(name, tmp_path, monkeypatch):
    monkeypatch.setattr(forget_gradient.ForgetGradient, "saved", lambda self: {})
    with pytest.raises((AssertionError, KeyError)):
        resumed_is_whole(name, tmp_path)


@pytest.mark.parametrize("name", ["common part", "leading", "sam"])
def test_micro_batches_change_nothing(name):
    whole, parts = (
        stepped(training(recipe(**WAYS[name]), micro_batch=size, **sides()), 2).trainable.differences()
        for size in (3, 1)
    )
    assert distance(whole, parts) <= 1e-6 * distance(whole, {n: 0 * v for n, v in whole.items()})


def test_recipe_files_name_them(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "mudman"\n[adversary]\nname = "fork"\nevery = 3\nlr = 1\n[gradient_filter]\nname = "common_part"\nactivations = 4\n'
        "[agreement]\nmomentum = 0",
        encoding="utf-8",
    )
    found = rp.recipes.read(path)
    assert found.adversary == Fork(3, lr=1.0) and found.agreement == Agreement(0.0)
    assert found.gradient_filter == CommonPart(4) and "Fork(every=3" in found.plain()["adversary"]
    assert "adversary" not in rp.recipes.npo().plain()


def test_sam_goes_over_any_recipe():
    found = rp.recipes.by_name("small:sam:npo_gdr", rho=0.2, beta=0.5)
    assert found.adversary == SharpnessAware(0.2) and found.steps == 60 and found.name == "sam(npo_gdr)"
    with pytest.raises(UnknownName, match="consists of several"):
        rp.recipes.by_name("sam:zju_merge")


def test_whole_numbers_may_come_as_floats():
    assert rp.recipes.by_name("cir", activations=4.0).gradient_filter == CommonPart(4)
    with pytest.raises(ArgumentError, match=r"activations=4\.5"):
        rp.recipes.by_name("cir", activations=4.5)


def test_small_keeps_the_length_of_steps():
    for name in ("cir", "rep_select", "mudman"):
        plain, small = rp.recipes.by_name(name), rp.recipes.by_name(f"small:{name}")
        assert (small.lr, small.parameters.modules) == (plain.lr, ("mlp.in", "mlp.out")) and small.steps == 60


MATRICES = Parameters("0-1", ("mlp.down_proj",))
REFUSED = [
    (lambda: SharpnessAware(0.0), ArgumentError, "rho=0.0"),
    (lambda: Fork(every=0), ArgumentError, "every=0"),
    (lambda: Fork(lr=-1.0), ArgumentError, "lr=-1.0"),
    (lambda: CommonPart(-1), ArgumentError, "activations=-1"),
    (lambda: LeadingDirections(mode="firm"), ArgumentError, "mode='firm'; give 'soft', 'quadratic' or 'hard'"),
    (lambda: Agreement(1.0), ArgumentError, r"momentum=1.0; give a number in \[0, 1\)"),
    (lambda: recipe(adversary=Fork(), combiner=weighted_sum(separate=False)), ArgumentError, "give one with separate=True"),
    (lambda: rp.recipes.surgery(adversary=Fork()), ArgumentError, "there is a term 'negative_nll outdated'"),
    (lambda: rp.recipes.ga(agreement=Agreement()), ArgumentError, "agreement needs a retain gradient"),
    (lambda: training(recipe(gradient_filter=CommonPart(47)), **sides()), RankError, "removes 48 directions .* have 48"),
    (lambda: training(recipe(gradient_filter=LeadingDirections(48)), **sides()), RankError, "smaller number of components"),
    (
        lambda: training(replace(recipe(gradient_filter=CommonPart(2)), parameters=Parameters()), **sides()),
        SelectionError,
        "works on the weights of linear modules, and 'model.embed_tokens.weight' is trained too",
    ),
    (
        lambda: training(replace(recipe(gradient_filter=CommonPart(2)), parameters=Parameters(lora=Lora(2))), **sides()),
        SelectionError,
        "without biases, embeddings, fused experts or adapters",
    ),
    (
        lambda: training(recipe(adversary=Fork()), forget=rows(0, 1), retain=rows(6, 12)),
        NotEnoughRows,
        "relearns half of the forget facts and there is 1",
    ),
    (
        lambda: stepped(training(recipe(gradient_filter=CommonPart(40, 40)), forget=rows(0, 2), retain=rows(6, 9))),
        NotEnoughRows,
        "tokens of the forget set reach it, and 41 directions are to be removed",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "match"), REFUSED)
def test_what_cannot_be_done_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_entropy_is_largest_where_all_tokens_are_alike():
    run = training(replace(rp.recipes.grad_diff(), parameters=MLPS), **sides())
    forward = run._forward("forget", [0], [])
    forward.logits = torch.zeros_like(forward.logits)
    value = losses.negative_entropy().sum(forward) / len(forward.targets)
    assert float(value) == pytest.approx(-torch.log(torch.tensor(float(forward.logits.shape[-1]))).item())
