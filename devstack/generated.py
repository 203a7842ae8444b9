"""Files that are written from code, or compared with what would be written."""

import sys
from collections.abc import Mapping
from pathlib import Path


def settle(wanted: Mapping[Path, str], *, root: Path, check: bool) -> int:
    """Write the files that differ, or with ``check`` only name them, below ``root``; return the exit status.

    1: ``check``, and a file is out of date.
    """
    stale = [target for target, text in wanted.items() if not target.exists() or target.read_text(encoding="utf-8") != text]
    for target in stale:
        if check:
            print(f"{target.relative_to(root)} is out of date: run `make generate`", file=sys.stderr)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(wanted[target], encoding="utf-8")
            print(f"wrote {target.relative_to(root)}")
    return 1 if check and stale else 0
