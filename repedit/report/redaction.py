"""A report, and the page of a run, without any text of an item, for readers who must not see them.

The rule names what stays; every other text is withheld, wherever it stands. What stays are numbers, verdicts, hashes, the
names of sites and tensors, the files a run wrote, and the words repedit itself has: names of attacks and of their
settings, of roles, measures, statuses, budgets, recipes, methods and fields, and the sentences of `SENTENCES`. An id
becomes a digest. Names of models, corpora and files of facts, notes, reasons in other words, commands, examples and
generations are withheld.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from repedit.auditing.attack import STATUSES, Finding
from repedit.auditing.report import WORDS, Gap, Recovery, Report, Verdict
from repedit.runs import RunReport, StepReport

REDACTED = "(withheld)"
FIELDS = """
    D1 D2 T V absent abs accuracy activity added agreement alpha answer attack attacks attn auc auto average axis batch batch_size
    bfloat16 bits budget center chance choices clear combine command config confidence corpus cosine cost counted cpu cuda cut data
    default details device diagnostics direct directions distance diverged domains dot draws drop dropout dtype edit edited effects
    embeddings entropy epoch epochs error eval exactness exact examples facts features files fingerprint float16 float32 float64 floor folds
    forget forget_token fraction full grad gradients hash hashes heads hidden history holdout how importance int3 int4 int8 interval
    items k keep kept kind kl known label layer layers layout leak length level limit line linear lira live log log_probability lora
    loss loss_lr losses low lr m_entropy machine map margins material max mean median members membership method metrics min min_k
    min_k++ mlp model models moments n n_entities n_test name nf4 fp4 nll none norm notes number numbers of options order original others
    out p pad parameters parents parts pass_threshold per_row perplexity perturb plan point points probe prompt pruned quantizer questions
    quantum random rank rate ratio ragged recovery_threshold reference relative relearn removed removes reparts repeat resid retain retrained right rms role
    roles rows samples scale score scores seconds seed seeds self sequence sets setting settings shadow sink sinks site sites size skipped slice slim
    source spread start std step steps steps_run stopped structure subspace survival temperature test token tokens top top1 top_p total touched
    tpr_at_1_fpr train trained type uds uniform unit units untouched update used value values verb versions verdict warmup weight
    weights welch width widths windows withheld worst worst_leak x y zlib divergence losses interpolated interpolation tensors
"""
"""Words for fields and options, none of which tells an item; a key that is no word here is shown as its digest."""
PHRASES = (
    "fresh facts", "all layers", "multiple choice", "yes/no", "odd one out", "question", "letters", "chat", "choices only", "majority answer",
    "majority letter", "longest choice", "shortest choice", "median number", "same_first_token", "no edit", "random control", "stream erasure",
    "composition", "long training", "distillation", "shadow models", "inversion of the classifier", "forget accuracy", "retain accuracy", "test accuracy",
    "AUC of the loss", "forget images", "forget accuracy, int8", "forget accuracy, int4", "subspace-exact", "hook-only", "probe-mlp", "retain text", "classifier",
    "relative update", "update that survives rounding", "line to the original", "facts shown examples of another domain", "B", "W",
)  # fmt: skip
HASHED = frozenset(
    {"facts", "retain", "fingerprint", "hash", "hashes", "model", "edited", "original", "reference", "sha256", "start"}
)
"""Fields under which a sha256 may stand; elsewhere an answer could look like one."""
NAMED = frozenset({
    "attacks", "budget", "combine", "device", "dtype", "exactness", "facts", "fit", "forget", "how", "importance", "kind", "layout", "loss", "method",
    "metrics", "model", "recipe", "retain", "site", "sites", "statistic", "structure", "text", "verb",
})  # fmt: skip
"""Fields whose values are names; in any other field a word of repedit could be an answer."""
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)(?: ?%)?"
_SITE = re.compile(r"(?:(?:\d+(?:-\d+)?|\*)\.)?(?:attn|mlp|resid)\.(?:neurons|out|pre|mid|post)(?: \d+)?")
_TENSOR = re.compile(r"(?:[A-Za-z_]+\.)+(?:\d+\.)?(?:[A-Za-z_]+\.)*(?:weight|bias)")
_HASH, _VERSION = re.compile(r"[0-9a-f]{16}(?:[0-9a-f]{48})?"), re.compile(r"\d+(?:\.\w{1,12}){1,4}(?:\+\w{1,12})?")
_PACKAGES = frozenset({"repedit", "torch", "transformers", "numpy", "safetensors", "scipy", "python"})
_MACHINES = frozenset({"x86_64", "AMD64", "aarch64", "arm64"})
_NUMBERED = frozenset({"layers", "accuracy", "line", "uds", "losses", "margins"})
"""Fields whose keys are numbers: layers, or points of a line."""
SENTENCES = r"""
    WORD: at this budget \(NAME\), a control failed here, so nothing can be concluded\.
    WORD: at this budget \(NAME\), nothing can be concluded from these facts\.
    WORD: at this budget \(NAME\), the model is damaged, not edited\.
    WORD: at this budget \(NAME\), the edited model still answers when simply asked \(R N\)\.
    WORD: at this budget \(NAME\), the facts are hidden, not gone: NAME brings them back \(R N\)\.
    WORD: at this budget \(NAME\), no recovery was found by direct questions and N other attacks\.
    WORD: at this budget \(NAME\), the question stays open\.
    (?:simultaneous )?lower N end of R of NAME N > (?:recovery threshold|material) N
    simultaneous lower N bound of R of NAME N > (?:recovery threshold|material) N
    so do NAMES
    largest simultaneous upper N bound of R, of NAME, N < (?:pass threshold|clear) N
    not counted: NAMES
    one seed: intervals exclude training noise
    the original may never have known it: lower N end of C - B N < N
    V has N facts, fewer than N
    about N facts in V(?:, where there are N)?
    NAME may bring back more: simultaneous N bounds of R N to N, neither above (?:recovery threshold|material) N nor below (?:pass threshold|clear) N
    no attack beside direct counts
    those attacks, run and trained
    attacks that leave the original its knowledge
    retain accuracy fell from N to N, more than 10 %
    retain perplexity rose from N to N, more than 1.5 times
    not asked for
    needs a larger budget than 'NAME'
    it breaks the original too: N above the floor after the attack, less than half of N before
    simply asked, the original is no better than the floor: N above it
    needs holdout text never trained on
    needs retain facts, to leave alone what they use
    needs retain facts or unrelated text; neither was given
    needs the original to compare with, or retain facts
    the facts have no (?:paraphrases|translations)
    N of N facts have no paraphrases
    no null space: no write weight has singular values that are almost zero
    no hooks, no wrappers
    every training diverged
    give lower rates
    give (?:other|higher) rates or more steps
    give more steps, candidates or tokens
    the (?:training loss|loss on T) fell by N(?: at best)?, N is needed
    the best accuracy on T after training is N, N is needed
    ran out of memory, in smaller batches too
    no pass is possible without this attack
    the model is not distilled into another one
    hundreds of steps, other optimisers and other data
    trains eight models more
    repedit\.(?:auditing|attacks)\.classifier\.shadows does it
    no attack here rebuilds images from the weights
    relearn=False
    the self-test was not run with this code on this machine: repedit audit --selftest
    taught facts: robustness may be overstated
    the choice that begins like the entity is right for N of the facts: no knowledge is needed
    retain: N facts of the facts' own retain side and the built-in prose
    N facts about forgotten entities are left out
    statistical evidence, not certified deletion: what these attacks do not find may still be there
    one retrained model
    the retrained model itself is told apart \(AUC N\), so .5 is not the aim here
    INCONCLUSIVE: there is no retrained model to compare with\.
    everything is judged relative to a model retrained without the forget images, and none was given
    a reference: rp\.vision\.retrain\(build, task, splits\)
    DESTROYED: the model is (?:worse than a retrained one, as the original is|damaged, not edited)\.
    NOT FORGOTTEN: N of the forget images still get their label\.
    HIDDEN: the images are hidden, not gone
    shown by NAMES\.
    NAME: N, retrained N, gap N(?: [<>] N|, at most N(?: either way)?|, among the retrained models|, is more than N off|, interval N to N, is neither near the reference nor clearly off)?
    NAME: (?:lower|upper) end of the gap N [<>] N
    original N
    OVER-FORGOTTEN: the forget images look stranger than images no model saw, which tells them too\.
    INVALID: the original is as close to the retrained model, so there was nothing to forget\.
    AUC N and forget accuracy N of the original pass as well
    forget images that the original knows better than unseen ones
    NO RECOVERY FOUND: by membership, relearning and rounding, beside a retrained model\.
    INCONCLUSIVE: the question stays open\.
    about N (?:images in the holdout, where there are N|forget images)
    relearning was not tried
    relearn=True
    neither attack tells even the original from the retrained models \(AUC N, relearn N against N\), so that nothing was found means nothing
    relearning that a retrained model does more slowly: fewer images, or steps
"""
"""What repedit says in words of its own, clause by clause; N is a number and NAME a word that stays."""


def redacted(report: Report) -> Report:
    """The same report without any text of an item: see the module for what stays.

    A digest is the first 16 digits of sha256 of the id: two reports without texts can still be told to be over the same
    facts. Who knows the ids can find them again.
    """
    if "withheld" in report.context:
        return report
    ids = {item for held in report.findings.values() for f in held for item in f.items}
    return replace(
        report,
        verdict=Verdict(_word(report.verdict.word), *map(_said, (report.verdict.sentence, report.verdict.rule, report.verdict.settle))),
        recoveries=tuple(map(_recovery, report.recoveries)),
        findings={_word(role): tuple(map(_finding, held)) for role, held in report.findings.items()},
        not_run={_word(name): _said(reason) for name, reason in report.not_run.items()},
        heuristics={_word(name): value for name, value in report.heuristics.items()},
        examples=(),
        diagnostics=redacted_values(report.diagnostics, ids=ids),
        context=_context(report, ids),
        gaps=tuple(map(_gap, report.gaps)),
    )  # fmt: skip


def redacted_run(run: RunReport) -> RunReport:
    """The same run without any text of an item: its file and its commands name verbs, options, outputs and numbers alone.

    Tables keep their numbers; lines, generations, reasons and the names of inputs are withheld.
    """
    outputs = {str(s.table[key]) for s in run.steps for key in ("out", "log", "resume") if s.table.get(key)}
    steps = tuple(_step(step, outputs) for step in run.steps)
    text = ["[[step]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in s.table.items()) for s in steps]
    return replace(
        run, text="\n".join(text), steps=steps, redact=redacted_values,
        checkpoints={name: replace(held, manifest=_manifest(held.manifest)) for name, held in run.checkpoints.items()},
        audits={name: redacted(report) for name, report in run.audits.items()},
        unreadable=dict.fromkeys(run.unreadable, REDACTED),
    )  # fmt: skip


def redacted_values(value: Any, field: str = "", *, ids: frozenset[str] | set[str] = frozenset()) -> Any:
    """JSON values without any text that is not repedit's own; a key that is not becomes its digest.

    Args:
        field: the key under which the value stands.
        ids: of items, which are digests also where they look like a word of a field.
    """
    if isinstance(value, Mapping):
        return {_key(str(key), field, ids): redacted_values(inner, str(key), ids=ids) for key, inner in value.items()}
    if isinstance(value, str):
        return value if value not in ids and _stays(value, field) else REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    return [redacted_values(inner, field, ids=ids) for inner in value] if isinstance(value, Sequence) else REDACTED


def digest(item: str) -> str:
    """What stands for the id of a fact, and for a name that is withheld and must be told from others."""
    return hashlib.sha256(item.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@cache
def own_words() -> frozenset[str]:
    """The words that stay."""
    from repedit.auditing.budgets import BUDGETS, NAMES
    from repedit.data import BUILTIN, DOMAINS
    from repedit.fit.closed_form import FITS
    from repedit.metrics.benchmarks import SUITES
    from repedit.neurons.scores import COMBINATIONS, IMPORTANCES
    from repedit.quantization import SCHEMES
    from repedit.unlearning.recipes import RECIPES

    tables = (BUDGETS, NAMES, SCHEMES, BUILTIN, DOMAINS, FITS, RECIPES, COMBINATIONS, IMPORTANCES, SUITES)
    return frozenset(
        {*FIELDS.split(), *PHRASES, *STATUSES, *WORDS, "smollm2-135m", *(name for table in tables for name in table)}
    )


@cache
def _clauses() -> re.Pattern[str]:
    name = f"(?:{'|'.join(sorted(map(re.escape, own_words()), key=len, reverse=True))})"
    words = f"(?:{'|'.join(map(re.escape, WORDS))})"
    lines = "|".join(line.strip() for line in SENTENCES.strip().splitlines())
    lines = re.sub(r"\bNAMES\b", lambda _: f"{name}(?:, {name})*", lines)
    lines = re.sub(r"\bNAME\b", lambda _: name, lines)
    lines = re.sub(r"\bWORD\b", lambda _: words, lines)
    return re.compile(re.sub(r"\bN\b", lambda _: _NUMBER, lines))


def _said(text: str) -> str:
    """A text of several clauses with those withheld that are not repedit's own words."""
    if _clauses().fullmatch(text):
        return text
    clauses = [part if _clauses().fullmatch(part) else _blocked(part) for part in text.split("; ")] if text else []
    return "; ".join(dict.fromkeys(clauses))


def _blocked(clause: str) -> str:
    """Which attack did not run, without the reason; or nothing of the clause."""
    name, joint, rest = clause.partition(" was not run (")
    for middle in (" failed to train (", " was skipped ("):
        name, joint, rest = (name, joint, rest) if joint else clause.partition(middle)
    return f"{name}{joint}{_said(rest.removesuffix(')'))})" if joint and name in own_words() else REDACTED


def _word(name: str) -> str:
    """A name that stays, or the digest of another."""
    return name if name in own_words() else digest(name)


def _setting(name: str) -> str:
    """The name of a setting: "lr=5e-05 step=40", "resid.post 7", "leak@4"; or the digest of another."""
    tokens = re.split(r"[ ,:=@]+", name)
    own = name in own_words() or _SITE.fullmatch(name)
    return name if own or all(t in own_words() or re.fullmatch(_NUMBER, t) for t in tokens) else digest(name)


def _key(key: str, field: str, ids: frozenset[str] | set[str]) -> str:
    own = (
        key in own_words()
        or _SITE.fullmatch(key)
        or (field in ("update", "relative update", "start") and _TENSOR.fullmatch(key))
    )
    own = own or (field == "versions" and re.fullmatch(r"[a-z_]{1,20}", key))
    own = own or (field in _NUMBERED and (re.fullmatch(_NUMBER, key) or _setting(key) == key))
    return key if own and key not in ids else digest(key)


def _stays(text: str, field: str) -> bool:
    """Whether the text of a field is one of repedit's own."""
    return bool(
        text == REDACTED
        or (field in NAMED and (text in own_words() or _SITE.fullmatch(text)))
        or (field in HASHED and _HASH.fullmatch(text))
        or (field in _PACKAGES and _VERSION.fullmatch(text))
        or (field == "machine" and text in _MACHINES)
    )


def _finding(found: Finding) -> Finding:
    return replace(
        found, attack=_word(found.attack), reason=_said(found.reason), items=tuple(map(digest, found.items)),
        settings=tuple(map(_setting, found.settings)), details=redacted_values(found.details, ids=set(found.items)),
    )  # fmt: skip


def _recovery(found: Recovery) -> Recovery:
    settings = {_word(role): tuple(map(_setting, names)) for role, names in found.settings.items()}
    return replace(
        found, attack=_word(found.attack), status=_word(found.status), reason=_said(found.reason), settings=settings,
        floor_name=_word(found.floor_name) if found.floor_name else "", level=_word(found.level) if found.level else "",
    )  # fmt: skip


def _gap(gap: Gap) -> Gap:
    counted = re.compile(rf"{_NUMBER} (?:other )?(?:forget|retain|test|holdout) images|")
    members, others = (text if counted.fullmatch(text) else REDACTED for text in (gap.members, gap.others))
    return replace(gap, measure=_word(gap.measure), members=members, others=others)


def _context(report: Report, ids: set[str]) -> dict[str, Any]:
    rest = {key: value for key, value in report.context.items() if key not in ("notes", "command")}
    notes = [_said(str(note)) for note in report.context.get("notes", ())]
    return {**redacted_values(rest, ids=ids), "notes": notes, "withheld": len(report.examples)}


_HEADINGS = frozenset({
    "after", "after (95 % interval)", "base", "bytes", "chance", "columns", "domain", "edited", "facts", "file", "forget", "hook against weights",
    "moved", "neuron", "next token right, before", "norm", "original", "part", "perplexity, before", "prompt", "rank", "relative",
    "relative drop (95 % interval)", "retain", "right, before", "rows", "score", "selectivity", "site", "tensor", "text", "tokens", "width",
})  # fmt: skip
"""Columns of the tables that verbs show."""
_CELL = re.compile(rf"(?:{_NUMBER}(?: \({_NUMBER} to {_NUMBER}\))?)?")


def _step(step: StepReport, outputs: set[str]) -> StepReport:
    table = {str(key): _option(value, str(key), outputs) for key, value in step.table.items()}
    faults = (f"Step {step.number}, {step.verb}: something is not as the run left it.",) if step.faults else ()
    if step.record is None:
        return replace(step, table=table, faults=faults)
    options = [(f"--{key.replace('_', '-')}", value) for key, value in table.items() if key != "verb"]
    record = replace(
        step.record, table=table, command=(step.verb, *(str(word) for pair in options for word in pair)),
        inputs={f"input {n}": digest_ for n, digest_ in enumerate(step.record.inputs.values(), 1)},
        display=tuple(map(_shown, step.record.display)),
    )  # fmt: skip
    return replace(step, table=table, faults=faults, record=record)


def _option(value: Any, field: str, outputs: set[str]) -> Any:
    if isinstance(value, list):
        return [_option(inner, field, outputs) for inner in value]
    return value if isinstance(value, str) and (value in outputs or field == "verb") else redacted_values(value, field)


def _shown(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a step showed: numbers of tables and of JSON under the names of their columns and fields."""
    kind = item["kind"]
    if kind == "line":
        return {"kind": kind, "text": REDACTED}
    if kind == "json":
        return {"kind": kind, "value": redacted_values(item["value"])}
    stay = [str(column) in _HEADINGS and kind == "table" for column in item["columns"]]
    heads = [
        column if column in _HEADINGS or column in ("", "original", "edited") else REDACTED
        for column in item["columns"]
    ]
    rows = [
        [cell if own and _CELL.fullmatch(str(cell)) else REDACTED for cell, own in zip(row, stay, strict=True)]
        for row in item["rows"]
    ]
    return {"kind": kind, "title": REDACTED, "columns": heads, "rows": rows}


def _manifest(held: Mapping[str, Any]) -> dict[str, Any]:
    base = {"base": {**held["base"], "name": REDACTED}} if "base" in held else {}
    return {**held, **base, "edit": redacted_values(held.get("edit") or {})}
