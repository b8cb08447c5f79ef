"""The one place where forward hooks are installed and removed, and where a model is put into eval mode.

While hooks are installed, compiled code runs eagerly, every hook must run in each forward pass that ends, and one
thread alone runs the model. So a hook works or an error says why not; it is never passed over in silence.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from repedit.errors import HookError, ModelBusy
from repedit.kernels.dispatch import full_precision

Function = Callable[[Tensor], Tensor | None]

WAIT = 20.0
"""Seconds that a thread waits for a model that another thread uses, before it is refused."""


class Hook(NamedTuple):
    """A function on the primary input or output tensor of a module; it returns a new tensor, or None to observe.

    It is called with autocast disabled, so that what it computes has the precision it is written in. With side "call"
    the function gets (module, args, kwargs, output) under the caller's autocast and returns a new output or None: for
    modules whose inner tensors have no module of their own (fused experts).
    """

    module: nn.Module
    side: Literal["input", "output", "call"]
    function: Callable[..., Any]


def primary(output: Any) -> Tensor:
    """The hidden-state tensor of a module's output: the output itself, or the first item of a tuple.

    Raises:
        HookError: if there is none.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise HookError(f"a hook needs a tensor or a tuple that begins with one, found {type(output).__name__}")
    return first


def with_primary(output: Any, tensor: Tensor) -> Any:
    """`output` with its hidden-state tensor replaced, in the same container type."""
    if isinstance(output, Tensor):
        return tensor
    rest = (tensor, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


@contextmanager
def installed(model: nn.Module, hooks: Sequence[Hook]) -> Iterator[None]:
    """Install hooks on modules of a model, and remove them in reverse order on leaving, also after an exception.

    Code compiled by torch.compile runs eagerly meanwhile: it would pass over hooks that it was not compiled with.
    A pass that is ended by an exception, or that runs only a part of the model, needs no hook to run.

    Raises:
        HookError: if a module is scripted, or a compiled function installs the hooks; at the end of a forward pass of the model or its base model in which a hook did not run, naming its
            module; in training mode, where a model may drop layers, on leaving, if a hook ran in no pass.
        ModelBusy: if another thread uses the model, or runs it while the hooks are installed.
    """
    with claimed(model), _eager():
        passes = _Passes(model, hooks)
        handles: list[Any] = []
        try:
            handles += passes.begin_hooks()
            for number, hook in enumerate(hooks):
                handles.append(_install(hook, passes.noting(number)))
            handles += passes.end_hooks()
            yield
        finally:
            passes.open = False
            for handle in reversed(handles):
                handle.remove()
        passes.check_all()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back to its own mode on leaving; one thread at a time.

    Raises:
        ModelBusy: if another thread uses the model.
    """
    with claimed(model):
        modes = [(module, module.training) for module in model.modules()]
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """The model for this thread alone; threads are served in the order in which they came.

    Claims of one thread nest. Tasks of asyncio that share a thread are told apart as threads are.

    Raises:
        ModelBusy: if another thread holds the model for longer than `WAIT` seconds, or can never give it back.
    """
    me = _who()
    with _turn:
        claim = _claims.setdefault(model, _Claim())
        if not claim.depth or not _same(claim.owner, me):
            _take(claim, type(model).__name__, me)
        claim.depth += 1
    try:
        yield
    finally:
        with _turn:
            claim.depth -= 1
            _turn.notify_all()


# --- hooks ---


def _install(hook: Hook, note: Callable[[], None]) -> Any:
    if hook.side == "call":
        return hook.module.register_forward_hook(_on_call(hook.function, note), with_kwargs=True)
    if hook.side == "output":
        return hook.module.register_forward_hook(_on_output(hook.function, note))
    return hook.module.register_forward_pre_hook(_on_input(hook.function, note), with_kwargs=True)


def _on_call(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        note()
        return function(module, args, kwargs, output)

    return hook


def _on_output(function: Function, note: Callable[[], None]) -> Callable[..., Any]:
    # A forward hook that returns anything but None replaces the output, so an observer must return None.
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        note()
        x = primary(output)
        with full_precision(x):
            new = function(x)
        return None if new is None else with_primary(output, new)

    return hook


def _on_input(function: Function, note: Callable[[], None]) -> Callable[..., Any]:
    # Some blocks are called with the hidden states as a keyword.
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        note()
        if not args and "hidden_states" not in kwargs:
            raise HookError(f"{type(module).__name__} was called without hidden states, with {sorted(kwargs)}")
        x = primary(args if args else kwargs["hidden_states"])
        with full_precision(x):
            new = function(x)
        if new is None:
            return None
        return (with_primary(args, new), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return hook


class _Passes:
    """Which hooks ran in each forward pass of a model, seen at the model itself and at its base model."""

    def __init__(self, model: nn.Module, hooks: Sequence[Hook]) -> None:
        names = {module: name for name, module in model.named_modules()}
        for hook in hooks:
            kind = type(hook.module).__name__
            if isinstance(hook.module, torch.jit.ScriptModule):
                raise HookError(
                    f"{names.get(hook.module, kind)!r} is scripted by torch.jit, where no hook runs; give the module that "
                    "it was scripted from"
                )
            if hook.module not in names:
                raise HookError(f"a hook is on a {kind} that is no part of the {type(model).__name__}")
        base = getattr(model, "base_model", model)
        self.roots = [model] if base is model or base not in names else [model, base]
        inside = [set(root.modules()) for root in self.roots]
        self.expected = [{i for i, hook in enumerate(hooks) if hook.module in part} for part in inside]
        self.names = [names[hook.module] for hook in hooks]
        self.owner, self.open = _who(), True
        self.running: list[set[int]] = []
        self.ran: set[int] = set()
        self.missed: set[int] = set()

    # Plain functions, not methods: torch and copy.deepcopy copy a method together with its object.

    def noting(self, number: int) -> Callable[[], None]:
        """What a hook calls when it runs."""

        def note() -> None:
            for seen in (self.ran, *self.running):
                seen.add(number)

        return note

    def begin_hooks(self) -> list[Any]:
        """Handles of the hooks that see a pass begin."""

        def begin(module: nn.Module, _args: Any) -> None:
            if self.open and not _same(self.owner, _who()):
                raise ModelBusy(
                    f"{_named(self.owner)} has hooks on the {type(module).__name__} that {_named(_who())} runs: the pass "
                    "would be edited or counted there; install the hooks in the thread that runs the model"
                )
            if self.open:
                self.running.append(set())

        return [root.register_forward_pre_hook(begin, prepend=True) for root in self.roots]

    def end_hooks(self) -> list[Any]:
        """Handles of the hooks that see a pass end; they come after all other hooks."""

        def ending(expected: set[int]) -> Callable[..., None]:
            def end(module: nn.Module, _args: Any, output: Any) -> None:
                # Closed where a copy of the model, taken meanwhile, kept the hooks; another thread was refused above.
                if not self.open or not _same(self.owner, _who()):
                    return
                missed = expected - self.running.pop()
                if output is None:  # an exception ended the pass
                    return
                if missed and not module.training:
                    raise HookError(self._message(missed))
                self.missed |= missed

            return end

        pairs = zip(self.roots, self.expected, strict=True)
        return [root.register_forward_hook(ending(expected), always_call=True) for root, expected in pairs]

    def check_all(self) -> None:
        """Refuse hooks that ran in no pass."""
        if self.missed - self.ran:
            raise HookError(self._message(self.missed - self.ran))

    def _message(self, missed: set[int]) -> str:
        names = list(dict.fromkeys(self.names[i] or "the model itself" for i in sorted(missed)))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"the forward pass never calls {', '.join(map(repr, names[:3]))}{more} in a way that runs a hook: what was to "
            "be seen or changed there was not; is it compiled, scripted, skipped or replaced? Name a module that it calls"
        )


# --- compiled code ---


@contextmanager
def _eager() -> Iterator[None]:
    """torch.compile's code runs eagerly until the last thread leaves; then the stance that was set before holds again."""
    with _turn:
        if not _stance.depth:
            try:
                _stance.before = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise HookError(
                    "hooks cannot be installed by a function that torch.compile compiles; install them around it, where it "
                    "then runs eagerly"
                ) from error
        _stance.depth += 1
    try:
        yield
    finally:
        with _turn:
            _stance.depth -= 1
            if not _stance.depth:
                _stance.before.__exit__(None, None, None)


@dataclass
class _Stance:
    depth: int = 0
    before: Any = None


_stance = _Stance()

# --- threads ---

_Who = tuple[threading.Thread, Any]
_turn = threading.Condition()


@dataclass(eq=False)
class _Claim:
    """Who uses a model, in how many nested contexts, and who waits for it."""

    owner: _Who | None = None
    depth: int = 0
    waiting: deque[object] = field(default_factory=deque)


_claims: WeakKeyDictionary[nn.Module, _Claim] = WeakKeyDictionary()


def _who() -> _Who:
    """The thread, and the asyncio task where one runs."""
    try:
        return threading.current_thread(), asyncio.current_task()
    except RuntimeError:
        return threading.current_thread(), None


def _same(owner: _Who | None, me: _Who) -> bool:
    """Whether contexts of the two nest: in one thread and task, or where the owner's task is over, as a notebook's cell is."""
    if owner is None or owner[0] is not me[0]:
        return False
    return owner[1] is me[1] or owner[1] is None or owner[1].done()


def _take(claim: _Claim, model: str, me: _Who) -> None:
    """Wait for a model, behind those who wait already; called with `_turn` held."""
    ticket = object()

    def never() -> bool:
        # Waiting in its own thread, the owner could never leave.
        return bool(claim.depth and claim.owner and (claim.owner[0] is me[0] or not claim.owner[0].is_alive()))

    def mine() -> bool:
        return not claim.depth and claim.waiting[0] is ticket

    claim.waiting.append(ticket)
    try:
        if not _turn.wait_for(lambda: mine() or never(), WAIT) or not mine():
            ended = claim.owner is not None and not claim.owner[0].is_alive()
            raise ModelBusy(
                f"the {model} is in use by {_named(claim.owner)}{', which has ended without leaving its context' * ended}; "
                f"{_named(me)} cannot use it meanwhile: its hooks and its mode would act there too. Let one finish before "
                "the other begins, or give each a copy of the model"
            )
        claim.owner = me
    finally:
        claim.waiting.remove(ticket)
        _turn.notify_all()


def _named(who: _Who | None) -> str:
    if who is None:
        return "another thread"
    thread, task = who
    return f"thread {thread.name!r}" + ("" if task is None else f", task {task.get_name()!r}")


def _after_fork() -> None:
    """A forked process has the forking thread alone: nobody else waits there or holds the lock."""
    global _turn
    _turn = threading.Condition()
    for claim in _claims.values():
        claim.waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
