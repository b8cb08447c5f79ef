"""What is trained: filters over tensor names, low-rank adapters, and a copy of the model in which only those tensors are new."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from repedit.arch import Experts
from repedit.distributed import full_tensor, shard_like
from repedit.errors import (
    ArgumentError,
    MissingDependency,
    OffloadedTensors,
    SelectionError,
    ShapeError,
    check_positive,
    check_whole,
    nearest,
)
from repedit.models.subject import Subject, shared_clone
from repedit.sites import OUTPUTS, Point

# --- Which tensors are trained


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters through PEFT; the delta is their dense product.

    Raises:
        ArgumentError: if the rank is below 1.
    """

    rank: int = 16
    alpha: int = 32
    modules: tuple[str, ...] = ()
    """Suffixes of the modules that get adapters; all linear modules of the blocks when empty."""

    def __post_init__(self) -> None:
        check_whole(rank=self.rank)
        check_positive(alpha=self.alpha)


@dataclass(frozen=True, eq=False)
class Mask:
    """Tensor name -> which entries are trained, broadcastable to the tensor; a tensor without a mask is not trained."""

    tensors: Mapping[str, Bool[Tensor, ...]]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the entries of the masks, as they are stored, that are trained."""
        total = sum(mask.numel() for mask in self.tensors.values())
        return sum(int(mask.sum()) for mask in self.tensors.values()) / max(1, total)


@dataclass(frozen=True, eq=False)
class Parameters:
    """Which tensors are trained; the conditions intersect.

    Raises:
        SelectionError: if layers, modules or the pattern have no meaning.
    """

    layers: str = "all"
    """"20-29", "3", "0-2,5", "last 8", "3 ending at 0.22" (of the depth), or "all", which also takes embeddings, head and
    the last norm."""
    modules: tuple[str, ...] = ()
    """Suffixes of module paths, such as "mlp.down_proj"; or "attn.out", "mlp.out", ... for what writes these in any family,
    and "mlp.in" for what feeds the neurons of an MLP (gate and up)."""
    pattern: str | None = None
    """A regular expression to search for in the tensor name."""
    mask: Mask | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, str) or not self.layers.strip():
            raise SelectionError(f"layers={self.layers!r}; write '2-5', '3', '0-2,5', 'last 4' or 'all'")
        if isinstance(self.modules, str) or not all(isinstance(name, str) and name for name in self.modules):
            raise SelectionError(f"modules={self.modules!r}; give a tuple of names, such as ('mlp.down_proj',)")
        try:
            re.compile(self.pattern or "")
        except (re.error, TypeError) as error:
            raise SelectionError(f"pattern={self.pattern!r} is not a regular expression: {error}") from error

    def select(self, subject: Subject) -> tuple[str, ...]:
        """The names of the tensors, each tied one once.

        Routers of expert layers are omitted unless a module suffix or the pattern is given.

        Raises:
            SelectionError: if nothing matches, with the nearest names.
            QuantizedModel, OffloadedTensors: if the tensors cannot be trained.
        """
        parameters = dict(subject.model.named_parameters())
        _check_trainable(subject, parameters)
        names = [name for name in parameters if self._is_in_layers(name, subject)]
        points: dict[str, str] = {name: point for point in OUTPUTS for name in _writers(subject, point)}
        points |= dict.fromkeys(_mlp_readers(subject), "mlp.in")
        for suffix in self.modules:
            if not any(_module(name).endswith(suffix) or points.get(name) == suffix for name in names):
                suffixes = sorted({suffix for name in names for suffix in _suffixes(_module(name), subject)})
                raise SelectionError(
                    f"no tensor of layers {self.layers!r} belongs to a module {suffix!r}; {nearest(suffix, suffixes)}"
                )
        if self.modules:
            names = [n for n in names if _module(n).endswith(self.modules) or points.get(n) in self.modules]
        if self.pattern is not None:
            matching = [name for name in names if re.search(self.pattern, name)]
            if not matching:
                raise SelectionError(
                    f"pattern={self.pattern!r} matches none of {len(names)} tensors; {nearest(self.pattern, names)}"
                )
            names = matching
        elif not self.modules:
            names = [name for name in names if not _is_router(name, subject)]
        return tuple(names)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "layers": self.layers, "modules": list(self.modules), "pattern": self.pattern,
            "mask": None if self.mask is None else dict(self.mask.provenance) | {"share": self.mask.share},
            "lora": None if self.lora is None else {**vars(self.lora), "modules": list(self.lora.modules)},
        }  # fmt: skip

    def _is_in_layers(self, name: str, subject: Subject) -> bool:
        if self.layers == "all":
            return True
        paths = subject.layout.block_paths
        return any(name.startswith(f"{paths[layer]}.") for layer in parse_layers(self.layers, len(paths)))


def parse_layers(text: str, depth: int) -> tuple[int, ...]:
    """The layers that "20-29", "3", "0-2,5", "last 8" or "3 ending at 0.22" names.

    The last two are cut to the layers that exist.

    Raises:
        SelectionError: if it names none, or one that does not exist.
    """
    relative = re.fullmatch(r"last (\d+)|(\d+) ending at (0?\.\d+)", text.strip())
    if relative:
        end = depth - 1 if relative[1] else layer_at_depth(float(relative[3]), depth)
        count = int(relative[1] or relative[2])
        if count < 1:
            raise SelectionError(f"layers={text!r} names no layer; give a number of at least 1")
        return tuple(range(max(0, end - count + 1), end + 1))
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < depth:
            raise SelectionError(
                f"layers={text!r} does not name layers of this model; they are 0 to {depth - 1}, write '2-5', '3', '0-2,5', 'last 4' or 'all'"
            )
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))


def layer_at_depth(fraction: float, depth: int) -> int:
    """The layer at a fraction of the depth."""
    return min(depth - 1, round(fraction * depth))


# --- The model that is trained


class TrainableCopy:
    """A copy of the model in which the selected tensors are new and float32 (float64 for float64); others are shared."""

    def __init__(self, subject: Subject, parameters: Parameters, *, seed: int = 0) -> None:
        names = parameters.select(subject)
        check_mask(parameters, subject, names)
        new: dict[int, nn.Parameter] = {}
        self.dtype: torch.dtype = subject.model.dtype
        """What the model computes in."""
        self.start: dict[str, Tensor] = {}
        """The tensors of the subject that are trained; never written."""
        self.tensors: dict[str, nn.Parameter] = {}
        """What is trained, by name."""
        self.original = {name: p.detach() for name, p in subject.model.named_parameters()}
        """Every tensor of the subject."""
        for name, p in subject.model.named_parameters():
            is_trained = name in names and parameters.lora is None
            dtype = torch.promote_types(p.dtype, torch.float32)
            # A new Parameter, so that its requires_grad is independent of the subject's.
            value = p.detach().to(dtype, copy=True) if is_trained else p.detach()
            new[id(p)] = nn.Parameter(value, requires_grad=is_trained)
            if is_trained:
                self.start[name], self.tensors[name] = p.detach(), new[id(p)]
        model = shared_clone(subject.model, new).eval()
        self.subject = Subject(model, subject.tokenizer, subject.architecture)
        # Adapters rename tensors; where things are does not change.
        self.subject.__dict__["layout"] = subject.layout
        self.mask: dict[str, Tensor] = {}
        if parameters.mask is not None:
            masks, nothing = parameters.mask.tensors, torch.zeros((), dtype=torch.bool)
            self.mask = {name: masks.get(name, nothing).to(p.device) for name, p in self.tensors.items()}
        self.adapters: Adapters | None = None
        if parameters.lora is not None:
            self.adapters = Adapters(self.subject, names, parameters.lora, seed)
            self.tensors = self.adapters.tensors

    def start_of(self, name: str) -> Tensor:
        """The weight before the training, also of a module that has an adapter."""
        return self.start[name] if name in self.start else self.original[name]

    def mask_gradients(self) -> None:
        """Zero the gradients of masked entries."""
        for name, mask in self.mask.items():
            grad = self.tensors[name].grad
            if grad is not None:
                grad.mul_(mask)

    @torch.no_grad()
    def restore_masked(self) -> None:
        """Restore masked entries, which weight decay and momentum move although they have no gradient."""
        for name, mask in self.mask.items():
            p = self.tensors[name]
            p.copy_(torch.where(mask, p, shard_like(self.start[name].to(p.dtype), p)))

    def differences(self) -> dict[str, Tensor]:
        """What training changed, without tensors that did not change at all.

        Every rank must call it, and gets all of it, tensor by tensor.
        """
        if self.adapters is not None:
            differences = self.adapters.differences()
        else:
            differences = {name: self._difference(name).cpu() for name in self.tensors}
        return {name: value.cpu() for name, value in differences.items() if bool(value.any())}

    def _difference(self, name: str) -> Tensor:
        value = full_tensor(self.tensors[name].detach())
        return value - self.start[name].to(value)


class Adapters:
    """Low-rank adapters in the modules of a model, by PEFT; call it on a copy.

    Raises:
        MissingDependency: if PEFT is not installed.
        SelectionError: if no linear module is selected.
    """

    def __init__(self, subject: Subject, names: tuple[str, ...], lora: Lora, seed: int) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MissingDependency("lora= needs peft: pip install 'repedit[adapters]'") from error
        self.model = subject.model
        self.modules = _linear_modules(subject, names, lora)
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
        """scaling x B A of every adapted weight, in its stored orientation."""
        modules = {f"{path}.weight": self.model.get_submodule(path) for path in self.modules}
        return {name: module.get_delta_weight("default").detach() for name, module in modules.items()}


def _linear_modules(subject: Subject, names: tuple[str, ...], lora: Lora) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    blocks = tuple(f"{path}." for path in subject.layout.block_paths)
    linear = [
        name.removesuffix(".weight")
        for name in names
        if name.startswith(blocks)
        and name.endswith(".weight")
        and isinstance(subject.model.get_submodule(name.removesuffix(".weight")), nn.Linear | Conv1D)
    ]
    selected = [path for path in linear if not lora.modules or path.endswith(lora.modules)]
    if not selected:
        raise SelectionError(
            f"lora={lora.modules or 'all linear modules'} selects none of {len(linear)} linear modules; "
            f"{nearest(lora.modules[0], linear) if lora.modules and linear else 'select blocks with layers='}"
        )
    return selected


def check_mask(parameters: Parameters, subject: Subject, names: tuple[str, ...]) -> None:
    """Refuse a mask that fits no tensor or trains nothing.

    Raises:
        ShapeError: with both shapes. SelectionError: if nothing would be trained. ArgumentError: beside adapters.
    """
    if parameters.mask is None:
        return
    if parameters.lora is not None:
        raise ArgumentError(
            "mask and lora were both given; a mask holds entries of weights, adapters add to all of them"
        )
    shapes = {name: tuple(p.shape) for name, p in subject.model.named_parameters()}
    for name, mask in parameters.mask.tensors.items():
        if name not in shapes:
            raise SelectionError(f"the mask names {name!r}, which this model does not have; {nearest(name, shapes)}")
        try:
            fits = torch.broadcast_shapes(tuple(mask.shape), shapes[name]) == shapes[name]
        except RuntimeError:
            fits = False
        if not fits:
            raise ShapeError(
                f"the mask of {name} has shape {tuple(mask.shape)}, the tensor {shapes[name]}; is it of another model?"
            )
    if not any(bool(mask.any()) for name, mask in parameters.mask.tensors.items() if name in names):
        raise SelectionError(
            f"the mask trains nothing in the {len(names)} selected tensors: all of it is False there; lower the percentile, or select others"
        )


def _check_trainable(subject: Subject, parameters: Mapping[str, nn.Parameter]) -> None:
    subject.check_unquantized("trained")
    devices = sorted({p.device.type if p.device.type == "meta" else str(p.device) for p in parameters.values()})
    if len(devices) > 1 or "meta" in devices:
        raise OffloadedTensors(
            f"the weights are on {', '.join(devices)}; training needs them on one device: load without device_map, and "
            "start several processes with torchrun and shard=True if the trained copies do not fit on one; or train fewer layers"
        )


def _module(name: str) -> str:
    """The module of a tensor; a fused tensor such as experts.down_proj counts as a module itself."""
    head, _, leaf = name.rpartition(".")
    return head if leaf in ("weight", "bias") else name


def _writers(subject: Subject, point: str) -> set[str]:
    """The weights that write to the residual stream at a point."""
    branches = [subject.layout.find(layer, Point(point)) for layer in range(len(subject.layout.layers))]
    return {part.out.tensor for branch in branches if branch is not None for part in branch.parts}


def _mlp_readers(subject: Subject) -> set[str]:
    """The weights, without biases, that feed the neurons of MLPs."""
    branches = [subject.layout.find(layer, Point.MLP_OUT) for layer in range(len(subject.layout.layers))]
    parts = [part for branch in branches if branch is not None for part in branch.parts]
    return {view.tensor for part in parts for view in part.readers if not view.tensor.endswith("bias")}


def _suffixes(module: str, subject: Subject) -> set[str]:
    """The path of a module inside its block, and its last name."""
    for path in subject.layout.block_paths:
        if module.startswith(f"{path}."):
            return {module.removeprefix(f"{path}."), module.rpartition(".")[2]}
    return {module}


def _is_router(name: str, subject: Subject) -> bool:
    rows = (row for branches in subject.architecture.block for row in branches)
    blocks = [output for row in rows for output in row.outputs if any(isinstance(w, Experts) for w in row.writers)]
    inside = next((name.removeprefix(f"{p}.") for p in subject.layout.block_paths if name.startswith(f"{p}.")), "")
    return any(re.match(rf"{re.escape(block)}\.(gate|router)(\.|$)", inside) for block in blocks)
