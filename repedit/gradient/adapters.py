"""Low-rank adapters on the linear modules of the blocks, by peft; their dense product is what a delta holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from repedit.errors import MissingDependency, SelectionError, nearest
from repedit.gradient.parameters import Lora
from repedit.models import Subject


class Adapters:
    """Adapters in the modules of a model; call it on a copy.

    Raises:
        MissingDependency: if peft is not installed.
        SelectionError: if no linear module is selected.
    """

    def __init__(self, subject: Subject, names: tuple[str, ...], lora: Lora, seed: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingDependency("lora= needs peft: pip install 'repedit[adapters]'") from error
        self.model = subject.model
        self.modules = _linear(subject, names, lora)
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=self.modules,
            fan_in_fan_out=subject.architecture.transposed,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.model)
        self.tensors: dict[str, nn.Parameter] = {}
        for name, p in self.model.named_parameters():
            if ".lora_" in name:
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
                self.tensors[name] = p
            p.requires_grad_(".lora_" in name)

    def differences(self) -> dict[str, Tensor]:
        """scaling x B A of every adapted weight, as it is stored."""
        found = {}
        for path in self.modules:
            module: Any = self.model.get_submodule(path)
            found[f"{path}.weight"] = module.get_delta_weight("default").detach()
        return found


def _linear(subject: Subject, names: tuple[str, ...], lora: Lora) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(f"{path}." for path in subject.anatomy.block_paths)
    every = [
        name.removesuffix(".weight")
        for name in names
        if name.startswith(blocks)
        and name.endswith(".weight")
        and isinstance(subject.model.get_submodule(name.removesuffix(".weight")), nn.Linear | Conv1D)
    ]
    found = [path for path in every if not lora.modules or path.endswith(lora.modules)]
    if not found:
        raise SelectionError(
            f"lora={lora.modules or 'all linear modules'} selects none of {len(every)} linear modules; "
            f"{nearest(lora.modules[0], every) if lora.modules and every else 'select blocks with layers='}"
        )
    return found
