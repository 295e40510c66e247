"""`drift-gate bench --recorded FILE`: what the losses cost in the trainer that FILE is from.

The calls that `drift_gate.record_calls` wrote are made again, with drawn data of the same shapes,
dtypes, options and share of valid rows, forward and backward, beside the loss that a trainer would
write eagerly: log-probs of all words in float32, then what the function makes of them with a gate
of blocks. Options that cost no read of the logits (estimators, clips, spans, reductions) are those
of the call in ours and plain in theirs; process groups are left out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import drift_gate
from drift_gate import eager

from .harness import forget, reason_of
from .measure import peak_bytes, quartiles, seconds
from .peers import plain

LINEAR, SPAN, BLOCK = "linear_", 32, 64
OPTIONS = {kind.__name__: kind for kind in (drift_gate.Clip, drift_gate.Reduction)}
Loss = Callable[[], Tensor]


class Calls(NamedTuple):
    """Calls of one function, alike in shapes, dtypes and options."""

    function: str
    tensors: dict[str, dict[str, Any]]  # name -> shape, dtype, grad
    options: dict[str, Any]
    rows: int
    count: int
    valid: float  # mean share of the rows


class Recording(NamedTuple):
    """A file."""

    machine: dict[str, Any]
    groups: list[Calls]
    seconds: float  # from the first call to the last


class Cost(NamedTuple):
    """Of one call, forward and backward."""

    seconds: float
    extra_bytes: int  # peak beyond the inputs, gradients included


def read(path: Path) -> Recording:
    """Calls of a file, grouped: the group that holds most logits first.

    Raises:
        ValueError: the file is no recording, or holds no call.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    except json.JSONDecodeError:
        lines = []
    if not lines or not isinstance(lines[0], dict) or lines[0].get("schema") != 1:
        raise ValueError(f"{path} is no recording of drift_gate.record_calls")
    head, *calls = lines
    groups: dict[str, list[dict[str, Any]]] = {}
    for call in calls:
        key = json.dumps([call[name] for name in ("function", "tensors", "options")])
        groups.setdefault(key, []).append(call)
    found = []
    for alike in groups.values():
        first = {name: alike[0][name] for name in ("function", "tensors", "options", "rows")}
        valid = sum(call["valid"] for call in alike) / len(alike)
        found.append(Calls(**first, count=len(alike), valid=valid))
    if not found:
        raise ValueError(f"{path} holds no call")
    found.sort(key=lambda group: -group.rows * _vocab(group) * group.count)
    return Recording(head, found, calls[-1]["at"] - calls[0]["at"])


def _head(calls: Calls, name: str = "head") -> dict[str, Any]:
    """Weight, bias and the rest of a head, given as a `Head` or as its weight."""
    if name in calls.tensors:
        return {"weight": calls.tensors[name]}
    return {key: x for key, x in calls.options[name].items() if key != "type"}


def _vocab(calls: Calls) -> int:
    if calls.function.startswith(LINEAR):
        return int(_head(calls)["weight"]["shape"][0])
    return int(calls.tensors["logits"]["shape"][-1])


def size(calls: Calls) -> str:
    """In words."""
    linear = calls.function.startswith(LINEAR)
    states = calls.tensors["hidden_states" if linear else "logits"]
    shape = [*states["shape"][:-1], _vocab(calls)]
    text = " x ".join(f"{n:,}" for n in shape) + f" {states['dtype']}"
    text += f", H {states['shape'][-1]:,}" if linear else ""
    ids = calls.tensors.get("teacher_topk_ids")
    return text + (f", K {ids['shape'][-1]}" if ids else "")


def draw(calls: Calls, device: torch.device) -> dict[str, Any]:
    """Arguments of the function, by name."""
    torch.manual_seed(0)
    vocab = _vocab(calls)
    parameters = inspect.signature(getattr(drift_gate, calls.function)).parameters.values()
    given: dict[str, Any] = {p.name: None for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    given |= {name: _drawn(name, one, vocab, device) for name, one in calls.tensors.items()}
    for name, value in calls.options.items():
        if name in ("head", "teacher_head"):
            fields = _head(calls, name)
            drawn = {key: x for key, x in fields.items() if not isinstance(x, dict)}
            for key in fields.keys() - drawn.keys():
                drawn[key] = _drawn(key, fields[key], vocab, device)
            given[name] = drift_gate.Head(**drawn)
        elif name != "parallel":
            given[name] = _option(value)
    _mask(calls, given, device)
    return given


def _drawn(name: str, one: dict[str, Any], vocab: int, device: torch.device) -> Tensor:
    """A tensor that the argument of this name may be."""
    shape, dtype = one["shape"], getattr(torch, one["dtype"])
    new = dict(device=device)
    if name == "labels":
        return torch.randint(vocab, shape, **new).to(dtype)
    if name == "teacher_topk_ids":  # different ones in a row
        k = shape[-1]
        steps = torch.arange(k, **new) * (vocab // k)
        return ((torch.randint(vocab, (*shape[:-1], 1), **new) + steps) % vocab).to(dtype)
    if name == "cu_seqlens":
        return torch.zeros(shape, **new).to(dtype)  # its borders need the rows: see _mask
    if name in ("response_mask", "row_weights", "gate"):
        return torch.ones(shape, **new).to(dtype)
    if name == "span_ids":
        return (torch.arange(shape[-1], **new) // SPAN).expand(shape).to(dtype)
    if name == "position_ids":
        return torch.arange(shape[-1], **new).expand(shape).to(dtype)
    noise = torch.randn(shape, **new)
    if name == "teacher_topk_log_probs":
        noise = noise.log_softmax(-1) - 0.1
    elif name.endswith("log_probs"):
        noise = -noise.abs()
    elif name == "weight" or name.endswith("head"):
        noise /= shape[-1] ** 0.5
    return noise.to(dtype).requires_grad_(one["grad"])


def _option(value: Any) -> Any:
    """From JSON to what the call was given; a normaliser is its gate."""
    if not isinstance(value, dict):
        return tuple(value) if isinstance(value, list) else value
    kind = value.get("type")
    if kind == "DriftGate":
        return drift_gate.DriftGate(**{name: x for name, x in value.items() if name != "type"})
    if kind in OPTIONS:
        fields = {name: _option(x) for name, x in value.items() if name != "type"}
        # A tensor of one element is a number of tokens or sequences; any will do.
        return OPTIONS[kind](**{k: 1.0 if isinstance(x, dict) else x for k, x in fields.items()})
    if "gate" in value:
        return _option(value["gate"])
    return value


def _mask(calls: Calls, given: dict[str, Any], device: torch.device) -> None:
    """Make as many rows valid as were; and borders of sequences of one length."""
    drop = torch.rand(calls.rows, device=device) >= calls.valid
    mask = given.get("response_mask")
    if mask is not None:
        mask.masked_fill_(drop.view(mask.shape), 0)
    elif (
        given.get("labels") is not None and (ignored := given.get("ignore_index", -100)) is not None
    ):
        labels = given["labels"]
        labels.masked_fill_(drop.view(labels.shape), ignored)
    if "cu_seqlens" in given:
        borders = given["cu_seqlens"]
        even = torch.linspace(0, calls.rows, len(borders), device=device)
        given["cu_seqlens"] = even.round().to(borders.dtype)
    given.pop("position_ids", None)  # of sequences cut over ranks


def leaves_of(given: dict[str, Any]) -> list[Tensor]:
    """What gradients are asked for."""
    head = given.get("head")
    tensors = [given.get(name) for name in ("logits", "hidden_states")]
    tensors += [head.weight, head.bias] if isinstance(head, drift_gate.Head) else [head]
    return [x for x in tensors if x is not None and x.requires_grad]


def ours(calls: Calls, given: dict[str, Any]) -> Loss:
    """The call itself; per-token losses are summed."""
    function = getattr(drift_gate, calls.function)
    return lambda: function(**given).loss.sum()


def eagerly(calls: Calls, given: dict[str, Any]) -> Loss:
    """The same as a trainer would write it."""
    labels, mask = _eager_rows(calls, given)
    states = given["logits"] if "logits" in given else given["hidden_states"]
    length = states.shape[-2]
    blocks = eager.block_numbers([length] * (calls.rows // length), BLOCK).to(states.device)
    zeros = torch.zeros_like(mask)
    old = given.get("old_log_probs")
    old = zeros if old is None else old.flatten().float()

    def loss() -> Tensor:
        log_p = plain.log_probs(_logits(given))
        now = plain.at(log_p, labels)
        if calls.function.endswith("opd_loss"):
            target = given.get("teacher_log_probs")
            teacher = old if target is None else target.flatten().float()
            return eager.row_loss(now, old, teacher, mask, blocks).sum() / mask.sum()
        weights = eager.drift_weights((old - now.detach()) * mask, mask, blocks)
        return (weights * _divergence(calls, given, log_p)).sum() / mask.sum()

    return loss


def _eager_rows(calls: Calls, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Labels [N], none of them outside the vocabulary, and the mask [N] as a number."""
    device = (given["logits"] if "logits" in given else given["hidden_states"]).device
    labels = given.get("labels")
    mask = given.get("response_mask")
    flat = torch.ones(calls.rows, device=device) if mask is None else mask.flatten().float()
    if labels is None:
        return torch.zeros(calls.rows, dtype=torch.int64, device=device), flat
    labels = labels.flatten().long()
    valid = (labels >= 0) & (labels < _vocab(calls))
    return labels.where(valid, 0), flat * valid


def _logits(given: dict[str, Any], states: str = "hidden_states", head: str = "head") -> Tensor:
    """[N, V]; with the bias of the head, less its cap."""
    if "logits" in given and states == "hidden_states":
        return given["logits"].flatten(0, -2)
    own = given[head]
    weight, bias = (own, None) if isinstance(own, Tensor) else (own.weight, own.bias)
    return functional.linear(given[states].flatten(0, -2), weight, bias)


def _divergence(calls: Calls, given: dict[str, Any], log_p: Tensor) -> Tensor:
    """From the teacher's list or from all of its words, [N]."""
    direction = given.get("direction", "reverse")
    if calls.function.endswith("topk_loss"):
        ids = given["teacher_topk_ids"].flatten(0, -2).long().clamp(min=0)
        log_q = given["teacher_topk_log_probs"].flatten(0, -2)
        listed = log_p.gather(-1, ids)
        if given.get("support", "renormalized") == "renormalized":
            return plain.lsm(listed, log_q)
        return plain.truncated_forward(listed, log_q)
    with torch.no_grad():
        if "teacher_logits" in given:
            teacher = given["teacher_logits"].flatten(0, -2)
        else:
            teacher = _logits(given, "teacher_hidden_states", "teacher_head")
        log_q = plain.log_probs(teacher)
    shared = min(log_p.shape[-1], log_q.shape[-1])
    return plain.whole(log_p[:, :shared], log_q[:, :shared], direction, given.get("beta", 0.5))


def cost(loss: Loss, leaves: list[Tensor], device: torch.device, rounds: int) -> Cost:
    """Median of rounds after a warm one, and the peak of that.

    A backward in place leaves its gradient in the logits: what they hold does not change the time.
    """

    def run() -> object:
        if not leaves:
            with torch.no_grad():
                return loss()
        return torch.autograd.grad(loss(), leaves, allow_unused=True)

    run()
    with peak_bytes(device) as memory:
        kept = run()
    del kept
    forget(device)
    return Cost(quartiles([seconds(run, device) for _ in range(rounds)])[1], memory.peak)


def measure(calls: Calls, device: torch.device, rounds: int) -> tuple[Cost | str, Cost | str]:
    """Ours and the eager loss: what a call costs, or why it could not be made."""
    found: list[Cost | str] = []
    for make in (ours, eagerly):
        try:
            given = draw(calls, device)
            found.append(cost(make(calls, given), leaves_of(given), device, rounds))
        except Exception as error:  # what a recording of elsewhere asks for may not run here
            found.append(reason_of(error))
        forget(device)
    return found[0], found[1]


def total(recording: Recording, costs: list[tuple[Cost | str, Cost | str]]) -> tuple[float, float]:
    """Seconds that all calls take, and that eager ones would; of the groups where both ran."""
    sums = [0.0, 0.0]
    for calls, pair in zip(recording.groups, costs, strict=True):
        if all(isinstance(one, Cost) for one in pair):
            for i, one in enumerate(pair):
                sums[i] += calls.count * one.seconds
    return sums[0], sums[1]


def summary(recording: Recording, costs: list[tuple[Cost | str, Cost | str]], device: str) -> str:
    """What the losses cost in that trainer, in a sentence."""
    mine, theirs = total(recording, costs)
    text = (
        f"the recorded calls take {mine:.3g} s in all, and would take {theirs:.3g} s if written "
        "eagerly"
    )
    if recording.seconds > 0 and recording.machine["device"] == device:
        return text + (
            f"; from the first to the last passed {recording.seconds:.4g} s, of which the losses "
            f"are {mine / recording.seconds:.1%}"
        )
    return text + f"; they were recorded on {recording.machine['device']}"
