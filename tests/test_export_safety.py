"""An export records what it did, stands on its own, and leaves nothing behind when it cannot finish."""

import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import repedit as rp
from repedit.errors import ArgumentError, CheckpointError, NotFound, PlanMismatch
from repedit.io import known_hashes
from repedit.io.checkpoint import open_shards
from repedit.lower import lower
from repedit.models.subject import subject_of
from repedit.rewrite import export
from repedit.rewrite import streaming as writing
from repedit.rewrite.manifest import Weights
from tests.damaged_checkpoints import index, sha
from tests.edits import fill, mask, projection
from tests.tiny import ids, logits, tiny


@pytest.fixture
def edit():
    return mask(tiny("llama"), "1.mlp.neurons")


def content(folder):
    """Every file of a directory by name, as its hash."""
    return {path.name: sha(path) for path in folder.iterdir()}


def test_the_manifest_tells_the_truth(source, edit, tmp_path):
    record = rp.export(edit, source, tmp_path / "out")
    assert (tmp_path / "out" / "repedit.json").read_text() == record.to_json()
    assert dict(record.files) == {
        k: v for k, v in content(tmp_path / "out").items() if k not in ("repedit.json", "README.md")
    }
    assert dict(record.base["files"]) == {k: v for k, v in content(source).items() if k != ".git"}
    for name, entry in record.plan.items():
        before, after = open_shards(source).read(name), open_shards(tmp_path / "out").read(name)
        assert entry["sha256_before"] == writing.tensor_change(None, before).after
        assert entry["sha256_after"] == writing.tensor_change(None, after).after


def test_the_manifest_holds_no_path_and_no_time(source, edit, tmp_path):
    texts = [rp.export(edit, source, tmp_path / name).to_json() for name in ("one", "two")]
    assert texts[0] == texts[1] and "/tmp" not in texts[0] and str(Path.home()) not in texts[0]
    assert not re.search(r"\d\d:\d\d|20\d\d-\d\d", texts[0])


def test_the_card_says_what_was_done(source, edit, tmp_path):
    rp.export(edit, source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nbase_model: llama\nbase_model_relation: finetune\n")
    assert "| 1.mlp.neurons |" in card and "neurons zeroed | exact |" in card and "The card of the base." in card


STAY = {"optimizer.pt", "modeling_own.py", "pytorch_model.bin", ".git", "adapter_config.json", "pytorch_model.bin.index.json", "extra.safetensors"}  # fmt: skip


def test_files_that_belong_to_the_model_travel_and_others_stay(source, edit, tmp_path, caplog):
    record = rp.export(edit, source, tmp_path / "out")
    before, after = content(source), content(tmp_path / "out")
    assert before.keys() - after.keys() == STAY and after.keys() - before.keys() == {"repedit.json"}
    assert all(before[name] == after[name] for name in ("tokenizer.json", "chat_template.jinja"))
    assert set(record.left_out) == STAY - {".git"} and "modeling_own.py (code" in caplog.text


def test_a_full_disk_is_noticed_first(source, edit, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for origin in (source, tiny("llama")):
        with pytest.raises(CheckpointError, match=r"has 0\.0 GB free, the checkpoint needs .* nothing was written"):
            rp.export(edit, origin, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_linked_shards_need_no_space(source, edit, tmp_path, monkeypatch):
    source = shutil.copytree(source, tmp_path / "in")
    for path in source.glob("model*"):
        path.chmod(0o444)
    entries = open_shards(source).entries
    touched = {
        entries[name].file for name in lower(edit, tiny("llama").architecture, open_shards(source).specs).operations
    }
    others = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    free = sum((source / file).stat().st_size for file in (*touched, *others))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    rp.export(edit, source, tmp_path / "linked")
    with pytest.raises(CheckpointError, match="the checkpoint needs"):
        rp.export(edit, source, tmp_path / "copied", link=False)
    for path in source.glob("model*"):
        path.chmod(0o644)
    with pytest.raises(CheckpointError, match="the checkpoint needs"):
        rp.export(edit, source, tmp_path / "copied")


def failing(error, at):
    """A function that raises at its n-th call."""
    calls = itertools.count(1)

    def function(*args, **options):
        if next(calls) == at:
            raise error
        return original(*args, **options)

    original = writing.raw_bytes
    return function


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_error_in_the_middle_leaves_nothing(at, source, edit, tmp_path, monkeypatch):
    monkeypatch.setattr("repedit.rewrite.export.job", lambda *_: "job")  # whose hash reads the bytes of the plan
    monkeypatch.setattr(writing, "raw_bytes", failing(OSError(errno.ENOSPC, "No space left on device"), at))
    with pytest.raises(
        CheckpointError, match=r"writing .*out failed: .*No space left on device .tensor 'model.*; nothing was written"
    ):
        rp.export(edit, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_and_the_old_target(source, edit, tmp_path, monkeypatch):
    rp.export(edit, source, tmp_path / "out")
    before = content(tmp_path / "out")
    monkeypatch.setattr("repedit.rewrite.export.job", lambda *_: "job")  # whose hash reads the bytes of the plan
    monkeypatch.setattr(writing, "raw_bytes", failing(KeyboardInterrupt(), 2))
    with pytest.raises(KeyboardInterrupt):
        rp.export(edit, source, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and content(tmp_path / "out") == before


def interrupted(self, target, rename=Path.rename):
    """Path.rename, stopped as the new checkpoint is about to take the place of the old."""
    if self.name == "checkpoint":
        raise KeyboardInterrupt
    return rename(self, target)


def test_an_interrupt_between_the_renames_brings_the_old_target_back(source, edit, tmp_path, monkeypatch):
    rp.export(edit, source, tmp_path / "out")
    before = content(tmp_path / "out")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rp.export(edit, source, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and content(tmp_path / "out") == before


def test_a_failed_save_of_a_model_in_memory_is_typed(edit, tmp_path, monkeypatch):
    subject = tiny("llama")
    monkeypatch.setattr(subject.model, "save_pretrained", failing(SafetensorError("No space left"), 1))
    with pytest.raises(CheckpointError, match="No space left; nothing was written"):
        rp.export(edit, subject, tmp_path / "out")
    assert not list(tmp_path.iterdir())


WRITES = [(shutil, "copyfile"), (os, "link"), (os, "fsync"), (Path, "write_text"), (Path, "rename"), (Path, "mkdir"),
          (writing, "raw_bytes"), (writing, "header_bytes"), (shutil, "rmtree")]  # fmt: skip


def dies_at(k, run):
    """Run in a forked child that is gone at its k-th write, with no clean-up; whether it got to the end."""
    return in_child(lambda calls: dying(calls, k), run) == 0


def writes_of(run):
    """How many writes a run makes."""
    reading, writing_end = os.pipe()

    def counted(calls):
        return lambda function: lambda *args, **options: next(calls) and function(*args, **options)

    in_child(counted, run, lambda calls: os.write(writing_end, str(next(calls) - 1).encode()))
    return int(os.read(reading, 20))


def in_child(wrapper, run, at_end=lambda calls: None):
    """Run in a forked child with every function that writes wrapped, and its exit code."""
    child = os.fork()
    if not child:
        calls = itertools.count(1)
        for owner, name in WRITES:
            setattr(owner, name, wrapper(calls)(getattr(owner, name)))
        try:
            run()
            at_end(calls)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(calls, k):
    return lambda function: lambda *args, **options: os._exit(9) if next(calls) == k else function(*args, **options)


EVERY = [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
"""Every how many writes there is a kill. The last three, where the old gives way to the new, have one each in any case."""


def moments(count, every):
    """The writes at which there is a kill, until a run gets to its end."""
    return itertools.chain(sorted({*range(1, count, every), *range(count - 2, count + 1)}), itertools.count(count + 1))


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_kill_at_any_write_leaves_the_target_absent_or_whole(resumed, every, source, edit, tmp_path):
    edit, seen = edit | fill(tiny("llama"), "0.mlp.neurons"), []
    count = writes_of(lambda: rp.export(edit, source, tmp_path / "whole"))
    for k in moments(count, every):
        done = dies_at(k, lambda: rp.export(edit, source, tmp_path / "out"))
        seen.append((tmp_path / "out").exists())
        assert not seen[-1] or content(tmp_path / "out") == content(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        for place in () if resumed else tmp_path.glob(".out.partial-*"):
            shutil.rmtree(place)
        if done:
            break
    assert count > 15 and seen[-1] and (resumed or (k == count + 1 and seen == sorted(seen)))


@pytest.mark.parametrize("every", EVERY)
def test_a_kill_while_overwriting_leaves_the_old_or_the_new_or_neither(every, source, edit, tmp_path):
    new, states = projection(tiny("llama"), "1.mlp.out"), []
    for name, change in (("old", edit), ("new", new)):
        rp.export(change, source, tmp_path / name)
        states.append(content(tmp_path / name))
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    count = writes_of(lambda: rp.export(new, source, tmp_path / "out", overwrite=True))
    for k in moments(count, every):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        done = dies_at(k, lambda: rp.export(new, source, tmp_path / "out", overwrite=True))
        assert not (tmp_path / "out").exists() or content(tmp_path / "out") in states
        if done:
            break
    assert k > 10


def test_a_plan_for_another_store_is_refused(source, edit, tmp_path):
    plan = lower(edit, tiny("llama").architecture, tiny("llama").specs)
    stray = replace(plan, operations={"model.nope": next(iter(plan.operations.values()))})
    with pytest.raises(
        PlanMismatch, match=r"names tensors this live store does not hold: \['model\.nope'\] \(1 in all\)"
    ):
        rp.export(stray, source, tmp_path / "out")


def test_a_writer_that_skips_a_tensor_is_found_out(source, edit, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_weights", lambda *args, **options: Weights({}, {}, {}))
    with pytest.raises(
        PlanMismatch, match=r"planned but untouched: \['model\.layers\.1.*; touched but not planned: \[\]"
    ):
        rp.export(edit, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked_before_work(source, edit, tmp_path):
    with pytest.raises(ArgumentError, match="dtype='int8' is not a floating dtype"):
        rp.export(edit, source, tmp_path / "out", dtype="int8")
    with pytest.raises(
        NotFound, match=r"nope is not a directory; .* first: repedit\.load\('.*nope'\)\.save\(directory\)"
    ):
        rp.export(edit, tmp_path / "nope", tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"/file/out cannot be written: .*/file is not a directory"):
        rp.export(edit, source, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", [name for name in tiny("llama").specs if name != "lm_head.weight"])  # it is tied
def test_files_that_lack_a_tensor_are_refused(name, source, edit, tmp_path):
    """Also of modules that no row names, such as a norm; the index lacks it too, as after a download that was cut short."""
    shutil.copytree(source, tmp_path / "cut")
    index(lambda content: content | {"weight_map": {n: f for n, f in content["weight_map"].items() if n != name}})(
        tmp_path / "cut"
    )
    for path in (tmp_path / "cut").glob("model*.safetensors"):
        save_file({n: t for n, t in load_file(path).items() if n != name}, path, metadata={"format": "pt"})
    lost = rf"(lm_head\.weight|{re.escape(name)}) \([12] tensors in all\)"
    with pytest.raises(
        CheckpointError, match=rf"cut lacks {lost}, which its config.json .*; download the checkpoint again"
    ):
        rp.export(edit, tmp_path / "cut", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_a_model_without_generation_settings_is_exported(tmp_path):
    """transformers derives them from the config, as it does when it loads a checkpoint without them."""
    lm = tiny("llama")
    lm.model.generation_config = None
    edit = mask(lm, "1.mlp.neurons")
    rp.export(edit, lm, tmp_path / "out")
    assert lm.model.generation_config is None
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    applied = dict(rp.apply(edit, lm).model.named_parameters())
    assert all(parameter.equal(applied[name]) for name, parameter in written.named_parameters())
    assert written.generation_config.eos_token_id == lm.model.config.eos_token_id
    rp.export(edit, lm, tmp_path / "slim", structure="slim", layout="ragged", multiple=1)


RELOAD = """
import sys; sys.modules["repedit"] = None
import torch; from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    torch.save(model(input_ids=torch.load(sys.argv[1]), use_cache=False).logits.detach(), folder + "/logits.pt")
"""


EXPORTS = {
    "llama": lambda s: projection(s, "0.resid.pre"),
    "gpt2": lambda s: fill(s, "1.mlp.neurons"),
    "smollm3": lambda s: fill(s, "0.attn.neurons"),
    "mixtral": lambda s: projection(s, "1.mlp.out"),
    "gpt_neox": lambda s: projection(s, "0.resid.pre"),
    "gemma2": lambda s: projection(s, "1.mlp.out"),
}


def test_exports_load_bit_equal_where_repedit_is_absent(tmp_path):
    torch.save(ids(), tmp_path / "ids.pt")
    for family, make in EXPORTS.items():
        rp.export(make(tiny(family)), tiny(family), tmp_path / family)
    folders = [str(tmp_path / family) for family in EXPORTS]
    subprocess.run([sys.executable, "-c", RELOAD, str(tmp_path / "ids.pt"), *folders], check=True, cwd=tmp_path)
    for family, make in EXPORTS.items():
        expected = logits(rp.apply(make(tiny(family)), tiny(family)))
        assert torch.equal(torch.load(tmp_path / family / "logits.pt"), expected)


def answering(result):
    """os.copy_file_range that fails with an error number, or copies so many bytes."""

    def function(*_):
        if result:
            raise OSError(result, os.strerror(result))
        return 0

    return function


def copied(edit, source, target):
    """An export whose hash of every file of the source is known, so that those without a touched tensor need not be read."""
    subject = subject_of(AutoModelForCausalLM.from_pretrained(source), source=source)
    rp.export(edit, subject, target, link=False)
    return {name: value for name, value in content(target).items() if name.startswith("model")}


@pytest.fixture
def exported(source, edit, tmp_path, monkeypatch):
    """A checkpoint that was exported once, so that the hashes of its files are remembered."""
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "SETTLED", 0)
    plain = shutil.copytree(source, tmp_path / "in", ignore=shutil.ignore_patterns("adapter_config.json"))
    rp.export(edit, plain, tmp_path / "first", link=False)
    return plain


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_a_system_that_cannot_copy_between_files_makes_the_same_files(number, exported, edit, tmp_path, monkeypatch):
    expected = copied(edit, exported, tmp_path / "one")
    if number is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", answering(number))
    assert copied(edit, exported, tmp_path / "two") == expected


@pytest.mark.parametrize(("number", "words"), [(errno.EIO, "Input/output error"), (0, "safetensors ended early")])
def test_a_copy_that_fails_or_ends_early_is_an_error(number, words, exported, edit, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", answering(number))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=f"{words}.*nothing was written"):
        copied(edit, exported, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(source, edit, tmp_path):
    shutil.copytree(source, tmp_path / "in")
    shards = open_shards(tmp_path / "in")
    name = max(shards.entries, key=lambda n: shards.entries[n].stop)
    path = tmp_path / "in" / shards.entries[name].file
    with open(path, "r+b") as file:
        file.truncate(shards.entries[name].stop - 4)
    with pytest.raises(CheckpointError, match=rf"{path.name} ended at byte \d+, within '{name}'"):
        shards.read(name)


def test_an_export_in_a_forked_process_ends(source, edit, tmp_path):
    """Several threads at once make the first call of torch in the child; one fork in five failed when they raced."""
    rp.export(edit, source, tmp_path / "out", workers=3)
    for _ in range(4):
        assert not in_child(
            lambda calls: lambda function: function,
            lambda: rp.export(edit, source, tmp_path / "out", workers=3, overwrite=True),
        )
