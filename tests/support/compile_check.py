"""Compile Triton kernels for GPUs that are not here, and read what the machine code does.

Triton compiles for any target on any machine, and ships NVIDIA's disassembler. So a test can hold a
kernel to its register count, to no spills, to 16-byte loads and to barriers outside its loops on
every supported architecture, without one of them present. What it cannot see: time, occupancy,
cache behaviour, and anything that depends on values (bank conflicts, divergence).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel costs. Instruction counts are static: a loop body counts once."""

    registers: int  # per thread
    spill_bytes: int  # per thread, 0 when everything stays in registers
    shared_bytes: int  # per program
    loads: Counter[int]  # width in bits per thread -> number of global load instructions
    stores: Counter[int]
    barriers: int  # instructions that make all warps of a program meet
    barriers_in_loops: int  # those of them that can execute more than once

    @property
    def widest_load(self) -> int:
        """In bits per thread; 128 or more is full speed."""
        return max(self.loads, default=0)

    @property
    def widest_store(self) -> int:
        """In bits per thread; 128 or more is full speed."""
        return max(self.stores, default=0)


def compile_kernel(
    kernel: Any, arguments: dict[str, Any], target: str, **options: Any
) -> CompiledKernel:
    """Compile a `@triton.jit` kernel for one of `TARGETS`.

    `arguments` maps each parameter to a type in words: `"i32"`, `"fp32"`, `"*bf16"`, with `":16"`
    appended where the launcher passes a multiple of 16 (a pointer: 16-byte aligned). Triton derives
    that from the values of a real launch, and loads are 16 bits wide without it. Anything that
    is not a string is a `tl.constexpr` value. Parameters with a default may be left out.
    `options` are launch options, such as `num_warps`.
    """
    function = _jit_function(kernel)
    unknown = arguments.keys() - {p.name for p in function.params}
    if unknown:
        raise ValueError(f"{function.__name__} has no parameter {sorted(unknown)}")
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(function.params):
        name = parameter.name
        value = arguments.get(name, parameter.default)
        if isinstance(value, str):
            signature[name], _, divisor = value.partition(":")
            if divisor:
                attributes[(position,)] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name], constants[name] = "constexpr", value
    options.setdefault("enable_fp_fusion", True)  # as on a GPU today; Triton 3.10 changes it
    source = ASTSource(function, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def check(kernel: Any, arguments: dict[str, Any], target: str, **options: Any) -> Report:
    """Compile as `compile_kernel` does, and report."""
    return report(compile_kernel(kernel, arguments, target, **options))


def report(compiled: CompiledKernel) -> Report:
    """Read the machine code of a kernel from `compile_kernel` or from `launches.compile_only`."""
    read = _report_amd if compiled.metadata.target.backend == "hip" else _report_nvidia
    return read(compiled)


def _jit_function(kernel: Any) -> triton.JITFunction:
    while not isinstance(kernel, triton.JITFunction):  # unwrap autotuners and heuristics
        if not hasattr(kernel, "run") or "Interpreted" in type(kernel).__name__:
            raise TypeError(f"{kernel!r} is not compilable (TRITON_INTERPRET is set?)")
        kernel = kernel.fn
    return kernel


def _report_nvidia(compiled: CompiledKernel) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run_tool("cuobjdump", "-res-usage", cubin.name)
        sass = _run_tool("nvdisasm", "-c", cubin.name)

    def used(resource: str) -> int:
        match = re.search(rf"\b{resource}:(\d+)", usage)
        assert match is not None, f"cuobjdump says nothing of {resource}:\n{usage}"
        return int(match[1])

    barriers = list(_barriers(sass, _SASS))
    return Report(
        registers=used("REG"),
        spill_bytes=max(used("STACK"), used("LOCAL")),
        shared_bytes=compiled.metadata.shared,
        loads=_sass_widths(sass, "LDG|LDGSTS"),
        stores=_sass_widths(sass, "STG"),
        barriers=len(barriers),
        barriers_in_loops=sum(barriers),
    )


def _run_tool(name: str, *arguments: str) -> str:
    command = [str(_NVIDIA_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _sass_widths(sass: str, opcodes: str) -> Counter[int]:
    """Widths from suffixes such as LDG.E.EF.128 and LDG.E.U16.CONSTANT; no suffix means 32 bits."""
    suffixes = (m.split(".") for m in re.findall(rf"\b(?:{opcodes})((?:\.\w+)+)", sass))
    named = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return Counter(next((named[s] for s in reversed(m) if s in named), 32) for m in suffixes)


def _report_amd(compiled: CompiledKernel) -> Report:
    assembly = compiled.asm["amdgcn"]

    def used(resource: str) -> int:
        return max(map(int, re.findall(rf"\.{resource}:\s*(\d+)", assembly)), default=0)

    barriers = list(_barriers(assembly, _AMDGCN))
    spilled_registers = used("vgpr_spill_count") + used("sgpr_spill_count")
    return Report(
        registers=used("vgpr_count"),
        spill_bytes=max(used("private_segment_fixed_size"), 4 * spilled_registers),
        shared_bytes=compiled.metadata.shared,
        loads=_amdgcn_widths(assembly, "load"),
        stores=_amdgcn_widths(assembly, "store"),
        barriers=len(barriers),
        barriers_in_loops=sum(barriers),
    )


def _amdgcn_widths(assembly: str, direction: str) -> Counter[int]:
    units = {"byte": 8, "short": 16, "dword": 32}
    pattern = rf"\b(?:global|buffer|flat)_{direction}_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?"
    return Counter(units[unit] * int(n or 1) for unit, n in re.findall(pattern, assembly))


@dataclass(frozen=True)
class _Syntax:
    """How to read the control flow of a disassembly, one instruction or label a line."""

    label: re.Pattern[str]
    target: re.Pattern[str]  # a label that the instruction may go to
    final: re.Pattern[str]  # an instruction that never continues on the next line
    barrier: re.Pattern[str]


_SASS = _Syntax(
    label=re.compile(r"^\s*(\.L_\w+):"),
    target=re.compile(r"`\((\.L_\w+)\)"),
    final=re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:BRA\s+`|EXIT|RET|BRX|JMP)"),  # not after @P0
    barrier=re.compile(r"\bBAR\.(?:SYNC|RED)"),
)
_AMDGCN = _Syntax(
    label=re.compile(r"^(\.LBB\w+):"),
    target=re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)"),
    final=re.compile(r"^\s*(?:s_branch|s_endpgm|s_setpc)"),
    barrier=re.compile(r"\bs_barrier"),
)


def _barriers(assembly: str, syntax: _Syntax) -> Iterator[bool]:
    """For each barrier: whether control can come back to it, which is what makes a loop."""
    lines = assembly.splitlines()
    labels = {m[1]: at for at, line in enumerate(lines) if (m := syntax.label.match(line))}

    def successors(at: int) -> list[int]:
        following = [] if syntax.final.match(lines[at]) else [at + 1]
        return following + [labels[t] for t in syntax.target.findall(lines[at]) if t in labels]

    for barrier, line in enumerate(lines):
        if not syntax.barrier.search(line):
            continue
        seen: set[int] = set()
        ahead = successors(barrier)
        while ahead and barrier not in seen:
            at = ahead.pop()
            if at < len(lines) and at not in seen:
                seen.add(at)
                ahead += successors(at)
        yield barrier in seen
