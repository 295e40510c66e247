"""Metric `drift_noise`: the mean |drift| that rounding of the logits alone would show."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.full import draw_full
from support.heads import FORMS, draw_head, run_head
from support.judge import EACH_FUSED, FUSED
from support.problems import draw, draw_topk
from torch import Tensor

import drift_gate as dg
from drift_gate.reference.noise import noise

KINDS = {
    "flat": (0.02, 12.0),  # standard deviation of the logits, and their mean
    "like a model's": (2.5, 8.0),
    "peaked": (8.0, 0.0),
    "negative": (3.0, -40.0),
}


def simulated(z: Tensor, labels: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """The mean |drift| of each row that two roundings show, of logits which have moved by more than
    lies between two of them: by up to 4 units, and what they moved by is known."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(24):
        sides = []
        for _ in range(2):
            unit = 2.0 ** torch.floor(torch.log2(z.abs())) * torch.finfo(dtype).eps
            moved = z + 4 * unit * torch.rand(z.shape, generator=generator, dtype=z.dtype)
            exact, short = (
                (x.double() * scale).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
                for x in (moved, moved.to(dtype))
            )
            sides.append(short - exact)
        found.append((sides[0] - sides[1]).abs())
    return torch.stack(found).mean(0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 0.7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["sampled", "likeliest", "third", "any"])
def test_beside_roundings_that_were_made(dtype, kind, which, scale):
    """The mean over 200 rows of 500 words, within a quarter: what the words beside the two that
    are known have is estimated."""
    size, offset = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    z = offset + size * torch.randn(200, 500, generator=generator, dtype=torch.float64)
    order = z.argsort(-1, descending=True)
    labels = {
        "sampled": (z * scale).softmax(-1).multinomial(1, generator=generator)[:, 0],
        "likeliest": order[:, 0],
        "third": order[:, 2],
        "any": torch.randint(500, (200,), generator=generator),
    }[which]
    expected = simulated(z, labels, dtype, scale).mean()
    every = torch.ones(200, dtype=torch.bool)
    found = noise(z * scale, (z * scale).log_softmax(-1), labels, every, dtype, scale).mean()
    assert 0.8 < found / expected < 1.25


def of(name: str, problem, backend: str, **options) -> float:
    function = getattr(dg, name)
    merged = {**problem.options, **options, "backend": backend}
    return float(function(*problem.arguments(), **merged).metrics["drift_noise"])


LOGITS = {
    "opd_loss": lambda dtype: draw(4, 60, 300, dtype=dtype),
    "topk_loss": lambda dtype: draw_topk(4, 60, 300, k=8, dtype=dtype, support="tail"),
    "full_loss": lambda dtype: draw_full(4, 60, 300, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"gate": dg.DriftGate(sample_every=3)}], ids=str
)
@pytest.mark.parametrize("name", LOGITS)
@EACH_FUSED
def test_every_loss_says_it(name, options, dtype, backend):
    problem = LOGITS[name](dtype)
    found, expected = (of(name, problem, x, **options) for x in (backend, "reference"))
    assert found == pytest.approx(expected, rel=1e-4) and found > 1e-4
    half = of(name, problem, backend, **{**options, "reduction": "token-sum"})
    assert half == found  # it is of the rows
    assert of(name, LOGITS[name](torch.float32), backend, **options) == 0
    assert of(name, problem, backend, **{**options, "gate": None}) > 1e-4


@EACH_FUSED
def test_a_label_that_is_ruled_out_has_no_rounding_of_its_own(backend):
    problem = draw_full(2, 30, 300, dtype=torch.float16)
    ruled_out = torch.where(problem.labels < 0, 0, problem.labels)[..., None]
    problem.logits = problem.logits.detach().scatter(-1, ruled_out, -torch.inf)
    found, expected = (of("full_loss", problem, x, gate=None) for x in (backend, "reference"))
    assert found == pytest.approx(expected, rel=1e-4) and found > 1e-4


@pytest.mark.parametrize("support", ["renormalized", "tail"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 6.0])
@EACH_FUSED
def test_through_a_head(form, support, softcap, backend):
    options = {"support": support} if form == "topk" else {}
    problem = draw_head(form, 4, 60, dtype=torch.bfloat16, softcap=softcap, **options)

    def value(which: str, **more) -> float:
        return float(run_head(problem, which, **more)[0].metrics["drift_noise"])

    found = value(backend, chunk_size=128)
    assert found == pytest.approx(value("reference"), rel=1e-2) and found > 1e-4
    assert value(backend, chunk_size=1000) == pytest.approx(found, rel=1e-4)
    problem.head = dataclasses.replace(problem.head, logits_dtype=torch.float32)
    assert value(backend) == value("reference") == 0


def test_where_nothing_is_known_of_the_logits_nothing_is_said():
    problem = draw_head("topk", 2, 70, dtype=torch.bfloat16)
    for backend in (*FUSED, "reference"):
        result, _ = run_head(problem, backend, log_probs=problem.rest[1])
        assert "drift_noise" not in result.metrics
    gated = dg.gate_weights(problem.rest[1], problem.rest[1])
    assert "drift_noise" not in gated.metrics


@EACH_FUSED
def test_without_old_log_probs_there_is_none(backend):
    problem = draw(2, 60, 300, dtype=torch.bfloat16)
    logits, labels, _, teacher = problem.arguments()
    result = dg.opd_loss(logits, labels, None, teacher, gate=None, backend=backend)
    assert result.metrics["drift_noise"] == 0


def test_a_policy_that_has_not_moved_shows_less_than_it_and_one_of_float32_nothing():
    """Of logits in bfloat16 beside those that were rounded: the drift is its own rounding."""
    problem = draw(8, 200, 500)
    labels = problem.labels
    old, _ = dg.token_log_probs(problem.logits, labels)
    short = problem.logits.bfloat16()
    result = dg.opd_loss(short, labels, old, problem.teacher_log_probs)
    shown, said = (float(result.metrics[x]) for x in ("drift_abs", "drift_noise"))
    # One of two roundings: even errors of mean size u / 4, of which the metric has u / 3.
    assert 0.6 < shown / said < 0.9


def test_the_report_says_whose_drift_is_rounding():
    """Of the last epoch; not of a policy that has not moved, nor of results without the number."""
    from drift_gate.bench.distill import report

    def row(name: str, **moved: list[float]) -> dict[str, object]:
        return dict(name=name, epochs=2, movement=moved)

    rows = [
        row("rounded", drift_abs=[0.0, 0.004], drift_noise=[0.003, 0.003]),
        row("moving", drift_abs=[0.0, 0.02], drift_noise=[0.003, 0.003]),
        row("still", drift_abs=[0.0, 0.0], drift_noise=[0.003, 0.003]),
        row("earlier", drift_abs=[0.0, 0.004]),
        dict(name="teacher", epochs=None),
    ]
    said = report.remark(rows, True)
    assert "rounded x2 (0.0030 of 0.0040 nats)" in said and "float32" in said
    assert not any(name in said for name in ("moving", "still", "earlier", "teacher"))
    assert report.remark(rows[1:], True) == ""
