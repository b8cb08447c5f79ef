"""Write docs/families.md: `python -m docs.families` builds a tiny model of every type of transformers and tries it.

The sentence of a refusal is the error that `rp.wrap` raises, or the reason of tests/every_causal_type.py or
tests/every_wrapper_type.py if those build no model of the type.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import repedit as rp
from repedit.arch.infer import check_architecture
from repedit.arch.layout import Branch
from repedit.arch.spec import families
from repedit.arch.storage import storage
from repedit.edit import exactness
from repedit.errors import MissingDependency, NotFoldable, RepeditError, UnknownArchitecture
from repedit.hooks import primary
from repedit.io.checkpoint import open_shards
from repedit.models.subject import Subject
from repedit.sites import Point, Site
from tests import every_causal_type, every_wrapper_type
from tests.tiny import ids

PAGE = Path(__file__).with_name("families.md")
COLUMNS = (
    "type", "row", "branches", "outputs", "neurons", "0.resid.pre", "stream erasure", "slim", "slice", "TransformerLens", "files",
)  # fmt: skip
REFUSED_COLUMNS = ("type", "reason")
CAUSAL, WRAPPERS = "Causal language models", "Multimodal models with a text decoder"
"""The headings of the two sections."""
_WRAPPER = "a wrapper: see the image-text table"
"""What tests/every_causal_type.py says of a type that the second section describes."""

INTRODUCTION = """# Families

`make families` writes this page: it builds a tiny random model of every type that transformers {transformers} lists for causal
language models and for images and text (torch {torch}, TransformerLens {lens}), and tries on it what the columns say.

**Proved** means that `rp.wrap` accepts the model and that `rp.check_architecture` passes on it: at every site of every layer an
edit by hooks and the same edit in the weights change the model by the same amount, and what the branches add is all that a block
adds to the stream. Everything else is **refused** with an error that begins with the reason in the table. A model of your own is
proved again when it is loaded, and `repedit doctor MODEL` shows the proof.

- **row**: *curated* rows are in `repedit/arch/table.py`; *inferred* ones are derived from the model on first use and proved on it.
- **branches**: the parts of a block that add to the stream. Each gives two sites, `N.<branch>.neurons` and `N.<branch>.out`:
  attention (`attn`), a mixer of tokens without attention (`mixer`), an MLP (`mlp`), per-layer embeddings (`ple`). Blocks of one
  model may differ; " or " separates them.
- **outputs**: how exactly weights reproduce an edit of `N.<branch>.out`. *exact*: weights exist that equal the edit.
  *subspace-exact*: a norm follows, so that the subspace is erased and the scale differs.
- **neurons**: the branches in which pruning zeroes a neuron's column and the rows that feed it. *columns*: no row feeds one neuron
  alone, so that only its column is zeroed; the logits are the same.
- **0.resid.pre**: *exact* if the embeddings alone make up the stream before the first block, so that weights can equal an edit there;
  otherwise, as where a norm follows them or features of images join them, *hook-only*.
- **stream erasure**: whether `rp.erase_stream` and `rp.apply` leave nothing of a plane in the stream after any block.
- **slim**, **slice**: what `rp.slimmed` can cut out, and whether `rp.sliced` can narrow the stream. Both need a curated row that says
  how the config follows.
- **TransformerLens**: whether `rp.to_lens` gives the same logits; not tried for models with images or sound, for which it needs
  torchvision.
- **files**: *streamed* if each tensor that an edit changes lies in the files of a checkpoint whole or in slices, so that an export
  can be made one tensor at a time; otherwise the conversion of transformers that prevents it.
"""


@dataclass(frozen=True)
class Section:
    """What was tried on every type of a list of transformers."""

    title: str
    proved: Mapping[str, Sequence[str]]
    """The cells after the first, by type."""
    refused: Mapping[str, str]
    """The reason, by type."""
    elsewhere: Sequence[str] = ()
    """Types that the other section describes."""

    def text(self) -> str:
        """The section in Markdown."""
        parts = [f"## {self.title}", f"{len(self.proved)} proved, {len(self.refused)} refused."]
        if self.elsewhere:
            parts[1] += f" {len(self.elsewhere)} types are listed below as multimodal: {', '.join(self.elsewhere)}."
        parts.append(_table(COLUMNS, [(name, *cells) for name, cells in sorted(self.proved.items())]))
        parts.append("### Refused" if self.elsewhere else "### Refused multimodal models")
        parts.append(_table(REFUSED_COLUMNS, sorted(self.refused.items())))
        return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    versions = {"transformers": version("transformers"), "torch": version("torch").partition("+")[0]}
    introduction = INTRODUCTION.format(**versions, lens=version("transformer-lens"))
    return "\n\n".join([introduction.strip(), causal().text(), wrappers().text()]) + "\n"


def causal() -> Section:
    """Every type of the list for causal language models."""
    reasons = every_causal_type.NOT_A_DECODER
    elsewhere = [name for name in every_causal_type.CAUSAL_TYPES if reasons.get(name) == _WRAPPER]
    types = [name for name in every_causal_type.CAUSAL_TYPES if name not in elsewhere]
    return _section(CAUSAL, types, every_causal_type.tiny_causal, reasons, elsewhere)


def wrappers() -> Section:
    """Every type of the list for images and text."""
    reasons = {name: reason.removeprefix("it is ") for name, reason in every_wrapper_type.NOT_A_DECODER.items()}
    return _section(WRAPPERS, every_wrapper_type.WRAPPER_TYPES, every_wrapper_type.tiny_wrapper, reasons)


def _section(
    title: str,
    types: Iterable[str],
    build: Callable[[str], PreTrainedModel],
    reasons: Mapping[str, str],
    elsewhere: Sequence[str] = (),
) -> Section:
    proved: dict[str, Sequence[str]] = {}
    refused: dict[str, str] = {}
    for name in types:
        if name in reasons:
            refused[name] = reasons[name]
            continue
        try:
            subject = rp.wrap(build(name))
            check_architecture(subject.model)
        except RepeditError as error:
            refused[name] = reason(error)
        else:
            proved[name] = cells(subject)
    return Section(title, proved, refused, elsewhere)


def reason(error: Exception) -> str:
    """What an error of `rp.wrap` says before it names modules."""
    text = re.sub(r"^no row describes [^:]+: ", "", str(error))
    return text.partition("\n")[0].partition(": ")[0]


def cells(subject: Subject) -> tuple[str, ...]:
    """The row of a proved type, without its name."""
    row = subject.architecture
    shrink = row.shrink
    heads = bool(shrink and not shrink.whole_heads)
    return (
        "curated" if row.model_type in families() else "inferred",
        branches(subject),
        _grouped(_by_kind(subject, lambda layer, b: exactness(Site(layer, b.outer), subject.layout))),
        _grouped(_by_kind(subject, lambda _, b: "" if all(p.readers for p in b.parts) else "columns")),
        exactness(Site(0, Point.RESID_PRE), subject.layout),
        _stream_erasure(subject),
        ("neurons, heads" if heads else "neurons") if shrink else "no",
        "yes" if shrink and not shrink.whole_stream else "no",
        _lens(subject),
        _files(subject),
    )


def branches(subject: Subject) -> str:
    """The branches of each kind of block, with what their experts are."""
    blocks = [", ".join(_branch(branch) for branch in branches) for branches in subject.layout.layers]
    return " or ".join(dict.fromkeys(blocks))


def _branch(branch: Branch) -> str:
    if not branch.routed:
        return branch.kind
    shared = any(part.expert is None for part in branch.parts)
    return f"{branch.kind} (experts and shared)" if shared else f"{branch.kind} (experts)"


def _by_kind(subject: Subject, value: Callable[[int, Branch], str]) -> dict[str, set[str]]:
    """What is true of the branches of each kind in some layer."""
    found: dict[str, set[str]] = {}
    for layer, branches in enumerate(subject.layout.layers):
        for branch in branches:
            found.setdefault(branch.kind, set()).add(value(layer, branch))
    return found


def _grouped(values: Mapping[str, set[str]]) -> str:
    """One word if all branches agree, otherwise each kind with its own; "" says nothing."""
    words = set.union(*values.values())
    if len(words) == 1 and words != {""}:
        return words.pop()
    return ", ".join(f"{kind} {_in_layers(found)}".strip() for kind, found in values.items())


def _in_layers(words: set[str]) -> str:
    return "".join(words) if len(words) == 1 else " or ".join(f"{word} in some layers" for word in sorted(words - {""}))


@torch.no_grad()
def _stream_erasure(subject: Subject) -> str:
    width = subject.layout.width
    basis = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    edit = rp.erase_stream(subject, basis)
    try:
        erased = rp.apply(edit, subject)
    except NotFoldable:
        return "by hooks"
    map_ = edit.maps[Site(0, Point.RESID_PRE)]
    streams: list[torch.Tensor] = []
    handles = [
        erased.model.get_submodule(path).register_forward_hook(lambda _m, _a, out: streams.append(primary(out).clone()))
        for path in erased.layout.block_paths
    ]
    erased.model(input_ids=ids(), use_cache=False)
    for handle in handles:
        handle.remove()
    leak = max(float((x - map_(x)).norm() / x.norm()) for x in streams)
    return "yes" if leak < 1e-4 else "no"


def _lens(subject: Subject) -> str:
    try:
        with _quiet():
            rp.to_lens(subject)
    except MissingDependency:
        return "not tried"
    except UnknownArchitecture:
        return "no"
    return "yes"


def _files(subject: Subject) -> str:
    """Whether a checkpoint of this type holds every tensor that an edit may change in pieces that can be streamed."""
    layout = subject.layout
    parts = [part for branches in layout.layers for branch in branches for part in branch.parts]
    views = [view for part in parts for view in (part.out, part.bias, *part.readers) if view is not None]
    needed = {view.tensor for view in views} | {*layout.embeddings, layout.head}
    with tempfile.TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        stored = storage(subject.model, open_shards(folder).specs)
    reasons = {stored[name].reason if name in stored else "not in the files" for name in needed}
    return "; ".join(sorted(_short(r) for r in reasons if r)) or "streamed"


def _short(text: str) -> str:
    return text.removeprefix("transformers converts it by ")


@contextlib.contextmanager
def _quiet() -> Any:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    logging.getLogger("repedit").setLevel(logging.WARNING)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.write_text(page(), encoding="utf-8")
    print(target)
