"""Collecting activity against what one would write by hand: a forward hook at every MLP and four sums in float32.

Run as `python -m bench.hooks`. Both read the same batch through the same model and must come to the same sums. The CPU
spent inside the hooks is compared, and that of the whole pass, in which hooks are a twentieth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import repedit as rp
from bench.record import record
from bench.timing import alternated, cpu, ratio
from repedit.activations.collection import Collection
from repedit.data.corpus import tokens

ROWS = ("hand-written hooks, CPU in the hooks / ours", "hand-written hooks, CPU of the whole pass / ours")


class ByHand:
    """Sums of z, |z|, z^2 and z > 0 at the input of every down-projection, over the tokens that count."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        self.layers = [layer.mlp.down_proj for layer in model.model.layers]  # type: ignore[union-attr]
        self.sums = torch.zeros(len(self.layers), 4, self.layers[0].in_features)
        self.model, self.mask, self.seconds = model, mask, 0.0

    def run(self, ids: Tensor) -> None:
        """One forward pass without the language-model head."""
        handles = [layer.register_forward_pre_hook(self._visit(i)) for i, layer in enumerate(self.layers)]
        try:
            with torch.no_grad():
                self.model.model(input_ids=ids)  # type: ignore[operator]
        finally:
            for handle in handles:
                handle.remove()

    def _visit(self, layer: int) -> Any:
        def visit(module: nn.Module, inputs: tuple[Tensor]) -> None:
            def add() -> None:
                z = inputs[0][self.mask]
                sums = self.sums[layer]
                sums[0] += z.sum(0)
                sums[1] += z.abs().sum(0)
                sums[2] += z.square().sum(0)
                sums[3] += (z > 0).sum(0)

            self.seconds += cpu(add)

        return visit


def against_hooks(subject: rp.Subject, pairs: int = 7) -> list[dict[str, Any]]:
    """MLP neurons of every layer, 8 x 128 tokens of which the first of each row does not count."""
    ids = torch.randint(100, 40_000, (8, 128), generator=torch.Generator().manual_seed(0))
    corpus = tokens([{"input_ids": ids}])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    last: list[Any] = []

    def ours() -> tuple[float, float]:
        whole = cpu(lambda: last.append(rp.collect(subject, corpus, progress=False)))
        return last[-1].seconds_in_hooks, whole

    def theirs() -> tuple[float, float]:
        hand = ByHand(subject.model, mask)
        whole = cpu(lambda: hand.run(ids))
        _agree(last[-1], hand)
        return hand.seconds, whole

    ours()
    rounds = alternated(ours, theirs, pairs=pairs)
    found = [ratio([{side: value[i] for side, value in each.items()} for each in rounds]) for i in (0, 1)]
    return [each.row(name, ">= 1.0", lambda r: r >= 1.0) for name, each in zip(ROWS, found, strict=True)]


def _agree(ours: Collection[Any], hand: ByHand) -> None:
    for sums, activity in zip(hand.sums, ours.values(), strict=True):
        for mine, yours in ((activity.abs, sums[1]), (activity.positive, sums[3])):
            torch.testing.assert_close(mine, yours.double(), rtol=1e-4, atol=1e-4)


def main() -> None:
    """Measure, print, record."""
    torch.set_num_threads(1)
    subject = rp.load("smollm2-135m")
    rows = against_hooks(subject)
    for row in rows:
        print(row)
    print(record("hooks", rows, seed=0, model=subject.fingerprint()))


if __name__ == "__main__":
    main()
