"""Whether gradients are those of collected losses alone: a `GateNormalizer` multiplies them.

Another loss may reach the same parameters in a sum with a collected one, which `_Root` sees as its
backward begins; in a backward of its own, which hooks of the parameters see; or before the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

REMEDY = (
    "run the backward of other losses after scale_gradients, or give the losses "
    "GateNormalizer.weights as their gate, which need no factor"
)


class Watch:
    """What is seen of the gradients of a step."""

    def __init__(self) -> None:
        self.running = 0  # backwards through collected losses
        self._reached: dict[int, Tensor] = {}
        self._hidden = False  # some of what the losses reach cannot be seen
        self._summed: dict[int, Tensor] = {}  # with a collected loss in one backward
        self._apart: dict[int, Tensor] = {}  # from another backward
        self._hooks: list[Any] = []
        self._seen = _hook_of(weakref.ref(self))
        weakref.finalize(self, _remove, self._hooks)

    def follow(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """The losses of a call, so that their backward is seen."""
        if torch.compiler.is_compiling():
            self._hide()
            return [*losses]
        _, leaves, whole = _walk([loss.grad_fn for loss in losses])
        if not whole:
            self._hide()
        for leaf in leaves:
            if not self._hidden and id(leaf) not in self._reached:
                self._reached[id(leaf)] = leaf
                self._look_at(leaf)
        return [self._followed(loss) if loss.requires_grad else loss for loss in losses]

    def _followed(self, loss: Tensor) -> Tensor:
        found: Tensor = _Followed.apply(loss, self)  # type: ignore[no-untyped-call]
        return found.as_subclass(_Root)

    def _look_at(self, leaf: Tensor) -> None:
        """At the gradient that a leaf has, and at those that it will get."""
        if _is_sharded(leaf):
            return
        if leaf.grad is not None and leaf.grad.is_cpu and leaf.grad.any():
            self._apart[id(leaf)] = leaf
        self._hooks.append(leaf.register_post_accumulate_grad_hook(self._seen))  # type: ignore[no-untyped-call]

    def _hide(self) -> None:
        self._hidden = True
        self._apart.clear()
        _remove(self._hooks)

    def begin(self) -> None:
        """A backward goes through a collected loss, until its end."""
        self.running += 1
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        self.running -= 1

    def summed_with(self, leaves: Iterable[Tensor]) -> None:
        """A backward through a collected loss reaches these by other ways as well."""
        self._summed |= {id(leaf): leaf for leaf in leaves}

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Raise ValueError for a gradient that is known not to be of the collected losses alone."""
        for i, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            name, trouble = id(parameter), ""
            if name not in self._reached and not self._hidden and not _is_sharded(parameter):
                trouble = "has one that none of them reaches: leave it out, "
            elif name in self._summed:
                trouble = "has one that another loss of the same backward reaches: "
            elif name in self._apart:
                trouble = "has one to which another backward has added: "
            if trouble:
                raise ValueError(
                    "parameters must get their gradients from the losses of this GateNormalizer "
                    f"alone; number {i}, of shape {list(parameter.shape)}, {trouble}{REMEDY}"
                )

    def close(self) -> None:
        """Look no more."""
        _remove(self._hooks)


def _is_sharded(x: Tensor) -> bool:
    """DTensors are other tensors than those that the losses reach."""
    return hasattr(x, "device_mesh")


def _hook_of(this: weakref.ref[Watch]) -> Callable[[Tensor], None]:
    """Of parameters, which outlive a watch."""

    def accumulated(leaf: Tensor) -> None:
        watch = this()
        if watch is not None and not watch.running:
            watch._apart[id(leaf)] = leaf

    return accumulated


def _remove(hooks: list[Any]) -> None:
    while hooks:
        hooks.pop().remove()


class _Followed(torch.autograd.Function):
    """A collected loss, in the graph; its node is known by `watch`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, watch: Watch) -> Tensor:
        ctx.watch = watch
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.watch.begin()
        return *grads, None


class _Root(Tensor):
    """A collected loss, or what was computed with one: it may be where a backward begins."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.backward:
            _tell(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs or {})
            if isinstance(found, (tuple, list)):
                return type(found)(map(_as_root, found)) if type(found) in (tuple, list) else found
            return _as_root(found)

    def __format__(self, form: str) -> str:
        return format(self.as_subclass(Tensor), form)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))


def _as_root(x: Any) -> Any:
    """Constants are of no interest: they are plain tensors again."""
    if isinstance(x, Tensor) and not isinstance(x, _Root) and x.requires_grad:
        return x.as_subclass(_Root)
    return x.as_subclass(Tensor) if isinstance(x, _Root) and not x.requires_grad else x


def _tell(root: Tensor) -> None:
    """Tell each watch what a backward from here reaches other than by its losses."""
    ends, leaves, _ = _walk([root.grad_fn], lambda node: hasattr(node, "watch"))
    watches = {id(end.watch): end.watch for end in ends}
    for watch in watches.values():
        if len(watches) > 1:

            def is_mine(node: Any, watch: Watch = watch) -> bool:
                return getattr(node, "watch", None) is watch

            _, leaves, _ = _walk([root.grad_fn], is_mine)
        watch.summed_with(leaves)


def _walk(
    nodes: list[Any], is_end: Callable[[Any], bool] | None = None
) -> tuple[list[Any], list[Tensor], bool]:
    """Of a graph up to its ends: these, the leaves before them, and whether all is seen, which
    reentrant checkpoints prevent."""
    seen: set[Any] = set()
    ends, leaves, whole = [], [], True
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_end is not None and is_end(node):
            ends.append(node)
            continue
        whole = whole and "CheckpointFunction" not in node.name()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            leaves.append(leaf)
        nodes += [other for other, _ in node.next_functions]
    return ends, leaves, whole
