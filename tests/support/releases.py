"""What each release left in `tests/data/releases`: its CRD, its examples, objects that it stored, its migrations and rows.

::

    tests/data/releases/0.1.0/
    ├── processingtasks.yaml   the CRD; from 0.2.0 on also workerpools.yaml
    ├── examples/              the manifests it was documented with
    ├── stored/                tasks in every phase, as its operator and runner wrote them
    ├── migrations/            its SQL files
    ├── rows.json              table → rows that its operator and runner wrote
    ├── statements.json        every statement that they sent to PostgreSQL
    └── stores.json            collection and index of a knowledge base, and rows in them (tests/support/frozen_stores.py)

A folder is written by ``make freeze-release VERSION=...`` when a release is made, and never changed.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml

from task_contract import names

ROOT: Final = Path(__file__).resolve().parents[2]
FOLDER: Final = ROOT / "tests/data/releases"
MIGRATIONS: Final = ROOT / "crds/task_contract/migrations"


@dataclass(frozen=True)
class Release:
    """One folder."""

    path: Path

    def __str__(self) -> str:
        return self.path.name

    @property
    def number(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.path.name.split("."))

    @cached_property
    def crd(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((self.path / "processingtasks.yaml").read_text())
        return found

    @property
    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """File name → the tasks in it."""
        return {path.name: _tasks(path) for path in sorted((self.path / "examples").glob("*.yaml"))}

    @property
    def stored(self) -> dict[str, dict[str, Any]]:
        """What it shows → a task with its status."""
        return {path.stem: yaml.safe_load(path.read_text()) for path in sorted((self.path / "stored").glob("*.yaml"))}

    @property
    def migrations(self) -> dict[str, str]:
        """File name → SQL."""
        return {path.name: path.read_text() for path in sorted((self.path / "migrations").glob("*.sql"))}

    @property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Table → rows, in an order in which they can be inserted; values are texts as PostgreSQL writes them."""
        found: dict[str, list[dict[str, Any]]] = json.loads((self.path / "rows.json").read_text())
        return found

    @property
    def statements(self) -> list[str]:
        found: list[str] = json.loads((self.path / "statements.json").read_text())
        return found

    @property
    def stores(self) -> dict[str, Any]:
        """Store → a knowledge base as it made it."""
        found: dict[str, Any] = json.loads((self.path / "stores.json").read_text())
        return found


def _tasks(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == names.KIND]


def present_migrations() -> dict[str, str]:
    """Return file name → SQL as it is now."""
    return {path.name: path.read_text() for path in sorted(MIGRATIONS.glob("*.sql"))}


RELEASES: Final = sorted((Release(path) for path in FOLDER.iterdir() if path.is_dir()), key=lambda release: release.number)
"""All releases, the last one last."""
