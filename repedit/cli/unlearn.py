"""Verbs that make a model forget facts: project, by projections of hidden states, and unlearn, by gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import typer

from repedit.cli.application import (
    JSON_HELP,
    BatchSize,
    Dequantize,
    Device,
    Dtype,
    EditOut,
    Json,
    Model,
    Overwrite,
    Seed,
    load_model,
)
from repedit.cli.apply import Saveable, check_out, plan_summary, rescued, show_plan, write_edited

if TYPE_CHECKING:
    from repedit.data import Corpus, Fact, Facts, Tokens
    from repedit.delta import Delta
    from repedit.edit import Edit
    from repedit.fit.merging import MergeCertificate
    from repedit.fit.overwrite import OverwriteCertificate
    from repedit.models.subject import Subject
    from repedit.unlearning.recipe import AnyRecipe

    _Certified = tuple[Edit | Delta, MergeCertificate | OverwriteCertificate]
    _Rows = Corpus | Tokens | Sequence[Fact]


# --- project


Forget = Annotated[
    str, typer.Option(help="A built-in domain (capitals, symbols, ...; several with +), or a .jsonl of facts.")
]
Retain = Annotated[str | None, typer.Option(help="Facts to keep; by default those of the file, or the other domains.")]
Where = Annotated[
    str | None, typer.Option(help="Where to project: '0-11.mlp.out', 'stream'; by default mlp.out of the early layers.")
]
Method = Annotated[
    str,
    typer.Option(
        help="mrp trains; cpca, residual_pca, leace, oblique, ... fit in closed form; overwrite replaces what early MLPs write at the names that facts are about; merge makes all these names one, so that the model can neither read nor say them."
    ),
]
DryRun = Annotated[bool, typer.Option(help="Show the plan of a random projection of this rank; train nothing.")]

# Of --method overwrite
Layers = Annotated[str, typer.Option(help="Of overwrite: whose MLPs, such as '0-1' or '2-11'.")]
Target = Annotated[
    Literal["mean", "exchange", "selective"],
    typer.Option(
        help="Of overwrite: the mean value of all entities of a domain, the value of another one, or the mean but for what facts to keep about the same entities use."
    ),
]
UseRegression = Annotated[
    bool, typer.Option("--regression", help="Of overwrite: train the MLPs on their inputs, instead of a closed form.")
]
Lam = Annotated[
    float | None,
    typer.Option(help="Of overwrite: weight of what is retained; by default 0.3, or what the budget asks for."),
]
RetainBudget = Annotated[
    float | None,
    typer.Option(help="Of overwrite: largest relative change of the outputs of a layer on --text, such as 0.02."),
]
KeepRank = Annotated[
    int, typer.Option(help="Of overwrite with --target selective: directions of the values that stay.")
]
Contexts = Annotated[
    str,
    typer.Option(
        help="Of overwrite: which texts name the entities; any of templates, wordings, prose and written, joined by commas."
    ),
]
RetainText = Annotated[
    str, typer.Option(help="Of overwrite and merge: running text to retain; 'prose', 'code' or a file.")
]
# Of --method merge
Answers = Annotated[
    bool,
    typer.Option(
        "--answers", help="Of merge: merge the answers too, so that questions the other way round find nothing."
    ),
]
Rare = Annotated[
    int,
    typer.Option(
        help="Of merge: the tokens of a name from this number on are averaged; fewer reaches more names, and harms more words."
    ),
]
Previous = Annotated[
    Path | None, typer.Option(help="The saved edit of earlier deletions, whose directions stay removed.")
]


def project(
    model: Model,
    out: EditOut,
    forget: Forget = "capitals",
    retain: Retain = None,
    sites: Where = None,
    rank: Annotated[int, typer.Option(help="Directions removed at each site.")] = 8,
    method: Method = "mrp",
    steps: Annotated[int, typer.Option(help="Training steps of mrp.")] = 150,
    previous: Previous = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to save the training in, and to resume it from.")] = None,
    layers: Layers = "0-1",
    target: Target = "mean",
    regression: UseRegression = False,
    lam: Lam = None,
    retain_budget: RetainBudget = None,
    keep_rank: KeepRank = 32,
    contexts: Contexts = "templates,wordings",
    text: RetainText = "prose",
    answers: Answers = False,
    rare: Rare = 4000,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Remove the directions that hold a set of facts, keep the other facts, and write an edit or a checkpoint."""
    from repedit import data
    from repedit.edit import Edit
    from repedit.fit.mrp import mrp

    if not dry_run:
        check_out(out, model, forget, retain, previous, resume, overwrite=overwrite)
    facts = data.facts(forget) if retain is None else data.facts(forget, retain=data.facts(retain).forget)
    earlier = None if previous is None else Edit.load(previous)
    corpus = data.read(text) if method in ("overwrite", "merge") else None
    subject = load_model(model, device, dtype, dequantize)
    if method in ("overwrite", "merge"):
        if method == "merge":
            change, certificate = _merged(subject, facts, answers=answers, rare=rare, retain=corpus, seed=seed)
        else:
            change, certificate = _overwritten(
                subject, facts, layers=layers, target=target, method="regression" if regression else "linear", lam=lam,
                retain_budget=retain_budget, retain=corpus, keep_rank=keep_rank, contexts=contexts.split(","), seed=seed,
            )  # fmt: skip
        _show(subject, facts, change, certificate.plain(), certificate.describe(), json, out)
        write_edited(change, subject, out, overwrite)
        return
    edit = mrp(
        subject, forget=facts.forget, retain=facts.retain, sites=sites, rank=rank, method="random" if dry_run else method,
        config={"steps": steps, "batch_size": batch_size, "seed": seed}, resume=resume, previous=earlier,
    )  # fmt: skip
    if dry_run:
        show_plan(plan_summary(edit, subject), out, json)
        return
    _show_projection(subject, facts, edit, json, out)
    write_edited(edit, subject, out, overwrite)


def _overwritten(
    subject: Subject, facts: Facts, *, target: Literal["mean", "exchange", "selective"], **options: Any
) -> _Certified:
    """What overwrites the values at the names of the facts, and its certificate."""
    from repedit.fit.overwrite import OverwriteCertificate
    from repedit.fit.overwrite import overwrite as overwrite_values

    near, others = _about(facts)
    keep = near if target == "selective" else ()
    change = overwrite_values(subject, facts.forget, target=target, keep=keep, others=others, **options)
    return change, OverwriteCertificate.of(change)


def _merged(subject: Subject, facts: Facts, *, rare: int, **options: Any) -> _Certified:
    """What merges the names of the facts, and its certificate."""
    from repedit.fit.merging import MergeCertificate, merge

    delta = merge(subject, facts.forget, others=_about(facts)[1], config={"rare": rare}, **options)
    return delta, MergeCertificate.of(delta)


def _show_projection(subject: Subject, facts: Facts, edit: Edit, json: bool, out: Path) -> None:
    ranks = {str(site): map_.rank_removed for site, map_ in edit.maps.items()}
    _show(subject, facts, edit, {"rank": ranks}, f"{sum(ranks.values())} directions over {len(ranks)} sites", json, out)


def _about(facts: Facts) -> tuple[list[Fact], list[Fact]]:
    """The facts to retain about entities of facts to forget, and those about other entities."""
    from repedit.data import entity_of

    names = {entity_of(fact) for fact in facts.forget}
    near = [fact for fact in facts.retain if entity_of(fact) in names]
    return near, [fact for fact in facts.retain if fact.entity and entity_of(fact) not in names]


def _show(
    subject: Subject, facts: Facts, change: Edit | Delta, values: Mapping[str, Any], note: str, json: bool, out: Path
) -> None:
    """Show the accuracy on each domain before and after, and what was done: as values in JSON, else as a note."""
    from repedit.cli import output
    from repedit.metrics.facts import knowledge
    from repedit.rewrite.apply import apply

    measured = knowledge(subject, apply(change, subject), (*facts.forget, *facts.retain))
    forget = {fact.domain for fact in facts.forget}
    if not json:
        output.table("Facts right, multiple choice", output.KNOWLEDGE_COLUMNS, output.knowledge_rows(measured, forget))
        output.out.print(note)
        return
    domains = {
        name: {"before": k.before.accuracy, "after": k.after.accuracy, "interval": k.after.interval,
               "chance": k.chance, "role": "forget" if name in forget else "retain"}
        for name, k in measured.items()
    }  # fmt: skip
    output.show_json({"domains": domains, **values, "out": str(out)})


# --- unlearn


class _Sets(TypedDict):
    """The data of a training, by role."""

    forget: _Rows | None
    retain: _Rows | None
    update: _Rows | None


def _list_recipes(context: Any, option: Any, value: bool) -> bool:
    """Callback of --list-recipes and --json, which are read first; the second call shows the recipes and ends the verb."""
    values = context.meta.setdefault("repedit.list_recipes", {})
    values[option.name] = value
    if len(values) < 2 or not values["list_recipes"]:
        return value
    from repedit.cli import output
    from repedit.unlearning.recipe import UnlearnRecipe
    from repedit.unlearning.recipes import RECIPES

    rows = []
    for name, make in RECIPES.items():
        recipe = make()
        first = recipe if isinstance(recipe, UnlearnRecipe) else recipe.parts[0]
        duration = f"{first.steps} steps" if first.steps else f"{first.epochs:g} epochs"
        rows.append([name, recipe.formula, f"lr {first.lr:g}, {duration}, batch {first.batch_size}", recipe.source])
    columns = ("name", "formula", "defaults", "source")
    if values["json"]:
        output.show_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        output.table("Recipes; none of them promises removal, see repedit audit", columns, rows)
    raise typer.Exit


RecipeName = Annotated[
    str,
    typer.Option(
        help="A TOML file or a name, such as blur_npo; with a variant, ails_ntua:agad; small:NAME is a short training of it for a CPU."
    ),
]


def unlearn(
    model: Model,
    out: Annotated[Path, typer.Option(help="x.safetensors writes the delta, a directory the edited checkpoint.")],
    recipe: RecipeName = "small:npo_klr",
    forget: Annotated[
        str, typer.Option(help="A built-in domain (capitals, ...; several with +), a .jsonl of facts, or a text.")
    ] = "capitals",
    retain: Annotated[
        str | None, typer.Option(help="What to keep; by default the facts that belong to --forget.")
    ] = None,
    update: Annotated[
        str | None, typer.Option(help="What to learn instead, for a recipe that teaches new facts (surgery).")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to train: '20-29', 'last 8', or 'all'.")] = None,
    modules: Annotated[str | None, typer.Option(help="Modules to train, such as 'mlp.down_proj,attn.out'.")] = None,
    mask: Annotated[
        str | None, typer.Option(help="'sure:90' trains only the units of the top tenth by forget gradient.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Options of the recipe, such as lr=1e-4; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of those of the recipe.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows in one forward pass.")] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: divide what is trained among the processes.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute blocks in the backward pass; saves memory.")
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="Folder to save the training in, and to resume it from.")] = None,
    log: Annotated[Path | None, typer.Option(help="JSONL file, one line for each step.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    dequantize: Dequantize = False,
    overwrite: Overwrite = False,
    json: Annotated[bool, typer.Option("--json", help=JSON_HELP, is_eager=True, callback=_list_recipes)] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Show every recipe.", is_eager=True, callback=_list_recipes)
    ] = False,
) -> None:
    """Unlearn by gradient steps and write the difference of the weights; it mostly hides what it forgets, so audit it.

    Several processes share the work under torchrun --nproc-per-node N -m repedit unlearn ...
    """
    from repedit.distributed import leave_process_group, local_device
    from repedit.unlearning.api import unlearn as train

    check_out(out, model, forget, retain, update, resume, log, overwrite=overwrite)
    chosen = recipe_of(recipe, set_ or [], layers, modules, mask)
    sets = _sets(chosen, forget, retain, update)
    subject = load_model(model, local_device(device), dtype, dequantize)
    with _training_errors(out):
        delta = train(
            subject, recipe=chosen, steps=steps, micro_batch=micro_batch, seed=seed, resume=resume, log=log, shard=shard,
            gradient_checkpointing=gradient_checkpointing, checkpoint_every=20 if resume else None, **sets,
        )  # fmt: skip
    if leave_process_group():
        _write_and_show(delta, subject, out, overwrite, json)
    if delta.provenance.get("stopped", {}).get("rule") == "collapse":
        raise typer.Exit(3)


@contextlib.contextmanager
def _training_errors(out: Path) -> Iterator[None]:
    """A training error ends the verb with exit code 4; an error of writing saves the delta elsewhere, if there is one."""
    from repedit.cli import output
    from repedit.errors import CheckpointError, TrainingError

    try:
        yield
    except CheckpointError as error:  # a log or a state that could not be written
        with rescued(error.delta, out) if isinstance(error.delta, Saveable) else contextlib.nullcontext():
            raise
    except TrainingError as error:
        output.err.print(f"TrainingError: {error}")
        raise typer.Exit(4) from error


def _write_and_show(delta: Delta, subject: Subject, out: Path, overwrite: bool, json: bool) -> None:
    """Write the difference of the weights and show how the training ended."""
    from repedit.cli import output

    write_edited(delta, subject, out, overwrite)
    stopped = delta.provenance.get("stopped", {})
    if json:
        last = {key: delta.log[-1][key] for key in ("losses", "nll", "cosine")} if delta.log else {}
        output.show_json(
            {"out": str(out), "tensors": len(delta.tensors), "steps": len(delta.log), "stopped": stopped, "last": last}
        )
    else:
        output.out.print(delta.summary(subject).rsplit("\n", 1)[0])
        output.out.print(
            f"{stopped.get('reason', '')}; {len(delta.tensors)} tensors changed. This mostly hides: repedit audit"
        )


def recipe_of(
    name: str, settings: Sequence[str], layers: str | None, modules: str | None, mask: str | None
) -> AnyRecipe:
    """The recipe of a name or file, with its settings and what it trains."""
    from dataclasses import replace

    from repedit.errors import ArgumentError
    from repedit.unlearning.recipe import UnlearnRecipe
    from repedit.unlearning.recipes import by_name, read, sure

    if name.endswith(".toml"):
        if settings:
            raise ArgumentError(f"--set {settings[0]!r} beside the file {name}; write it under [options] there")
        recipe: AnyRecipe = read(name)
    else:
        recipe = by_name(name, **_settings(settings))
    if not isinstance(recipe, UnlearnRecipe):
        if layers is not None or modules is not None or mask is not None:
            raise ArgumentError(
                f"recipe {name!r} consists of several trainings; --layers, --modules and --mask fit a single one, --set gives "
                "its options"
            )
        return recipe
    parameters = recipe.parameters
    if layers is not None:
        parameters = replace(parameters, layers=layers)
    if modules is not None:
        parameters = replace(parameters, modules=tuple(modules.split(",")))
    recipe = replace(recipe, parameters=parameters)
    if mask is None:
        return recipe
    kind, _, percentile = mask.partition(":")
    try:
        return sure(recipe, percentile=float(percentile if kind == "sure" else "none"))
    except ValueError as error:
        raise ArgumentError(f"--mask {mask!r}; write 'sure:90', with a number in [0, 100]") from error


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """The values of --set by name, each given once."""
    from repedit.errors import ArgumentError

    settings: dict[str, Any] = {}
    for name, value in map(_setting, texts):
        if name in settings:
            raise ArgumentError(f"--set {name} is given twice, as {settings[name]!r} and as {value!r}; give it once")
        settings[name] = value
    return settings


def _setting(text: str) -> tuple[str, object]:
    """(name, value) of name=value; numbers are floats, except for options that are whole numbers."""
    from repedit.errors import ArgumentError
    from repedit.io.text import parse_json

    name, equals, value = text.partition("=")
    if not equals:
        raise ArgumentError(f"--set {text!r}; write name=value, such as lr=1e-4")
    try:
        parsed = parse_json(value, name, ArgumentError)
    except ArgumentError:
        parsed = value
    whole = name in ("steps", "batch_size", "length", "layer")
    return name, float(parsed) if isinstance(parsed, int) and not isinstance(parsed, bool) and not whole else parsed


def _sets(recipe: AnyRecipe, forget: str, retain: str | None, update: str | None) -> _Sets:
    """The data by role; by default, a recipe that retains retains the facts that belong to those it forgets."""
    from repedit import data
    from repedit.unlearning.recipe import MergedRecipe, StagedRecipe

    def is_text(name: str) -> bool:
        return name in data.BUILTIN or name.endswith((".txt", ".md", ".parquet"))

    def rows(name: str | None) -> _Rows | None:
        return None if name is None else data.read(name) if is_text(name) else data.facts(name).forget

    parts = recipe.parts if isinstance(recipe, MergedRecipe | StagedRecipe) else (recipe,)
    retains = any("retain" in part.roles for part in parts)
    facts_of_forget = retain is None and retains and not is_text(forget)
    return {
        "forget": rows(forget), "retain": data.facts(forget).retain if facts_of_forget else rows(retain), "update": rows(update),
    }  # fmt: skip
