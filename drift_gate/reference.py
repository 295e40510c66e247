"""The eager reference: the specification, to be read beside the paper (arXiv 2606.24084).

Plain differentiable PyTorch in the dtype of the logits (float32 at least), with a Python loop over
sequences and blocks. Nothing in the fast path imports it; tests, fuzzing and benchmarks compare
with it. Row r is position t of sequence b; tensors are flat, `[N]` or `[N, V]`, and `sequences`
lists the slice of rows of each sequence.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .arguments import Layout
from .batch import TOTALS, Batch, Clips, Sizes
from .gate import DriftGate
from .outputs import GateOutput, LossOutput, Metrics

Slices = list[slice]


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def sequences_of(layout: Layout) -> Slices:
    """Rows of each sequence."""
    if layout.cu_seqlens is not None:
        borders = layout.cu_seqlens.tolist()
    else:
        borders = [*range(0, layout.rows, max(layout.length, 1)), layout.rows]
    return [slice(a, b) for a, b in pairwise(borders)]


# --- vocabulary ---------------------------------------------------------------------------------


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """z = logits / temperature, in the accumulation dtype."""
    return logits.to(accumulation_dtype(logits)) / temperature


def gather_lse(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z[ids] [N, K] and logsumexp(z) [N] of logits [N, V]; NaN for a row with +inf."""
    z = scaled_logits(logits, temperature)
    top = z.detach().amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0)  # apart: logsumexp's gradient loses its digits
    lse = (z - top).logsumexp(-1) + top[:, 0]
    return z.gather(-1, ids.long()), torch.where(lse == torch.inf, torch.nan, lse)


def token_log_probs(
    logits: Tensor, labels: Tensor, valid: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-prob of the label and entropy, [N] each; 0 on invalid rows."""
    z = scaled_logits(torch.where(valid[:, None], logits, 0), temperature)
    log_p = z.log_softmax(-1)
    labels = torch.where(valid, labels, 0).long()
    log_probs = log_p.gather(-1, labels[:, None])[:, 0]
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, p).sum(-1)  # p log p -> 0; a NaN stays
    return torch.where(valid, log_probs, 0), torch.where(valid, entropy, 0)


# --- gate ---------------------------------------------------------------------------------------


def block_ids(valid: Tensor, sequences: Slices, gate: DriftGate, span_ids: Tensor | None) -> Tensor:
    """Number of each valid row's block, in order of first appearance; -1 on invalid rows."""
    ids = torch.full(valid.shape, -1, dtype=torch.int64, device=valid.device)
    blocks: dict[tuple[int, int], int] = {}
    for s, rows in enumerate(sequences):
        positions = valid[rows].nonzero()[:, 0].tolist()
        for t in positions:
            if gate.granularity == "token":
                key = t
            elif gate.granularity == "block":
                key = (t - positions[0]) // gate.block_size
            elif gate.granularity == "span":
                assert span_ids is not None
                key = int(span_ids[rows][t])
            else:
                key = 0
            ids[rows.start + t] = blocks.setdefault((s, key), len(blocks))
    return ids


def aggregate(drift: Tensor, kind: str) -> Tensor:
    """Reduce the drift of one block's valid rows to a scalar."""
    if kind == "mean":
        return drift.mean()
    if kind == "mean_abs":
        return drift.abs().mean()
    if kind == "rms":
        unit = drift.abs().max()
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1)
        return unit * (drift / unit).square().mean().sqrt()
    return drift.abs().max()


def block_drift(drift: Tensor, ids: Tensor, kind: str) -> Tensor:
    """|a_b| of each row's block, [N]; 0 on invalid rows."""
    a = torch.zeros_like(drift)
    for block in range(int(ids.max()) + 1 if ids.numel() else 0):
        a[ids == block] = aggregate(drift[ids == block], kind).abs()
    return a


def unit_mean(a: Tensor, valid: Tensor, tau: float) -> Tensor:
    """exp(-tau a) over its mean on the valid rows; 0 on invalid ones."""
    if not valid.any():
        return torch.zeros_like(a)
    g = torch.where(valid, torch.exp(-tau * (a - a[valid].min())), 0)
    return torch.where(valid, g / (g.sum() / valid.sum()), 0)


def weights(a: Tensor, valid: Tensor, sequences: Slices, gate: DriftGate) -> Tensor:
    """w [N] from the block drift a [N]."""
    if gate.normalize == "batch":
        return unit_mean(a, valid, gate.tau)
    if gate.normalize == "none":
        return torch.where(valid, torch.exp(-gate.tau * a), 0)
    w = torch.zeros_like(a)
    for rows in sequences:
        w[rows] = unit_mean(a[rows], valid[rows], gate.tau)
    return w


def mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid rows; 0 without any."""
    return torch.where(valid, x, 0).sum() / valid.sum().clamp(min=1)


def gate_metrics(w: Tensor, raw: Tensor, drift: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The metrics of GateOutput."""
    zero = w.new_zeros(())
    largest = w[valid].max() if valid.any() else zero
    share = w / largest if largest != 0 else w  # whose squares no dtype loses
    return {
        "gate_mean_raw": mean(raw, valid),
        "gate_min": w[valid].min() if valid.any() else zero,
        "gate_max": largest,
        "gate_ess": share.sum() ** 2 / share.square().sum() / valid.sum() if largest != 0 else zero,
        "drift_abs": mean(drift.abs(), valid),
        "drift_signed": mean(drift, valid),
    }


@torch.no_grad()
def gate_weights(
    log_probs: Tensor,
    old_log_probs: Tensor,
    valid: Tensor,
    layout: Layout,
    span_ids: Tensor | None,
    gate: DriftGate,
) -> GateOutput:
    """`drift_gate.gate_weights` on flat rows."""
    sequences = sequences_of(layout)
    drift = torch.where(valid, old_log_probs - log_probs, 0)
    ids = block_ids(valid, sequences, gate, span_ids)
    a = block_drift(drift, ids, gate.aggregate)
    w = weights(a, valid, sequences, gate)
    return GateOutput(w, drift, ids, gate_metrics(w, torch.exp(-gate.tau * a), drift, valid))


# --- sampled-token loss -------------------------------------------------------------------------


def sampled_token_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    teacher_log_probs: Tensor,
    *,
    estimator: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
    advantage_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """L [N], differentiable in log_probs, and whether PPO's clip is active [N]."""
    never = torch.zeros_like(log_probs, dtype=torch.bool)
    if estimator == "k1":
        return log_probs - teacher_log_probs, never
    if estimator == "k2":
        return 0.5 * (log_probs - teacher_log_probs).square(), never
    if estimator == "k3":
        log_ratio = (teacher_log_probs - log_probs).clamp(-20, 20)
        return (log_ratio.exp() - log_ratio - 1).clamp(-10, 10), never

    advantage = teacher_log_probs - old_log_probs
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    ratio = (log_probs - old_log_probs).clamp(-20, 20).exp()
    loss = -advantage * ratio
    if estimator == "importance":
        return loss, never
    held = -advantage * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    dual = torch.minimum(-advantage * clip_ratio_c, torch.maximum(loss, held))
    return torch.where(advantage < 0, dual, torch.maximum(loss, held)), held > loss


def aggregate_loss(
    token_loss: Tensor, valid: Tensor, sequences: Slices, mode: str, sizes: Sizes, layout: Layout
) -> Tensor:
    """Sum token_loss [N] as verl's `agg_loss` does; an empty batch gives 0."""
    batch_num_tokens, dp_size, global_batch_size, loss_scale_factor = sizes
    if mode == "none":
        return token_loss
    total = token_loss.sum()
    if mode == "token-sum":
        return total * dp_size
    if mode == "token-mean":
        tokens = valid.sum().clamp(min=1) if batch_num_tokens is None else batch_num_tokens
        return total / tokens * dp_size
    counts = torch.stack([valid[rows].sum() for rows in sequences]) if sequences else valid[:0]
    if mode == "seq-mean-token-mean":
        sums = [token_loss[rows].sum() for rows in sequences]
        if sums:
            total = (torch.stack(sums) / (counts.to(total.dtype) + 1e-8)).sum()
    size = (counts > 0).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    loss = total / size * dp_size
    if mode == "seq-mean-token-sum-norm":
        return loss / (loss_scale_factor or max(layout.length, 1))
    return loss


def opd_loss(
    batch: Batch,
    logits: Tensor,
    teacher_log_probs: Tensor,
    estimator: str,
    clips: Clips,
    loss_agg_mode: str,
    sizes: Sizes,
    return_entropy: bool,
) -> LossOutput:
    """`drift_gate.opd_loss` on checked arguments; logits [..., V], row data [N]."""
    valid = batch.valid
    assert batch.ids is not None
    rows = logits.reshape(-1, logits.shape[-1])
    log_probs, entropy = token_log_probs(rows, batch.ids, valid, batch.temperature)
    teacher = torch.where(valid, teacher_log_probs, 0)
    old = log_probs if batch.old is None else torch.where(valid, batch.old, 0)
    low, high, c, bound = clips
    loss, clipped = sampled_token_loss(
        log_probs, old.detach(), teacher, estimator=estimator, clip_ratio_low=low,
        clip_ratio_high=high, clip_ratio_c=c, advantage_clip=bound,
    )  # fmt: skip
    entropy_or_none = entropy.detach() if return_entropy else None
    result = finish(batch, log_probs.detach(), entropy_or_none, loss, loss_agg_mode, sizes)
    result.metrics["pg_clipfrac"] = mean(clipped.to(log_probs.dtype), valid)
    return result


def totals(batch: Batch, metrics: Metrics) -> Metrics:
    """What `scope.rescale` needs to join this call with the rest of its batch."""
    valid, gate = batch.valid, batch.gating.gate
    tokens = size = valid.sum().double()
    if batch.reduce.denominator == "sequences":
        some = [valid[rows].any() for rows in sequences_of(batch.layout)]
        size = torch.stack(some).sum().double()
    log_mean = torch.zeros_like(tokens)
    if gate is not None and gate.normalize == "batch" and valid.any():
        log_mean = metrics["gate_mean_raw"].double().log()
    peak = torch.zeros_like(tokens)
    return dict(zip(TOTALS, (peak, log_mean, tokens, size), strict=True))


def finish(
    batch: Batch,
    log_probs: Tensor,
    entropy: Tensor | None,
    loss: Tensor,
    loss_agg_mode: str,
    sizes: Sizes,
) -> LossOutput:
    """Gate and reduce position losses [N]; log_probs [N] are the labels', detached."""
    valid, layout = batch.valid, batch.layout
    gate, given, spans, *_ = batch.gating
    old = log_probs if batch.old is None else torch.where(valid, batch.old, 0)
    if gate is None:
        w = valid.to(log_probs.dtype) if given is None else torch.where(valid, given, 0)
        drift = torch.zeros_like(w) if batch.old is None else old - log_probs
        metrics = gate_metrics(w, w, drift, valid)
    else:
        w, drift, _, metrics = gate_weights(log_probs, old, valid, layout, spans, gate)
    metrics["ppo_kl"] = mean(drift.clamp(-20, 20), valid)
    if entropy is not None:
        metrics["entropy"] = mean(entropy, valid)
    if not batch.scope.single:
        metrics.update(totals(batch, metrics))
    token_loss = torch.where(valid, w * loss, 0)
    total = aggregate_loss(token_loss, valid, sequences_of(layout), loss_agg_mode, sizes, layout)

    def shaped(x: Tensor) -> Tensor:
        return x.view(layout.shape)

    return LossOutput(
        loss=shaped(total) if loss_agg_mode == "none" else total,
        token_loss=shaped(token_loss),
        log_probs=shaped(log_probs),
        gate=shaped(w),
        drift=shaped(drift),
        entropy=None if entropy is None else shaped(entropy),
        metrics=metrics,
    )
