"""Value overwrite by local regression: what is trained, what stays, and what cannot be trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import repedit as rp
from repedit.errors import ArgumentError, NotFoldable, SelectionError, TrainingError, UnknownName
from repedit.fit import contexts, local_regression
from repedit.fit.contexts import entity_tokens
from repedit.fit.overwrite import OverwriteCertificate
from repedit.models.subject import Subject
from tests.teachable_models import blank
from tests.test_overwrite import FACTS, TEXT, caught, overwrite
from tests.tiny import tiny

QUICK = {"steps": 60, "lr": 3e-3, "rows": 64, "retain_rows": 128, "vocabulary": 32}


def trained(subject: Subject, config: dict[str, Any] = {}, **options: Any) -> Any:  # noqa: B006
    options = {"retain": TEXT, "layers": "0-1", "progress": False, "method": "regression"} | options
    return rp.fit.overwrite(subject, FACTS, config=QUICK | config, **options)


def values_come_nearer(fit: Callable[..., Any]) -> None:
    """At names that training never saw the values are nearer to their targets, while retained outputs stay."""
    for row in OverwriteCertificate.of(fit(blank())).layers:
        assert row.rho_fitted <= row.rho < 0.8 and row.distortion < 0.3 and row.lam is None


def test_values_come_nearer_to_their_targets():
    values_come_nearer(trained)
    caught(values_come_nearer, lambda s: trained(s, {"lr": 1e-7}))
    caught(values_come_nearer, lambda s: trained(s, {"beta": 1e-4, "steps": 200}))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_matrices_of_the_chosen_mlps_move_and_nothing_else(family):
    subject = blank(family)
    before = subject.fingerprint()
    delta = trained(subject, layers="1")
    branch = subject.layout.branch(1, rp.Point.MLP_OUT)
    views = [v for part in branch.parts for v in (part.out, *part.readers)]
    assert set(delta.tensors) == {v.tensor for v in views if subject.value(v.tensor).ndim == 2}
    assert subject.fingerprint() == before


def outputs(subject: Subject, layer: int) -> torch.Tensor:
    """What the MLP of a layer writes at the names of the fit."""
    tokens = entity_tokens(subject, contexts.held_out(contexts.contexts_of(subject, FACTS), 0.25, 0)[0])
    return contexts.entity_rows(subject, tokens, {layer: local_regression.outputs_of(subject, layer)})[layer]


def later_layers_see_earlier_changes(join: Callable[[Subject], rp.Delta]) -> None:
    """In the model with both layers changed, what is left over at layer 1 is what the certificate says."""
    subject = blank()
    delta = join(subject)
    first = rp.Delta({name: value for name, value in delta.tensors.items() if ".0." in name}, delta.provenance)
    # Contexts are the same number for every entity but for rounding of shares, so their mean is that of the entities.
    goal = outputs(subject, 1).mean(0)
    before, after = (float((goal - outputs(rp.apply(d, subject), 1)).norm()) for d in (first, delta))
    assert after / before == pytest.approx(OverwriteCertificate.of(delta).layers[-1].rho_fitted, rel=1e-3)


def test_inputs_are_collected_under_what_is_already_changed():
    def apart(subject: Subject) -> rp.Delta:
        first, second = (trained(subject, layers=layer) for layer in "01")
        return rp.Delta({**first.tensors, **second.tensors}, second.provenance | {"start": {}})

    later_layers_see_earlier_changes(trained)
    caught(later_layers_see_earlier_changes, apart)


def test_exported_weights_are_the_trained_ones(tmp_path: Path):
    subject = blank()
    delta = trained(subject, target="exchange")
    rp.export(delta, subject, tmp_path / "out")
    loaded, edited = rp.load(tmp_path / "out", device="cpu"), rp.apply(delta, subject)
    assert all(torch.equal(loaded.value(name), edited.value(name)) for name in delta.tensors)


@pytest.mark.parametrize(
    "options", [{"method": "linear"}, {"method": "regression", "config": QUICK}], ids=["linear", "regression"]
)
def test_a_model_in_bfloat16_is_overwritten_too(options):
    subject = blank().to(dtype="bfloat16")
    change = rp.fit.overwrite(subject, FACTS, retain=TEXT, progress=False, **options)
    edited = rp.apply(change, subject)
    assert edited.model.dtype == torch.bfloat16 and edited.fingerprint() != subject.fingerprint()


def a_solved_matrix_keeps_nothing_of_the_old_one(config: dict[str, Any], family: str = "llama") -> None:
    """Two MLPs that differ in their output matrix alone give the same outputs after it was solved on the same rows."""
    rows = torch.randn(2, 400, blank(family).layout.width, generator=torch.Generator().manual_seed(0))
    fitted = local_regression.Inputs(rows[0, :150], rows[1, :150])
    retained = local_regression.Retained(rows[0, 150:], rows[1, 150:], torch.ones(250), rows[0, 150:])
    found = []
    for scale in (1.0, -3.0):
        subject = blank(family)
        view = subject.layout.branch(0, rp.Point.MLP_OUT).parts[0].out
        with torch.no_grad():
            dict(subject.model.named_parameters())[view.tensor].mul_(scale)
        # The step before the solution is too small to move the other matrices.
        # Names count by 1 / spread of the old outputs, so beta keeps their weight against the retained rows the same.
        settings = local_regression.Regression.of({"steps": 1, "lr": 1e-12, "beta": 6 / scale**2} | config)
        found.append(local_regression.train(subject, 0, fitted, retained, settings, progress=False))
    with torch.no_grad():
        first, second = (trained_.new(rows[0]) for trained_ in found)
    assert float((first - second).norm()) < 0.01 * float(first.norm())
    assert found[0].left_over(fitted) < found[0].left_over(local_regression.Inputs(fitted.x, -fitted.y))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_solved_output_matrix_starts_from_zero(family):
    a_solved_matrix_keeps_nothing_of_the_old_one({"solved": 1}, family)
    caught(a_solved_matrix_keeps_nothing_of_the_old_one, {"solved": 0}, family)


def test_a_solution_brings_values_nearer():
    values_come_nearer(lambda s: trained(s, {"solved": 2, "steps": 120}))


def test_seeds_reproduce():
    first, second, other = (trained(blank(), {"steps": 5}, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    assert any(not torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


def test_selective_targets_move_less_of_what_stays():
    subject = blank()
    basis = overwrite._kept_directions(subject, FACTS, subject.select("0.mlp.neurons"), 8, False)[0]
    shares = []
    for target, more in (("mean", {}), ("selective", {"keep": FACTS, "keep_rank": 8})):
        moved = outputs(rp.apply(trained(subject, layers="0", target=target, **more), subject), 0) - outputs(subject, 0)
        shares.append(float((moved.double() @ basis).norm() / moved.double().norm()))
    assert shares[1] < 0.7 * shares[0]


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "key": (lambda: trained(blank(), {"step": 3}), UnknownName, "did you mean 'steps'"),
    "steps": (lambda: trained(blank(), {"steps": 0}), ArgumentError, "steps=0"),
    "lam": (lambda: trained(blank(), lam=0.1), ArgumentError, "the regression has none"),
    "edit": (lambda: trained(blank(), form="edit"), NotFoldable, "is no map of the keys"),
    "budget": (lambda: trained(blank(), retain_budget=1e-4), SelectionError, r"retain_budget=0\.0001 is not met"),
    "loss": (lambda: trained(blank(), {"lr": 1e30}), TrainingError, "the loss is"),
    "no module": (lambda: trained(tiny("opt")), NotFoldable, "needs an MLP that is one module"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()
