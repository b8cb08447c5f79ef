"""The demos behind `repedit demo` and `repedit vision demo`: a few public calls each, which a notebook can repeat."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from torch import nn

from repedit import plot, vision
from repedit.activations.collection import Collection, collect
from repedit.activations.prediction import Effect, effect, predictions
from repedit.auditing.classifier import audit_classifiers
from repedit.auditing.report import AUC, FORGET, RELEARNING, RETAIN, TEST, Report
from repedit.data import Corpus, Splits, by_domain, code, facts, prose, with_paraphrases
from repedit.delta import Delta
from repedit.edit import Edit
from repedit.errors import ArgumentError, RepeditError, UnknownName, check_seed, check_whole, is_whole, nearest
from repedit.fit.mrp import mrp
from repedit.io.targets import add_to_manifest, check_target
from repedit.metrics.benchmarks import Comparison, compare
from repedit.metrics.facts import Knowledge, knowledge
from repedit.metrics.generation import continuations
from repedit.models.subject import load
from repedit.neurons.scores import Scores, score
from repedit.neurons.selection import prune, random_like
from repedit.rewrite.export import export
from repedit.rewrite.manifest import Manifest
from repedit.rewrite.verification import Reload, reload_check
from repedit.vision import Images, ImageSplits, Task

# --- First demo: find the neurons of code, prune them, export, measure and plot

PRUNING_PROMPTS = ("def factorial(n):\n", "The capital of France is")
FRACTION = 0.01


@dataclass(frozen=True, eq=False)
class PruningDemo:
    """Results of the first demo."""

    edit: Edit
    manifest: Manifest
    comparison: Comparison
    control: dict[str, Effect]
    """The effect of pruning the same number of random neurons in each layer."""
    reload: Reload
    total: int
    """Number of scored neurons."""
    target: Path
    figures: tuple[Path, ...]


def prune_code(
    model: str, target: str | Path, *, tokens: int = 3000, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> PruningDemo:
    """Prune the neurons that a model uses for code and hardly for prose, export the result and compare it with the original.

    Collection and evaluation use different documents. An earlier export in the target directory is replaced.

    Args:
        tokens: counted tokens of each set, for collection and for evaluation.
        say: called with a line of text at each stage.
    Raises:
        TargetExists: if the target holds anything but an export of repedit.
    """
    check_whole(tokens=tokens)
    check_seed(seed=seed)
    out = check_target(target, overwrite=True)
    say(f"Loading {model}")
    subject = load(model)
    (forget, forget_eval), (retain, retain_eval) = code(seed=seed).halves(seed), prose().halves(seed)
    say(f"Collecting neuron activations on {forget.name} and {retain.name}, {tokens} tokens each")
    sides = [collect(subject, c, limit_tokens=tokens) for c in (forget, retain)]
    scores = score(sides[0], sides[1])
    edit = prune(scores, fraction=FRACTION)
    say(f"Writing the pruned checkpoint to {out}")
    figures = out.parent / f".{out.name}.figures"
    _draw(figures, sides, scores, edit, seed)
    manifest = export(edit, subject, out, overwrite=True)
    shutil.move(str(figures), out / "figures")
    add_to_manifest(out, [f"figures/{path.name}" for path in (out / "figures").iterdir()])
    say("Reloading it with plain transformers, in a process that cannot import repedit")
    reload = reload_check(out)
    say(
        f"Measuring the original, the exported checkpoint and a random control on other documents, {tokens} tokens a set"
    )
    corpora = (Corpus(forget_eval.documents, "code"), Corpus(retain_eval.documents, "prose"))
    comparison = compare(subject, load(out), corpora, prompts=PRUNING_PROMPTS, limit_tokens=tokens)
    control = random_like(edit, seed=seed)
    random = {
        c.name: effect(comparison.base[c.name], predictions(subject, c, edit=control, limit_tokens=tokens))
        for c in corpora
    }
    total = sum(len(s.values) for s in scores.values())
    pictures = tuple(sorted((out / "figures").glob("*.png")))
    return PruningDemo(edit, manifest, comparison, random, reload, total, out, pictures)


def _draw(folder: Path, sides: list[Collection], scores: Scores, edit: Edit, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {
        "specialization": plot.specialization(scores),
        "importances": plot.importances(sides[0], sides[1], edit=edit),
        "pruned_per_layer": plot.pruned_per_layer(edit, control=random_like(edit, seed=seed), layers=len(scores)),
    }
    for name, figure in by_name.items():
        figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Description": f"repedit demo, seed {seed}"})


# --- Second demo: the model forgets the capitals of countries and keeps its other knowledge

CAPITAL_PROMPTS = (
    "The capital of France is", "The capital of Japan is", "The chemical symbol for gold is", "The opposite of hot is",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class CapitalsDemo:
    """Results of the second demo."""

    edit: Edit
    manifest: Manifest
    """Includes the certificate of the fold."""
    trained: Mapping[str, Knowledge]
    """In the phrasing seen in training: the forgotten domain, and retained facts not used in training."""
    unseen: Knowledge
    """The forgotten domain in a phrasing unseen in training."""
    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    target: Path


def forget_capitals(
    model: str, target: str | Path, *, steps: int = 30, count: int = 30, seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> CapitalsDemo:  # fmt: skip
    """Train a projection that removes the capitals, fold it into the weights, export it and test the exported model.

    Half of the retained facts are used in training; retention is measured on the other half.

    Args:
        steps: training steps; `rp.mrp` trains longer by default.
        count: facts per domain to measure on.
    Raises:
        TargetExists: if the target holds anything but an export of repedit.
    """
    check_whole(steps=steps, count=count)
    check_seed(seed=seed)
    out = check_target(target, overwrite=True)
    subject, capitals = load(model), facts("capitals", seed=seed)
    halves = Splits.of(capitals.retain, seed=seed)
    forget = tuple(replace(fact, paraphrases=fact.paraphrases[:3]) for fact in capitals.forget)
    rank = min(8, subject.layout.width // 8)
    say(f"Training projections of rank {rank} for {steps} steps: forget {len(forget)} capitals, keep the rest")
    edit = mrp(subject, forget=forget, retain=halves.train, rank=rank, config={"steps": steps, "seed": seed})
    say(f"Writing the projected checkpoint to {out}")
    manifest = export(edit, subject, out, overwrite=True)
    edited = load(out)
    say(f"Asking both models: {count} facts a domain, eight choices each")
    tested = [fact for part in (forget, *by_domain(halves.test).values()) for fact in part[:count]]
    rephrased = with_paraphrases(capitals.forget[:count], only=[4])
    trained = knowledge(subject, edited, tested)
    (unseen,) = knowledge(subject, edited, rephrased).values()
    before, after = (continuations(side, CAPITAL_PROMPTS, tokens=8) for side in (subject, edited))
    return CapitalsDemo(edit, manifest, trained, unseen, CAPITAL_PROMPTS, before, after, out)


# --- Image demo: every recipe forgets the same images, and is audited against models retrained without them

COLUMNS = (
    "recipe", "verdict", "forget", "retain", "test", "AUC of the loss (95 %)", "relearn", "seconds", "of retraining",
)  # fmt: skip
RETRAINED_AGAIN = "retrained again"
"""The control: one more retrained model, audited like a recipe. It should have no gap."""


@dataclass(frozen=True)
class Setting:
    """How models are trained on one data set for one kind of request."""

    build: Callable[..., nn.Module]
    """(images, seed=...) -> an untrained model."""
    train: int = 1200
    remember: int = 100
    epochs: int = 20
    lr: float = 1e-3
    tuned: int = 5
    """Epochs of the recipes that continue training."""
    k: int = 10
    """Clusters per class in condensation."""


SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "digits": {
        "class": Setting(vision.small_cnn),
        "mislabelled": Setting(vision.small_mlp, epochs=60, lr=2e-3, tuned=8, k=30),
    },
    "mnist5k": {
        "class": Setting(vision.small_cnn, train=3500, remember=200, epochs=10),
        "mislabelled": Setting(vision.small_mlp, train=3500, remember=200, epochs=60, lr=2e-3, tuned=8, k=30),
    },
    "cifar6k": {
        "class": Setting(vision.small_cnn, train=4000, remember=300, epochs=20),
        "mislabelled": Setting(vision.small_mlp, train=4000, remember=300, epochs=60, tuned=8, k=30),
    },
}
"""By data set and kind of request. Wrong labels need the MLP: the small CNN does not memorize them."""
Recipe = Callable[[nn.Module, Task, ImageSplits, Setting, int], Delta]
RECIPES: Mapping[str, Recipe] = {
    "finetune": lambda m, t, s, o, seed: vision.finetune(m, t, s, epochs=o.tuned, seed=seed),
    "ascend": lambda m, t, s, o, seed: vision.ascend(m, t, s, seed=seed),
    "relabel": lambda m, t, s, o, seed: vision.relabel(m, t, s, epochs=o.tuned, seed=seed),
    "relabel runner_up": lambda m, t, s, o, seed: vision.relabel(m, t, s, mode="runner_up", epochs=o.tuned, seed=seed),
    "multi_gan": lambda m, t, s, o, seed: vision.multi_gan(m, t, s, epochs=o.tuned, seed=seed),
    "condense": lambda m, t, s, o, seed: vision.condense(m, t, s, plan=vision.Condense(k=o.k), seed=seed),
    "scrub": lambda m, t, s, o, seed: vision.scrub(m, t, s, epochs=o.tuned, seed=seed),
    "salun": lambda m, t, s, o, seed: vision.salun(m, t, s, epochs=o.tuned, seed=seed),
    "erase_class": lambda m, t, s, o, seed: vision.erase_class(m, t, s),
    "zero_units": lambda m, t, s, o, seed: vision.zero_units(m, t, s),
}
"""The recipes by name. `relabel` is `multi_gan` without synthetic images."""


@dataclass(frozen=True, eq=False)
class ImageDemo:
    """Results of one request."""

    request: str
    task: Task
    splits: ImageSplits
    original: nn.Module
    references: tuple[nn.Module, ...]
    models: Mapping[str, nn.Module]
    reports: Mapping[str, Report]
    """By recipe, including the control `RETRAINED_AGAIN`."""
    seconds: Mapping[str, Mapping[str, float]]
    """Online and offline, by recipe."""
    retraining: float
    """Seconds of one retraining."""
    refused: Mapping[str, str]
    """Reasons of the recipes that could not run."""

    def rows(self) -> list[list[str]]:
        """One row per recipe: its verdict, its gaps, and its time relative to a retraining; see `COLUMNS`."""
        rows = []
        for name, report in self.reports.items():
            gaps = {gap.measure: gap for gap in report.gaps}
            membership = gaps[AUC]
            cost = self.seconds[name]["online"]
            rows.append([
                name, report.verdict.word, *(f"{gaps[m].value:+.1%}" for m in (FORGET, RETAIN, TEST)),
                f"{membership.value:+.2f} ({membership.interval[0]:+.2f} to {membership.interval[1]:+.2f})", f"{gaps[RELEARNING].value:+.2f}",
                f"{cost:.1f}", f"{cost / self.retraining:.2f}",
            ])  # fmt: skip
        return rows


def forget_images(
    request: str = "class:3",
    data: str | Images = "digits",
    *,
    recipes: Sequence[str] | None = None,
    references: int = 3,
    setting: Setting | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> ImageDemo:
    """Train a model, forget by every recipe, retrain without the images, and audit all models.

    Args:
        request: "class:3", or "mislabelled:0.1" for a fraction of the training images with wrong labels.
        data: "digits", "mnist5k" or "cifar6k", or images with a setting.
        recipes: names among `RECIPES`; None for all.
        references: retrained models, in addition to the control.
    Raises:
        UnknownName: if there is no such data set, request or recipe.
        ArgumentError: if the number of a request cannot be read, there is no reference, or images have no setting.
        NotFound: if the files of a data set are missing.
    """
    kind, number = _parsed(request)
    names = list(RECIPES) if recipes is None else list(recipes)
    for name in names:
        if name not in RECIPES:
            raise UnknownName(f"no recipe is called {name!r}; {nearest(name, RECIPES)}")
    check_seed(seed=seed)
    if not is_whole(references):
        raise ArgumentError(f"references={references}; results are compared with retrained models, give at least 1")
    images, options = _data(data, kind, setting)
    sizes = {"train": options.train, "remember": options.remember, "seed": seed}
    splits = (
        vision.class_splits(images, int(number), **sizes)
        if kind == "class"
        else vision.mislabelled_splits(images, number, **sizes)
    )
    task = Task()
    say(f"{request}: training the original and {references + 1} models without the {len(splits.forget)} images")
    original = vision.train(options.build(images, seed=seed), task, splits.retain + splits.forget, epochs=options.epochs, lr=options.lr, seed=seed)  # fmt: skip
    begin = perf_counter()
    retrained = [_retrained(options, images, task, splits, 1000 * (seed + 1) + n) for n in range(references + 1)]
    retraining = (perf_counter() - begin) / (references + 1)
    models, seconds, refused = (
        {RETRAINED_AGAIN: retrained[-1]}, {RETRAINED_AGAIN: {"online": retraining, "offline": 0.0}}, {},
    )  # fmt: skip
    for name in names:
        say(f"{request}: {name}")
        try:
            delta = RECIPES[name](original, task, splits, options, seed)
        except RepeditError as error:
            refused[name] = f"{type(error).__name__}: {error}"
            continue
        models[name], seconds[name] = vision.apply(delta, original), delta.provenance["seconds"]
    say(f"{request}: auditing {len(models)} models")
    reports = audit_classifiers(models, original, task, splits, references=retrained[:-1], seed=seed)
    return ImageDemo(
        request, task, splits, original, tuple(retrained[:-1]), models, reports, seconds, retraining, refused
    )


def _retrained(options: Setting, images: Images, task: Task, splits: ImageSplits, seed: int) -> nn.Module:
    return vision.retrain(
        lambda: options.build(images, seed=seed), task, splits, epochs=options.epochs, lr=options.lr, seed=seed
    )


def _parsed(request: str) -> tuple[str, float]:
    kind, _, number = request.partition(":")
    if kind not in ("class", "mislabelled"):
        raise UnknownName(f"no request is called {kind!r}; give class:3 or mislabelled:0.1")
    try:
        return kind, float(int(number or 3) if kind == "class" else number or 0.1)
    except ValueError as error:
        raise ArgumentError(f"{request!r}: {number!r} is not a number; give class:3 or mislabelled:0.1") from error


def _data(data: str | Images, kind: str, setting: Setting | None) -> tuple[Images, Setting]:
    if isinstance(data, Images):
        if setting is None:
            raise ArgumentError("images were given without a setting; pass how models are trained on them")
        return data, setting
    if data not in SETTINGS:
        raise UnknownName(f"no data set is called {data!r}; {nearest(data, SETTINGS)}")
    if data == "cifar6k":
        first, second = vision.cifar6k()
        images = first + second
    else:
        images = vision.digits() if data == "digits" else vision.mnist5k()
    return images, setting or SETTINGS[data][kind]
