"""Runs ``0013_vector_attempts.sql`` of the contract."""

from task_operator.schema import run

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Apply it."""
    run("0013_vector_attempts.sql")
