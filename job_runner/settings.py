"""The runner's settings, from the environment: ``TASKS_POSTGRES_URL`` and so on.

Stores are optional one by one: a health check looks at what is there, a document names what it misses.
"""

import re
import uuid
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from job_runner.cpus import cpu_limit
from job_runner.embed import PACKAGED_MODEL
from task_contract.certificates import check_certificates
from task_contract.errors import StoreUnavailable
from task_contract.names import DOCUMENT_ROOT, TERMINATION_LOG
from task_contract.networks import AllowList

PREFIX = "TASKS_"


def _listed(value: object) -> object:
    """Split a list in an environment variable at commas and white space."""
    return tuple(re.findall(r"[^,\s]+", value)) if isinstance(value, str) else value


def _checked_allow_list(entries: tuple[str, ...]) -> tuple[str, ...]:
    AllowList.parse(entries)
    return entries


class Settings(BaseSettings):
    """Settings with their defaults; ``python -m job_runner --help`` prints them."""

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, use_attribute_docstrings=True
    )

    postgres_url: SecretStr
    """postgresql://user:password@host:5432/database, the ledger of knowledge bases."""
    milvus_url: SecretStr | None = None
    """http://host:19530, the vector store."""
    milvus_token: SecretStr | None = None
    """user:password or an API key."""
    elasticsearch_url: SecretStr | None = None
    """http://host:9200, the full-text store; user and password may stand in it."""
    elasticsearch_api_key: SecretStr | None = None
    """Instead of user and password in the URL."""
    elasticsearch_ca: Annotated[str, Field(max_length=2**20), AfterValidator(check_certificates)] | None = None
    """Certificates in PEM form that an https:// server is trusted by, besides those of the system."""
    elasticsearch_analyzer: Annotated[str, Field(max_length=64)] | None = None
    """Analyzer of new indices. Default: the first of smartcn, cjk, standard that the server has."""
    elasticsearch_replicas: Annotated[int, Field(ge=0, le=8)] = 0
    """Copies of each shard of new indices; 1 or more needs as many further nodes."""
    redis_url: SecretStr | None = None
    """redis://host:6379/0, redis+sentinel://host:26379,host:26379/service/0 or redis+cluster://host:6379,host:6379, for live
    progress; it may be absent or die."""
    document_root: Path = Path(DOCUMENT_ROOT)
    """Folder of the document volume."""
    embedding_model: str = PACKAGED_MODEL
    """Embedding model: one that a package carries, by name, or the absolute path of a folder of sentence-transformers."""
    embedding_models: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = ()
    """Further models, as TASKS_EMBEDDING_MODEL, separated by commas: a task may name one in payload.embeddingModel, and a
    knowledge base keeps to the one that filled it."""
    embedding_threads: Annotated[int, Field(ge=1, le=256)] | None = None
    """Threads that the embedding model computes with. Default: the container's limit on CPUs, 1 without a limit."""
    source_allow: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed), AfterValidator(_checked_allow_list)] = ()
    """Where documents may be fetched from besides public addresses: host names, *.domains, addresses, networks."""
    source_ports: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_535)], ...], NoDecode, BeforeValidator(_listed), Field(min_length=1)
    ] = (80, 443)
    """Ports of servers that documents may be fetched from."""
    source_allow_http: bool = False
    """true: documents may be fetched from http:// URLs too, where anyone on the way can change them."""
    source_ca: Annotated[str, Field(max_length=2**20), AfterValidator(check_certificates)] | None = None
    """Certificates in PEM form that servers of documents are trusted by, besides those of the system."""
    source_seconds: Annotated[float, Field(gt=0)] = 300
    """Longest time of fetching one document from a server."""
    s3_buckets: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?$")], ...],
        NoDecode,
        BeforeValidator(_listed),
    ] = ()
    """Buckets that tasks of this namespace may read, whole (manuals) or below a prefix (manuals/team-a/). Default: none."""
    s3_endpoint: Annotated[str, Field(pattern=r"^https?://[^/@?#\s]+/?$")] | None = None
    """https://minio.example.com:9000. Default: Amazon's, of the region."""
    s3_region: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")] = "us-east-1"
    """Region of the buckets."""
    s3_addressing: Literal["path", "virtual"] = "path"
    """path: https://endpoint/bucket/key; virtual: https://bucket.endpoint/key."""
    s3_access_key_id: SecretStr | None = None
    """Account on the object store; it should have the right to read objects and no other."""
    s3_secret_access_key: SecretStr | None = None
    """Its key."""
    s3_session_token: SecretStr | None = None
    """Session of a temporary account."""
    s3_anonymous: bool = False
    """true: requests are not signed, for public buckets."""
    max_document_bytes: Annotated[int, Field(ge=1)] = 512 * 2**20
    """Largest document."""
    inline_result_bytes: Annotated[int, Field(ge=0, le=256 * 2**20)] = 8 * 2**20
    """Most vectors, in bytes, that are kept in PostgreSQL; more need payload.outputPath. 8 MiB hold those of the most texts
    that a task may carry, 1000, of a model with up to 2,097 dimensions."""
    max_chunks: Annotated[int, Field(ge=1, le=1_000_000)] = 100_000
    """Most chunks of one document."""
    parser_memory_bytes: Annotated[int, Field(ge=128 * 2**20)] = 2**30
    """Address space of the parsing process."""
    parser_seconds: Annotated[int, Field(ge=1)] = 600
    """Longest time of parsing one document; at most half of it on a CPU."""
    parser_output_bytes: Annotated[int, Field(ge=1024)] = 256 * 2**20
    """Largest text of one document."""
    ocr_memory_bytes: Annotated[int, Field(ge=2**30)] = 3 * 2**30
    """Address space of the parsing process where OCR is installed, for PDF, pictures and e-mails; it uses a third of it."""
    ocr_seconds: Annotated[int, Field(ge=1)] = 3600
    """Longest time of parsing one of these there; a scanned page takes seconds."""
    verify_seconds: Annotated[float, Field(gt=0)] = 15
    """How long a store may take to show what was written."""
    attempt: Annotated[int, Field(ge=1, le=32767)] = 1
    """Number of the attempt, set by the operator."""
    holder: Annotated[str, Field(min_length=1, max_length=253)] = Field(default_factory=lambda: str(uuid.uuid4()))
    """Identity of this process in the ledger: the pod's uid. Default: random."""
    shards: Annotated[str, Field(pattern=r"^[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*$")] | None = None
    """Of a batch: which shards the Job is for, in the order of its indexes, set by the operator. Default: all."""
    shard_index: Annotated[int, Field(ge=0)] = 0
    """Of a batch: the index of this pod in the Job, set by the operator."""
    pool: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """Of a worker: name of its pool, set by the operator."""
    pool_namespace: Annotated[str, Field(min_length=1, max_length=63)] = "default"
    """Of a worker: namespace of its pool, set by the operator."""
    pool_revision: Annotated[str, Field(max_length=63)] = ""
    """Of a worker: what it was made from, set by the operator."""
    pool_concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Of a worker: tasks that it has at once."""
    pool_batch_size: Annotated[int, Field(ge=1, le=256)] = 64
    """Of a worker: most texts, of several tasks, in one call of the model."""
    pool_lease_seconds: Annotated[float, Field(ge=1, le=3600)] = 30
    """Of a worker: so long it may be silent before its tasks go to others."""
    pool_grace_seconds: Annotated[float, Field(ge=0, le=86_400)] = 60
    """Of a worker: after SIGTERM it hands back what it has not finished in time to end within this."""
    worker: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Of a worker: its name, that of its pod. Two workers of one name would take each other's tasks for their own."""
    worker_job: Annotated[str, Field(max_length=253)] = ""
    """Of a worker: name of its Job."""
    termination_log: Path = Path(TERMINATION_LOG)
    """File for the termination message; skipped where it does not exist."""
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    """debug, info, warning or error."""

    @property
    def models(self) -> tuple[str, ...]:
        """Embedding models that this runner has, the default first, each once."""
        return tuple(dict.fromkeys((self.embedding_model, *self.embedding_models)))

    @property
    def threads(self) -> int:
        """Threads of the embedding model. Without a limit there is no telling which CPUs other pods need: one."""
        return self.embedding_threads or cpu_limit() or 1

    @property
    def secrets(self) -> frozenset[str]:
        """What no message may show: secret values, and passwords in URLs, also as they are encoded there."""
        fields = (getattr(self, name) for name in type(self).model_fields)
        values = {field.get_secret_value() for field in fields if isinstance(field, SecretStr)}
        passwords = {_password(value) for value in values}
        return frozenset({*values, *passwords, *map(unquote, passwords)} - {""})

    @property
    def worker_missing(self) -> list[str]:
        """Names of the variables that a worker needs and that are not set."""
        needed = {"pool": self.pool, "worker": self.worker, "redis_url": self.redis_url}
        return [PREFIX + name.upper() for name, value in needed.items() if value is None]

    @property
    def document_stores_missing(self) -> list[str]:
        """Names of the variables that document_processing needs and that are not set."""
        needed = {"milvus_url": self.milvus_url, "elasticsearch_url": self.elasticsearch_url}
        return [PREFIX + name.upper() for name, value in needed.items() if value is None]


def _password(secret: str) -> str:
    """Return the password in ``scheme://user:password@host`` or ``user:password``; empty if there is none."""
    scheme, separator, rest = secret.partition("://")
    return (rest.rpartition("@")[0] if separator else scheme).partition(":")[2]


def revealed(secret: SecretStr | None) -> str | None:
    """Return the value of a setting that logs do not show."""
    return None if secret is None else secret.get_secret_value()


def load() -> Settings:
    """Read the environment.

    Raises StoreUnavailable, so that the attempt is given back until the settings are corrected: they are never the task's
    fault. The message names each bad variable and never shows a value, as values hold passwords.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(
            f"{PREFIX}{str(problem['loc'][0]).upper()}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False, include_context=False)
        )
        message = f"cannot start the runner: {problems}; correct the environment (in a cluster, the Secret of the stores)"
        raise StoreUnavailable(message) from None


def describe() -> str:
    """Return the variables with their meaning and defaults, for ``--help``."""
    lines = []
    for name, field in Settings.model_fields.items():
        default = "required" if field.is_required() else field.default
        if isinstance(default, tuple):
            default = ", ".join(map(str, default)) or None
        shown = "" if field.default_factory is not None or default is None else f" [{default}]"
        lines.append(f"  {PREFIX}{name.upper()}{shown}\n      {field.description}")
    return "\n".join(lines)
