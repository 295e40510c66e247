"""Fused losses for on-policy distillation of language models, with policy-drift gating."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .accumulation import GateNormalizer
from .full import full_loss
from .gate import DriftGate
from .linear import linear_gather_lse, linear_token_log_probs
from .linear_full import linear_full_loss
from .linear_opd import linear_opd_loss
from .linear_topk import linear_topk_loss
from .logits import gather_lse, token_log_probs
from .losses import opd_loss
from .outputs import GateOutput, LossOutput
from .spans import newline_spans
from .topk import topk_loss
from .weighting import gate_weights

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # a checkout: kernels/ and bench/ lie beside this folder
    __path__.append(str(_here.parent))

try:
    __version__ = version("drift-gate")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = [
    "DriftGate",
    "GateNormalizer",
    "GateOutput",
    "LossOutput",
    "full_loss",
    "gate_weights",
    "gather_lse",
    "linear_full_loss",
    "linear_gather_lse",
    "linear_opd_loss",
    "linear_token_log_probs",
    "linear_topk_loss",
    "newline_spans",
    "opd_loss",
    "token_log_probs",
    "topk_loss",
]
