"""ProcessingTask as frozen pydantic models: the source of the CRD, the one place where a task is parsed.

Two ways in. :func:`ProcessingTask.model_validate` ignores unknown fields, so that after a rollback older code reads what
newer code stored. :func:`parse_manifest` refuses them: it is for files, the CLI and services, where an unknown field is a
typing error.

Fields are camelCase outside and snake_case inside. Bounds here become bounds of the CRD's schema; rules over several fields
are CEL in :mod:`task_contract.crd`.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic.alias_generators import to_camel

from task_contract.errors import InvalidTask
from task_contract.location import check_callback_url, check_file_path, check_output_path, check_prefix


class TaskType(StrEnum):
    """What a task does."""

    DOCUMENT_PROCESSING = "document_processing"
    BATCH_PROCESSING = "batch_processing"
    KNOWLEDGE_INDEXING = "knowledge_indexing"
    EMBEDDING_GENERATION = "embedding_generation"
    VECTOR_STORAGE = "vector_storage"
    HEALTH_CHECK = "health_check"


class Priority(StrEnum):
    """Mapped to a PriorityClass by the operator's settings."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Phase(StrEnum):
    """The summary that people read; code reads conditions."""

    QUEUED = "Queued"
    PROCESSING = "Processing"
    RETRYING = "Retrying"
    COMPLETED = "Completed"
    FAILED = "Failed"
    CANCELED = "Canceled"

    @property
    def finished(self) -> bool:
        """Whether the task will never change phase again."""
        return self in {Phase.COMPLETED, Phase.FAILED, Phase.CANCELED}


class Stage(StrEnum):
    """Where the pipeline is; the order of the members is the order of the work."""

    FETCH = "fetch"
    PARSE = "parse"
    SPLIT = "split"
    EMBED = "embed"
    STORE = "store"
    ANALYZE = "analyze"
    VERIFY = "verify"
    GATE = "gate"
    PUBLISH = "publish"
    CHECK = "check"


# Durations are written as in Go and Kubernetes: "90s", "1h30m", "250ms". CEL's duration() reads the same form.
DURATION_PATTERN: Final = r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"
_UNITS: Final = {
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}


def parse_duration(value: object) -> object:
    """Turn ``"1h30m"`` into a ``timedelta``; leave a ``timedelta`` as it is; raise ``ValueError`` for anything else."""
    if isinstance(value, timedelta):
        return value
    if not isinstance(value, str) or not re.fullmatch(DURATION_PATTERN, value):
        raise ValueError('must be a duration such as "30s", "10m" or "1h30m"')
    parts = re.findall(r"([0-9]+)(h|ms|m|s)", value)
    return sum((int(number) * _UNITS[unit] for number, unit in parts), timedelta())


def format_duration(value: timedelta) -> str:
    """Write a ``timedelta`` as :func:`parse_duration` reads it, with the largest units that fit.

    >>> format_duration(timedelta(minutes=90))
    '1h30m'
    """
    rest = round(value / timedelta(milliseconds=1))
    text = ""
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)):
        count, rest = divmod(rest, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN, "maxLength": 28}),
]
Timestamp = Annotated[
    # isoformat takes a tenth of strftime's time, and a status has a dozen of them.
    datetime, PlainSerializer(lambda at: f"{at.isoformat()[:19]}Z", return_type=str, when_used="json")
]
UtcTimestamp = Annotated[
    AwareDatetime,
    AfterValidator(lambda at: at.astimezone(UTC)),
    PlainSerializer(lambda at: at.strftime("%Y-%m-%dT%H:%M:%SZ"), return_type=str, when_used="json"),
]
"""A time that a caller gives, in any time zone."""
TaskName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
Text = Annotated[str, Field(max_length=1024)]
Resource = Annotated[str, Field(max_length=32, pattern=r"^[0-9]+([.][0-9]+)?(m|[kMGTPE]i?)?$")]
"""A quantity of CPU or memory, such as ``250m`` or ``2Gi``."""


class Model(BaseModel):
    """Base of all parts: frozen, camelCase outside, unknown fields ignored (see the module's docstring)."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, alias_generator=to_camel, populate_by_name=True, extra="ignore", use_attribute_docstrings=True
    )

    def manifest(self) -> dict[str, Any]:
        """Return the model as it stands in a manifest: camelCase, absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


# ---------------------------------------------------------------------------------------------------------------- spec


class ProcessingMode(StrEnum):
    """How a document is cut into chunks."""

    INTELLIGENT_SPLIT = "intelligent_split"
    FIXED = "fixed"
    SEMANTIC = "semantic"


class Action(StrEnum):
    """What becomes of a document, or of a whole knowledge base. The first three are those of document_processing."""

    UPSERT = "upsert"
    DELETE = "delete"
    DELETE_KNOWLEDGE_BASE = "delete_knowledge_base"
    INDEX = "index"
    ROLLBACK = "rollback"
    REPAIR = "repair"
    PURGE = "purge"


class EnhancementType(StrEnum):
    """What knowledge_indexing adds to the chunks of a knowledge base."""

    NONE = "none"
    SEMANTIC_ANALYSIS = "semantic_analysis"


class Component(StrEnum):
    """What a health check looks at."""

    POSTGRES = "postgres"
    REDIS = "redis"
    MILVUS = "milvus"
    ELASTICSEARCH = "elasticsearch"
    MODEL = "model"
    DOCUMENTS = "documents"


INLINE_BYTES: Final = 48 * 1024
"""Most bytes of a list of texts or paths: a specification has at most 64 KiB."""

TEXT_CHARACTERS: Final = 24_576
"""Most characters of a text that embedding_generation takes; embedding models read far less."""


def _bounded(values: list[str]) -> list[str]:
    if (size := sum(len(value.encode(errors="replace")) for value in values)) > INLINE_BYTES:
        raise ValueError(f"has {size} bytes, {INLINE_BYTES} are the most; put them into a file")
    return values


FilePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Document = Annotated[FilePath, AfterValidator(check_file_path)]
# Of lists the bounds are lower: the API server estimates the cost of a rule from the longest list of the longest texts.
_ListedDocument = Annotated[
    str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$"), AfterValidator(check_file_path)
]
_Prefix = Annotated[FilePath, AfterValidator(check_prefix)]
_Output = Annotated[FilePath, AfterValidator(check_output_path)]


class Payload(Model):
    """What a task works on. One flat object for all types; CEL says which fields fit which type.

    There are no defaults in the schema: a default of one type would be an unknown field of another. The properties
    ``effective_*`` give the defaults.
    """

    action: Action | None = None
    """Of document_processing: upsert (default) publishes the document; delete removes every version of it from both stores,
    and needs no file; delete_knowledge_base removes all documents, and needs confirm. Of knowledge_indexing: index (default)
    does what rebuildIndex and enhancementType say; rollback makes the generation before serve again; repair mends what
    ledger and stores do not have alike; purge removes the knowledge base everywhere, and needs confirm."""
    confirm: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """The kbId once more: what delete_knowledge_base and purge remove cannot be brought back."""
    file_path: _Document | None = None
    """The document: a path below the document volume, absolute (``/data/handbook.pdf``) or relative (``handbook.pdf``),
    ``s3://bucket/key``, or ``https://host/path``, where the runner's settings allow it ``http://`` too."""
    file_bytes: Annotated[int, Field(ge=0, le=2**40)] | None = None
    """Size of the file, where the caller knows it: picks the resources."""
    file_paths: Annotated[list[_ListedDocument], Field(min_length=1, max_length=1000), AfterValidator(_bounded)] | None = (
        None
    )
    """The documents of a batch, each as filePath: at most 1000 of 512 characters, and 48 KiB in all; each is its own
    documentId."""
    prefix: _Prefix | None = None
    """Instead of filePaths: a folder of the document volume (``manuals`` or ``/data/manuals``), or ``s3://bucket/prefix/``;
    every file below it that glob matches is a document."""
    glob: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    """Which files below prefix, by their path from there: ``*.pdf``, ``2026/**/*.md``. Default: ``**``, all of them."""
    manifest_path: _Document | None = None
    """Instead of filePaths: a text file with one filePath a line, or a JSON object a line with filePath and, where it is
    another, documentId and metadata."""
    parallelism: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pods of a batch that work at once. Default: 4."""
    max_failed_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    """A batch of which more documents than that fail for good is Failed; what the others brought stays. Default: 0."""
    document_id: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    """Identity of the document within its knowledge base; a later task with the same id replaces it. Default: filePath; of
    vector_storage inputPath, or fromTask."""
    chunk_size: Annotated[int, Field(ge=50, le=8000)] | None = None
    """Largest size of a chunk in characters (Unicode code points). Default: 1000; of a rebuild, that of each document."""
    chunk_overlap: Annotated[int, Field(ge=0, le=4000)] | None = None
    """Characters repeated from one chunk to the next. Default: 200, or a fifth of a chunkSize below 1000."""
    processing_mode: ProcessingMode | None = None
    """intelligent_split (default) ends chunks at sentences and headings, semantic also where the topic changes, by the
    meaning of the sentences; fixed cuts at chunkSize."""
    embedding_model: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Name of the embedding model, one of the runner's settings. Default: that of the knowledge base, else the first of the
    settings. A rebuild changes the knowledge base to it; of vector_storage it is what has made the vectors."""
    metadata: (
        Annotated[
            dict[Annotated[str, Field(min_length=1, max_length=63)], Annotated[str, Field(max_length=1024)]],
            Field(max_length=32),
        ]
        | None
    ) = None
    """Labels stored with every chunk of the document, for filters: at most 32."""
    rebuild_index: bool | None = None
    """true: fill a new generation of the knowledge base from its stored documents while the present one serves, and switch
    when its retrieval is as good. What the new one would have alike is copied."""
    enhancement_type: EnhancementType | None = None
    """semantic_analysis adds language, keywords, a summary line and near-duplicates to every chunk. Default: none."""
    golden_path: _Document | None = None
    """Questions that the gate of a rebuild asks: a JSON object a line with question and documentId, and optionally contains,
    a piece of the text that answers. Default: questions made from headings."""
    max_recall_drop: Annotated[int, Field(ge=0, le=100)] | None = None
    """Percentage points that recall@5 of a new generation may be lower by. Default: 2."""
    keep_generation_seconds: Annotated[int, Field(ge=0, le=31_536_000)] | None = None
    """How long the generation before is kept after a switch, for a rollback. Default: 604800, a week."""
    texts: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=TEXT_CHARACTERS)]],
            Field(min_length=1, max_length=1000),
            AfterValidator(_bounded),
        ]
        | None
    ) = None
    """What embedding_generation computes vectors of: at most 1000, and 48 KiB in all."""
    input_path: _Document | None = None
    """Instead of texts, or the rows of vector_storage: a file with a JSON object a line (``.jsonl``), or ``.parquet`` where
    the runner's image reads it. Of embedding_generation the field text counts; of vector_storage vector, text, and
    optionally id and metadata."""
    output_path: _Output | None = None
    """Where the vectors go: ``outputs/NAME.npy``, ``.jsonl`` or ``.parquet`` on the document volume. Default: into
    PostgreSQL, up to a stated size."""
    from_task: Annotated[str, Field(min_length=1, max_length=253)] | None = None
    """Instead of inputPath: the name of an embedding_generation task of the namespace that is Completed."""
    components: Annotated[list[Component], Field(min_length=1, max_length=6)] | None = None
    """What a health_check looks at. Default: everything that is configured."""

    @property
    def effective_document_id(self) -> str:
        """``documentId``, or what names the input. Raises :class:`~task_contract.errors.InvalidTask` if nothing does."""
        if (identity := self.document_id or self.file_path or self.input_path or self.from_task) is None:
            raise InvalidTask("cannot identify the document: set payload.filePath or payload.documentId")
        return identity

    @property
    def effective_chunk_size(self) -> int:
        """``chunkSize`` or 1000 characters, the figure of the platform's own services."""
        return self.chunk_size or 1000

    @property
    def effective_chunk_overlap(self) -> int:
        """``chunkOverlap`` or a fifth of the chunk size, 200 characters at most."""
        return min(200, self.effective_chunk_size // 5) if self.chunk_overlap is None else self.chunk_overlap


class RetryPolicy(Model):
    """When and how often a failed attempt is tried again."""

    limit: Annotated[int, Field(ge=0, le=20)] = 3
    """Attempts after the first one. 0: never try again."""
    initial_delay: Duration = timedelta(seconds=10)
    """Wait after the first failure."""
    factor: Annotated[float, Field(ge=1, le=10)] = 2
    """Each wait is this many times the one before."""
    max_delay: Duration = timedelta(minutes=10)
    """Longest wait."""
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Spread of each wait: 0.2 is ±20 %."""


class SecretKeyRef(Model):
    """A key of a Secret in the task's namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    key: Annotated[str, Field(min_length=1, max_length=253)]


class Callback(Model):
    """Where to tell that a task has finished."""

    url: Annotated[str, Field(min_length=1, max_length=2048, pattern=r"^https?://"), AfterValidator(check_callback_url)]
    """``https://host/path`` or ``http://``; ``{task_id}``, ``{namespace}`` and ``{kb_id}`` in the path are filled in."""
    secret_ref: SecretKeyRef | None = None
    """The Secret, of those that the operator may read, and the key in it whose value signs; without it nothing is signed."""


class Executor(StrEnum):
    """What runs a task."""

    AUTO = "auto"
    JOB = "job"
    POOL = "pool"


class Kueue(Model):
    """Admission by Kueue."""

    queue_name: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
    """A LocalQueue of the namespace."""


_TIMEOUTS: Final = {
    TaskType.HEALTH_CHECK: timedelta(minutes=2),
    # A thousand documents, and all documents of a knowledge base.
    TaskType.BATCH_PROCESSING: timedelta(hours=6),
    TaskType.KNOWLEDGE_INDEXING: timedelta(hours=6),
}
"""Where the default is not 30 minutes."""


class Spec(Model):
    """What the caller wants. Everything but cancel, suspend, priority and ttlSecondsAfterFinished is immutable."""

    type: TaskType
    """What to do."""
    kb_id: (
        Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$")] | None
    ) = None
    """The knowledge base; with the namespace it is the tenant. Required for every type but health_check and
    embedding_generation."""
    priority: Priority = Priority.NORMAL
    """Which tasks go first; the chart maps each to a PriorityClass. Can be changed while the task is Queued."""
    payload: Payload = Payload()
    """What to do it with; which fields fit depends on the type."""
    retry: RetryPolicy = RetryPolicy()
    """When and how often a failed attempt is tried again."""
    timeout: Duration | None = None
    """Longest time of one attempt, from the start of its container. Default by type: 30m, health_check 2m,
    batch_processing and knowledge_indexing 6h."""
    stall_timeout: Duration | None = None
    """Longest time of an attempt without progress: a page, a batch, rows. Default by type: 15m, health_check 1m."""
    deadline: Duration | None = None
    """Longest time of the whole task, from its creation. Default: none."""
    resource_class: Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")] | None = (
        None
    )
    """Memory and CPU of the pod: small, medium, large, or a class of the operator's settings. Default: by the document."""
    executor: Executor = Executor.AUTO
    """What runs the task: a Job of its own, a warm worker pool, or whichever serves the type best."""
    callback: Callback | None = None
    """Where to tell that the task has finished. Default: that of the operator's settings, if there is one."""
    idempotency_key: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+$")] | None = None
    """Of the tasks of a namespace with the same key one runs, the first; the others end as Canceled, with its name in
    status.duplicateOf. For callers that cannot know whether their first request arrived."""
    not_before: UtcTimestamp | None = None
    """The task does not start earlier than this. Default: as soon as it can."""
    depends_on: (
        Annotated[list[TaskName], Field(min_length=1, max_length=32, json_schema_extra={"x-kubernetes-list-type": "set"})]
        | None
    ) = None
    """Names of tasks of the namespace that have to be Completed before this one starts. If one of them fails or is
    canceled, this one fails with DependencyFailed. They may be created later."""
    kueue: Kueue | None = None
    """The Job is made suspended, in a queue of Kueue, which decides when it starts. Default: the operator's setting."""
    suspend: bool = False
    """true: do not run; a running attempt is given back, uncounted."""
    cancel: bool = False
    """true: end the task as Canceled, or as Completed if it was published before. One way."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=31_536_000)] = 86_400
    """The CR is deleted this long after the end; its row in PostgreSQL stays."""

    @property
    def effective_action(self) -> Action:
        """``payload.action``, or upsert, or index for knowledge_indexing."""
        default = Action.INDEX if self.type is TaskType.KNOWLEDGE_INDEXING else Action.UPSERT
        return self.payload.action or default

    @property
    def effective_timeout(self) -> timedelta:
        """``timeout``, or the default of the type."""
        return self.timeout or _TIMEOUTS.get(self.type, timedelta(minutes=30))

    @property
    def effective_stall_timeout(self) -> timedelta:
        """``stallTimeout``, or the default of the type: longer than the longest silence that has a limit of its own.

        That is a document which the parser has ten minutes for and whose format has no pages to report (the runner's
        TASKS_PARSER_SECONDS), and of a health check the loading of a model. Never longer than the attempt itself.
        """
        default = timedelta(minutes=1) if self.type is TaskType.HEALTH_CHECK else timedelta(minutes=15)
        return self.stall_timeout or min(default, self.effective_timeout)


def spec_again(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the spec, as a manifest has it, of a task that does the same again: without what was of that one alone."""
    return {key: value for key, value in spec.items() if key not in {"cancel", "suspend", "idempotencyKey"}}


# -------------------------------------------------------------------------------------------------------------- status


class Condition(Model):
    """``metav1.Condition``."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    status: Literal["True", "False", "Unknown"]
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    last_transition_time: Timestamp
    reason: Annotated[str, Field(min_length=1, max_length=1024)]
    message: Annotated[str, Field(max_length=32768)] = ""


Conditions = Annotated[
    list[Condition],
    Field(max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
]


class QueueStatus(Model):
    """Why a task is not running yet."""

    position: Annotated[int, Field(ge=1)] | None = None
    reason: Text
    message: Text | None = None
    since: Timestamp | None = None


class ComponentHealth(Model):
    """What a health check found."""

    name: Component
    healthy: bool
    milliseconds: Annotated[int, Field(ge=0)]
    message: Text = ""


class Rejection(Model):
    """A row of vector_storage that was not stored."""

    row: Annotated[int, Field(ge=1)]
    """Its number in the input, from 1."""
    reason: Annotated[str, Field(max_length=256)]


class Result(Model):
    """What a finished task has done. Counts are read back from the stores, never incremented."""

    documents: Annotated[int, Field(ge=0)] | None = None
    """Documents that were published; of a batch, those of all its shards."""
    documents_total: Annotated[int, Field(ge=0)] | None = None
    """Of a batch and of a knowledge base: documents that there are."""
    documents_failed: Annotated[int, Field(ge=0)] | None = None
    """Of a batch: documents that failed for good; each has its reason in PostgreSQL."""
    pages: Annotated[int, Field(ge=0)] | None = None
    failed_pages: Annotated[int, Field(ge=0)] | None = None
    """Pages without readable text, and sheets, slides, attachments and lines that cannot be read; the rest was published."""
    failed_page_numbers: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=10)] | None = None
    """Numbers of the first ten of them."""
    language: Annotated[str, Field(max_length=16)] | None = None
    """zh, en or other: of most of the text, by its script."""
    chunks: Annotated[int, Field(ge=0)] | None = None
    embedded: Annotated[int, Field(ge=0)] | None = None
    """Vectors computed for this version."""
    reused: Annotated[int, Field(ge=0)] | None = None
    """Vectors taken from the stores: an earlier attempt, or the same text in the version before."""
    milvus_count: Annotated[int, Field(ge=0)] | None = None
    elasticsearch_count: Annotated[int, Field(ge=0)] | None = None
    version: Annotated[int, Field(ge=0)] | None = None
    """Version of the document that is published now."""
    seconds: Annotated[dict[Annotated[str, Field(max_length=32)], float], Field(max_length=16)] | None = None
    """How long each stage took."""
    components: Annotated[list[ComponentHealth], Field(max_length=6)] | None = None
    generation: Annotated[int, Field(ge=1)] | None = None
    """Of knowledge_indexing: the generation that serves now."""
    recall_before: Annotated[float, Field(ge=0, le=1)] | None = None
    """Recall@5 of the generation that served before, over the questions of the gate."""
    recall_after: Annotated[float, Field(ge=0, le=1)] | None = None
    """Recall@5 of the new generation over the same questions."""
    enhanced: Annotated[int, Field(ge=0)] | None = None
    """Chunks that a semantic analysis has written to."""
    repaired: Annotated[int, Field(ge=0)] | None = None
    """Rows and ledger entries that a repair has written or removed."""
    vectors: Annotated[int, Field(ge=0)] | None = None
    """Of embedding_generation: vectors computed."""
    dimension: Annotated[int, Field(ge=1)] | None = None
    """Their length."""
    output: Annotated[str, Field(max_length=1024)] | None = None
    """Where they are: a path of the document volume, or ``postgres``."""
    rejected: Annotated[int, Field(ge=0)] | None = None
    """Of vector_storage: rows that were not stored."""
    rejections: Annotated[list[Rejection], Field(max_length=10)] | None = None
    """The first ten of them."""


class Failure(Model):
    """Why a task, or its last attempt, failed."""

    reason: Annotated[str, Field(min_length=1, max_length=64)]
    message: Text = ""
    retryable: bool
    stage: Annotated[str, Field(max_length=32)] | None = None
    log: Text | None = None
    """Last lines of the pod's log: they outlive the pod."""


class Attempt(Model):
    """One counted attempt."""

    number: Annotated[int, Field(ge=1)]
    job: Annotated[str, Field(max_length=63)]
    started_at: Timestamp | None = None
    finished_at: Timestamp | None = None
    reason: Annotated[str, Field(max_length=64)] | None = None
    """Absent while it runs; Succeeded, or the reason of its failure."""


def _known(values: type[StrEnum]) -> BeforeValidator:
    """Read a word of a newer release as nothing: after a rollback it must not make the task one that cannot be read."""
    return BeforeValidator(lambda value: None if isinstance(value, str) and value not in {*values} else value)


class CallbackState(StrEnum):
    """What has become of a callback."""

    PENDING = "Pending"
    DELIVERED = "Delivered"
    DEAD = "Dead"
    """Given up: it can be sent again by hand."""


class CallbackStatus(Model):
    """Whether the receiver of the callback knows of the end of the task; written when the first delivery has been tried."""

    state: Annotated[CallbackState | None, _known(CallbackState)] = None
    """Pending, Delivered or Dead."""
    attempts: Annotated[int, Field(ge=0)] | None = None
    """Deliveries tried when this was written."""
    last_attempt_at: Timestamp | None = None
    """When the last of them ended."""
    status_code: Annotated[int, Field(ge=100, le=999)] | None = None
    """What the receiver answered; absent when it did not."""
    message: Text | None = None
    """Why it is not delivered."""


class Status(Model):
    """What the operator has seen."""

    phase: Phase = Phase.QUEUED
    """Summary for people; programs read the conditions."""
    stage: Annotated[Stage | None, _known(Stage)] = None
    """Where the running attempt is."""
    progress: Annotated[int, Field(ge=0, le=100)] | None = None
    """Percent of the running attempt."""
    attempt: Annotated[int, Field(ge=0)] = 0
    """Number of the latest attempt; 0 before the first. An attempt that is given back keeps its number."""
    retry_at: Timestamp | None = None
    """When the next attempt may start; kept here so that a restarted operator waits no longer and no shorter."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """Generation of the spec that this status describes."""
    queued_at: Timestamp | None = None
    """When the task was last put into the queue."""
    started_at: Timestamp | None = None
    """When the first attempt started."""
    finished_at: Timestamp | None = None
    """When the task ended."""
    job: Annotated[str, Field(max_length=63)] | None = None
    """Name of the latest Job."""
    executor: Annotated[Executor | None, _known(Executor)] = None
    """What runs it: job or pool."""
    queue: QueueStatus | None = None
    """Why it is not running; absent while it runs."""
    duplicate_of: Annotated[str, Field(max_length=253)] | None = None
    """Name of the task that has the same idempotencyKey and came first."""
    result: Result | None = None
    """What it has done."""
    error: Failure | None = None
    """Why it, or its last attempt, failed."""
    attempts: Annotated[
        list[Attempt],
        Field(max_length=5, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["number"]}),
    ] = []
    """The last five attempts; all are in PostgreSQL."""
    callback: CallbackStatus | None = None
    """What has become of the callback; absent before it was tried, and when there is none."""
    conditions: Conditions = []
    """Ready, Succeeded, Stalled, Reconciling: what kstatus and kubectl wait read."""


# ---------------------------------------------------------------------------------------------------------------- task


class Metadata(Model):
    """The part of ``ObjectMeta`` that is read here."""

    name: Annotated[str, Field(min_length=1, max_length=253)]
    namespace: Annotated[str, Field(min_length=1, max_length=63)] = "default"
    uid: str | None = None
    generation: int = 1
    resource_version: str | None = None
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class ProcessingTask(Model):
    """A task, as a manifest holds it and as the API server hands it back."""

    api_version: Literal["tasks.zzdsj.io/v1"] = "tasks.zzdsj.io/v1"
    kind: Literal["ProcessingTask"] = "ProcessingTask"
    metadata: Metadata
    spec: Spec
    status: Status = Status()


def describe(error: ValidationError, *, within: tuple[str, ...] = ()) -> str:
    """Return a validation error in one line that names each field: ``spec.payload.chunkSize: should be ...``.

    ``within`` is where the validated object stands in the manifest.
    """
    return "; ".join(
        f"{'.'.join(map(str, (*within, *problem['loc']))) or 'manifest'}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors(include_url=False, include_input=False)
    )


def parse_manifest(manifest: Mapping[str, Any]) -> ProcessingTask:
    """Parse a manifest that a person or a service wrote: unknown fields of spec are refused.

    Raises :class:`~task_contract.errors.InvalidTask` with the path of each bad field.
    """
    try:
        Spec.model_validate(manifest.get("spec"), extra="forbid")
    except ValidationError as error:
        raise InvalidTask(f"cannot read the task: {describe(error, within=('spec',))}") from error
    try:
        return ProcessingTask.model_validate(manifest)
    except ValidationError as error:
        raise InvalidTask(f"cannot read the task: {describe(error)}") from error
