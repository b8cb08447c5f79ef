"""Whether this installation works: versions, cache, default model, device, kernels, and an edit of a tiny model."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import torch

from repedit.arch.infer import check_architecture
from repedit.errors import NotFound, RepeditError
from repedit.hashing import package_versions
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
        **package_versions("transformers", "safetensors"),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "CPU kernels": torch.backends.cpu.get_cpu_capability(),
    }


def check_installation() -> Installation:
    """Try the installation without a model: no check writes outside the cache folder, and none uses the network."""
    checks = (_packages(), _cache(), _default_model(), _device(), _kernels(), _tiny_edit())
    return Installation({**system_versions(), "torch threads": str(torch.get_num_threads())}, checks)


def _packages() -> Check:
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
    return Check(
        "packages", not missing, "; ".join(missing) or f"all {count} required packages have supported versions"
    )


def _cache() -> Check:
    """Whether the cache folder can be written, and how much room there is."""
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Check("cache folder", False, f"{folder} cannot be written; set REPEDIT_CACHE to a folder that can")
    return Check("cache folder", True, f"{folder}, {free:.0f} GiB free")


def _default_model() -> Check:
    """Whether the default model is cached; it passes without, since no function but `repedit demo` needs the model."""
    try:
        return Check("default model", True, str(cached(DEFAULT)))
    except NotFound:
        return Check("default model", True, f"{DEFAULT} is not fetched yet; get it once with: repedit fetch")


def _device() -> Check:
    """The device that `device="auto"` chooses."""
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check("device", True, f"cuda: {names} (CUDA {torch.version.cuda})")
    build = (
        f"a CUDA {torch.version.cuda} build of torch that sees no GPU" if torch.version.cuda else "a CPU build of torch"
    )
    return Check("device", True, f"cpu, {os.cpu_count()} logical cores; {build}")


def _kernels() -> Check:
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
    return Check("kernels", error <= KERNEL_TOLERANCE, detail)


def _tiny_edit() -> Check:
    """Whether hooks and weights agree at every site of a tiny random model."""
    try:
        report = check_architecture(tiny_model())
    except RepeditError as error:
        return Check("edit of a tiny model", False, f"{type(error).__name__}: {error}")
    largest = max(proof.error for proof in report.proofs)
    detail = f"{len(report.proofs)} sites edited by hook and in the weights, largest difference {largest:.0e}"
    return Check("edit of a tiny model", report.passed, detail)
