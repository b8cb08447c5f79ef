"""An export that was killed goes on where it was, believes no shard it cannot verify, and loses nothing that was there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import repedit as rp
from repedit.errors import TargetExists
from repedit.io import targets
from repedit.io.checkpoint import open_shards
from repedit.io.files import file_hashes
from repedit.io.text import JsonLines
from repedit.lower import lower
from repedit.rewrite import shards as resuming
from repedit.rewrite import shards as writing
from repedit.rewrite.slice import slice_plan
from tests.edits import mask, projection
from tests.test_export_safety import content, dies_at
from tests.tiny import tiny


@pytest.fixture
def edit():
    return projection(tiny("llama"), "0.mlp.out") | mask(tiny("llama"), "1.mlp.neurons")


@pytest.fixture
def whole(source, edit, tmp_path):
    """What an export that nobody disturbs makes."""
    rp.export(edit, source, tmp_path / "whole", link=False)
    return content(tmp_path / "whole")


def killed(source, edit, target, after, **options):
    """An export gone after so many finished shards; the directory it leaves."""
    calls = iter(range(100))

    def cut_off():
        original = resuming.ShardJournal.add

        def add(journal, path, changes):
            original(journal, path, changes)
            if next(calls) == after - 1:
                os._exit(9)

        resuming.ShardJournal.add = add
        rp.export(edit, source, target, link=False, **options)

    assert not dies_at(10_000, cut_off)
    (place,) = target.parent.glob(f".{target.name}.partial-*")
    assert not target.exists()
    return place


@pytest.fixture
def written(monkeypatch):
    """Names of the shards written from here on."""
    found, original = [], writing._shard
    monkeypatch.setattr(writing, "_shard", lambda *a: (found.append(a[2].name), original(*a))[1])
    return found


@pytest.mark.parametrize("after", [1, 2, 3])
def test_finished_shards_are_not_written_again(after, source, edit, whole, tmp_path, written):
    killed(source, edit, tmp_path / "out", after)
    rp.export(edit, source, tmp_path / "out", link=False)
    assert len(written) == 3 - after and content(tmp_path / "out") == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("step", ["_write_config", "card", "sync_files", "install"])
def test_an_export_that_died_after_its_shards_goes_on(step, source, edit, tmp_path, written):
    """With companions in a folder of their own, as chat templates are, which are copied before the steps that die."""
    from repedit.rewrite import export

    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source/additional_chat_templates").mkdir()
    (tmp_path / "source/additional_chat_templates/tool.jinja").write_text("{{ messages }}")
    rp.export(edit, tmp_path / "source", tmp_path / "whole", link=False)
    written.clear()

    def dying():
        setattr(export, step, lambda *given, **options: os._exit(9))
        rp.export(edit, tmp_path / "source", tmp_path / "out", link=False)

    assert not dies_at(10_000, dying) and not (tmp_path / "out").exists()
    rp.export(edit, tmp_path / "source", tmp_path / "out", link=False)
    made, expected = (file_hashes(tmp_path / name) for name in ("out", "whole"))
    assert not written and made == expected and "additional_chat_templates/tool.jinja" in made


def damage(place):
    """One byte of the first finished shard turned."""
    path = place / "checkpoint" / json.loads((place / "finished.jsonl").read_text().splitlines()[0])["file"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 255
    path.write_bytes(data)


def test_a_finished_shard_that_changed_since_is_written_again(source, edit, whole, tmp_path, written):
    damage(killed(source, edit, tmp_path / "out", 2))
    rp.export(edit, source, tmp_path / "out", link=False)
    assert len(written) == 2 and content(tmp_path / "out") == whole


def test_believing_the_journal_unseen_is_caught(source, edit, whole, tmp_path, monkeypatch):
    damage(killed(source, edit, tmp_path / "out", 2))
    monkeypatch.setattr(
        resuming, "file_hash", lambda path: next(r["sha256"] for r in journal_of(path) if r["file"] == path.name)
    )
    monkeypatch.setattr(resuming.ShardJournal, "add", lambda *a: None)
    rp.export(edit, source, tmp_path / "out", link=False)
    assert content(tmp_path / "out") != whole


def journal_of(path):
    """What the journal says of the export that a shard belongs to."""
    return JsonLines(path.parent.parent / "finished.jsonl").rows


def test_a_line_that_was_cut_off_is_no_line(source, edit, whole, tmp_path, written):
    place = killed(source, edit, tmp_path / "out", 2)
    text = (place / "finished.jsonl").read_text()
    (place / "finished.jsonl").write_text(text[:-20])
    rp.export(edit, source, tmp_path / "out", link=False)
    assert len(written) == 2 and content(tmp_path / "out") == whole


def test_another_job_starts_anew_and_clears_up(source, edit, tmp_path, written):
    killed(source, edit, tmp_path / "out", 2)
    other = mask(tiny("llama"), "1.mlp.neurons")
    rp.export(other, source, tmp_path / "out", link=False)
    rp.export(other, source, tmp_path / "plain", link=False)
    assert len(written) == 6 and content(tmp_path / "out") == content(tmp_path / "plain")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "plain"]


def test_a_source_that_changed_is_another_job(source, edit, tmp_path, written):
    shutil.copytree(source, tmp_path / "in")
    killed(tmp_path / "in", edit, tmp_path / "out", 3)
    shard = open_shards(tmp_path / "in").files[0]
    shutil.copyfile(source / shard, tmp_path / "in" / "new")
    (tmp_path / "in" / "new").rename(tmp_path / "in" / shard)
    rp.export(edit, tmp_path / "in", tmp_path / "out", link=False)
    assert len(written) == 3


def test_jobs_differ_in_values_shapes_and_options(source, edit):
    subject, shards = tiny("llama"), open_shards(source)
    plans = [lower(e, subject.architecture, shards.specs) for e in (edit, edit, mask(subject, "1.mlp.neurons"))]
    basis = torch.eye(subject.layout.width)[:, : subject.architecture.n_heads]
    plans.append(slice_plan(rp.erase_stream(subject, basis), subject.architecture, shards.specs))
    names = [resuming.job(plan, shards, None, True) for plan in plans]
    names += [resuming.job(plans[0], shards, torch.float16, True), resuming.job(plans[0], shards, None, False)]
    assert names[0] == names[1] and len(set(names)) == 5


def test_an_old_target_comes_back_after_a_kill_between_the_renames(source, edit, tmp_path):
    out = tmp_path / "out"
    rp.export(edit, source, out)
    before = content(out)

    def cut_off():
        Path.rename = lambda self, target: os._exit(9) if self.name == "checkpoint" else rename(self, target)
        rp.export(mask(tiny("llama"), "1.mlp.neurons"), source, out, overwrite=True)

    rename = Path.rename
    assert not dies_at(10_000, cut_off) and not out.exists()
    with pytest.raises(rp.errors.TargetExists):
        rp.export(edit, source, out)
    assert content(out) == before


@pytest.mark.parametrize("other", [False, True])
def test_a_target_that_is_being_written_is_refused_to_everybody_else(other, source, edit, tmp_path, written):
    killed(source, edit, tmp_path / "out", 2)
    change = mask(tiny("llama"), "1.mlp.neurons") if other else edit
    with (
        targets._locked_staging(tmp_path / "out"),
        pytest.raises(TargetExists, match="out is being written by another export; wait for it"),
    ):
        rp.export(change, source, tmp_path / "out", link=False, overwrite=True)
    rp.export(edit, source, tmp_path / "out", link=False)
    assert len(written) == 1 and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_version_of_repedit_starts_anew(source, edit, tmp_path, written, monkeypatch):
    killed(source, edit, tmp_path / "out", 2)
    monkeypatch.setattr(resuming, "package_versions", lambda *names: {"torch": "0.0"})
    rp.export(edit, source, tmp_path / "out", link=False)
    assert len(written) == 3
