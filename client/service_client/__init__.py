"""For services that hand work to the platform: create ProcessingTasks through the Kubernetes API and wait for them.

>>> client = TaskClient.from_environment(namespace="knowledge")     # doctest: +SKIP
>>> task = client.submit({"type": "document_processing", "kbId": "kb-42",
...                       "payload": {"filePath": "/data/handbook.pdf"}}, name="handbook")  # doctest: +SKIP
>>> client.wait("handbook", timeout=timedelta(minutes=10)).status.result.chunks             # doctest: +SKIP
"""

from service_client.tasks import TaskClient, TaskClientError, TaskConflict, TaskNotFound, TaskRefused, TaskTimeout

__all__ = ["TaskClient", "TaskClientError", "TaskConflict", "TaskNotFound", "TaskRefused", "TaskTimeout"]
