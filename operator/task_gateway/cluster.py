"""The gateway's requests to the Kubernetes API. The only file of it that knows its paths."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

from task_contract.names import ATTEMPT_LABEL, CONTAINER, PLURAL, TASK_UID_LABEL
from task_platform.kubernetes import CORE_API, TASKS_API, Access, Kubernetes, Manifest, Unavailable, path_of

FIELD_MANAGER: Final = "processing-tasks-gateway"
_MERGE_PATCH: Final = "application/merge-patch+json"
_LOG_LIMIT: Final = 16_777_216  # bytes of a log that is not followed


class Cluster:
    """Objects go in and out as manifests. Every method raises :class:`~task_platform.kubernetes.ClusterError`.

    Names and namespaces are put into paths as they are: callers have checked them.
    """

    def __init__(self, access: Access) -> None:
        self._kubernetes = Kubernetes(access, user_agent="processing-tasks-gateway")

    async def warm_up(self) -> None:
        """Open the session; no request is made."""
        await self._kubernetes.warm_up()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._kubernetes.aclose()

    async def ping(self) -> None:
        """Ask for something small."""
        await self._kubernetes.request("GET", "/version")

    # ----------------------------------------------------------------------------------------------------------- tasks

    async def create_task(self, manifest: Manifest) -> Manifest:
        """Create a task with a name. An answer that is lost is asked for again, which finds what the first one made.

        Raises :class:`~task_platform.kubernetes.Conflict` where the name is taken.
        """
        metadata = manifest["metadata"]
        path = path_of(TASKS_API, metadata["namespace"], PLURAL)
        params = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        try:
            return await self._kubernetes.ask("POST", path, body=manifest, params=params)
        except Unavailable as error:
            if error.status:
                raise  # the server has spoken: it did not make it
        return await self._kubernetes.ask("POST", path, body=manifest, params=params)

    async def task(self, namespace: str, name: str) -> Manifest:
        """Return a task."""
        return await self._kubernetes.ask("GET", path_of(TASKS_API, namespace, PLURAL, name))

    async def change_task(self, namespace: str, name: str, spec: Mapping[str, Any]) -> Manifest:
        """Merge into the spec of a task and return it as stored."""
        return await self._kubernetes.ask(
            "PATCH",
            path_of(TASKS_API, namespace, PLURAL, name),
            body={"spec": dict(spec)},
            params={"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
            content_type=_MERGE_PATCH,
        )

    async def delete_task(self, namespace: str, name: str) -> None:
        """Delete a task."""
        await self._kubernetes.request("DELETE", path_of(TASKS_API, namespace, PLURAL, name))

    # ------------------------------------------------------------------------------------------------------------ logs

    async def pods(self, namespace: str, *, uid: str, attempt: int | None) -> list[Manifest]:
        """Return the pods of a task, or of one of its attempts, the youngest last."""
        selector = f"{TASK_UID_LABEL}={uid}" + ("" if attempt is None else f",{ATTEMPT_LABEL}={attempt}")
        found = [
            pod
            async for page in self._kubernetes.pages(CORE_API, "pods", namespace, labelSelector=selector)
            for pod in list(page.items)
        ]
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def log(self, namespace: str, pod: str, *, tail: int, follow: bool) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Yield the last lines of a pod's log as they come, and with ``follow`` those that it writes until it ends."""
        params = {"container": CONTAINER, "tailLines": str(tail)}
        params |= {"follow": "true"} if follow else {"limitBytes": str(_LOG_LIMIT)}
        return self._kubernetes.stream(path_of(CORE_API, namespace, "pods", pod) + "/log", params=params)

    # --------------------------------------------------------------------------------------------------------- reviews

    async def review_token(self, token: str, *, audiences: Sequence[str]) -> Manifest:
        """Return the status of a TokenReview: whose token it is."""
        spec = {"token": token} | ({"audiences": list(audiences)} if audiences else {})
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
        answer = await self._kubernetes.ask("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body)
        status: Manifest = answer.get("status") or {}
        return status

    async def review_access(self, spec: Manifest) -> bool:
        """Return whether a SubjectAccessReview allows what ``spec`` asks for."""
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        answer = await self._kubernetes.ask("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body=body)
        return bool((answer.get("status") or {}).get("allowed"))
