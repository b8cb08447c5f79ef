"""Upload to the Hugging Face hub: exactly the files of an exported checkpoint, or an edit or a delta as a file of its own."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from repedit.arguments import checked
from repedit.delta import Delta
from repedit.edit import Edit
from repedit.errors import ArgumentError, CheckpointError, HubError, RepeditError, TargetExists
from repedit.io import archive
from repedit.io.files import is_file, user_path
from repedit.io.targets import CARD, MANIFEST, folder_entries
from repedit.rewrite.certificate import Certificate
from repedit.rewrite.verification import Verification, verification

HUB_FILES = (".gitattributes",)
"""Files that the hub itself adds to a repository."""


@runtime_checkable
class HubApi(Protocol):
    """The methods of `huggingface_hub.HfApi` that an upload uses."""

    def repo_exists(self, repo_id: str, *, repo_type: str | None = None) -> bool: ...
    def repo_info(self, repo_id: str, *, repo_type: str | None = None) -> Any: ...
    def create_repo(
        self, repo_id: str, *, private: bool | None = None, repo_type: str | None = None, exist_ok: bool = False
    ) -> Any: ...
    def create_commit(
        self, repo_id: str, operations: Iterable[Any], *, commit_message: str, repo_type: str | None = None
    ) -> Any: ...


@dataclass(frozen=True)
class Push:
    """An upload, planned or done."""

    repository: str
    private: bool
    files: Mapping[str, int]
    """Bytes by name."""
    unlisted: tuple[str, ...]
    """Files of the directory that are not uploaded, because the manifest does not list them."""
    manifest: Mapping[str, Any]
    url: str | None = None
    """The commit; None if nothing was uploaded."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def describe(self) -> str:
        """A few lines: the repository, the files, and a summary of the manifest."""
        kind = "delta" if "delta" in self.manifest else "edit"
        method = self.manifest.get(kind, {}).get("method", f"{'a' if kind == 'delta' else 'an'} {kind}")
        certificate = self.manifest.get("certificate")
        leak = "no certificate: nothing was projected" if certificate is None else Certificate.of(certificate).summary
        exported = f"manifest: {method}; every file has the hash it was exported with; {leak}"
        count = f"{len(self.files)} file{'' if len(self.files) == 1 else 's'}"
        return "\n".join([
            f"{self.repository} ({'private' if self.private else 'public'}): {count}, {self.size / 1e6:.1f} MB",
            exported if "files" in self.manifest else f"{'a delta' if kind == 'delta' else 'an edit'} in a file of its own: {method}",
            *([f"not uploaded, not in the manifest: {', '.join(self.unlisted)}"] if self.unlisted else []),
            f"uploaded: {self.url}" if self.url else "nothing was uploaded",
        ])  # fmt: skip


@checked
def push(
    source: str | Path | Edit | Delta,
    repository: str,
    *,
    yes: bool = False,
    private: bool = True,
    overwrite: bool = False,
    message: str = "",
    api: HubApi | None = None,
) -> Push:
    """Upload an exported checkpoint, an edit or a delta as one commit.

    Of a checkpoint: the files of its manifest, the manifest and the card. Of an edit or a delta, or a file that holds one:
    edit.safetensors, delta.safetensors or the file, beside what the repository holds; `rp.Edit.load` and `rp.Delta.load`
    read "hf://owner/name/edit.safetensors". Without `yes` only the source is checked, and the network is not used.
    huggingface_hub finds the token.

    Args:
        source: directory of an export, a saved edit or delta, or the value itself.
        repository: "owner/name".
        private: visibility of a new repository; an existing one must have this visibility already.
        overwrite: replace what an existing repository holds: all its files by a checkpoint, one file by an edit. The
            history of the repository keeps the old ones.
        message: of the commit.
        api: used in place of `huggingface_hub.HfApi()`.
    Raises:
        NotFound: if the directory holds no manifest.
        CheckpointError: if a file is not as it was exported, is missing, or changes while it is read; if it holds no edit.
        ArgumentError: if the repository name is not valid, or the repository has another visibility.
        TargetExists: if the repository holds the files and overwrite is False.
        HubError: if the hub refuses or cannot be reached.
    """
    _check_name(repository)
    if isinstance(source, Edit | Delta):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{type(source).__name__.lower()}.safetensors"
            source.save(path)
            return _push_file(path, repository, yes, private, overwrite, message, api)
    root = user_path(source)
    if is_file(root):
        return _push_file(root, repository, yes, private, overwrite, message, api)
    verified = verification(root)
    if not verified.whole:
        raise CheckpointError(
            f"{root.absolute()} is not what its {MANIFEST} says was exported: {verified.describe()}; export it again, or restore "
            "the files"
        )
    planned = Push(repository, private, dict(verified.files), verified.unlisted, verified.manifest)
    if not yes:
        return planned
    client = _client(api)
    with _hub(repository):
        held = _held_files(client, planned)
    if held and not overwrite:
        raise TargetExists(
            f"{repository} holds {len(held)} files, such as {held[0]}; pass overwrite=True to replace them, or give another name"
        )
    stale = [file for file in held or () if file not in planned.files]
    operations = _operations(root, verified, stale)
    return _commit(client, planned, operations, held is None, message or "Upload an edited checkpoint")


def _push_file(
    path: Path, repository: str, yes: bool, private: bool, overwrite: bool, message: str, api: HubApi | None
) -> Push:
    """Upload one file that holds an edit or a delta; nothing else in the repository changes."""
    kind = archive.kind_of(path)
    if kind not in ("edit", "delta"):
        raise CheckpointError(
            f"{path} holds no edit and no delta; give a file of edit.save(path), or the directory of an export"
        )
    value = (Edit if kind == "edit" else Delta).load(path)  # a damaged one is not published
    planned = Push(repository, private, {path.name: path.stat().st_size}, (), {kind: dict(value.provenance)})
    if not yes:
        return planned
    client = _client(api)
    with _hub(repository):
        held = _held_files(client, planned)
    if path.name in (held or ()) and not overwrite:
        raise TargetExists(
            f"{repository} holds {path.name} already; pass overwrite=True to replace it, or save the value under another name"
        )
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path.read_bytes())
    return _commit(client, planned, [addition], held is None, message or f"Upload {path.name}")


def _client(api: HubApi | None) -> HubApi:
    if api is not None:
        return api
    from huggingface_hub import HfApi

    return HfApi()


def _commit(api: HubApi, planned: Push, operations: list[Any], create: bool, message: str) -> Push:
    """Carry out the operations as one commit, in a new repository if there is none."""
    name = planned.repository
    with _hub(name):
        if create:
            api.create_repo(name, private=planned.private, repo_type="model", exist_ok=False)
        commit = api.create_commit(name, operations, commit_message=message, repo_type="model")
    return replace(planned, url=str(commit.commit_url))


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ArgumentError(f"{repository!r} names no repository: {error}") from error
    if repository.count("/") != 1:
        raise ArgumentError(f"{repository!r} names no repository; write owner/name")


def _held_files(api: HubApi, planned: Push) -> list[str] | None:
    """Files of the repository that the hub did not add itself; None if there is no repository yet.

    Raises:
        ArgumentError: if the repository has another visibility than planned.
    """
    name = planned.repository
    if not api.repo_exists(name, repo_type="model"):
        return None
    info = api.repo_info(name, repo_type="model")
    if bool(info.private) != planned.private:
        actual, asked = ("private" if private else "public" for private in (info.private, planned.private))
        raise ArgumentError(
            f"{name} exists and is {actual}, {asked} was asked for; change it on the hub, or ask for {actual}"
        )
    return [sibling.rfilename for sibling in info.siblings or () if sibling.rfilename not in HUB_FILES]


def _operations(root: Path, verified: Verification, stale: list[str]) -> list[Any]:
    """Additions of exactly the bytes that were verified, and deletions of stale files."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(root / name)) for name in verified.files]
    present = folder_entries(root)
    for addition in additions:
        name = addition.path_in_repo
        regular = name in present and stat.S_ISREG(present[name].st_mode)
        hashed = name not in (MANIFEST, CARD)
        if not regular or (hashed and addition.upload_info.sha256.hex() != verified.manifest["files"][name]):
            raise CheckpointError(f"{root / name} changed while it was read; nothing was uploaded")
    return [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)]


@contextmanager
def _hub(repository: str) -> Iterator[None]:
    """Raise the errors of the client and the hub as HubError, with their cause."""
    try:
        yield
    except RepeditError:
        raise
    except Exception as error:
        raise HubError(
            f"the hub did not take {repository}: {type(error).__name__}: {str(error).strip() or 'no reason given'}; log in with "
            "`hf auth login` or set HF_TOKEN, and check that the owner is yours"
        ) from error
