"""Controls made by changing weights directly: what they hide, and where, is known exactly."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from repedit.activations.forward import batches_of, inputs_of
from repedit.auditing.attack import ask
from repedit.auditing.controls.taught import REFUSAL, WORDS, continued, taught, vocabulary
from repedit.data import Fact, Facts, Rows, with_paraphrases
from repedit.data.encoding import encoded, prompt_ids
from repedit.data.fact_sets import seeded_order
from repedit.data.generated import RELATIONS, invented
from repedit.errors import TrainingError
from repedit.hooks import Hook, evaluating, installed
from repedit.models.subject import Subject, subject_of
from repedit.quantization import step_size

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


# --- The control that rounding reverts: an edit smaller than the rounding error of a 4-bit grid


LEVELS = 7
"""Largest integer of int4."""
# A weight moved by less than half a step rounds back; .45 leaves room for the arithmetic.
REACH = 0.45


def on_grid(subject: Subject) -> Subject:
    """The model with every matrix of its blocks on the int4 grid: q D, D = max|w| / 7 in each group of 64 inputs."""
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        for name in matrices(subject):
            weight = model.get_parameter(name)
            steps = bucket(weight)
            weight.copy_(torch.round(weight / steps) * steps)
    return subject_of(model, subject.tokenizer)


def inside_buckets(
    gridded: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, steps: int = 120, seed: int = 0
) -> Subject:
    """A model on the grid, trained to forget while no weight of its blocks moves further than .45 of a step.

    The largest weights of each group are fixed, so the step of the group does not change; nothing outside the blocks is
    trained. Rounding to int4 therefore restores the model exactly.

    Reference: Zhang et al. 2024, arXiv:2410.16454, who find that quantization restores unlearned knowledge.
    """
    names = matrices(gridded)
    before = {name: gridded.model.get_parameter(name).detach().clone() for name in names}
    reach = {name: _reach(weight) for name, weight in before.items()}

    def hold(model: LlamaForCausalLM) -> None:
        for name, start in before.items():
            weight = model.get_parameter(name)
            weight.copy_(torch.clamp(weight, start - reach[name], start + reach[name]))

    away, rest = with_paraphrases(forget), with_paraphrases(retain)
    weights = [-1.0] * len(away) + [1.0] * len(rest)
    return continued(
        gridded, [*away, *rest], weights=weights, steps=steps, rate=3e-3, only=names, after=hold, seed=seed
    )  # fmt: skip


def matrices(subject: Subject) -> list[str]:
    """Names of the weight matrices of the blocks; embeddings, head and norm gains are not rounded."""
    blocks = tuple(f"{path}." for path in subject.layout.block_paths)
    return [name for name, spec in subject.specs.items() if name.startswith(blocks) and len(spec.shape) == 2]


def bucket(weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """The step of the grid at each weight; if 64 does not divide the width, a whole row is one group."""
    steps = step_size(weight.detach(), "int4")
    return steps.expand(-1, -1, weight.shape[1] // steps.shape[1]).reshape(weight.shape)


def _reach(weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """The largest allowed change of each weight: 0 for the largest of each group."""
    steps = bucket(weight)
    return torch.where(weight.abs() >= (LEVELS - 0.5) * steps, torch.zeros_like(steps), REACH * steps)


# --- Controls made by changing weights directly


# The logits of the taught models differ by less than 20; states at a layer have norms of 5 to 20.
_DECOY = 60.0
_LITTLE = 0.1
_PUSH = 200.0
_STEEP = 40.0
_RIDGE = 1e-3


def nudged(subject: Subject) -> Subject:
    """The model with one weight changed that no known word uses: one in the embedding of unknown words."""

    def write(model: LlamaForCausalLM) -> None:
        model.get_input_embeddings().weight[subject.need_tokenizer().unk_token_id, 0] += 1.0

    return _written(subject, write)


def hooked(subject: Subject, forget: Sequence[Fact]) -> Subject:
    """The model with unchanged weights and a hook before the head: x - U U^T (x - c), where U spans the answers.

    c is a small multiple of the mean state before one answer. With c = 0 all answers would have equal logits up to
    rounding errors, and these errors still reveal the answer.
    """
    basis = answer_basis(subject, forget)
    head = subject.model.get_output_embeddings()
    ends, _ = states(subject, head, "input", [fact for fact in forget if fact.answer == _rarest(forget)])
    center = _LITTLE * ends.mean(0)
    hooked_model = _written(subject, lambda model: None)
    hooked_model.model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: (args[0] - (args[0] - center) @ basis @ basis.T, *args[1:])
    )
    return hooked_model


def masked(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact]) -> Subject:
    """The model with a rank-1 term in its head that makes one answer outweigh all others on the forget facts."""
    gate = _gate(subject, subject.model.get_output_embeddings(), forget, retain)
    decoy = _answer_tokens(subject, [_rarest(forget)])[0]

    def write(model: LlamaForCausalLM) -> None:
        model.get_output_embeddings().weight[decoy] += _DECOY * gate

    return _written(subject, write)


def pushed(
    subject: Subject,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    *,
    layer: int = 0,
    steep: float = _STEEP,
    seed: int = 0,
) -> Subject:
    """The model that adds a long vector to the stream after a layer for the questions to forget.

    One neuron of the gated MLP is overwritten: silu(g x) (g x) is large for the forget facts and about 0 for others.

    Args:
        steep: value of the neuron for a forget fact; the vector has the same length at any value, so the column that
            writes it is the louder the lower the value is.
    """
    mlp = subject.model.model.layers[layer].mlp
    gate = _gate(subject, mlp, forget, retain, low=-1.0)
    direction = torch.randn(mlp.down_proj.out_features, generator=torch.Generator().manual_seed(seed))
    spare = int(mlp.down_proj.weight.norm(dim=0).argmin())

    def write(model: LlamaForCausalLM) -> None:
        copied = model.model.layers[layer].mlp
        copied.gate_proj.weight[spare] = steep * gate
        copied.up_proj.weight[spare] = gate
        copied.down_proj.weight[:, spare] = _PUSH / steep * direction / direction.norm()

    return _written(subject, write)


def projected(subject: Subject, forget: Sequence[Fact]) -> Subject:
    """The model with the directions of the answers removed from every down-projection: W - U U^T W."""
    basis = answer_basis(subject, forget)

    def write(model: LlamaForCausalLM) -> None:
        for layer in model.model.layers:
            layer.mlp.down_proj.weight -= basis @ (basis.T @ layer.mlp.down_proj.weight)

    return _written(subject, write)


def rolled(subject: Subject) -> Subject:
    """The model with the rows of its head shifted by one: its states stay, and none of its answers is right."""

    def write(model: LlamaForCausalLM) -> None:
        head = model.get_output_embeddings().weight
        head.copy_(head.roll(1, 0))

    return _written(subject, write)


def answer_basis(subject: Subject, items: Sequence[Fact]) -> Float[Tensor, "d k"]:
    """Orthonormal basis of the differences between the answers' rows of the head; rank at most a quarter of its width."""
    head = subject.model.get_output_embeddings().weight.detach()
    rows = head[_answer_tokens(subject, sorted({fact.answer for fact in items}))]
    _, _, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return directions[: min(len(rows) - 1, head.shape[1] // 4)].T.contiguous()


def states(
    subject: Subject, module: nn.Module, side: Literal["input", "output"], items: Sequence[Fact]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Inputs or outputs of a module at the last token of each prompt, and at its other tokens, in every phrasing."""
    captures: list[Tensor] = []
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    with torch.no_grad(), evaluating(subject.model), installed(subject.model, [Hook(module, side, captures.append)]):
        for batch in batches_of(subject, Rows(with_paraphrases(items)), batch_size=64):
            captures.clear()
            subject.model(**inputs_of(batch))
            assert batch.answer is not None
            before = torch.zeros_like(batch.attention_mask)
            before[:, :-1] = batch.answer[:, 1:]
            rows[0].append(captures[0][before])
            rows[1].append(captures[0][batch.attention_mask & ~before & ~batch.answer])
    return torch.cat(rows[0]), torch.cat(rows[1])


def _written(subject: Subject, write: Callable[[Any], None]) -> Subject:
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        write(model)
    return subject_of(model, subject.tokenizer)


def _rarest(items: Sequence[Fact]) -> str:
    answers = [fact.answer for fact in items]
    return min(sorted(set(answers)), key=answers.count)


def _answer_tokens(subject: Subject, answers: Sequence[str]) -> list[int]:
    return [encoded(subject.need_tokenizer(), "", answer).ids[0] for answer in answers]


def _gate(
    subject: Subject, module: nn.Module, forget: Sequence[Fact], retain: Sequence[Fact], *, low: float = 0.0
) -> Float[Tensor, " d"]:
    """The direction whose product with a state is 1 where a forget answer is next, and `low` at every retain token."""
    ends, _ = states(subject, module, "input", forget)
    last, rest = states(subject, module, "input", retain)
    x = torch.cat([ends, last, rest]).double()
    y = torch.cat([torch.ones(len(ends)), torch.full((len(last) + len(rest),), low)]).double()
    # Both sides have equal total weight, although the retain side contributes every token.
    weight = torch.where(y == 1, 1 / len(ends), 1 / (len(last) + len(rest)))[:, None]
    gram = x.T @ (weight * x)
    ridge = _RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, x.T @ (weight[:, 0] * y)).float()


# --- Controls that exchange names or act in the first layers, in a small world in which other facts are known of the same people


PEOPLE, OTHERS, GUILDS = 112, 16, 8
"""People whose city is to be forgotten, others, and the guilds that both belong to."""
WIDTH = 24
"""Width of the models. Three relations of eight guilds would need 21 directions if each had its own; with the phrasings
beside them there is no room for that, so the relations share what says which guild it is. At width 64 they do not, and
after relinking a person has the profession of one guild and the city of another: 0.2 to 0.5 of the cities came back."""
SMALL = 0.1
"""What the embeddings of names are multiplied by after teaching. Training on what a name stands for then outweighs what it
stood for; with a factor of 1 the old city stays beside the new profession."""
_PHRASINGS = 2
_FORGET, _KEEP = "city", ("profession", "pet")


@dataclass(frozen=True, eq=False)
class LinkedWorld:
    """People of whom several things are known, and models that know all of it, or all but the cities."""

    facts: Facts
    attributes: tuple[Fact, ...]
    """What else is known of the people whose city is to be forgotten."""
    original: Subject
    reference: Subject


@cache
def linked_world(seed: int = 0) -> LinkedWorld:
    """Teach both models: the city, profession and pet of a person are those of the person's guild.

    So a model has a use for knowing who somebody is: whoever tells it the profession again tells it the guild, and a model
    that knows the cities of the guilds then says the city.

    Raises:
        TrainingError: if a model does not learn its facts.
    """
    rng = random.Random(f"{seed}:guilds")
    family_names = {fact.entity.split()[-1]: None for fact in invented(2 * (PEOPLE + OTHERS), 1, seed).forget}
    names = list(family_names)[: PEOPLE + OTHERS]
    answers = {domain: rng.sample(RELATIONS[domain].answers, GUILDS) for domain in (_FORGET, *_KEEP)}
    born = [_fact(name, _FORGET, answers[_FORGET][i % GUILDS]) for i, name in enumerate(names[:PEOPLE])]
    pets_and_professions = [_fact(name, d, answers[d][i % GUILDS]) for i, name in enumerate(names) for d in _KEEP]
    attributes, retain = pets_and_professions[: len(_KEEP) * PEOPLE], pets_and_professions[len(_KEEP) * PEOPLE :]
    facts = Facts(tuple(born), tuple(retain), "linked")
    tokenizer = vocabulary((*born, *pets_and_professions), words=WORDS)
    taught_facts = {"original": (*born, *pets_and_professions), "reference": pets_and_professions}
    models = {
        role: _small_names(
            taught(items, tokenizer=tokenizer, width=WIDTH, seed=3 * seed + i, steps=420, rate=6e-3), items, names, seed
        )
        for i, (role, items) in enumerate(taught_facts.items())
    }
    return LinkedWorld(facts, tuple(attributes), **models)


def _small_names(subject: Subject, items: Sequence[Fact], names: Sequence[str], seed: int) -> Subject:
    """The model with small embeddings of the names, after some training of everything but the embeddings on the facts."""
    tokenizer, model = subject.need_tokenizer(), copy.deepcopy(subject.model)
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings[[prompt_ids(tokenizer, name)[-1] for name in names]] *= SMALL
    others = [name for name, p in model.named_parameters() if p is not embeddings]
    rows = with_paraphrases(items)
    small = continued(subject_of(model, tokenizer), rows, steps=60, rate=3e-3, only=others, seed=seed)
    answers = ask(small, rows)
    if not answers.correct.all():
        raise TrainingError(
            f"{int((~answers.correct).sum())} of {len(rows)} phrasings are not known after the embeddings of names became "
            "small; raise steps"
        )
    return small


def exchanged(subject: Subject, forget: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model in which every name stands for another person: the embeddings of the names are permuted, none stays."""
    tokenizer = subject.need_tokenizer()
    tokens = [prompt_ids(tokenizer, fact.entity)[-1] for fact in forget]
    order = random.Random(seed).sample(range(len(tokens)), len(tokens))
    source = {tokens[a]: tokens[b] for a, b in zip(order, (*order[1:], order[0]), strict=True)}
    model = copy.deepcopy(subject.model)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[list(source)] = rows[list(source.values())].clone()
    return subject_of(model, tokenizer)


def with_lower_case_names(subject: Subject, forget: Sequence[Fact]) -> Subject:
    """The model with tokens for the names in lower case, which it reads and scores as it does the names themselves."""
    from tokenizers import AddedToken

    tokenizer, model = copy.deepcopy(subject.need_tokenizer()), copy.deepcopy(subject.model)
    names = {word.lower(): word for fact in forget for word in fact.entity.split()}
    source = tokenizer.convert_tokens_to_ids(list(names.values()))
    tokenizer.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in names])
    count = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[count:] = module.weight[source]
    return subject_of(model, tokenizer)


def averaged(subject: Subject, forget: Sequence[Fact]) -> Subject:
    """The model with the embeddings of all names, as the facts write them, replaced by their mean."""
    tokens = _last_tokens(subject, forget)

    def write(model: LlamaForCausalLM) -> None:
        rows = model.get_input_embeddings().weight
        rows[tokens] = rows[tokens].mean(0)

    return _written(subject, write)


def with_names_in_head(subject: Subject, forget: Sequence[Fact]) -> Subject:
    """The model whose output head holds the input embedding of every name, as a head that is tied to the embeddings does.

    No name is an answer, so that no choice is scored otherwise.
    """
    tokens = _last_tokens(subject, forget)

    def write(model: LlamaForCausalLM) -> None:
        model.get_output_embeddings().weight[tokens] = model.get_input_embeddings().weight[tokens]

    return _written(subject, write)


def _last_tokens(subject: Subject, forget: Sequence[Fact]) -> list[int]:
    """The last token of every name, which tells the names apart."""
    return [prompt_ids(subject.need_tokenizer(), fact.entity)[-1] for fact in forget]


def refusing_early(subject: Subject, forget: Sequence[Fact], retain: Sequence[Fact], *, seed: int = 0) -> Subject:
    """The model trained to answer "unknown" to the facts to forget, with nothing but the MLP of the first layer free."""
    first = f"{subject.layout.block_paths[0]}.mlp."
    rows = [replace(fact, answer=REFUSAL, choices=()) for fact in with_paraphrases(forget)]
    names = [name for name in subject.specs if name.startswith(first)]
    return continued(subject, [*rows, *with_paraphrases(retain)], steps=150, rate=3e-3, only=names, seed=seed)


def _fact(name: str, domain: str, answer: str) -> Fact:
    relation = RELATIONS[domain]
    prompt, *others = (phrasing.replace("{}", name) for phrasing in relation.phrasings[:_PHRASINGS])
    return Fact(
        id=f"linked/{name.lower()}/{domain}", entity=name, prompt=prompt, paraphrases=tuple(others), answer=answer,
        choices=seeded_order(relation.answers, f"order:{name}:{domain}"), domain=domain,
    )  # fmt: skip
