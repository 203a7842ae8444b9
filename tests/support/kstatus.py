"""What the public kstatus library says of objects: the Go program in tests/kstatus, built as helm is."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devstack import tools

SOURCE = Path(__file__).resolve().parents[1] / "kstatus"


def kstatus(*objects: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (status, message) of each object, as stored by an API server: InProgress, Current, Failed, Terminating."""
    lines = "".join(json.dumps(one) + "\n" for one in objects)
    done = subprocess.run([tools.program(SOURCE)], input=lines, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [(answer["status"], answer["message"]) for answer in map(json.loads, done.stdout.splitlines())]
