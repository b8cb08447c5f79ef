"""The one place where forward hooks are installed and removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Function = Callable[[Tensor], Tensor | None]


class Hook(NamedTuple):
    """A function on the primary input or output tensor of a module; it returns a new tensor, or None to observe.

    With side "call" the function gets (module, args, kwargs, output) and returns a new output or None: for modules
    whose inner tensors have no module of their own (fused experts).
    """

    module: nn.Module
    side: Literal["input", "output", "call"]
    function: Callable[..., Any]


def primary(output: Any) -> Tensor:
    """The hidden-state tensor of a module's output: the output itself, or the first item of a tuple."""
    found = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(found, Tensor):
        raise TypeError(f"expected a tensor or a tuple that begins with one, found {type(output).__name__}")
    return found


def with_primary(output: Any, tensor: Tensor) -> Any:
    """`output` with its hidden-state tensor replaced, in the same container type."""
    if isinstance(output, Tensor):
        return tensor
    rest = (tensor, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


@contextmanager
def installed(hooks: Sequence[Hook]) -> Iterator[None]:
    """Install the hooks, and remove them in reverse order on leaving, also after an exception."""
    handles = []
    try:
        for hook in hooks:
            handles.append(_install(hook))
        yield
    finally:
        for handle in reversed(handles):
            handle.remove()


def _install(hook: Hook) -> Any:
    if hook.side == "call":
        return hook.module.register_forward_hook(hook.function, with_kwargs=True)
    if hook.side == "output":
        return hook.module.register_forward_hook(_on_output(hook.function))
    return hook.module.register_forward_pre_hook(_on_input(hook.function), with_kwargs=True)


def _on_output(function: Function) -> Callable[..., Any]:
    # A forward hook that returns anything but None replaces the output, so an observer must return None.
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = function(primary(output))
        return None if new is None else with_primary(output, new)

    return hook


def _on_input(function: Function) -> Callable[..., Any]:
    # Some blocks are called with the hidden states as a keyword.
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = function(primary(args))
            return None if new is None else (with_primary(args, new), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook
