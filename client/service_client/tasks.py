"""ProcessingTasks through the Kubernetes API, with the generated ``kubernetes`` client.

The client is synchronous, as most callers of that library are; its cost (0.5 ms a request) does not matter for a caller.
"""

import json
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Final

import kubernetes.client
import kubernetes.config
import kubernetes.watch
from kubernetes.client.exceptions import ApiException

from task_contract import names
from task_contract.errors import InvalidTask
from task_contract.models import ProcessingTask, Spec, parse_manifest

FIELD_MANAGER: Final = "processing-tasks-client"
"""Who this client is in ``metadata.managedFields`` of the tasks that it creates and cancels."""


class TaskClientError(Exception):
    """A request to the API server failed; the message says which and why."""


class TaskRefused(TaskClientError):
    """The task is not valid, or the caller may not create it; the message names the field."""


class TaskConflict(TaskClientError):
    """A task of this name exists and has another spec."""


class TaskNotFound(TaskClientError):
    """No task of this name."""


class TaskTimeout(TaskClientError):
    """The task did not finish in time. It goes on; wait again or cancel it."""


class TaskClient:
    """Creates, reads, watches and cancels the tasks of one namespace."""

    def __init__(self, api: kubernetes.client.CustomObjectsApi, *, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._where: dict[str, Any] = {
            "group": names.GROUP,
            "version": names.VERSION,
            "namespace": namespace,
            "plural": names.PLURAL,
        }

    @classmethod
    def from_environment(cls, *, namespace: str) -> "TaskClient":
        """Use the pod's service account, or outside a cluster the current context of the kubeconfig."""
        configuration = kubernetes.client.Configuration()
        try:
            kubernetes.config.load_incluster_config(configuration)
        except kubernetes.config.ConfigException:
            kubernetes.config.load_kube_config(client_configuration=configuration)
        return cls(kubernetes.client.CustomObjectsApi(kubernetes.client.ApiClient(configuration)), namespace=namespace)

    def submit(
        self,
        spec: Spec | Mapping[str, Any],
        *,
        name: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> ProcessingTask:
        """Create a task and return it as stored.

        With ``name`` the call is idempotent: repeated with the same spec it returns the task that is there. Without, the
        API server chooses a name, and a repeated call makes a second task.

        Raises :class:`TaskRefused` for a bad spec, :class:`TaskConflict` when the name is taken by another spec.
        """
        metadata: dict[str, Any] = {"labels": dict(labels or {})}
        metadata |= {"generateName": "task-"} if name is None else {"name": name}
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": metadata,
            "spec": spec.manifest() if isinstance(spec, Spec) else dict(spec),
        }
        try:
            wanted = parse_manifest(body | {"metadata": {"name": name or "generated"}})
        except InvalidTask as error:
            raise TaskRefused(error.message) from error
        try:
            created = self._api.create_namespaced_custom_object(**self._where, body=body, field_manager=FIELD_MANAGER)
        except ApiException as error:
            if error.status == 409 and name is not None:
                found = self.get(name)
                if found.spec.model_copy(update={"cancel": False, "suspend": False}) == wanted.spec:
                    return found
                raise TaskConflict(f"cannot create task {name}: it exists with another spec; choose another name") from error
            raise _translated(error, f"cannot create task {name or '(unnamed)'}") from error
        return ProcessingTask.model_validate(created)

    def get(self, name: str) -> ProcessingTask:
        """Return a task. Raises :class:`TaskNotFound`."""
        try:
            return ProcessingTask.model_validate(self._api.get_namespaced_custom_object(**self._where, name=name))
        except ApiException as error:
            raise _translated(error, f"cannot read task {name}") from error

    def cancel(self, name: str) -> ProcessingTask:
        """Ask for the end of a task. It ends as Canceled, or as Completed if it had been published before."""
        try:
            patched = self._api.patch_namespaced_custom_object(
                **self._where, name=name, body={"spec": {"cancel": True}}, field_manager=FIELD_MANAGER
            )
        except ApiException as error:
            raise _translated(error, f"cannot cancel task {name}") from error
        return ProcessingTask.model_validate(patched)

    def wait(
        self,
        name: str,
        *,
        timeout: timedelta,
        on_change: Callable[[ProcessingTask], None] | None = None,
    ) -> ProcessingTask:
        """Wait until a task has finished, and return it; its phase says how.

        ``on_change`` is called with each state seen. A watch that ends or is too old is begun anew from a fresh read.

        Raises :class:`TaskTimeout` after ``timeout``, :class:`TaskNotFound` when there is no such task or it was deleted.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            task = self.get(name)
            if on_change is not None:
                on_change(task)
            if task.status.phase.finished:
                return task
            left = deadline - time.monotonic()
            if left <= 0:
                raise TaskTimeout(f"cannot wait longer for task {name}: it is {task.status.phase} after {timeout}")
            if (finished := self._watch(task, seconds=min(left, 300.0), on_change=on_change)) is not None:
                return finished

    def _watch(
        self, task: ProcessingTask, *, seconds: float, on_change: Callable[[ProcessingTask], None] | None
    ) -> ProcessingTask | None:
        """Follow a task from the state given; return it once finished, ``None`` when the watch ended before."""
        watch = kubernetes.watch.Watch()
        try:
            events = watch.stream(
                self._api.list_namespaced_custom_object,
                **self._where,
                field_selector=f"metadata.name={task.metadata.name}",
                resource_version=task.metadata.resource_version,
                timeout_seconds=max(1, round(seconds)),
            )
            for event in events:
                if event["type"] == "DELETED":
                    raise TaskNotFound(f"cannot wait for task {task.metadata.name}: it was deleted")
                seen = ProcessingTask.model_validate(event["object"])
                if on_change is not None:
                    on_change(seen)
                if seen.status.phase.finished:
                    return seen
        except ApiException as error:
            if error.status != 410:  # the version is too old to watch from: the caller reads afresh
                raise _translated(error, f"cannot watch task {task.metadata.name}") from error
        finally:
            watch.stop()
        return None


def _translated(error: ApiException, what: str) -> TaskClientError:
    try:
        message = json.loads(error.body or "{}").get("message") or error.reason
    except ValueError:
        message = error.reason
    kinds: dict[int, type[TaskClientError]] = {404: TaskNotFound, 403: TaskRefused, 422: TaskRefused, 400: TaskRefused}
    return kinds.get(error.status, TaskClientError)(f"{what}: {message}")
