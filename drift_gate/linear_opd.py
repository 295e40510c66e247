"""`linear_opd_loss`: the gated sampled-token loss from hidden states and LM head."""

from typing import Any

from torch import Tensor

from .agreement import Meeting
from .arguments import check_integer
from .batch import Gate, complete, finish, prepare
from .gate import DriftGate
from .head import check_head, local_head
from .linear import eager_logits, scan_head
from .linear_step import detached_tokens, step
from .losses import check_old, check_options
from .outputs import LossOutput
from .vocab_parallel import named_group


def linear_opd_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_log_probs: Tensor | None,
    teacher_log_probs: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    gate: Gate = DriftGate(),  # noqa: B008  (frozen)
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    span_ids: Tensor | None = None,
    estimator: str = "ppo",
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.2,
    clip_ratio_c: float = 3.0,
    advantage_clip: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    loss_agg_mode: str = "token-mean",
    batch_num_tokens: float | Tensor | None = None,
    dp_size: int = 1,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
    group: Any = None,
    context_parallel_group: Any = None,
    position_ids: Tensor | None = None,
    vocab_parallel_group: Any = None,
    return_entropy: bool = False,
    validate: bool = False,
    backend: str = "auto",
) -> LossOutput:
    """`opd_loss` of the logits that an LM head makes; no [tokens, V] tensor exists.

        z = logit_scale * cap(hidden_states W^T + bias) / temperature
        cap(x) = softcap * tanh(x / softcap), or x without a softcap

    The valid rows are walked in chunks of whole blocks of the gate. Each chunk's gradients are
    formed at once, with gates that lack their unit mean; that is one number for the batch, and
    divides the sums at the end. So three products of N V H multiplications are done in all, in the
    forward; the backward scales what they gave. Where gates cannot be formed chunk by chunk (a
    block, span or sequence longer than a chunk, or `normalize="sequence"`) the log-probs of all
    rows come first, for a fourth product. So does `loss_agg_mode="none"`, whose upstream weights
    only the backward knows.

    Args:
        hidden_states, weight, bias, softcap, logit_scale, chunk_size: as in
            `linear_token_log_probs`. grad_weight is summed in float32 (for bfloat16 on a CPU
            in 24 bits, or two chunks at once).
        others: as in `opd_loss`; there is no `inplace_backward`, as there are no logits.

    Returns:
        LossOutput, as `opd_loss`. Unless loss_agg_mode is "none", `token_loss` is detached, and
        one backward may run through `loss`: it hands out the gradients that the forward formed
        (with `retain_graph=True` too, a second one raises RuntimeError). Any upstream gradient is
        exact, and under `torch.no_grad()`, or for inputs that need none, no gradient is formed.

    Raises:
        ValueError, TypeError: as `opd_loss` and `linear_token_log_probs`.
    """
    hidden_states, weight, bias, shard = local_head(
        hidden_states, weight, bias, vocab_parallel_group
    )
    with Meeting(group, context_parallel_group, position_ids, named_group(shard)) as ranks:
        ranks.expect(hidden_states, validate)
        check_options(estimator, clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip)
        check_integer("labels", labels)
        inputs = check_head(
            hidden_states, weight, bias, softcap, logit_scale, temperature, chunk_size, backend,
            shard=shard,
        )  # fmt: skip
        batch = prepare(
            inputs.student, labels, old_log_probs, gate=gate, response_mask=response_mask,
            cu_seqlens=cu_seqlens, span_ids=span_ids, temperature=temperature,
            ignore_index=ignore_index, loss_agg_mode=loss_agg_mode,
            batch_num_tokens=batch_num_tokens, dp_size=dp_size,
            global_batch_size=global_batch_size, loss_scale_factor=loss_scale_factor,
            validate=validate, backend=inputs.backend, ranks=ranks, position_ids=position_ids,
        )  # fmt: skip
        check_old(batch, estimator)
        teacher = batch.row_data("teacher_log_probs", teacher_log_probs)
        ranks.tell(estimator=estimator, softcap=softcap, chunk_size=chunk_size)
    clips = clip_ratio_low, clip_ratio_high, clip_ratio_c, advantage_clip
    if batch.backend == "reference":
        from . import reference

        sizes = batch_num_tokens, dp_size, global_batch_size, loss_scale_factor
        batch = batch._replace(temperature=1 / inputs.head.scale)
        logits = eager_logits(inputs)
        output = reference.opd_loss(
            batch, logits, teacher, estimator, clips, loss_agg_mode, sizes, return_entropy
        )
    elif batch.reduce.none:
        assert batch.ids is not None
        _, scanned, _, _, entropy = scan_head(
            inputs, batch.ids[:, None], batch.valid, return_entropy
        )
        shown = entropy.detach() if return_entropy else None
        output = finish(batch, scanned[:, 0], shown, teacher, estimator, clips)
    else:
        done = step(batch, inputs, "sampled", [estimator, *clips], [teacher], None, return_entropy)
        log_probs, *shown_entropy = done.results
        entropy_or_none = shown_entropy[0] if return_entropy else None
        output = finish(batch, log_probs, entropy_or_none, teacher, estimator, clips)
        output = done.attach(output)
    return detached_tokens(batch, complete(batch, output))
