"""Exported files: what is untouched is byte-identical, what is touched is what was planned, and a crash leaves nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import repedit as rp
from repedit.errors import NoOpEdit, TargetExists
from repedit.io.checkpoint import INDEX, SINGLE, open_shards
from repedit.models.subject import subject_of
from tests.damaged_checkpoints import sha
from tests.edits import fill, mask, projection
from tests.tiny import logits, tiny


@pytest.fixture
def edit():
    return mask(tiny("llama"), "1.mlp.neurons")


def identity():
    return mask(tiny("llama"), "1.mlp.neurons", share=0.0)


def loaded(folder):
    """The exported model, and its logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    return rp.wrap(model)


def raw(folder):
    """The bytes of every tensor, cut out of the files by the offsets of their headers."""
    entries = open_shards(folder).entries
    return {name: (folder / e.file).read_bytes()[e.start : e.stop] for name, e in entries.items()}


def test_only_planned_tensors_change_a_byte(source, edit, tmp_path):
    record = rp.export(edit, source, tmp_path / "out")
    before, after = raw(source), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == set(record.plan)


@pytest.mark.parametrize(("link", "mode"), [(True, 0o444), (True, 0o644), (False, 0o444)])
def test_untouched_shards_that_nobody_may_write_are_hard_links_and_copies_on_request(
    link, mode, source, edit, tmp_path
):
    folder = shutil.copytree(source, tmp_path / "in")
    for path in folder.glob("model*"):
        path.chmod(mode)
    record = rp.export(edit, folder, tmp_path / "out", link=link)
    untouched = set(open_shards(folder).files) - {open_shards(folder).entries[name].file for name in record.plan}
    assert untouched and all(sha(folder / file) == sha(tmp_path / "out" / file) for file in untouched)
    linked = {file for file in untouched if (folder / file).samefile(tmp_path / "out" / file)}
    assert linked == set(record.hard_links) == (untouched if link and mode == 0o444 else set())


def test_a_source_that_is_written_in_place_leaves_the_export_as_it_is(source, edit, tmp_path):
    folder = shutil.copytree(source, tmp_path / "in")
    rp.export(edit, folder, tmp_path / "out")
    before = {path.name: sha(path) for path in (tmp_path / "out").iterdir()}
    for path in folder.glob("model*.safetensors"):
        with open(path, "r+b") as file:
            file.seek(-4, 2), file.write(bytes(4))
    assert {path.name: sha(path) for path in (tmp_path / "out").iterdir()} == before


def test_hard_links_to_files_that_may_be_written_would_be_caught(source, edit, tmp_path, monkeypatch):
    monkeypatch.setattr("repedit.io.files.can_hard_link", lambda path: True)
    with pytest.raises(AssertionError):
        test_a_source_that_is_written_in_place_leaves_the_export_as_it_is(source, edit, tmp_path)


def test_the_source_is_never_written(source, edit, tmp_path):
    before = {path.name: sha(path) for path in source.iterdir()}
    rp.export(edit, source, tmp_path / "out")
    rp.export(projection(tiny("llama"), "0.resid.pre"), source, tmp_path / "untied")
    assert {path.name: sha(path) for path in source.iterdir()} == before


def test_an_identity_edit_is_refused(source, tmp_path):
    with pytest.raises(NoOpEdit, match=r"changes nothing: .* tensors came out equal.* rounding.*allow_identity=True"):
        rp.export(identity(), source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_allowed_identity_edit_changes_no_file(source, tmp_path):
    rp.export(identity(), source, tmp_path / "out", allow_identity=True)
    names = [*open_shards(source).files, INDEX, "config.json", "generation_config.json", "tokenizer.json"]
    assert all((source / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


def test_an_edit_that_rounding_swallows_is_refused(tmp_path):
    subject = tiny("llama", torch.bfloat16)
    almost = rp.Edit({rp.Site.parse("1.mlp.neurons"): rp.Diagonal(torch.full((40,), 1 + 1e-5))})
    with pytest.raises(NoOpEdit, match="lost to rounding in this dtype"):
        rp.export(almost, subject, tmp_path / "out")


def test_an_existing_target_is_kept_unless_overwritten(source, edit, tmp_path):
    (tmp_path / "out").mkdir()
    rp.export(edit, source, tmp_path / "out")  # an empty directory is no loss
    with pytest.raises(TargetExists, match="out exists; pass overwrite=True"):
        rp.export(edit, source, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(
        TargetExists, match=r"out is not replaced: it holds files that are not of the export: mine\.txt"
    ):
        rp.export(edit, source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "mine.txt").unlink()
    rp.export(projection(tiny("llama"), "0.mlp.out"), source, tmp_path / "out", overwrite=True)
    assert "0.mlp.out" in (tmp_path / "out" / "README.md").read_text() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("place", [".", "inside", "inside/deep", ".."])
def test_a_target_in_around_or_at_the_source_is_refused(source, edit, place):
    before = sorted(source.iterdir())
    with pytest.raises(TargetExists, match="are the same or one lies inside the other; give another target"):
        rp.export(edit, source, source / place, overwrite=True)
    assert sorted(source.iterdir()) == before


def test_a_link_to_the_source_is_the_source(source, edit, tmp_path):
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(TargetExists, match="are the same"):
        rp.export(edit, tmp_path / "link", source, overwrite=True)


def in_hub_cache(source, cache):
    """A snapshot of a model as the hub's client keeps it: links to blobs that are named by their hash."""
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123456789"
    snapshot.mkdir(parents=True)
    shutil.copytree(source, repository / "all")
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for path in (repository / "all").iterdir():
        blob = path.rename(repository / "blobs" / sha(path))
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_linked_sources_are_resolved(source, edit, tmp_path):
    snapshot = in_hub_cache(source, tmp_path)
    record = rp.export(edit, snapshot, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (
        record.base["name"] == "someone/tiny"
        and "base_model: someone/tiny\n" in (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize("grow", [lambda s: fill(s, "1.mlp.neurons"), lambda s: projection(s, "0.resid.pre")])
def test_a_single_file_that_gains_a_tensor_gets_an_index(grow, tmp_path):
    subject = tiny("llama")
    rp.export(grow(subject), subject, tmp_path / "out")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert not (tmp_path / "out" / SINGLE).exists() and index["weight_map"].keys() == raw(tmp_path / "out").keys()
    assert index["metadata"]["total_size"] == sum(map(len, raw(tmp_path / "out").values()))
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(rp.apply(grow(subject), subject)))


def test_an_export_of_an_export_adds_beside_what_was_added(source, tmp_path):
    first, second = projection(tiny("llama"), "0.resid.pre"), fill(tiny("llama"), "1.mlp.neurons")
    rp.export(first, source, tmp_path / "one")
    before = {path.name: sha(path) for path in (tmp_path / "one").iterdir()}
    rp.export(second, tmp_path / "one", tmp_path / "two")
    assert {path.name: sha(path) for path in (tmp_path / "one").iterdir()} == before
    expected = rp.apply(second, rp.apply(first, tiny("llama")))
    assert torch.equal(logits(loaded(tmp_path / "two")), logits(expected))


@pytest.mark.parametrize("tied", ["untie", "both"])
def test_files_that_hold_a_tied_head_stay_consistent(tied, tmp_path):
    subject, edit = tiny("llama"), projection(tiny("llama"), "0.resid.pre")
    subject.model.save_pretrained(tmp_path / "in")
    weights = load_file(tmp_path / "in" / SINGLE)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, tmp_path / "in" / SINGLE, metadata={"format": "pt"})
    rp.export(edit, tmp_path / "in", tmp_path / "out", tied=tied)
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(rp.apply(edit, subject, tied=tied)))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_dtype_converts_every_tensor(family, tmp_path):
    subject, edit = tiny(family), mask(tiny(family), "1.mlp.neurons")
    rp.export(edit, subject, tmp_path / "out", dtype="bfloat16")
    assert {spec.dtype for spec in open_shards(tmp_path / "out").specs.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = rp.apply(edit, subject).model.to(torch.bfloat16)
    found = dict(loaded(tmp_path / "out").model.named_parameters())
    assert all(torch.equal(found[name], p) and p.dtype == found[name].dtype for name, p in expected.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmoe"])
def test_streaming_a_directory_equals_exporting_from_memory(family, tmp_path):
    subject, edit = tiny(family), mask(tiny(family), "1.mlp.neurons") | mask(tiny(family), "0.mlp.out", 0.2)
    subject.model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    rp.export(edit, tmp_path / "in", tmp_path / "streamed")
    rp.export(edit, subject, tmp_path / "saved", max_shard_size="20KB")
    for path in (*(tmp_path / "saved").glob("model*"), tmp_path / "saved" / "config.json"):
        assert path.read_bytes() == (tmp_path / "streamed" / path.name).read_bytes()


def test_weights_changed_in_memory_are_the_ones_exported(source, edit, tmp_path):
    plain = shutil.copytree(source, tmp_path / "plain", ignore=shutil.ignore_patterns("adapter_config.json"))
    subject = subject_of(AutoModelForCausalLM.from_pretrained(plain), source=plain)
    subject.model.model.norm.weight.data.fill_(0.25)
    rp.export(edit, subject, tmp_path / "out")
    assert bool((open_shards(tmp_path / "out").read("model.norm.weight") == 0.25).all())
