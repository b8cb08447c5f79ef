"""Coordinates for an erased residual stream, and what they make of the tensors that write it, read it and scale it.

Let V (d, s), s = d - k, be orthonormal with range what the erasure leaves. The stream y = V^T x holds all of x, and
mean_d(x^2) = (s / d) mean_s(y^2), so x / sqrt(mean_d(x^2) + eps) = sqrt(d / s) V y / sqrt(mean_s(y^2) + eps d / s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repedit.fit.subspace import complement, orthonormal
from repedit.maps import LowRank
from repedit.plan import Read, Resize


def coordinates(map_: LowRank, *, centered: bool) -> Float[Tensor, "d s"]:
    """V: an orthonormal basis, in float64, of what a projection leaves of the stream.

    Where norms subtract the mean, V carries it: V = A B^T + 1_d 1_s^T / sqrt(d s), with A a basis of what is
    orthogonal to the removed directions and to 1_d, and B of what is orthogonal to 1_s. Then the mean of V^T x is that
    of x, times sqrt(d / s).
    """
    removed = orthonormal(map_.v.cpu())
    if not centered:
        return complement(removed)
    d = map_.width
    ones = torch.ones(d, 1, dtype=torch.float64) / d**0.5
    inner = complement(orthonormal(torch.cat([removed, ones], 1)))
    s = inner.shape[1] + 1
    even = torch.ones(s, 1, dtype=torch.float64) / s**0.5
    return inner @ complement(even).T + ones @ even.T


@dataclass(frozen=True, eq=False)
class Write(Resize):
    """What writes the stream, in its coordinates: W (d, i) -> A W, or A on the last axis of an embedding or a bias."""

    matrix: Float[Tensor, "s d"]
    """A = V^T P; for an orthogonal projection V^T alone."""
    last: bool
    """Whether the stream is the last axis of the stored tensor."""
    factor: float = 1.0
    """sqrt(d / s) for an embedding that the model multiplies by the root of the width."""

    def __call__(self, tensor: Tensor, read: Read) -> Tensor:
        matrix = self.matrix.to(tensor) * self.factor
        return tensor @ matrix.T if self.last else matrix @ tensor

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        s = self.matrix.shape[0]
        return (*before[:-1], s) if self.last else (*before[:-2], s, before[-1])

    def describe(self) -> str:
        return f"writes: {self.matrix.shape[1]} coordinates of the stream become {self.matrix.shape[0]}"


@dataclass(frozen=True, eq=False)
class Observe(Resize):
    """What reads a norm of the stream: W (o, d) -> factor W diag(gain) V, with the gain of the norm and its bias inside.

    A bias b of the norm becomes ones, and is absorbed by centre(W diag(gain) V) factor + (W b) 1_s^T / s: the normed
    vector is orthogonal to 1_s, so the first term sees nothing of the ones and the second nothing else.
    """

    basis: Float[Tensor, "d s"]
    gain: str
    """Weight of the norm."""
    unit_gain: bool
    bias: str | None
    """Bias of the norm."""
    factor: float
    """sqrt(d / s); in the readers because it is not a number that half types hold, unlike the 1 left in the norm."""
    extra: float = 1.0
    """sqrt(d / s) for rows that pass a norm of head width, which adds the same epsilon."""

    def __call__(self, tensor: Tensor, read: Read) -> Tensor:
        gain = read(self.gain).to(tensor) + (1.0 if self.unit_gain else 0.0)
        new = (tensor * gain) @ self.basis.to(tensor) * self.factor
        if self.bias is not None:
            shift = tensor @ read(self.bias).to(tensor)
            new = new - new.mean(-1, keepdim=True) + shift[..., None] / new.shape[-1]
        return new * self.extra

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return (*before[:-1], self.basis.shape[1])

    def describe(self) -> str:
        return (
            f"reads: {self.basis.shape[0]} coordinates of the stream become {self.basis.shape[1]}, {self.gain} absorbed"
        )


@dataclass(frozen=True)
class Constant(Resize):
    """A norm's gain or bias, whose values its readers have absorbed."""

    width: int
    value: float

    def __call__(self, tensor: Tensor, read: Read) -> Tensor:
        return tensor.new_full((self.width,), self.value)

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return (self.width,)

    def describe(self) -> str:
        return f"norm: {self.value:g} in {self.width} coordinates, its values are in its readers"


@dataclass(frozen=True)
class Scaled(Resize):
    """A tensor times a number, in its old shape."""

    factor: float

    def __call__(self, tensor: Tensor, read: Read) -> Tensor:
        return tensor * self.factor

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        return before

    def describe(self) -> str:
        return f"scaled by {self.factor:.6g}, for the epsilon of the norm that follows"
