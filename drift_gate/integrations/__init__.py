"""The losses in other projects' trainers. Each module imports its project; nothing else does."""


def unusable(project: str, wanted: str, found: Exception) -> ImportError:
    """The error of a project that is missing, or is not what an integration was written for."""
    reason = " ".join(str(found).split())
    return ImportError(
        f"drift_gate.integrations.{project} needs {project} {wanted}: pip install "
        f"'{project}=={wanted}.*'; got {type(found).__name__}: {reason}"
    )
