"""Make TRITON_INTERPRET=1 round as a GPU does, and stop at what a GPU would let pass.

Import only where TRITON_INTERPRET was set before the kernels were decorated.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from .bounds import Extents, KernelFault
from .memory import nan_filled_memory

_LOAD, _STORE, _ATOMIC = 1, 2, 4


@contextmanager
def corrected() -> Iterator[None]:
    """Round float32 to bfloat16 to nearest even, and let `range` take tensors with new numpy.

    Triton up to 3.9 cuts the low bits off instead of rounding. Triton 3.5 and 3.6 convert scalars,
    which are arrays of shape [1], in a way that numpy 2.4 no longer allows.
    """
    builder = interpreter.InterpreterBuilder
    previous = builder.cast_impl, builder.create_fp_to_fp
    patch_tensor = interpreter._patch_lang_tensor

    def rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
        def cast(self: Any, source: Any, target: Any, *rounding_mode: Any) -> Any:
            if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
                return convert(self, source, target, *rounding_mode)
            values = torch.from_numpy(np.array(source.data, np.float32))  # [] or [BLOCK, ...]
            bits = values.bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, target.scalar)

        return cast

    def patch(tensor: Any, *scope: Any) -> None:  # at each launch, undone after it
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    builder.cast_impl, builder.create_fp_to_fp = map(rounding, previous)
    interpreter._patch_lang_tensor = patch
    try:
        yield
    finally:
        builder.cast_impl, builder.create_fp_to_fp = previous
        interpreter._patch_lang_tensor = patch_tensor


class _CheckedAccess:
    """Stands in for the interpreter's native module, and checks every address before its use."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.begin([])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def begin(self, arguments: Iterable[tuple[str, Any]]) -> None:
        """Start a launch with these arguments."""
        self._extents = Extents(arguments)
        self._log: list[tuple[np.ndarray, int, int]] = []  # addresses, program, kind
        self._programs: dict[tuple[int, int, int], int] = {}

    def load(self, pointers: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        self._check("load", _LOAD, pointers, mask)
        return self._native.load(pointers, mask, *rest)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        self._check("store", _STORE, pointers, mask)
        return self._native.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: Any, mask: Any, sem: Any) -> Any:
        self._check("atomic", _ATOMIC, pointers, mask)
        return self._native.atomic_rmw(op, pointers, value, mask, sem)

    def atomic_cas(self, pointers: np.ndarray, *rest: Any) -> Any:
        self._check("atomic", _ATOMIC, pointers, np.array(True))
        return self._native.atomic_cas(pointers, *rest)

    def _check(self, verb: str, kind: int, pointers: np.ndarray, mask: np.ndarray) -> None:
        live = np.broadcast_to(mask, np.shape(pointers)).astype(bool)
        addresses = np.asarray(pointers).astype(np.int64)[live]
        program = interpreter.interpreter_builder.grid_idx
        outside = self._extents.outside(addresses)
        if outside.any():
            raise KernelFault(
                f"out-of-bounds {verb} of {int(outside.sum())} element(s) in program {program}: "
                + self._extents.describe(int(addresses[outside][0]))
            )
        self._log.append((addresses, self._programs.setdefault(program, len(self._programs)), kind))

    def check_races(self) -> None:
        """Whether two programs touched one element, not both by loads and not both by atomics."""
        sizes = [addresses.size for addresses, _, _ in self._log]
        if not sum(sizes) or len(self._programs) == 1:
            return
        addresses = np.concatenate([addresses for addresses, _, _ in self._log])
        order = np.argsort(addresses, kind="stable")
        programs = np.repeat([program for _, program, _ in self._log], sizes)[order]
        kinds = np.repeat([kind for _, _, kind in self._log], sizes)[order]
        addresses = addresses[order]
        starts = np.flatnonzero(np.append(True, addresses[1:] != addresses[:-1]))  # one an element
        first = np.minimum.reduceat(programs, starts)
        last = np.maximum.reduceat(programs, starts)
        together = np.bitwise_or.reduceat(kinds, starts)
        racing = (first != last) & (together != _LOAD) & (together != _ATOMIC)
        if racing.any():
            at = int(np.flatnonzero(racing)[0])
            ids = list(self._programs)
            raise KernelFault(
                f"race: programs {ids[first[at]]} and {ids[last[at]]} both touch, and one of them "
                f"writes, {self._extents.describe(int(addresses[starts[at]]))}"
            )


@contextmanager
def sanitize() -> Iterator[None]:
    """Raise `KernelFault` at out-of-bounds accesses and races; fill uninitialised memory with NaN.

    Bounds are exact, row padding and storage slack included. Races are looked for between programs
    of one launch, in the accesses that were made, also where both write the same value. Not seen:
    races between the lanes of one program, an access that lands on an element of another argument,
    and synchronisation through atomics, which is reported as the race it replaces.
    """
    executor, native = interpreter.GridExecutor, interpreter._interpreter
    copy_arguments, execute = executor._init_args_hst, executor.__call__
    checked = _CheckedAccess(native)

    def begin(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = copy_arguments(self, args, kwargs)
        checked.begin([*zip(self.arg_names, args, strict=False), *kwargs.items()])
        return args, kwargs

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            execute(self, *args, **kwargs)
        except InterpreterError as error:
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):  # one for each function that was called
                cause = cause.__cause__
            if isinstance(cause, KernelFault):
                raise cause from None
            raise
        checked.check_races()

    interpreter._interpreter = checked
    executor._init_args_hst, executor.__call__ = begin, call
    try:
        with nan_filled_memory():
            yield
    finally:
        interpreter._interpreter = native
        executor._init_args_hst, executor.__call__ = copy_arguments, execute
