"""Combiners: two gradients, of what is forgotten and of what is retained, become one.

Every combiner here is G = a g_f + b g_r with two numbers that depend on the gradients through |g_f|^2, |g_r|^2 and
<g_f, g_r> alone, so one is a small function, and the loop has one place where gradients are joined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repedit.errors import TrainingError, UnknownName, check_finite_numbers, check_positive, nearest
from repedit.unlearning.sharding import is_sharded, local

CHUNK = 1 << 20
"""Entries that are widened to float64 at a time."""
_NOTHING = 1e-20
"""The mean squared entry up to which a gradient counts as zero."""
Gradients = Sequence[Tensor | None]
"""One a parameter; None where a parameter has no part in a loss."""


class Dots(NamedTuple):
    """Inner products of the two gradients, over all trained parameters as one vector."""

    forget: float
    """|g_f|^2."""
    retain: float
    """|g_r|^2."""
    both: float
    """<g_f, g_r>."""
    entries: int

    @property
    def cosine(self) -> float:
        """Of the angle between the two; NaN where one of them is zero."""
        size = math.sqrt(self.forget * self.retain)
        return self.both / size if size else math.nan

    @property
    def vanished(self) -> bool:
        """Whether there is no forget gradient to speak of."""
        return self.forget <= _NOTHING * self.entries

    @property
    def present(self) -> Dots:
        """The same with zeros in place of what there is nothing to speak of, so that nothing is divided by rounding noise."""
        forget = 0.0 if self.vanished else self.forget
        retain = 0.0 if self.retain <= _NOTHING * self.entries else self.retain
        return self._replace(forget=forget, retain=retain, both=self.both if forget and retain else 0.0)


class Moment(NamedTuple):
    """What a combiner may know besides the gradients."""

    retain_loss: float
    epoch: float
    state: dict[str, float]
    """Its own memory between steps."""


@dataclass(frozen=True, eq=False)
class Combiner:
    """How two gradients become one."""

    name: str
    weights: Callable[[Dots, Moment], tuple[float, float]]
    """(a, b) of G = a g_f + b g_r. An inner product is 0 where a gradient vanishes; a forget gradient that does has a = 0."""
    options: Mapping[str, Any] = field(default_factory=dict)
    separate: bool = True
    """Whether the two gradients are needed apart; False saves one copy of them."""
    per_tensor: bool = False
    """Whether the numbers are found for each tensor on its own."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


def weighted_sum(gamma: float = 1.0, alpha: float = 1.0, *, separate: bool = True) -> Combiner:
    """G = gamma g_f + alpha g_r.

    Args:
        separate: False adds the gradients up as they come, which saves the memory of one copy; the log then has no cosine.
    """
    check_positive(gamma=gamma, alpha=alpha)
    options = {"gamma": gamma, "alpha": alpha}
    return Combiner("weighted_sum", lambda dots, now: (gamma, alpha), options, separate)


def blur(
    gamma: float = 1.0, alpha: float = 1.0, when: str = "always", scope: str = "global", role_first: str = "forget"
) -> Combiner:
    """Bi-level: G = gamma g_f + alpha (g_r - c g_f), c = <g_r, g_f> / |g_f|^2, so <G, g_f> = gamma |g_f|^2.

    The retain gradient is projected on the complement of the forget gradient whatever the sign of c. The published MUSE
    and TOFU variants use gamma = alpha = 1, the WMDP variant alpha = 800. The identity holds for G and for a step of SGD;
    Adam's preconditioning breaks it in the weights. Where g_f and g_r strongly oppose (RMU: cosine about -0.9) the
    projection makes forgetting happen and costs retention: tune alpha anew. Where they are nearly orthogonal (NPO: about
    -0.1) it is close to the weighted sum.

    Args:
        when: "conflict" projects only where c < 0.
        scope: "tensor" takes the inner products of each tensor on its own.
        role_first: "retain" swaps the roles: G = alpha g_r + gamma (g_f - c' g_r).
    Raises:
        ArgumentError: if gamma or alpha is not positive. UnknownName: if another option does not exist.
    Reference: arXiv:2506.08164.
    """
    check_positive(gamma=gamma, alpha=alpha)
    for what, value, valid in (
        ("when", when, ("always", "conflict")),
        ("scope", scope, ("global", "tensor")),
        ("role_first", role_first, ("forget", "retain")),
    ):
        if value not in valid:
            raise UnknownName(f"{what}={value!r}; {nearest(value, valid)}")

    def weights(dots: Dots, _now: Moment) -> tuple[float, float]:
        if when == "conflict" and dots.both >= 0:
            return gamma, alpha
        if role_first == "retain":
            return (gamma, alpha - gamma * dots.both / dots.retain) if dots.retain else (gamma, alpha)
        return (gamma - alpha * dots.both / dots.forget, alpha) if dots.forget else (gamma, alpha)

    options = {"gamma": gamma, "alpha": alpha, "when": when, "scope": scope, "role_first": role_first}
    return Combiner("blur", weights, options, per_tensor=scope == "tensor")


def conflict_only(gamma: float = 1.0, alpha: float = 1.0) -> Combiner:
    """`blur` that projects only where the gradients oppose each other; Yu et al. 2020, arXiv:2001.06782."""
    return blur(gamma, alpha, when="conflict")


def norm_diff() -> Combiner:
    """G = g_f / |g_f| + g_r / |g_r|; a gradient that vanishes is left out."""

    def weights(dots: Dots, _now: Moment) -> tuple[float, float]:
        return _inverse_norm(dots.forget), _inverse_norm(dots.retain)

    return Combiner("norm_diff", weights)


def primal_dual(epsilon: float, eta: float = 1.0, warmup_epochs: float = 5.0) -> Combiner:
    """G = g_f + lambda g_r with lambda <- max(0, lambda + eta (L_r - epsilon)), lambda 1 at the start.

    Args:
        epsilon: the retain loss that is allowed.
        warmup_epochs: lambda stays 1 so long.
    """
    check_positive(eta=eta)
    check_finite_numbers(epsilon=epsilon, warmup_epochs=warmup_epochs)

    def weights(_dots: Dots, now: Moment) -> tuple[float, float]:
        found = now.state.get("lambda", 1.0)
        if now.epoch >= warmup_epochs:
            found = max(0.0, found + eta * (now.retain_loss - epsilon))
        now.state["lambda"] = found
        return 1.0, found

    return Combiner("primal_dual", weights, {"epsilon": epsilon, "eta": eta, "warmup_epochs": warmup_epochs})


class Joined(NamedTuple):
    """What became of two gradients."""

    dots: Dots
    forget_weight: float
    retain_weight: float
    fallback: bool
    """There was no forget gradient, so G is b g_r, with the weight b that the combiner gives."""


def join(combiner: Combiner, forget: Gradients, parameters: Sequence[Tensor], now: Moment) -> Joined:
    """Replace the retain gradients in `.grad` of the parameters by the combined ones, in place.

    One device synchronisation: the inner products come back together, of shards summed over the ranks.

    Raises:
        TrainingError: if a gradient is not finite; which of the two, and the number of the first such tensor.
    """
    retain = [p.grad for p in parameters]
    found = torch.stack([_products(f, r, p) for f, r, p in zip(forget, retain, parameters, strict=True)])
    if is_sharded(parameters[0]):
        torch.distributed.all_reduce(found)
    products = found.tolist()
    for side, name in enumerate(("forget", "retain")):
        bad = next((number for number, row in enumerate(products) if not math.isfinite(row[side])), None)
        if bad is not None:
            raise TrainingError(
                f"the {name} gradient of trained tensor {bad} is not finite (|g|^2 = {products[bad][side]}); lower lr, or load the "
                "model in float32"
            )
    sizes = [p.numel() for p in parameters]
    forgotten, retained, both = (math.fsum(column) for column in zip(*products, strict=True))
    total = Dots(forgotten, retained, both, sum(sizes))
    shared = _weights(combiner, total, now)
    for number, (f, p) in enumerate(zip(forget, parameters, strict=True)):
        own = Dots(products[number][0], products[number][1], products[number][2], sizes[number])
        a, b = _weights(combiner, own, now) if combiner.per_tensor else shared
        if p.grad is not None:
            p.grad.mul_(b)
        if f is not None and p.grad is not None:
            p.grad.add_(f, alpha=a)
        elif f is not None:
            p.grad = f.mul_(a)
    return Joined(total, *shared, total.vanished)


def _weights(combiner: Combiner, dots: Dots, now: Moment) -> tuple[float, float]:
    forget, retain = combiner.weights(dots.present, now)
    return (0.0 if dots.vanished else forget), retain


def _inverse_norm(squared: float) -> float:
    return 1 / math.sqrt(squared) if squared else 0.0


def _products(forget: Tensor | None, retain: Tensor | None, like: Tensor) -> Tensor:
    """(|g_f|^2, |g_r|^2, <g_f, g_r>) of one tensor, in float64."""
    total = torch.zeros(3, dtype=torch.float64, device=like.device)
    flat = [None if g is None else local(g).reshape(-1) for g in (forget, retain)]
    for start in range(0, local(like).numel(), CHUNK):
        f, r = (None if g is None else g[start : start + CHUNK].double() for g in flat)
        if f is not None:
            total[0] += f @ f
        if r is not None:
            total[1] += r @ r
        if f is not None and r is not None:
            total[2] += f @ r
    return total
