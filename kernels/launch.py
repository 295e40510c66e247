"""`launch`: start a kernel without paying for Triton's look-up of its compiled variant each time.

`kernel[grid](...)` binds, specialises, prints and hashes all arguments on each call, and asks the
driver about each address. Here the compiled variants are kept under a key of our own, of all that
Triton specialises by:

    tensors     dtype, 16-byte alignment; on AMD whether the storage is below 2 GiB
    integers    1, a multiple of 16 or neither; 32 or 64 bits, signed or not
    constexprs  names, values and types; num_warps, num_stages

A key that was seen before runs its compiled kernel with addresses and numbers. The first time, and
wherever anything is out of the ordinary, the launch is Triton's own: interpreted kernels,
autotuners, argument types that are not listed above, hooks, versions of Triton that were not tried,
and tools that replace `JITFunction.run` to watch or to emulate launches. Of Triton's knobs, those
that change how a kernel compiles (TRITON_DEBUG and its like) count the first time alone.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton import JITFunction, knobs, runtime
from triton.compiler import CompiledKernel

MOST_VARIANTS = 4096  # of all kernels together; then all are looked up again
ON_AMD = torch.version.hip is not None
KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) < (3, 10)
_TRITONS_FILE = JITFunction.__init__.__code__.co_filename

# What runs a compiled kernel, its code on the device, its metadata; the values of the parameters
# after those that vary. The kernel itself is kept because its id is in the key.
_Variant = tuple[Any, Any, Any, tuple[Any, ...], JITFunction]
_variants: dict[tuple[Any, ...], _Variant] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)` on the device of the tensors among `args`, sums of products
    fused.

    Args:
        kernel: a `@triton.jit` function.
        grid: one to three numbers of programs, at least 1 each.
        args: the kernel's first parameters in their order: tensors, integers, floats, booleans or
            None. None is constexpr; nothing else here may be. All tensors lie on one device.
        options: all other parameters, constexprs every one, and `num_warps`, `num_stages`.
    """
    if not _is_ordinary(kernel):
        _by_triton(kernel, grid, args, options)
        return
    driver = runtime.driver.active
    device, index = driver.get_current_device(), _device_of(args)
    if index >= 0 and index != device:
        with torch.cuda.device(index):
            launch(kernel, grid, *args, **options)
        return
    found = _look_up(args, index)
    if found is None:
        _by_triton(kernel, grid, args, options)
        return
    traits, plain = found
    key = (
        id(kernel), driver, device, *traits,
        *options, *options.values(), *map(type, options.values()),
    )  # fmt: skip
    variant = _variants.get(key)
    if variant is None:
        _keep(key, kernel, _by_triton(kernel, grid, args, options), len(args), options)
        return
    run, code, packed, rest, _ = variant
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    run(x, y, z, driver.get_current_stream(device), code, packed, None, None, None, *plain, *rest)


def _by_triton(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> Any:
    """Triton's own launch. a * b + c rounds once: from 3.10 on it does so only if told."""
    return kernel[grid](*args, **options, enable_fp_fusion=True)


def _is_ordinary(kernel: Any) -> bool:
    """Whether Triton's own code, and nothing before, after or in place of it, runs this kernel."""
    if not KNOWN or kernel.__class__ is not JITFunction or kernel.pre_run_hooks:
        return False
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        return False
    code = getattr(JITFunction.run, "__code__", None)
    return code is not None and code.co_filename == _TRITONS_FILE


def _device_of(args: tuple[Any, ...]) -> int:
    """Number of the GPU on which the first tensor lies; -1 for the CPU, or without tensors."""
    for x in args:
        if isinstance(x, Tensor):
            return x.get_device()
    return -1


def _look_up(args: tuple[Any, ...], index: int) -> tuple[list[Any], list[Any]] | None:
    """What Triton specialises by, and the arguments as it launches with them: addresses, numbers.

    None where only Triton knows, or where not all tensors lie on the device with this index.
    """
    traits: list[Any] = []
    plain: list[Any] = []
    for x in args:
        kind = x.__class__
        if kind is int:
            if x != 1 and -(2**31) <= x < 2**31:  # most are; a call takes as long as all this
                traits.append(2 + (x & 15 == 0))
            else:
                traits.append(_specialised(x))
        elif x is None or kind is float or kind is bool:
            traits.append(kind)
        elif not isinstance(x, Tensor) or x.get_device() != index:
            return None
        else:
            traits.append(x.dtype)  # always followed by a bool: no two lists read alike
            if ON_AMD:
                traits.append(x.untyped_storage().nbytes() < 2**31)
            x = x.data_ptr()
            traits.append(x & 15 == 0)
        plain.append(x)
    return traits, plain


def _specialised(x: int) -> int:
    """A number for each class of integers that Triton compiles apart."""
    if x == 1:
        return 0
    if -(2**31) <= x < 2**31:
        width = 2
    else:
        width = 4 if x < 2**63 else 6
    return width + (x & 15 == 0)


def _keep(
    key: tuple[Any, ...], kernel: JITFunction, compiled: Any, given: int, options: dict[str, Any]
) -> None:
    """Remember a variant, unless something in it varies that the key does not have."""
    rest = kernel.params[given:]
    if not isinstance(compiled, CompiledKernel) or not all(p.is_constexpr for p in rest):
        return
    if len(_variants) >= MOST_VARIANTS:
        _variants.clear()
    values = tuple(options[p.name] if p.name in options else p.default for p in rest)
    _variants[key] = (
        compiled.run, compiled.function, compiled.packed_metadata, values, kernel
    )  # fmt: skip
