"""The CustomResourceDefinition of ProcessingTask: schema from the models, and the rules over several fields as CEL.

Rules stand here and not in the models, because the API server is the earliest border that every way in passes. Each
message names the field and the remedy.
"""

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

Rule = dict[str, str]


def rule(expression: str, message: str, *, field: str | None = None, reason: str = "FieldValueInvalid") -> Rule:
    """Return a rule of a schema: an expression in CEL, and what a violation is answered with."""
    where = {} if field is None else {"fieldPath": field}
    return {"rule": expression, "message": message, "reason": reason, **where}


def _exactly_one(*fields: str) -> str:
    return " + ".join(f"(has(self.payload.{field}) ? 1 : 0)" for field in fields) + " == 1"


def _type_rules() -> list[Rule]:
    rules = [
        rule(
            "self.type in ['health_check', 'embedding_generation'] || has(self.kbId)",
            "spec.kbId: required: name the knowledge base",
            field=".kbId",
            reason="FieldValueRequired",
        ),
        rule(
            "self.type != 'document_processing' || (has(self.payload) && (has(self.payload.filePath)"
            " || has(self.payload.action) && self.payload.action != 'upsert'))",
            "spec.payload.filePath: required for document_processing: give a path below the document volume or a URL",
            field=".payload",
            reason="FieldValueRequired",
        ),
        *(
            rule(
                f"self.type != '{kind}' || (has(self.payload) && {_exactly_one(*fields)})",
                f"spec.payload: {kind} takes exactly one of {', '.join(fields)}",
                field=".payload",
                reason="FieldValueRequired",
            )
            for kind, fields in _INPUTS.items()
        ),
        rule(
            "self.type != 'knowledge_indexing' || has(self.payload) && (has(self.payload.action)"
            " && self.payload.action != 'index' || has(self.payload.rebuildIndex) && self.payload.rebuildIndex"
            " || has(self.payload.enhancementType) && self.payload.enhancementType != 'none')",
            "spec.payload: knowledge_indexing needs rebuildIndex: true, enhancementType: semantic_analysis, or an action",
            field=".payload",
            reason="FieldValueRequired",
        ),
        *(
            rule(
                f"self.type != '{kind}' || !has(self.payload) || !has(self.payload.action)"
                f" || self.payload.action in {[str(action) for action in actions]}",
                f"spec.payload.action: {kind} has {', '.join(actions)}",
                field=".payload",
            )
            for kind, actions in _ACTIONS.items()
        ),
        rule(
            "!has(self.payload) || !has(self.payload.action) || !(self.payload.action in ['delete_knowledge_base', 'purge'])"
            " || has(self.kbId) && has(self.payload.confirm) && self.payload.confirm == self.kbId",
            "spec.payload.confirm: this action removes every document: give the kbId once more to confirm it",
            field=".payload",
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
        rule(
            f"!has(self.callback) || self.callback.url.matches(r'{CALLBACK_PATTERN}')",
            f"spec.callback.url: {CALLBACK_MESSAGE}",
            field=".callback",
        ),
    ]
    fields = sorted({field for fields in PAYLOAD_FIELDS.values() for field in fields})
    for field in fields:
        types = [kind for kind, fitting in PAYLOAD_FIELDS.items() if field in fitting]
        fits = f"self.type in {[str(kind) for kind in types]}"
        rules.append(
            rule(
                f"!has(self.payload) || !has(self.payload.{field}) || {fits}",
                f"spec.payload.{field}: only for type {', '.join(types)}; leave it out",
                field=".payload",
                reason="FieldValueForbidden",
            )
        )
    return rules


def _duration_rules() -> list[Rule]:
    def between(field: str, low: str, high: str, *, optional: bool) -> Rule:
        guard = f"!has(self.{field}) || " if optional else ""
        return rule(
            f"{guard}(duration(self.{field}) >= duration('{low}') && duration(self.{field}) <= duration('{high}'))",
            f"spec.{field}: must be between {low} and {high}",
            field=f".{field}",
        )

    return [
        between("timeout", "1s", "168h", optional=True),
        between("stallTimeout", "10s", "168h", optional=True),
        between("deadline", "1s", "8760h", optional=True),
        between("retry.initialDelay", "0s", "24h", optional=False),
        between("retry.maxDelay", "0s", "24h", optional=False),
        rule(
            "duration(self.retry.initialDelay) <= duration(self.retry.maxDelay)",
            "spec.retry.initialDelay: must not be longer than spec.retry.maxDelay",
            field=".retry",
        ),
    ]


def _immutable_rules(spec: Schema) -> list[Rule]:
    rules = []
    for field, schema in sorted(spec["properties"].items()):
        if field in _MUTABLE:
            continue
        always = field in spec.get("required", ()) or "default" in schema
        same = f"self.{field} == oldSelf.{field}"
        rules.append(
            rule(
                same if always else f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || {same})",
                f"spec.{field}: immutable; create a new task",
                field=f".{field}",
            )
        )
    rules.append(rule("!oldSelf.cancel || self.cancel", "spec.cancel: one way; create a new task", field=".cancel"))
    return rules


_UPSERT_ONLY: Final = ("fileBytes", "chunkSize", "chunkOverlap", "processingMode", "embeddingModel", "metadata")

_INDEX_ONLY: Final = ("rebuildIndex", "enhancementType")
_REBUILD_ONLY: Final = ("goldenPath", "maxRecallDrop", "keepGenerationSeconds")


def _document_rules(field: str) -> list[Rule]:
    """Return the rules of one field that names a document."""
    absent, value = f"!has(self.{field})", f"self.{field}"
    return [
        rule(f"{absent} || {test}", f"spec.payload.{field}: {message}", field=f".{field}")
        for test, message in _of_document(value, climbs=f"{value}.split('/').exists(part, part == '..')")
    ]


def _all_documents(field: str) -> list[Rule]:
    """Return the same for a field that lists documents."""
    return [
        rule(f"!has(self.{field}) || self.{field}.all(one, {test})", f"spec.payload.{field}: {message}", field=f".{field}")
        for test, message in _of_document("one", climbs="one.matches('(^|/)[.][.](/|$)')")  # split costs too much in a list
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
    rule(
        "!has(self.action) || !(self.action in ['delete', 'delete_knowledge_base'])"
        f" || !({' || '.join(f'has(self.{name})' for name in _UPSERT_ONLY)})",
        f"spec.payload.action: only upsert takes {', '.join(_UPSERT_ONLY)}; leave them out",
        field=".action",
        reason="FieldValueForbidden",
    ),
    rule(
        "!has(self.confirm) || has(self.action) && self.action in ['delete_knowledge_base', 'purge']",
        "spec.payload.confirm: only for actions delete_knowledge_base and purge; leave it out",
        field=".confirm",
        reason="FieldValueForbidden",
    ),
    *(one for field in ("filePath", "manifestPath", "goldenPath", "inputPath") for one in _document_rules(field)),
    *_all_documents("filePaths"),
    rule(
        f"!has(self.prefix) || (self.prefix.contains('://') ? self.prefix.matches(r'{S3_PREFIX_PATTERN}')"
        f" : (!self.prefix.startsWith('/') || (self.prefix + '/').startsWith('{DOCUMENT_ROOT}/'))"
        " && !self.prefix.split('/').exists(part, part == '..'))",
        f"spec.payload.prefix: {PREFIX_MESSAGE}; an absolute path lies below {DOCUMENT_ROOT}/",
        field=".prefix",
    ),
    rule(
        "!has(self.glob) || has(self.prefix)",
        "spec.payload.glob: only with prefix; leave it out",
        field=".glob",
        reason="FieldValueForbidden",
    ),
    rule(
        f"!has(self.outputPath) || self.outputPath.matches(r'{OUTPUT_PATTERN}')",
        f"spec.payload.outputPath: {OUTPUT_MESSAGE}",
        field=".outputPath",
    ),
    *(
        rule(
            f"!has(self.{field}) || self.{field}.map(one, bytes(one).size()).sum() <= {INLINE_BYTES}",
            f"spec.payload.{field}: at most {INLINE_BYTES} bytes in all; {remedy}",
            field=f".{field}",
        )
        for field, remedy in (("filePaths", "use prefix or manifestPath"), ("texts", "use inputPath"))
    ),
    rule(
        "!has(self.action) || !(self.action in ['rollback', 'repair', 'purge'])"
        f" || !({' || '.join(f'has(self.{name})' for name in _INDEX_ONLY)})",
        f"spec.payload.action: only index takes {', '.join(_INDEX_ONLY)}; leave them out",
        field=".action",
        reason="FieldValueForbidden",
    ),
    rule(
        f"(has(self.rebuildIndex) && self.rebuildIndex) || !({' || '.join(f'has(self.{name})' for name in _REBUILD_ONLY)})",
        f"spec.payload.rebuildIndex: only a rebuild takes {', '.join(_REBUILD_ONLY)}; leave them out",
        field=".rebuildIndex",
        reason="FieldValueForbidden",
    ),
    rule(
        "!has(self.chunkOverlap) || self.chunkOverlap < (has(self.chunkSize) ? self.chunkSize : 1000)",
        "spec.payload.chunkOverlap: must be smaller than chunkSize (default 1000)",
        field=".chunkOverlap",
    ),
    # With the bound of a key and of a value alone a map could have 35,000 characters, over the 64 KiB of a spec in Chinese.
    rule(
        "!has(self.metadata) || self.metadata.map(key, key.size() + self.metadata[key].size()).sum() <= 12000",
        "spec.payload.metadata: at most 12000 characters in all; store large texts beside the document",
        field=".metadata",
    ),
    rule(
        "!has(self.components) || self.components.all(one, self.components.exists_one(other, other == one))",
        "spec.payload.components: name each component once",
        field=".components",
    ),
]


def _spec_schema() -> Schema:
    spec = task_spec_schema()
    spec["x-kubernetes-validations"] += _immutable_rules(spec)
    return spec


def task_spec_schema() -> Schema:
    """Return the schema of a task's spec with the rules that hold when it is created."""
    spec = structural_schema(Spec, defaults=True)
    payload = spec["properties"]["payload"]
    payload.pop("default", None)  # defaults of the payload depend on the type: see task_contract.models.Payload
    payload["x-kubernetes-validations"] = list(_PAYLOAD_RULES)
    spec["x-kubernetes-validations"] = _type_rules() + _duration_rules()
    return spec


def _status_schema() -> Schema:
    status = structural_schema(Status)
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
                                "spec": _spec_schema(),
                                "status": _status_schema(),
                            },
                            "x-kubernetes-validations": [
                                rule(
                                    "!has(self.spec.dependsOn) || !(self.metadata.name in self.spec.dependsOn)",
                                    "spec.dependsOn: a task cannot wait for itself",
                                    field=".spec.dependsOn",
                                ),
                                rule(
                                    "self.spec.priority == oldSelf.spec.priority || oldSelf.status.phase == 'Queued'",
                                    "spec.priority: can be changed only while the task is Queued",
                                    field=".spec.priority",
                                ),
                            ],
                        }
                    },
                }
            ],
        },
    }
