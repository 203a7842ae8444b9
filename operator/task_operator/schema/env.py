"""Run by Alembic for every command; the connection and its transaction are those of :func:`task_operator.schema.migrate`."""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
