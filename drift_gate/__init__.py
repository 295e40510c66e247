"""Fused losses for on-policy distillation of language models, with policy-drift gating."""

from importlib.metadata import PackageNotFoundError, version

from .call.recording import record_calls, start_from_environment
from .checkout import find_folders
from .gate import DriftGate
from .losses.accumulation import GateNormalizer
from .losses.full import full_loss
from .losses.linear_full import linear_full_loss
from .losses.linear_log_probs import linear_gather_lse, linear_token_log_probs
from .losses.linear_opd import linear_opd_loss
from .losses.linear_top_k_log_probs import linear_top_k_log_probs
from .losses.linear_topk import linear_topk_loss
from .losses.log_probs import gather_lse, token_log_probs
from .losses.opd import opd_loss
from .losses.top_k_log_probs import top_k_log_probs
from .losses.topk import topk_loss
from .losses.weights import gate_weights
from .options import Clip, Head, Parallel, Reduction
from .outputs import GateOutput, LossOutput, TopKOutput
from .spans import newline_spans

find_folders()
start_from_environment()

try:
    __version__ = version("drift-gate")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "Clip",
    "DriftGate",
    "GateNormalizer",
    "GateOutput",
    "Head",
    "LossOutput",
    "Parallel",
    "Reduction",
    "TopKOutput",
    "full_loss",
    "gate_weights",
    "gather_lse",
    "linear_full_loss",
    "linear_gather_lse",
    "linear_opd_loss",
    "linear_token_log_probs",
    "linear_top_k_log_probs",
    "linear_topk_loss",
    "newline_spans",
    "opd_loss",
    "record_calls",
    "token_log_probs",
    "top_k_log_probs",
    "topk_loss",
]
