"""Runs ``0003_consistency.sql`` of the contract."""

from task_operator.schema import run

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Apply it."""
    run("0003_consistency.sql")
