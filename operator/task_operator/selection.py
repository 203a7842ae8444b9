"""Which tasks, pools and schedules an installation looks after, where several share namespaces: a label selector.

The API server selects; what is here reads a selector only as far as its syntax and the names of its labels.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from task_operator.jobs import INSTANCE_LABEL

_NAME: Final = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY: Final = rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}"
_VALUE: Final = rf"(?:{_NAME})?"
_REQUIREMENT: Final = re.compile(
    rf"\s*(?:!\s*)?(?P<key>{_KEY})"
    rf"(?:\s*(?:=|==|!=)\s*{_VALUE}|\s+(?:in|notin)\s*\(\s*{_VALUE}\s*(?:,\s*{_VALUE}\s*)*\))?\s*(?:,|$)"
)
"""https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors"""


def check_selector(text: str) -> str:
    """Return a label selector as it is. Raises ValueError for what the API server would refuse.

    >>> check_selector("team=a, tier in (x, y), !old")
    'team=a, tier in (x, y), !old'
    """
    keys_of(text)
    return text


def keys_of(selector: str) -> tuple[str, ...]:
    """Return the names of the labels that a selector asks for. Raises ValueError where it is none.

    >>> keys_of("team=a,tier in (x,y),!old"), keys_of("")
    (('team', 'tier', 'old'), ())
    """
    keys, position = [], 0
    while position < len(selector):
        found = _REQUIREMENT.match(selector, position)
        if found is None or found.end() == position:
            raise ValueError(
                f"is no label selector from {selector[position:][:40]!r} on; write team=a, team in (a, b), team!=a or !team"
            )
        keys.append(found["key"])
        position = found.end()
    if selector.rstrip().endswith(","):
        raise ValueError("is no label selector: it ends with a comma")
    return tuple(keys)


def inherited(labels: Mapping[str, str], *, selector: str) -> dict[str, str]:
    """Return those of an object's labels by which what it makes is selected too."""
    return {key: labels[key] for key in keys_of(selector) if key in labels}


def instance_of(manifest: Mapping[str, Any]) -> str | None:
    """Return the installation that has made an object."""
    found: str | None = (manifest["metadata"].get("labels") or {}).get(INSTANCE_LABEL)
    return found
