"""What an export reads: the very files the model was loaded from, everything that belongs to them, and nothing from outside."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch
import yaml

import repedit as rp
from repedit.delta import Delta
from repedit.errors import CheckpointError
from repedit.hashing import value_hash
from repedit.io import checkpoint
from repedit.io.checkpoint import INDEX, SINGLE, open_shards
from repedit.lower import lower
from repedit.rewrite import export, shards
from tests.edits import mask, projection
from tests.saved_models import byte_tokenizer
from tests.test_export import in_hub_cache
from tests.tiny import logits, tiny

KEPT = {
    "tokenizer.model": "pieces",
    "LICENSE": "the licence",
    "NOTICE.txt": "notice",
    "images/one.png": "picture",
    "additional_chat_templates/tool.jinja": "{{ tool }}",
    "preprocessor_config.json": "{}",
}
LEFT = {"optimizer.pt": "pickle", "handler.py": "code", "original/consolidated.pth": "pickle", "checkpoint-50/": "training", "copy.gguf": "weights"}  # fmt: skip


def written(folder, dtype=torch.float32, **options):
    """A checkpoint with a tokenizer, files that belong to it and files that do not."""
    model = tiny("llama", dtype, vocab_size=260, intermediate_size=128).model
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    for name, text in {**KEPT, **LEFT, "README.md": "---\nlicense: mit\n---\nThe card of the base."}.items():
        path = folder / name / "rng_state.pth" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def edit_of(subject):
    return mask(subject, "1.mlp.neurons")


def check_complete(out, record):
    """Everything that belongs to the source is in an export, and what is left out is said."""
    assert {name: (out / name).read_text() for name in KEPT} == KEPT
    assert {"tokenizer.json", "generation_config.json", *KEPT} <= set(record.files)
    assert (
        not any((out / name).exists() for name in LEFT)
        and {n: w for n, w in LEFT.items() if w in record.left_out[n]} == LEFT
    )
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["license"] == "mit" and "The card of the base." in (out / "README.md").read_text()


# The files are those that were loaded.


def replaced(folder):
    shutil.copyfile(folder / SINGLE, folder / "new")
    (folder / "new").rename(folder / SINGLE)


def rewritten(folder):
    with open(folder / SINGLE, "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f")


def deleted(folder):
    (folder / SINGLE).unlink()


def grown(folder):
    shutil.copyfile(folder / SINGLE, folder / "model-00002-of-00002.safetensors")


def text(name, content="{}"):
    return lambda folder: (folder / name).write_text(content)


def hidden(change, name=SINGLE):
    """A change after which the time of modification of the file is set back."""

    def function(folder):
        before = (folder / name).stat()
        change(folder)
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    return function


def other_epsilon(folder):
    """A config of the same size."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e', '"rms_norm_eps": 2e'))


CHANGES = {
    "weights, hidden": (hidden(rewritten), SINGLE), "a config, hidden": (hidden(other_epsilon, "config.json"), "config.json"),
    "replaced": (replaced, SINGLE), "rewritten in place": (rewritten, SINGLE), "deleted": (deleted, SINGLE),
    "a shard more": (grown, "model-00002-of-00002.safetensors"), "an index": (text(INDEX), INDEX),
    "another config": (text("config.json"), "config.json"), "another tokenizer": (text("tokenizer.json"), "tokenizer.json"),
    "more tokens": (text("added_tokens.json"), "added_tokens.json"), "no folder": (shutil.rmtree, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_files_that_changed_since_the_model_was_loaded_are_refused(kind, tmp_path):
    subject = rp.load(written(tmp_path / "in"))
    change, name = CHANGES[kind]
    change(tmp_path / "in")
    with pytest.raises(CheckpointError, match=rf"changed since the model was loaded: .*{name}.*; load the model again"):
        rp.export(edit_of(subject), subject, tmp_path / "out")
    assert (subject.files is None or subject.touched_files() == {name}) and not (tmp_path / "out").exists()


def test_a_state_without_the_time_of_change_is_caught(tmp_path, monkeypatch):
    right = checkpoint.file_state
    monkeypatch.setattr(checkpoint, "file_state", lambda path: right(path)[:-1])
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_files_that_changed_since_the_model_was_loaded_are_refused("weights, hidden", tmp_path)


@pytest.mark.parametrize("change", ["permissions", "a hard link", "the same bytes"])
def test_files_of_which_nothing_but_the_time_of_change_differs_are_exported(change, tmp_path):
    subject = rp.load(written(tmp_path / "in"))
    file = tmp_path / "in" / SINGLE
    match change:
        case "permissions":
            file.chmod(0o444)
        case "a hard link":
            os.link(file, tmp_path / "backup")
        case "the same bytes":
            hidden(lambda folder: file.write_bytes(file.read_bytes()))(tmp_path / "in")
    assert subject.touched_files() == {SINGLE}
    rp.export(edit_of(subject), subject, tmp_path / "out")
    assert subject.files == tmp_path / "in" and (tmp_path / "out").exists()


def test_what_the_message_advises_exports_the_model_in_memory(tmp_path):
    subject = rp.load(written(tmp_path / "in"))
    before = logits(subject)
    rewritten(tmp_path / "in")
    assert torch.equal(logits(subject), before)
    rp.export(edit_of(subject), rp.wrap(subject.model, subject.tokenizer), tmp_path / "out")
    assert torch.equal(logits(rp.load(tmp_path / "out")), logits(rp.apply(edit_of(subject), subject)))


def test_notes_and_licences_may_change(tmp_path):
    subject = rp.load(written(tmp_path / "in"))
    for name in ("README.md", "LICENSE", "notes.txt"):
        (tmp_path / "in" / name).write_text("newer")
    rp.export(edit_of(subject), subject, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "newer"


def changing(folder, at, shard=shards._shard, set_back=False):
    """_shard, with another process that rewrites a file of the source beside the n-th call."""
    calls = iter(range(100))

    def function(*arguments):
        if next(calls) == at:
            path = folder / open_shards(folder).files[0]
            data, before = path.read_bytes(), path.stat()
            path.write_bytes(data[:-4] + bytes(4))
            if set_back:
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return shard(*arguments)

    return function


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("set_back", [False, True])
def test_a_source_that_changes_while_it_is_exported_is_refused(at, loaded, set_back, tmp_path, monkeypatch):
    written(tmp_path / "in", max_shard_size="60KB")
    subject = rp.load(tmp_path / "in")
    monkeypatch.setattr(shards, "_shard", changing(tmp_path / "in", at, set_back=set_back))
    with pytest.raises(CheckpointError, match=r"changed while it was exported: model-0.*; export it again"):
        rp.export(edit_of(subject), subject if loaded else tmp_path / "in", tmp_path / "out", link=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_source_whose_change_is_not_looked_for_would_be_caught(tmp_path, monkeypatch):
    written(tmp_path / "in", max_shard_size="60KB")
    monkeypatch.setattr(shards, "_shard", changing(tmp_path / "in", 1))
    monkeypatch.setattr(export, "check_unchanged", lambda *_: None)
    rp.export(edit_of(rp.load(tmp_path / "in")), tmp_path / "in", tmp_path / "out", link=False)
    assert (tmp_path / "out").exists()


def test_an_export_that_was_killed_is_not_continued_from_other_weights(tmp_path):
    subject = rp.load(written(tmp_path / "in"))
    plan, stored = lower(edit_of(subject), subject.architecture, subject.specs), open_shards(tmp_path / "in")
    keys = [shards.job(plan, stored, None, True)]
    for change in (lambda folder: None, hidden(rewritten)):
        change(tmp_path / "in")
        keys.append(shards.job(plan, stored, None, True))
    assert keys[0] == keys[1] != keys[2]


def test_a_relative_path_stays_the_directory_it_was(tmp_path, monkeypatch):
    written(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    subject = rp.load("in")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rp.export(edit_of(subject), subject, tmp_path / "out")
    assert subject.files == tmp_path / "in" and (tmp_path / "out" / SINGLE).exists()


@pytest.mark.parametrize("kept", ["disk", "cpu"])
def test_an_offloaded_model_exports_after_a_pass_as_before(kept, tmp_path):
    written(tmp_path / "in", max_shard_size="60KB")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "lm_head", "model.rotary_emb"), "cpu")
    subject = rp.load(tmp_path / "in", device_map=places | {"model.layers.1": kept})
    for name in ("one", "two"):
        rp.export(edit_of(tiny("llama", vocab_size=260, intermediate_size=128)), subject, tmp_path / name)
        logits(subject)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two")]
    assert files[0] == files[1] and subject.files is not None


# Everything that belongs to the source goes along.


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16", "float16"])
def test_a_loaded_model_is_streamed_in_the_dtype_of_its_files(stored, asked, tmp_path):
    subject = rp.load(written(tmp_path / "in", stored), dtype=asked)
    record = rp.export(edit_of(subject), subject, tmp_path / "out")
    rp.export(edit_of(subject), tmp_path / "in", tmp_path / "streamed")
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "streamed" / SINGLE).read_bytes()
    assert (tmp_path / "out" / SINGLE).stat().st_size == (tmp_path / "in" / SINGLE).stat().st_size
    check_complete(tmp_path / "out", record)


def small_change(subject):
    """A delta that holds the hashes of the weights it was trained from, as training writes it."""
    name = "model.layers.1.mlp.down_proj.weight"
    return Delta(
        {name: torch.full_like(subject.value(name), 0.5, dtype=torch.float32)},
        {"start": {name: value_hash(subject.value(name))}},
    )


@pytest.mark.parametrize("asked", ["auto", "bfloat16"])
def test_a_delta_is_added_to_the_weights_it_was_trained_from(asked, tmp_path):
    subject = rp.load(written(tmp_path / "in"), dtype=asked)
    record = rp.export(small_change(subject), subject, tmp_path / "out")
    expected = rp.apply(small_change(subject), subject)
    assert torch.equal(logits(rp.load(tmp_path / "out")), logits(expected))
    check_complete(tmp_path / "out", record)


def in_memory(subject):
    subject.model.model.norm.weight.data.fill_(0.25)
    return subject


MODELS = {
    "edited": lambda s: rp.apply(projection(s, "0.mlp.out"), s),
    "edited twice": lambda s: rp.apply(projection(s, "1.mlp.out"), rp.apply(projection(s, "0.mlp.out"), s)),
    "slimmed": lambda s: rp.slimmed(edit_of(s) | mask(s, "0.mlp.neurons"), s),
    "changed in memory": in_memory,
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_in_memory_keeps_what_belongs_to_its_origin(kind, tmp_path):
    subject = MODELS[kind](rp.load(written(tmp_path / "in")))
    record = rp.export(edit_of(subject), subject, tmp_path / "out")
    check_complete(tmp_path / "out", record)
    assert torch.equal(logits(rp.load(tmp_path / "out")), logits(rp.apply(edit_of(subject), subject)))
    assert "Weights in memory of in, edited" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("structure", ["slim", "slice"])
def test_other_shapes_keep_it_too(structure, tmp_path):
    subject = rp.load(written(tmp_path / "in", torch.float16))
    basis = torch.eye(subject.layout.width)[:, : subject.architecture.n_heads]
    edit = (
        rp.erase_stream(subject, basis) if structure == "slice" else edit_of(subject) | mask(subject, "0.mlp.neurons")
    )
    check_complete(tmp_path / "out", rp.export(edit, subject, tmp_path / "out", structure=structure))


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_hub_id_is_its_snapshot(revision, tmp_path, monkeypatch):
    snapshot = in_hub_cache(flat(written(tmp_path / "in")), tmp_path)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    subject = rp.load("someone/tiny", revision=revision)
    assert subject.files == snapshot
    record = rp.export(edit_of(subject), subject, tmp_path / "out")
    assert record.base["name"] == "someone/tiny" and {"LICENSE", "tokenizer.model"} <= set(record.files)
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    rp.export_adapter(projection(subject, "0.mlp.out"), subject, tmp_path / "lora")
    assert (
        json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    )


def flat(folder):
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return folder


# Nothing from outside goes along.


@pytest.fixture
def linked(tmp_path):
    (tmp_path / "id_rsa").write_text("PRIVATE")
    return written(tmp_path / "in")


LEAVING = {
    "vocab.txt": lambda folder: (folder / "vocab.txt").symlink_to(folder.parent / "id_rsa"),
    "notes.md": lambda folder: (folder / "notes.md").symlink_to("../id_rsa"),
    "README.md": lambda folder: moved_out(folder, "README.md"),
    "config.json": lambda folder: moved_out(folder, "config.json"),
    SINGLE: lambda folder: moved_out(folder, SINGLE),
    "images/key": lambda folder: (folder / "images" / "key").symlink_to(folder.parent / "id_rsa"),
    "chain": lambda folder: ((folder / "chain").symlink_to("chain2"), (folder / "chain2").symlink_to("../id_rsa")),
}  # fmt: skip


def moved_out(folder, name):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


@pytest.mark.parametrize("name", LEAVING)
def test_links_that_leave_the_checkpoint_are_refused(name, linked, tmp_path):
    LEAVING[name](linked)
    for source in (linked, rp.load(linked), rp.apply(edit_of(rp.load(linked)), rp.load(linked))):
        with pytest.raises(CheckpointError, match=rf"links to files outside it: {name} -> .*would be published"):
            rp.export(
                projection(tiny("llama", vocab_size=260, intermediate_size=128), "0.mlp.out"), source, tmp_path / "out"
            )
    assert not (tmp_path / "out").exists()


def test_an_imitated_cache_of_the_hub_may_link_to_its_own_blobs_only(tmp_path):
    snapshot = in_hub_cache(flat(written(tmp_path / "in")), tmp_path)
    (tmp_path / "models--other" / "blobs").mkdir(parents=True)
    (tmp_path / "models--other" / "blobs" / "key").write_text("PRIVATE")
    (snapshot / "vocab.txt").symlink_to("../../../models--other/blobs/key")
    with pytest.raises(CheckpointError, match=r"links to files outside it: vocab\.txt"):
        rp.export(edit_of(tiny("llama", vocab_size=260, intermediate_size=128)), snapshot, tmp_path / "out")


INSIDE = {
    "same.txt": ("LICENSE", None), "images/up.txt": ("../LICENSE", None), "nowhere": ("absent", "leads nowhere"),
    "loop": ("loop", "leads nowhere"), "around": (".", "link to a directory"), "away/": ("/", "link to a directory"),
    "secret": (".env", "link to a hidden file"), "renamed.txt": ("optimizer.pt", "pickle"),
}  # fmt: skip


def test_links_inside_are_followed_to_what_may_go_along(linked, tmp_path, caplog):
    (linked / ".env").write_text("TOKEN")
    for name, (place, _) in INSIDE.items():
        (linked / name.rstrip("/")).symlink_to(place)
    os.mkfifo(linked / "pipe")
    record = rp.export(edit_of(rp.load(linked)), linked, tmp_path / "out")
    for name, (_, words) in INSIDE.items():
        path = tmp_path / "out" / name
        if words is None:
            assert path.read_text() == KEPT["LICENSE"] and not path.is_symlink()
        else:
            reasons = [why for left, why in record.left_out.items() if left.rstrip("/") == name.rstrip("/")]
            assert words in reasons[0] and not os.path.lexists(path) and words in caplog.text
    assert record.left_out["pipe"] == "no regular file"


@pytest.mark.parametrize("name", ["config.json", "README.md", "images/one.png"])
def test_an_export_whose_file_became_a_link_is_not_pushed(name, linked, tmp_path):
    rp.export(edit_of(rp.load(linked)), linked, tmp_path / "out")
    assert rp.push(tmp_path / "out", "someone/edited").files["images/one.png"] == len(KEPT["images/one.png"])
    moved_out(tmp_path / "out", name) if "/" not in name else moved_out(tmp_path / "out", "images")
    with pytest.raises(CheckpointError, match=r"changed since the export: |missing: images/one\.png"):
        rp.push(tmp_path / "out", "someone/edited")


# The card.


@pytest.mark.parametrize(
    "name", ["a: b", 'quo"te', "it's", "# x", "- y", "*star*", "[l](x)", "`tick`", "no", "1.0", "<b>"]
)
def test_a_card_reads_back_whatever_the_names(name, tmp_path):
    subject = rp.load(written(tmp_path / name))
    edit = rp.Edit(dict(edit_of(subject).maps), {"method": f"by hand\n\n---\n# {name} <script>| x |"})
    rp.export(edit, subject, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("\n---\n")[0])
    assert front["base_model"] == name and front["license"] == "mit" and front["tags"] == ["repedit", "model-editing"]
    assert "<script>" not in text and "\n---\n# " not in text.split("\n---\n", 1)[1]


BASES = {
    "broken": ("---\nlicense: [mit\n---\nBody", {}, "    license: [mit"),
    "no mapping": ("---\n- a\n---\nBody", {}, "    - a"),
    "a tag that makes objects": ("---\nlicense: !!python/object/apply:os.system [ls]\n---\nBody", {"license": ["ls"]}, "Body"),
    "Norwegian": ("---\nlanguage: no\nlicense: other\nlicense_name: own\n---\nBody", {"license": "other", "license_name": "own", "language": "no"}, "Body"),
    "several languages": ("---\r\nlanguage:\r\n- en\r\n- no\r\n---\r\nBody", {"language": ["en", "no"]}, "Body"),
    "dashes in a value": ("---\nlicense: a---b\n---\nBody", {"license": "a---b"}, "Body"),
    "without an end": ("---\nlicense: mit\n", {}, "license: mit"),
    "without front matter": ("Body --- more", {}, "Body --- more"),
    "empty": ("", {}, "Method: test"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BASES)
def test_the_card_of_the_base_is_read_with_care(kind, tmp_path):
    base, fields, words = BASES[kind]
    (written(tmp_path / "in") / "README.md").write_text(base)
    rp.export(edit_of(tiny("llama", vocab_size=260, intermediate_size=128)), tmp_path / "in", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("\n---\n")[0])
    ours = {"base_model": "in", "base_model_relation": "finetune", "tags": ["repedit", "model-editing"]}
    assert front == fields | ours and words in text


def test_a_directory_whose_name_is_not_utf8_is_streamed_and_not_loaded(tmp_path):
    """safetensors opens no such path; a link with a plain name leads to it."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe source"))
    written(tmp_path / "written")
    (tmp_path / "written").rename(odd)
    edit = projection(tiny("llama"), "0.mlp.out")
    (tmp_path / "plain").symlink_to(odd)
    hashes = [rp.export(edit, source, tmp_path / str(number), any_model=True).files for number, source in enumerate((odd, tmp_path / "plain"))]  # fmt: skip
    assert hashes[0]["model.safetensors"] == hashes[1]["model.safetensors"]
    with pytest.raises(CheckpointError, match="a path that is not UTF-8, which safetensors does not open"):
        rp.load(odd)
    assert rp.load(tmp_path / "plain").source is not None
