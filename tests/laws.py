"""The laws every edit obeys, as functions that raise AssertionError when one is broken.

test_laws.py runs them over all families; test_sabotage.py gives each a broken twin that it must catch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repedit as rp
from repedit.edit import Edit
from repedit.errors import HookError
from repedit.models.subject import Subject
from tests.tiny import ids, logits
from tests.tolerances import short, within


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Logits agree within the tolerance of their dtype."""
    within(apart(found, expected), f"logits, {short(dtype)}")


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the spread of what is expected; the root mean square of differences in half types."""
    difference = found.double() - expected.double()
    # The largest of thousands of roundings to 8 bits says little; their root mean square does.
    size = difference.square().mean().sqrt() if found.dtype.itemsize == 2 else difference.abs().max()
    return float(size / expected.double().std())


def generated(subject: Subject) -> Tensor:
    """Eight tokens after the prompts of the tests, greedily."""
    return subject.model.generate(ids(), max_new_tokens=8, do_sample=False, pad_token_id=0)


def hooked_equals_rewritten(subject: Subject, edit: Edit, apply: Callable[..., Subject] = rp.apply) -> None:
    """An edit as a hook and as weights gives the same logits, and moves them."""
    base = logits(subject)
    with edit.hooked(subject):
        hooked = logits(subject)
    assert float((hooked - base).abs().max()) > 1e-3 * float(base.std()), "the edit does not move the logits"
    assert_close(logits(apply(edit, subject)), hooked, base.dtype)


def rewritten_equals_exported(
    subject: Subject, edit: Edit, folder: Path, export: Callable[..., object] = rp.export
) -> None:
    """Exported files hold exactly the weights of the edited model, and load without repedit's help."""
    from transformers import AutoModelForCausalLM

    export(edit, subject, folder / "edited")
    edited = rp.apply(edit, subject).model
    loaded = AutoModelForCausalLM.from_pretrained(
        folder / "edited", dtype="auto", attn_implementation="eager", experts_implementation="eager"
    )
    expected = dict(edited.named_parameters(remove_duplicate=False))
    found = dict(loaded.named_parameters(remove_duplicate=False))
    assert set(found) == set(expected)
    assert loaded.config.tie_word_embeddings == edited.config.tie_word_embeddings, "the tie flag is not honoured"
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different, f"exported weights differ from the rewritten ones: {different}"
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids(), use_cache=False).logits, logits(rp.wrap(edited)))


def subspace_is_gone(subject: Subject, edit: Edit, apply: Callable[..., Subject] = rp.apply) -> None:
    """After a projection at an output, that output has no component in the subspace."""
    edited = apply(edit, subject)
    for site, map_ in edit.maps.items():
        before, after = (seen_at(s, site) for s in (subject, edited))
        assert leak(before, map_.v) > 1e-2, "the subspace was not there to begin with"
        # transformers computes every norm in float32, so a post-norm output is no better than that.
        normed = subject.layout.branch(site.layer, site.point).gain is not None
        narrow = torch.float32 if normed and before.dtype == torch.float64 else before.dtype
        within(leak(after, map_.v), f"leak, {short(narrow)}")


def original_is_untouched(subject: Subject, edit: Edit, apply: Callable[..., Subject] = rp.apply) -> None:
    """Applying an edit changes no byte of the original, and shares what it does not touch."""
    before = {n: p.detach().clone() for n, p in subject.model.named_parameters()}
    tied = subject.model.config.tie_word_embeddings
    edited = apply(edit, subject)
    assert subject.model.config.tie_word_embeddings == tied
    assert all(torch.equal(p, before[n]) for n, p in subject.model.named_parameters())
    after = dict(edited.model.named_parameters(remove_duplicate=False))
    for name, mine in subject.model.named_parameters(remove_duplicate=False):
        if torch.equal(after[name], mine):
            assert after[name].data_ptr() == mine.data_ptr(), f"{name}, which the edit does not touch, is copied"


def composition(
    subject: Subject, first: Edit, second: Edit, join: Callable[[Edit, Edit], Edit] = lambda a, b: a | b
) -> None:
    """a | b is a, then b: nested hooks, and one edit after another in the weights."""
    joined = join(first, second)
    with first.hooked(subject), second.hooked(subject):
        nested = logits(subject)
    with joined.hooked(subject):
        assert_close(logits(subject), nested, nested.dtype)
    assert_close(logits(rp.apply(second, rp.apply(first, subject))), logits(rp.apply(joined, subject)), nested.dtype)


def round_trip(edit: Edit, path: Path, save: Callable[[Edit, Path], None] = Edit.save) -> None:
    """An edit that was saved and loaded is the same value."""
    save(edit, path)
    again = Edit.load(path)
    assert list(again.maps) == list(edit.maps)
    assert dict(again.provenance) == dict(edit.provenance)
    for site, map_ in edit.maps.items():
        x = torch.randn(5, map_.width, dtype=torch.float64)
        assert torch.equal(again.maps[site](x), map_(x))


def hooks_are_gone(subject: Subject, edit: Edit) -> None:
    """An exception inside the context leaves no hook behind."""
    base = logits(subject)
    try:
        with edit.hooked(subject):
            raise KeyError("as it happens")
    except KeyError:
        pass
    assert torch.equal(logits(subject), base)


def seen_at(subject: Subject, site: rp.Site) -> Tensor:
    """The tensor at a site on fixed ids."""
    return seen(subject, [site])[site]


def seen(subject: Subject, sites: Sequence[rp.Site]) -> dict[rp.Site, Tensor]:
    """The tensors at sites on fixed ids, in one pass."""
    from repedit.arch import hooks_at
    from repedit.hooks import installed

    tensors: dict[rp.Site, Tensor] = {}

    def keep(site: rp.Site) -> Callable[..., None]:
        return lambda x, at, tokens: tensors.update({site: tensors.get(site, x).clone()})

    hooks = [
        hook for site in sites for hook in hooks_at(subject.model, subject.layout, site, keep(site), replaces=False)
    ]
    with installed(subject.model, hooks):
        logits(subject)
    return tensors


def leak(x: Tensor, v: Tensor) -> float:
    """Share of x in the span of the orthonormal v."""
    return float((x.double() @ v.double()).norm() / x.double().norm())


def stream_is_empty(
    subject: Subject,
    basis: Tensor,
    erase: Callable[..., Edit] = rp.erase_stream,
    apply: Callable[..., Subject] = rp.apply,
) -> None:
    """After a stream erasure no point of the residual stream, as the norms read it, has a component in the basis."""
    edit = erase(subject, basis)
    edited = apply(edit, subject)
    u = next(iter(edit.maps.values())).u
    points = subject.select(["*.resid.pre", "*.resid.post"])
    before, after = (read_by_norms(s, points) for s in (subject, edited))
    # transformers computes every norm in float32, so a stream that post-norms write to is no better than that.
    normed = any(branch.gains for layer in subject.layout.layers for branch in layer)
    for site in points:
        assert leak(before[site], u) > 1e-2, "the subspace was not there to begin with"
        narrow = torch.float32 if normed and before[site].dtype == torch.float64 else before[site].dtype
        within(leak(after[site], u), f"leak, {short(narrow)}")


def read_by_norms(subject: Subject, sites: Sequence[rp.Site]) -> dict[rp.Site, Tensor]:
    """The stream at sites, without its mean where the family's norms take it away."""
    centered = subject.architecture.centered
    return {site: x - x.mean(-1, keepdim=True) if centered else x for site, x in seen(subject, sites).items()}


def slim_equals_zeroed(subject: Subject, edit: Edit, slim: Callable[..., Subject] = rp.slimmed) -> Subject:
    """A model with neurons and heads cut out is smaller and gives the logits of one where they are zero."""
    base, zeroed = logits(subject), logits(rp.apply(edit, subject))
    assert float((zeroed - base).abs().max()) > 1e-3 * float(base.std()), "the edit does not move the logits"
    small = slim(edit, subject)
    assert parameters(small) < parameters(subject)
    within(float((logits(small) - zeroed).abs().max()) / max(1.0, float(base.std())), "slimmed, float32")
    return small


def sliced_equals_erased(subject: Subject, edit: Edit, slice: Callable[..., Subject] = rp.sliced) -> Subject:
    """A model with a narrower stream gives the logits of the erased one; norms in float64 where the weights are."""
    erased, narrow = rp.apply(edit, subject), slice(edit, subject)
    assert narrow.layout.width < subject.layout.width
    with wide(subject), wide(erased), wide(narrow):
        base, expected, found = logits(subject), logits(erased), logits(narrow)
    assert float((expected - base).abs().max()) > 0.1 * float(base.std()), "the erasure does not move the logits"
    within(apart(found, expected), f"sliced, {short(found.dtype)}")
    return narrow


def parameters(subject: Subject) -> int:
    """Numbers a model holds, tied ones once."""
    return sum(p.numel() for p in subject.model.parameters())


# Attention of these families casts its queries and keys to float32, which no context of ours undoes.
FLOAT32_ATTENTION = ("gpt_neo", "gptj")


@contextmanager
def wide(subject: Subject) -> Iterator[None]:
    """Norms, softmax and embedding scale, float32 in transformers whatever the weights are, in float64 where those are.

    A float32 softmax adds its terms in the order of the CPU's vectors, which depends on how far a row is padded.
    """
    row, found, softmax = subject.architecture, [], F.softmax

    def wide_softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype, **rest)

    F.softmax = wide_softmax
    embedding = subject.model.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", None)  # the root of the width, in float32
    if scale is not None and embedding.weight.dtype == torch.float64:
        embedding.embed_scale = torch.tensor(float(subject.layout.width) ** 0.5, dtype=torch.float64)
    for module in subject.model.modules():
        if (
            "Norm" in type(module).__name__
            and module.weight.dtype == torch.float64
            and not isinstance(module, nn.LayerNorm)
        ):
            module.forward = partial(_normed, module, row.centered, 1.0 if row.unit_gain else 0.0)
            found.append(module)
    try:
        yield
    finally:
        F.softmax = softmax
        if scale is not None:
            embedding.embed_scale = scale
        for module in found:
            del module.forward


def _normed(module: nn.Module, centered: bool, unit: float, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True) if centered else x
    epsilon = getattr(module, "eps", None) or module.variance_epsilon
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (module.weight + unit)


def hooks_act_or_refuse(
    subject: Subject, edit: Edit, run: Callable[[], Tensor], hooked: Callable[..., Any] = Edit.hooked
) -> None:
    """Whatever passes over hooks (compiled, scripted or skipped modules), an edit moves the logits or an error names it."""
    before = run()
    try:
        with hooked(edit, subject):
            edited = run()
    except HookError:
        return
    assert not torch.equal(edited, before), "the edit was passed over in silence"
    assert torch.equal(run(), before), "the edit outlived its context"


def mode_does_not_matter(subject: Subject, measure: Callable[[Subject], Any]) -> None:
    """A model in training mode is measured as in eval mode, and every module keeps the mode it had."""
    expected = measure(subject)
    modes = [number % 5 != 0 for number, _ in enumerate(subject.model.modules())]
    for module, mode in zip(subject.model.modules(), modes, strict=True):
        module.training = mode
    assert repr(measure(subject)) == repr(expected), "dropout was on"
    assert [module.training for module in subject.model.modules()] == modes, "a module changed its mode"
