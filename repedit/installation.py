"""Whether this installation works: versions, cache, default model, device, kernels, and an edit of a tiny model."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from repedit.arch.infer import check_architecture
from repedit.errors import NotFound
from repedit.hashing import package_versions
from repedit.io.files import make_folder
from repedit.io.store import cache_folder
from repedit.kernels.dispatch import choose, project
from repedit.models.default_model import DEFAULT, cached, tiny_model

WIDTH, RANK = 576, 16
"""Width and rank of the projection that is tried on the device."""
KERNEL_TOLERANCE = 1e-4
"""Largest difference between a float32 projection on the device and the same in float64, as a share of the largest value."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str
    """What was found, and what to do about it if the check failed."""


@dataclass(frozen=True)
class Installation:
    """The versions that a report of a fault needs, and what was tried."""

    versions: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def system_versions() -> dict[str, str]:
    """The versions of the packages and of the system, and the vector instructions that torch uses on this CPU."""
    return {
        **package_versions("transformers", "safetensors"), "python": platform.python_version(),
        "system": platform.platform(terse=True), "CPU kernels": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip


def check_installation() -> Installation:
    """Try the installation without a model: no check writes outside the cache folder, and none uses the network."""
    checks = tuple(_tried(name, check) for name, check in _CHECKS.items())
    return Installation({**system_versions(), "torch threads": str(torch.get_num_threads())}, checks)


def _tried(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    """The result of a check; one that raises has failed, whatever it raises: finding that out is what it is for."""
    try:
        return Check(name, *check())
    except Exception as error:
        return Check(name, False, " ".join(f"{type(error).__name__}: {error}".split()))


def _packages() -> tuple[bool, str]:
    """Whether every required package is there in a version that repedit supports."""
    from packaging.requirements import Requirement

    missing, count = [], 0
    for text in requires("repedit") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            missing.append(f"{requirement.name} {installed} is installed, {requirement.specifier} is needed")
    return not missing, "; ".join(missing) or f"all {count} required packages have supported versions"


def _cache() -> tuple[bool, str]:
    """Whether the cache folder can be written, and how much room there is."""
    folder = cache_folder()
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell: a disk may be read-only
            free = shutil.disk_usage(folder).free / 2**30
    except (OSError, ValueError) as error:
        return False, f"{folder} cannot be written ({error}); set REPEDIT_CACHE to a folder that can"
    return True, f"{folder}, {free:.0f} GiB free"


def _default_model() -> tuple[bool, str]:
    """Whether the default model is cached; it passes without, since no function but `repedit demo` needs the model."""
    try:
        return True, str(cached(DEFAULT))
    except NotFound:
        return True, f"{DEFAULT} is not fetched yet; get it once with: repedit fetch"


def _device() -> tuple[bool, str]:
    """The device that `device="auto"` chooses."""
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return True, f"cuda: {names} (CUDA {torch.version.cuda})"
    build = (
        f"a CUDA {torch.version.cuda} build of torch that sees no GPU" if torch.version.cuda else "a CPU build of torch"
    )
    return True, f"cpu, {os.cpu_count()} logical cores; {build}"


def _kernels() -> tuple[bool, str]:
    """Whether the projection on the device equals the same in float64."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, reason = choose(device, torch.float32, (WIDTH, RANK))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, WIDTH, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator, dtype=torch.float64)).Q
    exact = x - (x @ basis) @ basis.T
    computed = project(*(t.float().to(device) for t in (x, basis, basis))).double().cpu()
    error = float((computed - exact).abs().max() / exact.abs().max())
    detail = f"projection of rank {RANK} at width {WIDTH}: {name} ({reason}), error {error:.0e}"
    return error <= KERNEL_TOLERANCE, detail


def _tiny_edit() -> tuple[bool, str]:
    """Whether hooks and weights agree at every site of a tiny random model."""
    report = check_architecture(tiny_model())
    largest = max(proof.error for proof in report.proofs)
    detail = f"{len(report.proofs)} sites edited by hook and in the weights, largest difference {largest:.0e}"
    return report.passed, detail


_CHECKS: Mapping[str, Callable[[], tuple[bool, str]]] = {
    "packages": _packages, "cache folder": _cache, "default model": _default_model, "device": _device, "kernels": _kernels,
    "edit of a tiny model": _tiny_edit,
}  # fmt: skip
