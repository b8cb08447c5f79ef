"""Forward passes of a model, and of its blocks alone, with the first tensor that each module receives and returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from repedit.arch.offload import execution_device
from repedit.arch.spec import text_config
from repedit.errors import HookError
from repedit.hooks import Hook, installed, primary


class Call(NamedTuple):
    """One call of a module, with the first tensor that it received and returned, in float32; None where there is none."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    received: Any
    returned: Any


class Passes:
    """One pass of a model on a few tokens, and passes of its blocks alone on what they received in it; all in float32.

    Args:
        changed: tensors that take the place of the model's in every pass, by name.
        blocks: paths of the blocks, if they are known; otherwise they must be in an `nn.ModuleList`.
    """

    def __init__(self, model: Any, changed: Mapping[str, Tensor] | None = None, blocks: Sequence[str] = ()) -> None:
        self.model, self.blocks = model, blocks
        # A rounding can send a token to another expert, so half types are checked in float32.
        wide = {id(p): p.float() for p in model.parameters() if p.dtype.itemsize < 4}
        named = list(model.named_parameters(remove_duplicate=False))
        self.parameters = {n: wide.get(id(p), p.detach()) for n, p in named} | dict(changed or {})
        # Under every name: a block may hold a tensor that the model names after another block.
        self.wide = {n: self.parameters[n] for n, p in named if id(p) in wide or n in (changed or {})}
        self.ids = text_ids(model)
        self.lists = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        self.calls = self.run()
        self.by_path = {call.path: call for call in self.calls}

    def run(self, changed: Mapping[str, Tensor] | None = None, ids: Tensor | None = None) -> list[Call]:
        """Run the whole model; the calls of its blocks, its embeddings and all members of its lists of modules."""
        modules: dict[str, nn.Module] = {p: m for p, m in self.model.named_modules() if isinstance(m, nn.Embedding)}
        modules |= {f"{path}.{i}": m for path, members in self.lists.items() for i, m in enumerate(members)}
        modules |= {path: self.model.get_submodule(path) for path in self.blocks}
        tensors = {n: self.wide[n] for n, _ in self.model.named_parameters() if n in self.wide} | dict(changed or {})
        inputs = {"input_ids": self.ids if ids is None else ids, "use_cache": False}
        with installed(self.model, []), _recorded(modules) as calls:
            functional_call(self.model, tensors, (), inputs, tie_weights=True)
        return calls

    def run_block(
        self, path: str, changed: Mapping[str, Tensor] | None = None, hooks: Sequence[Hook] = ()
    ) -> list[Call]:
        """Run a block alone, with other tensors or hooks; the calls of its modules, and of the block itself at last."""
        block, tensors = self.model.get_submodule(path), self.wide | dict(changed or {})
        weights = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
        modules = {f"{path}.{name}".rstrip("."): module for name, module in block.named_modules()}
        with installed(block, hooks), _recorded(modules) as calls:
            functional_call(block, weights, self.by_path[path].args, self.by_path[path].kwargs)
        return calls


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[list[Call]]:
    """The calls of modules, in the order in which they finish."""
    calls: list[Call] = []
    received: dict[str, Tensor] = {}

    def begin(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        if tensors:
            received[path] = tensors[0].float().clone()

    def end(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        try:
            returned = primary(output).float().clone()  # Falcon adds to it in place
        except HookError:
            returned = None
        calls.append(Call(path, args, kwargs, received.pop(path, None), returned))

    with ExitStack() as stack:
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(begin, path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(partial(end, path), with_kwargs=True).remove)
        yield calls


def text_ids(model: nn.Module) -> Tensor:
    """Two rows of 12 token ids, none of which the config names as special."""
    config = text_config(model.config)  # type: ignore[arg-type]
    fields = {**vars(model.config), **vars(config)}
    special = {v for k, v in fields.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    usable = torch.tensor([i for i in range(min(table.shape[0], 4096)) if i not in special])
    chosen = torch.randint(len(usable), (2, 12), generator=torch.Generator().manual_seed(0))
    return usable[chosen].to(execution_device(model.get_input_embeddings()))  # type: ignore[operator]
