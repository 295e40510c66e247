"""The losses in other projects' trainers. Each module imports its project; nothing else does."""

from typing import Any

from .. import DriftGate
from ..call.arguments import wrong_type


def unusable(project: str, wanted: str, found: Exception) -> ImportError:
    """The error of a project that is missing, or is not what an integration was written for."""
    reason = " ".join(str(found).split())
    module = project.replace("-", "_")
    return ImportError(
        f"drift_gate.integrations.{module} needs {project} {wanted}: pip install "
        f"'{project}=={wanted}.*'; got {type(found).__name__}: {reason}"
    )


def check_version(project: str, wanted: str, found: str) -> None:
    """Raise where the version found is not one of the series wanted."""
    if not f"{found}.".startswith(f"{wanted}."):
        raise ImportError(f"{project} {found}")


def check_policy_gate(project: str, loss: str, gate: Any) -> None:
    """Raise where the gate of a policy loss is none, or needs words, which policy losses lack."""
    if not isinstance(gate, DriftGate):
        wrong_type("gate", gate, f"a DriftGate ({loss!r} is {project}'s ungated loss)")
    if gate.granularity == "span":
        raise ValueError(
            "gate granularity must be one of block, token, sequence in a policy loss, which does "
            'not see the words that end a span; got "span"'
        )
