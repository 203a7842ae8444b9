"""The gateway's settings: environment variables with prefix ``GATEWAY_``, read and checked once at start."""

import re
from enum import StrEnum
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from task_contract.certificates import check_certificates
from task_gateway.buckets import MOST_BYTES
from task_gateway.problems import is_namespace
from task_platform.settings import Address, EmptyIsNone, Names, OptionalAddress, OptionalUrl, RedisUrl

PREFIX: Final = "GATEWAY_"


class Auth(StrEnum):
    """Who may."""

    KUBERNETES = "kubernetes"
    """Bearer tokens of the cluster, and its rights."""
    TRUST_THE_NETWORK = "trust-the-network"
    """Everybody who can reach the gateway may do everything that it may."""


def _namespaces(value: tuple[str, ...]) -> tuple[str, ...]:
    for name in value:
        if not is_namespace(name):
            raise ValueError(f"{name!r} is no name of a namespace: lower-case letters, digits and '-', at most 63")
    return tuple(dict.fromkeys(value))


def _place(value: str) -> str:
    if re.fullmatch(r"/.*|s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^?#]*)?", value) is None:
        raise ValueError("must be the absolute path of a folder, or s3://BUCKET/PREFIX")
    return value


def _endpoint(value: str) -> str:
    if re.fullmatch(r"https?://[^/@?#\s]+/?", value) is None:
        raise ValueError("must be https://HOST:PORT, without a path")
    return value


class Settings(BaseSettings):
    """What the gateway is told by its environment."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore", use_attribute_docstrings=True)

    postgres_url: Annotated[str, Field(min_length=1)]
    """PostgreSQL with the operator's tables: lists, history, tickets. While it is away tasks are accepted all the same."""
    redis_url: RedisUrl = None
    """Redis that carries live progress. None: progress is as fresh as the status of the task, some seconds."""
    namespaces: Annotated[Names, AfterValidator(_namespaces)] = ()
    """Namespaces that may be used through this gateway, comma separated; empty: all of the cluster."""
    default_namespace: Annotated[str, AfterValidator(lambda name: _namespaces((name,))[0])] = "default"
    """Where a task goes whose request names no namespace."""
    task_labels: dict[str, str] = {}
    """Labels of the tasks that are created here, as a JSON object, where a request gives no others: those by which the
    operator of this installation knows its tasks (OPERATOR_SELECTOR)."""
    auth: Auth = Auth.KUBERNETES
    """kubernetes, or trust-the-network: no token is asked for."""
    audiences: Names = ()
    """Audiences that a token must be for, comma separated; empty: that of the API server."""
    auth_cache_seconds: Annotated[float, Field(ge=0, le=10)] = 10
    """So long an answer about a token or a right is believed: a right that is taken away works for so long."""
    listen: Address = "0.0.0.0:8084"
    """The task API."""
    front_listen: OptionalAddress = "0.0.0.0:8080"
    """The front door: the same, on a second port; empty: none."""
    rate: Annotated[float, Field(gt=0, le=100_000)] = 200
    """Requests a second of one caller, each replica for itself; each task of a batch counts as one."""
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """So many at once."""
    body_bytes: Annotated[int, Field(ge=1024, le=2**24)] = 262_144
    """Largest body of a request. A spec may have 64 KiB."""
    batch_bytes: Annotated[int, Field(ge=1024, le=2**28)] = 8_388_608
    """Largest body of a batch."""
    batch_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    """So many tasks of a batch are created at once."""
    drain_seconds: Annotated[float, Field(ge=0, le=300)] = 5
    """After SIGTERM new requests are taken for so long: until every proxy has heard that this replica is leaving."""
    stop_seconds: Annotated[float, Field(ge=0, le=300)] = 20
    """After that, so long for requests that are under way."""
    cors_origins: Names = ()
    """Origins whose pages may use the gateway, such as https://app.example.com, comma separated; empty: none."""
    live_clients: Annotated[int, Field(ge=1, le=100_000)] = 5000
    """So many WebSockets and event streams at once."""
    documents: Annotated[Annotated[str, AfterValidator(_place)] | None, EmptyIsNone] = None
    """Where uploads are put: a folder with one folder for each namespace, which is the document volume of that namespace; or
    s3://BUCKET/PREFIX, below which each namespace has a folder. Empty: no uploads."""
    upload_bytes: Annotated[int, Field(ge=1, le=2**40)] = 512 * 2**20
    """Largest upload, in a bucket at most 5 GiB. Runners read as much by default."""
    s3_endpoint: Annotated[Annotated[str, AfterValidator(_endpoint)] | None, EmptyIsNone] = None
    """Of the bucket for uploads: https://minio.example.com:9000. Default: Amazon's, of the region."""
    s3_region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] = "us-east-1"
    """Its region."""
    s3_addressing: Literal["path", "virtual"] = "path"
    """path: https://endpoint/bucket/key; virtual: https://bucket.endpoint/key."""
    s3_access_key_id: SecretStr | None = None
    """Account that may list the bucket, and read, write and delete the objects below the prefix."""
    s3_secret_access_key: SecretStr | None = None
    """Its key."""
    s3_session_token: SecretStr | None = None
    """Session of a temporary account."""
    s3_ca: Annotated[Annotated[str, AfterValidator(check_certificates)] | None, EmptyIsNone] = None
    """Certificates in PEM form that the object store is trusted by, besides those of the system."""
    milvus_url: OptionalUrl = None
    """For GET /api/v1/stats/system alone: whether it can be connected to."""
    elasticsearch_url: OptionalUrl = None
    """The same."""
    rabbitmq_url: OptionalUrl = None
    """RabbitMQ with a queue of tasks, amqp:// or amqps://. None: there is none."""
    rabbitmq_queue: Annotated[str, Field(min_length=1, max_length=200)] = "processing-tasks"
    """The queue; it is declared, and one of the same name and .dead for messages that are no tasks."""
    rabbitmq_account: str = ""
    """Whose rights its messages have: system:serviceaccount:NAMESPACE:NAME. Required unless the network is trusted."""
    rabbitmq_prefetch: Annotated[int, Field(ge=1, le=1000)] = 16
    """So many messages a replica works on at once."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level of what is logged: one JSON object a line, on standard error."""

    @model_validator(mode="after")
    def _knows_whose_messages_they_are(self) -> Self:
        if self.rabbitmq_url is not None and self.auth is Auth.KUBERNETES and not self.rabbitmq_account:
            raise ValueError(f"{PREFIX}RABBITMQ_ACCOUNT is required: name the account whose rights the messages have")
        return self

    @model_validator(mode="after")
    def _can_write_to_its_bucket(self) -> Self:
        if (self.documents or "").startswith("s3://"):
            if self.s3_access_key_id is None or self.s3_secret_access_key is None:
                raise ValueError(
                    f"{PREFIX}S3_ACCESS_KEY_ID and {PREFIX}S3_SECRET_ACCESS_KEY are required for uploads into a bucket"
                )
            if self.upload_bytes > MOST_BYTES:
                raise ValueError(f"{PREFIX}UPLOAD_BYTES: a bucket takes uploads of at most {MOST_BYTES} bytes")
        return self
