"""A stored tensor by shape, and the logical matrix that a view picks out of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from repedit.io.safetensors import TensorSpec

Specs = Mapping[str, TensorSpec]
"""Shape and dtype by tensor name: all that a plan needs of a model."""


@dataclass(frozen=True)
class View:
    """A logical (out, in) matrix, or a vector of outputs, inside a stored tensor.

    The stored rows from `start` on are read as (groups, parts, size) and `part` is picked of each group. With `kernel`
    the stored tensor is the (out, in, *kernel) of a convolution, read as ((out *kernel), in).
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    groups: int = 1
    parts: int = 1
    part: int = 0
    transposed: bool = False
    kernel: bool = False

    def edit(self, stored: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A copy of the stored tensor in which this matrix is replaced by function(matrix); a vector becomes (out, 1)."""
        result = stored.clone()
        self.change(result, function)
        return result

    def change(self, stored: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        """The same in place, `function` being free to write into what it is given: a hundred experts in one tensor need
        no hundred copies of it."""
        window = self._window(stored)
        if self.kernel:
            inputs = window.movedim(2, -1)
            inputs.copy_(function(inputs.flatten(0, -2).clone()).reshape(inputs.shape))
            return
        matrix = window.flatten(0, 1)
        given = matrix[:, None] if matrix.ndim == 1 else matrix
        new = function(given)
        if new.data_ptr() != window.data_ptr() or new.stride() != given.stride():
            window.copy_(new.reshape(window.shape))

    def read(self, stored: Tensor) -> Tensor:
        """The matrix, or vector, itself."""
        window = self._window(stored)
        return window.movedim(2, -1).flatten(0, -2) if self.kernel else window.flatten(0, 1)

    def _window(self, stored: Tensor) -> Tensor:
        block = stored if self.expert is None else stored[self.expert]
        block = block.T if self.transposed and block.ndim == 2 else block
        return block[self.start :].unflatten(0, (self.groups, self.parts, -1))[:, self.part]
