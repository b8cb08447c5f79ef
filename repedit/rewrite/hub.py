"""Upload an exported checkpoint to the Hugging Face hub: what its manifest lists and nothing else, and only when told to."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repedit.errors import ArgumentError, CheckpointError, HubError, TargetExists
from repedit.io.files import user_path
from repedit.io.targets import CARD, MANIFEST, entries
from repedit.rewrite.verification import Verification, verification

KEPT = (".gitattributes",)
"""Files that the hub itself puts into a repository."""


@dataclass(frozen=True)
class Push:
    """What is, or would be, uploaded."""

    repository: str
    private: bool
    files: Mapping[str, int]
    """Bytes by name."""
    left: tuple[str, ...]
    """Files of the directory that stay here, since the manifest does not list them."""
    manifest: Mapping[str, Any]
    url: str | None = None
    """The commit; None where nothing was uploaded."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def describe(self) -> str:
        """A few lines: where to, what, and what the manifest says of it."""
        edit = self.manifest.get("edit", {})
        held = self.manifest.get("certificate")
        said = (
            f"largest leak {held['worst_leak']:.1e}, {held['exactness']}"
            if held
            else "no certificate: nothing was projected"
        )
        return "\n".join([
            f"{self.repository} ({'private' if self.private else 'public'}): {len(self.files)} files, {self.size / 1e6:.1f} MB",
            f"manifest: {edit.get('method', 'an edit')}; every file has the hash it was exported with; {said}",
            *([f"stay here, not in the manifest: {', '.join(self.left)}"] if self.left else []),
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
    api: Any = None,
) -> Push:
    """Upload an exported checkpoint as one commit: the files of its manifest, the manifest and the card.

    Without `yes` the directory is checked and nothing is asked of the network. A token comes from where huggingface_hub
    looks for one.

    Args:
        repository: "owner/name".
        private: visibility of a new repository; one that exists must have it already.
        overwrite: replace the files of a repository that exists; its history keeps the old ones.
        api: in place of `huggingface_hub.HfApi()`.
    Raises:
        NotFound: if the directory holds no manifest.
        CheckpointError: if a file is not as it was exported, is missing, or changes while it is read.
        ArgumentError: if the repository has no valid name, or is not as private as asked.
        TargetExists: if the repository holds something and overwrite is False.
        HubError: if the hub refuses or cannot be reached.
    """
    _check_name(repository)
    place = user_path(directory)
    found = verification(place)
    if not found.whole:
        raise CheckpointError(
            f"{place.absolute()} is not what its {MANIFEST} says was exported: {found.describe()}; export it again, or put the files back"
        )
    planned = Push(repository, private, dict(found.files), found.unlisted, found.manifest)
    if not yes:
        return planned
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi()
    with _hub(repository):
        stale = _stale(api, planned, overwrite)
    operations = _operations(place, found, stale)
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


def _stale(api: Any, planned: Push, overwrite: bool) -> list[str] | None:
    """Files that a repository holds beyond the push; None where there is no repository yet."""
    name = planned.repository
    if not api.repo_exists(name, repo_type="model"):
        return None
    there = api.repo_info(name, repo_type="model")
    if bool(there.private) != planned.private:
        raise ArgumentError(
            f"{name} exists and is {'private' if there.private else 'public'}, asked was {'private' if planned.private else 'public'}; "
            "change it on the hub, or ask for what it is"
        )
    held = [sibling.rfilename for sibling in there.siblings or () if sibling.rfilename not in KEPT]
    if held and not overwrite:
        raise TargetExists(
            f"{name} holds {len(held)} files, such as {held[0]}; pass overwrite=True to replace them, or give another name"
        )
    return [file for file in held if file not in planned.files]


def _operations(place: Path, found: Verification, stale: list[str] | None) -> list[Any]:
    """One addition a file, of the very bytes that were verified, and the deletion of what lies there beyond them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(place / name)) for name in found.files]
    there = entries(place)
    for operation in additions:
        name = operation.path_in_repo
        regular = name in there and stat.S_ISREG(there[name].st_mode)
        if not regular or (
            name not in (MANIFEST, CARD) and operation.upload_info.sha256.hex() != found.manifest["files"][name]
        ):
            raise CheckpointError(f"{place / name} changed while it was read; nothing was uploaded")
    return [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale or ())]


@contextmanager
def _hub(repository: str) -> Iterator[None]:
    """Whatever the client or the hub says becomes one error of repedit, with the cause kept.

    Raises:
        HubError.
    """
    from repedit.errors import RepeditError

    try:
        yield
    except RepeditError:
        raise
    except Exception as error:
        raise HubError(
            f"the hub did not take {repository}: {type(error).__name__}: {str(error).strip() or 'no reason given'}; log in with "
            "`hf auth login` or set HF_TOKEN, and see that the owner is yours"
        ) from error
