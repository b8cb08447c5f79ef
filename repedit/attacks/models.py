"""The models of an audit: loaded as plain transformers models, one at a time, checked to be of one kind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from repedit.attacks.families.stripping import wrapped
from repedit.errors import CheckpointError, FingerprintError, NoOpEdit
from repedit.fingerprints import fingerprint
from repedit.io.files import is_folder
from repedit.io.text import read_json
from repedit.models import Subject, load
from repedit.sites import Site

_FIELDS = ("model_type", "vocab_size", "num_hidden_layers", "n_layer")
"""What an edited model shares with the original; a slimmed or sliced one has other widths and other numbers of heads."""


class Audited:
    """A model in one role: a Subject that is at hand, or a directory that is read when it is needed and let go after."""

    def __init__(self, role: str, source: Subject | str | Path, device: str = "auto") -> None:
        self.role, self.live = role, isinstance(source, Subject)
        self._source, self._device = source, device
        with self.opened() as subject:
            self.fingerprint = fingerprint(subject.model)
            self.kind = {name: getattr(subject.model.config, name, None) for name in _FIELDS}
            self.tokenizer = _vocabulary(subject.need_tokenizer())
            self.layers, self.width = len(subject.anatomy.layers), subject.anatomy.width
            self.shapes = {name: spec.shape for name, spec in subject.specs.items()}
            # A hook is code: nothing names it, so what was found with it is not kept for another time.
            self.hooked = self.live and wrapped(subject)

    @property
    def path(self) -> Path | None:
        """The directory, where the model is one."""
        return None if isinstance(self._source, Subject) or not is_folder(self._source) else Path(self._source)

    @property
    def name(self) -> str:
        """What a reader calls the model."""
        return "a model in memory" if isinstance(self._source, Subject) else str(self._source)

    @contextmanager
    def opened(self) -> Iterator[Subject]:
        """The model; its weights must be the same afterwards.

        Raises:
            FingerprintError: if an attack changed it.
        """
        subject = self._source if isinstance(self._source, Subject) else load(self._source, device=self._device)
        before = fingerprint(subject.model)
        yield subject
        if fingerprint(subject.model) != before:
            raise FingerprintError(f"the {self.role} model changed while it was attacked; nothing found on it counts")

    def edited_layers(self) -> tuple[int, ...] | None:
        """The layers that repedit.json says were edited; None where there is no such file."""
        manifest = (self.path or Path("absent")) / "repedit.json"
        if not manifest.exists():
            return None
        sites = read_json(manifest, finite=False, remedy="export again").get("sites") or {}
        try:
            found = sorted({Site.parse(name).layer for name in dict(sites)})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the sites of {manifest} cannot be read: {error}; export again") from error
        return tuple(found) or None


def check_pair(edited: Audited, original: Audited) -> None:
    """Refuse models that cannot be compared.

    Raises:
        FingerprintError: if architecture, vocabulary or tokenizer differ; with the first difference.
        NoOpEdit: if every weight is equal.
    """
    for name, found in edited.kind.items():
        if found != original.kind[name]:
            raise FingerprintError(
                f"{edited.role} and {original.role} are models of different kinds: {name} is {found!r} and "
                f"{original.kind[name]!r}; give the checkpoint that was edited"
            )
    if edited.tokenizer != original.tokenizer:
        raise FingerprintError(
            f"{edited.role} and {original.role} have different tokenizers ({edited.tokenizer[:12]} and {original.tokenizer[:12]}); "
            "scores of different tokens cannot be compared"
        )
    if edited.fingerprint == original.fingerprint and not edited.hooked:
        raise NoOpEdit(
            f"every tensor of {edited.name} equals {original.role}'s; was the edit applied and saved? Nothing was attacked"
        )


def _vocabulary(tokenizer: Any) -> str:
    text = json.dumps(sorted(tokenizer.get_vocab().items())) + repr(tokenizer("It is 7 o'clock, Zoë.")["input_ids"])
    return hashlib.sha256(text.encode()).hexdigest()
