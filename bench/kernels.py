"""What the compilers make of every kernel: registers, spills, shared memory, tensor instructions; no GPU needed.

Run as `python -m bench.kernels`; the triton wheel brings the assembler and the disassembler. A kernel passes where
nothing spills, shared memory fits, loads are 128 bits wide and products use the tensor cores of the card.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / ".cache" / "triton"))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bench.record import record  # noqa: E402
from repedit.kernels import triton_activity, triton_project  # noqa: E402
from repedit.kernels.tiles import Tile, tile  # noqa: E402

ARCHITECTURES = (80, 90, 100)
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape; `flags` are the constants that differ from a centred forward pass."""

    kernel: str
    dtype: str
    width: int
    rank: int
    flags: tuple[tuple[str, Any], ...] = ()
    plan: Tile | None = None

    @property
    def name(self) -> str:
        """As in the results file."""
        extra = "".join(f" {key}={value}" for key, value in self.flags)
        size = f" {self.plan.rows}x{self.plan.columns}" if self.plan else ""
        return f"{self.kernel} {self.dtype} d{self.width} R{self.rank}{size}{extra}"


BACKWARD = (("CENTER", False), ("SAVE", True))
REWRITE = (("CENTER", False),)
CASES = (
    *(Case("resident", "bf16", d, r) for d, r in ((576, 16), (576, 64), (1024, 16), (1024, 64), (2048, 16), (4096, 16))),
    Case("resident", "fp16", 576, 16),
    *(Case("resident", "fp32", d, 16) for d in (576, 1024)),
    *(Case("resident", "bf16", 576, 16, flags) for flags in (BACKWARD, REWRITE, (("RESIDUAL", True),))),
    *(Case("two_sweeps", "bf16", 4096, r) for r in (16, 64)),
    *(Case(k, "bf16", 4096, r) for r in (16, 64, 256) for k in ("split_reduce", "split_apply")),
    *(Case(k, "fp32", 4096, 64) for k in ("split_reduce", "split_apply")),
    Case("split_apply", "bf16", 4096, 16, (("SPLITS", 4), *BACKWARD)),
    *(Case("sums", "bf16", 14336, 0, flags) for flags in ((), (("GRAD", True),), (("SHIFT", True),))),
)  # fmt: skip
# Twice the rows that fit: its spills are what the gate must see.
OVERSIZED = Case("resident", "bf16", 2048, 16, plan=Tile("resident", 64, 64, 16, 8, 1))


def resources(case: Case, architecture: int) -> dict[str, Any] | None:
    """What the compiled kernel needs, or None where the dispatch table has no such tile on this architecture."""
    if case.kernel == "sums":
        binary = _compiled(triton_activity.sums, _sums_types(case), _sums_constants(case), architecture, 4)
        return _read(binary) | {"case": case.name, "sm": architecture}
    want = case.kernel.split("_")[0] if case.kernel.startswith("split") else case.kernel
    plan = case.plan or tile(case.width, case.rank, BYTES[case.dtype], want, major=architecture // 10)
    if plan is None:
        return None
    kernel = getattr(triton_project, case.kernel)
    binary = _compiled(kernel, _types(case), _constants(case, plan), architecture, plan.warps)
    found = _read(binary) | {"case": case.name, "sm": architecture, "tile": asdict(plan)}
    by_registers = 65536 // (found["registers"] * plan.warps * 32)
    return found | {"programs_per_sm": min(by_registers, SHARED[architecture] // max(found["shared"], 1))}


def problems(found: dict[str, Any]) -> list[str]:
    """What the gate refuses."""
    counts, sm = found["instructions"], found["sm"]
    bad = []
    if found["stack"] or counts.get("LDL", 0) or counts.get("STL", 0):
        bad.append(f"spills: stack {found['stack']}, {counts.get('LDL', 0)} loads, {counts.get('STL', 0)} stores")
    if found["shared"] > SHARED[sm]:
        bad.append(f"shared memory {found['shared']} above {SHARED[sm]}")
    loads = counts.get("LDG", 0) + counts.get("LDGSTS", 0)
    if found["wide_loads"] < loads / 2:
        bad.append(f"{found['wide_loads']} of {loads} loads are 128 bits wide")
    if "tile" in found and "fp32" not in found["case"]:
        wide = found["tile"]["rows"] >= 64
        wanted = {90: "HGMMA", 100: "UTC"}.get(sm, "HMMA") if wide else "HMMA"
        if not any(name.startswith(wanted) for name in counts):
            bad.append(f"no {wanted} instruction")
    return bad


def _types(case: Case) -> dict[str, tuple[str, bool]]:
    """Type of each argument, and whether it is a multiple of 16 (bytes for a pointer), as at run time."""
    tensors = ("x_ptr", "u_ptr", "v_ptr", "residual_ptr", "out_ptr")
    return (
        dict.fromkeys(tensors, (f"*{case.dtype}", True))
        | dict.fromkeys(("c_ptr", "t_ptr", "parts_ptr"), ("*fp32", True))
        | {"n": ("i32", True), "d": ("i32", True), "k": ("i32", case.rank % 16 == 0)}
        | dict.fromkeys(("sxn", "sud", "svd", "srn", "son"), ("i32", True))
    )


def _constants(case: Case, plan: Tile) -> dict[str, Any]:
    chunks = -(-case.width // plan.columns)
    units = dict.fromkeys(("sxd", "suk", "svk", "srd", "sod"), 1)
    flags = {"CENTER": True, "RESIDUAL": False, "SAVE": False, "UPCAST": False, "PRECISION": "ieee", "SPLITS": 1}
    sizes = {"BM": plan.rows, "BD": plan.columns, "R": plan.rank, "CHUNKS": chunks, "STAGES": plan.stages}
    return units | flags | sizes | dict(case.flags)


def _sums_types(case: Case) -> dict[str, tuple[str, bool]]:
    pointers = {"z_ptr": case.dtype, "grad_ptr": case.dtype, "mask_ptr": "u8", "shift_ptr": "fp32", "out_ptr": "fp32"}
    counts = {"n": True, "f": True, "steps": False, "szn": True, "sgn": True}
    return {k: (f"*{v}", True) for k, v in pointers.items()} | {k: ("i32", v) for k, v in counts.items()}


def _sums_constants(case: Case) -> dict[str, Any]:
    flags = {"GRAD": False, "SHIFT": False} | dict(case.flags)
    sizes = {"COUNT": 8 if flags["GRAD"] else 4, "BN": triton_activity.BN, "BC": triton_activity.BC, "STAGES": 3}
    return {"szf": 1, "sm": 1, "sgf": 1} | flags | sizes


def _compiled(kernel: Any, types: dict[str, tuple[str, bool]], constants: dict[str, Any], sm: int, warps: int) -> Any:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name][0] for name in names}
    values = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    multiples = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants and types[name][1]
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=multiples)
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def _read(binary: Any) -> dict[str, Any]:
    """Resources from the disassembler; its LOCAL stays 0 with hundreds of spills, so stack and instructions count."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    counts = Counter(re.findall(r"\b(LDL|STL|HGMMA|HMMA|UTC\w*MMA|LDGSTS|LDG|STG|FFMA)\b", code))
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        "shared": binary.metadata.shared,
        "instructions": dict(sorted(counts.items())),
        "wide_loads": len(re.findall(r"(?:LDG|LDGSTS)[.\w]*\.128", code)),
    }


def main() -> None:
    """Compile, print, and record unless asked only to print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", type=int, nargs="*", default=ARCHITECTURES, help="Architectures, such as 90.")
    parser.add_argument("--print", action="store_true", help="Print JSON lines and write no results file.")
    parser.add_argument("--oversized", action="store_true", help="Compile the tile that must fail, and nothing else.")
    chosen = parser.parse_args()
    rows = []
    for sm in chosen.sm:
        for case in (OVERSIZED,) if chosen.oversized else CASES:
            found = resources(case, sm)
            if found is not None:
                bad = problems(found)
                rows.append(found | {"problems": bad, "status": "fail" if bad else "pass"})
                show(rows[-1], raw=chosen.print)
    if not chosen.print:
        print(record("kernels-compiled", rows, module="kernels", triton=triton.__version__))


def show(row: dict[str, Any], *, raw: bool) -> None:
    """One line a kernel."""
    import json

    if raw:
        print(json.dumps(row), flush=True)
        return
    tensor = {k: v for k, v in row["instructions"].items() if k.endswith("MMA")}
    print(
        f"sm_{row['sm']:<4} {row['case']:44} registers {row['registers']:3} stack {row['stack']:4} shared "
        f"{row['shared']:6} {tensor} {row['status']} {'; '.join(row['problems'])}",
        flush=True,
    )


if __name__ == "__main__":
    main()
