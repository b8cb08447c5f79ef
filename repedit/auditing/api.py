"""rp.audit: run every attack of a budget on an edited model, and report what was shown.

The audit sees weights, not methods: it knows nothing of how a model was edited, and it changes no model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from repedit.arguments import checked
from repedit.auditing.attack import INVENTED_FACTS, RETAIN_FACTS, SEEDS, Attack, Setup, ask, built, planned, records
from repedit.auditing.attacks.finetune import rtt
from repedit.auditing.conclusion import CompletedAudit, judged, report_of
from repedit.auditing.data import AuditData, DataOptions, audit_data
from repedit.auditing.diagnostics import with_examples_and_diagnostics
from repedit.auditing.floors import choices_only_baseline, fresh_facts, renamed_facts, retain_check
from repedit.auditing.report import ENDED_EARLY, INTERRUPTED, AuditInterrupted, Report
from repedit.auditing.runner import Audited, Findings, Role, check_pair, run
from repedit.auditing.statistics import check_draws
from repedit.auditing.store import FindingStore
from repedit.auditing.verdict import certain, check_thresholds
from repedit.data import Fact, Facts, Splits, TextSource, prose
from repedit.errors import (
    ArgumentError,
    BadReference,
    DataError,
    RepeditError,
    check_choice,
    check_positive,
    check_seed,
    check_whole,
    is_whole,
)
from repedit.io.files import user_path
from repedit.io.targets import check_folder
from repedit.models.subject import Subject
from repedit.sites import Site

UNTIL = ("verdict", "all")
"""What an audit goes on to: until no further attack can change the verdict, or until all attacks are made."""


@checked
def audit(
    edited: Subject | str | Path,
    *,
    original: Subject | str | Path,
    facts: Facts | Sequence[Fact],
    retain: Facts | TextSource | None = None,
    reference: Subject | str | Path | None = None,
    unrelated: TextSource | None = None,
    holdout: TextSource | None = None,
    attributes: Facts | Iterable[object] | None = None,
    attacks: Sequence[str] | None = None,
    budget: str = "fast",
    until: str = "all",
    sites: str | Site | list[str | Site] | None = None,
    folds: int = 2,
    train_fraction: float = 0.5,
    seeds: Sequence[int] | None = None,
    draws: int = 2000,
    alpha: float = 0.05,
    recovery_threshold: float = 0.10,
    pass_threshold: float = 0.20,
    allow_small: bool = False,
    scale_lrs: float = 1.0,
    steps: int = 40,
    device: str | torch.device = "auto",
    out: str | Path | None = None,
    save: bool = True,
    progress: bool | None = None,
    command: str = "",
) -> Report:
    """Attack an edited model as somebody who downloaded it would, and say how much comes back.

    Every attack is made on the edited model, on the original (the ceiling) and on a reference that never knew the facts
    (the floor), and R = (A - B) / (C - B) of their accuracies is what was recovered. Without a reference the floor is
    the larger of the best guess that needs no knowledge and the same attack on the edited model with invented facts; for
    an attack that trains on other facts about the entities, the same training with invented names for them.

    Args:
        edited, original, reference: directories, hub ids or Subjects; nothing of them is changed. A live Subject is
            attacked with its hooks in place.
        facts: what should be gone; Facts (those to forget), or facts.
        retain: what should be kept: facts or text. None for the facts' own retain side and the built-in prose.
        unrelated: text that has to do with neither, for harmless fine-tuning; None for the built-in prose.
        holdout: text or facts that no model saw, for membership inference.
        attributes: facts of other domains about the entities to forget, for relinking; None for those of the facts' own
            retain side and of the built-in domains.
        attacks: names, in place of the budget's.
        budget: "quick" (eight attacks, no pass), "fast", "standard" or "full".
        until: "verdict" ends the audit when no further attack can change the verdict; "all" makes every attack.
        sites: where the edit is; None for what the checkpoint's repedit.json says, else the middle of the model.
        folds: 2 tests every fact once; 1 trains on `train_fraction` of the entities and tests the others.
        seeds: of the attacks that draw; None for one at "fast" and three above.
        recovery_threshold, pass_threshold: more than the first is recovery, less than the second is none.
        allow_small: let fewer than 100 facts count.
        scale_lrs: multiplies every learning rate; tiny models need 15 or so.
        steps: of retraining on T; more where a report says that it failed to train.
        out: a folder for the findings, as they are made; an interrupted audit goes on from there.
        save: write audit.json into that folder as well.
        command: what repeats the audit, shown in the report; the command line gives its own.
    Raises:
        FingerprintError: if the models differ in kind, vocabulary or tokenizer.
        NoOpEdit: if edited and original are equal.
        BadReference: if the reference is the original, or knows the facts.
        DataError, OverlapError, NotEnoughRows: if the facts cannot be asked or halved.
        UnknownName, ArgumentError, FractionError: if an argument is out of range.
        AuditInterrupted: on Ctrl-C, with the report of the attacks made so far, which is in `out` as well.
        TargetExists, CheckpointError: if `out` holds something else, or cannot be written.
    """
    start = time.perf_counter()
    read = tuple(source for source in (edited, original, reference) if isinstance(source, str | Path))
    check_folder(out, "findings", "audit.json", read=read)
    check_thresholds(recovery_threshold, pass_threshold, alpha)
    names = planned(budget, attacks)
    chosen = _seeds(budget, seeds)
    check_draws(draws, alpha)
    _check_options(steps, draws, scale_lrs, chosen, until)
    sources: dict[str, Subject | str | Path | None] = {"edited": edited, "original": original, "reference": reference}
    models = {role: Audited(role, source, str(device)) for role, source in sources.items() if source is not None}
    _check_models(models)
    options: DataOptions = {
        "unrelated": prose() if unrelated is None else unrelated, "holdout": holdout, "folds": folds,
        "train_fraction": train_fraction, "seed": chosen[0],
    }  # fmt: skip
    data = audit_data(facts, retain, most=RETAIN_FACTS[budget], attributes=attributes, **options)
    edited_layers = _edited_layers(models["edited"], sites)
    with _setup(budget, models, edited_layers, scale_lrs, steps, names) as setup:
        roles = _roles(models, data, built(names, setup), budget, options)
        begun = CompletedAudit(
            roles=roles, findings={}, data=data, budget=budget, seeds=chosen, draws=draws, alpha=alpha,
            recovery_threshold=recovery_threshold, pass_threshold=pass_threshold, allow_small=allow_small,
            edited_layers=edited_layers, planned=names, command=command, until=until,
        )  # fmt: skip
        completed = _carried_out(begun, None if out is None else user_path(out), save, progress, start)
    return _reported(completed, models, () if setup.small else data.tested, out if save else None)


def _carried_out(
    begun: CompletedAudit, out: Path | None, save: bool, progress: bool | None, start: float
) -> CompletedAudit:
    """The audit with its findings, which are stored in `out`.

    Raises:
        AuditInterrupted: on Ctrl-C; the report of the attacks made so far is written as well if it is to be saved.
    """
    shown = sys.stderr.isatty() if progress is None else progress
    so_far = begun

    def judge(findings: Findings, pending: tuple[str, ...]) -> tuple[str, bool]:
        nonlocal so_far
        so_far = replace(begun, findings=findings, pending=pending, seconds=time.perf_counter() - start)
        if begun.until == "all" and not shown:
            return "", False
        word = judged(so_far).verdict.word
        if begun.until == "all" or not certain(word, so_far.undecided):
            return word, False
        so_far = replace(so_far, state=ENDED_EARLY)
        return word, True

    try:
        findings = run(begun.roles, begun.seeds, FindingStore(out), progress=shown, judge=judge)
    except KeyboardInterrupt as error:
        report = report_of(replace(so_far, state=INTERRUPTED)) if so_far.findings else None
        if report is not None and out is not None and save:
            report.save(out)
        raise AuditInterrupted(report) from error
    if so_far.state == ENDED_EARLY:
        return so_far
    return replace(begun, findings=findings, seconds=time.perf_counter() - start)


def _reported(
    completed: CompletedAudit, models: Mapping[str, Audited], diagnosed: Sequence[Fact], out: str | Path | None
) -> Report:
    """The report with its examples and diagnostics, which is written to `out`; after Ctrl-C as an interrupted one."""
    report = report_of(completed)
    try:
        report = with_examples_and_diagnostics(report, models, diagnosed)
    except KeyboardInterrupt as error:
        report = replace(report, state=INTERRUPTED)
        raise AuditInterrupted(report) from error
    finally:
        if out is not None:
            report.save(out)
    return report


def _seeds(budget: str, seeds: Sequence[int] | None) -> tuple[int, ...]:
    """The seeds that are given, or those of the budget."""
    if not isinstance(seeds, Sequence | None):
        raise ArgumentError(f"seeds={seeds!r}; give a list of whole numbers, such as [0, 1, 2]")
    return tuple(SEEDS[budget] if seeds is None else seeds)


def _check_options(steps: int, draws: int, scale_lrs: float, chosen: Sequence[int], until: str) -> None:
    check_choice(UNTIL, until=until)
    check_whole(draws=draws)
    check_positive(scale_lrs=scale_lrs)
    if not is_whole(steps, 8):
        raise ArgumentError(f"steps={steps}; give at least 8 for an attack that trains")
    if not chosen:
        raise ArgumentError("seeds is empty; give at least one, or None")
    for seed in chosen:
        check_seed(seeds=seed)
    if len(set(chosen)) < len(chosen):
        raise ArgumentError(f"seeds={chosen}; one that is given twice would count twice")


def _check_models(models: Mapping[str, Audited]) -> None:
    for role in ("edited", "reference"):
        if role in models:
            check_pair(models[role], models["original"])
    if "reference" in models and models["reference"].fingerprint == models["edited"].fingerprint:
        raise BadReference("the reference is the edited model itself; give a model that was trained without the facts")


def _edited_layers(edited: Audited, sites: str | Site | list[str | Site] | None) -> tuple[int, ...] | None:
    if sites is None:
        return edited.edited_layers()
    with edited.opened() as subject:
        return tuple(sorted({site.layer for site in subject.select(sites)}))


@contextmanager
def _setup(
    budget: str,
    models: Mapping[str, Audited],
    edited_layers: tuple[int, ...] | None,
    scale: float,
    steps: int,
    names: Sequence[str],
) -> Iterator[Setup]:
    """What attacks are built with; the original stays open while an attack needs it beside the model attacked.

    States of models of another width are not compared: `direction` then takes the retain facts as its contrast.
    """
    with ExitStack() as stack:
        alike = len({model.width for model in models.values()}) == 1
        compares = any(records()[name].compares for name in names)
        original = stack.enter_context(models["original"].opened()) if compares and alike else None
        yield Setup(budget, models["edited"].layers, edited_layers, scale, steps, original)


def _roles(
    models: Mapping[str, Audited], data: AuditData, attacks: tuple[Attack, ...], budget: str, options: DataOptions
) -> tuple[Role, ...]:
    """Edited, original, and the reference; without one the edited model is asked invented facts as well."""
    retain = (retain_check(data.text), Splits((), data.retain))
    asked = (None, *(attack.record for attack in attacks if attack.record.questions is not None))
    choices_only = tuple((choices_only_baseline(record), data.whole) for record in asked)
    original = Role("original", models["original"], data, attacks, (retain, *choices_only), shared=True)
    if "reference" in models:
        edited = Role("edited", models["edited"], data, attacks, (retain,))
        return edited, original, Role("reference", models["reference"], data, attacks, shared=True)
    invented, renamed = _invented(data, budget, options), _renamed(data, attacks, options)
    edited = Role("edited", models["edited"], data, attacks, (retain,), invented=invented, renamed=renamed)
    return edited, original


def _invented(data: AuditData, budget: str, options: DataOptions) -> AuditData | None:
    try:
        fresh = fresh_facts(data.forget, min(len(data.forget), INVENTED_FACTS[budget]), options["seed"])
        return audit_data(fresh, data.retain or data.text, most=None, **options)
    except DataError as error:
        data.notes.append(f"no invented facts could be made ({error}); the floor is the best guess without knowledge")
        return None


def _renamed(data: AuditData, attacks: Sequence[Attack], options: DataOptions) -> AuditData | None:
    """The facts and attributes under invented names, if an attack trains on attributes and there are some."""
    attributes = data.whole.attributes
    if not attributes or not any(attack.record.attributes for attack in attacks):
        return None
    try:
        facts, renamed = renamed_facts(data.forget, attributes, options["seed"])
        return audit_data(facts, data.retain or data.text, most=None, attributes=renamed, **options)
    except RepeditError as error:
        data.notes.append(
            f"facts and attributes could not be told of invented names ({error}); what the attributes alone give away is "
            "not subtracted from what relinking brings back"
        )
        return None


# --- What an audit will cost, before it is begun: questions and training steps, timed on a few of each


SAMPLE, STEPS = 24, 3


def estimate(
    edited: Subject | str | Path,
    facts: Facts | Sequence[Fact],
    *,
    budget: str = "fast",
    attacks: Sequence[str] | None = None,
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Seconds of every attack of a budget over all models and seeds, from 24 questions and 3 training steps.

    Raises:
        UnknownName: if there is no such budget or attack. DataError, NotEnoughRows, OverlapError: as the audit would,
            if it cannot divide these facts into halves.
    """
    names = planned(budget, attacks)
    halved: DataOptions = {"unrelated": None, "holdout": None, "folds": 2, "train_fraction": 0.5, "seed": 0}
    items = audit_data(facts, None, most=RETAIN_FACTS[budget], **halved).forget
    model = Audited("edited", edited, str(device))
    attacks_built = built(names, Setup(budget, model.layers))
    # Edited and original are asked, and the edited model again with invented facts; training on attributes is repeated.
    invented = min(1.0, INVENTED_FACTS[budget] / len(items))
    costs = {}
    with model.opened() as subject:
        question, step = _calibrated(subject, items[:SAMPLE])
        for attack in attacks_built:
            folds, runs = _folds(attack), len(SEEDS[budget]) if attack.record.draws else 1
            questions = attack.work.questions * len(items) * (0.5 if attack.folds == 1 else 1.0)
            steps = folds * attack.work.steps
            asked, trained = (3.0, 3.0) if attack.record.attributes else (2 + invented, 2.0)
            if attack.applies is not None:
                # The original is taken to give it nothing to work on.
                asked, trained = (1 + invented, 1.0) if attack.applies(subject) else (0.0, 0.0)
            seconds = runs * (asked * questions * question + trained * steps * step)
            costs[attack.name] = {"questions": round(questions), "steps": steps, "seconds": seconds}
    return {
        "facts": len(items), "seconds_a_question": question, "seconds_a_step": step, "attacks": costs,
        "minutes": sum(cost["seconds"] for cost in costs.values()) / 60,
    }  # fmt: skip


def _folds(attack: Attack) -> int:
    """Trainings in which every fact is tested once, or fewer where the attack is made on some folds."""
    return 1 if not attack.record.uses_train else attack.folds or (5 if attack.record.four_fifths else 2)


def _calibrated(subject: Subject, items: tuple[Fact, ...]) -> tuple[float, float]:
    """(seconds a question, seconds a training step)."""
    ask(subject, items[:2])
    start = time.perf_counter()
    ask(subject, items)
    question = (time.perf_counter() - start) / len(items)
    finding = rtt(rates=(1e-9,), steps=STEPS, measured=(STEPS,))(subject, Splits(items, items[:1]))
    return question, max(0.0, finding.seconds - (len(items) + 2) * question) / STEPS
