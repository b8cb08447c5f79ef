"""The nine systems of docs/papers.md: each function reads result files and decides the claims of one paper by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from bench.mrp import TASKS
from bench.papers import Claim, Results, Row, spread, summary
from bench.sure import retained

CHANCE = 0.125
"""Of eight choices."""
Values = Mapping[str, Any]


# --- Selective pruning


def pruning(results: Results) -> Row:
    """Specificity of neurons to code and prose."""
    by_name = {row["name"]: row for row in results.rows("pruning")}
    (learned,) = results.rows("pruning_learned")
    (audit,) = results.rows("audit-pruned")
    ratio, chance = by_name["abs ratio, MLP, 5 %"], by_name["random like abs ratio 5 %"]
    default = by_name["abs difference, sinks guarded, MLP, 1 %"]
    attention = by_name["abs ratio, attention, 5 %"]
    scores = [row for row in by_name.values() if "code" in row and row["prose"]["mean"] <= 10]
    best = max(scores, key=lambda row: row["selectivity"]["mean"])
    gap = ratio["selectivity"]["mean"] - chance["selectivity"]["mean"]
    mlp = by_name["MLP minus attention, abs ratio 5 %"]["selectivity"]
    return Row(
        "Selective pruning", "2403.01267",
        (
            Claim("pruning neurons chosen by importance removes one capability more than another",
                  f"selectivity (drop on code minus drop on prose, points) {summary(ratio['selectivity'])}, as many random "
                  f"neurons in each layer {summary(chance['selectivity'])}; met if the difference, {gap:.1f}, is above 30",
                  gap > 30),
            Claim("feed-forward neurons separate better than attention neurons",
                  f"5 % of each: {summary(ratio['selectivity'])} and {summary(attention['selectivity'])}; met if the difference, "
                  f"{summary(mlp)}, is above 20", mlp["mean"] > 20),
            Claim("a maximum selectivity of 59.6 (OPT-1.3B, from a secondary source)",
                  f"best score with at most 10 % of prose lost: {summary(best['selectivity'])} ({best['name']}); a learned mask, which "
                  f"is not the paper's method, {summary(learned['selectivity'])}; met if the best score reaches 59.6",
                  best["selectivity"]["mean"] >= 59.6),
        ),
        "SmolLM2-135M-Instruct; forget CPython's standard library, retain WikiText-2; statistics of 8,128 tokens a set, drops on 4,064 "
        "tokens of other documents, three seeds of the excerpts.",
        f"code {summary(default['code'])} % and prose {summary(default['prose'])} % lost at 1 % of the MLP neurons",
        attacked(audit, "direct"),
        (
            "The standard deviation is taken as the variance, and the root mean square inherits the error.",
            "Pruning is only a mask in the forward pass, and `save_pretrained` writes the unpruned model.",
            "A mask of the wrong shape is replaced by ones; exceptions during collection drop samples silently.",
            "The random control prunes the same number in every layer, which is not what the method prunes.",
            "Models with grouped query heads cannot be pruned.",
        ),
        "![Drop of both sets along a pruning trajectory](../figures/trajectory.png)",
    )  # fmt: skip


# --- MRP


def mrp(results: Results) -> Row:
    """Projections: what is forgotten and kept, over tasks, and what relearning brings back."""
    seeds = (0, 1, 2)
    one = results.rows(*(f"mrp-one-{seed}" for seed in seeds))
    original = next(row for row in one if row["name"] == "original")
    made = [row for row in one if row["name"] == "MRP"]
    domains = [name for name in original["retain"] if name != "perplexity"]
    kept = [min(row["retain"][d] / original["retain"][d] for d in domains) for row in made]
    forgotten = [row["forget"]["phrasing 0"] for row in made]
    last = [next(r for r in results.rows(f"mrp-tasks-{seed}") if r["name"] == f"after {TASKS[-1]}") for seed in seeds]
    worst = [max(part["phrasing 0"] for part in row["forgotten"].values()) for row in last]
    relearned, ceiling = (_relearned(results, seeds, name) for name in ("MRP, folded", "original"))
    back = [(a - CHANCE) / (b - CHANCE) for a, b in zip(relearned, ceiling, strict=True)]
    (audit,) = results.rows("audit-projected")
    return Row(
        "MRP", "2508.15449",
        (
            Claim("unlearning is effective and other abilities are preserved",
                  f"capitals {original['forget']['phrasing 0']:.2f} to {spread(forgotten)} in the trained wording, the worst of "
                  f"{len(domains)} other domains keeps {spread(kept)}; met if at most {CHANCE + 0.1:.3f} and at least 0.90",
                  mean(forgotten) <= CHANCE + 0.1 and mean(kept) >= 0.9),
            Claim("unlearning is continual: earlier tasks stay unlearned",
                  f"after four tasks the largest accuracy on any of them is {spread(worst)} in the trained wording; met if at most "
                  f"{CHANCE + 0.15:.3f}", mean(worst) <= CHANCE + 0.15),
            Claim("projections defend against relearning",
                  f"40 steps on half of the capitals bring the other half to {spread(relearned)} (original after the same training "
                  f"{spread(ceiling)}), {spread(back)} of what is above chance; met if below 0.50", mean(back) < 0.5),
        ),
        "SmolLM2-135M-Instruct, 151 capitals with eight choices; rank 8 at the MLP outputs of layers 0 to 11, 150 steps, three seeds. The "
        "published settings (rank 2 at two layers, SGD at 2e-4, defects corrected) leave the capitals at "
        f"{_published(results):.2f} (one seed), so the claims are judged by our defaults.",
        f"capitals {original['forget']['phrasing 0']:.2f} to {spread(forgotten)}; relearned {spread(relearned)}",
        attacked(audit, "rtt"),
        (
            "The basis starts from the retain states outside the forget span, the reverse of the paper.",
            "The span keeps every direction, so with enough rows the projector is the identity up to rounding.",
            "Statistics are read one layer away from where the projection acts, which is not where the paper puts it.",
            "The order of tasks is None, so the program cannot start; earlier projections are not active for later statistics.",
            "A dummy zero row always deletes coordinate 0; bfloat16 SGD at 2e-4 loses most updates; padding is counted.",
            "The forget loss is unbounded, nothing is saved or folded, and no evaluation code exists.",
        ),
        "![Accuracy on each task as tasks are unlearned one after another](../figures/continual.png)",
    )  # fmt: skip


def _relearned(results: Results, seeds: Sequence[int], name: str) -> list[float]:
    """Accuracy on the untrained half at the better of two learning rates, seed by seed."""
    rows = [results.rows(f"mrp-attack-{seed}") for seed in seeds]
    return [max(row["V"] for row in part if row["name"] == name) for part in rows]


def _published(results: Results) -> float:
    (row,) = results.rows("mrp-published-0")
    return float(row["forget"]["phrasing 0"])


# --- BLUR


def blur(results: Results) -> Row:
    """BLUR beside the weighted sum of the same losses."""
    tiny = results.rows("unlearn-tiny")
    ours, theirs = ([r for r in tiny if r["name"] == name] for name in ("blur_npo", "npo_gdr"))
    real = {name: smollm2(results, name) for name in ("blur_npo", "npo_gdr", "npo_klr")}
    lost = {name: [worst_kept(row) for row in rows] for name, rows in real.items()}
    forgotten = {name: [row["after"]["forget"]["phrasing 0"] for row in rows] for name, rows in real.items()}
    before = real["blur_npo"][0]["before"]["forget"]["phrasing 0"]
    gain = mean(r["unseen"] for r in ours) - mean(r["unseen"] for r in theirs)
    return Row(
        "BLUR", "2506.08164",
        (
            Claim("forgetting has priority: the forget objective is met at least as well as by the weighted sum",
                  f"tiny models {spread(r['forget'] for r in ours)}, weighted sum {spread(r['forget'] for r in theirs)}; SmolLM2 "
                  f"{spread(forgotten['blur_npo'])}, {spread(forgotten['npo_gdr'])}; met if no worse on both",
                  mean(r["forget"] for r in ours) <= mean(r["forget"] for r in theirs)
                  and mean(forgotten["blur_npo"]) <= mean(forgotten["npo_gdr"])),
            Claim("it outperforms its baselines: more is retained at matched forgetting",
                  f"tiny models, retained facts unseen in training {spread(r['unseen'] for r in ours)}, weighted sum "
                  f"{spread(r['unseen'] for r in theirs)}; SmolLM2, share kept of the worst other domain {spread(lost['blur_npo'])}, "
                  f"NPO with GDR {spread(lost['npo_gdr'])}, with KLR {spread(lost['npo_klr'])}; met if more than 0.02 better on both",
                  gain > 0.02 and mean(lost["blur_npo"]) > max(mean(lost["npo_gdr"]), mean(lost["npo_klr"])) + 0.02),
        ),
        "NPO with and without the projection of the retain gradient, the same losses, steps and rates: tiny models taught 120 facts to "
        "forget and 120 to retain, three seeds; SmolLM2-135M-Instruct, 151 capitals, down-projections of layers 20 to 29, 60 steps.",
        f"capitals {before:.2f} to {spread(forgotten['blur_npo'])} (NPO {spread(forgotten['npo_gdr'])}); worst domain keeps "
        f"{spread(lost['blur_npo'])} (NPO {spread(lost['npo_gdr'])})",
        attacked(real["blur_npo"][0]["audit"], "rtt"),
        (
            "NPO and KL are computed from raw logits of the whole vocabulary, padding included (MUSE).",
            "The mean over the batch stands inside the log-sigmoid, so the batch size changes the loss (TOFU).",
            "Only the last of four micro-batches enters the combined gradient, gamma is ignored, and clipping acts on a stale gradient.",
            "A forget gradient of zero is divided by.",
        ),
    )  # fmt: skip


def smollm2(results: Results, name: str) -> list[dict[str, Any]]:
    """The rows of one recipe on SmolLM2, by seed; the first has the audit."""
    paths = sorted(results.folder.glob(f"unlearn-smollm2-{name}-*.json"))
    return results.rows(*(path.stem for path in paths))


def worst_kept(row: Values) -> float:
    """The smallest share that a domain without training rows keeps."""
    before, after = row["before"]["retain"], row["after"]["retain"]
    return float(min(after[d] / before[d] for d in before if d not in ("perplexity", "symbols", "languages")))


# --- LLM Surgery and SURE, on taught models and, where it was run, on SmolLM2

Found = Mapping[str, Sequence[Values]]
"""The rows of every seed, by name."""
PARTS = {"tiny": "tiny models", "smollm2": "SmolLM2"}


def seeds(results: Results, prefix: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of every seed of a benchmark, by name."""
    paths = sorted(results.folder.glob(f"{prefix}-[0-9]*.json"))
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results.rows(*(path.stem for path in paths)):
        found.setdefault(row["name"], []).append(row)
    return found


def by_part(results: Results, prefix: str) -> dict[str, Found]:
    """The same for each kind of model on which it was run."""
    found = {where: seeds(results, f"{prefix}-{part}") for part, where in PARTS.items()}
    return {where: rows for where, rows in found.items() if rows}


def mean_of(rows: Found, name: str, key: str) -> float:
    """Mean of a measure over seeds."""
    return mean(row[key] for row in rows[name])


def surgery(results: Results) -> Row:
    """Forget, replace and keep at once, beside fine-tuning on the replacements alone."""
    both = by_part(results, "surgery")
    chance = {"SmolLM2": CHANCE, "tiny models": 1 / 16}

    def shown(key: str) -> str:
        names = ("original", "surgery", "update alone")
        return "; ".join(
            f"{where}: " + ", ".join(f"{name} {spread(r[key] for r in rows[name])}" for name in names)
            for where, rows in both.items()
        )

    def change(key: str, how: Callable[[float, float, float], float]) -> list[float]:
        return [how(mean_of(f, "surgery", key), mean_of(f, "original", key), chance[w]) for w, f in both.items()]

    left = change("forget", lambda now, before, guess: (now - guess) / (before - guess))
    gain = change("update", lambda now, before, _: now - before)
    kept = change("retain", lambda now, before, _: now / before)
    tiny = both["tiny models"]["surgery"]
    domains = {d: spread(row["retain by domain"][d] for row in tiny) for d in ("city", "profession")}
    taught = {
        where: [[row.get("retain, trained on", row["retain"]) for row in rows["original"]],
                [row["retain, trained on"] for row in rows["surgery"] if "retain, trained on" in row]]
        for where, rows in both.items()
    }  # fmt: skip
    brought = [next(r["value"] for r in row["audit"]["recoveries"] if r["attack"] == "rtt") for row in tiny]
    return Row(
        "LLM Surgery", "2409.13054",
        (
            Claim("significant forgetting on the unlearn set",
                  f"accuracy, {shown('forget')}; met if less than half of what is above chance is left", max(left) < 0.5),
            Claim("the accuracy on the update set rises by 20 %",
                  f"accuracy, {shown('update')}; in words that training does not use, {shown('update, new words')}; met if it rises by "
                  "0.20", min(gain) >= 0.2),
            Claim("the accuracy on the retain set is maintained, on facts that training sees",
                  "before and after surgery, "
                  + "; ".join(f"{where}: {spread(before)} and {spread(after)}" for where, (before, after) in taught.items())
                  + "; met if at least 0.95 of the original's", min(mean(after) / mean(before) for before, after in taught.values()) >= 0.95),
            Claim("and on retained facts that it does not see",
                  f"mean of domains, {shown('retain')}; after surgery, tiny models: other places of birth {domains['city']}, professions "
                  f"{domains['profession']}; met if at least 0.95 of the original's", min(kept) >= 0.95),
        ),
        "Tiny models that were taught 240 facts: 40 places of birth to forget, 40 to replace by another, the other places and the "
        "professions retained (half trained on, half scored); all weights at 1e-3, 16 rows of each role in a step; "
        f"{len(tiny)} seeds."
        + (" SmolLM2-135M-Instruct: 40 capitals to forget, 40 countries with an invented capital, down-projections of layers 20 to 29 at "
           "5e-4, four rows of each role (the paper: all weights at 2e-4)." if "SmolLM2" in both else "")
        + " The weights of the terms, the optimizer and the 120 steps are the published ones.",
        "; ".join(
            f"{where}: " + ", ".join(f"{k} {spread(r[k] for r in rows['surgery'])}" for k in ("update", "forget", "retain"))
            for where, rows in both.items()
        ) + " after surgery",
        f"{verdicts(row['audit']['verdict'] for row in tiny)} (tiny models): R {spread(brought)} by retraining"
        + "".join(f"; SmolLM2 {attacked(row['audit'], 'rtt')}" for row in both.get("SmolLM2", {}).get("surgery", ()) if "audit" in row),
        (
            "What is called KL is the cross-entropy to the reference, which has the same gradient; it is named so here.",
            "Positions of padding are counted in the loss on the retain set; they are masked here.",
        ),
    )  # fmt: skip


def quantization(results: Results) -> Row:
    """What rounding brings back of facts that were unlearned at a small rate, and whether SURE prevents it."""
    both = by_part(results, "sure")
    shares = {where: _retained(rows) for where, rows in both.items()}
    plain = {where: [name for name in PLAIN if name in rows] for where, rows in both.items()}
    masks = {where: [n for n in ("SURE mask", "random mask") if n in rows] for where, rows in both.items()}

    def shown(names: Mapping[str, Sequence[str]]) -> str:
        return "; ".join(
            f"{where}, {name}: " + ", ".join(f"{s} {spread(v[1] for v in shares[where][name][s])}" for s in SCHEMES)
            for where in both for name in names[where]
        )  # fmt: skip

    def average(where: str, names: Sequence[str], scheme: str) -> float:
        return mean(value[1] for name in names for value in shares[where][name][scheme])

    rise = {w: average(w, plain[w], "int4") - average(w, plain[w], "full") for w in both}
    eight = {w: average(w, plain[w], "int8") - average(w, plain[w], "full") for w in both}
    others = [
        average(w, [name], "int4") - average(w, ["SURE mask"], "int4")
        for w in both if len(masks[w]) == 2 for name in ("npo_gdr", "random mask")
    ]  # fmt: skip
    return Row(
        "Quantisation attack and SURE", "2410.16454",
        (
            Claim("rounding to 4 bits brings back what was unlearned: 21 % is retained in full precision, 83 % after it",
                  f"share retained above chance: {shown(plain)}; met if the mean over recipes rises by 0.30 ("
                  + ", ".join(f"{w} {value:+.2f}" for w, value in rise.items()) + ")", min(rise.values()) >= 0.3),
            Claim("rounding to 8 bits changes little",
                  "change of the mean over recipes: " + ", ".join(f"{w} {v:+.2f}" for w, v in eight.items()) + "; met if within 0.10",
                  max(map(abs, eight.values())) <= 0.1),
            Claim("SURE prevents the recovery, by training the most salient units only",
                  f"share retained above chance: {shown(masks)}"
                  + ("" if min(rise.values()) >= 0.3 else " (without a mask rounding brings little back: " + ", ".join(f"{w} {v:+.2f}" for w, v in rise.items()) + ")")
                  + "; met if int4 retains more than 0.05 less than without a mask and than with "
                  "a random one", min(others) > 0.05),
        ),
        "GA and NPO, each with GDR or KLR, all weights by AdamW until the facts are forgotten: tiny taught models at 1e-4, a tenth of the "
        f"rate of the other measurements, {len(both['tiny models']['original'])} seeds" + ("; SmolLM2-135M-Instruct at 1e-5 on 100 capitals" if "SmolLM2" in both else "")
        + ". int8 and int4 by rounding to nearest, as the audit rounds. SURE over NPO with GDR at ten times the rate: rows in the upper tenth "
        "of the forget gradient, or as many random rows. The audit's column is of SmolLM2 at the usual rate.",
        "retained above chance, full precision and int4: "
        + "; ".join(f"{w} {average(w, plain[w], 'full'):.2f} and {average(w, plain[w], 'int4'):.2f}" for w in both),
        _rounding_in_audits(results),
        (
            "The mask of SURE is applied in a method that the trainer never calls, so the published SURE trains without it.",
            "The threshold of the mask is computed again for every batch, and the forget gradient is counted twice.",
            "NPO is computed from raw logits, and KL is given raw logits.",
            "What is called 4 bits is FP4, the default of its library; GPTQ and AWQ have no code. Schemes are named here.",
            "The memorization score samples at a temperature of 0.9 without a seed.",
        ),
    )  # fmt: skip


PLAIN, SCHEMES = ("grad_diff", "ga_kl", "npo_gdr", "npo_klr"), ("full", "int8", "int4")


def _retained(
    found: Mapping[str, list[dict[str, Any]]],
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By model and scheme, seed by seed: (as published; above chance after the same rounding)."""
    originals = {row["seed"]: row for row in found["original"]}
    return {
        name: {s: [retained(row, originals[row["seed"]], s) for row in rows] for s in SCHEMES}
        for name, rows in found.items()
    }


def _rounding_in_audits(results: Results) -> str:
    """What the audit's rounding attack brought back of the recipes at their usual rate."""
    found = {name: smollm2(results, name)[0]["audit"] for name in ("npo_gdr", "npo_klr")}
    return "; ".join(f"{name} at 5e-4 {attacked(audit, 'quantize')}" for name, audit in found.items())


# --- SemEval-2025 Task 4


def semeval(results: Results) -> Row:
    """The presets on taught LUME rows, with the official aggregate and its verdict."""
    found = seeds(results, "lume")
    finals = {name: mean(r["final"] for r in rows) for name, rows in found.items()}
    ours = [name for name in found if name.startswith("cyber_for_ai")]
    before = mean(row["retain"] for row in found["taught"])
    kept = {name: mean(row["retain"] for row in found[name]) / before for name in ours}
    good = [n for n in ours if kept[n] >= 0.9 and all(r["verdict"] == "CONSISTENT WITH FORGETTING" for r in found[n])]
    broken = {
        n: finals[n] for n, rows in found.items() if any(r["verdict"] in ("DESTROYED", "OVER-FORGOTTEN") for r in rows)
    }
    worst = max(broken, key=lambda name: broken[name]) if broken else ""

    def line(name: str) -> str:
        rows = found[name]
        parts = ", ".join(f"{key} {spread(r[key] for r in rows)}" for key in ("task aggregate", "membership", "mmlu"))
        return f"{name}: {spread(r['final'] for r in rows)} ({parts}; retains {spread(r['retain'] for r in rows)}; {verdicts(r['verdict'] for r in rows)})"

    return Row(
        "SemEval-2025 Task 4, Cyber for AI", "2503.04795",
        (
            Claim("changing all weights balances unlearning, retention and utility",
                  "; ".join(line(name) for name in ours) + f" (before {before:.2f}); met if a variant is CONSISTENT WITH FORGETTING and retains 0.90 of the recall before", bool(good)),
            Claim("an aggregate of 0.409 (7B) and 0.389 (1B) shows promising unlearning",
                  "the published parts are 0, 0.999 and 0.229; a model that repeats one token gets 0, 1 and 0.25. Here "
                  + (f"{worst}, {verdicts(r['verdict'] for r in found[worst])}, gets {finals[worst]:.3f}" if worst else "no model is destroyed")
                  + f", before unlearning {finals['taught']:.3f}, never taught {finals['never taught']:.3f}; met if no destroyed or "
                  "over-forgotten model gets 0.389", not broken or broken[worst] < 0.389),
        ),
        _lume_setting(results),
        "; ".join(f"{_as_code(name)} {value:.3f}" for name, value in finals.items()),
        "; ".join(f"{_as_code(name)}: {verdicts(r['verdict'] for r in rows)}" for name, rows in found.items() if name != "taught")
        + " (the verdict on the metrics; no attack)",
        ("The list of the paper's variants is not public; the five here are reconstructions, and labelled so.",
         "The aggregate rewards collapse, so it is never printed without its parts and a verdict."),
        "![The three parts of the aggregate, published and measured](../figures/lume.png)",
    )  # fmt: skip


def _as_code(name: str) -> str:
    """The name of a recipe as code, which a page may break anywhere; other names as they are."""
    return f"`{name}`" if "_" in name else name


def _lume_setting(results: Results) -> str:
    path = sorted(results.folder.glob("lume-*.json"))[0]
    counts, shape = (results.file(path.stem)["settings"][key] for key in ("rows", "shape"))
    return (
        f"A Llama of {shape['num_hidden_layers']} layers and width {shape['hidden_size']}, trained from scratch on {counts['forget']} rows to "
        f"forget, {counts['retain']} to retain and {counts['members']} member texts of the validation split of LUME; a second one that never "
        f"saw the first and the last gives the AUC of reference. Published recipes at 30 times their rates, five epochs; {counts['mmlu']} "
        "questions of MMLU, which so small a model answers at chance before and after. The vocabulary is made from the taught texts and "
        "from as many texts of the membership test that are no members as members."
    )


# --- Do unlearning methods remove information from weights? (RTT)


def rtt(results: Results) -> Row:
    """What retraining on half of the facts brings back of the other half."""
    seeds = (0, 1, 2)
    before = next(row for row in results.rows("mrp-one-0") if row["name"] == "original")["forget"]["phrasing 0"]
    projected = [value / before for value in _relearned(results, seeds, "MRP, folded")]
    found = {
        name: [_ratio(row) for row in smollm2(results, name) if "audit" in row]
        for name in ("npo_gdr", "npo_klr", "blur_npo")
    }
    tiny = [row for row in results.rows("unlearn-tiny") if row.get("rtt") is not None]
    taught = {n: mean(r["rtt"] for r in tiny if r["name"] == n) for n in dict.fromkeys(r["name"] for r in tiny)}
    control = taught.pop("retrained")
    most = {"MRP": projected, **found}
    shares = {name: mean(values) for name, values in most.items()}
    return Row(
        "RTT", "2410.08827",
        (
            Claim("retraining on some of the facts recovers 88 % of the accuracy before unlearning on the others",
                  "; ".join(f"{name} {spread(values)}" for name, values in most.items())
                  + "; met if every method is at 0.88 or above", min(shares.values()) >= 0.88),
            Claim("so unlearning hides the facts: most of what is above the floor comes back",
                  f"R of ten recipes on tiny taught models {min(taught.values()):.2f} to {max(taught.values()):.2f}, of a model that was "
                  f"never taught {control:.2f}; met if every recipe is above 0.50 and the control below 0.20",
                  min(taught.values()) > 0.5 and control < 0.2),
        ),
        "Published accuracy ratio on SmolLM2-135M-Instruct and 151 capitals: 40 steps on one half, tested on the other, at the best of two "
        "(MRP) or three learning rates, beside R of the audit on tiny models, three seeds.",
        ", ".join(f"{name} {value:.2f}" for name, value in shares.items()) + " of the accuracy before",
        f"R of the retraining attack on tiny models {min(taught.values()):.2f} to {max(taught.values()):.2f}; never taught {control:.2f}",
        (
            "The loss averages over all positions, padding included; corpus losses drop the last character.",
            "The best learning rate and epoch are read off the items that are reported; here they are chosen on one half and scored on the other.",
            "The recovery rate is not corrected for chance; one package and one data folder that the code reads are missing.",
            "The random birthdays hold repeated questions, contradictory answers and repeated choices; here facts are generated and checked.",
        ),
    )  # fmt: skip


def _ratio(row: Values) -> float:
    """Accuracy after retraining over accuracy before unlearning."""
    attack = next(r for r in row["audit"]["recoveries"] if r["attack"] == "rtt")
    return float(attack["edited"] / row["before"]["forget"]["phrasing 0"])


# --- Multi-GAN and condensation


def multi_gan(results: Results) -> Row:
    """A class or wrong labels of digits, beside retrained models and plain relabelling."""
    one, wrong = (results.file(f"vision-digits-{kind}")["summary"] for kind in ("class", "mislabelled"))
    ours, plain, gold = (one[name] for name in ("multi_gan", "relabel", "retrained again"))
    near = abs(ours["test accuracy, gap"]["mean"]) <= 3 and ours["forget accuracy, edited"]["mean"] <= 5
    auc = {name: summary(part["AUC of the loss, edited"]) for name, part in wrong.items()}
    gap = wrong["multi_gan"]["AUC of the loss, gap"]["mean"]
    better = plain["relearn, gap"]["mean"] - ours["relearn, gap"]["mean"]
    return Row(
        "Multi-GAN", "2407.18467",
        (
            Claim("the unlearned model forgets a class and keeps its accuracy",
                  f"forgotten class {summary(ours['forget accuracy, edited'])} %, test {summary(ours['test accuracy, edited'])} % "
                  f"(retrained {summary(gold['test accuracy, edited'])} %); met if at most 5 % and within 3 points", near),
            Claim("membership inference does not tell forgotten images",
                  f"120 wrong labels: AUC of the loss, in per cent, {auc['multi_gan']} (retrained {auc['retrained again']}); met if "
                  "within 5 points of retrained models", abs(gap) <= 5),
            Claim("synthetic images improve on standard unlearning",
                  f"relearning, points above retrained models: {summary(ours['relearn, gap'])}, plain relabelling "
                  f"{summary(plain['relearn, gap'])}; wrong labels, AUC {auc['multi_gan']}, relabelling {auc['relabel']}; met if relearning is "
                  "more than 3 points nearer", better > 3),
        ),
        "scikit-learn's digits, five seeds; one class of a small CNN, or 120 wrong labels of an MLP that memorizes them. CIFAR-10 as in the "
        "paper was not used for it. Only the abstract is public, so losses, sizes and steps are ours.",
        f"class {summary(ours['forget accuracy, edited'])} %, test {summary(ours['test accuracy, edited'])} %; relearned "
        f"{summary(ours['relearn, edited'])} %, AUC of wrong labels {auc['multi_gan']} %",
        verdicts(ours["verdicts"]) + " (class); " + verdicts(wrong["multi_gan"]["verdicts"]) + " (wrong labels)",
        ("No code is published. Which synthetic labels are inverted is ambiguous; inverting those of the retain set would destroy it.",),
        "![Gap between every recipe and a model that never saw the class](../figures/vision_gap_class.png)",
    )  # fmt: skip


def condensation(results: Results) -> Row:
    """The same for condensed retain sets, on digits and MNIST."""
    digits, wrong = (results.file(f"vision-digits-{kind}")["summary"] for kind in ("class", "mislabelled"))
    mnist, mnist_wrong = (results.file(f"vision-mnist5k-{kind}")["summary"] for kind in ("class", "mislabelled"))
    parts = {"digits": digits["condense"], "MNIST": mnist["condense"]}
    near = all(
        abs(p["test accuracy, gap"]["mean"]) <= 3 and p["forget accuracy, edited"]["mean"] <= 5 for p in parts.values()
    )
    auc = [p["condense"]["AUC of the loss, gap"]["mean"] for p in (wrong, mnist_wrong)]
    return Row(
        "Dataset condensation", "2402.00195",
        (
            Claim("utility is that of retraining",
                  "; ".join(f"{name}: class {summary(p['forget accuracy, edited'])} %, test {summary(p['test accuracy, edited'])} % (gap "
                            f"{summary(p['test accuracy, gap'])})" for name, p in parts.items())
                  + "; met if at most 5 % and within 3 points on both", near),
            Claim("it is cheaper than retraining",
                  "time over that of retraining: " + "; ".join(f"{n} {summary(p['of_retraining'], 2)}" for n, p in parts.items())
                  + "; met if below 1 on both", all(p["of_retraining"]["mean"] < 1 for p in parts.values())),
            Claim("it defends against membership inference",
                  f"wrong labels, AUC of the loss minus that of retrained models, points: digits {auc[0]:.1f}, MNIST {auc[1]:.1f}; met if "
                  "within 5 on both", max(map(abs, auc)) <= 5),
        ),
        "scikit-learn's digits, five seeds, and 5,000 MNIST images, three seeds; one class of a small CNN, or a tenth of wrong labels of an "
        "MLP; fast distribution matching, ten images a class (30 for wrong labels), without the offline phase.",
        "; ".join(f"{n}: class {summary(p['forget accuracy, edited'])} %, relearned {summary(p['relearn, edited'])} %" for n, p in parts.items()),
        "; ".join(f"{verdicts(part['condense']['verdicts'])} ({name})" for name, part in
                  (("digits, class", digits), ("digits, wrong labels", wrong), ("MNIST, class", mnist), ("MNIST, wrong labels", mnist_wrong))),
        (
            "The remembrance set holds images of the forgotten class, so it is remembered; classes absent from the retain set are dropped here.",
            "The membership attack reads the class and not membership: the holdout is not matched to the forget set.",
            "By its epochs the offline phase costs more than the retraining that it saves; it is off by default.",
        ),
        "![Condensed images beside their nearest real ones](../figures/vision_condensed.png)",
    )  # fmt: skip


# --- What the audit says


def attacked(found: Values, attack: str) -> str:
    """The verdict, with R of one attack and its bound."""
    recovery = next(r for r in found["recoveries"] if r["attack"] == attack)
    low, high = recovery["bound"]
    name = {"rtt": "retraining", "direct": "asking", "quantize": "rounding"}[attack]
    return f"{found['verdict']}: R {recovery['value']:.2f} ({low:.2f} to {high:.2f}) by {name}, one seed"


def verdicts(words: Iterable[str]) -> str:
    """Every verdict with how often it was given."""
    return ", ".join(f"{word} {count}" for word, count in Counter(words).most_common())


SYSTEMS: tuple[Callable[[Results], Row], ...] = (
    pruning, mrp, blur, surgery, quantization, semeval, rtt, multi_gan, condensation
)  # fmt: skip
"""In the order of the page."""
