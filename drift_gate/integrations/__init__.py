"""The losses in other projects' trainers. Each module imports its project; nothing else does."""


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
