"""Runs ``0002_deletion_and_sweep.sql`` of the contract."""

from task_operator.schema import run

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Apply it."""
    run("0002_deletion_and_sweep.sql")
