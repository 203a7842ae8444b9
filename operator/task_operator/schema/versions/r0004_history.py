"""Runs ``0004_history.sql`` of the contract."""

from task_operator.schema import run

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Apply it."""
    run("0004_history.sql")
