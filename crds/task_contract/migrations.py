"""The PostgreSQL tables as ordered SQL files.

They are a contract as the CRD is: the operator projects into ``tasks``, the runner writes ``task_results`` and the ledger,
the operator raises ``task_fences``. ``python -m task_operator migrate`` applies them; this package imports no driver.
"""

from importlib import resources


def migrations() -> list[tuple[int, str]]:
    """Return the migrations as (number, SQL), in order. File names start with the number: ``0001_initial.sql``."""
    folder = resources.files("task_contract").joinpath("migrations")
    files = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(int(name.split("_", 1)[0]), read(name)) for name in files]


def read(name: str) -> str:
    """Return the SQL of the migration with this file name."""
    return resources.files("task_contract").joinpath("migrations", name).read_text()
