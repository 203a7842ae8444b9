"""Runs ``0007_statistics.sql`` of the contract."""

from task_operator.schema import run

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Apply it."""
    run("0007_statistics.sql")
