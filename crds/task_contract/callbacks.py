"""The callback that tells a service that a task has ended: its address, its id and its body. Pure functions.

A callback is a row of the table ``callbacks``, written in the transaction that writes the end of its task, one a task: see
the migration ``0005_callbacks.sql``, which is the contract of who reads and who replays them.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from urllib.parse import quote, urlsplit

from task_contract.views import snake_case, status_word, timestamp

CALLBACKS_CHANNEL: Final = "task_callbacks"
"""PostgreSQL's channel on which it is told that callbacks are due: written, or to be sent again."""
STATES: Final = ("pending", "delivered", "dead")
REPLAY: Final = (
    "WITH again AS (UPDATE callbacks SET state = 'pending', next_at = now(), attempts = 0, first_attempt_at = NULL, "  # noqa: S608 - names of ours; values are parameters
    "finished_at = NULL, lease = NULL WHERE (state = $1 OR $1 IS NULL) AND (namespace = $2 OR $2 IS NULL) "
    "AND (name = ANY($3::text[]) OR $3 IS NULL) RETURNING id) "
    f"SELECT count(*), pg_notify('{CALLBACKS_CHANNEL}', '') FROM again"
)
"""Have callbacks sent again, with the id that they had; returns how many."""


def fill_url(url: str, *, task_id: str, namespace: str, kb_id: str | None) -> str:
    """Return a checked URL with its fields filled in; a task without knowledge base leaves ``{kb_id}`` empty.

    >>> fill_url("http://knowledge/tasks/{task_id}/callback", task_id="handbook", namespace="n", kb_id=None)
    'http://knowledge/tasks/handbook/callback'
    """
    fields = {"task_id": task_id, "namespace": namespace, "kb_id": kb_id or ""}
    return re.sub(r"\{(task_id|namespace|kb_id)\}", lambda found: quote(fields[found[1]], safe=""), url)


def host_of(url: str) -> str:
    """Return host and port of a checked URL in lower case: receivers of one host share their fate.

    >>> host_of("http://Knowledge-Service/api"), host_of("https://[2001:db8::1]/")
    ('knowledge-service:80', '[2001:db8::1]:443')
    """
    parts = urlsplit(url)
    host, _, port = parts.netloc.lower().rpartition(":") if re.search(r":[0-9]+$", parts.netloc) else (parts.netloc, "", "")
    return f"{host.lower()}:{port or {'http': 80, 'https': 443}[parts.scheme]}"


def callback_id(task_uid: str) -> str:
    """Return the id of a task's callback: ``webhook-id``, the same however often it is sent."""
    return f"task-{task_uid}"


def callback_body(
    *,
    task_id: str,
    namespace: str,
    uid: str,
    kb_id: str | None,
    task_type: str,
    phase: str,
    attempt: int,
    result: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None,
    finished_at: datetime | None,
) -> str:
    """Return the JSON of a callback. ``result`` and ``error`` are those of the status, in camelCase."""
    body = {
        "task_id": task_id,
        "status": status_word(phase),
        "result": snake_case(result),
        "completed_at": None if finished_at is None else timestamp(finished_at),
        "error": snake_case(error),
        "namespace": namespace,
        "kb_id": kb_id,
        "task_type": task_type,
        "attempt": attempt,
        "uid": uid,
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))
