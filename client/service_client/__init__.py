"""For services: call other services, hand work to the platform and wait for it, receive its callbacks.

>>> tasks = TaskClient.over_rest(namespace="knowledge")                                     # doctest: +SKIP
>>> task = tasks.submit({"task_type": "document_processing", "kb_id": "kb-42",
...                      "payload": {"file_path": "/data/handbook.pdf"}})                   # doctest: +SKIP
>>> tasks.wait(task.id, timeout=timedelta(minutes=10)).result.chunks                        # doctest: +SKIP

``docs/client.md`` shows the rest. Importing this imports httpx and pydantic; ``kubernetes`` only comes with
``over_kubernetes``.
"""

from service_client.callbacks import CallbackEvent, CallbackReceiver
from service_client.calls import (
    AsyncServiceClient,
    CallConfig,
    CallMethod,
    ServiceClient,
    call_service,
    call_service_sync,
)
from service_client.discovery import DiscoveryError, service_url
from service_client.errors import (
    CallbackRefused,
    CircuitOpen,
    ClientError,
    FieldError,
    Problem,
    ServiceError,
    ServiceRefused,
    ServiceTimeout,
    ServiceUnavailable,
    TaskClientError,
    TaskConflict,
    TaskFailed,
    TaskForbidden,
    TaskNotFinished,
    TaskNotFound,
    TaskRefused,
    TaskTimeout,
    TaskUnavailable,
    TooManyRequests,
)
from service_client.rest import TokenFile
from service_client.tasks import AsyncTaskClient, TaskClient
from service_client.views import BatchItem, CallbackDelivery, Submitted, Task, TaskStatus, TaskUpdate

__all__ = [
    "AsyncServiceClient",
    "AsyncTaskClient",
    "BatchItem",
    "CallConfig",
    "CallMethod",
    "CallbackDelivery",
    "CallbackEvent",
    "CallbackReceiver",
    "CallbackRefused",
    "CircuitOpen",
    "ClientError",
    "DiscoveryError",
    "FieldError",
    "Problem",
    "ServiceClient",
    "ServiceError",
    "ServiceRefused",
    "ServiceTimeout",
    "ServiceUnavailable",
    "Submitted",
    "Task",
    "TaskClient",
    "TaskClientError",
    "TaskConflict",
    "TaskFailed",
    "TaskForbidden",
    "TaskNotFinished",
    "TaskNotFound",
    "TaskRefused",
    "TaskStatus",
    "TaskTimeout",
    "TaskUnavailable",
    "TaskUpdate",
    "TokenFile",
    "TooManyRequests",
    "call_service",
    "call_service_sync",
    "service_url",
]
