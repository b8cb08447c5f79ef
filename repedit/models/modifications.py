"""What a model in memory computes beyond its classes, its config and its weights: adapters, masks, hooks, other methods.

Files hold none of it, so an edited model and its export would differ. A model whose modules are others than those that
transformers builds for its config is not refused here: its row is proved on it.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from repedit.arch.offload import check_in_memory
from repedit.arch.passes import text_ids
from repedit.errors import NotAModel, RepeditError, UnknownArchitecture
from repedit.hooks import evaluating
from repedit.models.loading import buildable, empty_model

log = logging.getLogger("repedit")

# --- Weights that are computed from other tensors


def check_plain_weights(model: nn.Module) -> None:
    """Refuse a model whose weights are computed from other tensors, by an adapter, a parametrization or a pruning mask.

    Raises:
        NotAModel: naming the first module, with the call that makes its weight an ordinary parameter.
    """
    for name, module in model.named_modules():
        hooks = (type(hook).__module__ for hook in module._forward_pre_hooks.values())
        check_no_adapter(module, name)
        if parametrize.is_parametrized(module):
            raise NotAModel(
                f"{name} is parametrized: its weight is computed from other tensors. Remove the parametrization first: "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )
        if any(where.startswith("torch.nn.utils.") for where in hooks):
            raise NotAModel(
                f"the weight of {name} is computed by torch.nn.utils from other tensors. Make it permanent first: prune.remove, "
                "remove_weight_norm or remove_spectral_norm"
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise NotAModel(f"{type(model).__name__} {_ADAPTER}")


def check_no_adapter(module: object, name: str = "") -> None:
    """Refuse a model or module of PEFT.

    Raises:
        NotAModel: with what to do.
    """
    if type(module).__module__.startswith("peft."):
        raise NotAModel(f"{name or type(module).__name__} {_ADAPTER}")


_ADAPTER = (
    "holds an adapter of peft, which is not part of the weights. Merge it first: PeftModel.from_pretrained(model, "
    "adapter).merge_and_unload(), or use the model without it; learned prompts and prefixes cannot be merged"
)

# --- Methods and hooks of single objects

LIBRARIES = ("transformers.", "accelerate.", "torch.distributed.", "kernels.")
"""Packages that hook a model for their own purposes: to record outputs, or to move tensors between devices."""


def of_library(function: Callable[..., Any]) -> bool:
    """Whether a hook or a method is defined in one of `LIBRARIES`."""
    return defined_in(function).startswith(LIBRARIES)


def defined_in(function: Callable[..., Any]) -> str:
    """The module whose code a function or a method is."""
    inner = getattr(function, "__func__", function)
    # The globals of a function are those of the file that defines it; its __module__ can be set to anything.
    return str(getattr(inner, "__globals__", {}).get("__name__") or type(function).__module__)


def check_unmodified(model: nn.Module) -> None:
    """Refuse modules with a method `forward` or hooks of their own that change what the model computes.

    Where hooks of the user exist, the model runs on a few tokens with them and without them: those that only observe are
    accepted, and observe these two passes.

    Raises:
        UnknownArchitecture: naming the modules, and how to restore or remove what was found.
        OffloadedTensors: if there are hooks and the weights are nowhere, so that the model cannot run.
    """
    modules = dict(model.named_modules())
    replaced = [path for path, module in modules.items() if _is_replaced(module)]
    if replaced:
        raise UnknownArchitecture(
            f"{replaced[0] or 'model'}.forward is not the method of its class ({len(replaced)} modules in all), so that files do not hold "
            f"what it computes. Restore it first: del model.get_submodule({replaced[0]!r}).forward. {_WRAP_FIRST}"
        )
    hooked = {path: module for path, module in modules.items() if _hooks_of_user(module)}
    if hooked and _hooks_act(model, list(hooked.values())):
        raise UnknownArchitecture(
            f"forward hooks change what the model computes, which no weights show, at {', '.join(path or 'the model' for path in list(hooked)[:3])} "
            f"({len(hooked)} modules in all). Remove them first: handle.remove(). {_WRAP_FIRST}"
        )


_WRAP_FIRST = "To measure or audit the model with it, wrap the model first and change it then"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _is_replaced(module: Any) -> bool:
    """Whether a module has a `forward` of its own that neither is the method of its class nor calls it for a library."""
    own: Any = vars(module).get("forward")
    if own is None:
        return False
    called = _called_by_accelerate(module, own) if hasattr(module, "_hf_hook") else own
    if defined_in(called).startswith("nnsight."):
        called = called.state.original
    bound = getattr(called, "__self__", module) is module
    return not bound or getattr(called, "__func__", called) is not type(module).forward


def _called_by_accelerate(module: Any, own: Any) -> Any:
    """The method that a `forward` of Accelerate calls; `own` if it is not Accelerate's, or runs a hook that is not."""
    parts = [type(hook) for hook in getattr(module._hf_hook, "hooks", (module._hf_hook,))]
    methods = [getattr(own, "func", own), *(m for part in parts for m in (part.pre_forward, part.post_forward))]
    return vars(module).get("_old_forward", own) if all(of_library(m) for m in methods) else own


def _hooks_of_user(module: nn.Module) -> list[tuple[str, int]]:
    """(attribute, key) of the hooks that neither a library nor torch nor repedit installed."""
    return [
        (where, key)
        for where in _HOOKS
        for key, hook in getattr(module, where).items()
        if not defined_in(inspect.unwrap(hook)).startswith((*LIBRARIES, "nnsight.", "torch.nn.utils.", "repedit."))
    ]


@torch.no_grad()
def _hooks_act(model: Any, modules: Sequence[nn.Module]) -> bool:
    """Whether the logits of a few tokens are others without the user's hooks on some modules."""
    if next(model.parameters()).device.type == "meta" and not hasattr(model, "_hf_hook"):
        check_in_memory(model, "remove the forward hooks, or load the weights to see what they do")

    def logits() -> Tensor:
        result: Tensor = model(input_ids=text_ids(model), use_cache=False).logits
        return result

    with evaluating(model):
        hooked = logits()
        with _without_hooks(modules):
            return not torch.equal(hooked, logits())


@contextmanager
def _without_hooks(modules: Sequence[nn.Module]) -> Iterator[None]:
    saved = [(getattr(module, where), dict(getattr(module, where))) for module in modules for where in _HOOKS]
    for module in modules:
        for where, key in _hooks_of_user(module):
            del getattr(module, where)[key]
    try:
        yield
    finally:
        for hooks, before in saved:
            hooks.clear()
            hooks.update(before)


# --- Modules other than those that transformers builds for the config


def other_modules(model: Any) -> list[str]:
    """The modules whose class, or whose class's `forward`, is not that which transformers builds for the config.

    All of them if transformers builds no model for the config.
    """
    built = _built_classes(model)
    return [
        name
        for name, module in model.named_modules()
        if built.get(name) is not type(module) or not _of_torch_or_transformers(type(module))
    ]


def _of_torch_or_transformers(kind: Any) -> bool:
    names = (kind.__module__, defined_in(kind.forward))
    return all(name.partition(".")[0] in ("torch", "transformers") for name in names)


_built: dict[str, dict[str, type[nn.Module]]] = {}


def _built_classes(model: Any) -> dict[str, type[nn.Module]]:
    """The class of each module of the model that transformers builds for a config; empty if it builds none."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]  # a config that several classes can load belongs to the one it names
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _built:
        try:
            with buildable("a model in memory"):
                _built[key] = {name: type(module) for name, module in empty_model(config).named_modules()}
        except RepeditError:
            _built[key] = {}
    return _built[key]


@torch.no_grad()
def computes_as(model: Any, built: Any) -> bool:
    """Whether a model gives the logits on a few tokens that another gives with the tensors that files of the model hold.

    True for a model that cannot run: it gives no logits that could differ.

    Args:
        built: without weights; with its own values of the buffers that files do not hold, such as rotary frequencies.
    """
    inputs = {"input_ids": text_ids(model), "use_cache": False}
    with evaluating(model):
        try:
            own = model(**inputs).logits
        except RuntimeError as error:
            log.info("the model in memory cannot run here, so it is not compared with its files: %s", error)
            return True
    buffers, stored = dict(model.named_buffers(remove_duplicate=False)), model.state_dict().keys()
    tensors = {n: t for n, t in buffers.items() if n in stored} | dict(model.named_parameters(remove_duplicate=False))
    # A buffer that was cast with the model is rounded as there.
    unstored = ((n, b) for n, b in built.named_buffers(remove_duplicate=False) if n in buffers and n not in stored)
    tensors |= {n: b.to(buffers[n]) if b.device.type != "meta" else buffers[n] for n, b in unstored}
    with evaluating(built):
        theirs = functional_call(built, tensors, (), inputs, tie_weights=False).logits
    if not torch.equal(own.isfinite(), theirs.isfinite()):
        return False
    own, theirs = (logits.float().nan_to_num(0.0, 0.0, 0.0) for logits in (own, theirs))
    # Another attention kernel rounds otherwise: by 0.013 in bfloat16 on the tiny Llama of the tests.
    half_limit = 1e-2 if attention_of(model) == attention_of(built) else 5e-2
    limit = 1e-4 if next(model.parameters()).dtype.itemsize >= 4 else half_limit
    return float((own - theirs).norm()) <= limit * float(own.norm())


def attention_of(model: Any) -> str | None:
    """The name of the attention implementation of a model's text decoder."""
    return getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
