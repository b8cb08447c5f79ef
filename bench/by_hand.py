"""An edited checkpoint as one would make it without repedit: load the model, change its weights, save it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from repedit.edit import Edit
from repedit.linear_maps import Diagonal, LowRank
from repedit.sites import Point


def load_edit_save(edit: Edit, source: str | Path, target: str | Path) -> None:
    """What `rp.export` writes for an edit of a model like Llama, with transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for site, map_ in edit.maps.items():
            layer = model.model.layers[site.layer]
            if isinstance(map_, Diagonal):
                _zero(layer.mlp, ~map_.kept)
            elif isinstance(map_, LowRank):
                out = layer.self_attn.o_proj if site.point is Point.ATTN_OUT else layer.mlp.down_proj
                weight = out.weight.float()
                out.weight.copy_(weight - map_.u.float() @ (map_.v.float().T @ weight))
    model.save_pretrained(target)


def _zero(mlp: nn.Module, pruned: torch.Tensor) -> None:
    mlp.gate_proj.weight[pruned] = 0  # type: ignore[union-attr, operator]
    mlp.up_proj.weight[pruned] = 0  # type: ignore[union-attr, operator]
    mlp.down_proj.weight[:, pruned] = 0  # type: ignore[union-attr, operator]
