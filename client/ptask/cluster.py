"""The one module that speaks to the Kubernetes API, over the client for services: it reads manifests as they are.

What is written about tasks (submit, cancel, retry) are the programs of :class:`service_client.cluster.ClusterTransport`.
Errors are those of :mod:`service_client.errors`.
"""

import contextlib
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, cast

import kubernetes.client
import kubernetes.config
import yaml

from ptask.outcomes import CommandError, Exit
from service_client.calls import pause_before
from service_client.cluster import ClusterTransport, WatchStream, translated
from service_client.errors import TaskClientError, TaskNotFound, TaskUnavailable
from service_client.programs import Blocking, Program
from task_contract import names

T = TypeVar("T")
Manifest = dict[str, Any]


class Resource(NamedTuple):
    """A resource of the Kubernetes API."""

    group: str
    version: str
    plural: str


TASKS: Final = Resource(names.GROUP, names.VERSION, names.PLURAL)
POOLS: Final = Resource(names.GROUP, names.VERSION, names.POOL_PLURAL)
CRDS: Final = Resource("apiextensions.k8s.io", "v1", "customresourcedefinitions")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments")
JOBS: Final = Resource("batch", "v1", "jobs")
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases")
PRIORITY_CLASSES: Final = Resource("scheduling.k8s.io", "v1", "priorityclasses")
ACCESS_REVIEWS: Final = Resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews")

_TIMEOUT: Final = (3.05, 30.0)  # seconds to connect, and of silence
_PAGE: Final = 500
_SILENCE: Final = 24 * 3600.0  # seconds that a log which is followed may say nothing
_WATCH: Final = 240  # seconds; the server ends a watch then
_NAMESPACE_FILE: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_UNREADABLE: Final = (
    kubernetes.config.ConfigException,
    yaml.YAMLError,
    OSError,
    ValueError,
    TypeError,  # what is YAML and no kubeconfig
    KeyError,
    AttributeError,
)


def _configuration(kubeconfig: str | None, context: str | None) -> tuple[kubernetes.client.Configuration, str]:
    """Return how to reach the cluster, and the namespace that goes with it. Raises :class:`CommandError`."""
    configuration = kubernetes.client.Configuration()
    try:
        contexts, active = kubernetes.config.list_kube_config_contexts(config_file=kubeconfig)
        kubernetes.config.load_kube_config(
            config_file=kubeconfig, context=context, client_configuration=configuration, persist_config=False
        )
        chosen = next((one for one in contexts if one["name"] == context), active)
        return configuration, str(chosen["context"].get("namespace") or "default")
    except _UNREADABLE as error:
        if kubeconfig is None and context is None and _NAMESPACE_FILE.exists():
            with contextlib.suppress(kubernetes.config.ConfigException):
                kubernetes.config.load_incluster_config(configuration)
                return configuration, _NAMESPACE_FILE.read_text().strip()
        which = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
        raise CommandError(
            f"cannot use the kubeconfig {which}: {_words(error)}; "
            "name another with --kubeconfig or KUBECONFIG, a context of it with --context",
            code=Exit.USAGE,
        ) from error


def _words(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


@dataclass(frozen=True, slots=True)
class Change:
    """Something that happened to what is followed."""

    kind: str
    """SYNC: ``manifests`` are all that there are; ADDED, MODIFIED, DELETED: of one; LOST: the API does not answer."""
    manifests: tuple[Manifest, ...] = ()
    message: str = ""


class Cluster:
    """The cluster of a kubeconfig, and a namespace of it."""

    def __init__(self, kubeconfig: str | None, context: str | None, namespace: str | None) -> None:
        configuration, its_own = _configuration(kubeconfig, context)
        # A command that is typed says at once that there is no answer; the client's programs repeat what may be.
        configuration.retries = False
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self.namespace = namespace or its_own
        self.server = str(configuration.host)
        self._client = kubernetes.client.ApiClient(configuration)
        self._custom = kubernetes.client.CustomObjectsApi(self._client)
        self._core = kubernetes.client.CoreV1Api(self._client)

    # ------------------------------------------------------------------------------------------------------------ tasks

    def run(self, program: Program[T]) -> T:
        """Carry out a program of :meth:`transport`."""
        return Blocking().run(program)

    def transport(self, namespace: str | None = None) -> ClusterTransport:
        """Return what submits, cancels and retries tasks of a namespace."""
        return ClusterTransport(self._custom, namespace=namespace or self.namespace)

    def task(self, name: str, namespace: str | None = None) -> Manifest:
        """Return a task as it is stored. Raises :class:`~service_client.errors.TaskNotFound`."""
        try:
            return self.read(TASKS, name, namespace)
        except TaskNotFound as error:
            where = namespace or self.namespace
            raise TaskNotFound(
                f"cannot find task {name} in namespace {where}: {_why_absent(error)}; see `ptask list -A`"
            ) from error

    # ---------------------------------------------------------------------------------------------------------- reading

    def read(self, what: Resource, name: str, namespace: str | None = None) -> Manifest:
        """Return an object of the namespace."""
        with translated(f"cannot read {what.plural} {name}"):
            return cast(
                "Manifest",
                self._custom.get_namespaced_custom_object(
                    what.group,
                    what.version,
                    namespace or self.namespace,
                    what.plural,
                    name,
                    _request_timeout=_TIMEOUT,
                ),
            )

    def read_global(self, what: Resource, name: str) -> Manifest:
        """Return an object that is in no namespace."""
        with translated(f"cannot read {what.plural} {name}"):
            return cast(
                "Manifest",
                self._custom.get_cluster_custom_object(
                    what.group, what.version, what.plural, name, _request_timeout=_TIMEOUT
                ),
            )

    def items(
        self, what: Resource, namespace: str | None, *, labels: str | None = None, fields: str | None = None
    ) -> list[Manifest]:
        """Return all objects of a namespace; None: of all namespaces, or of those that are in none."""
        return self._all(what, namespace, labels, fields)[0]

    def allowed(self, verb: str, what: Resource, namespace: str | None, *, subresource: str = "") -> bool:
        """Whether whoever runs this may do something, as the cluster says."""
        asked = {"verb": verb, "group": what.group, "resource": what.plural, "subresource": subresource}
        spec = {"resourceAttributes": asked | ({} if namespace is None else {"namespace": namespace})}
        with translated("cannot ask for rights"):
            answer: Any = self._custom.create_cluster_custom_object(
                *ACCESS_REVIEWS,
                body={"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec},
                _request_timeout=_TIMEOUT,
            )
        return bool(answer.get("status", {}).get("allowed"))

    def pods(self, namespace: str, labels: str) -> list[Manifest]:
        """Return pods by labels, the youngest last."""
        found = self._plain(
            "cannot list pods",
            lambda: self._core.list_namespaced_pod(
                namespace, label_selector=labels, _preload_content=False, _request_timeout=_TIMEOUT
            ),
        )
        return sorted(found.get("items", []), key=lambda pod: str(pod["metadata"].get("creationTimestamp")))

    def events(self, namespace: str, *, uid: str | None = None, name: str | None = None) -> list[Manifest]:
        """Return the Events of an object, the youngest last."""
        chosen = f"involvedObject.uid={uid}" if uid else f"involvedObject.name={name}"
        found = self._plain(
            "cannot list events",
            lambda: self._core.list_namespaced_event(
                namespace, field_selector=chosen, _preload_content=False, _request_timeout=_TIMEOUT
            ),
        )
        return sorted(found.get("items", []), key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime")))

    def has(self, kind: str, name: str, namespace: str) -> bool:
        """Whether a namespace has a ServiceAccount, Secret or PersistentVolumeClaim."""
        return self.core(kind, name, namespace) is not None

    def core(self, kind: str, name: str, namespace: str) -> Manifest | None:
        """Return a ``service_account``, ``secret`` or ``persistent_volume_claim``; None without one."""
        read = getattr(self._core, f"read_namespaced_{kind}")
        try:
            return self._plain(
                f"cannot read {kind} {name}",
                lambda: read(name, namespace, _preload_content=False, _request_timeout=_TIMEOUT),
            )
        except TaskNotFound:
            return None

    @staticmethod
    def _plain(what: str, ask: Any) -> Manifest:
        with translated(what):
            return cast("Manifest", json.loads(ask().data))

    def _all(
        self, what: Resource, namespace: str | None, labels: str | None, fields: str | None
    ) -> tuple[list[Manifest], str]:
        items: list[Manifest] = []
        cursor = ""
        while True:
            options: dict[str, Any] = {"limit": _PAGE, "_request_timeout": _TIMEOUT}
            options |= {"_continue": cursor} if cursor else {}
            with translated(f"cannot list {what.plural}"):
                page = self._list(what, namespace, labels, fields, options)
            items += page["items"]
            cursor = page["metadata"].get("continue") or ""
            if not cursor:
                return items, str(page["metadata"].get("resourceVersion"))

    def _list(
        self, what: Resource, namespace: str | None, labels: str | None, fields: str | None, options: Mapping[str, Any]
    ) -> Any:
        chosen: dict[str, Any] = {"label_selector": labels} if labels else {}
        chosen |= {"field_selector": fields} if fields else {}
        if namespace is None:
            return self._custom.list_cluster_custom_object(what.group, what.version, what.plural, **chosen, **options)
        return self._custom.list_namespaced_custom_object(
            what.group, what.version, namespace, what.plural, **chosen, **options
        )

    # ---------------------------------------------------------------------------------------------------------- logs

    def log(self, pod: str, namespace: str, *, follow: bool, tail: int | None, container: str) -> Iterator[bytes]:
        """Yield the lines of a pod's log as they come. Raises TaskRefused while its container has not begun."""
        options: dict[str, Any] = {"follow": follow, "container": container, "_preload_content": False}
        options |= {} if tail is None else {"tail_lines": tail}
        with translated(f"cannot read the log of pod {pod}"):
            response: Any = self._core.read_namespaced_pod_log(
                pod, namespace, _request_timeout=(_TIMEOUT[0], _SILENCE if follow else _TIMEOUT[1]), **options
            )
            rest = b""
            try:
                for chunk in response.stream(amt=None, decode_content=True):
                    *lines, rest = (rest + chunk).split(b"\n")
                    yield from lines
            finally:
                response.close()
            if rest:
                yield rest

    # ------------------------------------------------------------------------------------------------------- following

    def follow(
        self,
        what: Resource,
        namespace: str | None,
        *,
        labels: str | None = None,
        fields: str | None = None,
    ) -> Generator[Change | None, None, None]:
        """Yield what there is and then what happens; None once a second in between, so that the caller can look at the time.

        A watch that ends or breaks goes on by itself.
        """
        changes: queue.Queue[Change | Exception] = queue.Queue()
        stop = threading.Event()

        def work() -> None:
            try:
                self._follow(what, namespace, labels, fields, changes, stop)
            except Exception as error:  # noqa: BLE001  # raised where the changes are read
                changes.put(error)

        # A daemon: it may sit in a read for minutes when the command has long ended.
        threading.Thread(target=work, daemon=True, name="watch").start()
        try:
            while True:
                try:
                    change = changes.get(timeout=1)
                except queue.Empty:
                    yield None
                    continue
                if isinstance(change, Exception):
                    raise change
                yield change
        finally:
            stop.set()

    def _follow(
        self,
        what: Resource,
        namespace: str | None,
        labels: str | None,
        fields: str | None,
        changes: "queue.Queue[Change | Exception]",
        stop: threading.Event,
    ) -> None:
        version, failures = "", 0
        while not stop.is_set():
            begun = time.monotonic()
            try:
                if not version:
                    items, version = self._all(what, namespace, labels, fields)
                    changes.put(Change("SYNC", tuple(items)))
                version = self._watch(what, namespace, labels, fields, version, changes)
                failures = 0
            except TaskUnavailable as error:
                version, failures = "", failures + 1
                changes.put(Change("LOST", message=error.message))
                stop.wait(pause_before(failures + 2, error.retry_after, chance=random.random))
            if time.monotonic() - begun < 1:  # something ends watches at once
                stop.wait(1)

    def _watch(
        self,
        what: Resource,
        namespace: str | None,
        labels: str | None,
        fields: str | None,
        version: str,
        changes: "queue.Queue[Change | Exception]",
    ) -> str:
        """Put the events of one watch into the queue; return the version to go on from, "" if that is forgotten."""
        options = {
            "watch": True,
            "resource_version": version,
            "allow_watch_bookmarks": True,
            "timeout_seconds": _WATCH,
            "_request_timeout": (_TIMEOUT[0], _WATCH + 10.0),
            "_preload_content": False,
        }
        with translated(f"cannot watch {what.plural}"):
            stream = WatchStream(self._list(what, namespace, labels, fields, options))
        try:
            while (event := stream.next()) is not None:
                if event["type"] == "ERROR":
                    return ""
                version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    changes.put(Change(event["type"], (event["object"],)))
        finally:
            stream.close()
        return version


def _why_absent(error: TaskClientError) -> str:
    missing_kind = "could not find the requested resource" in error.message
    return "the cluster has no ProcessingTasks; install the chart (docs/install.md)" if missing_kind else "it is not there"
