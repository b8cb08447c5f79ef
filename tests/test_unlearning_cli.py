"""`repedit unlearn`, and the figure of a training."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.data import facts
from repedit.delta import Delta
from repedit.errors import ArgumentError
from repedit.unlearning import losses
from tests.saved_models import saved
from tests.unlearning_cases import sides, subject


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "lm")


@pytest.fixture
def rows(tmp_path):
    """Facts to forget and to retain, in a file."""
    path = tmp_path / "facts.jsonl"
    held = [(f, "forget") for f in facts("capitals").forget[:6]] + [(f, "retain") for f in facts("symbols").forget[:6]]
    lines = [{"id": f.id, "prompt": f.prompt, "answer": f.answer, "role": role} for f, role in held]
    path.write_text("\n".join(map(json.dumps, lines)))
    kept = [line | {"role": "forget"} for line in lines if line["role"] == "retain"]
    (tmp_path / "kept.jsonl").write_text("\n".join(map(json.dumps, kept)))
    return str(path)


def call(model, rows, out, *more):
    """Run the verb."""
    plain = [
        "unlearn",
        str(model),
        "--forget",
        rows,
        "--recipe",
        "grad_diff",
        "--out",
        str(out),
        "--set",
        "batch_size=4",
    ]
    return CliRunner().invoke(app, [*plain, *more])


def test_unlearn_writes_a_delta_that_apply_reads(model, rows, tmp_path):
    out = tmp_path / "d.safetensors"
    done = call(model, rows, out, "--set", "lr=1e-3", "--steps", "2", "--layers", "1", "--modules", "mlp.down_proj",
                "--mask", "sure:50", "--log", str(tmp_path / "log.jsonl"), "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    delta = Delta.load(out)
    assert list(delta.tensors) == ["model.layers.1.mlp.down_proj.weight"] and len(delta.log) == 2
    assert delta.provenance["method"] == "sure(grad_diff)" and delta.provenance["options"]["lr"] == 1e-3
    applied = CliRunner().invoke(
        app, ["apply", str(out), str(model), "--out", str(tmp_path / "edited"), "--no-verify", "--json"]
    )
    assert applied.exit_code == 0, applied.output
    assert [d.tensor for d in rp.diff(model, tmp_path / "edited")] == list(delta.tensors)


def test_unlearn_writes_a_checkpoint(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "repedit.cli.apply.verify_checkpoint", lambda out, record: None
    )  # loads it in a fresh process, for ten seconds
    done = call(model, rows, tmp_path / "edited", "--set", "lr=1e-3", "--steps", "1")
    assert done.exit_code == 0, done.output
    assert rp.diff(model, tmp_path / "edited") and "mostly hides" in done.output


def test_collapse_exits_with_3_and_is_written(model, rows, tmp_path):
    done = call(model, rows, tmp_path / "d.safetensors", "--recipe", "ga", "--retain", rows.replace("facts", "kept"), "--set", "lr=1e-2",
                "--steps", "60", "--json")  # fmt: skip
    assert done.exit_code == 3, done.output
    assert Delta.load(tmp_path / "d.safetensors").provenance["stopped"]["rule"] == "collapse"


def test_a_loss_that_is_not_finite_exits_with_4(model, rows, tmp_path, monkeypatch):
    honest = losses.nll().sum
    monkeypatch.setattr(losses, "nll", lambda: losses.Loss("nll", lambda seen: honest(seen) * float("nan"), "tokens"))
    import repedit.unlearning.recipes as basic

    monkeypatch.setattr(basic.losses, "nll", losses.nll)
    done = call(model, rows, tmp_path / "d.safetensors", "--steps", "1")
    assert done.exit_code == 4 and not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "blur_nop"), "did you mean 'blur_npo'"),
        (("--set", "lr"), "write name=value"),
        (("--set", "lrs=1"), "did you mean 'lr'"),
        (("--mask", "sure"), "write 'sure:90'"),
        (("--recipe", "zju_merge", "--layers", "1"), "consists of several trainings"),
    ],
)
def test_bad_input(model, rows, tmp_path, more, message):
    done = call(model, rows, tmp_path / "d.safetensors", *more)
    assert done.exit_code != 0 and message in str(done.exception)


def test_recipes_are_listed():
    done = CliRunner().invoke(app, ["unlearn", "--list-recipes"])
    assert done.exit_code == 0, done.output
    assert all(name in done.output.replace("\n", "") for name in ("blur_npo", "surgery", "undial"))


@pytest.fixture(scope="module")
def trained():
    return rp.unlearn(
        subject(dtype=torch.float32),
        recipe=rp.recipes.blur_npo(),
        **sides(),
        steps=12,
        batch_size=6,
        lr=1e-3,
        progress=False,
    )


def test_training_is_drawn(trained):
    figure = rp.plot.training(trained, notes=("six facts",))
    top, below = figure.axes[:2]
    assert [line.get_label() for line in top.lines] == ["npo forget", "nll retain"]
    assert below.lines[0].get_ydata()[0] == trained.log[0]["cosine"]
    assert "blur_npo" in figure._suptitle.get_text() and "all 12 steps taken" in figure._suptitle.get_text()


def test_a_delta_without_a_log_is_not_drawn(trained):
    with pytest.raises(ArgumentError, match="the delta has no log"):
        rp.plot.training(-trained)
