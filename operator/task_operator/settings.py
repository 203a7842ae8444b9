"""The operator's settings: environment variables with prefix ``OPERATOR_``, read and checked once at start."""

import re
from datetime import timedelta
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from task_contract.certificates import check_certificates
from task_contract.location import check_callback_url
from task_contract.models import Priority, TaskType
from task_contract.networks import Address, AllowList
from task_operator.dispatch import Limits
from task_operator.election import Timing
from task_operator.jobs import RunnerTemplate
from task_operator.observation import Policy
from task_operator.projection import DefaultCallback
from task_operator.resources import MemoryGrowth, classes, in_bytes
from task_operator.selection import check_selector
from task_operator.spans import Sampler
from task_operator.targets import Targets
from task_platform.settings import Address as ListenAddress
from task_platform.settings import Names, OptionalUrl, RedisUrl, product_version

_SUBPATH: Final = r"^([A-Za-z0-9_{][A-Za-z0-9._{}-]*(/[A-Za-z0-9_{][A-Za-z0-9._{}-]*)*)?$"
"""No part of it begins with a dot, so none is ``..``."""
PREFIX: Final = "OPERATOR_"
_LABEL_VALUE: Final = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"

_SHARER: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"
_LEAST_WEIGHT: Final = (
    0.001  # a thousandth of the places is hardly a share any more; a hundredth of it would be a way to starve
)
_QUEUE: Final = r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$"
_LEASE_NAME: Final = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"
_CLASS: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"


def _memory(value: str) -> str:
    in_bytes(value)
    return value


def _resources(value: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    for of in value.values():
        in_bytes(of.get("memory", "1"))
    return value


def _callback_url(value: str | None) -> str | None:
    return None if value is None else check_callback_url(value)


def _allow_list(entries: tuple[str, ...]) -> tuple[str, ...]:
    AllowList.parse(entries)
    return entries


def _pem(text: str) -> str:
    return check_certificates(text) if text else text


def _http_url(value: str | None) -> str | None:
    if value is not None and not (value.startswith(("http://", "https://")) and urlsplit(value).hostname):
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT, where OTLP is taken over HTTP")
    if value is not None and "@" in urlsplit(value).netloc:
        raise ValueError("must have no user and password, since it stands in logs: give them as a header")
    return value


def headers_of(text: str) -> dict[str, str]:
    """Return headers of the form ``name=value,name=value``. Raises ValueError."""
    found = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, sign, value = part.partition("=")
        decoded = unquote(value.strip())
        if not sign or not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name.strip()) or not decoded.isprintable():
            raise ValueError("must be name=value, comma separated, with percent-encoded values")
        found[name.strip()] = decoded
    return found


def _headers(text: str) -> str:
    headers_of(text)
    return text


class DatabaseSettings(BaseSettings):
    """What ``migrate`` is told: it needs no more than the database."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", use_attribute_docstrings=True)

    postgres_url: OptionalUrl = None
    """PostgreSQL for history, results and the fence. None: no history, and a cancel waits for the pod to be gone."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level of what is logged: one JSON object a line, on standard error."""


class Settings(DatabaseSettings):
    """What the operator is told by its environment."""

    redis_url: RedisUrl = None
    """Redis that carries live progress. None: no progress in the status."""
    namespaces: Names = ()
    """Namespaces to look after, comma separated; empty: all of the cluster."""
    selector: Annotated[str, AfterValidator(check_selector)] = ""
    """Label selector of the tasks, pools and schedules to look after, where several installations share namespaces:
    ``team=a``; empty: all."""
    runner_image: Annotated[str, Field(min_length=1)]
    """Image of the runner pods."""
    runner_image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the kubelet asks the registry for it."""
    service_account: Annotated[str, Field(min_length=1)] = "processing-task-runner"
    """Of the runner pods; its token is not mounted."""
    stores_secret: Annotated[str, Field(min_length=1)] = "processing-task-stores"  # noqa: S105 - a name
    """Secret in each task namespace with the runner's environment."""
    documents_claim: str = "processing-task-documents"
    """PersistentVolumeClaim in each task namespace with the documents; empty: none."""
    documents_subpath: Annotated[str, Field(pattern=_SUBPATH)] = ""
    """Folder of it that pods see as /data, such as teams/{namespace}, where the namespace is filled in; empty: all of it."""
    priority_classes: dict[Priority, str] = {}
    """PriorityClass of each priority, as a JSON object; a priority that is not named gets none."""
    runner_resources: Annotated[dict[str, dict[str, str]], AfterValidator(_resources)] = {
        "requests": {"cpu": "250m", "memory": "512Mi"},
        "limits": {"memory": "2Gi"},
    }
    """Resources of a runner container of class medium, as a JSON object; small and large follow from them."""
    runner_resource_classes: dict[
        Annotated[str, Field(pattern=_CLASS)], Annotated[dict[str, dict[str, str]], AfterValidator(_resources)]
    ] = {}
    """Resources of other classes by name, or in place of those that follow, as a JSON object."""
    runner_memory_factor: Annotated[float, Field(ge=1, le=8)] = 2
    """After an attempt that ran out of memory the next one gets this many times as much; 1: as much as before."""
    runner_memory_limit: Annotated[str, AfterValidator(_memory)] = "8Gi"
    """Most memory that an attempt gets by that."""
    runner_node_selector: dict[str, str] = {}
    """Labels of the nodes that runner pods may run on, as a JSON object."""
    runner_tolerations: tuple[dict[str, Any], ...] = ()
    """Taints of nodes that runner pods tolerate, as a JSON list."""
    runner_affinity: dict[str, Any] = {}
    """Affinity rules of runner pods, as a JSON object."""
    runner_env: tuple[dict[str, Any], ...] = ()
    """More variables of runner pods, as in a pod, as a JSON list. They go before what the Secret of the stores has."""
    runner_pod_labels: dict[str, str] = {}
    """More labels of runner pods, as a JSON object; none replaces one of ours."""
    runner_pod_annotations: dict[str, str] = {}
    """More annotations of runner pods, as a JSON object."""
    runner_lost_node_seconds: Annotated[int, Field(ge=0, le=86_400)] = 30
    """So long a pod stays on a node that is lost, unless the tolerations name its taints."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of Secrets with registry credentials, as a JSON list."""
    pending_deadline_seconds: Annotated[float, Field(ge=0)] = 3600
    """So long a pod may fail to start for reasons of its own (image, configuration) before its task fails; 0: for ever."""
    capacity_deadline_seconds: Annotated[float, Field(ge=0)] = 86_400
    """So long a task may wait for a node or for quota before it fails; 0: for ever."""
    job_ttl_seconds: Annotated[float, Field(ge=0, le=86_400)] = 300
    """So long the last Job of a finished task stays, for the log of its pod."""
    stuck_seconds: Annotated[float, Field(ge=0, le=3600)] = 60
    """So long after its grace period a pod that was told to stop may be there, before its attempt goes elsewhere."""
    limit_total: Annotated[int, Field(ge=0)] = 1000
    """So many tasks have a Job at once; 0: all that there are. More only make the scheduler's queue longer."""
    limit_namespace: Annotated[int, Field(ge=0)] = 0
    """So many tasks of one namespace; 0: no limit of its own."""
    limit_knowledge_base: Annotated[int, Field(ge=0)] = 0
    """So many tasks of one knowledge base; 0: no limit of its own."""
    limit_types: dict[TaskType, Annotated[int, Field(ge=0)]] = {}
    """So many tasks of a type, as a JSON object; a type that is not named has no limit of its own."""
    fair_weights: dict[
        Annotated[str, Field(pattern=_SHARER)], Annotated[float, Field(ge=_LEAST_WEIGHT, le=1 / _LEAST_WEIGHT)]
    ] = {}
    """Shares of the places, by namespace, or by namespace/kbId within it, as a JSON object; who is not named has 1."""
    pool_fallback: Literal["wait", "job"] = "wait"
    """What becomes of tasks for worker pools while Redis cannot be used: they wait; or, after a minute, they run as Jobs."""
    kueue_queue: Annotated[str, Field(pattern=_QUEUE)] = ""
    """LocalQueue of Kueue in each task namespace, for Jobs of tasks that name none in spec.kueue; empty: they need no
    admission."""
    task_budget: Annotated[int, Field(ge=0)] = 10_000
    """So many tasks of a namespace stay: over it, the oldest finished ones go before their TTL; 0: any number."""
    instance: Annotated[str, Field(pattern=_LABEL_VALUE)] = "processing-tasks"
    """Name of the installation, for the label app.kubernetes.io/instance of what the operator makes."""
    listen: ListenAddress = "0.0.0.0:8081"
    """Where /healthz, /readyz and /metrics are served."""
    lease_name: Annotated[str, Field(pattern=_LEASE_NAME)] = ""
    """Name of the Lease that the one of several operators holds that acts; empty: there is one operator, and it acts."""
    lease_namespace: Annotated[str, Field(pattern=_LEASE_NAME)] = ""
    """Its namespace; empty: that of the pod, or of the kubeconfig's context."""
    lease_duration_seconds: Annotated[float, Field(ge=1, le=300)] = 10
    """An operator that has not renewed it for so long is replaced."""
    lease_deadline_seconds: Annotated[float, Field(gt=0)] = 7
    """After its last renewal an operator acts for so long, and stops."""
    lease_renew_seconds: Annotated[float, Field(gt=0)] = 2
    """From one renewal to the next."""
    lease_look_seconds: Annotated[float, Field(gt=0)] = 1
    """How often operators that stand by look: one that stops by itself is replaced within this."""
    resync_seconds: Annotated[float, Field(ge=1, le=3600)] = 300
    """How often everything is listed and looked at again, whatever the watch said."""
    sweep_interval_seconds: Annotated[float, Field(ge=0, le=86_400)] = 3600
    """How often the stores of a namespace are swept, besides after tasks that ended badly; 0: never, not even then."""
    callbacks_default_url: Annotated[OptionalUrl, AfterValidator(_callback_url)] = None
    """Where the end of a task is told that names no callback: ``http://HOST/PATH`` with {task_id}, {namespace}, {kb_id}."""
    callbacks_default_secret: Annotated[str, Field(pattern=r"^([^/\s]+/[^/\s]+)?$")] = ""
    """NAME/KEY of the Secret in each task namespace that signs those; empty: they are not signed."""
    callbacks_allow: Annotated[Names, AfterValidator(_allow_list)] = ()
    """What may be called besides Services of the task's namespace: names, *.domain, addresses, networks; comma separated."""
    callbacks_secrets: Names = ("processing-task-callbacks",)
    """Names of the Secrets in task namespaces that may sign; comma separated."""
    callbacks_timeout_seconds: Annotated[float, Field(ge=0.1, le=60)] = 10
    """Longest time of one delivery."""
    callbacks_ca: Annotated[str, AfterValidator(_pem)] = ""
    """Certificates of authorities in PEM form that are trusted besides those of the image."""
    cluster_domain: Annotated[str, Field(pattern=r"^[a-z0-9.-]+$")] = "cluster.local"
    """Domain of the cluster, below which Services have their full names."""
    rabbitmq_url: OptionalUrl = None
    """RabbitMQ to which life-cycle events are published, amqp:// or amqps://. None: they are not."""
    rabbitmq_exchange: Annotated[str, Field(min_length=1, max_length=127)] = "processing-tasks"
    """Topic exchange that is declared for them."""
    traces_endpoint: Annotated[OptionalUrl, AfterValidator(_http_url)] = None
    """OpenTelemetry collector to which spans of tasks are sent, by OTLP over HTTP: http://HOST:4318. None: they are not."""
    traces_headers: Annotated[str, AfterValidator(_headers)] = ""
    """Headers for it: ``name=value``, comma separated, values percent-encoded, as in OTEL_EXPORTER_OTLP_HEADERS."""
    traces_ratio: Annotated[float, Field(ge=0, le=1)] = 1
    """Part of the tasks that have spans, of those whose caller gave no trace; a caller's own decision goes before."""
    history_days: Annotated[float, Field(ge=0, le=36_500)] = 0
    """So long after its deletion what PostgreSQL has of a task stays there; 0: for ever."""

    @model_validator(mode="after")
    def _needs_postgres(self) -> Self:
        for name in ("callbacks_default_url", "rabbitmq_url", "traces_endpoint"):
            if getattr(self, name) is not None and self.postgres_url is None:
                raise ValueError(f"{PREFIX}{name.upper()} needs {PREFIX}POSTGRES_URL: what is sent waits in PostgreSQL")
        return self

    @model_validator(mode="after")
    def _leases_end_in_order(self) -> Self:
        if not self.lease_renew_seconds < self.lease_deadline_seconds <= 0.8 * self.lease_duration_seconds:
            raise ValueError(
                f"{PREFIX}LEASE_RENEW_SECONDS, _DEADLINE_SECONDS and _DURATION_SECONDS must grow in this order, and the "
                "deadline be 80 % of the duration at most: a leader is to have stopped before another one begins"
            )
        return self

    def sampler(self) -> Sampler | None:
        """Return which tasks have spans; None: none."""
        return None if self.traces_endpoint is None else Sampler(self.traces_ratio)

    def timing(self) -> Timing:
        """Return the times of the election."""
        return Timing(
            duration=self.lease_duration_seconds,
            deadline=self.lease_deadline_seconds,
            renew=self.lease_renew_seconds,
            look=self.lease_look_seconds,
        )

    def default_callback(self) -> DefaultCallback | None:
        """Return the callback of tasks that name none."""
        if self.callbacks_default_url is None:
            return None
        name, _, key = self.callbacks_default_secret.partition("/")
        return DefaultCallback(self.callbacks_default_url, name or None, key or None)

    def callback_targets(self, api_servers: frozenset[Address]) -> Targets:
        """Return who may be called; who chose the default has allowed its host by that."""
        allowed = AllowList.parse(self.callbacks_allow)
        if self.callbacks_default_url is not None:
            host = (urlsplit(self.callbacks_default_url).hostname or "").rstrip(".")
            allowed = AllowList(allowed.names | {host}, allowed.networks)
        return Targets(allowed=allowed, api_servers=api_servers, cluster_domain=self.cluster_domain)

    def runner_template(self) -> RunnerTemplate:
        """Return what every runner pod has in common."""
        return RunnerTemplate(
            image=self.runner_image,
            image_pull_policy=self.runner_image_pull_policy,
            service_account=self.service_account,
            stores_secret=self.stores_secret,
            documents_claim=self.documents_claim or None,
            documents_subpath=self.documents_subpath,
            priority_classes=self.priority_classes,
            classes=classes(self.runner_resources, configured=self.runner_resource_classes),
            memory_growth=MemoryGrowth(factor=self.runner_memory_factor, limit=self.runner_memory_limit),
            node_selector=self.runner_node_selector,
            tolerations=self.runner_tolerations,
            affinity=self.runner_affinity,
            env=self.runner_env,
            pod_labels=self.runner_pod_labels,
            pod_annotations=self.runner_pod_annotations,
            lost_node_seconds=self.runner_lost_node_seconds,
            image_pull_secrets=self.image_pull_secrets,
            kueue_queue=self.kueue_queue,
            instance=self.instance,
            version=product_version(),
        )

    def limits(self) -> Limits:
        """Return how many tasks may have a Job at once, and who has which share of them."""
        return Limits(
            total=self.limit_total,
            namespace=self.limit_namespace,
            knowledge_base=self.limit_knowledge_base,
            types={str(kind): most for kind, most in self.limit_types.items()},
            weights=self.fair_weights,
        )

    def policy(self) -> Policy:
        """Return the waits that are the operator's own."""
        return Policy(
            pending_deadline=timedelta(seconds=self.pending_deadline_seconds),
            capacity_deadline=timedelta(seconds=self.capacity_deadline_seconds),
            job_ttl=timedelta(seconds=self.job_ttl_seconds),
            resource_classes=frozenset(self.runner_template().classes),
            stuck_patience=timedelta(seconds=self.stuck_seconds),
            pool_fallback=self.pool_fallback == "job",
        )
