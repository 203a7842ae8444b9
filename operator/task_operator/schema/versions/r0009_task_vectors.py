"""Runs ``0009_task_vectors.sql`` of the contract."""

from task_operator.schema import run

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Apply it."""
    run("0009_task_vectors.sql")
