"""The CustomResourceDefinition of ProcessingTask: schema from the models, and the rules over several fields as CEL.

Rules stand here and not in the models, because the API server is the earliest border that every way in passes. Each
message names the field and the remedy.
"""

from collections.abc import Sequence
from typing import Any, Final

from task_contract.location import (
    CALLBACK_MESSAGE,
    CALLBACK_PATTERN,
    HTTP_MESSAGE,
    HTTP_PATTERN,
    OUTPUT_MESSAGE,
    OUTPUT_PATTERN,
    PREFIX_MESSAGE,
    S3_MESSAGE,
    S3_PATTERN,
    S3_PREFIX_PATTERN,
    SCHEME_MESSAGE,
)
from task_contract.models import INLINE_BYTES, Action, Spec, Status, TaskType
from task_contract.names import DOCUMENT_ROOT, GROUP, KIND, PART_OF, PLURAL, SHORT_NAME, VERSION
from task_contract.rules import VALIDATIONS, Rule, all_of, at_creation, rule
from task_contract.structural import Schema, structural_schema

_SPLITTING: Final = ("chunkSize", "chunkOverlap", "processingMode", "embeddingModel")
PAYLOAD_FIELDS: Final[dict[TaskType, tuple[str, ...]]] = {
    TaskType.DOCUMENT_PROCESSING: ("action", "confirm", "filePath", "fileBytes", "documentId", *_SPLITTING, "metadata"),
    TaskType.BATCH_PROCESSING: (
        *("filePaths", "prefix", "glob", "manifestPath", "parallelism", "maxFailedPercent"),
        *(*_SPLITTING, "metadata"),
    ),
    TaskType.KNOWLEDGE_INDEXING: (
        *("action", "confirm", "rebuildIndex", "enhancementType"),
        *(*_SPLITTING, "goldenPath", "maxRecallDrop", "keepGenerationSeconds"),
    ),
    TaskType.EMBEDDING_GENERATION: ("texts", "inputPath", "outputPath", "embeddingModel"),
    TaskType.VECTOR_STORAGE: ("inputPath", "fromTask", "documentId", "embeddingModel", "metadata"),
    TaskType.HEALTH_CHECK: ("components",),
}
"""Which fields of the payload fit which type."""

_ACTIONS: Final = {
    TaskType.DOCUMENT_PROCESSING: (Action.UPSERT, Action.DELETE, Action.DELETE_KNOWLEDGE_BASE),
    TaskType.KNOWLEDGE_INDEXING: (Action.INDEX, Action.ROLLBACK, Action.REPAIR, Action.PURGE),
}
_INPUTS: Final = {
    TaskType.BATCH_PROCESSING: ("filePaths", "prefix", "manifestPath"),
    TaskType.EMBEDDING_GENERATION: ("texts", "inputPath"),
    TaskType.VECTOR_STORAGE: ("inputPath", "fromTask"),
}
"""Of these fields each type takes one."""

_MUTABLE: Final = frozenset({"cancel", "suspend", "priority", "ttlSecondsAfterFinished"})


def _exactly_one(*fields: str) -> str:
    return " + ".join(f"(has(payload.{field}) ? 1 : 0)" for field in fields) + " == 1"


def _fitting(field: str) -> list[TaskType]:
    return [kind for kind, fields in PAYLOAD_FIELDS.items() if field in fields]


_NO_PATH: Final = "spec.payload.filePath: required for document_processing: give a path below the document volume or a URL"
_NO_WORK: Final = (
    "spec.payload: knowledge_indexing needs rebuildIndex: true, enhancementType: semantic_analysis, or an action"
)
_ONE_INPUT: Final = {
    kind: f"spec.payload: {kind} takes exactly one of {', '.join(fields)}" for kind, fields in _INPUTS.items()
}
_WITHOUT_PAYLOAD: Final = [
    rule(f"kind != '{kind}'", message, reason="FieldValueRequired")
    for kind, message in {
        TaskType.DOCUMENT_PROCESSING: _NO_PATH,
        **_ONE_INPUT,
        TaskType.KNOWLEDGE_INDEXING: _NO_WORK,
    }.items()
]
_REQUIRED_OF_PAYLOAD: Final = [
    rule(
        "kind != 'document_processing' || has(payload.filePath) || has(payload.action) && payload.action != 'upsert'",
        _NO_PATH,
        reason="FieldValueRequired",
    ),
    *(
        rule(f"kind != '{kind}' || {_exactly_one(*_INPUTS[kind])}", message, reason="FieldValueRequired")
        for kind, message in _ONE_INPUT.items()
    ),
    rule(
        "kind != 'knowledge_indexing' || has(payload.action) && payload.action != 'index'"
        " || has(payload.rebuildIndex) && payload.rebuildIndex"
        " || has(payload.enhancementType) && payload.enhancementType != 'none'",
        _NO_WORK,
        reason="FieldValueRequired",
    ),
]
_ACTIONS_OF_PAYLOAD: Final = [
    *(
        rule(
            f"kind != '{kind}' || payload.action in {[str(action) for action in actions]}",
            f"spec.payload.action: {kind} has {', '.join(actions)}",
        )
        for kind, actions in _ACTIONS.items()
    ),
    rule(
        "!(payload.action in ['delete_knowledge_base', 'purge'])"
        " || has(self.kbId) && has(payload.confirm) && payload.confirm == self.kbId",
        "spec.payload.confirm: this action removes every document: give the kbId once more to confirm it",
    ),
]
_FIELDS_OF_PAYLOAD: Final = [
    rule(
        f"kind in {[str(kind) for kind in _fitting(field)]} || !has(payload.{field})",
        f"spec.payload.{field}: only for type {', '.join(_fitting(field))}; leave it out",
        reason="FieldValueForbidden",
    )
    for field in sorted({field for fields in PAYLOAD_FIELDS.values() for field in fields})
]
_DELAYS: Final = ("initialDelay", "maxDelay")
_RETRY_RULES: Final = [
    *(
        rule(
            f"{field} >= duration('0s') && {field} <= duration('24h')",
            f"spec.retry.{field}: must be between 0s and 24h",
        )
        for field in _DELAYS
    ),
    rule("initialDelay <= maxDelay", "spec.retry.initialDelay: must not be longer than spec.retry.maxDelay"),
]
_KIND: Final = ("kind", "self.type")
_PAYLOAD: Final = ("payload", "self.payload")


def _spec_rules() -> list[Rule]:
    """Return the rules over several fields of a spec."""
    return [
        rule(
            "has(self.kbId) || self.type in ['health_check', 'embedding_generation']",
            "spec.kbId: required: name the knowledge base",
            field=".kbId",
            reason="FieldValueRequired",
        ),
        all_of(
            _WITHOUT_PAYLOAD,
            "spec.payload: required for this type",
            field=".payload",
            unless="has(self.payload)",
            bound=[_KIND],
        ),
        *(
            all_of(rules, f"spec.payload: {message}", field=".payload", unless=unless, bound=[_KIND, _PAYLOAD])
            for rules, message, unless in (
                (_REQUIRED_OF_PAYLOAD, "what the type works on is missing", "!has(self.payload)"),
                (_ACTIONS_OF_PAYLOAD, "the action does not fit", "!has(self.payload) || !has(self.payload.action)"),
                (_FIELDS_OF_PAYLOAD, "a field is for another type", "!has(self.payload)"),
            )
        ),
        # Not at the field: the API server holds its default, {}, against the rules before that is filled in.
        all_of(
            _RETRY_RULES,
            "spec.retry: a delay does not fit",
            field=".retry",
            bound=[(field, f"duration(self.retry.{field})") for field in _DELAYS],
        ),
        rule(
            "self.executor != 'pool' || self.type != 'batch_processing'",
            "spec.executor: batch_processing has Jobs of its own; use auto or job",
            field=".executor",
        ),
        rule(
            "!has(self.kueue) || self.executor != 'pool'",
            "spec.kueue: Kueue admits Jobs, not tasks of a worker pool; use executor auto or job",
            field=".kueue",
        ),
    ]


def _between(field: str, low: str, high: str) -> Rule:
    return rule(
        f"duration(self) >= duration('{low}') && duration(self) <= duration('{high}')",
        f"spec.{field}: must be between {low} and {high}",
    )


_OF_FIELDS: Final[dict[str, Rule]] = {
    "timeout": _between("timeout", "1s", "168h"),
    "stallTimeout": _between("stallTimeout", "10s", "168h"),
    "deadline": _between("deadline", "1s", "8760h"),
    "callback": rule(f"self.url.matches(r'{CALLBACK_PATTERN}')", f"spec.callback.url: {CALLBACK_MESSAGE}", field=".url"),
}
"""Rules of single fields stand at the field: where it is absent they cost nothing."""

_UPSERT_ONLY: Final = ("fileBytes", "chunkSize", "chunkOverlap", "processingMode", "embeddingModel", "metadata")
_INDEX_ONLY: Final = ("rebuildIndex", "enhancementType")
_REBUILD_ONLY: Final = ("goldenPath", "maxRecallDrop", "keepGenerationSeconds")


def _none_of(fields: Sequence[str]) -> str:
    return f"!({' || '.join(f'has(self.{name})' for name in fields)})"


_PAYLOAD_RULES: Final = [
    rule(
        "!has(self.action) || self.action != 'delete' || has(self.filePath) || has(self.documentId)",
        "spec.payload.documentId: delete needs it, or the filePath under which the document was processed",
        field=".action",
        reason="FieldValueRequired",
    ),
    rule(
        "!has(self.action) || self.action != 'delete_knowledge_base' || !(has(self.filePath) || has(self.documentId))",
        "spec.payload.action: delete_knowledge_base removes all documents; delete is for the one that a field names",
        field=".action",
    ),
    all_of(
        [
            rule(
                f"!(action in ['delete', 'delete_knowledge_base']) || {_none_of(_UPSERT_ONLY)}",
                f"spec.payload.action: only upsert takes {', '.join(_UPSERT_ONLY)}; leave them out",
                reason="FieldValueForbidden",
            ),
            rule(
                f"!(action in ['rollback', 'repair', 'purge']) || {_none_of(_INDEX_ONLY)}",
                f"spec.payload.action: only index takes {', '.join(_INDEX_ONLY)}; leave them out",
                reason="FieldValueForbidden",
            ),
        ],
        "spec.payload.action: does not take all of these fields",
        field=".action",
        unless="!has(self.action)",
        bound=[("action", "self.action")],
    ),
    all_of(
        [
            rule(
                "!has(self.confirm) || has(self.action) && self.action in ['delete_knowledge_base', 'purge']",
                "spec.payload.confirm: only for actions delete_knowledge_base and purge; leave it out",
                reason="FieldValueForbidden",
            ),
            rule(
                "!has(self.glob) || has(self.prefix)",
                "spec.payload.glob: only with prefix; leave it out",
                reason="FieldValueForbidden",
            ),
            rule(
                f"has(self.rebuildIndex) && self.rebuildIndex || {_none_of(_REBUILD_ONLY)}",
                f"spec.payload.rebuildIndex: only a rebuild takes {', '.join(_REBUILD_ONLY)}; leave them out",
                reason="FieldValueForbidden",
            ),
        ],
        "spec.payload: a field goes with another one",
    ),
    rule(
        "!has(self.chunkOverlap) || self.chunkOverlap < (has(self.chunkSize) ? self.chunkSize : 1000)",
        "spec.payload.chunkOverlap: must be smaller than chunkSize (default 1000)",
        field=".chunkOverlap",
    ),
]


def _of_document(value: str, *, climbs: str) -> list[tuple[str, str]]:
    """Return (rule, message) of a document's place."""
    return [
        (f"!{value}.contains('://') || {value}.matches('^(s3|https?)://')", SCHEME_MESSAGE),
        (f"!{value}.matches('^https?://') || {value}.matches(r'{HTTP_PATTERN}')", HTTP_MESSAGE),
        (f"!{value}.startsWith('s3://') || {value}.matches(r'{S3_PATTERN}')", S3_MESSAGE),
        # Not in the models: outside a cluster the document root may be another one.
        (
            f"!{value}.startsWith('/') || {value}.startsWith('{DOCUMENT_ROOT}/')",
            f"an absolute path lies below {DOCUMENT_ROOT}/, where the document volume is",
        ),
        (f"!{climbs}", "'..' is not allowed; give the path below the document volume"),
    ]


def _document(field: str) -> Rule:
    """Return the rule of a field that names a document."""
    tests = _of_document("self", climbs="self.split('/').exists(part, part == '..')")
    rules = [rule(test, f"spec.payload.{field}: {message}") for test, message in tests]
    return all_of(rules, f"spec.payload.{field}: not a place of a document")


def _documents(field: str) -> list[Rule]:
    """Return the same for a field that lists documents; one by one, as the API server bounds what a rule may cost."""
    tests = _of_document("one", climbs="one.matches('(^|/)[.][.](/|$)')")  # split costs too much in a list
    return [rule(f"self.all(one, {test})", f"spec.payload.{field}: {message}") for test, message in tests]


def _bytes_in_all(field: str, remedy: str) -> Rule:
    return rule(
        f"self.map(one, bytes(one).size()).sum() <= {INLINE_BYTES}",
        f"spec.payload.{field}: at most {INLINE_BYTES} bytes in all; {remedy}",
    )


_OF_PAYLOAD_FIELDS: Final[dict[str, list[Rule]]] = {
    **{field: [_document(field)] for field in ("filePath", "manifestPath", "goldenPath", "inputPath")},
    "filePaths": [*_documents("filePaths"), _bytes_in_all("filePaths", "use prefix or manifestPath")],
    "prefix": [
        rule(
            f"self.contains('://') ? self.matches(r'{S3_PREFIX_PATTERN}')"
            f" : (!self.startsWith('/') || (self + '/').startsWith('{DOCUMENT_ROOT}/'))"
            " && !self.split('/').exists(part, part == '..')",
            f"spec.payload.prefix: {PREFIX_MESSAGE}; an absolute path lies below {DOCUMENT_ROOT}/",
        )
    ],
    "outputPath": [rule(f"self.matches(r'{OUTPUT_PATTERN}')", f"spec.payload.outputPath: {OUTPUT_MESSAGE}")],
    "texts": [_bytes_in_all("texts", "use inputPath")],
    # With the bound of a key and of a value alone a map could have 35,000 characters, over the 64 KiB of a spec in Chinese.
    "metadata": [
        rule(
            "self.map(key, key.size() + self[key].size()).sum() <= 12000",
            "spec.payload.metadata: at most 12000 characters in all; store large texts beside the document",
        )
    ],
    "components": [
        rule(
            "self.all(one, self.exists_one(other, other == one))",
            "spec.payload.components: name each component once",
        )
    ],
}


def _changes(spec: Schema) -> Rule:
    """Return the rule about what of a task may change.

    A request changes the spec or the status, never both (that is what the subresource is for): where the phase has changed
    nothing else can have, and most writes are such.
    """
    rules = []
    for field, schema in sorted(spec["properties"].items()):
        if field in _MUTABLE:
            continue
        always = field in spec.get("required", ()) or "default" in schema
        same = f"self.spec.{field} == oldSelf.spec.{field}"
        held = f"has(self.spec.{field}) == has(oldSelf.spec.{field})"
        rules.append(
            rule(
                same if always else f"{held} && (!has(self.spec.{field}) || {same})",
                f"spec.{field}: immutable; create a new task",
            )
        )
    return all_of(
        [
            *rules,
            rule("!oldSelf.spec.cancel || self.spec.cancel", "spec.cancel: one way; create a new task"),
            rule(
                "self.spec.priority == oldSelf.spec.priority || oldSelf.status.phase == 'Queued'",
                "spec.priority: can be changed only while the task is Queued",
            ),
        ],
        "spec: immutable; create a new task",
        field=".spec",
        unless="self.status.phase != oldSelf.status.phase || self.spec == oldSelf.spec",
    )


def task_spec_schema() -> Schema:
    """Return the schema of a task's spec with the rules that hold when it is created."""
    spec = structural_schema(Spec, defaults=True)
    payload = spec["properties"]["payload"]
    payload.pop("default", None)  # defaults of the payload depend on the type: see task_contract.models.Payload
    payload[VALIDATIONS] = list(_PAYLOAD_RULES)
    spec[VALIDATIONS] = _spec_rules()
    for field, one in _OF_FIELDS.items():
        spec["properties"][field].setdefault(VALIDATIONS, []).append(one)
    for field, rules in _OF_PAYLOAD_FIELDS.items():
        payload["properties"][field].setdefault(VALIDATIONS, []).extend(rules)
    return spec


def _status_schema() -> Schema:
    status = structural_schema(Status)
    # One owner of it all: the operator. Field by field, the owners of conditions and attempts are a third of what a write of
    # the status costs the API server.
    status["x-kubernetes-map-type"] = "atomic"
    # Queued from the first moment on, without a write: kubectl, kstatus and selectors work before the operator looked.
    # The time is the epoch, as in the Gateway API: a default cannot know the time of creation.
    status["default"] = {
        "phase": "Queued",
        "attempt": 0,
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "Queued",
                "message": "waiting for the operator",
                "lastTransitionTime": "1970-01-01T00:00:00Z",
            }
        ],
    }
    return status


def column(name: str, path: str, *, kind: str = "string", wide: bool = False, description: str = "") -> dict[str, Any]:
    """Return a printer column; wide ones are shown by ``kubectl get -o wide``."""
    shown: dict[str, Any] = {"name": name, "type": kind, "jsonPath": path, "priority": 1 if wide else 0}
    return shown | ({"description": description} if description else {})


def metadata_of(plural: str) -> dict[str, Any]:
    """Return the metadata of a CRD of ours."""
    return {
        "name": f"{plural}.{GROUP}",
        "labels": {
            "app.kubernetes.io/name": "processing-tasks",
            "app.kubernetes.io/component": "api",
            "app.kubernetes.io/part-of": PART_OF,
        },
    }


def custom_resource_definition() -> dict[str, Any]:
    """Return the CRD as a manifest."""
    spec = task_spec_schema()
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata_of(PLURAL),
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "processingtask",
                "shortNames": [SHORT_NAME],
                "categories": ["knowledge"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "selectableFields": [
                        {"jsonPath": path} for path in (".spec.type", ".spec.kbId", ".spec.priority", ".status.phase")
                    ],
                    "additionalPrinterColumns": [
                        column("Type", ".spec.type"),
                        column("KB", ".spec.kbId", description="Knowledge base"),
                        column("Priority", ".spec.priority"),
                        column("Phase", ".status.phase"),
                        column("Stage", ".status.stage"),
                        column("Progress", ".status.progress", kind="integer", description="Percent of the attempt"),
                        column("Attempt", ".status.attempt", kind="integer"),
                        column("Waiting", ".status.queue.reason", description="Why it does not run"),
                        column("Age", ".metadata.creationTimestamp", kind="date"),
                        column("Position", ".status.queue.position", kind="integer", wide=True, description="In line"),
                        column("Chunks", ".status.result.chunks", kind="integer", wide=True),
                        column("Reason", '.status.conditions[?(@.type=="Ready")].reason', wide=True),
                        column("Job", ".status.job", wide=True),
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "description": "An asynchronous document or embedding task of a knowledge base.",
                            "type": "object",
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": at_creation(spec),
                                "status": _status_schema(),
                            },
                            VALIDATIONS: [
                                rule(
                                    "!has(self.spec.dependsOn) || !(self.metadata.name in self.spec.dependsOn)",
                                    "spec.dependsOn: a task cannot wait for itself",
                                    field=".spec.dependsOn",
                                ),
                                _changes(spec),
                            ],
                        }
                    },
                }
            ],
        },
    }
