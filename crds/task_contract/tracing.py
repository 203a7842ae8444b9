"""Which trace a task belongs to: that of the caller who says so, else one of its own.

A caller gives ``traceparent`` (W3C Trace Context) as a header to the gateway, or as the annotation
:data:`task_contract.names.TRACEPARENT_ANNOTATION` of the resource. Lines that operator and runner log about the task have
its trace id, so that they are found beside what the caller logged; callbacks, events and spans go on with it.
"""

import re
from collections.abc import Mapping
from typing import Final

from task_contract.names import TRACEPARENT_ANNOTATION

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""Later versions may add fields behind; version ff is none."""
_LONGEST: Final = 256


def trace_id(traceparent: str | None) -> str | None:
    """Return the 32 hexadecimal digits of the trace; None for none, and for what is no ``traceparent``.

    >>> trace_id("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    '4bf92f3577b34da6a3ce929d0e0e4736'
    """
    found = _read(traceparent)
    return None if found is None else found[1]


def parent_id(traceparent: str | None) -> str | None:
    """Return the 16 hexadecimal digits of the caller's span; None as of :func:`trace_id`.

    >>> parent_id("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    '00f067aa0ba902b7'
    """
    found = _read(traceparent)
    return None if found is None else found[2]


def sampled(traceparent: str | None) -> bool:
    """Tell whether the caller's span is recorded.

    >>> sampled("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    True
    """
    found = _read(traceparent)
    return found is not None and bool(int(found[3], 16) & 1)


def _read(traceparent: str | None) -> "re.Match[str] | None":
    if traceparent is None or len(traceparent) > _LONGEST:
        return None
    found = _TRACEPARENT.fullmatch(traceparent)
    return None if found is None or (traceparent.startswith("00") and found[4]) else found


def trace_of(annotations: Mapping[str, str], *, uid: str) -> str:
    """Return the trace id of a task: that of its annotation, else one of its own, as :func:`trace_for`."""
    return trace_for(annotations.get(TRACEPARENT_ANNOTATION), uid=uid)


def trace_for(traceparent: str | None, *, uid: str) -> str:
    """Return the trace id that was given, else the digits of the uid, which are one as well.

    >>> trace_for(None, uid="11111111-2222-3333-4444-555555555555")
    '11111111222233334444555555555555'
    """
    return trace_id(traceparent) or uid.replace("-", "")
