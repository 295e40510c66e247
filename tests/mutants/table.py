"""The faults: a name, a file, the text that is replaced, and the tests that must see it."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file once, or `nth` says which
    new: str
    tests: str  # arguments of pytest
    nth: int = 0
    interpreted: bool = False  # kernels: the tests run in Triton's interpreter


FUZZ = "tests/test_fuzz_found.py tests/test_fuzz.py"
GATE = f"tests/test_gate.py {FUZZ}"
OPD = f"tests/test_opd_loss.py tests/test_reference.py {FUZZ}"
PASSES = f"tests/test_opd_loss.py tests/test_reference.py {FUZZ} tests/test_ops.py"
TOPK = f"tests/test_topk_loss.py {FUZZ}"
FULL = f"tests/test_full_loss.py {FUZZ}"
LINEAR = "tests/test_linear_losses.py tests/test_head_gradients.py tests/test_linear_autograd.py"
MICRO = "tests/test_micro_batches.py"
RANKS = "tests/test_ranks.py"
SHARDS = "tests/test_vocab_parallel.py"
SPANS = "tests/test_spans.py"
ARGUMENTS = f"tests/test_arguments.py {FUZZ}"
NATIVE = f"tests/test_native.py {FULL} tests/test_full_loss_special.py tests/test_opd_loss.py"
K_SCAN = "tests/test_kernels_vocabulary.py"
K_ROWS = "tests/test_kernels_fuzz.py tests/test_kernels_opd.py"
K_TOPK = "tests/test_kernels_fuzz.py tests/test_kernels_topk.py"
K_FULL = "tests/test_kernels_divergence.py tests/test_kernels_fuzz.py"

ROWS = "drift_gate/torch_rows.py"
PASS = "drift_gate/torch_passes.py"
CHUNKS = "drift_gate/row_chunks.py"
SUMS = "drift_gate/head_gradients.py"
DEFERRED = "drift_gate/deferred.py"
SPARSE = "drift_gate/sparse.py"
STEP = "drift_gate/head_step.py"
DIVERGENCE = "drift_gate/torch_divergence.py"
TORCH_TOPK = "drift_gate/torch_topk.py"
ATEN = PASS, CHUNKS, DIVERGENCE  # tested as without a C compiler

PYTHON = [
    # the fused head
    Mutant("unit mean of the last chunk alone", DEFERRED, "self.total * factor + weights", "0 * self.total + weights", LINEAR),
    Mutant("sums not moved to a lower shift", STEP, "if factor != 1:", "if factor > 1:", LINEAR),
    Mutant("the shift never moves", DEFERRED, "elif tau * (self.shift - lowest) > 1:", "elif False:", LINEAR),
    Mutant("mean over all rows", DEFERRED, "count = self.data.valid.sum()", "count = len(self.data.valid) + 0 * self.total", LINEAR),
    Mutant("chunks cut blocks", "drift_gate/chunks.py", "position[reach == position] + 1", "position + 1", LINEAR),
    Mutant("first chunk counted twice", SUMS, "self.begun = True", "self.begun = len(hidden) < 2", LINEAR),
    Mutant("lower byte lost", SUMS, "add_(bits.copy_(low), alpha=256)", "add_(bits.copy_(low), alpha=0)", LINEAR),
    Mutant("truncated to 24 bits", SUMS, "value.view(torch.int32).add_(128)", "value.view(torch.int32).add_(0)", LINEAR),
    Mutant("slope of the cap forgotten", "drift_gate/head_scan.py", "uncap(z[rows], kept, cap)", "pass", LINEAR),
    Mutant("sparse slope of the cap forgotten", SPARSE, "slope = slope * (1 - (gathered", "slope = slope * (1 - 0 * (gathered", LINEAR),
    Mutant("logit scale not in the slope", SPARSE, "slope = beta * scale", "slope = beta * 1.0", LINEAR),
    Mutant("rows of words shifted", "drift_gate/torch_sparse.py", "begins[i:j] - borders[i], hidden", "(begins[i:j] - borders[i]).clamp(max=3), hidden", LINEAR),
    Mutant("upstream gradient forgotten", STEP, "factor * upstream, ctx.like", "factor * 1, ctx.like", LINEAR),
    Mutant("a second backward allowed", STEP, "ctx.handed_out = True", "pass", LINEAR),
    Mutant("coefficients not over the largest", "drift_gate/linear_step.py", "factor = largest * inverse", "factor = inverse", LINEAR),
    Mutant("gathered head has the gradient's sum", "drift_gate/sharded.py", 'Partial("avg")', 'Partial("sum")', "tests/test_linear_sharded.py"),
    # gate
    Mutant("unit mean over all rows", ROWS, "g.sum() / count.sum()", "g.mean() / 1.0 #", GATE),
    Mutant("max not shifted", ROWS, "-tau * (a - masked.min())", "-tau * a", GATE),
    Mutant("sequence mean over the batch", ROWS, 'groups.reduce(g, "sum")', "g.sum()", GATE),
    Mutant("sign of tau", ROWS, "torch.exp(-tau * a), 0)\n        weight", "torch.exp(tau * a), 0)\n        weight", GATE),
    Mutant("drift has the other sign", ROWS, "wide(old_log_probs) - wide(log_probs), 0", "wide(log_probs) - wide(old_log_probs), 0", GATE),
    Mutant("absolute value forgotten", ROWS, "/ count).abs()", "/ count)", GATE),
    Mutant("mean_abs without abs", ROWS, 'blocks.reduce(drift.abs(), "sum")', 'blocks.reduce(drift, "sum")', GATE),
    Mutant("rms without root", ROWS, '/ count).sqrt()', "/ count)", GATE),
    Mutant("rms not in units of the largest", ROWS, "(drift / unit).square()", "drift.square()", GATE),
    Mutant("block border off by one", ROWS, "(rows - first) // block_size", "(rows - first + 1) // block_size", GATE),
    Mutant("blocks from the sequence's start", ROWS, "(rows - first) // block_size", "rows // block_size", GATE),
    Mutant("blocks cross sequences", ROWS, "(s[1:] != s[:-1]) | (i[1:] != i[:-1])", "i[1:] != i[:-1]", GATE),
    Mutant("masked rows counted", ROWS, 'blocks.reduce(valid.to(drift.dtype), "sum")', 'blocks.reduce(torch.ones_like(drift), "sum")', GATE),
    Mutant("sequences numbered, not by first row", ROWS, "borders[torch.searchsorted(borders, rows, right=True) - 1]", "torch.searchsorted(borders, rows, right=True) - 1", GATE),
    Mutant("weights of invalid rows", ROWS, "return torch.where(valid, g / mean, 0)", "return g / mean + (~valid) * 1e-3", GATE),
    Mutant("gate_ess over all rows", ROWS, "total / square * total * over", "total / square * total / len(weight)", GATE),
    # position losses
    Mutant("clip bounds swapped", ROWS, "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)", OPD),
    Mutant("dual clip for gains", ROWS, "(advantage < 0) & (loss > ceiling)", "loss > ceiling", OPD),
    Mutant("slope through the clip", ROWS, "torch.where(clipped | dual, 0, slope)", "torch.where(dual, 0, slope)", OPD),
    Mutant("slope through the dual clip", ROWS, "torch.where(clipped | dual, 0, slope)", "torch.where(clipped, 0, slope)", OPD),
    Mutant("minimum for maximum", ROWS, "loss = torch.maximum(loss, held)", "loss = torch.minimum(loss, held)", OPD),
    Mutant("slope beyond the clamp at 20", ROWS, "torch.where(log_ratio.abs() > 20, 0, loss)", "loss", OPD + " tests/test_limits.py"),
    Mutant("advantage's sign", ROWS, "advantage = teacher - old", "advantage = old - teacher", OPD),
    Mutant("advantage clip on one side", ROWS, "advantage.clamp(-advantage_clip, advantage_clip)", "advantage.clamp(max=advantage_clip)", OPD),
    Mutant("k2 doubled", ROWS, "0.5 * log_ratio.square(), log_ratio", "log_ratio.square(), log_ratio", OPD),
    Mutant("k3's slope's sign", ROWS, "(loss > 10), 0, -growth)", "(loss > 10), 0, growth)", OPD),
    Mutant("k3 not clamped", ROWS, "loss.clamp(max=10), slope", "loss, slope", OPD),
    Mutant("token mean over all rows", ROWS, "coefficient / valid.sum().clamp(min=1)", "coefficient / len(valid)", OPD),
    Mutant("sequences that have no row counted", ROWS, "out[3] = valid & (rows == first)", "out[3] = rows == sequence", OPD),
    Mutant("weight twice in the slope", ROWS, "slope = torch.where(valid, weight * slope, 0)", "slope = torch.where(valid, weight * weight * slope, 0)", OPD),
    Mutant("ppo_kl not clamped", ROWS, "drift.clamp(-20, 20).sum() * over", "drift.sum() * over", OPD),
    Mutant("gate not detached", "drift_gate/rows.py", "grad = slope * coefficient * grad_loss", "grad = (slope + 0.01) * coefficient * grad_loss", OPD),
    Mutant("per-token gradient dropped", "drift_gate/rows.py", "grad = through_token if grad is None else grad + through_token", "grad = through_token if grad is None else grad", OPD),
    # vocabulary passes
    Mutant("temperature applied twice", PASS, "torch.amax(z, -1, out=maximum)", "torch.amax(z, -1, out=maximum).mul_(scale)", PASSES),
    Mutant("chunk border off by one", CHUNKS, "x.narrow(0, rows[0], n)", "x.narrow(0, max(rows[0] - 1, 0), n)", PASSES),
    Mutant("mask dropped in scan", PASS, "for n, (piece,) in chunks(mask, size, x):", "for n, (piece,) in chunks(None, size, x[: int(mask.sum())]):", PASSES),
    Mutant("alpha and beta swapped", PASS, "a * p + beta)", "beta * p + a)", PASSES),
    Mutant("duplicates not summed", PASS, "beta = _sum_duplicates(ids, beta)", "pass", f"{TOPK} tests/test_ops.py"),
    Mutant("scale missing in the gradient", PASS, "torch.where(a == 0, beta, value).mul_(scale)", "torch.where(a == 0, beta, value)", PASSES),
    Mutant("rows without gradient not zeroed", PASS, "tasks += [_Expansion(*pieces) for _, pieces in chunks(off, size, y)]", "pass", PASSES),
    Mutant("ids of invalid rows written", PASS, "(listed if valid is None else listed & valid[:, None])", "(listed)", "tests/test_ops.py -k 'expand or opcheck'"),
    Mutant("entropy's sign", PASS, "torch.sub(total.log(), mean, out=entropy)", "torch.add(total.log(), mean, out=entropy)", PASSES),
    Mutant("unshifted beyond what is safe", PASS, "SAFE_MAXIMUM = 60.0", "SAFE_MAXIMUM = 1e9", PASSES),
    Mutant("lse's gradient dropped", "drift_gate/vocabulary.py", "alpha = through_sum if alpha is None else alpha + through_sum", "alpha = through_sum", PASSES),
    # top K and full
    Mutant("teacher and student swapped in the mixture", TORCH_TOPK, "m = beta * q + (1 - beta) * p", "m = beta * p + (1 - beta) * q", TOPK),
    Mutant("renormalised slope without its mean", TORCH_TOPK, "slope = g - p * g.sum(-1, keepdim=True)", "slope = g", TOPK),
    Mutant("the tail's slope dropped", TORCH_TOPK, "torch.where(rest < eps, 0, g_tail / p_tail)", "torch.where(rest < eps, 0, 0 * p_tail)", TOPK),
    Mutant("missing entries present", "drift_gate/topk_rows.py", "(ids != MISSING) & (teacher != -torch.inf)", "(ids != MISSING)", TOPK),
    Mutant("reverse is forward", DIVERGENCE, '_kl_statistics(sums, direction == "reverse")', '_kl_statistics(sums, direction == "forward")', FULL),
    Mutant("jsd's weights swapped", DIVERGENCE, "loss = (1 - beta) * divergence + beta *", "loss = beta * divergence + (1 - beta) *", FULL),
    Mutant("jsd's gradient not weighed", DIVERGENCE, "factor.mul_(1 - beta)", "factor", FULL),
    Mutant("the centre forgotten", DIVERGENCE, "a.sub_(n).sub_(centre)", "a.sub_(n)", FULL),
    Mutant("reverse's mean without the difference of the log-sums", DIVERGENCE, "wide(centre) + (log_sum - teacher_log_sum)", "wide(centre)", FULL),
    Mutant("absent words not clamped", DIVERGENCE, ".clamp_(min=LOWEST)", "", FULL),
    Mutant("padding words keep what was there", DIVERGENCE, "out.detach()[..., vocab:].zero_()", "pass", FULL),
    # arguments, reduction and spans
    Mutant("dp_size ignored", "drift_gate/reduction.py", "factor, divisor = float(dp_size), None", "factor, divisor = 1.0, None", OPD),
    Mutant("loss_scale_factor ignored", "drift_gate/reduction.py", "factor / loss_scale_factor", "factor / (length or 1)", OPD),
    Mutant("T of a rank's part", "drift_gate/reduction.py", "max(length * ranks_along, 1)", "max(length, 1)", FUZZ),
    Mutant("row data left strided", "drift_gate/arguments.py", ".reshape(-1).contiguous()", ".reshape(-1)", ARGUMENTS + " tests/test_limits.py"),
    Mutant("short rest kept", "drift_gate/spans.py", "if rest and joined:", "if rest > min_length and joined:", SPANS),
    Mutant("pieces not evened out", "drift_gate/spans.py", "if pieces and rest < min_length:", "if False:", SPANS),
    Mutant("micro-batches not weighed by tokens", "drift_gate/accumulation.py", "everyone.tokens * _quotient", "_quotient", MICRO),
    Mutant("a mean gate far above the first", "drift_gate/accumulation.py", "if distance > FURTHEST:", "if False:", MICRO),
    Mutant("a micro-batch that weighs nothing measures", "drift_gate/accumulation.py", " & (first.peak != -torch.inf)", "", MICRO),
    Mutant("infinite drifts of a part", "drift_gate/rows.py", "blocks[1:2].clamp(max=LARGEST_DRIFT)", "blocks[1:2]", FUZZ),
    Mutant("infinite drifts of a head's part", "drift_gate/deferred.py", "weighs &= self.total != 0", "pass", FUZZ),
    Mutant("mean gate of the first kept", "drift_gate/accumulation.py", "self._tokens / self._gates", "1.0", MICRO),
    Mutant("first denominator kept", "drift_gate/accumulation.py", "self._reference.size / self._size", "1.0", MICRO),
    Mutant("an empty first micro-batch measures", "drift_gate/accumulation.py", "torch.where(measures, a, b)", "a", MICRO),
    Mutant("nothing forgotten after a step", "drift_gate/accumulation.py", "        self.reset()\n        return loss", "        return loss", MICRO),
    Mutant("mean gate inverted", "drift_gate/scope.py", "torch.exp(call.log_quotient(everyone))", "torch.exp(everyone.log_quotient(call))", RANKS),
    Mutant("ranks not weighed by tokens", "drift_gate/scope.py", "log_means + tokens.log()", "log_means", RANKS + " tests/test_micro_batches.py"),
    Mutant("a rank's own denominator", "drift_gate/scope.py", "    if counted:\n", "    if False:\n", RANKS),
    Mutant("per-token losses by the rank's gate", "drift_gate/scope.py", "rescaled(output.token_loss, gate, valid)", "output.token_loss", MICRO),
    Mutant("a mean gate of no rows", "drift_gate/scope.py", "torch.where(self.tokens > 0, between, 0)", "between", MICRO),
    Mutant("invalid rows of a part not 0", "drift_gate/scope.py", "torch.where(valid, x * gate, 0)", "x * gate", FUZZ),
    Mutant("blocks from position 0", "drift_gate/context_parallel.py", "(position - first) // gate.block_size", "position // gate.block_size", RANKS),
    Mutant("another rank's rows", "drift_gate/context_parallel.py", "first = n * rank_in(context.group)", "first = 0", RANKS),
    Mutant("span ids as numbers", "drift_gate/context_parallel.py", "        return x.long()\n", "        return x.double().long()\n", FUZZ),
    Mutant("shards not shifted", "drift_gate/vocab_parallel.py", "(maximum - shift) + log_sum", "log_sum", SHARDS),
    Mutant("every shard has every word", "drift_gate/vocab_parallel.py", "mine = torch.where(local < 0, 0, gathered)", "mine = gathered", SHARDS),
    Mutant("entropy of a shard", "drift_gate/vocab_parallel.py", "(log_sum - entropy) + (maximum - shift)", "log_sum - entropy", SHARDS),
    Mutant("words counted from 0", "drift_gate/vocab_parallel.py", "local = ids - self.first", "local = ids", SHARDS),
    Mutant("hidden states' gradient of one shard", "drift_gate/ranks.py", "return sum_ranks(wide, ctx.group).to(grad.dtype), None", "return grad, None", SHARDS),
    Mutant("block numbers from 1", "drift_gate/rows.py", "number = begins.cumsum(0) - 1", "number = begins.cumsum(0)", GATE),
]  # fmt: skip


def _native(name: str, file: str, old: str, new: str, nth: int = 0) -> Mutant:
    return Mutant(f"native: {name}", f"drift_gate/native/{file}", old, new, NATIVE, nth)


C = [
    _native("subnormal halves read as normal", "arithmetic.h", "exponent == 0 ? NAME(to_bits)(subnormal) : found", "found"),
    _native("subnormal halves written as normal", "arithmetic.h", "size < 113u << 23 ? subnormal : found", "found"),
    _native("ties away from zero", "arithmetic.h", "0x7fffu + (u >> 16 & 1u)", "0x8000u"),
    _native("truncated halves", "arithmetic.h", "+ 0xfffu + (size >> 13 & 1u)) >> 13", ") >> 13"),
    _native("NaN rounded to infinity", "arithmetic.h", "> 0x7f800000u ? 0x7fc0u : rounded", "> 0xff800000u ? 0x7fc0u : rounded"),
    _native("exponentials that wrap around", "arithmetic.h", "x < -87.33654f ? 0.0f : p", "p"),
    _native("half a unit off in the exponential", "arithmetic.h", "5.0000001201e-1f", "5.0000101201e-1f"),
    _native("half a unit off in the logarithm", "arithmetic.h", "3.3333331174e-1f", "3.3343331174e-1f"),
    _native("words beyond the row weigh", "tiles.h", "tile[i] = -INFINITY;", "tile[i] = 0;"),
    _native("the scale of float32 dropped", "tiles.h", "tile[i] = from[i] * scale;", "tile[i] = from[i];"),
    _native("NaN clamped", "tiles.h", "x < LOWEST ? LOWEST : x", "x > LOWEST ? x : LOWEST"),
    _native("a tile's sums not moved", "sums.h", "factor * a.sum,", "a.sum,"),
    _native("a tile's mean not moved", "sums.h", "(a.mean + by * a.sum)", "a.mean"),
    _native("a tile's moment not moved", "sums.h", "a.moment + (by - other_by) * a.u.sum", "a.moment"),
    _native("a word that the other lacks", "sums.h", "if (all.missing && loss == loss)", "if (all.missing > 1)"),
    _native("jsd's weights swapped", "sums.h", "(1 - beta) * divergence + beta * other_divergence", "beta * divergence + (1 - beta) * other_divergence"),
    _native("jsd's slope not weighed", "sums.h", "factor *= 1 - beta, ", ""),
    _native("jsd's mixture by the wrong ratio", "sums.h", "mass_ratio(log_sum, other_log_sum);", "mass_ratio(other_log_sum, log_sum);"),
    _native("reverse's centre without log-sums", "sums.h", "centre += (double)log_sum - other_log_sum;", ";"),
    _native("the other model's entropy", "sums.h", "a.other_entropy, a.entropy}", "a.entropy, a.other_entropy}"),
    _native("the centre forgotten", "divergence.h", "(a - log_m - centre)", "(a - log_m)"),
    _native("forward's factors swapped", "divergence.h", "* factor - NAME(exp)(v[i] - other_top) * other_factor", "* other_factor - NAME(exp)(v[i] - other_top) * factor"),
    _native("the last tile dropped", "tiles.h", "for (int64_t at = 0; at < vocab; at += TILE)", "for (int64_t at = 0; at < vocab - 1; at += TILE)"),
    _native("a word beyond the row written", "tiles.h", "memcpy((float *)out.data + first, tile, (size_t)n", "memcpy((float *)out.data + first, tile, (size_t)(n + 1)"),
    _native("zeros beyond the row", "rows.c", "(size_t)((next - row) * vocab * size)", "(size_t)((next - row) * vocab * size + 1)"),
    _native("zeros over rows between", "rows.c", "out.offsets[next] == out.offsets[next - 1] + vocab", "1"),
]  # fmt: skip


def _kernel(name: str, file: str, old: str, new: str, tests: str, nth: int = 0) -> Mutant:
    return Mutant(f"kernel: {name}", f"kernels/{file}.py", old, new, tests, nth, True)


KERNELS = [
    _kernel("sum not rescaled", "scan", "total = total * carry + tl.sum(weight, 1)", "total = total + tl.sum(weight, 1)", K_SCAN),
    _kernel("lanes not rescaled", "scan", "tl.sum(total * carry, 0)", "tl.sum(total, 0)", K_SCAN),
    _kernel("tail mask off by one", "scan", "inside = lane < vocab + shift - full * TILE", "inside = lane <= vocab + shift - full * TILE", K_SCAN),
    _kernel("first tile's mask dropped", "scan", "inside = (lane >= shift) & (lane < vocab + shift)", "inside = lane < vocab + shift", K_SCAN),
    _kernel("label's bound dropped", "scan", "(column >= 0) & (column < vocab) & live", "live", K_SCAN),
    _kernel("a split's last tile dropped", "scan", "last = tl.minimum(first + share, tiles)", "last = tl.minimum(first + share, tiles - 1)", K_SCAN),
    _kernel("invalid rows are read", "scan", "last = tl.where(live, last, first)", "", K_ROWS),
    _kernel("batch stride for rows", "scan", "(row % length) * stride_row", "(row % length) * stride_batch", K_SCAN),
    _kernel("max of an empty lane", "scan", 'shift = tl.where(new == -float("inf"), 0.0, new)', "shift = new", K_SCAN),
    _kernel("scale missing in the gradient", "expand", "tl.where(alpha == 0.0, b, g) * scale", "tl.where(alpha == 0.0, b, g)", K_SCAN),
    _kernel("alpha's sign", "expand", "g = (alpha * scale) * tl.exp2", "g = (-alpha * scale) * tl.exp2", K_SCAN),
    _kernel("target a column late", "expand", "is_target = start + lane == target_column", "is_target = start + lane == target_column + 1", K_SCAN),
    _kernel("writes beyond the row", "expand", "mask = (start + lane >= shift) & (start + lane < vocab + shift)", "mask = start + lane < vocab + shift", K_SCAN),
    _kernel("duplicates get one beta", "expand", "same = column[:, None] == peer[None, :]", "same = k[:, None] == j[None, :]", K_SCAN),
    _kernel("expm1 of another point", "common", "y = 1.0 + x * y * (1.0 / 2.0)", "y = 1.0 + x * y * (1.0 / 3.0)", K_SCAN),
    _kernel("block border off by one", "blocks", "(row - first) // block_size * block_size", "(row - first + 1) // block_size * block_size", K_ROWS),
    _kernel("spans cross ids", "blocks", "member &= tl.load(span_ids + j", "member |= tl.load(span_ids + j", K_ROWS),
    _kernel("NaN drift dropped", "blocks", 'tl.where(nans > 0, float("nan"), result)', "result", K_ROWS),
    _kernel("rms of large drifts", "blocks", "unit = tl.where((largest > 0.0) & (largest < float(\"inf\")), largest, 1.0)", "unit = tl.where(largest > 0.0, 1.0, 1.0)", "tests/test_kernels_opd.py -k 'however_large and rms'"),
    _kernel("drift not shifted", "sampled_token", "weight = tl.exp(-tau * (a - shift)) / mean", "weight = tl.exp(-tau * a) / mean", K_ROWS),
    _kernel("mean over all rows", "sampled_token", "tl.sum(total, 0) / tl.maximum(tl.sum(count, 0), 1.0)", "tl.sum(total, 0) / (hi - lo)", K_ROWS),
    _kernel("dual clip dropped", "sampled_token", "loss = tl.where(dual, ceiling, loss)", "", K_ROWS),
    _kernel("slope through the clip", "sampled_token", "slope = tl.where(clipped, 0.0, slope)", "", "tests/test_kernels_opd.py -k test_estimators"),
    _kernel("slope not weighed", "sampled_token", "slope = tl.where(live, weight * slope, 0.0)", "slope = tl.where(live, slope, 0.0)", "tests/test_kernels_opd.py -k test_estimators"),
    _kernel("NaN metrics dropped", "sampled_token", "lowest = tl.where(total == total, tl.min(weight_min, 0), total)", "lowest = tl.min(weight_min, 0)", K_ROWS),
    _kernel("absent words counted", "topk", "tl.where(here, tl.exp(log_p), 0.0)", "tl.where(here, tl.exp(log_p), 1.0)", K_TOPK),
    _kernel("the tail's floor", "topk", "tl.where(rest < EPS, EPS, rest)", "rest", K_TOPK + " tests/test_limits.py"),
    _kernel("an infinity lost with its mass", "topk", "tl.where(difference == float(\"inf\"), difference, x * difference)", "tl.where(x == 0.0, 0.0, x * difference)", K_TOPK),
    _kernel("beta swapped", "topk", "m = BETA * q + (1.0 - BETA) * p", "m = BETA * p + (1.0 - BETA) * q", K_TOPK + " -k 'not raw'"),
    _kernel("cross moment not moved", "divergence", "cross = (cross + total * moved) * carry", "cross = cross * carry", K_FULL),
    _kernel("infinity forgotten", "divergence", "(infinite > 0.0) & (loss == loss)", "(infinite > 9.0) & (loss == loss)", K_FULL),
    _kernel("jsd's centre is its loss", "divergence", "tl.where(live, centre, 0.0)", "tl.where(live, loss, 0.0)", K_FULL),
    _kernel("large products subtracted", "paired", "log_p = (x - top) * scale - log_sum", "log_p = (x * scale - top * scale) - log_sum", K_FULL),
    _kernel("student's padding unwritten", "divergence_grad", "(start + lane < words + shift)", "(start + lane < vocab + shift)", K_FULL),
    _kernel("centre forgotten", "divergence_grad", "(log_p - log_q - centre)", "(log_p - log_q)", K_FULL),
]  # fmt: skip

MUTANTS = [*PYTHON, *C, *KERNELS]
