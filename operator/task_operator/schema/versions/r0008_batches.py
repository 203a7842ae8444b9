"""Runs ``0008_batches.sql`` of the contract."""

from task_operator.schema import run

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Apply it."""
    run("0008_batches.sql")
