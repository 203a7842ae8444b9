"""Tasks as they are stored, for tests that look at resources: whole manifests, parsed by the contract."""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import kubernetes.client
import kubernetes.config
from kubernetes.client.exceptions import ApiException

from devstack import Endpoints
from task_contract import names
from task_contract.models import ProcessingTask


class TaskAbsent(Exception):
    """No task of this name."""


class TaskResources:
    """The tasks of one namespace. What the API server refuses is raised as it is."""

    def __init__(self, endpoints: Endpoints, namespace: str) -> None:
        api = kubernetes.config.new_client_from_config(str(endpoints.kubeconfig))
        self._api = kubernetes.client.CustomObjectsApi(api)
        self._where: dict[str, Any] = {
            "group": names.GROUP,
            "version": names.VERSION,
            "namespace": namespace,
            "plural": names.PLURAL,
        }

    def submit(self, spec: Mapping[str, Any], *, name: str) -> ProcessingTask:
        """Create a task."""
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": dict(spec)}
        return _parsed(self._api.create_namespaced_custom_object(**self._where, body=body))

    def get(self, name: str) -> ProcessingTask:
        """Return a task. Raises :class:`TaskAbsent`."""
        try:
            return _parsed(self._api.get_namespaced_custom_object(**self._where, name=name))
        except ApiException as error:
            if error.status == 404:
                raise TaskAbsent(name) from error
            raise

    def cancel(self, name: str) -> ProcessingTask:
        """Ask for the end of a task."""
        patch = {"spec": {"cancel": True}}
        return _parsed(self._api.patch_namespaced_custom_object(**self._where, name=name, body=patch))

    def wait(self, name: str, *, timeout: timedelta) -> ProcessingTask:
        """Return a task once it has ended."""
        deadline = time.monotonic() + timeout.total_seconds()
        while not (task := self.get(name)).status.phase.finished:
            assert time.monotonic() < deadline, f"{name} is {task.status.phase} after {timeout}"
            time.sleep(0.1)
        return task


def _parsed(manifest: object) -> ProcessingTask:
    return ProcessingTask.model_validate(cast("dict[str, Any]", manifest))
