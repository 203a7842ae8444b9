"""Write the CRDs from the models: ``python crds/generate.py``, or ``--check`` to fail when a file is out of date."""

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "crds"))

from task_contract.crd import custom_resource_definition  # noqa: E402 - the line above makes it importable
from task_contract.pool_crd import pool_definition  # noqa: E402 - the same
from task_contract.schedule_crd import schedule_definition  # noqa: E402 - the same

HEADER = "# Generated from crds/task_contract by `make generate`. Do not edit.\n"
FOLDERS = (ROOT / "crds", ROOT / "helm/processing-tasks/files/crds")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def main() -> int:
    """Write or compare the targets; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    wanted = {
        folder / f"{definition['spec']['names']['plural']}.yaml": HEADER
        + yaml.dump(definition, Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)
        for definition in (custom_resource_definition(), pool_definition(), schedule_definition())
        for folder in FOLDERS
    }
    stale = [target for target, text in wanted.items() if not target.exists() or target.read_text() != text]
    for target in stale:
        if check:
            print(f"{target.relative_to(ROOT)} is out of date: run `make generate`", file=sys.stderr)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(wanted[target])
            print(f"wrote {target.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
