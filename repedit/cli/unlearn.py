"""The verb that unlearns by gradient steps."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from repedit.cli.options import JSON, Device, Dtype, Model, Seed, opened
from repedit.cli.saving import check_out, keeping, write


def _list(context: Any, option: Any, value: bool) -> bool:
    """Every recipe with its formula, source and defaults; both options come here first, and the second one shows it."""
    seen = context.meta.setdefault("repedit.list_recipes", {})
    seen[option.name] = value
    if len(seen) < 2 or not seen["list_recipes"]:
        return value
    from repedit.cli import output
    from repedit.unlearning.recipe import MergedRecipe
    from repedit.unlearning.recipes import RECIPES

    rows = []
    for name, make in RECIPES.items():
        found = make()
        first = found.parts[0] if isinstance(found, MergedRecipe) else found
        often = f"{first.steps} steps" if first.steps else f"{first.epochs:g} epochs"
        rows.append([name, found.formula, f"lr {first.lr:g}, {often}, batch {first.batch_size}", found.source])
    columns = ("name", "formula", "defaults", "source")
    if seen["json"]:
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
    steps: Annotated[int | None, typer.Option(help="Steps, in place of the recipe's.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Rows a forward pass.")] = None,
    shard: Annotated[
        bool, typer.Option("--shard", help="Under torchrun: divide what is trained among the ranks.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute blocks again in the backward pass; saves memory.")
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="Folder to save the training in, and to continue from.")] = None,
    log: Annotated[Path | None, typer.Option(help="JSONL file, one line a step.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing directory.")] = False,
    json: Annotated[bool, typer.Option("--json", help=JSON, is_eager=True, callback=_list)] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list-recipes", help="Show every recipe.", is_eager=True, callback=_list)
    ] = False,
) -> None:
    """Train the forgetting of a set of rows into the weights, and write the difference; it mostly hides, so audit it.

    Several processes share the work under torchrun --nproc-per-node N -m repedit unlearn ...
    """
    from repedit.distributed import leave_process_group, local_device

    check_out(out, model, forget, retain, update, resume, log, overwrite=overwrite)
    chosen = _recipe(recipe, set_ or [], layers, modules, mask)
    sets = _sets(chosen, forget, retain, update)
    subject = opened(model, local_device(device), dtype)
    delta = _trained(
        subject, out, recipe=chosen, steps=steps, micro_batch=micro_batch, seed=seed, resume=resume, log=log,
        shard=shard, gradient_checkpointing=gradient_checkpointing, checkpoint_every=20 if resume else None, **sets,
    )  # fmt: skip
    if leave_process_group():
        _show(delta, subject, out, overwrite, json)
    if delta.provenance.get("stopped", {}).get("rule") == "collapse":
        raise typer.Exit(3)


def _trained(subject: Any, out: Path, **options: Any) -> Any:
    """The Delta of a training; one that failed ends the command with exit code 4."""
    from repedit.cli import output
    from repedit.errors import CheckpointError, TrainingError
    from repedit.unlearning.api import unlearn as unlearned

    try:
        return unlearned(subject, **options)
    except CheckpointError as error:  # a log or a state that could not be written
        with contextlib.nullcontext() if error.delta is None else keeping(error.delta, out):
            raise
    except TrainingError as error:
        output.err.print(f"TrainingError: {error}")
        raise typer.Exit(4) from error


def _show(delta: Any, subject: Any, out: Path, overwrite: bool, json: bool) -> None:
    """Write the difference and say what became of the training."""
    from repedit.cli import output

    write(delta, subject, out, overwrite)
    stopped = delta.provenance.get("stopped", {})
    if json:
        last = {key: delta.log[-1][key] for key in ("losses", "nll", "cosine")} if delta.log else {}
        output.show_json(
            {"out": str(out), "tensors": len(delta.tensors), "steps": len(delta.log), "stopped": stopped, "last": last}
        )
    else:
        output.out.print(delta.summary(subject).rsplit("\n", 1)[0])
        output.out.print(
            f"{stopped.get('reason', '')}; {len(delta.tensors)} tensors changed. This mostly hides: repedit audit",
        )


def _recipe(name: str, settings: list[str], layers: str | None, modules: str | None, mask: str | None) -> Any:
    from dataclasses import replace

    from repedit.errors import ArgumentError
    from repedit.unlearning.recipe import UnlearnRecipe
    from repedit.unlearning.recipes import by_name, read, sure

    if name.endswith(".toml"):
        if settings:
            raise ArgumentError(f"--set {settings[0]!r} beside the file {name}; write it under [options] there")
        found: Any = read(name)
    else:
        found = by_name(name, **_settings(settings))
    if not isinstance(found, UnlearnRecipe):
        if layers is not None or modules is not None or mask is not None:
            raise ArgumentError(
                f"recipe {name!r} merges several trainings; --layers, --modules and --mask fit a single one"
            )
        return found
    changes: dict[str, Any] = {} if layers is None else {"layers": layers}
    changes |= {} if modules is None else {"modules": tuple(modules.split(","))}
    found = replace(found, parameters=replace(found.parameters, **changes))
    if mask is None:
        return found
    kind, _, percentile = mask.partition(":")
    try:
        return sure(found, percentile=float(percentile if kind == "sure" else "none"))
    except ValueError as error:
        raise ArgumentError(f"--mask {mask!r}; write 'sure:90', with a number in [0, 100]") from error


def _settings(texts: list[str]) -> dict[str, Any]:
    """The options of --set, each given once."""
    from repedit.errors import ArgumentError

    options: dict[str, Any] = {}
    for key, value in map(_setting, texts):
        if key in options:
            raise ArgumentError(f"--set {key} is given twice, as {options[key]!r} and as {value!r}; give it once")
        options[key] = value
    return options


def _setting(text: str) -> tuple[str, Any]:
    from repedit.errors import ArgumentError
    from repedit.io.text import parse_json

    key, found, value = text.partition("=")
    if not found:
        raise ArgumentError(f"--set {text!r}; write name=value, such as lr=1e-4")
    try:
        parsed = parse_json(value, key, ArgumentError)
    except ArgumentError:
        parsed = value
    whole = key in ("steps", "batch_size", "length", "layer")
    return key, float(parsed) if isinstance(parsed, int) and not isinstance(parsed, bool) and not whole else parsed


def _sets(recipe: Any, forget: str, retain: str | None, update: str | None) -> dict[str, Any]:
    """The sets by role; what is kept by default are the facts that belong to those to forget."""
    from repedit import data
    from repedit.unlearning.recipe import MergedRecipe

    parts = recipe.parts if isinstance(recipe, MergedRecipe) else (recipe,)
    found: dict[str, Any] = {}
    for role, name in (("forget", forget), ("retain", retain), ("update", update)):
        if name is not None:
            text = name in data.BUILTIN or name.endswith((".txt", ".md", ".parquet"))
            found[role] = data.read(name) if text else data.facts(name).forget
            if role == "forget" and retain is None and not text and any("retain" in part.roles for part in parts):
                found["retain"] = data.facts(name).retain
    return found
