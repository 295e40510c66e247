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
    hangs: bool = False  # an endless loop: to be stopped is to be seen


FOUND = "tests/test_fuzz_found.py tests/test_fuzz_found_heads.py tests/test_fuzz_found_parts.py"
FUZZ = f"{FOUND} tests/test_fuzz.py"
FOUND_PARTS = (
    "tests/test_fuzz_found_parts.py tests/test_fuzz_found_heads.py tests/test_fuzz_found.py"
)
GATE = f"tests/test_torch_backend_rows.py tests/test_gate.py {FUZZ}"
OPD = f"tests/test_torch_backend_rows.py tests/test_opd_loss.py tests/test_reference.py {FUZZ}"
PASSES = f"tests/test_torch_backend.py tests/test_opd_loss.py tests/test_reference.py {FUZZ} tests/test_ops.py"
TOPK = f"tests/test_torch_backend.py tests/test_topk_loss.py {FUZZ}"
FULL = f"tests/test_torch_backend.py tests/test_full_loss.py {FUZZ}"
LINEAR = "tests/test_linear_losses.py tests/test_head_gradients.py tests/test_linear_autograd.py"
HEAD_SUMS = "tests/test_head_gradients.py"
LISTS = "tests/test_head_lists.py"
OUTSIDE = "tests/test_outside_topk.py"
OTHERS = "tests/test_other_losses.py"
SAMPLING = "tests/test_sampling.py"
WIDE = "tests/test_logits_dtype.py"
NOISE = "tests/test_drift_noise.py"
MICRO = "tests/test_micro_batches.py"
RANKS = "tests/test_ranks.py"
SHARDS = "tests/test_vocab_parallel.py"
SPANS = "tests/test_spans.py"
ARGUMENTS = f"tests/test_arguments.py {FUZZ}"
GUARDS = "tests/test_native_guards.py"
NATIVE = f"tests/test_native_passes.py tests/test_native.py {GUARDS}"
GUARDED = f"{GUARDS} {NATIVE}"  # the others would die of a write beyond a tensor
NATIVE_ROWS = f"tests/test_native_rows.py {GUARDS}"
NATIVE_TOPK = f"tests/test_native_topk.py {GUARDS}"
NATIVE_SELECT = f"tests/test_top_k_log_probs.py {GUARDS}"
SELECT = "tests/test_top_k_log_probs.py"
K_SCAN = "tests/test_kernels_vocabulary.py"
K_SELECT = "tests/test_kernels_select.py"
K_ROWS = "tests/test_kernels_fuzz.py tests/test_kernels_opd.py"
K_MEASURED = "tests/test_kernels_rows.py -k measured"
K_TOPK = "tests/test_kernels_fuzz.py tests/test_kernels_topk.py"
LISTED = "tests/test_listed_passes.py"
K_HOLES = "tests/test_kernels_sparse.py -k without_support"
READS = "tests/test_host_reads.py"
K_SPARSE = "tests/test_kernels_sparse.py -k 'not losses and not dense'"
K_FULL = "tests/test_kernels_divergence.py tests/test_kernels_fuzz.py"

ROWS = "drift_gate/passes/torch/rows.py"
BLOCKS = "drift_gate/passes/torch/blocks.py"
PASS = "drift_gate/passes/torch/vocabulary.py"
DIVERGENCE = "drift_gate/passes/torch/divergence.py"
TORCH_TOPK = "drift_gate/passes/torch/topk.py"
TORCH_SPARSE = "drift_gate/passes/torch/sparse.py"
TORCH_SELECT = "drift_gate/passes/torch/select.py"
CHECK = "drift_gate/head/check.py"
SUMS = "drift_gate/head/sums.py"
LOGITS = "drift_gate/head/logits.py"
WALK = "drift_gate/head/walk.py"
SPARSE = "drift_gate/head/sparse.py"
HANDING = "drift_gate/losses/handing.py"
CALL = "drift_gate/call/rows.py"
WORDS = "drift_gate/parallel/words.py"
# Tested as without a C compiler.
ATEN = ROWS, BLOCKS, PASS, DIVERGENCE, TORCH_TOPK, TORCH_SPARSE, TORCH_SELECT

PYTHON = [
    # the fused head
    Mutant("a unit mean for each chunk", WALK, "return weight * relative.to(weight.dtype), factor", "return weight, factor", LINEAR),
    Mutant("sums not moved to other units", WALK, "            sums.multiply(factor)\n", "            pass\n", LINEAR + " -k however_large"),
    Mutant("no slope of the entropy", PASS, "z if slope is None else z.mul_(slope)", "z", OUTSIDE),
    Mutant("words without mass get a slope", PASS, "log_p.clamp(min=LEAST).mul_(gamma)", "(log_p * gamma)", OUTSIDE),
    Mutant("words outside a list weigh less", "drift_gate/call/lists.py", "(OUTSIDE + 1) * p", "OUTSIDE * p", OUTSIDE),
    Mutant("words outside a list have the whole of a mixture", "drift_gate/call/lists.py", '"mixed": 1 - self.beta}', '"mixed": 1.0}', OUTSIDE),
    Mutant("a gradient that does not sum to 0", "drift_gate/call/lists.py", "torch.where(gamma == 0, 0, gamma * entropy)", "gamma * 0", OUTSIDE),
    Mutant("a teacher that is not renormalised", "drift_gate/call/lists.py", "masked_fill(~present, -math.inf).log_softmax(-1)", "masked_fill(~present, -math.inf)", OUTSIDE),
    Mutant("no slope of the entropy in C", "drift_gate/passes/native/expand.h", "factor * NAME(slope)(z - log_sum, alpha, gamma)", "factor * alpha", OUTSIDE),
    Mutant("rows with gamma alone are blank", "drift_gate/passes/native/expand.h", "(!job->gamma || job->gamma[row] == 0)", "1", OUTSIDE),
    Mutant("no slope of the entropy in the kernel", "kernels/expand.py", "return alpha + gamma * tl.where", "return alpha + 0.0 * tl.where", OUTSIDE, interpreted=True),
    Mutant("a row that is NaN has the say", WALK, "used.abs().nan_to_num_(0.0)", "used.abs()", FOUND_PARTS),
    Mutant("units never move", WALK, "far = (log_mean > before + FAR) | (before == -torch.inf)", "far = before == -torch.inf", LINEAR + " -k however_large"),
    Mutant("sums without the denominator", WALK, "(done.table[WEIGHT] * done.table[COEFFICIENT]).take(row)", "done.table[WEIGHT][row]", LINEAR),
    Mutant("chunks cut blocks", "drift_gate/head/chunks.py", "np.flatnonzero(marks[index] == 2)", "np.flatnonzero(marks[index] > 0)", HEAD_SUMS),
    Mutant("regular blocks end a row late", "drift_gate/head/chunks.py", "ends = [*range(size, length, size), length]", "ends = [*range(size + 1, length, size), length]", HEAD_SUMS),
    Mutant("rows without support are multiplied", WALK, "unread = invalid if unread is None", "unread = None if unread is None", K_HOLES, interpreted=True),
    Mutant("a scalar read by its place", WALK, "found = used.take(row)", "found = used[row]", READS),
    Mutant("rows that are left out keep what memory held", SUMS, "                of_hidden.zero_()  # where rows are left out\n", "                pass\n", "tests/test_head_gradients.py -k memory_held"),
    Mutant("no row, and what memory held", SUMS, "            self.tensors[0].zero_()\n", "", "tests/test_head_gradients.py -k memory_held"),
    Mutant("a chunk is taken for all of the rows", "drift_gate/head/chunk_losses.py", "at.stop - at.start == len(self.like)", "at.start == 0", LINEAR),
    Mutant("first chunk counted twice", SUMS, "self.begun = True", "self.begun = len(hidden) < 2", LINEAR),
    Mutant("lower byte lost", SUMS, "add_(bits.copy_(low), alpha=256)", "add_(bits.copy_(low), alpha=0)", HEAD_SUMS),
    Mutant("truncated to 24 bits", SUMS, "value.view(torch.int32).add_(128)", "value.view(torch.int32).add_(0)", HEAD_SUMS),
    Mutant("slope of the cap forgotten", "drift_gate/head/chunk_losses.py", "uncap(rounded[rows], z[rows], kept, cap)", "pass", LINEAR),
    Mutant("float32 logits made in the head's dtype", LOGITS, "dtype=torch.float32 if head.rule.wide else weight.dtype", "dtype=weight.dtype", WIDE),
    Mutant("words of the head left out", LOGITS, "range(0, len(weight), step)", "range(0, len(weight) - step, step)", WIDE),
    Mutant("bias of float32 logits forgotten", LOGITS, "            z += bias\n", "            pass\n", WIDE),
    Mutant("cap of float32 logits forgotten", LOGITS, "mul_(softcap) if softcap else z\n", "mul_(softcap) if not z.numel() else z\n", WIDE),
    Mutant("float32 gradients of a cap rounded before its slope", LOGITS, "out.copy_(slope.mul_(gradient))", "out.copy_(slope.mul_(gradient.to(out.dtype)))", WIDE + " -k rounded_once"),
    Mutant("float32 logits counted as short ones", CHECK, "only_read = words * (4 if wide", "only_read = words * (2 if wide", WIDE + " -k 'memory or bytes or room'"),
    Mutant("the gradient beside float32 logits not counted", CHECK, "words * weight.itemsize if wide else 0", "0 if wide else 0", WIDE + " -k 'memory or bytes or room'"),
    Mutant("a wide teacher not counted", "drift_gate/losses/linear_full.py", "size = min(inputs", "size = max(inputs", WIDE + " -k wide_teacher"),
    Mutant("rows to come lose their 0", SUMS, "            of_hidden.masked_fill_(untouched, 0)\n", "", FOUND_PARTS),
    Mutant("noise of one rounding in the place of two", "drift_gate/passes/torch/rows.py", ".sqrt() / 3\n", ".sqrt() / 4\n", NOISE),
    Mutant("noise of other words forgotten", "drift_gate/passes/native/gate.h", "own * own + others * others * squares", "own * own + 0 * others * squares", NOISE),
    Mutant("noise without the scale of the logits", "drift_gate/passes/native/gate.h", "ldexp(data->scale, ilogb", "ldexp(1, ilogb", NOISE),
    Mutant("noise in units of another dtype", "kernels/sampled_token.py", "SHARE: tl.constexpr = 2.0**-BITS", "SHARE: tl.constexpr = 2.0**-7", "tests/test_kernels_rows.py -k rounding", interpreted=True),
    Mutant("noise of float32 logits of a head", HANDING, "and not x.rule.wide and", "and", NOISE),
    Mutant("noise of a policy that has not moved", "drift_gate/outputs.py", "0.01 * drift_noise < drift_abs", "0 * drift_noise <= drift_abs", "tests/test_drift_noise.py"),
    Mutant("sparse slope of the cap forgotten", SPARSE, "steep = 1 - (gathered", "steep = 1 - 0 * (gathered", LINEAR),
    Mutant("products of another rank's words", SPARSE, "slope, listed = slope.masked_fill(listed < 0, 0), listed", "slope, listed = slope, listed", SHARDS),
    Mutant("products without the words listed again", SPARSE, ".scatter_add_(1, listed, slope)", ".scatter_(1, listed, slope)", LISTS),
    Mutant("products of rows without a gradient", SPARSE, "in chunks(valid, head", "in chunks(torch.ones_like(valid), head", LISTS),
    Mutant("lists never as products", SPARSE, "return vocab <= WORDS_OF_AN_ENTRY * k", "return vocab < 0 * k", LISTS),
    Mutant("logit scale not in the slope", SPARSE, "slope = beta if scale == 1 else beta * scale", "slope = beta", LINEAR),
    Mutant("rows of words shifted", TORCH_SPARSE, 'rows = order.div(slope.shape[1], rounding_mode="floor")', 'rows = order.div(slope.shape[1], rounding_mode="floor").clamp(max=3)', LINEAR),
    Mutant("upstream gradient forgotten", HANDING, "whole = factor * upstream", "whole = factor * 1", "tests/test_linear_autograd.py -k upstream"),
    Mutant("a second backward allowed", "drift_gate/call/op.py", "ctx.spent = bool(op.hands_out)", "pass", "tests/test_linear_autograd.py -k second_backward"),
    Mutant("coefficients not over the largest", WALK, "return coefficient / _largest(coefficient)", "return coefficient", LINEAR),
    Mutant("gathered head has the gradient's sum", CHECK, 'Partial("avg")', 'Partial("sum")', "tests/test_linear_sharded.py"),
    # gate
    Mutant("unit mean over all rows", ROWS, "g.sum() / count.sum()", "g.mean() / 1.0 #", GATE),
    Mutant("max not shifted", ROWS, "-tau * (a - masked.min())", "-tau * a", GATE),
    Mutant("sequence mean over the batch", ROWS, 'groups.reduce(g, "sum")', "g.sum()", GATE),
    Mutant("sign of tau", ROWS, "torch.exp(-gate.tau * a)", "torch.exp(gate.tau * a)", GATE),
    Mutant("drift has the other sign", ROWS, "else old - now", "else now - old", GATE),
    Mutant("absolute value forgotten", ROWS, "return layout.mean(drift, units, measured).abs()", "return layout.mean(drift, units, measured)", GATE),
    Mutant("mean_abs without abs", ROWS, "return layout.mean(drift.abs(), units, measured)", "return layout.mean(drift, units, measured)", GATE),
    Mutant("rms without root", ROWS, "units, measured).sqrt()", "units, measured)", GATE),
    Mutant("rms not in units of the largest", ROWS, "(drift / unit).square()", "drift.square()", GATE),
    Mutant("block border off by one", BLOCKS, "(self.rows - self.first(self.sequences)) // self.block_size", "(self.rows - self.first(self.sequences) + 1) // self.block_size", GATE),
    Mutant("blocks from the sequence's start", BLOCKS, "(self.rows - self.first(self.sequences)) // self.block_size", "(self.rows - self.sequence) // self.block_size", GATE),
    Mutant("blocks cross sequences", BLOCKS, "(s[1:] != s[:-1]) | (i[1:] != i[:-1])", "i[1:] != i[:-1]", GATE),
    Mutant("masked rows counted", BLOCKS, 'units.reduce(rows.to(x.dtype), "sum")', 'units.reduce(torch.ones_like(x), "sum")', GATE),
    Mutant("a border belongs to the sequence before", BLOCKS, "torch.searchsorted(borders, rows, right=True) - 1", "torch.searchsorted(borders, rows) - 1", GATE),
    Mutant("weights of invalid rows", ROWS, "return torch.where(valid, g / mean, 0)", "return g / mean + (~valid) * 1e-3", GATE),
    Mutant("gate_ess over all rows", ROWS, "total / square * total * over", "total / square * total / len(weight)", GATE),
    # at which positions the drift is measured
    Mutant("measured from the second row on", ROWS, "(units.ranks(data.valid) % gate.sample_every == 0)", "(units.ranks(data.valid) % gate.sample_every == 1)", SAMPLING),
    Mutant("masked rows counted among s", BLOCKS, "on = rows[self.order].long()", "on = torch.ones_like(self.order)", SAMPLING),
    Mutant("drifts not measured read", ROWS, "        drift = torch.where(measured, drift, 0)\n", "        pass\n", SAMPLING),
    Mutant("drift metrics over all rows", ROWS, "over_drifts = 1 / found.measured.sum()", "over_drifts = 1 / valid.sum()", SAMPLING),
    Mutant("drift shown where not measured", ROWS, "return found.drift.masked_fill(valid & ~found.measured, torch.nan)", "return found.drift", SAMPLING),
    Mutant("each rank counts for itself", "drift_gate/call/weighing.py", "    if rows.context:\n        every, _, at", "    if not rows:\n        every, _, at", SAMPLING),
    Mutant("a rank's metrics over all rows", "drift_gate/call/weighing.py", "data = data._replace(measured=measured)", "pass", SAMPLING),
    Mutant("all rows in the product", "drift_gate/losses/linear_topk.py", "read, most = measured, most_measured", "read, most = valid, most_measured", SAMPLING),
    Mutant("lists of rows not measured lost", "drift_gate/losses/linear_topk.py", "torch.where(measured[:, None], scores, listed_others)", "scores", SAMPLING),
    Mutant("rows not measured read whole", "drift_gate/losses/topk.py", "valid if measured is None else measured,", "valid,", SAMPLING),
    Mutant("log-probs 0 where not known", "drift_gate/losses/topk.py", "return x.masked_fill(rows, torch.nan) if len(x) else x", "return x", SAMPLING),
    Mutant("student mass over all rows", "drift_gate/call/lists.py", "over = read.sum().clamp(min=1)", "over = tokens.clamp(min=1)", SAMPLING),
    # position losses
    Mutant("clip bounds swapped", ROWS, "ratio.clamp(1 - rule.low, 1 + rule.high)", "ratio.clamp(1 - rule.high, 1 + rule.low)", OPD),
    Mutant("dual clip for gains", ROWS, "(advantage < 0) & (loss > ceiling)", "loss > ceiling", OPD),
    Mutant("slope through the clip", ROWS, "torch.where(clipped | dual, 0, slope)", "torch.where(dual, 0, slope)", OPD),
    Mutant("slope through the dual clip", ROWS, "torch.where(clipped | dual, 0, slope)", "torch.where(clipped, 0, slope)", OPD),
    Mutant("minimum for maximum", ROWS, "loss = torch.maximum(loss, held)", "loss = torch.minimum(loss, held)", OPD),
    Mutant("slope beyond the clamp at 20", ROWS, "torch.where(log_ratio.abs() > 20, 0, loss)", "loss", OPD + " tests/test_limits.py"),
    Mutant("advantage's sign", ROWS, 'target - (found.old if rule.advantage == "old" else found.now)', '(found.old if rule.advantage == "old" else found.now) - target', OPD),
    Mutant("advantage clip on one side", ROWS, "advantage.clamp(rule.advantage_low, rule.advantage_high)", "advantage.clamp(max=rule.advantage_high)", OPD),
    Mutant("k2 doubled", ROWS, "0.5 * log_ratio.square(), log_ratio", "log_ratio.square(), log_ratio", OPD),
    Mutant("k3's slope's sign", ROWS, "(loss > 10), 0, -growth)", "(loss > 10), 0, growth)", OPD),
    Mutant("k3 not clamped", ROWS, "loss.clamp(max=10), slope", "loss, slope", OPD),
    Mutant("token mean over all rows", ROWS, "    size = tokens\n", "    size = torch.full_like(tokens, len(valid))\n", OPD),
    Mutant("sequences that have no row counted", ROWS, "begins = valid & (layout.rows == layout.first(layout.sequences))", "begins = layout.rows == layout.sequence", OPD),
    Mutant("weight twice in the slope", ROWS, "slope = torch.where(counts, weight * slope, 0)", "slope = torch.where(counts, weight * weight * slope, 0)", OPD),
    Mutant("ppo_kl not clamped", ROWS, "drift.clamp(-20, 20).sum() * over", "drift.sum() * over", OPD),
    Mutant("gradient of more than the loss", "drift_gate/call/gradients.py", "weight = coefficient * of_loss", "weight = (coefficient + 0.01) * of_loss", OPD),
    Mutant("per-token gradient dropped", "drift_gate/call/gradients.py", "(weight if of_token is None else weight + of_token)", "weight", OPD),
    # vocabulary passes
    Mutant("temperature applied twice", PASS, "else z.mul_(scale)", "else z.mul_(scale * scale)", PASSES),
    Mutant("rows of the first sequence", PASS, "on[i : i + count] + b * length", "on[i : i + count]", PASSES),
    Mutant("mask dropped in scan", PASS, "for b, rows, at in walk(x, valid, len(first)):", "for b, rows, at in walk(x, None, len(first)):", PASSES),
    Mutant("alpha and beta swapped", PASS, "a * p + beta)", "beta * p + a)", PASSES),
    Mutant("duplicates not summed", PASS, "beta = _sum_duplicates(ids, beta)", "pass", f"{TOPK} tests/test_ops.py"),
    Mutant("scale missing in the gradient", PASS, "torch.where(a == 0, beta, value).mul_(scale)", "torch.where(a == 0, beta, value)", PASSES),
    Mutant("rows without gradient not zeroed", PASS, "    zero(y, ~active)\n", "    pass\n", PASSES),
    Mutant("ids of invalid rows written", PASS, "(listed if valid is None else listed & valid[:, None])", "(listed)", "tests/test_ops.py -k 'expand or opcheck'"),
    Mutant("entropy's sign", PASS, "entropy[at] = total.log() - mean", "entropy[at] = total.log() + mean", PASSES),
    Mutant("not shifted by the maximum", PASS, "        z.sub_(top[:, None])\n", "        pass\n", PASSES),
    Mutant("lse's gradient dropped", "drift_gate/losses/log_probs.py", "torch.zeros_like(maximum) if of_lse is None else of_lse.reshape(-1)", "torch.zeros_like(maximum)", PASSES),
    # the likeliest words
    Mutant("the last of the words at the border", TORCH_SELECT, "word + vocab, word + 2 * vocab", "2 * vocab - 1 - word, word + 2 * vocab", SELECT),
    Mutant("words without mass listed", TORCH_SELECT, ".masked_fill_(values == -torch.inf, NOTHING)", "", SELECT),
    Mutant("lists by id", TORCH_SELECT, "x.gather(1, ids).sort(descending=True, stable=True)", "(x.gather(1, ids), torch.arange(k).expand_as(ids))", SELECT),
    Mutant("log-probs not scaled", WORDS, ".mul_(scale).sub_(log_sum", ".sub_(log_sum", SELECT),
    Mutant("a row without mass has no words", WORDS, "undefined = ~log_sum.isfinite()", "undefined = log_sum.isnan()", SELECT),
    Mutant("words of a shard from 0", WORDS, "ids + shard.first)", "ids)", SHARDS),
    Mutant("a shard's share not scaled", WORDS, "torch.exp((every[:, :, 0] - shift) * scale +", "torch.exp((every[:, :, 0] - shift) +", SHARDS),
    Mutant("rows of no shard without a softmax", WORDS, "torch.where(top == -torch.inf, every[:, :, -1].sum(0), share.sum(0).log())", "share.sum(0).log()", SHARDS),
    Mutant("scale of a head forgotten", "drift_gate/head/select.py", "None, head.rule.scale)", "None, 1.0)", SELECT),
    # top K and full
    Mutant("teacher and student swapped in the mixture", TORCH_TOPK, "m = beta * q + (1 - beta) * p", "m = beta * p + (1 - beta) * q", TOPK),
    Mutant("renormalised slope without its mean", TORCH_TOPK, "slope = g - p * g.sum(-1, keepdim=True)", "slope = g", TOPK),
    Mutant("the tail's slope dropped", TORCH_TOPK, "torch.where(rest < eps, 0, g_tail / p_tail + c)", "0 * p_tail", TOPK),
    Mutant("missing entries present", TORCH_TOPK, "(ids != MISSING) & (teacher != -torch.inf)", "(ids != MISSING)", TOPK),
    Mutant("reverse is forward", DIVERGENCE, '_kl(u, v, direction == "reverse", rest[0]', '_kl(u, v, direction == "forward", rest[0]', FULL),
    Mutant("jsd's weights swapped", DIVERGENCE, "loss = (1 - beta) * divergence + beta *", "loss = beta * divergence + (1 - beta) *", FULL),
    Mutant("jsd's gradient not weighed", DIVERGENCE, "factor[at] * (1 - beta)", "factor[at]", FULL),
    Mutant("the centre forgotten", DIVERGENCE, ".sub_(centre[at])", "", FULL),
    Mutant("reverse's mean without the difference of the log-sums", DIVERGENCE, "wide(centre) + (log_sum - teacher_log_sum)", "wide(centre)", FULL),
    Mutant("absent words not clamped", DIVERGENCE, ".clamp_(min=LOWEST)", "", FULL),
    Mutant("padding words keep what was there", DIVERGENCE, "    out.detach()[..., words:].zero_()\n", "    pass\n", FULL),
    # trainers
    Mutant("verl's importance weights lost", "drift_gate/integrations/verl.py", "weights = weights * rollout_is_weights", "pass", "tests/test_verl_policy.py -k package"),
    Mutant("vLLM's importance weights lost", "drift_gate/integrations/trl.py", 'inputs.get("row_weights")', "None", "tests/test_trl_options.py -k weigh"),
    Mutant("vLLM's importance ratios not bounded", "drift_gate/integrations/vllm_samples.py", ".clamp(max=largest)", "", "tests/test_trl_options.py -k importance_weights_of"),
    Mutant("a mixed divergence of TRL's is the JSD", "drift_gate/integrations/trl.py", '"direction": args.direction', '"direction": "jsd"', "tests/test_trl_options.py -k mixed"),
    # arguments, reduction and spans
    Mutant("dp_size ignored", CALL, "factor, divisor, denominator = float(dp_size), None", "factor, divisor, denominator = 1.0, None", OPD),
    Mutant("loss_scale_factor ignored", CALL, "return float(factor)", "return float(length or 1)", OPD),
    Mutant("T of a rank's part", CALL, "max(length * (size_of(ranks.context) if ranks.context else 1), 1)", "max(length, 1)", FOUND_PARTS),
    Mutant("1 and True are one option", "drift_gate/call/arguments.py", "typed=True", "typed=False", "tests/test_remembered.py"),
    Mutant("1 and True are one bound", "drift_gate/call/arguments.py", " and tuple not in map(type, options)", "", "tests/test_remembered.py"),
    Mutant("options are remembered where a call is traced", "drift_gate/call/arguments.py", "not torch.compiler.is_compiling() and ", "", "tests/test_remembered.py"),
    Mutant("options are remembered without end", "drift_gate/call/arguments.py", "maxsize=256", "maxsize=None", "tests/test_remembered.py"),
    Mutant("a clip's lower bound is forgotten by the rule that is kept", "drift_gate/call/sampled.py", "estimator, clip.low, clip.high,", "estimator, clip.high, clip.high,", "tests/test_remembered.py"),
    Mutant("the reference of shards", "drift_gate/passes/backends.py", 'if backend == "reference" and sharded:', "if False:", f"{SHARDS} -k disagree"),
    Mutant("row data left strided", "drift_gate/call/arguments.py", "return x if x.is_contiguous() else x.contiguous()", "return x", ARGUMENTS + " tests/test_limits.py"),
    Mutant("short rest kept", "drift_gate/spans.py", "if rest and joined:", "if rest > min_length and joined:", SPANS),
    Mutant("pieces not evened out", "drift_gate/spans.py", "if pieces and rest < min_length:", "if False:", SPANS),
    Mutant("micro-batches not weighed by tokens", "drift_gate/losses/accumulation.py", "everyone.tokens * _quotient", "_quotient", MICRO),
    Mutant("a mean gate far above the first", "drift_gate/losses/accumulation.py", "if distance > FURTHEST:", "if False:", MICRO + " -k far_above"),
    Mutant("a micro-batch that weighs nothing measures", "drift_gate/losses/accumulation.py", " & (first.peak != -torch.inf)", "", MICRO + " -k every_drift_is_infinite"),
    Mutant("infinite drifts of a part", ROWS, "        a = a.clamp(max=LARGEST_DRIFT)\n", "        pass\n", FOUND_PARTS),
    Mutant("infinite drifts of a head's part", WALK, "gate._replace(granularity=granularity, part=True)", "gate._replace(granularity=granularity)", LINEAR + " -k however_large"),
    Mutant("mean gate of the first kept", "drift_gate/losses/accumulation.py", "self._tokens / self._gates", "1.0", MICRO),
    Mutant("first denominator kept", "drift_gate/losses/accumulation.py", "self._reference.size / self._size", "1.0", MICRO),
    Mutant("an empty first micro-batch measures", "drift_gate/losses/accumulation.py", "torch.where(measures, a, b)", "a", MICRO + " -k without_rows"),
    Mutant("nothing forgotten after a step", "drift_gate/losses/accumulation.py", "        self.reset()\n        return loss", "        return loss", MICRO + " -k begins_anew"),
    Mutant("a sum with another loss is not seen", "drift_gate/losses/watch.py", "watch.summed_with(leaves)", "pass", OTHERS),
    Mutant("another backward is not seen", "drift_gate/losses/watch.py", "not watch.running", "False", OTHERS),
    Mutant("every backward is another", "drift_gate/losses/watch.py", "self.running += 1", "self.running += 0", OTHERS),
    Mutant("a backward without end", "drift_gate/losses/watch.py", "self.running -= 1", "pass", OTHERS),
    Mutant("gradients of before are not seen", "drift_gate/losses/watch.py", " and leaf.grad.any()", " and False", OTHERS + " -k there_before"),
    Mutant("parameters that no loss reaches", "drift_gate/losses/watch.py", "name not in self._reached and", "False and", OTHERS),
    Mutant("hooks are left behind", "drift_gate/losses/watch.py", "hooks.pop().remove()", "hooks.pop()", OTHERS + " -k no_hook"),
    Mutant("two normalisers are one", "drift_gate/losses/watch.py", "if len(watches) > 1:", "if False:", OTHERS + " -k two_normalisers"),
    Mutant("mean gate inverted", "drift_gate/parallel/scope.py", "torch.exp(call.log_quotient(everyone))", "torch.exp(everyone.log_quotient(call))", RANKS),
    Mutant("ranks not weighed by tokens", "drift_gate/parallel/scope.py", "log_means + tokens.log()", "log_means", RANKS + " tests/test_micro_batches.py"),
    Mutant("a rank's own denominator", "drift_gate/parallel/scope.py", "    if counted:\n", "    if False:\n", RANKS),
    Mutant("per-token losses by the rank's gate", "drift_gate/call/finishing.py", "rescaled(output.token_loss, gate, valid)", "output.token_loss", MICRO),
    Mutant("a mean gate of no rows", "drift_gate/parallel/scope.py", "torch.where(self.tokens > 0, between, 0)", "between", MICRO + " -k without_rows"),
    Mutant("invalid rows of a part not 0", "drift_gate/parallel/scope.py", "torch.where(valid, x * factor.to(x.dtype), 0)", "x * factor.to(x.dtype)", FOUND_PARTS),
    Mutant("blocks from position 0", "drift_gate/parallel/sequences.py", "(position - first) // gate.block_size", "position // gate.block_size", RANKS),
    Mutant("another rank's rows", "drift_gate/parallel/sequences.py", "first = n * rank_in(context.group)", "first = 0", RANKS),
    Mutant("span ids as numbers", "drift_gate/parallel/sequences.py", "        return x.long()\n", "        return x.double().long()\n", FOUND_PARTS),
    Mutant("an option that ranks are not told", "drift_gate/losses/full.py", "                teacher_temperature=teacher_temperature,\n                vocab_size=vocab,", "                vocab_size=vocab,", "tests/test_rank_options.py"),
    Mutant("numbers of other types are others", "drift_gate/parallel/agreement.py", "value = float(value)", "pass", "tests/test_rank_options.py"),
    Mutant("a group is met again in vain", "drift_gate/parallel/agreement.py", "heard |= {group} if found else set()", "pass", "tests/test_rank_options.py -k position_ids"),
    Mutant("shards not shifted", WORDS, "(maximum - shift) + log_sum", "log_sum", SHARDS),
    Mutant("every shard has every word", WORDS, "torch.where(local < 0, 0, gathered)]", "gathered]", SHARDS),
    Mutant("entropy of a shard", WORDS, "(log_sum - entropy) + (maximum - shift)", "log_sum - entropy", SHARDS),
    Mutant("words counted from 0", WORDS, "local = ids - shard.first", "local = ids", SHARDS),
    Mutant("hidden states' gradient of one shard", "drift_gate/parallel/ranks.py", "return sum_ranks(wide, group).to(grad.dtype)", "return grad", SHARDS),
    Mutant("block numbers from 1", "drift_gate/call/weighing.py", "number = begins.cumsum(0) - 1", "number = begins.cumsum(0)", GATE),
]  # fmt: skip


def _native(name: str, file: str, old: str, new: str, nth: int = 0, tests: str = NATIVE) -> Mutant:
    return Mutant(f"native: {name}", f"drift_gate/passes/native/{file}", old, new, tests, nth)


def _native_rows(name: str, file: str, old: str, new: str, nth: int = 0) -> Mutant:
    return _native(name, file, old, new, nth, NATIVE_ROWS)


def _native_topk(name: str, file: str, old: str, new: str, nth: int = 0) -> Mutant:
    return _native(name, file, old, new, nth, NATIVE_TOPK)


def _native_select(name: str, file: str, old: str, new: str, nth: int = 0) -> Mutant:
    return _native(name, file, old, new, nth, NATIVE_SELECT)


C = [
    _native("a word's last entry forgotten", "words.h", "e < job->starts[word + 1]; e++", "e + 1 < job->starts[word + 1]; e++"),
    _native("entries of a word not summed", "words.h", "sum[i] += tile[i];", "sum[i] = tile[i];"),
    _native("words begin where they end", "order.h", "job->starts[word] = next[word];", "job->starts[word] = next[word + 1];"),
    _native("entries in reverse", "order.h", "++] = e;", "++] = job->entries - 1 - e;"),
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
    _native("NaN clamped", "tiles.h", "x < LOWEST ? LOWEST : x", "x > LOWEST ? x : LOWEST", tests="tests/test_full_loss_special.py -k nan_and_infinite"),
    _native("a tile's sums not moved", "sums.h", "factor * a.sum,", "a.sum,"),
    _native("a tile's mean not moved", "sums.h", "(a.mean + by * a.sum)", "a.mean"),
    _native("a tile's moment not moved", "sums.h", "a.moment + (by - other_by) * a.u.sum", "a.moment"),
    _native("a word that the other lacks", "sums.h", "if (all.missing && loss == loss)", "if (all.missing > 1)", tests="tests/test_full_loss_special.py -k minus_infinity"),
    _native("jsd's weights swapped", "sums.h", "(1 - beta) * divergence + beta * other_divergence", "beta * divergence + (1 - beta) * other_divergence"),
    _native("jsd's slope not weighed", "sums.h", "factor *= 1 - beta, ", ""),
    _native("jsd's mixture by the wrong ratio", "sums.h", "mass_ratio(log_sum, other_log_sum);", "mass_ratio(other_log_sum, log_sum);"),
    _native("reverse's centre without log-sums", "sums.h", "centre += (double)log_sum - other_log_sum;", ";"),
    _native("the other model's entropy", "sums.h", "a.other_entropy, a.entropy}", "a.entropy, a.other_entropy}"),
    _native("the centre forgotten", "divergence.h", "(a - log_m - centre)", "(a - log_m)"),
    _native("forward's factors swapped", "divergence.h", "* factor - NAME(exp)(v[i] - other_top) * other_factor", "* other_factor - NAME(exp)(v[i] - other_top) * factor"),
    _native("the last tile dropped", "tiles.h", "for (int64_t at = 0; at < vocab; at += TILE)", "for (int64_t at = 0; at < vocab - 1; at += TILE)"),
    _native("a word beyond the row written", "tiles.h", "memcpy((float *)out.data + first, tile, (size_t)n", "memcpy((float *)out.data + first, tile, (size_t)(n + 1)", tests=GUARDED),
    _native("zeros beyond the row", "jobs.h", "(size_t)((next - row) * words * size)", "(size_t)((next - row) * words * size + 1)", tests=GUARDED),
    _native("zeros over rows between", "jobs.h", "start(out, next) == start(out, next - 1) + words", "1"),
    _native("words that the teacher lacks left alone", "divergence.h", "zero_rows(job->out, row, next, job->vocab, job->all_words);", ";"),
    _native("invalid rows keep their entries", "expand.h", "if (!job->valid || job->valid[row])", "if (1)"),
    _native("blank rows without entries", "expand.h", "for (; row < next; row++)", "for (row = next - 1; row < next; row++)"),
    _native("entries without alpha lose the scale", "expand.h", "room.value[k] = room.sum[k] * (float)job->scale", "room.value[k] = room.sum[k]", tests=LISTED),
    _native("a label's log-prob is its logit", "scan.h", "job->of_labels[row] - found.maximum - found.log_sum", "job->of_labels[row]", tests=LISTED),
    _native("p - 1 for expm1", "expand.h", "alpha * expm1(log_p)", "alpha * (p - 1)"),
    _native("the last of the betas of a word alone", "expand.h", "room.sum[owner] += room.sum[k]", "room.sum[owner] = room.sum[k]"),
    _native("one id beyond the last word", "scan.h", "id >= job->vocab", "id > job->vocab", tests=GUARDED),
    _native("a label beyond the teacher's words", "divergence.h", "label >= job->vocab", "label > job->vocab", tests=GUARDED),
    _native("an entry beyond the words written", "expand.h", "id < job->vocab", "id <= job->vocab", tests=GUARDED),
    _native("a word's owner is the first entry", "lists.h", "*place = begin + k;", "*place = begin;", tests=LISTED),
    _native("a word listed again is overwritten", "expand.h", "again = 1;", "again = 0;", tests=LISTED),
    _native("a table that loses entries", "lists.h", "slot = (slot + 1) & last", "slot = slot & last, of.slots[slot] = 0"),
    _native("rows between tasks left out", "rows.c", "rows - first < size ? rows : first + size", "rows - first < size ? rows : first + size - 1"),
    _native_select("zeros of both signs apart", "candidates.h", "logit = logit == 0 ? 0 : logit;", ";"),
    _native_select("negative logits the wrong way round", "candidates.h", "u = u >> 31 ? ~u : u | 0x80000000u;", "u = u | 0x80000000u;"),
    _native_select("a border above its word", "candidates.h", "logit_of(x[last])", "logit_of(x[0])"),
    _native_select("candidates not divided", "candidates.h", "high = j;", "break;"),
    _native("the room left unsorted", "candidates.h", "if (all->count > all->most)", "if (0)", tests=f"{GUARDS} {SELECT}"),
    _native_select("sums of logits without the scale", "select.h", "tile[i] *= scale;", ";"),
    _native_select("invalid rows listed", "select.h", "job->valid && !job->valid[row] ? 0 : job->vocab", "job->vocab"),
    _native_select("words counted in their tile", "select.h", "at + i + lane[f]", "i + lane[f]"),
    _native_rows("ignored labels valid", "valid.h", "in && !(job->labels && label == job->ignore_index)", "in"),
    _native_rows("masks of halves unchecked", "valid.h", "kind == MASK_FLOAT16 ? 0x3c00 : 0x3f80", "kind == MASK_FLOAT16 ? 0x3800 : 0x3f80"),
    _native_rows("borders that fall", "valid.h", "if (id_at(borders, wide, i) < id_at(borders, wide, i - 1))", "if (0)"),
    _native_rows("drift the wrong way round", "blocks.h", "(double)data->old[row] - data->now[row]", "(double)data->now[row] - data->old[row]"),
    _native_rows("blocks from the first row of all", "blocks.h", "(row - start) / rule->block_size == (before - start)", "row / rule->block_size == before"),
    _native_rows("spans that must be adjacent", "blocks.h", "owner == row - start ? new : found->of[start + owner]", "new"),
    _native_rows("the mean of squares for its root", "blocks.h", "sqrt(found->size[b] / found->drifts[b])", "found->size[b] / found->drifts[b]"),
    _native_rows("every s-th row of the batch measured", "blocks.h", "(int64_t)blocks.rows[block] % job->every == 0", "row % job->every == 0"),
    _native_rows("a mean over rows not measured", "blocks.h", "fabs(found->sum[b] / found->drifts[b])", "fabs(found->sum[b] / found->rows[b])"),
    _native_rows("a ratio of measured rows", "finish.h", "    whole.measured = NULL;\n", ""),
    _native_rows("the gate's blocks for those of a ratio", "finish.h", "(units.granularity != gate->granularity || job->data.measured)", "units.granularity != gate->granularity"),
    _native_rows("NaN forgotten by the largest", "blocks.h", "b > a || b != b ? b : a", "b > a ? b : a"),
    _native_rows("NaN forgotten by the smallest", "blocks.h", "b < a || b != b ? b : a", "b < a ? b : a"),
    _native_rows("a mean of blocks, not of rows", "gate.h", "total += found->rows[b] * found->weight[b], rows += found->rows[b]", "total += found->weight[b], rows += 1"),
    _native_rows("infinite drifts of a part not held", "gate.h", "if (held && found->size[b] > LARGEST_DRIFT)", "if (0)"),
    _native_rows("a peak where no row weighs", "gate.h", "none_weigh ? -INFINITY : ", ""),
    _native_rows("gates without a shift", "gate.h", "found->size[b] - lowest", "found->size[b]"),
    _native_rows("effective rows of squares", "finish.h", "weight_of(job, plan, row) / unit", "weight_of(job, plan, row)"),
    _native_rows("dual clip of every advantage", "position.h", "advantage < 0 && loss > ceiling", "loss > ceiling"),
    _native_rows("slope of a clipped ratio", "position.h", "clipped || dual ? 0 : slope", "dual ? 0 : slope"),
    _native_rows("slope beyond a ratio of exp(20)", "position.h", "fabs(log_ratio) > 20 ? 0 : loss", "loss"),
    _native_rows("cispo without its log-prob", "position.h", "-within * advantage * now,", "-within * advantage,"),
    _native_rows("k3 always clamped", "position.h", "rule->clamp ? clamped(-log_ratio, -20, 20) : -log_ratio", "clamped(-log_ratio, -20, 20)"),
    _native_rows("k3's slope beyond its bound", "position.h", "fabs(log_ratio) > 20 || loss > 10", "fabs(log_ratio) > 20"),
    _native_rows("the current advantage from old", "position.h", "advantage = target - now", "advantage = target - old"),
    _native_rows("a ratio of the token's own", "finish.h", "if (job->position.ratio == TOKEN)", "if (1)"),
    _native_rows("ratios of the gate's blocks", "finish.h", "plan->own_units = job->loss &&", "plan->own_units = 0 && job->loss &&"),
    _native_rows("row weights change the gate", "finish.h", "job->weight[row] = (float)weight", "job->weight[row] = (float)(weight * (job->row_weights ? job->row_weights[row] : 1))"),
    _native_rows("NaN in rows of weight 0", "finish.h", "by == 0 ? 0 : by * weight * found.loss", "by * weight * found.loss"),
    _native_rows("sequences without valid rows counted", "finish.h", "all->sequences += block > before", "all->sequences += 1"),
    _native_topk("a word counted again", "support.h", "here = !(seen[id >> 6] & bit);", "here = 1;"),
    _native_topk("words of the row before", "support.h", "seen[id >> 6] = 0;", ";"),
    _native_topk("the last row listed twice", "support.h", "value < found &&", "value > 0 &&"),
    _native_topk("entries that do not count", "topk.h", "present[i] ? from[i] : -INFINITY", "from[i]"),
    _native_topk("tails by float32's exponentials", "topk.h", "support == TAIL), 0}", "0), 0}"),
    _native_topk("masses that meet none finite", "topk_sums.h", "return lacks && loss == loss ? INFINITY : loss", "return loss + 0 * lacks"),
    _native_topk("the held tail has a slope", "topk_sums.h", "if (!rest.held)", "if (1)"),
    _native_topk("the JSD's held tail has a slope", "topk_sums.h", "if (!rest.held)", "if (1)", 1),
    _native_topk("the constant of the reverse's slope", "topk_sums.h", "double shift = 1,", "double shift = 0,"),
    _native_topk("mixed weights swapped", "topk_sums.h", "{1 - beta, 0, beta}", "{beta, 0, 1 - beta}"),
    _native_topk("digits of the logarithm near 1", "arithmetic.h", "+ (x - (y - 1.0f)) / y", ""),
    _native_topk("digits of expm1 near 0", "arithmetic.h", "power * NAME(growth)(of.r) + (power - 1.0f)", "power * (NAME(growth)(of.r) + 1.0f) - 1.0f"),
    _native_topk("exponentials of large logits", "arithmetic.h", "return x > 88.72284f ? INFINITY : p;", "return x > 80.0f ? INFINITY : p;"),
]  # fmt: skip


def _kernel(name: str, file: str, old: str, new: str, tests: str, nth: int = 0) -> Mutant:
    return Mutant(f"kernel: {name}", f"kernels/{file}.py", old, new, tests, nth, True)


KERNELS = [
    _kernel("sum not rescaled", "scan", "total *= carry", "total *= 1.0", K_SCAN),
    _kernel("lanes not rescaled", "scan", "tl.sum(total * carry, 0)", "tl.sum(total, 0)", K_SCAN),
    _kernel("tail mask off by one", "scan", "rest = vocab + shift - full * TILE", "rest = vocab + shift - full * TILE + 1", K_SCAN + " -k borders"),
    _kernel("first tile's mask dropped", "scan", "load_lanes(pointers, word, shift, vocab + shift", "load_lanes(pointers, word, 0, vocab + shift", K_SCAN),
    _kernel("label's bound dropped", "scan", "(column >= 0) & (column < vocab) & live", "live", K_SCAN),
    _kernel("a split's last tile dropped", "scan", "last = (split + 1) * tiles // SPLITS", "last = (split + 1) * (tiles - 1) // SPLITS", K_SCAN + " -k shared"),
    _kernel("invalid rows are read", "scan", "last = tl.where(live, last, first)", "", K_ROWS),
    _kernel("batch stride for rows", "scan", "(row % length) * stride_row", "(row % length) * stride_batch", K_SCAN + " -k strides"),
    _kernel("max of an empty lane", "lanes", 'shift = tl.where(new == -float("inf"), 0.0, new)', "shift = new", K_SCAN + " -k infinities"),
    _kernel("a bound of the largest alone", "select", "tl.where(tl.sum((key >= raised).to(tl.int32)) >= K,", "tl.where(tl.sum((key >= raised).to(tl.int32)) >= 1,", K_SELECT),
    _kernel("one of the equal logits left out", "select", "equal + tl.cumsum(same, 0) <= K", "equal + tl.cumsum(same, 0) < K", K_SELECT),
    _kernel("zeros of both signs apart", "select", "tl.where(x == 0, 0.0, x)", "x", K_SELECT),
    _kernel("lists from their end", "select", "others[None, :] > number[:, None]", "others[None, :] < number[:, None]", K_SELECT),
    _kernel("ids from a boundary of 16 bytes", "select", "tl.reshape(at, [DOWN * ACROSS]) - shift, CAPACITY", "tl.reshape(at, [DOWN * ACROSS]), CAPACITY", K_SELECT),
    _kernel("sums of lanes as if their maxima never moved", "select", "total = total * tl.exp2(delta * scale_log2) +", "total = total +", K_SELECT),
    _kernel("more columns than are kept forgotten", "select", "kept = tl.where(count > CAPACITY, count, 0)", "kept = 0", K_SELECT + " -k more_equal"),
    _kernel("invalid rows listed", "select", "for tile in range(tl.where(live, (vocab + shift + BLOCK - 1) // BLOCK, 0)):", "for tile in range((vocab + shift + BLOCK - 1) // BLOCK):", K_SELECT),
    _kernel("scale missing in the gradient", "expand", "tl.where(alpha == 0.0, b, g) * scale", "tl.where(alpha == 0.0, b, g)", K_SCAN),
    _kernel("alpha's sign", "expand", "g = (alpha * scale) * tl.exp2", "g = (-alpha * scale) * tl.exp2", K_SCAN),
    _kernel("target a column late", "expand", "is_target = start + lane == target_column", "is_target = start + lane == target_column + 1", K_SCAN),
    _kernel("writes beyond the row", "expand", "mask = (start + lane >= shift) & (start + lane < vocab + shift)", "mask = start + lane < vocab + shift", K_SCAN + " -k borders"),
    _kernel("duplicates get one beta", "expand", "same = column[:, None] == peer[None, :]", "same = k[:, None] == j[None, :]", K_SCAN),
    _kernel("expm1 of another point", "common", "y = 1.0 + x * y * (1.0 / 2.0)", "y = 1.0 + x * y * (1.0 / 3.0)", K_SCAN + " -k likely"),
    _kernel("block border off by one", "blocks", "tl.where(opening == FAR_, end, opening + block * size)", "tl.where(opening == FAR_, end, opening + block * size + 1)", K_ROWS),
    _kernel("each tile of a block counts anew", "measured", "rank = before + tl.cumsum", "rank = tl.cumsum", K_MEASURED),
    _kernel("drifts not measured in a block", "blocks", "measure(d, seen, 0, AGGREGATE)", "measure(d, live, 0, AGGREGATE)", K_MEASURED),
    _kernel("a mean over rows not measured", "blocks", "aggregated(total, largest, drifts, AGGREGATE)", "aggregated(total, largest, count, AGGREGATE)", K_MEASURED),
    _kernel("drifts not measured in a span", "spans", "            seen &= (tl.load(rows + 2 * n_rows + place, mask=inside, other=0) != 0)[None, :]\n", "            pass\n", K_MEASURED),
    _kernel("a span's ends not measured", "spans", "        seen = tl.load(measured + row, mask=live, other=0) != 0\n", "", K_MEASURED),
    _kernel("ratio of measured rows", "rows", 'measured if step.options["GATE"] else None', "measured", K_MEASURED),
    _kernel("drift metrics over all rows", "row_sums", "over_drifts = 1.0 / tl.maximum(seen, 1.0)", "pass", K_MEASURED),
    _kernel("spans cross ids", "spans", "mask=inside, other=0)[None, :] == id[:, None]", "mask=inside, other=0)[None, :] <= id[:, None]", K_ROWS),
    _kernel("NaN drift dropped", "aggregates", "total = tl.sum(tl.where(size == size, 0.0, size), AXIS)", "total = tl.sum(tl.where(size == size, 0.0, 0.0), AXIS)", K_ROWS),
    _kernel("rms of large drifts", "aggregates", 'tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)', "tl.where(largest > 0.0, 1.0, 1.0)", "tests/test_kernels_opd.py -k 'however_large and rms'"),
    _kernel("drift not shifted", "sampled_token", "            weight = tl.exp(-tau * (a - lowest)) / mean", "            weight = tl.exp(-tau * a) / mean", K_ROWS),
    _kernel("mean over all rows", "sampled_token", "tl.sum(total, 0) / tl.maximum(n_valid.to(tl.float32), 1.0)", "tl.sum(total, 0) / (n_valid + 1)", K_ROWS),
    _kernel("dual clip dropped", "position", "        loss = tl.where(over, ceiling, loss)\n", "", K_ROWS),
    _kernel("slope through the clip", "position", "slope = tl.where(clipped, 0.0, slope)", "slope = slope + 0.0", "tests/test_kernels_opd.py -k test_estimators"),
    _kernel("slope not weighed", "sampled_token", "slope = tl.where(live, weight * slope, 0.0)", "slope = tl.where(live, slope, 0.0)", "tests/test_kernels_opd.py -k test_estimators"),
    _kernel("NaN metrics dropped", "row_sums", "tl.where(known, least, share)", "least", K_ROWS),
    _kernel("a label's bound dropped", "scan", "(label >= 0) & (label < vocab) & live", "live", LISTED),
    _kernel("masses of the losses", "topk", "row = rows + (which + 1) * n_rows", "row = rows + which * n_rows", "tests/test_kernels_lists.py"),
    _kernel("absent words counted", "topk", "tl.where(here, tl.exp(log_p), 0.0)", "tl.where(here, tl.exp(log_p), 1.0)", K_TOPK),
    _kernel("the tail's floor", "topk", "p_tail = tl.where(left < EPS, EPS, left)", "p_tail = left", K_TOPK + " -k floor"),
    _kernel("an infinity lost with its mass", "topk", "tl.where(difference == float(\"inf\"), difference, x * difference)", "tl.where(x == 0.0, 0.0, x * difference)", K_TOPK + " -k 'infinities or small'"),
    _kernel("beta swapped", "topk", "m = beta * q + rest * p", "m = beta * p + rest * q", K_TOPK + " -k 'not raw'"),
    _kernel("cross moment not moved", "divergence", "cross = (cross + total * (delta - other_delta)) * carry", "cross = cross * carry", K_FULL),
    _kernel("infinity forgotten", "divergence", "(infinite > -0.5 * LOWEST_) &", "(infinite > -9.0 * LOWEST_) &", K_FULL + " -k infinity"),
    _kernel("jsd's centre is its loss", "divergence", "tl.where(live, centre, 0.0)", "tl.where(live, loss, 0.0)", K_FULL),
    _kernel("large products subtracted", "paired", "log_p = (x - top) * scale_log2 - log_sum", "log_p = (x * scale_log2 - top * scale_log2) - log_sum", K_FULL + " -k equal_models"),
    _kernel("student's padding unwritten", "divergence_grad", "(start + lane < words + shift)", "(start + lane < vocab + shift)", K_FULL + " -k students_words"),
    _kernel("a word's first segment", "sparse", "row = 2 * first + tl.where(begin % SEGMENT == 0, 0, 1)", "row = 2 * first", K_SPARSE),
    _kernel("the last slice lost", "gather", "for _ in range(slices):", "for _ in range(slices - 1):", K_SPARSE),
    _kernel("a segment's other word", "sparse", "if other != word:", "if other < 0:", K_SPARSE),
    _kernel("centre forgotten", "divergence_grad", "(log_p - log_q - centre)", "(log_p - log_q)", K_FULL),
]  # fmt: skip

MUTANTS = [*PYTHON, *C, *KERNELS]
