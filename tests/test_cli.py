"""Every verb through the command line, on a tiny saved model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import repedit as rp
from repedit import cli
from repedit.cli import app, verbs
from repedit.cli.application import OTHER_NAMES
from repedit.data import Facts, by_domain, facts
from repedit.errors import ArgumentError, FingerprintError
from tests.published_data import stand_in
from tests.saved_models import saved

# An untrained model uses the same neurons for everything, and score says so.
pytestmark = pytest.mark.filterwarnings("ignore::repedit.neurons.scores.CollinearWarning")
LIMITED = ("--limit-tokens", "400")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(saved(tmp_path_factory.mktemp("model") / "tiny"))


def run(*words: str, code: int = 0) -> str:
    """Standard output of a verb."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output + str(result.exception)
    return result.stdout


def test_version_is_shown():
    assert run("--version") == f"repedit {rp.__version__}\n"


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_of_other_tools_is_answered_with_the_verb(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["repedit", name, "m"])
    code, message = cli._run_verb()
    assert code == 2 and set(OTHER_NAMES[name]) <= set(verbs()) and name not in verbs()
    assert all(f"'repedit {verb}'" in message for verb in OTHER_NAMES[name])
    monkeypatch.setattr(sys, "argv", ["repedit", "prun", "m"])
    assert "Did you mean 'prune'" in cli._run_verb()[1]


def test_doctor_passes_every_tap(model):
    found = json.loads(run("doctor", model, "--json"))
    assert found["versions"]["torch"] == version("torch") and found["versions"]["CPU kernels"]
    assert found["passed"] and len(found["proofs"]) == 11


def test_doctor_without_a_model_checks_the_installation(monkeypatch):
    checked = json.loads(run("doctor", "--json"))
    assert checked["passed"] and set(checked["checks"]) == {
        "packages", "cache folder", "default model", "device", "kernels", "edit of a tiny model",
    }  # fmt: skip
    text = run("doctor")
    assert checked["versions"]["torch"] in text and "Paste all of this" in text and "FAILED" not in text


@pytest.mark.parametrize(
    ("name", "broken", "check"),
    [
        ("requires", lambda name: ["torch>=99", "no-such-package>=1", "pdoc>=1; extra == 'dev'"], "packages"),
        ("cache_folder", lambda: Path(__file__) / "cache", "cache folder"),
        ("project", lambda x, u, v: x, "kernels"),
        ("check_architecture", lambda model: (_ for _ in ()).throw(FingerprintError("no proof")), "edit of a tiny model"),
        ("check_architecture", lambda model: (_ for _ in ()).throw(AttributeError("no field")), "edit of a tiny model"),
        ("requires", lambda name: (_ for _ in ()).throw(PackageNotFoundError("repedit")), "packages"),
        ("cache_folder", lambda: Path("/proc/none/cache"), "cache folder"),
        ("cached", lambda name: (_ for _ in ()).throw(PermissionError("not yours")), "default model"),
        ("choose", lambda *given: (_ for _ in ()).throw(RuntimeError("no driver")), "kernels"),
    ],
)  # fmt: skip
def test_doctor_says_what_is_wrong_with_an_installation(name, broken, check, monkeypatch):
    monkeypatch.setattr(f"repedit.installation.{name}", broken)
    checks = json.loads(run("doctor", "--json", code=3))["checks"]
    assert [n for n, found in checks.items() if not found["passed"]] == [check]
    words = {"packages": r"torch 2\S* is installed, >=99 is needed; no-such-package>=1 is not installed|PackageNotFoundError: .*repedit",
             "cache folder": "set REPEDIT_CACHE", "kernels": "error|RuntimeError: no driver", "default model": "PermissionError: not yours",
             "edit of a tiny model": "FingerprintError: no proof|AttributeError: no field"}  # fmt: skip
    assert re.search(words[check], checks[check]["detail"])


def test_scores_become_an_interactive_page(model, tmp_path: Path):
    scores, page = tmp_path / "s.safetensors", tmp_path / "map.html"
    run("score", model, "--out", scores, *LIMITED)
    explored = json.loads(run("explore", scores, "--model", model, "--text", "code", "--out", page, *LIMITED, "--json"))
    assert explored["neurons"] == 256 and len(explored["texts"]) == 1 and "plotly" in page.read_text()
    for words, match in (((), "exists"), (("--overwrite", "--at-most", "1"), "at least 2")):
        refused = CliRunner().invoke(app, ["explore", str(scores), "--out", str(page), *words])
        assert re.search(match, str(refused.exception))
    refused = CliRunner().invoke(app, ["explore", str(scores), "--out", str(tmp_path / "map.png")])
    assert "ends in .html" in str(refused.exception)


def test_inspect_lists_the_sites(model):
    row = json.loads(run("inspect", model, "--sites", "1.mlp.neurons", "--json"))["sites"][0]
    assert (row["hook"], row["width"], row["exactness"]) == ("blocks.1.mlp.hook_post", 128, "exact")


def test_an_edit_is_written_as_an_adapter(model, tmp_path: Path):
    edit, out = tmp_path / "edit.safetensors", tmp_path / "adapter"
    run("prune", model, "--fraction", "0.05", "--out", edit, *LIMITED)
    found = json.loads(run("apply", edit, model, "--structure", "adapter", "--out", out, "--json"))
    assert found["residual"] == 0 and found["largest_rank"] > 0 and (out / "adapter_config.json").exists()
    assert "hold both models" in run("apply", edit, model, "--structure", "adapter", "--out", out, "--overwrite")
    given = ("apply", edit, model, "--structure", "adapter", "--out", tmp_path / "other")
    assert "mlp" in run(*given, "--dry-run") and not (tmp_path / "other").exists()
    for words, match in ((given[:-2], "--out is needed"), ((*given, "--dtype", "bfloat16"), "takes no --dtype")):
        with pytest.raises(ArgumentError, match=match):
            CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)


def test_collected_statistics_give_the_same_scores(model, tmp_path: Path):
    files = []
    for text in ("code", "prose"):
        files.append(str(tmp_path / f"{text}.safetensors"))
        assert (
            json.loads(run("collect", model, "--text", text, "--out", files[-1], *LIMITED, "--json"))["counted"] >= 400
        )
    run("score", model, "--forget", files[0], "--retain", files[1], "--out", tmp_path / "a.safetensors")
    run("score", model, "--out", tmp_path / "b.safetensors", *LIMITED)
    mine, other = (rp.Scores.load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert all(torch.equal(mine[site].values, other[site].values) for site in other)
    moments = tmp_path / "moments.safetensors"
    assert "tokens counted" in run(
        "collect", model, "--sites", "0.mlp.out", "--statistic", "moments", "--out", moments, *LIMITED
    )
    for words, error, match in (
        (("score", model, "--forget", files[0], "--out", "x"), ArgumentError, "give two collections, or two texts"),
        (
            ("score", saved(tmp_path / "other", "qwen2"), "--forget", files[0], "--retain", files[1], "--out", "x"),
            FingerprintError,
            "collect on this one",
        ),
    ):
        with pytest.raises(error, match=match):
            CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)


def test_score_then_prune_then_apply_then_diff(model, tmp_path: Path):
    scores, edit, out = tmp_path / "scores.safetensors", tmp_path / "edit.safetensors", tmp_path / "edited"
    run("score", model, "--out", scores, *LIMITED)
    found = json.loads(
        run(
            "prune", model, "--scores", scores, "--fraction", "0.1", "--out", edit, "--control", "1", "--json", *LIMITED
        )
    )
    assert found["pruned"] == 25 and set(found["drops"]) == {"pruned", "random 0"}
    applied = json.loads(run("apply", edit, model, "--out", out, "--json"))
    differences = json.loads(run("diff", model, out, "--json"))
    assert len(differences) == applied["tensors"] > 0


@pytest.mark.usefixtures("reloaded_here")
def test_prune_in_steps_writes_a_checkpoint(model, tmp_path: Path):
    run("prune", model, "--fraction", "0.1", "--steps", "2", "--out", tmp_path / "edited", *LIMITED)
    assert (tmp_path / "edited" / "repedit.json").exists()


def test_a_learned_mask_needs_no_fraction(model, tmp_path: Path, monkeypatch):
    import repedit.neurons.pruning as job

    quick = lambda *a, **o: __import__("repedit").fit.gates(*a, **o, steps=4, lr=0.5)  # noqa: E731
    monkeypatch.setattr(job, "gates", quick)
    found = json.loads(run("prune", model, "--learned", "--out", tmp_path / "edit.safetensors", "--json", *LIMITED))
    assert found["pruned"] > 0 and (tmp_path / "edit.safetensors").exists()


def test_prune_without_a_fraction_says_so(model, tmp_path: Path):
    result = CliRunner().invoke(app, ["prune", model, "--out", str(tmp_path / "edited")])
    assert "a fraction is needed" in str(result.exception)


def test_dry_run_writes_nothing(model, tmp_path: Path):
    text = run("prune", model, "--fraction", "0.1", "--out", tmp_path / "edited", "--dry-run", *LIMITED)
    assert "tensors touched" in text and not (tmp_path / "edited").exists()


def test_a_retain_limit_exceeded_at_once_exits_3(model, tmp_path: Path):
    run(
        "prune",
        model,
        "--fraction",
        "0.9",
        "--max-retain-drop",
        "-1000000",
        "--out",
        tmp_path / "edited",
        *LIMITED,
        code=3,
    )
    assert not (tmp_path / "edited").exists()


def test_compare_shows_both_models(model):
    text = run("compare", model, model, "--text", "prose", "--prompt", "A river", "--json", *LIMITED)
    found = json.loads(text)
    assert found["corpora"]["prose"]["drop_percent"] == 0.0
    assert found["generations"][0]["base"] == found["generations"][0]["edited"]


def test_compare_measures_published_benchmarks(model):
    given = ("compare", model, model, "--metrics", "membership", "--data", str(stand_in()), "--limit", "3")
    values = json.loads(run(*given, "--json"))["membership"]["values"]
    assert set(values) == {"AUC", "TPR at 1 % FPR"} and all(before == after for before, after in values.values())
    assert "AUC of 1 means member" in run(*given)


@pytest.mark.parametrize("half", [("--metrics", "tofu"), ("--data", ".")])
def test_benchmarks_need_a_name_and_data(model, half):
    with pytest.raises(ArgumentError, match="give both, or neither"):
        CliRunner().invoke(app, ["compare", model, model, *half], catch_exceptions=False)


def test_tables_are_printed_without_json(model, tmp_path: Path):
    assert "every tap" in run("doctor", model)
    assert "layers of width 24" in run("inspect", model)
    assert "median rank correlation" in run("score", model, "--out", tmp_path / "s.safetensors", *LIMITED)
    assert "0 tensors differ" in run("diff", model, model)
    assert "What each model writes" in run("compare", model, model, *LIMITED)


@pytest.mark.usefixtures("reloaded_here")
def test_demo_runs_from_end_to_end(model, tmp_path: Path):
    text = run("demo", "--model", model, "--out", tmp_path / "edited", "--limit-tokens", "400", "--act", "code")
    assert "2 of 256 MLP neurons pruned" in text and "What each model writes" in text
    assert len(list((tmp_path / "edited" / "figures").glob("*.png"))) == 3
    _, *commands = text[text.index("Next:") :].splitlines()
    assert [line.split()[:2] for line in commands] == [["repedit", verb] for verb in ("chat", "demo", "audit")]


@pytest.mark.usefixtures("reloaded_here")
def test_the_second_act_forgets_and_exports(model, tmp_path: Path, monkeypatch):
    few = lambda items: tuple(fact for part in by_domain(items).values() for fact in part[:4])  # noqa: E731
    whole = facts("capitals")
    small = Facts(few(whole.forget), few(whole.retain), "capitals")
    monkeypatch.setattr("repedit.demo.facts", lambda *args, **options: small)
    words = ("demo", "--model", model, "--out", tmp_path / "edited", "--act", "capitals", "--steps", "2")
    found = json.loads(run(*words, "--json"))["capitals"]
    assert {"capitals", "capitals, unseen phrasing", "symbols"} <= set(found["facts"])
    assert found["certificate"]["form"] == "folded" and found["certificate"]["worst_leak"] < 1e-5
    assert (tmp_path / "edited-capitals" / "repedit.json").exists()
    assert "in words training never saw" in run(*words)
    refused = CliRunner().invoke(app, ["demo", "--act", "third"])
    assert refused.exit_code == 2 and "'third' is not one of" in refused.output


def colours(folder: Path) -> Path:
    """A file of facts: four to forget and four to retain."""
    facts = folder / "facts.jsonl"
    rows = [
        {"id": f"{role}/{i}", "entity": name, "prompt": f"{name} is", "answer": word, "choices": ["red", "green", "blue"], "domain": role, "role": role}
        for role, names in (("forget", "ABCD"), ("retain", "EFGH"))
        for i, (name, word) in enumerate(zip(names, ("red", "green", "blue", "red"), strict=True))
    ]  # fmt: skip
    facts.write_text("\n".join(json.dumps(row) for row in rows))
    return facts


@pytest.mark.usefixtures("reloaded_here")
def test_project_writes_an_edit_and_goes_on_from_it(model, tmp_path: Path):
    facts = colours(tmp_path)
    common = ("project", model, "--forget", facts, "--sites", "0.mlp.out", "--json")
    first = json.loads(run(*common, "--steps", "2", "--rank", "2", "--out", tmp_path / "one.safetensors"))
    assert first["rank"] == {"0.mlp.out": 2} and first["domains"]["forget"]["role"] == "forget"
    words = ("--rank", "1", "--method", "cpca", "--previous", tmp_path / "one.safetensors", "--out", tmp_path / "two")
    assert json.loads(run(*common, *words))["rank"] == {"0.mlp.out": 3}
    assert json.loads((tmp_path / "two" / "repedit.json").read_text())["certificate"]["rank"] == 3
    plan = run(*common[:-1], "--steps", "2", "--rank", "2", "--out", tmp_path / "none", "--dry-run")
    assert "model.layers.0.mlp.down_proj.weight" in plan and not (tmp_path / "none").exists()
    assert "Facts right" in run(*common[:-1], "--rank", "2", "--method", "random", "--out", tmp_path / "r.safetensors")


@pytest.mark.usefixtures("reloaded_here")
def test_project_overwrites_values(model, tmp_path: Path):
    common = ("project", model, "--forget", colours(tmp_path), "--method", "overwrite")
    words = ("--lam", "0.1", "--target", "exchange", "--layers", "1")
    found = json.loads(run(*common, *words, "--out", tmp_path / "edited", "--json"))
    assert [row["layer"] for row in found["layers"]] == [1] and found["domains"]["retain"]["role"] == "retain"
    certificate = json.loads((tmp_path / "edited" / "repedit.json").read_text())["certificate"]
    assert certificate["tensors"] == {} and certificate["uncertified"]  # an oblique map leaves part of every direction
    text = run(*common, "--regression", "--contexts", "templates,prose", "--out", tmp_path / "d.safetensors")
    assert "layer 0: " in text and rp.Delta.load(tmp_path / "d.safetensors").provenance["target"] == "mean"
    refused = CliRunner().invoke(app, [*map(str, common), "--retain-budget", "1e-12", "--out", str(tmp_path / "e")])
    assert "cannot be met" in str(refused.exception)


def test_demo_does_not_overwrite_what_is_not_its_own(model, tmp_path: Path):
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "thesis.tex").write_text("mine")
    result = CliRunner().invoke(app, ["demo", "--model", model, "--out", str(tmp_path / "edited")])
    assert "is not an export of repedit" in str(result.exception)
    assert (tmp_path / "edited" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "./nowhere"], "NotFound: .* does not exist"),
        (["apply", "no.safetensors", "./nowhere"], "CheckpointError: no.safetensors cannot be read"),
    ],
)
def test_bad_input_exits_2_with_one_message(words, message):
    done = subprocess.run([sys.executable, "-m", "repedit", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.match(message, done.stderr) and "Traceback" not in done.stderr
