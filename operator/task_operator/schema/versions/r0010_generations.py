"""Runs ``0010_generations.sql`` of the contract."""

from task_operator.schema import run

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Apply it."""
    run("0010_generations.sql")
