"""Receives callbacks: whether one is to be believed, and what it says.

>>> receiver = CallbackReceiver(os.environ["CALLBACK_SECRETS"])                             # doctest: +SKIP
>>> event = receiver.receive(await request.read(), request.headers)                         # doctest: +SKIP

A callback comes at least once, and its repetitions have the same ``event.id``: whoever acts on it keeps the ids that are
done, in the transaction in which it acts. ``examples/receivers`` shows it for aiohttp and FastAPI.
"""

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from service_client.errors import CallbackRefused
from service_client.views import TaskStatus
from task_contract.models import Failure, Result
from task_contract.webhooks import TIMESTAMP_HEADER, TOLERANCE, WebhookRefused, parse_secrets, verify


class CallbackEvent(BaseModel):
    """A task has ended."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)

    id: str
    """The header webhook-id: the same for every delivery of this event."""
    sent_at: datetime
    """When this delivery was sent."""
    task_id: str
    status: TaskStatus
    """completed, failed or canceled."""
    namespace: str | None = None
    uid: str | None = None
    kb_id: str | None = None
    task_type: str | None = None
    attempt: int | None = None
    result: Result | None = None
    error: Failure | None = None
    completed_at: datetime | None = None


class CallbackReceiver:
    """Verifies and reads callbacks; one for each endpoint."""

    def __init__(self, secrets: str, *, tolerance: float = TOLERANCE, clock: Callable[[], float] = time.time) -> None:
        """``secrets``: the text of the Secret that the task's ``callback.secretRef`` names, one key a line; while a key is
        replaced it has both. ``tolerance``: seconds that a callback may be old. Raises ``ValueError`` for no key.
        """
        self._secrets = parse_secrets(secrets)
        self._tolerance = tolerance
        self._clock = clock

    def receive(self, body: bytes, headers: Mapping[str, str]) -> CallbackEvent:
        """Return what a callback says. ``body`` is what came over the wire, byte for byte.

        Raises :class:`~service_client.errors.CallbackRefused`, whose ``status`` is what to answer: 401 for one that is not
        to be believed, 422 for a body that is none of ours.
        """
        try:
            message_id = verify(body, headers, self._secrets, now=self._clock(), tolerance=self._tolerance)
        except WebhookRefused as error:
            raise CallbackRefused(str(error), status=401) from error
        sent = next(int(value) for name, value in headers.items() if name.lower() == TIMESTAMP_HEADER)
        try:
            said = json.loads(body)
            if not isinstance(said, dict):
                raise CallbackRefused("cannot read the callback: its body is no JSON object", status=422)
            return CallbackEvent.model_validate(said | {"id": message_id, "sent_at": datetime.fromtimestamp(sent, tz=UTC)})
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors(include_url=False))
            raise CallbackRefused(f"cannot read the callback: {wrong}", status=422) from error
        except ValueError as error:
            raise CallbackRefused(f"cannot read the callback: its body is no JSON: {error}", status=422) from error
