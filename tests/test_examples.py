"""The strongest tokens of every neuron are those that a plain search over all activations finds."""

import pytest
import torch

import repedit as rp
from repedit.data.corpus import Corpus, Document
from repedit.errors import ArgumentError, NotEnoughRows, NotFinite, UnknownSite
from repedit.hooks import Hook, installed
from tests.saved_models import byte_tokenizer, saved
from tests.tiny import tiny

CORPUS = Corpus(tuple(Document(f"{i}", f"the river {i} runs past the town of {word}s " * (i % 3 + 1)) for i, word in
                enumerate(("mill", "ship", "tree", "stone", "bird"))), "rivers")  # fmt: skip


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return rp.load(saved(tmp_path_factory.mktemp("models") / "tiny"))


def searched(lm, neuron, count):
    """(z, token, text before it) of the strongest token of each document, sorted; a forward pass a document."""
    found = []
    for document in CORPUS.documents:
        ids = lm.tokenizer(document.text, return_tensors="pt").input_ids[:, :128]
        seen = []
        down = lm.model.model.layers[1].mlp.down_proj
        with installed(lm.model, [Hook(down, "input", lambda x, seen=seen: seen.append(x))]), torch.no_grad():
            lm.model(ids)
        z = seen[0][0, 1:, neuron]
        at = int(z.abs().argmax()) + 1
        found.append((float(z[at - 1]), lm.tokenizer.decode(ids[0, at : at + 1]), at))
    return sorted(found, key=lambda row: -abs(row[0]))[:count]


def found(lm, neuron, count, **options):
    rows = rp.max_activating(lm, CORPUS, "1.mlp.neurons", count=count, progress=False, **options).of(
        "1.mlp.neurons", neuron
    )
    return [(row.activation, row.token) for row in rows]


def same(mine, theirs):
    assert [token for _, token in mine] == [token for _, token, _ in theirs]
    torch.testing.assert_close([z for z, _ in mine], [z for z, _, _ in theirs], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("neuron", [0, 7, 20])
def test_the_strongest_tokens_are_found_whatever_the_batches(lm, neuron, batch_size):
    same(found(lm, neuron, 3, batch_size=batch_size), searched(lm, neuron, 3))


def test_looking_at_the_largest_value_instead_of_the_strongest_would_be_caught(lm, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "abs", lambda x: x)
    mine = [found(lm, neuron, 3) for neuron in range(6)]
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        for neuron, rows in enumerate(mine):
            same(rows, searched(lm, neuron, 3))


def test_an_example_shows_its_text(lm):
    (first, *_) = rp.max_activating(lm, CORPUS, "1.mlp.neurons").of("1.mlp.neurons", 3, context=2)
    assert any(f"{first.before}{first.token}{first.after}" in d.text for d in CORPUS.documents)
    assert f"[{first.token}]" in str(first)


def test_a_corpus_of_few_chunks_gives_few_examples(lm):
    kept = rp.max_activating(lm, CORPUS, "0.mlp.neurons", count=9)
    assert len(kept.of("0.mlp.neurons", 0)) == len(CORPUS.documents)
    assert list(kept) == [rp.Site.parse("0.mlp.neurons")] and kept["0.mlp.neurons"].shape[0] == 5


def test_what_cannot_be_answered_is_refused(lm):
    kept = rp.max_activating(lm, CORPUS, "0.mlp.neurons")
    with pytest.raises(
        UnknownSite, match=r"no examples were kept at 1\.mlp\.neurons; there are some at 0\.mlp\.neurons"
    ):
        kept.of("1.mlp.neurons", 0)
    with pytest.raises(ArgumentError, match=r"0\.mlp\.neurons has neurons 0\.\.\d+, not 4000"):
        kept.of("0.mlp.neurons", 4000)
    with pytest.raises(ArgumentError, match=r"count=0; keep at least 1"):
        rp.max_activating(lm, CORPUS, count=0)
    with pytest.raises(NotEnoughRows, match=r"corpus 'short': 0 tokens counted"):
        rp.max_activating(lm, Corpus((Document("0", "a"),), "short"))


def test_expert_neurons_are_refused():
    lm = tiny("mixtral")
    with pytest.raises(ArgumentError, match=r"holds expert neurons"):
        rp.max_activating(rp.wrap(lm.model, byte_tokenizer()), CORPUS)


def test_what_is_not_finite_is_refused(lm):
    broken = rp.apply(
        rp.Edit(
            {
                rp.Site.parse("0.mlp.neurons"): rp.Diagonal.mask(
                    torch.arange(lm.layout.width_of(0, rp.Point.MLP_NEURONS)) > 3
                )
            },
            {},
        ),
        lm,
    )
    with torch.no_grad():
        broken.model.model.layers[0].mlp.up_proj.weight[5] = torch.nan
    with pytest.raises(NotFinite, match=r"0\.mlp\.neurons: an activation is not finite"):
        rp.max_activating(broken, CORPUS)
