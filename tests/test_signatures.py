"""The public signatures: objects of options, and what version 0.1 took under other names."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from support.calls import arguments_of as drawn

import drift_gate as dg

CLIPS = {
    "clip_ratio_low": "clip=Clip(low=...)",
    "clip_ratio_high": "clip=Clip(high=...)",
    "clip_ratio_c": "clip=Clip(dual=...)",
    "advantage_clip": "clip=Clip(advantage=...)",
}
SIZES = {
    "loss_agg_mode": "reduction=Reduction(mode=...)",
    "batch_num_tokens": "reduction=Reduction(batch_num_tokens=...)",
    "dp_size": "reduction=Reduction(dp_size=...)",
    "global_batch_size": "reduction=Reduction(global_batch_size=...)",
    "loss_scale_factor": "reduction=Reduction(loss_scale_factor=...)",
}
RANKS = {
    "group": "parallel=Parallel(group=...)",
    "context_parallel_group": "parallel=Parallel(context_parallel_group=...)",
}
SHARDS = {"vocab_parallel_group": "parallel=Parallel(vocab_parallel_group=...)"}
HEAD = {
    "weight": "head=Head(weight)",
    "bias": "head=Head(weight, bias=...)",
    "softcap": "head=Head(weight, softcap=...)",
    "logit_scale": "head=Head(weight, logit_scale=...)",
    "chunk_size": "head=Head(weight, chunk_size=...)",
}
THEIR_HEAD = {
    "teacher_weight": "teacher_head=Head(weight)",
    "teacher_bias": "teacher_head=Head(weight, bias=...)",
    "teacher_softcap": "teacher_head=Head(weight, softcap=...)",
    "teacher_logit_scale": "teacher_head=Head(weight, logit_scale=...)",
}
OLD_NAMES = {  # of 0.1, by function
    "opd_loss": CLIPS | SIZES | RANKS | SHARDS,
    "topk_loss": SIZES | RANKS | SHARDS,
    "full_loss": SIZES | RANKS,
    "linear_opd_loss": HEAD | CLIPS | SIZES | RANKS | SHARDS,
    "linear_topk_loss": HEAD | SIZES | RANKS | SHARDS,
    "linear_full_loss": HEAD | THEIR_HEAD | SIZES | RANKS,
    "gate_weights": RANKS,
    "token_log_probs": SHARDS,
    "gather_lse": SHARDS,
    "linear_token_log_probs": HEAD | SHARDS,
    "linear_gather_lse": HEAD | SHARDS,
}
PAIRS = [(function, name) for function, names in OLD_NAMES.items() for name in names]
LOSSES = [name for name in OLD_NAMES if name.endswith("_loss")]
LINEAR = [name for name in OLD_NAMES if name.startswith("linear_")]


def arguments_of(name: str) -> tuple:
    return drawn(name, 2, 9)


def call(name: str, **options):
    return getattr(dg, name)(*arguments_of(name), **options)


@pytest.mark.parametrize(("function", "name"), PAIRS, ids=lambda x: x)
def test_an_old_name_says_the_new_one(function, name):
    with pytest.raises(TypeError) as error:
        call(function, **{name: None})
    said = str(error.value)
    assert said.startswith(f"{function}() got an unexpected keyword argument '{name}'")
    assert OLD_NAMES[function][name] in said and "0.2" in said


@pytest.mark.parametrize("function", OLD_NAMES)
def test_an_unknown_name_is_refused_as_python_does(function):
    said = rf"^{function}\(\) got an unexpected keyword argument 'mask'$"
    with pytest.raises(TypeError, match=said):
        call(function, mask=None)


def test_which_functions_know_old_names():
    """They alone take any keyword, to refuse it; none has kept a name."""
    for name in dg.__all__:
        parameters = inspect.signature(getattr(dg, name)).parameters
        kinds = {p.kind for p in parameters.values()}
        assert (inspect.Parameter.VAR_KEYWORD in kinds) == (name in OLD_NAMES), name
        assert not parameters.keys() & OLD_NAMES.get(name, {}).keys(), name


def test_weights_of_a_normaliser_take_groups_as_the_losses_do():
    rows = dict(zip(("log_probs", "old_log_probs"), arguments_of("gate_weights"), strict=True))
    normalizer = dg.GateNormalizer()
    (alone,) = normalizer.weights([rows], parallel=dg.Parallel())
    assert torch.equal(alone, normalizer.weights([rows])[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'group'"):
        normalizer.weights([rows], group=None)
    with pytest.raises(TypeError, match="parallel must be a Parallel or None; got int"):
        normalizer.weights([rows], parallel=3)


@pytest.mark.parametrize(
    "options", [dg.Clip(), dg.Reduction(), dg.Parallel(), dg.Head(torch.ones(1))]
)
def test_options_are_frozen(options):
    name = dataclasses.fields(options)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, name, 1)


def test_clips_are_equal_by_value():
    assert dg.Clip(high=0.28) == dg.Clip(high=0.28) != dg.Clip()
    assert dg.Clip() == dg.Clip(low=0.2, high=0.2, dual=3.0, advantage=None)


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "none"])
def test_a_mode_is_a_reduction(function, mode):
    by_name, by_object = (call(function, reduction=r).loss for r in (mode, dg.Reduction(mode)))
    assert torch.equal(by_name, by_object)
    if mode == "token-mean":
        assert torch.equal(by_name, call(function).loss)


@pytest.mark.parametrize("function", LINEAR)
def test_a_weight_is_a_head(function):
    hidden, head, *rest = arguments_of(function)
    weight = head.weight
    teacher = rest[-1]
    if function == "linear_full_loss":
        rest[-1] = dg.Head(teacher.weight)
    of_head = getattr(dg, function)(hidden, dg.Head(weight), *rest)
    if function == "linear_full_loss":
        rest[-1] = teacher.weight
    by_name = getattr(dg, function)(hidden, weight, *rest)
    for a, b in zip(tensors(of_head), tensors(by_name), strict=True):
        assert torch.equal(a, b)
    other = getattr(dg, function)(hidden, head, *rest)  # with bias and softcap
    assert not torch.equal(tensors(other)[0], tensors(of_head)[0])


def tensors(result) -> list[torch.Tensor]:
    if isinstance(result, dg.LossOutput):
        return [result.loss, result.token_loss, result.log_probs]
    return [x for x in result if x is not None]


@pytest.mark.parametrize("function", [name for name in OLD_NAMES if "parallel" in
                                      inspect.signature(getattr(dg, name)).parameters])  # fmt: skip
def test_an_empty_parallel_is_none(function):
    alone, none = (call(function, parallel=p) for p in (dg.Parallel(), None))
    if function == "gate_weights":
        assert torch.equal(alone.weights, none.weights)
        return
    assert all(map(torch.equal, tensors(alone), tensors(none)))


WRONG = {
    "reduction": (LOSSES, [None, 3, {"mode": "token-sum"}], "a Reduction or its mode as a string"),
    "clip": (["opd_loss", "linear_opd_loss"], [None, 0.2, (0.2, 0.28)], "a Clip"),
    "parallel": (list(OLD_NAMES), [3, "world"], "a Parallel or None"),
}


@pytest.mark.parametrize(
    ("name", "function", "value"),
    [(n, f, v) for n, (functions, values, _) in WRONG.items() for f in functions for v in values],
    ids=str,
)
def test_wrong_types_are_named(name, function, value):
    said = f"^{name} must be {WRONG[name][2]}; got {type(value).__name__}$"
    with pytest.raises(TypeError, match=said):
        call(function, **{name: value})


@pytest.mark.parametrize("function", LINEAR)
@pytest.mark.parametrize(
    "value", [None, 3, (torch.ones(21, 24), None)], ids=["None", "int", "tuple"]
)
def test_wrong_heads_are_named(function, value):
    hidden, _, *rest = arguments_of(function)
    said = r"^head must be a Head or its weight \[V, H\]; got " + type(value).__name__
    with pytest.raises(TypeError, match=said):
        getattr(dg, function)(hidden, value, *rest)
    if function == "linear_full_loss":
        *rest, _ = rest
        with pytest.raises(TypeError, match=said.replace("head", "teacher_head")):
            dg.linear_full_loss(hidden, torch.ones(21, 24), *rest, value)
