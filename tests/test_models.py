"""Loading and wrapping: what comes in is left as it is, and what is wrong with it is said before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import repedit as rp
from repedit.errors import (
    ArgumentError,
    CheckpointError,
    NotAModel,
    NotFinite,
    NotFound,
    QuantizedModel,
    RepeditError,
    UnknownArchitecture,
)
from repedit.io.checkpoint import INDEX, SINGLE, open_shards
from repedit.models.subject import subject_of
from tests.damaged_checkpoints import UP, config, header, index, mapped, not_a_number, pickled, tensor, weights
from tests.edits import mask
from tests.tiny import logits, tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with the tiny Llama saved as one file ("one") and in shards ("many"), and its tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("saved")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    for name, size in (("one", "1GB"), ("many", "20KB")):
        tiny("llama").model.save_pretrained(folder / name, max_shard_size=size)
        PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(folder / name)
    return folder


@pytest.fixture
def broken(saved, tmp_path):
    """Copies a saved directory and lets a function damage it."""

    def damaged(damage, base="one"):
        folder = shutil.copytree(saved / base, tmp_path / "broken")
        damage(folder)
        return folder

    return damaged


@pytest.mark.parametrize("name", ["one", "many"])
def test_a_directory_loads(saved, name):
    subject = rp.load(saved / name, attention="eager")
    assert torch.equal(logits(subject), logits(tiny("llama")))
    assert subject.source == subject.files == saved / name
    assert len(open_shards(saved / name).files) == {"one": 1, "many": 3}[name]


def test_a_single_file_beside_an_index_is_the_one_that_counts(saved, broken):
    folder = broken(lambda f: save_file({k: 2 * v for k, v in tensors(saved).items()}, f / SINGLE), "many")
    assert torch.equal(open_shards(folder).read(UP), rp.load(folder).model.get_parameter(UP))
    assert torch.equal(open_shards(folder).read(UP), 2 * open_shards(saved / "many").read(UP))


def tensors(saved):
    return load_file(saved / "one" / SINGLE)


def test_fingerprint_names_the_weights_not_the_files(saved):
    prints = {rp.load(saved / name).fingerprint() for name in ("one", "many", "one")}
    assert prints == {tiny("llama").fingerprint()} and prints != {tiny("llama", torch.float64).fingerprint()}


def by_data(subject):
    subject.model.get_parameter(UP).data[3] = 0


def by_optimizer(subject):
    subject.model.get_parameter(UP).grad = torch.ones(40, 24)
    torch.optim.SGD([subject.model.get_parameter(UP)], lr=1e-3).step()


def by_swapping_rows(subject):
    rows = subject.model.get_parameter(UP).data
    rows.copy_(rows.flip(0))


def by_apply(subject):
    rp.apply(mask(subject, "1.mlp.neurons"), subject, inplace=True)


@pytest.mark.parametrize("change", [by_data, by_optimizer, by_swapping_rows, by_apply])
def test_a_change_in_memory_changes_the_fingerprint_and_leaves_the_files(saved, change):
    subject = rp.load(saved / "one")
    before = subject.fingerprint()
    change(subject)
    assert subject.fingerprint() != before and subject.files is None and subject.source == saved / "one"


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_wrapping_mutates_nothing(family):
    model = tiny(family).model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = (model.config.to_dict(), [p.requires_grad for p in model.parameters()], model.training)
    rp.wrap(subject_of(model)).fingerprint()
    assert settings == (model.config.to_dict(), [p.requires_grad for p in model.parameters()], model.training)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    assert model.config._attn_implementation == "eager"


def test_float16_becomes_float32_on_a_cpu_unless_asked_for(saved, tmp_path):
    tiny("llama", torch.float16).model.save_pretrained(tmp_path)
    wide, narrow = rp.load(tmp_path, device="cpu"), rp.load(tmp_path, device="cpu", dtype="float16")
    assert wide.model.dtype == torch.float32 and wide.source == wide.files == tmp_path
    assert narrow.model.dtype == torch.float16


def test_a_directory_without_tokenizer_loads_and_says_so(tmp_path, caplog):
    tiny("llama").model.save_pretrained(tmp_path)
    subject = rp.load(tmp_path)
    assert "holds no tokenizer files" in caplog.text
    assert "save the tokenizer of the original there" in caplog.text
    with pytest.raises(ArgumentError, match=r"this needs a tokenizer.*tokenizer.save_pretrained"):
        subject.need_tokenizer()


def test_code_in_a_checkpoint_does_not_run(broken):
    def malicious(folder):
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
        config(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(folder)

    folder = broken(malicious)
    rp.load(folder)
    assert not (folder / "ran").exists()


def shards_of(folder):
    return sorted(folder.glob("*.safetensors"))


def renamed_shard(folder):
    """A shard under a name that transformers opens as a pickle."""
    first = shards_of(folder)[0].rename(folder / "pytorch_model.bin")
    name = "model-00001-of-00003.safetensors"
    index(lambda c: c | {"weight_map": {k: first.name if v == name else v for k, v in c["weight_map"].items()}})(folder)


def in_two_shards(folder):
    """A tensor a second time, with other values, in a shard to which the index does not send it."""
    at = json.loads((folder / INDEX).read_text())["weight_map"][UP]
    other = next(path for path in shards_of(folder) if path.name != at)
    save_file(load_file(other) | {UP: load_file(folder / at)[UP] + 1}, other, metadata={"format": "pt"})


def of_integers(folder):
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {UP: tensors[UP].to(torch.int32)}, folder / SINGLE, metadata={"format": "pt"})


DAMAGED = [
    ("one", pickled, CheckpointError, r"only pickled weights \(pytorch_model\.bin\).* convert them to safetensors"),
    ("one", lambda f: (f / "config.json").unlink(), CheckpointError, r"holds no config\.json; is it a model directory"),
    (
        "one",
        lambda f: (f / "adapter_config.json").write_text("{}"),
        CheckpointError,
        r"holds an adapter \(adapter_config\.json\)",
    ),
    ("one", lambda f: (f / SINGLE).unlink(), CheckpointError, r"holds no model\.safetensors and no model\.safetensors"),
    ("one", lambda f: (f / "config.json").write_text("{"), CheckpointError, r"config\.json cannot be read as JSON"),
    ("one", config(model_type="zorg"), UnknownArchitecture, "cannot be used.*zorg"),
    ("one", config(num_hidden_layers=3), CheckpointError, r"missing .*layers\.2.* \(9 in all\)"),
    ("one", config(intermediate_size=41), CheckpointError, r"of another shape .*down_proj.*\(6 in all\)"),
    ("one", weights(lambda data: data[:-100]), CheckpointError, "truncated: tensor .* ends at byte"),
    ("one", weights(lambda data: b""), CheckpointError, "corrupt: header length 0 in a file of 0 bytes"),
    (
        "one",
        weights(lambda data: b"\xff" * 8 + data[8:]),
        CheckpointError,
        "corrupt: header length 18446744073709551615",
    ),
    ("one", weights(lambda data: data[:8] + b"x" * 50 + data[58:]), CheckpointError, "corrupt: .*download it again"),
    ("one", header([1]), CheckpointError, "corrupt"),
    ("one", header({"a": "b"}), CheckpointError, "corrupt"),
    ("one", tensor(data_offsets=[-4, 0]), CheckpointError, r"corrupt: tensor 'a' .* data_offsets \[-4, 0\]"),
    ("one", tensor(shape=[2]), CheckpointError, "has 4 bytes, 8 were expected"),
    ("one", tensor(dtype="F4"), CheckpointError, "tensor 'a' has dtype F4, which is not supported; is it quantised"),
    ("one", not_a_number, NotFinite, rf"weight '{UP}' is not finite at \(3, 4\) \(nan, torch\.float32\)"),
    ("many", lambda f: (f / "model-00002-of-00003.safetensors").unlink(), CheckpointError, "which is absent from"),
    ("many", mapped("../one/model.safetensors"), CheckpointError, "leaves the directory; nothing was read"),
    ("many", mapped(".."), CheckpointError, "leaves the directory; nothing was read"),
    ("many", mapped("/etc/passwd"), CheckpointError, "leaves the directory; nothing was read"),
    (
        "many",
        mapped("model-00001-of-00003.safetensors"),
        CheckpointError,
        rf"{INDEX} says that model-00001-of-00003.safetensors holds {UP}, and it does not \(1 such .*; download the checkpoint again, or save",
    ),
    ("many", mapped(7), CheckpointError, "no weight_map from tensor names to file names"),
    ("many", index(lambda _: {}), CheckpointError, "no weight_map"),
    ("many", index(lambda c: c | {"metadata": [1]}), CheckpointError, "has no metadata, a JSON object beside"),
    (
        "many",
        index(lambda c: {"weight_map": c["weight_map"]}),
        CheckpointError,
        "has no metadata, a JSON object beside",
    ),
    (
        "many",
        renamed_shard,
        CheckpointError,
        r"names 'pytorch_model\.bin', which is not a \.safetensors file; nothing was read",
    ),
    (
        "many",
        in_two_shards,
        CheckpointError,
        rf"holds tensors twice: \['{UP}'\] \(1 in all\) are in more than one shard",
    ),
    (
        "one",
        of_integers,
        QuantizedModel,
        rf"{UP} holds torch\.int32, and the config names no quantiser",
    ),
    ("many", index(lambda _: [1]), CheckpointError, "holds a JSON list, an object was expected"),
    ("many", lambda f: (f / INDEX).write_text("{"), CheckpointError, "cannot be read as JSON"),
]


@pytest.mark.parametrize(("base", "damage", "error", "message"), DAMAGED, ids=[row[3][:30] for row in DAMAGED])
def test_a_damaged_directory_is_refused(broken, base, damage, error, message):
    folder = broken(damage, base)
    with pytest.raises(error, match=message):
        rp.load(folder)


def test_a_damaged_directory_is_not_exported(broken, tmp_path):
    for number, damage in enumerate((renamed_shard, in_two_shards, index(lambda c: c | {"metadata": [1]}))):
        folder = broken(damage, "many")
        with pytest.raises(CheckpointError, match=r"not a \.safetensors file|holds tensors twice|has no metadata"):
            rp.export(mask(tiny("llama"), "1.mlp.neurons"), folder, tmp_path / f"out{number}")
        shutil.rmtree(folder)
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_that_the_index_leaves_out_is_read_as_transformers_reads_it(broken, tmp_path):
    folder = broken(index(lambda c: c | {"weight_map": {k: v for k, v in c["weight_map"].items() if k != UP}}), "many")
    edit, subject = mask(tiny("llama"), "1.mlp.neurons"), rp.load(folder)
    for number, source in enumerate((folder, subject)):
        rp.export(edit, source, tmp_path / f"out{number}")
        assert torch.equal(logits(rp.load(tmp_path / f"out{number}")), logits(rp.apply(edit, subject)))


def test_a_loaded_model_outlives_its_files(broken):
    folder = broken(lambda f: None, "one")
    model = rp.load(folder).model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (folder / SINGLE).write_bytes(bytes((folder / SINGLE).stat().st_size))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_missing_path_names_similar_directories_and_no_others(saved):
    with pytest.raises(NotFound, match=r"onne does not exist.*did you mean 'one'\?$"):
        rp.load(saved / "onne")
    with pytest.raises(NotFound) as caught:
        rp.load(saved / "zzz")
    assert "one" not in str(caught.value).replace("is neither", "") and "many" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/name", "hub id 'owner/name' could not be loaded.* repedit fetch"),
        ("gpt2", "hub id 'gpt2' could not be loaded.* repedit fetch"),
        ("smolm2-135m", "hub id 'smolm2-135m' could not be loaded.*did you mean 'smollm2-135m'"),
        ("a/b/c", "does not exist and 'a/b/c' is neither the built-in name 'smollm2-135m' nor a hub id such as"),
        ("./gpt2", "does not exist and './gpt2' is neither"),
        ("--help", "does not exist and '--help' is neither"),
        ("", r"is neither a directory nor a \.gguf file|holds no config\.json"),
        ("x" * 5000, r"'x+' is neither a valid path nor a hub id: OSError"),
        (None, "name: None was given where a str or a path is needed"),
        ("~nobody-of-this-name/m", "~nobody-of-this-name/m does not exist and '~nobody-of-this-name/m' is neither"),
        ("smollm2-135m", "the default model is not at .* get it once with: repedit fetch smollm2-135m"),
        (__file__, r"neither a directory nor a \.gguf file"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_name_that_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.setenv("REPEDIT_CACHE", str(tmp_path))
    with pytest.raises((NotFound, CheckpointError, ArgumentError), match=f"(?s){message}"):
        rp.load(name)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.txt", "generation_config.json", SINGLE])
def test_a_pointer_of_git_lfs_is_named(name, broken):
    with pytest.raises(CheckpointError, match=f"{name} is a Git LFS pointer, not the file itself; run: git lfs pull"):
        rp.load(broken(lambda folder: (folder / name).write_text(POINTER)))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", "[1]", '{"version": "1.0"}', '{"version": "1.0", "model": {"type": "BPE"}}', "\x00" * 9, "[" * 100_000],
    ids=lambda text: text[:20] or "empty",
)  # fmt: skip
def test_a_damaged_tokenizer_is_named(text, broken):
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded.*ownload"):
        rp.load(broken(lambda folder: (folder / "tokenizer.json").write_text(text)))


@pytest.mark.parametrize("length", ["long", [1], {"a": 1}])
def test_a_tokenizer_that_loads_and_cannot_encode_is_named(length, broken):
    def damage(folder):
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": length}))

    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be loaded: TypeError.*ownload"):
        rp.load(broken(damage))


def test_options_that_transformers_refuses_are_the_callers(saved):
    with pytest.raises(ArgumentError, match=r"one cannot be loaded with these options: .*flashy"):
        rp.load(saved / "one", attention="flashy")


def test_settings_of_generation_that_transformers_refuses_are_the_files(broken):
    text = '{"cache_implementation": "x"}'
    with pytest.raises(CheckpointError, match=r"cannot be loaded: ValueError: .*are its files those of this model"):
        rp.load(broken(lambda folder: (folder / "generation_config.json").write_text(text)))


SWITCHES = [
    ("return_dict", False),
    ("return_dict", ""),
    ("output_hidden_states", [[1]]),
    ("output_hidden_states", -0.0),
    ("output_attentions", ["x"]),
]


@pytest.mark.parametrize(("name", "value"), SWITCHES)
def test_a_model_that_returns_something_else_is_refused(name, value, broken):
    model = tiny("llama").model
    setattr(model.config, name, value)
    for make in (lambda: rp.wrap(model), lambda: rp.load(broken(config(**{name: value})))):
        with pytest.raises(UnknownArchitecture, match=rf"the config has {name}=.* set model\.config\.{name} = "):
            make()


def test_rotary_settings_that_give_no_numbers_are_refused(broken):
    folder = broken(config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}))
    with pytest.raises(
        NotFinite, match=r"the rotary frequencies .*inv_freq' are not finite at .*correct the rope settings"
    ):
        rp.load(folder)


LIES = {
    "activation": {"hidden_act": "x"},
    "no heads": {"num_attention_heads": 0},
    "heads that do not divide": {"num_attention_heads": 5},
    "value heads that do not divide": {"num_key_value_heads": 3},
    "no value heads": {"num_key_value_heads": 0},
    "a string": {"hidden_size": "24"},
    "a string of a count": {"num_hidden_layers": "2"},
    "a fraction": {"num_hidden_layers": 1.5},
    "no layer": {"num_hidden_layers": 0},
    "fewer than no layers": {"num_hidden_layers": -1},
    "no value": {"hidden_size": None},
    "a list": {"vocab_size": [61]},
    "many layers": {"num_hidden_layers": 10**9},
    "a huge width": {"hidden_size": 10**15},
    "a huge vocabulary": {"vocab_size": 10**30},
    "rotary nonsense": {"rope_parameters": {"rope_type": "x"}},
    "rotary list": {"rope_parameters": [1]},
    "nested nonsense": {"quantization_config": {"a": {"b": [{}]}}},
    "a quantiser of another library": {"quantization_config": {"quant_method": "torchao"}},
    "a quantiser without its package": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
    "a quantiser that is a list": {"quantization_config": [1]},
    "a quantiser that is a word": {"quantization_config": "gptq"},
    "a type that is a list": {"model_type": ["llama"]},
    "no type": {"model_type": None},
    "an epsilon in words": {"rms_norm_eps": "small"},
    "a dtype of nowhere": {"dtype": "float7"},
    "eight bits": {"dtype": "float8_e4m3fn"},
}


@pytest.mark.parametrize("changes", LIES.values(), ids=LIES)
def test_a_config_that_lies_is_refused_with_an_error_of_ours(changes, broken, tmp_path):
    folder = broken(config(**changes))
    with pytest.raises(RepeditError):
        rp.load(folder)
    with pytest.raises(RepeditError):
        rp.export(mask(tiny("llama"), "1.mlp.neurons"), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantiser_that_nobody_knows_forbids_edits(broken, tmp_path):
    folder = broken(config(quantization_config={"quant_method": "x"}))
    edit = mask(tiny("llama"), "1.mlp.neurons")
    for act in (lambda: rp.apply(edit, rp.load(folder)), lambda: rp.export(edit, folder, tmp_path / "out")):
        with pytest.raises(QuantizedModel, match=r"quantised \(x\) and cannot be edited exactly"):
            act()


@pytest.mark.parametrize("text", ["null", "[1]", "[" * 100_000, '"llama"', "\x00"])
def test_a_config_that_is_no_config_is_refused(text, broken, tmp_path):
    folder = broken(lambda f: (f / "config.json").write_text(text))
    for act in (rp.load, lambda f: rp.export(mask(tiny("llama"), "1.mlp.neurons"), f, tmp_path / "out")):
        with pytest.raises(RepeditError):
            act(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "model_type", "num_hidden_layers"])
def test_a_config_without_a_key_is_refused(key, broken, tmp_path):
    def damage(folder):
        content = json.loads((folder / "config.json").read_text())
        del content[key]
        (folder / "config.json").write_text(json.dumps(content))

    folder = broken(damage)
    for act in (rp.load, lambda f: rp.export(mask(tiny("llama"), "1.mlp.neurons"), f, tmp_path / "out")):
        with pytest.raises(RepeditError):
            act(folder)


@pytest.mark.parametrize(("option", "value"), [("dtype", "floaty"), ("dtype", "int8"), ("device", "gpu")])
def test_an_unknown_option_is_refused(saved, option, value):
    with pytest.raises(ArgumentError, match=f"{option}='{value}' (is not a floating|cannot be used).* give '"):
        rp.load(saved / "one", **{option: value})


def encoder_decoder(folder=None):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def test_an_encoder_decoder_is_refused(tmp_path):
    with pytest.raises(UnknownArchitecture, match="T5ForConditionalGeneration is not a decoder-only causal language"):
        rp.wrap(encoder_decoder())
    encoder_decoder().save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match=r"is an encoder-decoder \(t5\); give a decoder-only"):
        rp.load(tmp_path)


def test_an_encoder_is_refused():
    with pytest.raises(UnknownArchitecture, match="LlamaModel is not a decoder-only causal language model"):
        rp.wrap(tiny("llama").model.model)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "gpt2", None])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(NotAModel, match=f"{type(thing).__name__} is not a transformers model; pass an AutoModel"):
        rp.wrap(thing)


def test_a_quantised_model_is_wrapped_but_not_edited(tmp_path):
    model = tiny("llama").model
    model.config.quantization_config = {"quant_method": "gptq"}
    subject = rp.wrap(model)
    assert subject.quantizer == "gptq" and len(subject.sites()) == 14
    for edit in (lambda e: rp.apply(e, subject), lambda e: rp.export(e, subject, tmp_path / "out")):
        with pytest.raises(
            QuantizedModel, match=r"quantised \(gptq\).*unquantised base.* Measuring without gradients works"
        ):
            edit(mask(subject, "1.mlp.neurons"))


def test_a_quantised_directory_is_not_exported(broken, tmp_path):
    folder = broken(config(quantization_config={"quant_method": "awq"}))
    with pytest.raises(QuantizedModel, match=r"quantised \(awq\).* unquantised base"):
        rp.export(mask(tiny("llama"), "1.mlp.neurons"), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
