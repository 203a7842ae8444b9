"""Runs ``0005_callbacks.sql`` of the contract."""

from task_operator.schema import run

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Apply it."""
    run("0005_callbacks.sql")
