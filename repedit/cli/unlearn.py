"""The verb that unlearns by gradient steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

import typer

from repedit.cli.application import JSON_HELP, Dequantize, Device, Dtype, Model, Overwrite, Seed, load_model
from repedit.cli.apply import Saveable, check_out, rescued, write_edited

if TYPE_CHECKING:
    from repedit.data import Corpus, Fact, Tokens
    from repedit.delta import Delta
    from repedit.models.subject import Subject
    from repedit.unlearning.recipe import AnyRecipe

    _Rows = Corpus | Tokens | Sequence[Fact]


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


def unlearn(
    model: Model,
    out: Annotated[Path, typer.Option(help="x.safetensors writes the delta, a directory the edited checkpoint.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="A TOML file, or a name, with a variant or over another: blur_npo, ails_ntua:agad, small:grad_diff."
        ),
    ] = "small:npo_klr",
    forget: Annotated[
        str, typer.Option(help="A built-in domain (capitals, ...; several with +), a .jsonl of facts, or a text.")
    ] = "capitals",
    retain: Annotated[
        str | None, typer.Option(help="What to keep; by default the facts that belong to --forget.")
    ] = None,
    update: Annotated[str | None, typer.Option(help="What to learn instead, for recipes that do (surgery).")] = None,
    layers: Annotated[str | None, typer.Option(help="'20-29', 'last 8', or 'all'.")] = None,
    modules: Annotated[str | None, typer.Option(help="'mlp.down_proj', 'attn.out', ...; several with commas.")] = None,
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
    chosen = _recipe(recipe, set_ or [], layers, modules, mask)
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


def _recipe(name: str, settings: Sequence[str], layers: str | None, modules: str | None, mask: str | None) -> AnyRecipe:
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
