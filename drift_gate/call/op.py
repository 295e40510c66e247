"""A loss as a forward and a backward over plain tensors, called in two ways, written once for all.

In eager mode the two run inside one `autograd.Function`. Where `torch.compile` traces the call they
are one `torch.library` op each, whose schema, fake and autograd follow from the same description.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

Tensors = tuple[Tensor, ...]
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    str: "str",
}


SPENT = (
    "backward ran a second time through a drift_gate linear_ loss: its gradients were formed in "
    "the forward and handed out by the first backward. Call the loss again, or use "
    'reduction="none", whose backward makes them anew'
)


class Op:
    """One op.

    Args:
        name: of the op, in the namespace `drift_gate`.
        inputs: a NamedTuple of tensors, numbers, strings, and NamedTuples of these.
        forward: inputs -> outputs, new tensors that share no memory.
        backward: (inputs, outputs, gradients of the first outputs or None, which gradients are
            needed) -> a gradient or None for each of `differentiable`.
        empty: inputs -> uninitialised outputs, of the right shapes; no values are read.
        outputs: their names.
        grads: how many outputs, the first ones, carry gradients.
        differentiable: names of the inputs that have gradients, fields of `inputs` itself.
        keep: names of the inputs, likewise, and outputs that the backward reads. The other tensors
            are None there, and other differentiable ones are empty, of their dtype.
        hands_out: names of outputs that the first backward overwrites and hands out as gradients;
            a second one raises.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Any],
        forward: Callable[[Any], Tensors],
        backward: Callable[..., Sequence[Tensor | None]],
        empty: Callable[[Any], Tensors],
        *,
        outputs: Sequence[str],
        grads: int,
        differentiable: Sequence[str],
        keep: Sequence[str],
        hands_out: Sequence[str] = (),
    ) -> None:
        self.name, self.inputs = name, inputs
        keep_order = [x for x in outputs if x in keep]
        self.forward, self.backward, self.empty = forward, backward, empty
        self.outputs, self.grads, self.differentiable = tuple(outputs), grads, tuple(differentiable)
        self.kept = tuple(x for x in keep if x not in outputs)
        self.hands_out = tuple(keep_order.index(x) for x in hands_out)
        self.kept_outputs = tuple(i for i, x in enumerate(outputs) if x in keep)
        hints = get_type_hints(inputs)
        fields = list(hints)
        self.leaves_at = [fields.index(x) for x in differentiable]
        self.kept_at = [fields.index(x) for x in self.kept]
        self.dropped_at = [i for i, hint in enumerate(hints.values()) if _has_tensors(hint)]
        self.library = _define(self)

    def __call__(self, x: Any) -> Tensors:
        """Outputs, differentiable where autograd asks for it."""
        if torch.compiler.is_compiling() or x[0].is_meta or _len_torch_dispatch_stack():
            return tuple(self.library(*flatten(self._traceable(x))))
        if torch.is_grad_enabled():
            inputs = [*map(x.__getitem__, self.leaves_at)]
            for leaf in inputs:
                if leaf is not None and leaf.requires_grad:
                    results: Tensors = _Eager.apply(self, x, *inputs)  # type: ignore[no-untyped-call]
                    return results
        with torch.no_grad():
            return self.forward(x)

    def _traceable(self, x: Any) -> Any:
        """The inputs of an op of the library, which may not return what it was given."""
        return x._replace(inplace=False) if "inplace" in x._fields else x


class _Eager(torch.autograd.Function):
    """Any op in eager mode: loops and C, as a comprehension is one more call."""

    @staticmethod
    def forward(ctx: Any, op: Op, x: Any, *differentiable: Tensor | None) -> Tensors:
        outputs = op.forward(x)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[op.grads :])
        # What was made in inference mode never changes, and autograd refuses to save it.
        loose: dict[int, Tensor] = {}
        saved = [*map(x.__getitem__, op.kept_at)]
        for i, y in enumerate(saved):
            if y is not None and y.is_inference():
                loose[i], saved[i] = y, None
        ctx.save_for_backward(*saved, *map(outputs.__getitem__, op.kept_outputs))
        values = list(x)
        for i in op.dropped_at:
            values[i] = None
        if op.hands_out:
            for i, y in zip(op.leaves_at, differentiable, strict=True):
                values[i] = None if y is None else y.new_empty(0)
        ctx.op, ctx.values, ctx.loose, ctx.spent = op, values, loose, False
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            saved = ctx.saved_tensors
            with torch.no_grad():
                found = _Eager.backward(ctx, *grads)
            return tuple(x if x is None else _once(ctx.op.name, x, saved) for x in found)
        op = ctx.op
        if ctx.spent:
            raise RuntimeError(SPENT)
        ctx.spent = bool(op.hands_out)
        saved, values = ctx.saved_tensors, list(ctx.values)
        for i, at in enumerate(op.kept_at):
            values[at] = ctx.loose.get(i, saved[i])
        outputs: list[Tensor | None] = [None] * len(op.outputs)
        for i, output in zip(op.kept_outputs, saved[len(op.kept_at) :], strict=True):
            outputs[i] = output
        needs = ctx.needs_input_grad[2:]
        return None, None, *op.backward(op.inputs(*values), outputs, grads[: op.grads], needs)


class _Once(torch.autograd.Function):
    """A gradient that has no derivative, and says so where it is asked for one."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, followed: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(f"the gradients of drift_gate::{ctx.name} are not differentiable")


def _once(name: str, gradient: Tensor, saved: Sequence[Tensor | None]) -> Tensor:
    """The gradient, no constant to autograd: where it can be, a function of what has it."""
    leaves = [y for y in saved if y is not None and y.requires_grad]
    followed = leaves[0] if leaves else gradient.new_zeros(()).requires_grad_()
    found: Tensor = _Once.apply(name, gradient, followed)  # type: ignore[no-untyped-call]
    return found


def _spread(op: Op, kept: Sequence[Tensor]) -> list[Tensor | None]:
    """The outputs, None where they were not kept."""
    outputs: list[Tensor | None] = [None] * len(op.outputs)
    for i, output in zip(op.kept_outputs, kept, strict=True):
        outputs[i] = output
    return outputs


# Under torch.compile.


def _define(op: Op) -> Any:
    """Register the op and its backward with torch.library."""
    fields = leaves(op.inputs)
    schema = ", ".join(f"{SCHEMA_TYPES[hint]} {name}" for name, hint in fields)
    results = ", ".join(f"Tensor {name}" for name in op.outputs)

    def forward(*values: Any) -> Tensors:
        return _distinct(op.forward(unflatten(op.inputs, list(values))))

    library = torch.library.custom_op(
        f"drift_gate::{op.name}", forward, mutates_args=(), schema=f"({schema}) -> ({results})"
    )
    library.register_fake(lambda *values: op.empty(unflatten(op.inputs, list(values))))
    if op.differentiable:
        gradient = _define_backward(op, fields)
        _differentiate(op, [name for name, _ in fields], library, gradient)
    return library


def _define_backward(op: Op, fields: list[tuple[str, Any]]) -> Any:
    """The op that makes an op's gradients, each of them a result of its own: ops that write to a
    list may not return one. [0] stands for none, and for one that is handed out."""
    names = [name for name, _ in fields]
    leaves_at = [names.index(name) for name in op.differentiable]

    def backward(*values: Any) -> Tensor | Tensors:
        *inputs, outputs, grads, needs = values
        x = unflatten(op.inputs, list(inputs))
        found = op.backward(x, _spread(op, outputs), grads, needs)
        places = [x.untyped_storage().data_ptr() for x in outputs]
        like = inputs[leaves_at[0]]
        return returned(
            like.new_empty(0)
            if grad is None or grad.untyped_storage().data_ptr() in places
            else grad
            for grad in found
        )

    def empty(*values: Any) -> Tensor | Tensors:
        *inputs, outputs, _, needs = values
        like, found = inputs[leaves_at[0]], []
        for i, at in enumerate(leaves_at):
            leaf = inputs[at]
            if leaf is None or not needs[i] or _handed(op, outputs, i, leaf) is not None:
                found.append(like.new_empty(0))
            else:
                found.append(torch.empty_like(leaf, memory_format=torch.contiguous_format))
        return returned(found)

    def returned(gradients: Iterable[Tensor]) -> Tensor | Tensors:
        several = tuple(gradients)
        return several if len(several) > 1 else several[0]

    schema = ", ".join(
        f"{'Tensor?' if _has_tensors(hint) else SCHEMA_TYPES[hint]} {name}" for name, hint in fields
    )
    kept = "Tensor(a!)[]" if op.hands_out else "Tensor[]"
    gradient = torch.library.custom_op(
        f"drift_gate::{op.name}_backward",
        backward,
        mutates_args=("kept_outputs",) if op.hands_out else (),
        schema=f"({schema}, {kept} kept_outputs, Tensor?[] gradients, bool[] needs)"
        f" -> ({', '.join(['Tensor'] * len(leaves_at))})",
    )
    gradient.register_fake(empty)
    return gradient


def _handed(op: Op, outputs: Sequence[Tensor], i: int, leaf: Tensor) -> Tensor | None:
    """The output, of those kept, that becomes the gradient of an op's i-th leaf."""
    if not op.hands_out:
        return None
    output = outputs[op.hands_out[i]]
    return output if output.dtype == leaf.dtype else None


def _differentiate(op: Op, names: list[str], library: Any, gradient: Any) -> None:
    """Tell autograd that `gradient` makes an op's gradients."""
    saved = tuple(dict.fromkeys((*op.differentiable, *op.kept)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        ctx.set_materialize_grads(False)
        tensors = [inputs[names.index(name)] for name in saved]
        ctx.save_for_backward(*tensors, *[output[i] for i in op.kept_outputs])
        ctx.values = [None if isinstance(x, Tensor) else x for x in inputs]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values = list(ctx.values)
        for field, x in zip(saved, ctx.saved_tensors, strict=False):
            values[names.index(field)] = x
        places = [names.index(field) for field in op.differentiable]
        needs = [ctx.needs_input_grad[at] for at in places]
        outputs = list(ctx.saved_tensors[len(saved) :])
        found = gradient(*values, outputs, list(grads[: op.grads]), needs)
        found = found if len(places) > 1 else (found,)
        given: list[Tensor | None] = [None] * len(names)
        for i, at in enumerate(places):
            if needs[i]:
                handed = _handed(op, outputs, i, values[at])
                given[at] = found[i] if handed is None else handed
        return tuple(given)

    library.register_autograd(backward, setup_context=setup_context)


def _distinct(outputs: Tensors) -> Tensors:
    """The same, copied where two share memory, which an op's results may not."""
    seen: set[int] = set()
    found = []
    for x in outputs:
        place = x.untyped_storage().data_ptr()
        found.append(x.clone() if place in seen and x.numel() else x)
        seen.add(place)
    return tuple(found)


# From NamedTuples to the arguments of an op, and back.


def leaves(kind: type[Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Name and type of each field of a NamedTuple, those of nested ones in their place."""
    found: list[tuple[str, Any]] = []
    for name, hint in get_type_hints(kind).items():
        if _is_nested(hint):
            found += leaves(hint, f"{prefix}{name}_")
        else:
            found.append((prefix + name, hint))
    return found


def flatten(x: Any) -> list[Any]:
    """The values of `leaves`, in their order."""
    found: list[Any] = []
    for value in x:
        if isinstance(value, tuple):
            found += flatten(value)
        else:
            found.append(value)
    return found


def unflatten(kind: type[Any], values: list[Any]) -> Any:
    """The NamedTuple that `flatten` took apart; takes its values off the front of the list."""
    return kind(
        *[
            unflatten(hint, values) if _is_nested(hint) else values.pop(0)
            for hint in get_type_hints(kind).values()
        ]
    )


def _is_nested(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, tuple)


def _has_tensors(hint: Any) -> bool:
    if _is_nested(hint):
        return any(_has_tensors(each) for each in get_type_hints(hint).values())
    return hint in (Tensor, Tensor | None)
