"""`python -m drift_gate`: the command line."""

from .cli import app

app(prog_name="drift-gate")
