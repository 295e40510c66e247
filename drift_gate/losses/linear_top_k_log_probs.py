"""`linear_top_k_log_probs`: the likeliest words, from hidden states and LM head."""

from typing import NamedTuple

from torch import Tensor

from ..call.op import Op, Tensors
from ..head.check import HeadRule, head_facts, local_head, take_head
from ..head.select import select_head
from ..options import Head, Parallel, check_groups
from ..outputs import TopKOutput
from ..parallel.agreement import meeting
from ..parallel.words import Shard, likeliest
from ..passes.backends import passes_of
from .by_reference import by_reference
from .handing import head_inputs
from .top_k_log_probs import empty_lists, no_gradients, take_rows, valid_of


def linear_top_k_log_probs(
    hidden_states: Tensor,
    head: Head | Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    response_mask: Tensor | None = None,
    parallel: Parallel | None = None,
    backend: str = "auto",
) -> TopKOutput:
    """`top_k_log_probs` of the logits that a head makes, a chunk of rows at a time.

    One product of N V H multiplications, for the rows that are wanted alone; nothing [tokens, V] is
    kept. Words are in the order of the logits as the product is rounded.

    Args:
        hidden_states: [B, T, H] or [N, H]; bfloat16, float16, float32 (float64 with the PyTorch
            backend). Under `torch.autocast` both they and the head are cast to its dtype. They get
            no gradient.
        head: the weight [V, H], in the same dtype, or a `Head`. Any strides. A DTensor is gathered
            once. The softcap comes before the scale (TRL's chunked losses scale first).
        k: words of a row, at least 1. Where it exceeds V the lists are padded.
        temperature: divides the logits; greater than 0.
        response_mask: the leading shape of hidden_states, bool, integer or float, 1 where a row is
            wanted; the others may hold anything. None: all are.
        parallel: its `vocab_parallel_group` is the process group over which the words are sharded:
            the head [V_r, H] is this rank's, in the order of the ranks; everything else is the same
            on all of them, and ids count from the first word of all. All of them get the lists of
            whole rows. A DTensor head, its first dimension sharded, needs no argument beside
            DTensor hidden states, replicated.
        backend: "auto" (Triton on a GPU, C on a CPU, else PyTorch), "triton", "native" (C), "torch"
            or "reference".

    Returns:
        TopKOutput: ids and log-probs [..., K], as `top_k_log_probs` has them.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; on a CPU a mask with
            other values than 0 and 1.
    """
    check_groups("linear_top_k_log_probs", parallel, "vocab_parallel_group")
    hidden_states, head, shard = local_head(hidden_states, head, parallel)
    with meeting(parallel, None, "" if shard is None else shard.group) as ranks:
        ranks.expect(hidden_states)
        inputs, student, chosen = take_head(hidden_states, head, temperature, backend, shard)
        k, mask = take_rows(
            k, response_mask, student.shape, student.device, student.of, ranks, chosen
        )
        if ranks.any:
            facts = head_facts("head", head, inputs.rule)
            ranks.tell(student.shape, temperature=temperature, k=k, **facts)
    if chosen == "reference":
        return by_reference(linear_top_k_log_probs, locals())
    bias = None if inputs.bias is None else inputs.bias.detach()
    weights = inputs.hidden.detach(), inputs.weight.detach(), bias
    ids, log_probs = LINEAR_TOP_K(Listing(*weights, mask, k, inputs.rule, inputs.shard, chosen))
    return TopKOutput(ids.view(*student.shape, k), log_probs.view(*student.shape, k))


class Listing(NamedTuple):
    """Of the op."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    mask: Tensor | None  # [N]
    k: int
    rule: HeadRule
    shard: Shard
    backend: str


def _forward(x: Listing) -> Tensors:
    valid = valid_of(x.backend, x.mask)
    found = select_head(passes_of(x.backend), head_inputs(x), x.k, valid)
    return likeliest(found, x.rule.scale, x.shard)


def _empty(x: Listing) -> Tensors:
    return empty_lists(x.hidden, x.hidden.shape[0], x.k)


LINEAR_TOP_K = Op(
    "linear_top_k",
    Listing,
    _forward,
    no_gradients,
    _empty,
    outputs=("ids", "log_probs"),
    grads=0,
    differentiable=(),
    keep=(),
)
