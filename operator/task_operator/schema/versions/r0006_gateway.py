"""Runs ``0006_gateway.sql`` of the contract."""

from task_operator.schema import run

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Apply it."""
    run("0006_gateway.sql")
