"""Runs ``0012_traces.sql`` of the contract."""

from task_operator.schema import run

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Apply it."""
    run("0012_traces.sql")
