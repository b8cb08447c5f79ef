"""Reports and pages of runs without any text of an item, for readers who must not see these texts.

Texts are redacted unless a rule of this module keeps them. Kept are numbers, verdicts, hashes, the names of sites and
tensors, the files that a run wrote, and repedit's own words: names of attacks and their settings, of roles, measures,
statuses, budgets, recipes, methods and fields, and the sentences of `SENTENCES`. An id becomes a digest. Names of
models, corpora and files of facts, notes, reasons in other words, commands, examples and generations are redacted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from typing import Any

from repedit.arguments import checked
from repedit.auditing.attack import STATUSES, Finding, Setting
from repedit.auditing.report import Gap, Recovery, Report, Verdict
from repedit.outcomes import OUTCOMES
from repedit.runs import RunReport, StepReport

REDACTED = "(withheld)"
FIELDS = """
    D1 D2 T V absent abs accuracy activity added agreement alpha answer attack attacks attn attributes auc auto average axis batch batch_size
    bfloat16 bits budget center chance choices clear combine command config confidence corpus cosine cost counted cpu cuda cut data
    default details device diagnostics direct directions distance diverged domains dot draws drop dropout dtype edit edited effects
    embeddings entropy entities epoch epochs error eval everything exactness exact examples facts features files fingerprint float16 float32 float64 floor folds
    forget forget_token fraction full grad gradients hash hashes heads hidden history holdout how importance int3 int4 int8 interval
    items k keep kept kind kl known label layer layers layout leak length level limit line linear lion lira live log log_probability lora
    loss loss_lr losses low lr m_entropy machine map margins material max mean median members membership method metrics min min_k
    min_k++ mlp model models moments n n_entities n_test name nf4 fp4 nll none norm notes number numbers of optimizer options order original others
    out p pad parameters parents parts pass_threshold per_row perplexity perturb plan point points probe prompt pruned quantizer questions
    quantum random rank rate ratio ragged recovery_threshold reference relative relearn removed removes reparts repeat resid retain retrained right rms role
    roles rows samples scale score scores seconds seed seeds self sequence sets setting settings sgd shadow sink sinks site sites size skipped slice slim
    source spread start std step steps steps_run stopped structure subspace survival temperature test token tokens top top1 top_p total touched
    tpr_at_1_fpr train trained type uds uniform unit units until untouched update used value values verb versions verdict warmup weight
    weights welch width widths windows withheld worst worst_leak write x y zlib divergence losses interpolated interpolation tensors
"""
"""Names of fields and options, none of which tells an item; any other key becomes its digest."""
PHRASES = (
    "fresh facts", "all layers", "multiple choice", "named once", "named twice", "lower case", "upper case", "letters swapped", "letter doubled", "yes/no", "odd one out", "question", "letters", "chat", "choices only", "choices only, reverse_question", "common beginning", "majority answer",
    "majority letter", "longest choice", "shortest choice", "median number", "same_first_token", "no edit", "random control", "stream erasure",
    "composition", "long training", "distillation", "shadow models", "inversion of the classifier", "forget accuracy", "retain accuracy", "test accuracy",
    "AUC of the loss", "forget images", "forget accuracy, int8", "forget accuracy, int4", "subspace-exact", "hook-only", "probe-mlp", "retain text", "classifier",
    "relative update", "update that survives rounding", "line to the original", "facts shown examples of another domain", "B", "W",
)  # fmt: skip
HASH_FIELDS = frozenset(
    {"facts", "retain", "fingerprint", "hash", "hashes", "model", "edited", "original", "reference", "sha256", "start"}
)
"""Fields that may hold a sha256; in any other field an answer could look like one."""
NAME_FIELDS = frozenset({
    "attacks", "budget", "combine", "device", "dtype", "exactness", "facts", "fit", "forget", "how", "importance", "kind", "layout", "loss", "method",
    "metrics", "model", "recipe", "retain", "site", "sites", "statistic", "structure", "text", "verb",
})  # fmt: skip
"""Fields whose values are names; in any other field one of repedit's words could be an answer."""
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)(?: ?%)?"
_SITE = re.compile(r"(?:(?:\d+(?:-\d+)?|\*)\.)?(?:attn|mlp|resid)\.(?:neurons|out|pre|mid|post)(?: \d+)?")
_TENSOR = re.compile(r"(?:[A-Za-z_]+\.)+(?:\d+\.)?(?:[A-Za-z_]+\.)*(?:weight|bias)")
_HASH, _VERSION = re.compile(r"[0-9a-f]{16}(?:[0-9a-f]{48})?"), re.compile(r"\d+(?:\.\w{1,12}){1,4}(?:\+\w{1,12})?")
_PACKAGES = frozenset({"repedit", "torch", "transformers", "numpy", "safetensors", "scipy", "python"})
_MACHINES = frozenset({"x86_64", "AMD64", "aarch64", "arm64"})
_NUMBERED_FIELDS = frozenset({"layers", "accuracy", "line", "uds", "losses", "margins"})
"""Fields whose keys are numbers: layers, or points of a line."""
SENTENCES = r"""
    WORD: at this budget \(NAME\), a control failed here, so nothing can be concluded\.
    WORD: at this budget \(NAME\), nothing can be concluded from these facts\.
    WORD: at this budget \(NAME\), the model is damaged, not edited\.
    WORD: at this budget \(NAME\), the edited model still answers when simply asked \(R N\)\.
    WORD: at this budget \(NAME\), the facts are hidden, not gone: NAME brings them back \(R N\)\.
    WORD: at this budget \(NAME\), no recovery was found by direct questions and N other attacks\.
    WORD: at this budget \(NAME\), nothing was found by direct questions and N other attacks, and N are not run yet\.
    WORD: at this budget \(NAME\), nothing was found by direct questions and N other attacks, which are too few for a pass\.
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
    not needed, since no further attack changes the verdict WORD
    the audit was interrupted
    NAME was not run yet
    the attacks not run yet: NAMES
    an audit with a larger budget
    needs a larger budget than 'NAME'
    it breaks the original too: N above the floor after the attack, less than half of N before
    simply asked, the original is no better than the floor: N above it
    more than N steps, and optimizers other than AdamW, Lion and SGD
    needs holdout text never trained on
    needs retain facts, to leave alone what they use
    needs retain facts or unrelated text; neither was given
    needs the original to compare with, or retain facts
    no other facts about the entities of V are known
    other facts are known of N entities of V alone, N are needed
    give attributes=(?:, facts of other domains about them)?
    no prompt of T names its entity, so there is no reverse question
    N of N facts of T have no reverse question
    N other facts about forgotten entities state a forgotten fact and are left out
    N of N prompts do not name their entity
    N of N facts have no reverse question
    no spelling changes an entity
    'NAME' was left out, since it changes no entity
    'NAME' leaves N of N entities as they are
    the facts have no (?:paraphrases|translations)
    N of N facts have no paraphrases
    of N layers none is NAME of the edited ones
    the edited layers are not known: layers N to N are trained
    no language is common to all facts
    no null space: no write weight has singular values that are almost zero
    no hooks, no wrappers
    every training diverged
    give lower rates
    give (?:other|higher) rates or more steps
    give more steps, candidates or tokens
    the (?:training loss|loss on T) fell by N(?: at best)?, N is needed
    the best accuracy on T after training is N, N is needed
    repedit\.attacks\.classifier\.shadows does it
    relearn=False
    the self-test was not run with this code on this machine: repedit audit --selftest
    taught facts: robustness may be overstated
    the choice that begins like the entity is right for N of the facts: no knowledge is needed
    retain: N facts of the facts' own retain side and the built-in prose
    N facts about forgotten entities are left out
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
"""Repedit's own sentences, clause by clause; N is a number and NAME a name that is kept. Those without either are in
`_fixed_clauses`, but for the ones that code composes and those of earlier versions.
"""


@checked
def redacted(report: Report) -> Report:
    """The report without any text of an item: the docstring of the module says what is kept.

    A digest is the first 16 digits of the sha256 of an id: redacted reports can still be recognised as being over the
    same facts, and whoever knows the ids can find them again.
    """
    if "withheld" in report.context:
        return report
    ids = {item for findings in report.findings.values() for f in findings for item in f.items}
    verdict = report.verdict
    return replace(
        report,
        verdict=Verdict(_name(verdict.word), *map(_sentences, (verdict.sentence, verdict.rule, verdict.settle))),
        recoveries=tuple(map(_recovery, report.recoveries)),
        findings={_name(role): tuple(map(_finding, findings)) for role, findings in report.findings.items()},
        not_run={_name(attack): _sentences(reason) for attack, reason in report.not_run.items()},
        heuristics={_name(guess): value for guess, value in report.heuristics.items()}, examples=(),
        diagnostics=redacted_values(report.diagnostics, ids=ids), context=_context(report, ids),
        gaps=tuple(map(_gap, report.gaps)),
    )  # fmt: skip


def redacted_run(run: RunReport) -> RunReport:
    """The run without any text of an item: its file and commands show verbs, option names, outputs and numbers alone.

    Tables keep their numbers; lines, generations, reasons and the names of inputs are redacted.
    """
    outputs = {str(s.table[key]) for s in run.steps for key in ("out", "log", "resume") if s.table.get(key)}
    steps = tuple(_step(step, outputs) for step in run.steps)
    text = ["[[step]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in s.table.items()) for s in steps]
    return replace(
        run, text="\n".join(text), steps=steps, redact=redacted_values,
        checkpoints={out: replace(export, manifest=_manifest(export.manifest)) for out, export in run.checkpoints.items()},
        audits={out: redacted(report) for out, report in run.audits.items()},
        unreadable=dict.fromkeys(run.unreadable, REDACTED),
    )  # fmt: skip


def redacted_values(value: object, field: str = "", *, ids: Set[str] = frozenset()) -> Any:
    """JSON values of which only repedit's own texts are kept; any other key becomes its digest.

    Args:
        field: the key of the value.
        ids: ids of items, which become digests even if they look like the name of a field.
    """
    if isinstance(value, Mapping):
        return {_key(str(key), field, ids): redacted_values(inner, str(key), ids=ids) for key, inner in value.items()}
    if isinstance(value, str):
        return value if value not in ids and _is_kept(value, field) else REDACTED
    if value is None or isinstance(value, bool | int | float):
        return value
    return [redacted_values(inner, field, ids=ids) for inner in value] if isinstance(value, Sequence) else REDACTED


def digest(name: str) -> str:
    """What replaces the id of a fact, or another name that must stay distinguishable."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@cache
def own_words() -> frozenset[str]:
    """The names that are kept."""
    from repedit.auditing.attack import BUDGETS, records
    from repedit.data import BUILTIN, DOMAINS
    from repedit.fit.closed_form import FITS
    from repedit.metrics.benchmarks import SUITES
    from repedit.neurons.scores import COMBINATIONS, IMPORTANCES
    from repedit.quantization import SCHEMES
    from repedit.unlearning.recipes import RECIPES

    tables = (BUDGETS, records(), SCHEMES, BUILTIN, DOMAINS, FITS, RECIPES, COMBINATIONS, IMPORTANCES, SUITES)
    return frozenset(
        {*FIELDS.split(), *PHRASES, *STATUSES, *OUTCOMES, "smollm2-135m", *(name for table in tables for name in table)}
    )


# --- Names and sentences


def _name(name: str) -> str:
    """A name that is kept, or the digest of another; empty for no name."""
    return name if not name or name in own_words() else digest(name)


def _setting(name: str) -> str:
    """The name of a setting, such as "lr=5e-05 step=40", "resid.post 7" or "leak@4"; or the digest of another."""
    own = name in own_words() or _SITE.fullmatch(name)
    words = Setting.parse(name).words
    return name if own or all(word in own_words() or re.fullmatch(_NUMBER, word) for word in words) else digest(name)


def _key(key: str, field: str, ids: Set[str]) -> str:
    """A key inside a field, or its digest."""
    own = (
        key in own_words()
        or _SITE.fullmatch(key)
        or (field in ("update", "relative update", "start") and _TENSOR.fullmatch(key))
        or (field == "versions" and re.fullmatch(r"[a-z_]{1,20}", key))
        or (field in _NUMBERED_FIELDS and (re.fullmatch(_NUMBER, key) or _setting(key) == key))
    )
    return key if own and key not in ids else digest(key)


def _is_kept(text: str, field: str) -> bool:
    """Whether the text of a field is one of repedit's own."""
    return bool(
        text == REDACTED
        or (field in NAME_FIELDS and (text in own_words() or _SITE.fullmatch(text)))
        or (field in HASH_FIELDS and _HASH.fullmatch(text))
        or (field in _PACKAGES and _VERSION.fullmatch(text))
        or (field == "machine" and text in _MACHINES)
    )


def _sentences(text: str) -> str:
    """A text of several clauses, in which only repedit's own are kept."""
    if not text or _own_clause().fullmatch(text):
        return text
    clauses = (part if _own_clause().fullmatch(part) else _attack_without_reason(part) for part in text.split("; "))
    return "; ".join(dict.fromkeys(clauses))


def _attack_without_reason(clause: str) -> str:
    """Which attack did not run, with its reason only if that is kept; `REDACTED` for any other clause."""
    for verb in (" was not run (", " failed to train (", " was skipped ("):
        name, separator, rest = clause.partition(verb)
        if separator:
            reason = _sentences(rest.removesuffix(")"))
            return f"{name}{separator}{reason})" if name in own_words() else REDACTED
    return REDACTED


@cache
def _own_clause() -> re.Pattern[str]:
    """Matches each of `SENTENCES`, and each fixed clause."""
    name = f"(?:{'|'.join(sorted(map(re.escape, own_words()), key=len, reverse=True))})"
    verdict = f"(?:{'|'.join(map(re.escape, OUTCOMES))})"
    replacements = {"NAMES": f"{name}(?:, {name})*", "NAME": name, "WORD": verdict, "N": _NUMBER}
    sentences = "|".join(line.strip() for line in SENTENCES.strip().splitlines())
    composed = re.sub(r"\b(NAMES?|WORD|N)\b", lambda match: replacements[match[1]], sentences)
    return re.compile("|".join([composed, *map(re.escape, _fixed_clauses())]))


def _fixed_clauses() -> list[str]:
    """The clauses of the sentences that every audit says in the same words."""
    from repedit.auditing import classifier, conclusion
    from repedit.auditing.runner import MEMORY
    from repedit.auditing.verdict import ONE

    notes = (MEMORY, ONE, f"two more retrained models: {ONE}", classifier.EVIDENCE)
    reasons = (*notes, *conclusion.untried().values(), *classifier.UNTRIED.values())
    return [clause for reason in reasons for clause in reason.split("; ")]


# --- Parts of a report


def _finding(finding: Finding) -> Finding:
    return replace(
        finding, attack=_name(finding.attack), reason=_sentences(finding.reason), items=tuple(map(digest, finding.items)),
        settings=tuple(map(_setting, finding.settings)), details=redacted_values(finding.details, ids=set(finding.items)),
    )  # fmt: skip


def _recovery(recovery: Recovery) -> Recovery:
    settings = {_name(role): tuple(map(_setting, names)) for role, names in recovery.settings.items()}
    return replace(
        recovery, attack=_name(recovery.attack), status=_name(recovery.status), reason=_sentences(recovery.reason),
        settings=settings, floor_name=_name(recovery.floor_name), level=_name(recovery.level),
    )  # fmt: skip


def _gap(gap: Gap) -> Gap:
    counts = re.compile(rf"{_NUMBER} (?:other )?(?:forget|retain|test|holdout) images|")
    members, others = (text if counts.fullmatch(text) else REDACTED for text in (gap.members, gap.others))
    return replace(gap, measure=_name(gap.measure), members=members, others=others)


def _context(report: Report, ids: Set[str]) -> dict[str, Any]:
    values = {key: value for key, value in report.context.items() if key not in ("notes", "command")}
    notes = [_sentences(str(note)) for note in report.context.get("notes", ())]
    return {**redacted_values(values, ids=ids), "notes": notes, "withheld": len(report.examples)}


# --- Parts of a run


_HEADINGS = frozenset({
    "after", "after (95 % interval)", "base", "bytes", "chance", "columns", "domain", "edited", "facts", "file", "forget", "hook against weights",
    "moved", "neuron", "next token right, before", "norm", "original", "part", "perplexity, before", "prompt", "rank", "relative",
    "relative drop (95 % interval)", "retain", "right, before", "rows", "score", "selectivity", "site", "tensor", "text", "tokens", "width",
})  # fmt: skip
"""Columns of the tables that verbs show."""
_CELL = re.compile(rf"(?:{_NUMBER}(?: \({_NUMBER} to {_NUMBER}\))?)?")


def _step(step: StepReport, outputs: Set[str]) -> StepReport:
    table = {str(key): _option(value, str(key), outputs) for key, value in step.table.items()}
    faults = (f"Step {step.number}, {step.verb}: something is not as the run left it.",) if step.faults else ()
    if step.record is None:
        return replace(step, table=table, faults=faults)
    options = [(f"--{key.replace('_', '-')}", value) for key, value in table.items() if key != "verb"]
    record = replace(
        step.record, table=table, command=(step.verb, *(str(word) for pair in options for word in pair)),
        inputs={f"input {n}": sha256 for n, sha256 in enumerate(step.record.inputs.values(), 1)},
        display=tuple(map(_display_item, step.record.display)),
    )  # fmt: skip
    return replace(step, table=table, faults=faults, record=record)


def _option(value: object, field: str, outputs: Set[str]) -> Any:
    if isinstance(value, list):
        return [_option(inner, field, outputs) for inner in value]
    return value if isinstance(value, str) and (value in outputs or field == "verb") else redacted_values(value, field)


def _display_item(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a step showed: only the numbers of tables and of JSON, under the names of their columns and fields."""
    kind = item["kind"]
    if kind == "line":
        return {"kind": kind, "text": REDACTED}
    if kind == "json":
        return {"kind": kind, "value": redacted_values(item["value"])}
    numeric = [str(column) in _HEADINGS and kind == "table" for column in item["columns"]]
    heads = [column if column in _HEADINGS or column == "" else REDACTED for column in item["columns"]]
    rows = [
        [
            cell if shows_numbers and _CELL.fullmatch(str(cell)) else REDACTED
            for cell, shows_numbers in zip(row, numeric, strict=True)
        ]
        for row in item["rows"]
    ]
    return {"kind": kind, "title": REDACTED, "columns": heads, "rows": rows}


def _manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    base = {"base": {**manifest["base"], "name": REDACTED}} if "base" in manifest else {}
    return {**manifest, **base, "edit": redacted_values(manifest.get("edit") or {})}
