"""Write the CRDs and JSON Schemas from the models: ``python crds/generate.py``; ``--check`` fails if one is out of date."""

import argparse
import sys
from pathlib import Path

import yaml

from devstack.generated import settle
from devstack.json_schemas import of_crd
from task_contract.crd import custom_resource_definition
from task_contract.pool_crd import pool_definition
from task_contract.schedule_crd import schedule_definition

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Generated from crds/task_contract by `make generate`. Do not edit.\n"
SCHEMAS = ROOT / "crds/schemas"
FOLDERS = (ROOT / "crds", ROOT / "helm/processing-tasks/files/crds")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def main() -> int:
    """Write or compare the targets; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    definitions = custom_resource_definition(), pool_definition(), schedule_definition()
    wanted = {
        folder / f"{definition['spec']['names']['plural']}.yaml": HEADER
        + yaml.dump(definition, Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
        for definition in definitions
        for folder in FOLDERS
    }
    wanted |= {SCHEMAS / path: text for definition in definitions for path, text in of_crd(definition).items()}
    return settle(wanted, root=ROOT, check=check)


if __name__ == "__main__":
    sys.exit(main())
