"""What cutting and narrowing do to SmolLM2-135M: parameters, bytes on the disk, and how far the logits are from the
zeroed or erased model's. Run as `python -m bench.smaller`; a few minutes.

Masks are random, 5 to 8 % of the neurons of a layer; 18 random directions are erased from the stream.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

import repedit as rp
from bench.record import record
from repedit.models.default_model import cached
from repedit.models.subject import Subject

SEED, DIRECTIONS = 0, 18
IDS = torch.randint(100, 40_000, (2, 64), generator=torch.Generator().manual_seed(1))


def masks(lm: Subject) -> rp.Edit:
    """Neurons of every layer pruned at random: 5 % of the first, 8 % of the last."""
    generator = torch.Generator().manual_seed(SEED)
    sites = lm.select("*.mlp.neurons")
    shares = torch.linspace(0.05, 0.08, len(sites))
    drawn = [torch.rand(1536, generator=generator) > share for share in shares]
    return rp.Edit(
        {site: rp.Diagonal.mask(keep) for site, keep in zip(sites, drawn, strict=True)}, {"method": "random"}
    )


def slimmed(lm: Subject, layout: str, folder: Path) -> dict[str, Any]:
    """One layout: what is left, against the same neurons as zeros."""
    edit = masks(lm)
    zeroed, small = logits(rp.apply(edit, lm)), rp.slimmed(edit, lm, layout=layout)
    before, after = lm.model.num_parameters(), small.model.num_parameters()
    options = {"layout": layout, "structure": "slim"}
    sizes = [
        weights(exported(edit, lm, folder / f"{layout}-{name}", **o)) for name, o in (("whole", {}), ("cut", options))
    ]
    return {
        "name": f"slim, {layout}", "parameters": [before, after], "widths": sorted({p.shape[0] for n, p in small.model.named_parameters() if n.endswith("gate_proj.weight")}),
        "largest logit": float(zeroed.abs().max()), "logits differ by": float((logits(small) - zeroed).abs().max()),
        "bytes less": sizes[0] - sizes[1], "parameters less": before - after,
    }  # fmt: skip


def sliced(lm: Subject, folder: Path) -> dict[str, Any]:
    """The stream with fewer coordinates, against the erased one."""
    basis = torch.randn(576, DIRECTIONS, generator=torch.Generator().manual_seed(SEED))
    edit = rp.erase_stream(lm, basis)
    erased, narrow = rp.apply(edit, lm), rp.sliced(edit, lm)
    expected = logits(erased)
    exported(edit, lm, folder / "narrow", structure="slice")
    return {
        "name": "slice", "width": [576, narrow.model.config.hidden_size],
        "parameters": [lm.model.num_parameters(), erased.model.num_parameters(), narrow.model.num_parameters()],
        "logits differ by": float((logits(narrow) - expected).abs().max()),
        "effect of the erasure": float((logits(lm) - expected).abs().max()),
        "bytes": [weights(cached()), weights(folder / "narrow")],
    }  # fmt: skip


def exported(edit: rp.Edit, lm: Subject, target: Path, **options: Any) -> Path:
    """Export, and the directory."""
    rp.export(edit, lm, target, **options)
    return target


def weights(folder: Path) -> int:
    """Bytes of the tensors in a checkpoint's files."""
    from repedit.io.checkpoint import open_shards

    return sum(spec.nbytes for spec in open_shards(folder).specs.values())


def logits(lm: Subject) -> torch.Tensor:
    """Of random tokens."""
    with torch.no_grad():
        return lm.model(IDS, use_cache=False).logits


def main() -> None:
    """Cut and narrow, record."""
    torch.set_num_threads(1)
    lm = rp.load("smollm2-135m")
    with tempfile.TemporaryDirectory() as name:
        rows = [slimmed(lm, layout, Path(name)) for layout in ("uniform", "ragged")]
        rows.append(sliced(lm, Path(name)))
    for row in rows:
        print(row)
    print(record("smaller", rows, seed=SEED, model=lm.fingerprint()))


if __name__ == "__main__":
    main()
