"""What is uploaded is what was exported, only when told to, and privately unless told otherwise. No network: the hub is a stand-in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import repedit as rp
from repedit.cli import app
from repedit.errors import ArgumentError, CheckpointError, HubError, NotFound, RepeditError, TargetExists
from repedit.rewrite import hub as publishing
from repedit.rewrite.verification import verification
from tests.saved_models import saved

NAME = "someone/edited"


@dataclass
class Hub:
    """Repositories by name: (private, files); and every call that would have gone over the network."""

    held: dict[str, tuple[bool, set[str]]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    uploaded: dict[str, Path | bytes] = field(default_factory=dict)

    def repo_exists(self, name: str, *, repo_type: str) -> bool:
        self.calls.append("exists")
        return name in self.held

    def repo_info(self, name: str, *, repo_type: str) -> Any:
        private, files = self.held[name]
        return SimpleNamespace(private=private, siblings=[SimpleNamespace(rfilename=file) for file in sorted(files)])

    def create_repo(self, name: str, *, private: bool, repo_type: str, exist_ok: bool) -> None:
        self.calls.append("create")
        assert name not in self.held and not exist_ok
        self.held[name] = (private, {".gitattributes"})

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str, repo_type: str) -> Any:
        self.calls.append("commit")
        files = self.held[name][1]
        for operation in operations:
            if hasattr(operation, "upload_info"):
                files.add(operation.path_in_repo)
                content = operation.path_or_fileobj
                self.uploaded[operation.path_in_repo] = content if isinstance(content, bytes) else Path(content)
            else:
                files.remove(operation.path_in_repo)
        return SimpleNamespace(commit_url=f"hub/{name}/commit/1")


@pytest.fixture
def exported(tmp_path) -> Path:
    subject = rp.load(saved(tmp_path / "base"))
    keep = torch.ones(128, dtype=torch.bool)
    keep[:5] = False
    edit = rp.Edit({rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(keep)}, {"method": "by hand"})
    rp.export(edit, subject, tmp_path / "edited")
    return tmp_path / "edited"


def pushed(folder: Path, hub: Hub, **options: Any) -> Any:
    return rp.push(folder, NAME, api=hub, **({"yes": True} | options))


def test_what_is_uploaded_is_the_manifest_and_what_it_lists(exported):
    (exported / "notes.txt").write_text("mine")
    (exported / "secrets").mkdir()
    (exported / "secrets" / "token").write_text("mine too")
    hub = Hub()
    found = pushed(exported, hub)
    listed = set(json.loads((exported / "repedit.json").read_text())["files"])
    assert set(hub.uploaded) == listed | {"repedit.json", "README.md"} == set(found.files)
    assert found.unlisted == ("notes.txt", "secrets/token") and found.url == f"hub/{NAME}/commit/1"
    assert all(path.parent == exported for path in hub.uploaded.values())


def test_without_yes_nothing_is_called(exported):
    hub = Hub()
    found = pushed(exported, hub, yes=False)
    assert hub.calls == [] and found.url is None and found.size == sum(p.stat().st_size for p in exported.iterdir())


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_is_private_unless_told_otherwise(exported, private):
    hub = Hub()
    pushed(exported, hub, **({} if private else {"private": False}))
    assert hub.held[NAME][0] is private


def test_a_changed_file_is_refused_before_anything_is_called(exported):
    hub = Hub()
    (exported / "config.json").write_text((exported / "config.json").read_text() + " ")
    for yes in (True, False):
        with pytest.raises(
            CheckpointError,
            match=r"not what its repedit\.json says was exported: changed since the export: config\.json; export it again",
        ):
            pushed(exported, hub, yes=yes)
    assert hub.calls == []


def test_a_change_that_is_not_looked_for_would_be_caught(exported, monkeypatch):
    honest = verification(exported)
    monkeypatch.setattr(publishing, "verification", lambda place: honest)
    (exported / "config.json").write_text((exported / "config.json").read_text() + " ")
    hub = Hub()
    with pytest.raises(CheckpointError, match=r"config\.json changed while it was read; nothing was uploaded"):
        pushed(exported, hub)
    assert "commit" not in hub.calls and "create" not in hub.calls


def test_a_missing_file_is_refused(exported):
    (exported / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"missing: tokenizer_config\.json"):
        pushed(exported, Hub())


def test_a_directory_without_a_manifest_is_refused(exported, tmp_path):
    with pytest.raises(NotFound, match=r"base holds no repedit\.json; give a directory that repedit exported"):
        pushed(tmp_path / "base", Hub())


@pytest.mark.parametrize("files", ['{"../base/config.json": "0"}', '{"": "0"}', "[1]", "null"])
def test_a_manifest_that_reaches_out_is_refused(exported, files):
    (exported / "repedit.json").write_text(f'{{"files": {files}}}')
    with pytest.raises(
        CheckpointError, match=r"which is no file of its directory|is not a manifest with hashes of files"
    ):
        pushed(exported, Hub())


def test_an_adapter_can_be_pushed(exported, tmp_path):
    subject = rp.load(tmp_path / "base")
    basis = torch.linalg.qr(torch.randn(subject.layout.width, 2, generator=torch.Generator().manual_seed(0)))[0]
    edit = rp.Edit({rp.Site.parse("0.mlp.out"): rp.LowRank.projection(basis)}, {"method": "by hand"})
    rp.export_adapter(edit, subject, tmp_path / "lora")
    hub = Hub()
    pushed(tmp_path / "lora", hub)
    assert set(hub.uploaded) == {"adapter_config.json", "adapter_model.safetensors", "repedit.json"}


def test_what_is_there_is_replaced_only_on_request_and_wholly(exported):
    hub = Hub({NAME: (True, {".gitattributes", "old.safetensors", "config.json"})})
    with pytest.raises(TargetExists, match=r"holds 2 files, such as config\.json; pass overwrite=True"):
        pushed(exported, hub)
    assert "commit" not in hub.calls
    found = pushed(exported, hub, overwrite=True)
    assert hub.held[NAME][1] == {*found.files, ".gitattributes"}


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_another_visibility_is_left_alone(exported, private):
    hub = Hub({NAME: (not private, set())})
    with pytest.raises(
        ArgumentError, match=r"exists and is (public|private), (public|private) was asked for; change it on the hub"
    ):
        pushed(exported, hub, private=private, overwrite=True)
    assert "commit" not in hub.calls


@pytest.mark.parametrize("name", ["edited", "some one/edited", "a/b/c", ""])
def test_names_that_are_none_are_refused(exported, name):
    with pytest.raises(ArgumentError, match="names no repository"):
        rp.push(exported, name, yes=True, api=Hub())


def test_what_the_hub_says_is_passed_on(exported, monkeypatch):
    def refused(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(Hub, "create_repo", refused)
    with pytest.raises(HubError, match=r"did not take someone/edited: ConnectionError: offline; log in with") as caught:
        pushed(exported, Hub())
    assert isinstance(caught.value.__cause__, ConnectionError)


# The command line.


def test_the_command_line_shows_and_ends_with_three(exported, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the hub was asked"))
    result = CliRunner().invoke(app, ["push", str(exported), NAME])
    assert result.exit_code == 3, result.output + str(result.exception)
    for words in (f"{NAME} (private)", "model.safetensors", "every file has the hash", "nothing was uploaded", "--yes"):
        assert words in result.stdout


def test_the_command_line_uploads_when_told_to(exported, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    result = CliRunner().invoke(app, ["push", str(exported), NAME, "--yes", "--public", "--json"])
    assert result.exit_code == 0, result.output + str(result.exception)
    found = json.loads(result.stdout)
    assert found["private"] is False and found["url"] and set(found["files"]) == set(hub.uploaded)


def test_the_command_line_refuses_with_an_error_of_repedit(exported):
    (exported / "repedit.json").unlink()
    result = CliRunner().invoke(app, ["push", str(exported), NAME])
    assert isinstance(result.exception, RepeditError)


# An edit or a delta as a file of its own.


def an_edit() -> rp.Edit:
    keep = torch.ones(8, dtype=torch.bool)
    keep[2] = False
    return rp.Edit({rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(keep)}, {"method": "by hand"})


def check_round_trip(value: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from the hub is what was uploaded; what the repository held before stays."""
    hub = Hub({NAME: (True, {"model.safetensors"})})
    name = f"{type(value).__name__.lower()}.safetensors"
    assert pushed(value, hub, yes=False).url is None and hub.calls == []
    assert set(pushed(value, hub).files) == {name} and hub.held[NAME][1] == {"model.safetensors", name}

    def download(repository: str, file: str, revision: str | None = None) -> str:
        assert (repository, revision) == (NAME, None)
        (folder / file).write_bytes(hub.uploaded[file])
        return str(folder / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    loaded = type(value).load(f"hf://{NAME}/{name}")
    value.save(folder / "again.safetensors")
    assert (folder / name).read_bytes() == (folder / "again.safetensors").read_bytes()
    assert loaded.provenance == value.provenance
    with pytest.raises(TargetExists, match=rf"holds {name} already; pass overwrite=True"):
        pushed(value, hub)
    pushed(value, hub, overwrite=True)
    assert "model.safetensors" in hub.held[NAME][1]


@pytest.mark.parametrize(
    "value", [an_edit(), rp.Delta({"w": torch.ones(2, 2)}, {"method": "npo"})], ids=["edit", "delta"]
)
def test_a_value_comes_back_from_the_hub(value, tmp_path, monkeypatch):
    check_round_trip(value, tmp_path, monkeypatch)


def test_an_upload_that_deletes_what_it_does_not_hold_would_be_caught(tmp_path, monkeypatch):
    from huggingface_hub import CommitOperationDelete

    honest = publishing._commit
    monkeypatch.setattr(
        publishing, "_commit",
        lambda api, planned, operations, *rest: honest(
            api, planned, [*operations, CommitOperationDelete(path_in_repo="model.safetensors")], *rest
        ),
    )  # fmt: skip
    with pytest.raises(AssertionError):
        check_round_trip(an_edit(), tmp_path, monkeypatch)


def test_a_file_of_an_edit_is_uploaded_under_its_name(tmp_path):
    an_edit().save(tmp_path / "no-code.safetensors")
    hub = Hub()
    found = pushed(tmp_path / "no-code.safetensors", hub)
    assert set(hub.uploaded) == {"no-code.safetensors"} and hub.held[NAME][0]
    assert "1 file, " in found.describe() and "an edit in a file of its own: by hand" in found.describe()


def test_a_file_that_holds_no_edit_is_refused(exported):
    hub = Hub()
    with pytest.raises(CheckpointError, match=r"model\.safetensors holds no edit and no delta; give a file"):
        pushed(exported / "model.safetensors", hub)
    assert hub.calls == []


@pytest.mark.parametrize("address", ["hf://owner", "hf://owner/name", "hf:/owner/name@main"])
def test_an_address_without_a_file_is_refused(address):
    with pytest.raises(ArgumentError, match=r"is no file of the hub; write hf://owner/name/file"):
        rp.Edit.load(address)


def test_a_download_that_fails_is_named(monkeypatch):
    def refused(*words: str, revision: str | None) -> str:
        raise OSError(f"no {words} at {revision}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(
        HubError, match=r"could not be downloaded: OSError: no \('o/n', 'e\.safetensors'\) at v2; check"
    ):
        rp.Edit.load("hf://o/n@v2/e.safetensors")


@pytest.mark.parametrize(
    ("address", "revision", "file"),
    [("@v2/a/e.safetensors", "v2", "a/e.safetensors"), ("@refs/pr/7/e.safetensors", "refs/pr/7", "e.safetensors"), ("/refs/pr/e", None, "refs/pr/e")],
)  # fmt: skip
def test_revisions_of_the_hub_may_be_pull_requests(address, revision, file, monkeypatch):
    def asked(*words: str, revision: str | None) -> str:
        raise OSError(f"{words} at {revision}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", asked)
    with pytest.raises(HubError) as raised:
        rp.Edit.load(f"hf://o/n{address}")
    assert f"('o/n', '{file}') at {revision}" in str(raised.value)


def test_a_damaged_edit_is_not_uploaded_and_a_delta_is_called_one(tmp_path):
    from repedit.io import archive

    hub = Hub()
    archive.write(tmp_path / "e.safetensors", "edit", {"x": torch.ones(2)}, {"maps": {}, "provenance": {}})
    with pytest.raises(CheckpointError, match="it holds tensors that belong to no map"):
        pushed(tmp_path / "e.safetensors", hub)
    assert hub.calls == []
    assert (
        "a delta in a file of its own: npo" in pushed(rp.Delta({"w": torch.ones(2)}, {"method": "npo"}), hub).describe()
    )
