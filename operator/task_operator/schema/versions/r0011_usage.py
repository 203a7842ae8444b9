"""Runs ``0011_usage.sql`` of the contract."""

from task_operator.schema import run

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Apply it."""
    run("0011_usage.sql")
