"""Situations that users run into: steps without tokens, tensors of inference mode, logits that
overlap themselves, DTensors, NumPy's numbers, groups that a function does not take."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.calls import (
    FUNCTIONS,
    LOSSES,
    WITHOUT_GRADIENT,
    arguments_of,
    leaves_of,
    step_of,
    tensors_of,
)
from support.judge import EACH_BACKEND, EACH_FUSED
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

import drift_gate as dg
from drift_gate.choices import ESTIMATORS, REDUCTIONS

EACH_LOSS = pytest.mark.parametrize("name", LOSSES)
EACH_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)
DENSE = tuple(name for name in LOSSES if not name.startswith("linear_"))
SHAPE = (2, 9)
COUNTED = {
    "batch_num_tokens": ["token-mean"],
    "global_batch_size": [mode for mode in REDUCTIONS if mode.startswith("seq-")],
}
NOTHING = [
    (field, mode, zero)
    for field, modes in COUNTED.items()
    for mode, zero in itertools.product(modes, (0, 0.0, torch.tensor(0), torch.tensor([0.0])))
]


def results_of(name: str, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss and its gradients, the tensors' leaves new ones."""
    tensors = [*tensors]
    leaves = leaves_of(name, [x.detach().clone() for x in tensors])
    tensors[: len(leaves)] = leaves
    value = step_of(name, **options)(*tensors)
    return [value, *torch.autograd.grad(value, leaves)]


# A step without a trained token.


@EACH_LOSS
@EACH_BACKEND
@pytest.mark.parametrize(("field", "mode", "zero"), NOTHING, ids=str)
def test_a_step_without_tokens_has_loss_0_and_no_gradient(name, backend, field, mode, zero):
    reduction = dg.Reduction(mode, **{field: zero})
    mask = torch.zeros(SHAPE)
    options = {"reduction": reduction, "response_mask": mask, "backend": backend}
    for result in results_of(name, tensors_of(name, *SHAPE), **options):
        assert (result == 0).all()


@EACH_LOSS
@EACH_FUSED
@pytest.mark.parametrize("mode", REDUCTIONS)
def test_a_micro_batch_and_a_step_without_tokens(name, backend, mode):
    normalizer, tensors = dg.GateNormalizer(), tensors_of(name, *SHAPE)
    leaves = leaves_of(name, tensors)
    mask = torch.zeros(SHAPE)
    options = {"reduction": mode, "response_mask": mask, "backend": backend, "gate": normalizer}
    for _ in range(2):
        step_of(name, **options)(*tensors).backward()
    assert normalizer.scale_gradients(leaves) == 0
    assert all((x.grad == 0).all() for x in leaves)


# A teacher whose engine cut its list at the sampled word.


@EACH_BACKEND
@pytest.mark.parametrize("name", ["opd_loss", "linear_opd_loss"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_teacher_s_least_log_prob(name, estimator, backend):
    tensors = tensors_of(name, *SHAPE)
    tensors[-1][0, :4] = -torch.inf
    options = {"estimator": estimator, "backend": backend, "gate": None}
    held = {**options, "teacher_log_prob_min": -7.0}
    got = results_of(name, tensors, **held)
    assert all(x.isfinite().all() for x in got)
    least = [*tensors[:-1], tensors[-1].clamp(min=-7.0)]
    assert all(map(torch.equal, got, results_of(name, least, **options)))
    arguments = list(arguments_of(name, *SHAPE))
    arguments[-1][0, :4] = -torch.inf
    mask = torch.arange(18).view(SHAPE) % 2
    output = getattr(dg, name)(*arguments, response_mask=mask, **held)
    assert output.metrics["floored"] == ((arguments[-1] < -7) & (mask > 0)).sum() >= 2


# Tensors made under torch.inference_mode, as rollouts and teachers are.


@EACH_FUNCTION
@EACH_BACKEND
def test_tensors_of_inference_mode(name, backend):
    options = {} if name == "gate_weights" else {"backend": backend}
    if name in LOSSES:
        options["response_mask"] = torch.arange(18).view(SHAPE) % 5 > 0
        options["row_weights"] = torch.linspace(0, 1, 18).view(SHAPE)
    tensors = tensors_of(name, *SHAPE)
    count = len(leaves_of(name, [*tensors]))
    plain = [x.detach() for x in tensors]
    made = {k: inferred(x) for k, x in options.items()}
    others = [*plain[:count], *(inferred(x) for x in plain[count:])]
    if name in WITHOUT_GRADIENT:
        assert torch.equal(step_of(name, **made)(*others), step_of(name, **options)(*plain))
        return
    for got, expected in zip(
        results_of(name, others, **made), results_of(name, plain, **options), strict=True
    ):
        assert torch.equal(got, expected)


def inferred(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    with torch.inference_mode():
        return x.clone()


# Logits that overlap themselves in memory.

WRITERS = (*DENSE, "token_log_probs")


def overlapping(kind: str) -> Tensor:
    """[2, 9, 21]."""
    base = torch.randn(400)
    if kind == "expanded":
        return base[:189].view(1, 9, 21).expand(2, 9, 21)
    return base.as_strided((2, 9, 21), (189, 7, 1))  # windows


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["expanded", "windows"])
def test_a_gradient_is_not_written_over_logits_that_overlap(name, kind):
    _, *rest = tensors_of(name, *SHAPE)
    logits = overlapping(kind)
    refused = r"inplace_backward needs logits that do not overlap .* got strides \[\d+, \d+, 1\]"
    with pytest.raises(ValueError, match=refused):
        step_of(name, inplace_backward=True)(logits, *rest)
    got = results_of_view(name, logits, rest)
    assert torch.equal(got, results_of_view(name, logits.contiguous(), rest))


def results_of_view(name: str, logits: Tensor, rest: list[Tensor]) -> Tensor:
    leaf = logits.detach().requires_grad_()
    (grad,) = torch.autograd.grad(step_of(name)(leaf, *rest), leaf)
    return grad


# DTensors where whole rows are needed.


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of one rank."""
    file = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("argument", ["logits", "teacher_logits"])
def test_full_loss_names_a_dtensor(mesh, argument):
    logits, labels, old, teacher = arguments_of("full_loss", *SHAPE)
    if argument == "logits":
        logits = distribute_tensor(logits, mesh, [Replicate()])
    else:
        teacher = distribute_tensor(teacher, mesh, [Replicate()])
    with pytest.raises(TypeError, match=rf"^{argument} must be a torch.Tensor .* got a DTensor"):
        dg.full_loss(logits, labels, old, teacher)


# Groups that a function would ignore.

TAKEN = dict.fromkeys(LOSSES, ("group", "context_parallel_group", "vocab_parallel_group"))
TAKEN |= dict.fromkeys(("full_loss", "linear_full_loss"), ("group", "context_parallel_group"))
TAKEN |= {"gate_weights": ("group", "context_parallel_group")}
FIELDS = [field.name for field in dataclasses.fields(dg.Parallel)]
IGNORED = [
    (name, field)
    for name in FUNCTIONS
    for field in FIELDS
    if field not in TAKEN.get(name, ("vocab_parallel_group",))
]


@pytest.mark.parametrize(("name", "field"), IGNORED)
def test_a_group_that_a_function_does_not_take_is_refused(mesh, name, field):
    parallel = dg.Parallel(**{field: mesh.get_group()})
    with pytest.raises(ValueError, match=rf"^{name} takes .* got parallel\.{field}"):
        step_of(name, parallel=parallel)(*tensors_of(name, *SHAPE))


@pytest.mark.parametrize("field", FIELDS[1:])
def test_weights_of_a_normaliser_refuse_other_groups(mesh, field):
    now, old = arguments_of("gate_weights", *SHAPE)
    rows = {"log_probs": now, "old_log_probs": old}
    parallel = dg.Parallel(**{field: mesh.get_group()})
    with pytest.raises(ValueError, match=rf"takes parallel.group alone; got parallel\.{field}"):
        dg.GateNormalizer().weights([rows], parallel=parallel)


# NumPy's scalars are numbers.


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.int64, np.float16])
@pytest.mark.parametrize("name", ["opd_loss", "linear_topk_loss"])
def test_numpy_scalars_are_numbers(name, kind):
    two = kind(2)
    size = two if isinstance(two, np.integer) else np.int64(2)

    def options(number: Any, whole: Any) -> dict[str, Any]:
        return {
            "gate": dg.DriftGate(block_size=whole, tau=number),
            "temperature": number,
            "reduction": dg.Reduction("token-mean", batch_num_tokens=number, dp_size=whole),
        }

    tensors = tensors_of(name, *SHAPE)
    got = results_of(name, tensors, **options(two, size))
    expected = results_of(name, tensors, **options(2, 2))
    assert all(map(torch.equal, got, expected))
    sequences = dg.Reduction(
        "seq-mean-token-sum-norm", global_batch_size=two, loss_scale_factor=two
    )
    got = results_of(name, tensors, reduction=sequences)
    plain = dg.Reduction("seq-mean-token-sum-norm", global_batch_size=2, loss_scale_factor=2)
    assert all(map(torch.equal, got, results_of(name, tensors, reduction=plain)))


def test_other_numbers_of_numpy():
    logits, labels, old, teacher = arguments_of("opd_loss", *SHAPE)
    clip = dg.Clip(np.float32(0.25), np.float64(0.5), np.int64(3), np.float32(2))
    got = dg.opd_loss(logits, labels, old, teacher, clip=clip, ignore_index=np.int64(3))
    clip = dg.Clip(0.25, 0.5, 3, 2.0)
    assert torch.equal(
        got.loss, dg.opd_loss(logits, labels, old, teacher, clip=clip, ignore_index=3).loss
    )
    hidden, head, *rest = arguments_of("linear_opd_loss", *SHAPE)
    got, expected = (
        dg.linear_opd_loss(
            hidden,
            dataclasses.replace(head, chunk_size=n, softcap=cap, logit_scale=scale),
            *rest,
        )
        for n, cap, scale in ((np.int32(4), np.float32(3), np.float64(0.5)), (4, 3.0, 0.5))
    )
    assert torch.equal(got.loss, expected.loss)
    options = {"vocab_size": np.int64(21), "beta": np.float32(0.25), "direction": "jsd"}
    plain = {"vocab_size": 21, "beta": 0.25, "direction": "jsd"}
    tensors = tensors_of("full_loss", *SHAPE)
    assert torch.equal(
        step_of("full_loss", **options)(*tensors), step_of("full_loss", **plain)(*tensors)
    )


@pytest.mark.parametrize("value", [np.bool_(True), True, np.float32("nan"), "2", [2]])
def test_what_is_no_number_is_named(value):
    with pytest.raises((TypeError, ValueError), match=r"^temperature must be"):
        dg.opd_loss(*arguments_of("opd_loss", *SHAPE), temperature=value)
    with pytest.raises((TypeError, ValueError), match=r"^block_size must be"):
        dg.DriftGate(block_size=value)


# Ranks of tensors, and dtypes of a bias.


@EACH_BACKEND
@pytest.mark.parametrize("shape", [(5,), (2, 1, 3, 2)], ids=str)
def test_log_probs_of_1_and_4_leading_dimensions(backend, shape):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, 21, generator=generator)
    labels = torch.randint(21, shape, generator=generator)
    ids = torch.randint(21, (*shape, 3), generator=generator)
    results = []
    for dims in (shape, (labels.numel(),)):
        leaf = logits.view(*dims, 21).clone().requires_grad_()
        log_probs, entropy = dg.token_log_probs(
            leaf, labels.view(dims), return_entropy=True, backend=backend
        )
        z, lse = dg.gather_lse(leaf, ids.view(*dims, 3), backend=backend)
        assert log_probs.shape == entropy.shape == lse.shape == dims and z.shape == (*dims, 3)
        of_rows = (log_probs * torch.arange(log_probs.numel()).view(dims)).sum()
        (grad,) = torch.autograd.grad(of_rows + z.square().sum() + lse.sum(), leaf)
        results.append([x.reshape(-1) for x in (log_probs, entropy, z, lse, grad)])
    assert all(map(torch.equal, *results))
    truth = logits.double().log_softmax(-1).gather(-1, labels[..., None])
    torch.testing.assert_close(results[0][0].double(), truth.flatten(), rtol=1e-5, atol=1e-5)


@EACH_BACKEND
@pytest.mark.parametrize(
    "name", [x for x in FUNCTIONS if x.startswith("linear_") and x not in WITHOUT_GRADIENT]
)
def test_a_float32_bias_beside_a_bfloat16_head(name, backend):
    """Its gradient is float32; the logits are rounded once, after it is added."""
    tensors = tensors_of(name, *SHAPE)
    shorts = [x.bfloat16() if i in (0, 1) else x for i, x in enumerate(tensors)]
    if name == "linear_full_loss":
        shorts[5:] = [x.bfloat16() for x in tensors[5:]]
    value, *grads = results_of(name, shorts, backend=backend)
    assert [x.dtype for x in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]
    wide = [x.double() if x.is_floating_point() else x for x in shorts]
    truth, *exact = results_of(name, wide, backend="reference")
    torch.testing.assert_close(value.double(), truth, rtol=0.02, atol=0.02)
    for grad, expected in zip(grads, exact, strict=True):
        scale = expected.abs().max()
        assert (grad.double() - expected).abs().max() < 0.05 * scale
