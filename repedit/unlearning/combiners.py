"""Combiners: how the gradients of the forget side and of the retain side become one.

Every combiner is G = a g_f + b g_r, where a and b depend on the gradients only through |g_f|^2, |g_r|^2 and <g_f, g_r>.
A combiner is therefore a small function, and gradients are combined in one place of the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repedit.distributed import is_sharded, local_tensor
from repedit.errors import TrainingError, check_choice, check_finite_numbers, check_positive

Gradients = Sequence[Tensor | None]
"""One for each parameter; None where a parameter has no part in a loss."""
CHUNK = 1 << 20
"""Entries that are converted to float64 at a time."""
_NEGLIGIBLE = 1e-20
"""Mean squared entry up to which a gradient counts as zero."""


class InnerProducts(NamedTuple):
    """Inner products of the two gradients, taken over all trained parameters as one vector."""

    forget: float
    """|g_f|^2."""
    retain: float
    """|g_r|^2."""
    both: float
    """<g_f, g_r>."""
    entries: int

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two; NaN if one of them is zero."""
        norms = math.sqrt(self.forget * self.retain)
        return self.both / norms if norms else math.nan

    @property
    def is_vanishing(self) -> bool:
        """Whether the forget gradient is negligible."""
        return self.forget <= _NEGLIGIBLE * self.entries

    @property
    def without_negligible(self) -> InnerProducts:
        """The same with zeros in place of negligible gradients, so that nothing is divided by rounding noise."""
        forget = 0.0 if self.is_vanishing else self.forget
        retain = 0.0 if self.retain <= _NEGLIGIBLE * self.entries else self.retain
        return self._replace(forget=forget, retain=retain, both=self.both if forget and retain else 0.0)


class StepContext(NamedTuple):
    """What a combiner may use besides the gradients."""

    retain_loss: float
    epoch: float
    state: dict[str, float]
    """Its own memory between steps."""


@dataclass(frozen=True, eq=False)
class Combiner:
    """How two gradients become one."""

    name: str
    weights: Callable[[InnerProducts, StepContext], tuple[float, float]]
    """(a, b) of G = a g_f + b g_r. Inner products with a negligible gradient are 0; a negligible g_f gets a = 0."""
    options: Mapping[str, Any] = field(default_factory=dict)
    separate: bool = True
    """Whether the two gradients are needed separately; False saves one copy of them."""
    per_tensor: bool = False
    """Whether the weights are computed for each tensor."""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


def weighted_sum(gamma: float = 1.0, alpha: float = 1.0, *, separate: bool = True) -> Combiner:
    """G = gamma g_f + alpha g_r.

    Args:
        separate: False adds the gradients up as they are computed, which saves one copy; the log then has no cosine.
    """
    check_positive(gamma=gamma, alpha=alpha)
    options = {"gamma": gamma, "alpha": alpha}
    return Combiner("weighted_sum", lambda products, context: (gamma, alpha), options, separate)


def blur(
    gamma: float = 1.0, alpha: float = 1.0, when: str = "always", scope: str = "global", role_first: str = "forget"
) -> Combiner:
    """Bi-level: G = gamma g_f + alpha (g_r - c g_f), c = <g_r, g_f> / |g_f|^2, so <G, g_f> = gamma |g_f|^2.

    The retain gradient is projected on the complement of the forget gradient whatever the sign of c. The published MUSE
    and TOFU variants use gamma = alpha = 1, the WMDP variant alpha = 800. The identity holds for G and for a step of
    SGD; Adam's preconditioning breaks it in the weights. Where g_f and g_r strongly oppose each other (RMU: cosine
    about -0.9) the projection makes forgetting happen at the cost of retention: tune alpha again. Where they are nearly
    orthogonal (NPO: about -0.1) it is close to the weighted sum.

    Args:
        when: "conflict" projects only where c < 0.
        scope: "tensor" takes the inner products of each tensor separately.
        role_first: "retain" swaps the roles: G = alpha g_r + gamma (g_f - c' g_r).
    Raises:
        ArgumentError: if gamma or alpha is not positive. UnknownName: if another option does not exist.
    Reference: arXiv:2506.08164.
    """
    check_positive(gamma=gamma, alpha=alpha)
    check_choice(("always", "conflict"), when=when)
    check_choice(("global", "tensor"), scope=scope)
    check_choice(("forget", "retain"), role_first=role_first)

    def weights(products: InnerProducts, _context: StepContext) -> tuple[float, float]:
        if when == "conflict" and products.both >= 0:
            return gamma, alpha
        if role_first == "retain":
            return gamma, alpha - gamma * products.both / products.retain if products.retain else alpha
        return gamma - alpha * products.both / products.forget if products.forget else gamma, alpha

    options = {"gamma": gamma, "alpha": alpha, "when": when, "scope": scope, "role_first": role_first}
    return Combiner("blur", weights, options, per_tensor=scope == "tensor")


def conflict_only(gamma: float = 1.0, alpha: float = 1.0) -> Combiner:
    """`blur` that projects only where the gradients oppose each other; Yu et al. 2020, arXiv:2001.06782."""
    return blur(gamma, alpha, when="conflict")


def norm_diff() -> Combiner:
    """G = g_f / |g_f| + g_r / |g_r|, without a gradient that is negligible."""

    def weights(products: InnerProducts, _context: StepContext) -> tuple[float, float]:
        return _inverse_norm(products.forget), _inverse_norm(products.retain)

    return Combiner("norm_diff", weights)


def unit_forget(gamma: float = 1.0, alpha: float = 1.0) -> Combiner:
    """G = gamma g_f / |g_f| + alpha g_r: every step forgets by the same length; a g_f that is negligible is left out."""
    check_positive(gamma=gamma, alpha=alpha)

    def weights(products: InnerProducts, _context: StepContext) -> tuple[float, float]:
        return gamma * _inverse_norm(products.forget), alpha

    return Combiner("unit_forget", weights, {"gamma": gamma, "alpha": alpha})


def primal_dual(epsilon: float, eta: float = 1.0, warmup_epochs: float = 5.0) -> Combiner:
    """G = g_f + lambda g_r with lambda <- max(0, lambda + eta (L_r - epsilon)), starting from lambda = 1.

    Args:
        epsilon: the retain loss that is allowed.
        warmup_epochs: epochs for which lambda stays 1.
    """
    check_positive(eta=eta)
    check_finite_numbers(epsilon=epsilon, warmup_epochs=warmup_epochs)

    def weights(_products: InnerProducts, context: StepContext) -> tuple[float, float]:
        multiplier = context.state.get("lambda", 1.0)
        if context.epoch >= warmup_epochs:
            multiplier = max(0.0, multiplier + eta * (context.retain_loss - epsilon))
        context.state["lambda"] = multiplier
        return 1.0, multiplier

    return Combiner("primal_dual", weights, {"epsilon": epsilon, "eta": eta, "warmup_epochs": warmup_epochs})


COMBINERS = (weighted_sum, blur, conflict_only, norm_diff, unit_forget, primal_dual)
"""Every combiner; recipe files name them."""


class Combination(NamedTuple):
    """How two gradients were combined."""

    products: InnerProducts
    forget_weight: float
    retain_weight: float

    @property
    def fallback(self) -> bool:
        """Whether the forget gradient was negligible, so that G is b g_r with the weight b of the combiner."""
        return self.products.is_vanishing


def combine(combiner: Combiner, forget: Gradients, parameters: Sequence[Tensor], context: StepContext) -> Combination:
    """Replace the retain gradients in `.grad` of the parameters by the combined ones, in place.

    There is one device synchronization: all inner products are read together, those of shards summed over the ranks.

    Raises:
        TrainingError: if a gradient is not finite, naming the side and the number of the first such tensor.
    """
    retain = [p.grad for p in parameters]
    stacked = torch.stack([_tensor_products(f, r, p) for f, r, p in zip(forget, retain, parameters, strict=True)])
    if is_sharded(parameters[0]):
        torch.distributed.all_reduce(stacked)
    by_tensor = stacked.tolist()
    for column, side in enumerate(("forget", "retain")):
        bad = next((number for number, row in enumerate(by_tensor) if not math.isfinite(row[column])), None)
        if bad is not None:
            raise TrainingError(
                f"the {side} gradient of trained tensor {bad} is not finite (|g|^2 = {by_tensor[bad][column]}); lower lr, or "
                "load the model in float32"
            )
    sizes = [p.numel() for p in parameters]
    forget_square, retain_square, product = (math.fsum(column) for column in zip(*by_tensor, strict=True))
    total = InnerProducts(forget_square, retain_square, product, sum(sizes))
    shared = _weights(combiner, total, context)
    for (f_square, r_square, both), size, f, p in zip(by_tensor, sizes, forget, parameters, strict=True):
        a, b = shared
        if combiner.per_tensor:
            a, b = _weights(combiner, InnerProducts(f_square, r_square, both, size), context)
        if p.grad is not None:
            p.grad.mul_(b)
        if f is not None and p.grad is not None:
            p.grad.add_(f, alpha=a)
        elif f is not None:
            p.grad = f.mul_(a)
    return Combination(total, *shared)


def _weights(combiner: Combiner, products: InnerProducts, context: StepContext) -> tuple[float, float]:
    forget, retain = combiner.weights(products.without_negligible, context)
    return (0.0 if products.is_vanishing else forget), retain


def _inverse_norm(squared: float) -> float:
    return 1 / math.sqrt(squared) if squared else 0.0


def _tensor_products(forget: Tensor | None, retain: Tensor | None, like: Tensor) -> Tensor:
    """(|g_f|^2, |g_r|^2, <g_f, g_r>) of one tensor, in float64."""
    total = torch.zeros(3, dtype=torch.float64, device=like.device)
    flat = [None if g is None else local_tensor(g).reshape(-1) for g in (forget, retain)]
    for start in range(0, local_tensor(like).numel(), CHUNK):
        f, r = (None if g is None else g[start : start + CHUNK].double() for g in flat)
        if f is not None:
            total[0] += f @ f
        if r is not None:
            total[1] += r @ r
        if f is not None and r is not None:
            total[2] += f @ r
    return total
