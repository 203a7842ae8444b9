"""Runs ``0001_initial.sql`` of the contract."""

from task_operator.schema import run

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Apply it."""
    run("0001_initial.sql")
