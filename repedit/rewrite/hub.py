"""Upload an exported checkpoint to the Hugging Face hub: exactly the files that its manifest lists."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from repedit.errors import ArgumentError, CheckpointError, HubError, RepeditError, TargetExists
from repedit.io.files import user_path
from repedit.io.targets import CARD, MANIFEST, folder_entries
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
        edit = self.manifest.get("edit", {})
        certificate = self.manifest.get("certificate")
        leak = "no certificate: nothing was projected"
        if certificate and not certificate["rank"]:
            leak = "no direction was removed"
        elif certificate:
            leak = f"largest leak {certificate['worst_leak']:.1e}, {certificate['exactness']}"
        return "\n".join([
            f"{self.repository} ({'private' if self.private else 'public'}): {len(self.files)} files, {self.size / 1e6:.1f} MB",
            f"manifest: {edit.get('method', 'an edit')}; every file has the hash it was exported with; {leak}",
            *([f"not uploaded, not in the manifest: {', '.join(self.unlisted)}"] if self.unlisted else []),
            f"uploaded: {self.url}" if self.url else "nothing was uploaded",
        ])  # fmt: skip


def push(
    directory: str | Path,
    repository: str,
    *,
    yes: bool = False,
    private: bool = True,
    overwrite: bool = False,
    message: str = "Upload an edited checkpoint",
    api: HubApi | None = None,
) -> Push:
    """Upload an exported checkpoint as one commit: the files of its manifest, the manifest and the card.

    Without `yes` only the directory is checked, and the network is not used. huggingface_hub finds the token.

    Args:
        repository: "owner/name".
        private: visibility of a new repository; an existing one must have this visibility already.
        overwrite: replace the files of an existing repository; its history keeps the old ones.
        api: used in place of `huggingface_hub.HfApi()`.
    Raises:
        NotFound: if the directory holds no manifest.
        CheckpointError: if a file is not as it was exported, is missing, or changes while it is read.
        ArgumentError: if the repository name is not valid, or the repository has another visibility.
        TargetExists: if the repository holds files and overwrite is False.
        HubError: if the hub refuses or cannot be reached.
    """
    _check_name(repository)
    root = user_path(directory)
    verified = verification(root)
    if not verified.whole:
        raise CheckpointError(
            f"{root.absolute()} is not what its {MANIFEST} says was exported: {verified.describe()}; export it again, or restore "
            "the files"
        )
    planned = Push(repository, private, dict(verified.files), verified.unlisted, verified.manifest)
    if not yes:
        return planned
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with _hub(repository):
        stale = _stale_files(api, planned, overwrite)
    operations = _operations(root, verified, stale)
    with _hub(repository):
        if stale is None:
            api.create_repo(repository, private=private, repo_type="model", exist_ok=False)
        commit = api.create_commit(repository, operations, commit_message=message, repo_type="model")
    return replace(planned, url=str(commit.commit_url))


def _check_name(repository: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ArgumentError(f"{repository!r} names no repository: {error}") from error
    if repository.count("/") != 1:
        raise ArgumentError(f"{repository!r} names no repository; write owner/name")


def _stale_files(api: HubApi, planned: Push, overwrite: bool) -> list[str] | None:
    """Files of a repository that the push does not contain; None if there is no repository yet."""
    name = planned.repository
    if not api.repo_exists(name, repo_type="model"):
        return None
    info = api.repo_info(name, repo_type="model")
    if bool(info.private) != planned.private:
        actual, asked = ("private" if private else "public" for private in (info.private, planned.private))
        raise ArgumentError(
            f"{name} exists and is {actual}, {asked} was asked for; change it on the hub, or ask for {actual}"
        )
    files = [sibling.rfilename for sibling in info.siblings or () if sibling.rfilename not in HUB_FILES]
    if files and not overwrite:
        raise TargetExists(
            f"{name} holds {len(files)} files, such as {files[0]}; pass overwrite=True to replace them, or give another name"
        )
    return [file for file in files if file not in planned.files]


def _operations(root: Path, verified: Verification, stale: list[str] | None) -> list[Any]:
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
    return [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale or ())]


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
