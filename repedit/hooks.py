"""Installing and removing forward hooks, and putting a model into eval mode.

While hooks are installed, compiled code runs eagerly, every hook must run in each completed forward pass, and only one
thread may run the model. A hook therefore works or raises an error; it is never skipped silently.
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

from repedit.errors import HookError, ModelBusy, NoGradient
from repedit.kernels.dispatch import full_precision

Function = Callable[[Tensor], Tensor | None]

WAIT = 20.0
"""Seconds that a thread waits for a model that another thread uses, before ModelBusy is raised."""


class Hook(NamedTuple):
    """A function on the primary input or output tensor of a module; it returns a new tensor, or None to observe.

    It is called with autocast disabled, so that it computes in the precision of its own code. With side "call" the function
    receives (module, args, kwargs, output) under the caller's autocast and returns a new output or None; this is for
    modules whose inner tensors have no module of their own (fused experts).
    """

    module: nn.Module
    side: Literal["input", "output", "call"]
    function: Callable[..., Any]


def primary(output: object) -> Tensor:
    """The hidden-state tensor of a module's output: the output itself, or the first item of a tuple.

    Raises:
        HookError: if there is none.
    """
    first = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(first, Tensor):
        raise HookError(f"a hook needs a tensor or a tuple that begins with one, and got a {type(output).__name__}")
    return first


def with_primary(output: object, tensor: Tensor) -> Any:
    """`output` with its hidden-state tensor replaced, in the same container type."""
    if not isinstance(output, tuple | list):
        return tensor
    items = (tensor, *output[1:])
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


@contextmanager
def installed(model: nn.Module, hooks: Sequence[Hook]) -> Iterator[None]:
    """Install hooks on modules of a model, and remove them in reverse order on exit, also after an exception.

    Code compiled by torch.compile runs eagerly meanwhile, because it would skip hooks that it was not compiled with. In a
    pass that an exception ends, or that runs only a part of the model, hooks need not run.

    Raises:
        HookError: if a module is scripted, or a compiled function installs the hooks; at the end of a forward pass of the
            model or its base model in which a hook did not run, naming its module; in training mode, where a model may drop
            layers, on exit, if a hook ran in no pass.
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
    """Put every module into eval mode, and back into its own mode on exit; for one thread at a time.

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


def check_differentiable(model: nn.Module) -> None:
    """Refuse a model of which no gradient can be computed.

    Where the caller switched gradients off (torch.no_grad, torch.set_grad_enabled), torch.enable_grad switches them on.

    Raises:
        NoGradient: under torch.inference_mode, or if a weight was made there.
    """
    if torch.is_inference_mode_enabled():
        raise NoGradient(
            "gradients were asked for under torch.inference_mode, where no tensor has one; leave that context"
        )
    name = next((name for name, p in model.named_parameters() if p.is_inference()), None)
    if name is not None:
        raise NoGradient(
            f"gradients were asked for, and {name} was made under torch.inference_mode, so that it never has one; load the model "
            "outside of that context"
        )


@contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """Reserve the model for this thread; waiting threads get it in the order in which they asked.

    Claims of one thread can be nested. Asyncio tasks that share a thread count as different threads.

    Raises:
        ModelBusy: if another thread holds the model for longer than `WAIT` seconds, or can never release it.
    """
    me = _current_user()
    with _lock:
        claim = _claims.setdefault(model, _Claim())
        if not claim.depth or not _nests(claim.owner, me):
            _acquire(claim, type(model).__name__, me)
        claim.depth += 1
    try:
        yield
    finally:
        with _lock:
            claim.depth -= 1
            _lock.notify_all()


# --- Hooks on modules


def _install(hook: Hook, note: Callable[[], None]) -> Any:
    if hook.side == "call":
        return hook.module.register_forward_hook(_on_call(hook.function, note), with_kwargs=True)
    if hook.side == "output":
        return hook.module.register_forward_hook(_on_output(hook.function, note))
    return hook.module.register_forward_pre_hook(_on_input(hook.function, note), with_kwargs=True)


def _on_call(function: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> Any:
        note()
        return function(module, args, kwargs, output)

    return hook


def _on_output(function: Function, note: Callable[[], None]) -> Callable[..., Any]:
    # A forward hook that returns anything but None replaces the output, so an observer must return None.
    def hook(_module: nn.Module, _args: object, output: object) -> Any:
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
    """The hooks that ran in each forward pass of a model, observed at the model itself and at its base model."""

    def __init__(self, model: nn.Module, hooks: Sequence[Hook]) -> None:
        names = {module: name for name, module in model.named_modules()}
        for hook in hooks:
            kind = type(hook.module).__name__
            if isinstance(hook.module, torch.jit.ScriptModule):
                raise HookError(
                    f"{names.get(hook.module, kind)!r} is scripted by torch.jit, where hooks do not run; use the module that it "
                    "was scripted from"
                )
            if hook.module not in names:
                raise HookError(f"a hook is on a {kind} that is not part of the {type(model).__name__}")
        base = getattr(model, "base_model", model)
        self.roots = [model] if base is model or base not in names else [model, base]
        inside = [set(root.modules()) for root in self.roots]
        self.expected = [{i for i, hook in enumerate(hooks) if hook.module in part} for part in inside]
        self.names = [names[hook.module] for hook in hooks]
        self.owner, self.open = _current_user(), True
        self.running: list[set[int]] = []
        self.ran: set[int] = set()
        self.missed: set[int] = set()

    # Functions rather than methods: torch and copy.deepcopy copy a method together with its object.

    def noting(self, number: int) -> Callable[[], None]:
        """The function that a hook calls when it runs."""

        def note() -> None:
            for ran in (self.ran, *self.running):
                ran.add(number)

        return note

    def begin_hooks(self) -> list[Any]:
        """Install the hooks that observe the beginning of a pass."""

        def begin(module: nn.Module, _args: object) -> None:
            if self.open and not _nests(self.owner, _current_user()):
                raise ModelBusy(
                    f"{_user_name(self.owner)} has hooks on the {type(module).__name__} that {_user_name(_current_user())} runs: the pass "
                    "would be edited or counted too; install the hooks in the thread that runs the model"
                )
            if self.open:
                self.running.append(set())

        return [root.register_forward_pre_hook(begin, prepend=True) for root in self.roots]

    def end_hooks(self) -> list[Any]:
        """Install the hooks that observe the end of a pass, after all other hooks."""

        def ending(expected: set[int]) -> Callable[..., None]:
            def end(module: nn.Module, _args: object, output: object) -> None:
                # Not open in a copy of the model that was made meanwhile with its hooks; another thread was refused above.
                if not self.open or not _nests(self.owner, _current_user()):
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
            f"the forward pass never calls {', '.join(map(repr, names[:3]))}{more} in a way that runs a hook, so nothing was "
            "observed or changed there; is it compiled, scripted, skipped or replaced? Name a module that it calls"
        )


# --- Compiled code


@contextmanager
def _eager() -> Iterator[None]:
    """Run compiled code eagerly until the last thread exits; then restore the stance of torch.compile."""
    with _lock:
        if not _stance.depth:
            try:
                _stance.before = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:
                raise HookError(
                    "hooks cannot be installed by a function that torch.compile compiles; install them around it, and it will run "
                    "eagerly"
                ) from error
        _stance.depth += 1
    try:
        yield
    finally:
        with _lock:
            _stance.depth -= 1
            if not _stance.depth:
                _stance.before.__exit__(None, None, None)


@dataclass
class _Stance:
    depth: int = 0
    before: Any = None


_stance = _Stance()

# --- Threads

_User = tuple[threading.Thread, Any]
_lock = threading.Condition()


@dataclass(eq=False)
class _Claim:
    """The user of a model, the number of its nested contexts, and the users that wait for the model."""

    owner: _User | None = None
    depth: int = 0
    waiting: deque[object] = field(default_factory=deque)


_claims: WeakKeyDictionary[nn.Module, _Claim] = WeakKeyDictionary()


def _current_user() -> _User:
    """The thread, and the asyncio task if one is running."""
    try:
        return threading.current_thread(), asyncio.current_task()
    except RuntimeError:
        return threading.current_thread(), None


def _nests(owner: _User | None, me: _User) -> bool:
    """Whether contexts of the two nest: in one thread and task, or if the owner's task has ended, as a notebook cell does."""
    if owner is None or owner[0] is not me[0]:
        return False
    return owner[1] is me[1] or owner[1] is None or owner[1].done()


def _acquire(claim: _Claim, model: str, me: _User) -> None:
    """Wait for a model, after those who are waiting already; called with `_lock` held."""
    ticket = object()

    def deadlocked() -> bool:
        # The owner cannot release the model while its own thread waits here, or after its thread has ended.
        return bool(claim.depth and claim.owner and (claim.owner[0] is me[0] or not claim.owner[0].is_alive()))

    def available() -> bool:
        return not claim.depth and claim.waiting[0] is ticket

    claim.waiting.append(ticket)
    try:
        if not _lock.wait_for(lambda: available() or deadlocked(), WAIT) or not available():
            ended = claim.owner is not None and not claim.owner[0].is_alive()
            raise ModelBusy(
                f"the {model} is in use by {_user_name(claim.owner)}{', which has ended without leaving its context' * ended}; "
                f"{_user_name(me)} cannot use it at the same time, because hooks and mode would affect both. Let one finish before "
                "the other begins, or give each a copy of the model"
            )
        claim.owner = me
    finally:
        claim.waiting.remove(ticket)
        _lock.notify_all()


def _user_name(user: _User | None) -> str:
    if user is None:
        return "another thread"
    thread, task = user
    return f"thread {thread.name!r}" + ("" if task is None else f", task {task.get_name()!r}")


def _after_fork() -> None:
    """A forked process has only the forking thread: no other thread waits there or holds the lock."""
    global _lock
    _lock = threading.Condition()
    for claim in _claims.values():
        claim.waiting.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
