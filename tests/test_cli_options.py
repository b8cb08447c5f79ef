"""Every option of every verb changes what the library is asked for, what is shown or where it goes; or is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from typer.testing import CliRunner

from repedit import cli
from repedit.cli import application
from repedit.errors import ArgumentError, RepeditError
from repedit.unlearning.recipe import UnlearnRecipe

KEPT = MagicMock(name="result", tensors={}, exceeded=False, agreement=0.5, relative_change=0.5, structure="keep")
KEPT.log = [{"losses": {}, "nll": {}, "cosine": None}]
KEPT.provenance = {"data": {"forget": {"tokens": 1}, "retain": {"tokens": 1}}, "stopped": {"rule": ""}}
KEPT.to_json.return_value = "{}"
KEPT.verdict.exit_code = 0
ANSWERS = {
    "io.archive.kind_of": "edit", "runs.run": 0, "cli.neurons.plan_summary": "plan", "cli.unlearn.plan_summary": "plan", "rewrite.export.dry_run": "plan", "arch.infer.inferred_row": None, "report.write": [],
}  # fmt: skip
PATCHED: dict[str, tuple[str, ...]] = {
    "demo": ("demo.prune_code", "demo.forget_capitals", "cli.run._show_pruning", "cli.run._show_forgotten",
             "cli.output.comparison_json", "cli.run.forgotten_json", "cli.output.show_json"),
    "fetch": ("models.default_model.fetch", "cli.output.show_json"),
    "doctor": ("cli.inspect.load_model", "arch.infer.check_architecture", "arch.infer.inferred_row", "kernels.dispatch.choose", "installation.check_installation", "cli.output.show_json", "cli.output.table"),
    "inspect": ("cli.inspect.load_model", "cli.output.show_json", "cli.output.table"),
    "collect": ("cli.neurons.load_model", "data.read", "activations.collection.collect", "cli.neurons.save", "cli.output.show_json"),
    "score": ("cli.neurons.load_model", "cli.neurons._scores", "cli.neurons.save", "cli.output.show_json", "cli.output.table"),
    "explore": ("cli.neurons.load_model", "neurons.scores.Scores.load", "data.read", "activations.examples.max_activating", "explore.neurons", "cli.output.show_json"),
    "prune": ("cli.neurons.load_model", "neurons.scores.Scores.load", "neurons.pruning.run_pruning", "cli.neurons.write_edited", "cli.neurons._show", "cli.neurons.plan_summary"),
    "project": ("cli.unlearn.load_model", "data.facts", "edit.Edit.load", "fit.mrp.mrp", "fit.merging.merge", "fit.merging.MergeCertificate.of", "fit.overwrite.overwrite", "data.read", "metrics.facts.knowledge", "rewrite.apply.apply",
                "fit.overwrite.OverwriteCertificate.of", "cli.unlearn._show", "cli.unlearn.plan_summary", "cli.unlearn.write_edited"),
    "unlearn": ("cli.unlearn.load_model", "data.facts", "data.read", "unlearning.api.unlearn", "cli.unlearn._write_and_show",
                "cli.output.show_json", "cli.output.table"),
    "apply": ("cli.apply.load_model", "io.archive.kind_of", "edit.Edit.load", "rewrite.export.export", "rewrite.export.dry_run",
              "cli.apply.verify_checkpoint", "cli.output.show_json"),
    "diff": ("rewrite.verification.diff", "report.difference_page", "io.files.write_text", "cli.output.show_json", "cli.output.table"),
    "compare": ("cli.inspect.load_model", "data.read", "metrics.benchmarks.check_suites", "metrics.benchmarks.compare", "metrics.benchmarks.compare_benchmarks", "cli.output.comparison_json",
                "report.comparison_page", "io.files.write_text", "cli.output.show_comparison", "cli.output.show_json", "cli.output.table", "cli.output.show_generations"),
    "chat": ("cli.inspect.load_model", "metrics.generation.side_by_side", "cli.inspect._show", "cli.inspect._last", "cli.inspect._show_json_line"),
    "audit": ("data.facts", "data.builtin_corpus", "auditing.api.audit", "auditing.api.estimate", "auditing.selftest.selftest",
              "report.write", "report.redacted", "cli.audit.show", "cli.audit._estimate", "cli.audit._selftest"),
    "report": ("auditing.report.Report.load", "report.compare_reports", "report.redacted", "report.write", "cli.audit.show", "cli.output.show_json",
               "cli.audit._audit_values"),
    "tasks": ("metrics.harness.write_tasks", "cli.output.show_json"),
    "push": ("rewrite.hub.push", "cli.output.show_json", "cli.output.table"),
    "run": ("cli.run.verbs", "cli.run._execute_with", "cli.run._check_with", "runs.run", "report.write_run"),
    "reproduce": ("cli.run.verbs", "cli.run._execute_with", "runs.reproduce"),
    "vision demo": ("demo.forget_images", "cli.run._write_images", "cli.run._show_images", "cli.run._images_json", "cli.output.show_json"),
}  # fmt: skip
"""Verb -> what its command line calls; each call is recorded and does nothing."""
BASE: dict[str, tuple[str, ...]] = {
    "demo": (), "fetch": (), "doctor": ("m",), "inspect": ("m",), "collect": ("m", "--out", "c.safetensors"),
    "score": ("m", "--out", "s.safetensors"), "explore": ("s.safetensors", "--out", "m.html"), "prune": ("m", "--fraction", "0.1", "--out", "e.safetensors"),
    "project": ("m", "--out", "e.safetensors"), "unlearn": ("m", "--out", "d.safetensors"), "apply": ("e", "m", "--out", "new"),
    "diff": ("m", "n"), "compare": ("m", "n"), "chat": ("m", "hello", "--original", "n"),
    "audit": ("m", "--original", "n", "--facts", "capitals"), "report": ("a",), "tasks": ("t",), "push": ("d", "o/n"), "run": ("r.toml",),
    "reproduce": ("r.toml",), "vision demo": (),
}  # fmt: skip
COMMON = {
    "device": "--device cpu", "dtype": "--dtype float32", "seed": "--seed 7", "json": "--json", "batch_size": "--batch-size 3", "limit_tokens": "--limit-tokens 77", "max_new_tokens": "--max-new-tokens 77",
    "out": "--out other.safetensors", "overwrite": "--overwrite", "dry_run": "--dry-run", "sites": "--sites 1.mlp.neurons", "structure": "--structure slim --out o",
    "layout": "--structure slim --layout ragged --out o", "multiple": "--structure slim --multiple 4 --out o", "importance": "--importance rms",
    "dequantize": "--dequantize", "combine": "--combine ratio", "steps": "--steps 5", "forget": "--forget prose", "retain": "--retain code", "model": "other", "edited": "other",
}  # fmt: skip
"""Option -> the words that give it, where no verb says otherwise; arguments take the place of their verb's first words."""
OWN: dict[str, dict[str, str]] = {
    "demo": {"model": "--model other", "act": "--act both", "out": "--out there"},
    "fetch": {"name": "smollm2-135m-other", "force": "--force"},
    "collect": {"text": "--text prose", "statistic": "--statistic moments", "gradients": "--gradients"},
    "explore": {"scores": "other", "out": "--out o.html", "model": "--model m", "text": "--text code", "at_most": "--at-most 9"},
    "prune": {"fraction": "--fraction 0.2", "learned": "= m --learned --out e.safetensors", "scores": "--scores s.safetensors",
              "max_retain_drop": "--max-retain-drop 5", "cap_per_layer": "--cap-per-layer 0.3", "control": "--control 2"},
    "project": {"rank": "--rank 3", "method": "--method leace", "previous": "--previous p", "resume": "--resume r",
                "forget": "--forget symbols", "retain": "--retain symbols", "layers": "--layers 1", "target": "--target exchange",
                "regression": "--regression", "lam": "--lam 0.5", "retain_budget": "--retain-budget 0.1", "keep_rank": "--keep-rank 3",
                "contexts": "--contexts prose", "text": "--text code", "answers": "--answers", "rare": "--rare 9"},
    "unlearn": {"recipe": "--recipe npo", "layers": "--layers 1", "modules": "--modules attn.out", "mask": "--mask sure:50", "set_": "--set lr=0.5",
                "micro_batch": "--micro-batch 2", "shard": "--shard", "gradient_checkpointing": "--gradient-checkpointing", "resume": "--resume r",
                "log": "--log l", "list_recipes": "--list-recipes", "update": "--update symbols", "forget": "--forget symbols"},
    "apply": {"edit": "other", "dtype": "--dtype bfloat16", "workers": "--workers 3", "verify": "--no-verify", "out": "--out other"},
    "diff": {"base": "other", "out": "--out d.html"},
    "compare": {"out": "--out c.html", "base": "other", "text": "--text prose", "prompt": "--prompt hi", "metrics": "--metrics tofu --data there",
                "folder": "--metrics tofu --data elsewhere", "limit": "--metrics tofu --data there --limit 3"},
    "chat": {"original": "--original other", "prompt": "other", "plain": "--plain", "temperature": "--temperature 0.5"},
    "audit": {"original": "--original other", "facts": "--facts symbols", "retain": "--retain symbols", "reference": "--reference r", "unrelated": "--unrelated code",
              "holdout": "--holdout code", "attributes": "--attributes languages", "budget": "--budget full", "until": "--until all", "attacks": "--attacks direct", "folds": "--folds 1", "seeds": "--seeds 1,2",
              "allow_small": "--allow-small", "out": "--out there", "hide_items": "--out there --hide-items", "selftest": "= --selftest", "seed": "--selftest --seed 7", "workers": "--selftest --workers 3"},
    "report": {"audits": "b", "out": "--out there", "hide_items": "--hide-items"},
    "tasks": {"out": "other", "facts": "--facts capitals"},
    "push": {"source": "other", "repository": "other/n", "yes": "--yes", "public": "--public", "message": "--message why"},
    "run": {"file": "other.toml"}, "reproduce": {"file": "other.toml"},
    "vision demo": {"data": "--data mnist5k", "forget": "--forget class:1", "recipe": "--recipe relabel", "references": "--references 5", "out": "--out there"},
}  # fmt: skip
OVERWRITE = ("m", "--method", "overwrite", "--out", "e.safetensors")
MERGE = ("m", "--method", "merge", "--out", "e.safetensors")
BESIDE = {
    ("audit", "seed"): ("--selftest",),
    ("audit", "workers"): ("--selftest",),
    ("demo", "steps"): ("--act", "capitals"),
    ("explore", "text"): ("s.safetensors", "--model", "m", "--out", "m.html"),
    ("explore", "limit_tokens"): ("s.safetensors", "--model", "m", "--out", "m.html"),
    **{
        ("project", name): OVERWRITE
        for name in ("layers", "target", "regression", "lam", "retain_budget", "contexts", "text")
    },
    **{("project", name): MERGE for name in ("answers", "rare")},
    ("project", "keep_rank"): (*OVERWRITE, "--target", "selective"),
}
"""Where a verb must be asked with other words to be asked the same without the option."""
PARAMETERS = [(verb, str(p.name)) for verb, command in cli.verbs().items() for p in command.params if p.name != "help"]


def owners(targets: tuple[str, ...]) -> list[tuple[Any, str]]:
    """The module or class, and the attribute, of dotted names inside the package."""
    found = []
    for target in targets:
        parts = target.split(".")
        while True:  # the longest part that is a module
            try:
                owner, rest = importlib.import_module(f"repedit.{'.'.join(parts)}"), target.split(".")[len(parts) :]
                break
            except ModuleNotFoundError:
                parts.pop()
        for part in rest[:-1]:
            owner = getattr(owner, part)
        found.append((owner, rest[-1]))
    return found


def asked(verb: str, words: tuple[str, ...], monkeypatch: Any, folder: Path) -> str:
    """Everything that a command line asks the library for, and shows, as text."""
    calls: list[Any] = []
    KEPT.reset_mock()

    def plain(value: Any) -> Any:
        return value.plain() if isinstance(value, UnlearnRecipe) else value

    def stub(name: str) -> Any:
        def called(*args: Any, **given: Any) -> Any:
            calls.append((name, [plain(a) for a in args], {key: plain(a) for key, a in given.items()}))
            return ANSWERS.get(name, [KEPT, KEPT] if name in ("cli.inspect._show", "cli.inspect._last") else KEPT)

        return called

    with monkeypatch.context() as patch:
        patch.chdir(folder)
        for target, (owner, attribute) in zip(PATCHED[verb], owners(PATCHED[verb]), strict=True):
            patch.setattr(owner, attribute, stub(target))
        result = CliRunner().invoke(cli.app, [*verb.split(), *words])
    error = result.exception
    assert error is None or (isinstance(error, SystemExit) and error.code != 2), (
        f"{verb} {words}: {error!r} {result.output}"
    )
    calls += [call for call in KEPT.mock_calls if call[0] in ("select", "sites", "write", "write_html")]
    shown = "\n".join(line for line in result.output.splitlines() if "wrote" not in line)
    return f"{calls}\n{shown}"


def test_every_option_has_a_case():
    missing = [f"{verb} {name}" for verb, name in PARAMETERS if name not in {**COMMON, **OWN.get(verb, {})}]
    assert not missing and len(PARAMETERS) > 120


@pytest.mark.parametrize("verb", PATCHED)
def test_every_option_changes_what_is_asked_for(verb, monkeypatch, tmp_path):
    words = {**COMMON, **OWN.get(verb, {})}
    commands, idle, asked_before = cli.verbs()[verb], [], {}
    places = [str(p.name) for p in commands.params if p.param_type_name == "argument"]
    for name in (str(p.name) for p in commands.params if p.name != "help"):
        base = BESIDE.get((verb, name), BASE[verb])
        if words[name].startswith("= "):
            changed = tuple(words[name].split()[1:])
        elif name in places and places.index(name) < len(base):
            at = places.index(name)
            changed = (*base[:at], words[name], *base[at + 1 :])
        else:
            changed = (*base, *words[name].split())
        if base not in asked_before:
            asked_before[base] = asked(verb, base, monkeypatch, tmp_path)
        if asked_before[base] == asked(verb, changed, monkeypatch, tmp_path):
            idle.append(name)
    assert idle == []
    for base, before in asked_before.items():  # nothing else makes a difference
        assert before == asked(verb, base, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("verb", "beside", "names"), [(v, b, n) for v, rows in application.INEFFECTIVE.items() for b, _, n in rows]
)
def test_an_option_that_would_change_nothing_is_refused(verb, beside, names):
    ways = {
        "--statistic moments": "--statistic moments", "two saved collections": "--forget a.safetensors --retain b.safetensors", "--learned": "--learned",
        "--scores": "--scores s.safetensors", "--structure keep": "", "a --method that fits at once": "--method leace", "--method overwrite or merge": "--method merge", "a --method other than overwrite": "", "a --method other than merge": "", "a --method other than overwrite and merge": "",
        "a --target other than selective": "--method overwrite", "--selftest": "--selftest",
        "an audit without --selftest": "", "--dry-run": "--dry-run", "--metrics": "--metrics tofu --data d", "no --metrics": "", "--act code": "--act code",
        "--act capitals": "--act capitals", "no --model": "", "no MODEL": "",
    }  # fmt: skip
    own = {
        "layout": "--layout ragged",
        "multiple": "--multiple 4",
        "limit": "--limit 3",
        "hide_items": "--hide-items",
        "seed": "--seed 3",
        "edited": "m",
    }
    base = {"prune": "m --out o", "audit": "", "doctor": "", "apply": "e m --out o"}.get(verb, " ".join(BASE[verb]))
    if "without" in beside or beside == "--dry-run":
        base = "m --original n --facts capitals"
    for name in names:
        given = own.get(name) or {**COMMON, **OWN.get(verb, {})}[name]
        with pytest.raises(ArgumentError, match=r"has no effect with .*; leave one of them out"):
            CliRunner().invoke(cli.app, [verb, *f"{base} {ways[beside]} {given}".split()], catch_exceptions=False)


@pytest.mark.parametrize(
    "words",
    [
        "unlearn m --out d --layers= ",
        "audit m --original n --facts c --seeds=",
        "compare m n --text prose --text=",
        "collect m --out o --sites=",
    ],
)
def test_an_empty_option_is_refused(words):
    with pytest.raises(ArgumentError, match=r"is empty; leave it out, or give it a value"):
        CliRunner().invoke(cli.app, words.split(), catch_exceptions=False)


class Reached(Exception):
    """The library was asked for something."""


def numbers_are_refused_first(verb, monkeypatch, folder):
    """The law: a number that no option of the kind can be is refused before the library is asked for anything."""
    for option in cli.verbs()[verb].params:
        name, kind = str(option.name), getattr(getattr(option, "type_descriptor", None), "annotation", None)
        if kind not in (int, float):
            continue
        words = {**COMMON, **OWN.get(verb, {})}[name].split()
        for value in NUMBERS.get(name, ("0", "-1", str(10**30)) if kind is int else ("nan", "inf", "-1")):
            words[words.index(option.opts[0]) + 1] = value
            line = [*verb.split(), *BESIDE.get((verb, name), BASE[verb]), *words]
            with monkeypatch.context() as patch:
                patch.chdir(folder)
                for owner, attribute in owners(PATCHED[verb]):
                    patch.setattr(owner, attribute, raising)
                error = CliRunner().invoke(cli.app, line).exception
            assert isinstance(error, ArgumentError) and option.opts[0] in str(error), (line, error)


def raising(*_args: Any, **_options: Any) -> None:
    raise Reached


NUMBERS = {
    "seed": ("-1", str(2**63)), "control": ("-1", str(10**30)), "rare": ("-1", str(10**30)), "at_most": ("1", "-5"), "lam": ("0", "-1", "nan", "inf"),
    "retain_budget": ("0", "-1", "nan", "inf"), "max_retain_drop": ("nan", "inf"), "fraction": ("-0.1", "1.1", "nan"),
}  # fmt: skip
"""Option -> numbers that it cannot be, where those of its type do not do."""


@pytest.mark.parametrize("verb", PATCHED)
def test_a_number_that_an_option_cannot_be_is_refused_before_work(verb, monkeypatch, tmp_path):
    numbers_are_refused_first(verb, monkeypatch, tmp_path)


WORDS = {
    **dict.fromkeys(("score", "prune"), ("importance", "combine")), "project": ("method", "contexts"), "compare": ("metrics",),
}  # fmt: skip
READ = {
    "collect": ("text",), "score": ("forget", "retain"), "explore": ("text",), "prune": ("scores",), "project": ("previous", "text"), "compare": ("text", "folder"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "name"), [(verb, name) for table in (WORDS, READ) for verb, names in table.items() for name in names]
)
def test_what_does_not_exist_is_refused_before_a_model_is_read(verb, name, monkeypatch, tmp_path):
    """A name, a text, an edit and a folder of data."""
    option = next(option.opts[0] for option in cli.verbs()[verb].params if option.name == name)
    words = {**COMMON, **OWN.get(verb, {})}[name].split()
    words[words.index(option) + 1] = "nothing-of-this-name"
    base = BESIDE.get((verb, name), BASE[verb])
    monkeypatch.chdir(tmp_path)
    for module in ("neurons", "unlearn", "inspect"):
        monkeypatch.setattr(f"repedit.cli.{module}.load_model", raising)
    if verb != "prune":
        monkeypatch.setattr("repedit.neurons.scores.Scores.load", lambda path: {})
    with pytest.raises(RepeditError, match="nothing-of-this-name"):
        CliRunner().invoke(cli.app, [*verb.split(), *base, *words], catch_exceptions=False)


def test_an_option_without_a_range_would_be_caught(monkeypatch, tmp_path):
    monkeypatch.delitem(application.WHOLE, "multiple")
    with pytest.raises(AssertionError, match="Reached"):
        numbers_are_refused_first("prune", monkeypatch, tmp_path)


def test_items_are_hidden_on_standard_output_too(monkeypatch, tmp_path):
    base = ("m", "--original", "n", "--facts", "capitals", "--json")
    assert "report.redacted" not in asked("audit", base, monkeypatch, tmp_path)
    assert "report.redacted" in asked("audit", (*base, "--hide-items"), monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["lr=1e-3", "lr=2e-3"], r"--set lr is given twice, as 0\.001 and as 0\.002; give it once"),
        (["name=x"], r"recipe 'npo_klr' has no option 'name'"),
        (["beta=null"], r"beta=None; give a value, or omit it for 0\.\d+"),
        (["steps=99999999999999999999"], r"steps=9+ out of range"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(settings, match):
    words = [word for setting in settings for word in ("--set", setting)]
    with pytest.raises(RepeditError, match=match):
        CliRunner().invoke(cli.app, ["unlearn", "m", "--out", "d.safetensors", *words], catch_exceptions=False)


def test_an_option_that_is_dropped_would_be_caught(monkeypatch, tmp_path):
    """The walk sees a verb that forgets to pass an option on."""
    monkeypatch.setattr(cli.unlearn, "recipe_of", lambda *a: SimpleNamespace(roles=()))
    with pytest.raises(AssertionError, match=r"recipe.*set_"):
        test_every_option_changes_what_is_asked_for("unlearn", monkeypatch, tmp_path)
