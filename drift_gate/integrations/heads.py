"""LM heads of transformers models as the `linear_` losses take them.

Softcap and scale are read from a model's config, adapters of PEFT are added to the weight, and
then, once a model, the head is held to the model: its decoder stands aside, its own code makes
logits of a few hidden states, and the head must give the same ones and train the same parameters.
"""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..head.check import HeadInputs, take_head
from ..head.logits import logits_of, new_buffer
from ..options import Head

# Names that configs have for them.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
DIVISOR = "logits_scaling"  # Granite divides by it; HyperCLOVA X multiplies
LARGEST = (4.0, 30.0, 120.0)  # logits of the hidden states that are tried: caps bend the last
ROUNDINGS = 4  # of the largest logit, by which two computations of a row may differ
COARSEST = 2.0**-10  # float32 products may be rounded so (TF32)


class Form(NamedTuple):
    """How a model makes logits of weight and bias: cap(scale x)."""

    softcap: float | None
    scale: float

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The losses scale what they have capped: with the cap over the scale both are the same."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        return Head(weight, bias, softcap, self.scale)


_known: "WeakKeyDictionary[Any, dict[Any, Form]]" = WeakKeyDictionary()


def head_of(model: Any, dtype: torch.dtype) -> Head:
    """LM head of a transformers model, in the dtype of its hidden states.

    The weight is the model's own (a no-op where the dtypes are equal), or with a PEFT adapter on
    the head base + scaling B A, [V, H] and differentiable in both. Softcap and scale are those
    with which the model's own forward agrees; the first call tries it on a few hidden states.

    Args:
        model: a causal LM, a wrapper of one (PEFT, vision-language), with its head on one device.
        dtype: of the hidden states, which are the last ones of `model.base_model`.

    Raises:
        ValueError: the model's logits are not those of a matrix, bias, softcap and scale that
            this function knows of, or train parameters that it does not; or dropout is on inside
            the head.
    """
    head = model.get_output_embeddings()
    _refuse_dropout(head)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    forms = _known.setdefault(causal, {})
    state = _state(head)
    if state not in forms:
        with torch.inference_mode(False), torch.enable_grad():
            forms[state] = _found(model, causal, head, dtype)
    return forms[state].head(*_matrix(head, dtype))


def _matrix(head: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head module, PEFT's adapters included."""
    base = getattr(head, "base_layer", head)
    weight, bias = getattr(base, "weight", None), getattr(base, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"the head must have a floating-point weight; got {type(head).__name__}")
    weight = weight.to(dtype)
    for adapter in _adapters(head):
        weight = weight + head.get_delta_weight(adapter).to(dtype)
    return weight, None if bias is None else bias.to(dtype)


def _adapters(head: Any) -> tuple[str, ...]:
    """Names of PEFT's adapters that a head module adds to its base layer."""
    if not hasattr(head, "get_delta_weight") or head.disable_adapters or head.merged:
        return ()
    present = [getattr(head, name) for name in head.adapter_layer_names]
    return tuple(a for a in head.active_adapters if any(a in each for each in present))


def _state(head: Any) -> tuple[Any, ...]:
    """What changes a head's form: the module, and which adapters are on."""
    return id(head), _adapters(head), bool(getattr(head, "disable_adapters", False))


def _refuse_dropout(head: Any) -> None:
    for name, part in head.named_modules():
        if isinstance(part, torch.nn.Dropout) and part.training and part.p > 0:
            raise ValueError(
                f"the head must not drop out in training, which the losses would not see; got "
                f"{name} with p = {part.p}: set lora_dropout=0 for it"
            )


def _found(model: Any, causal: Any, head: Any, dtype: torch.dtype) -> Form:
    """The form in which this head gives the model's logits."""
    names = {id(x): name for name, x in head.named_parameters()}
    weight, bias = _matrix(head, dtype)
    inputs = _trial(weight, bias)
    logits = _asked(model, causal, head, inputs.hidden)
    if hasattr(weight, "full_tensor") and hasattr(model, "reshard"):
        model.reshard()  # FSDP2 leaves its root as a forward needs it
    for form in _candidates(causal):
        mine = _logits(inputs, form)
        if _same(logits, mine, inputs):
            break
    else:
        raise ValueError(_differ(causal, head, logits, inputs))
    missing = _leaves(logits) - _leaves(weight, bias)
    unseen = [name for x, name in names.items() if x in missing]
    if unseen:
        raise ValueError(
            f"{type(causal).__name__} trains {', '.join(unseen)} of its head, "
            f"{type(head).__name__}, of which the head's weight [V, H] does not depend: the "
            "losses would give them no gradient"
        )
    return form


def _candidates(causal: Any) -> Iterator[Form]:
    """Forms that a model's config may mean, the likeliest first; at last none of it."""
    configs = causal.config.get_text_config(), causal.config

    def named(*names: str) -> list[float]:
        values = (getattr(config, name, None) for config in configs for name in names)
        return [float(x) for x in values if isinstance(x, (int, float)) and x]

    softcaps = [*named(*SOFTCAPS), None]
    divisors = named(DIVISOR)
    scales = [*named(*SCALES), *(1 / x for x in divisors), *divisors, 1.0]
    for softcap, scale in dict.fromkeys(itertools.product(softcaps, scales)):
        if scale > 0:
            yield Form(softcap, scale)


@torch.no_grad()
def _trial(weight: Tensor, bias: Tensor | None) -> HeadInputs:
    """Random hidden states whose largest logit, before bias and cap, is as wanted."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(LARGEST), weight.shape[1], generator=generator)
    hidden = drawn.to(weight.device, weight.dtype)
    inputs, _, _ = take_head(hidden, Head(weight, bias), 1.0, "torch")
    largest = (inputs.hidden @ inputs.weight.t()).abs().amax(-1, keepdim=True).float()
    wanted = torch.tensor(LARGEST, device=weight.device)[:, None]
    factor = torch.where(largest > 0, wanted / largest, 1.0)
    return inputs._replace(hidden=(inputs.hidden * factor).to(inputs.hidden.dtype))


@torch.no_grad()
def _logits(inputs: HeadInputs, form: Form) -> Tensor:
    """float32 logits of the hidden states as the losses make them."""
    softcap = form.head(inputs.weight, inputs.bias).softcap or 0.0
    capped = inputs._replace(rule=inputs.rule._replace(softcap=softcap))
    made = new_buffer(capped, len(inputs.hidden))
    return logits_of(capped, inputs.hidden, made).float() * form.scale


class _Decoded(tuple[Tensor]):
    """What a decoder returns of which the last hidden states alone are there."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def _asked(model: Any, causal: Any, head: Any, hidden: Tensor) -> Tensor:
    """Logits [rows, V] that the model's own forward makes of hidden states [rows, H]."""
    weight = getattr(head, "base_layer", head).weight
    decoded = _Decoded((hidden.to(weight.dtype)[None],))
    ids = torch.zeros(1, len(hidden), dtype=torch.int64)
    ids = ids.to(causal.get_input_embeddings().weight.device)
    try:
        with _standing_in(causal, decoded) as reached, torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids).logits
    except Exception as error:  # what a model may raise is not known
        raise ValueError(f"{type(causal).__name__} does not tell its logits: {error}") from error
    if not reached:
        raise ValueError(f"{type(causal).__name__} does not get hidden states from its base_model")
    found: Tensor = logits[0]
    return found


@contextlib.contextmanager
def _standing_in(causal: Any, decoded: _Decoded) -> Iterator[list[bool]]:
    """Have the model's decoder return this; what is yielded is not empty once it was called."""
    reached: list[bool] = []

    def forward(*_: Any, **__: Any) -> _Decoded:
        reached.append(True)
        return decoded

    decoders = [x for x in (causal.base_model, causal.get_decoder()) if x is not causal]
    before = [(x, vars(x).get("forward")) for x in dict.fromkeys(decoders)]
    for decoder, _ in before:
        decoder.forward = forward
    try:
        yield reached
    finally:
        for decoder, own in before:
            del decoder.forward
            if own is not None:
                decoder.forward = own


def _same(logits: Tensor, mine: Tensor, inputs: HeadInputs) -> bool:
    """Whether a model's logits are a head's but for rounding."""
    if logits.shape != mine.shape:
        return False
    unit = max(COARSEST, *(torch.finfo(x.dtype).eps for x in (logits, inputs.weight)))
    allowed = ROUNDINGS * unit * mine.abs().amax(-1, keepdim=True)
    return bool(((logits.detach().float() - mine).abs() <= allowed).all())


def _differ(causal: Any, head: Any, logits: Tensor, inputs: HeadInputs) -> str:
    """What a model's logits are beside those of the likeliest form."""
    form = next(_candidates(causal))
    mine = _logits(inputs, form)
    of = f"{type(causal).__name__} does not make the logits of its head, {type(head).__name__} "
    of += f"{list(inputs.weight.shape)} with softcap {form.softcap} and scale {form.scale:g}: "
    if logits.shape != mine.shape:
        return of + f"it makes {logits.shape[-1]} for a position, the head {mine.shape[-1]}"
    logits = logits.detach().float()
    row, word = divmod(int((logits - mine).abs().argmax()), mine.shape[1])
    theirs, ours = float(logits[row, word]), float(mine[row, word])
    return of + f"for word {word} it has {theirs:.5g}, and the head {ours:.5g}"


def _leaves(*results: Tensor | None) -> set[int]:
    """Ids of the parameters to which a backward through these would give a gradient."""
    nodes: list[Any] = [x.grad_fn for x in results if x is not None and x.grad_fn is not None]
    seen, leaves = set(nodes), [x for x in results if x is not None and x.is_leaf]
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        nodes += new
    return {id(leaf) for leaf in leaves}
