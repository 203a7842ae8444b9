"""No release takes anything away from the one before: the checkers, tried on bad changes, and the present state, checked."""

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

import task_operator.schema
from task_contract.crd import custom_resource_definition
from task_contract.location import CALLBACK_PATTERN, HTTP_PATTERN, S3_PATTERN
from task_contract.migrations import migrations
from task_contract.models import ProcessingTask, TaskType
from tests.support.compatibility import contracting, narrowed_crd
from tests.support.releases import RELEASES, Release, present_migrations

Crd = dict[str, Any]

_FILE_PATH = ".spec.payload: a new rule: !has(self.filePath) || !self.filePath."
_NO_URLS = "the release before refused every URL"
REVIEWED: dict[str, str] = {
    f"{_FILE_PATH}contains('://') || self.filePath.matches('^(s3|https?)://')": _NO_URLS,
    f"{_FILE_PATH}matches('^https?://') || self.filePath.matches(r'{HTTP_PATTERN}')": _NO_URLS,
    f"{_FILE_PATH}startsWith('s3://') || self.filePath.matches(r'{S3_PATTERN}')": _NO_URLS,
    f"{_FILE_PATH}startsWith('/') || self.filePath.startsWith('/data/')": "such a task could only end as DocumentRefused",
    ".spec: a new rule: self.type != 'document_processing' || (has(self.payload) && (has(self.payload.filePath)"
    " || has(self.payload.action) && self.payload.action != 'upsert'))": "allows more than the rule before it",
    ".spec: a new rule: self.type != 'document_processing' || has(self.payload)": "a part of the rule before it",
    ".spec: a new rule: self.type in ['health_check', 'embedding_generation'] || has(self.kbId)": (
        "allows more than the rule before it"
    ),
    **{
        f".status.stage: {stage} is new, and the release before cannot read it": (
            "only tasks of types that the release before ends as InvalidTask have it"
        )
        for stage in ("analyze", "gate")
    },
    ".status: x-kubernetes-map-type is 'atomic' and was None": "the operator alone writes a status",
    f".spec: a new rule: !has(self.callback) || self.callback.url.matches(r'{CALLBACK_PATTERN}')": (
        "allows more than the rule before it, which refused every callback"
    ),
    ".spec: a new rule: self.executor != 'pool' || self.type != 'batch_processing'": (
        "the release before ends every task with executor pool as InvalidTask"
    ),
}
"""Sentence of the checker → why nobody loses anything by that change. Empty it after a release is frozen."""
_UNTOUCHED: Sequence[re.Pattern[str]] = (
    # About a field that the release before has not, or that its types had and still have.
    re.compile(r"the object: a new rule: !has\(self\.spec\.(\w+)\)"),
    re.compile(r"\.spec\.payload: a new rule: !?\(?has\(self\.(\w+)\)"),
    re.compile(r"\.spec: a new rule: (?:!has\(self\.payload\) \|\| )?!?has\(self\.(?:payload\.)?(\w+)\)"),
    # About tasks of a type that the release before refuses.
    re.compile(r"\.spec: a new rule: self\.type != '(\w+)' \|\| "),
)


def untouched(sentence: str, release: Crd) -> bool:
    """Tell whether a new rule is about nothing that a task of a release can have."""
    for pattern in _UNTOUCHED:
        if (found := pattern.match(sentence)) is not None:
            name = found.group(1)
            if name in {*TaskType}:
                return name not in {TaskType.DOCUMENT_PROCESSING, TaskType.HEALTH_CHECK} or "self.payload.action" in sentence
            known = schema(release, "spec")["properties"].keys() | schema(release, "spec.payload")["properties"].keys()
            # Every field of the payload is one of certain types, and the list has only grown.
            allows_more = re.search(r"self\.type in \[.*'document_processing'", sentence) is not None
            return name not in known or allows_more
    return False


def worded_as_before(sentence: str) -> str:
    """Return what the checker would say of a rule if it stood where, and as, the rules of release 0.1.0 do.

    They were one rule a line of their own over the whole spec or payload; now each stands at its field, or is one of many.
    """
    where, found, text = sentence.partition(": a new rule: ")
    if not found:
        return sentence
    fields = where.split(".")[1:]
    if where == "the object" and ".spec." in text and "oldSelf" in text:
        where, text = ".spec", re.sub(r"\b(oldSelf|self)\.spec\.", r"\1.", text)
    elif where == ".spec":
        text = re.sub(r"(?<![\w.])payload\.", "self.payload.", re.sub(r"\bkind\b", "self.type", text))
        text = re.sub(r"^(initialDelay|maxDelay) >=.*", r"(\g<0>)", text)
        text = re.sub(r"\b(initialDelay|maxDelay)\b", r"duration(self.retry.\1)", text)
        text = re.sub(r"^(self\.type in .*) \|\| (!has.*)", r"!has(self.payload) || \2 || \1", text)
        text = re.sub(r"^(has\(self\.kbId\)) \|\| (.*)", r"\2 || \1", text)
        text = re.sub(r"^(self\.type != 'document_processing' \|\| )(has.*)", r"\1(has(self.payload) && (\2))", text)
        text = re.sub(r"^self\.type != '\w+'$", r"\g<0> || has(self.payload)", text)
        if text.startswith("!(self.payload.action"):
            text = f"!has(self.payload.action) || {text}"
    elif where == ".spec.payload" and re.search(r"(?<![\w.])action ", text):
        text = "!has(self.action) || " + re.sub(r"(?<![\w.])action ", "self.action ", text)
    elif fields[:2] == ["spec", "payload"] and len(fields) == 3:
        where, text = ".spec.payload", f"!has(self.{fields[2]}) || " + re.sub(r"\bself\b", f"self.{fields[2]}", text)
    elif fields[:1] == ["spec"] and len(fields) == 2:
        text = re.sub(r"\bself\b", f"self.{fields[1]}", text)
        where, text = ".spec", f"!has(self.{fields[1]}) || " + (f"({text})" if text.startswith("duration") else text)
    return f"{where}: a new rule: {text}"


def rules_of(release: Crd) -> set[str]:
    """Return what the checker would say of the rules that a release had."""
    places = {"the object": "", ".spec": "spec", ".spec.payload": "spec.payload"}
    return {
        f"{where}: a new rule: {one['rule']}"
        for where, path in places.items()
        for one in schema(release, path).get("x-kubernetes-validations", ())
    }


CONTRACT_STEPS: dict[int, str] = {}
"""Number of a migration that takes something away → the release that has stopped using it, at least one release ago."""


def version(crd: Crd) -> Any:
    return crd["spec"]["versions"][0]


def schema(crd: Crd, path: str = "") -> Any:
    """Return the schema at a path such as ``spec.payload``."""
    found = version(crd)["schema"]["openAPIV3Schema"]
    for part in path.split(".") if path else ():
        found = (
            found["items"] if part == "[]" else found["additionalProperties"] if part == "*" else found["properties"][part]
        )
    return found


def changed(path: str, **keywords: Any) -> Callable[[Crd], None]:
    def change(crd: Crd) -> None:
        schema(crd, path).update(keywords)

    return change


def dropped(path: str, *keys: str) -> Callable[[Crd], None]:
    def change(crd: Crd) -> None:
        parent, _, field = path.rpartition(".")
        if keys:
            for key in keys:
                del schema(crd, path)[key]
        else:
            del schema(crd, parent)["properties"][field]

    return change


def column(name: str, **fields: Any) -> Callable[[Crd], None]:
    def change(crd: Crd) -> None:
        next(one for one in version(crd)["additionalPrinterColumns"] if one["name"] == name).update(fields)

    return change


def on_crd(act: Callable[[Any], Any]) -> Callable[[Crd], None]:
    def change(crd: Crd) -> None:
        act(crd["spec"])

    return change


def on_version(act: Callable[[Any], Any]) -> Callable[[Crd], None]:
    def change(crd: Crd) -> None:
        act(version(crd))

    return change


BAD: list[tuple[str, Callable[[Crd], None], str]] = [
    ("field removed", dropped("spec.payload.chunkSize"), ".spec.payload.chunkSize is gone"),
    ("field of status removed", dropped("status.result.chunks"), ".status.result.chunks is gone"),
    ("field in a list removed", dropped("status.attempts.[].reason"), ".status.attempts[].reason is gone"),
    ("field becomes required", changed("spec.payload", required=["filePath"]), ".spec.payload: filePath is required"),
    (
        "field of a list becomes required",
        changed("status.attempts.[]", required=["number", "job", "reason"]),
        "reason is req",
    ),
    ("enum value removed", changed("spec.priority", enum=["high", "normal"]), ".spec.priority: low is refused"),
    ("enum introduced", changed("spec.kbId", enum=["a"]), ".spec.kbId: only a is allowed"),
    (
        "phase that the release before cannot read",
        lambda crd: schema(crd, "status.phase")["enum"].append("Paused"),
        ".status.phase: Paused is new",
    ),
    ("type changed", changed("spec.payload.chunkSize", type="string"), ".spec.payload.chunkSize: type is 'string'"),
    ("maximum lowered", changed("spec.payload.chunkSize", maximum=4000), ".spec.payload.chunkSize: maximum is 4000"),
    ("minimum raised", changed("spec.payload.chunkSize", minimum=100), ".spec.payload.chunkSize: minimum is 100 and was 50"),
    ("maximum introduced", changed("status.attempt", maximum=20), ".status.attempt: maximum is 20 and was not limited"),
    ("shorter text", changed("spec.kbId", maxLength=62), ".spec.kbId: maxLength is 62"),
    ("longer shortest text", changed("spec.kbId", minLength=2), ".spec.kbId: minLength is 2"),
    ("fewer items", changed("status.attempts", maxItems=4), ".status.attempts: maxItems is 4"),
    ("fewer properties", changed("spec.payload.metadata", maxProperties=8), ".spec.payload.metadata: maxProperties is 8"),
    ("shorter values of a map", changed("spec.payload.metadata.*", maxLength=9), ".spec.payload.metadata.*: maxLength is 9"),
    ("pattern changed", changed("spec.kbId", pattern="^[a-z]+$"), ".spec.kbId: pattern is '^[a-z]+$'"),
    ("pattern introduced", changed("spec.payload.embeddingModel", pattern="^x"), ".spec.payload.embeddingModel: pattern"),
    ("format introduced", changed("spec.payload.documentId", format="uri"), ".spec.payload.documentId: format is 'uri'"),
    ("default changed", changed("spec.priority", default="low"), ".spec.priority: default is 'low' and was 'normal'"),
    ("default removed", dropped("spec.priority", "default"), ".spec.priority: default is None"),
    (
        "new rule",
        lambda crd: schema(crd, "spec")["x-kubernetes-validations"].append({"rule": "self.kbId != 'a'", "message": "no"}),
        ".spec: a new rule: self.kbId != 'a'",
    ),
    (
        "rule on the whole object",
        lambda crd: schema(crd)["x-kubernetes-validations"].append({"rule": "has(self.status)", "message": "no"}),
        "the object: a new rule: has(self.status)",
    ),
    (
        "map key of a list changed",
        changed("status.conditions", **{"x-kubernetes-list-map-keys": ["reason"]}),
        "list-map-keys",
    ),
    ("unknown fields kept no more", changed("spec", **{"x-kubernetes-preserve-unknown-fields": False}), "preserve-unknown"),
    ("keyword that nobody knows", changed("spec.kbId", **{"x-kubernetes-shiny": 1}), "x-kubernetes-shiny has changed"),
    ("map closed", changed("spec.payload.metadata", additionalProperties=False), "additionalProperties is False"),
    ("column removed", on_version(lambda one: one["additionalPrinterColumns"].pop(3)), "printer column Phase is gone"),
    ("column hidden", column("Phase", priority=1), "printer column Phase is shown with -o wide only"),
    (
        "column means something else",
        column("Stage", jsonPath=".status.job"),
        "printer column Stage: jsonPath is .status.job",
    ),
    ("columns in another order", on_version(lambda one: one["additionalPrinterColumns"].reverse()), "another order"),
    ("selector removed", on_version(lambda one: one["selectableFields"].pop(0)), ".spec.type cannot be selected by"),
    ("status is no subresource", on_version(lambda one: one["subresources"].clear()), "subresource status is gone"),
    ("version not served", on_version(lambda one: one.update(served=False)), "version v1 is not served any more"),
    ("version not stored", on_version(lambda one: one.update(storage=False)), "version v1 is not the stored one"),
    ("version removed", on_version(lambda one: one.update(name="v2")), "version v1 is gone"),
    ("scope changed", on_crd(lambda one: one.update(scope="Cluster")), "scope is Cluster and was Namespaced"),
    ("plural changed", on_crd(lambda one: one["names"].update(plural="ptasks")), "names.plural is ptasks"),
    ("short name removed", on_crd(lambda one: one["names"]["shortNames"].clear()), "names.shortNames: ptask is gone"),
]

GOOD: list[tuple[str, Callable[[Crd], None]]] = [
    ("nothing", lambda crd: None),
    ("new optional field", lambda crd: schema(crd, "spec.payload")["properties"].update(page={"type": "integer"})),
    (
        "new field of status",
        lambda crd: schema(crd, "status")["properties"].update(node={"type": "string", "maxLength": 63}),
    ),
    ("new type of task", lambda crd: schema(crd, "spec.type")["enum"].append("translation")),
    ("enum opened", dropped("spec.priority", "enum")),
    ("maximum raised", changed("spec.payload.chunkSize", maximum=16_000)),
    ("maximum removed", dropped("spec.payload.chunkSize", "maximum")),
    ("minimum lowered", changed("spec.payload.chunkSize", minimum=1)),
    ("longer text", changed("spec.kbId", maxLength=100)),
    ("field not required any more", changed("spec", required=[])),
    ("rule removed", lambda crd: schema(crd, "spec")["x-kubernetes-validations"].pop()),
    ("described better", changed("spec.kbId", description="another text")),
    ("column added", on_version(lambda one: one["additionalPrinterColumns"].append({"name": "Node", "jsonPath": ".x"}))),
    ("short name added", on_crd(lambda one: one["names"]["shortNames"].append("task"))),
    (
        "second version served",
        on_crd(lambda one: one["versions"].append(one["versions"][0] | {"name": "v2", "storage": False})),
    ),
]


@pytest.mark.parametrize(("change", "sentence"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_change_of_the_crd_that_takes_something_away_is_found(change: Callable[[Crd], None], sentence: str) -> None:
    old = custom_resource_definition()
    new = copy.deepcopy(old)
    change(new)
    found = narrowed_crd(old, new)
    assert any(sentence in one for one in found), found
    assert narrowed_crd(old, new, reviewed=found) == []


@pytest.mark.parametrize("change", [case[1] for case in GOOD], ids=[case[0] for case in GOOD])
def test_a_change_of_the_crd_that_only_adds_is_fine(change: Callable[[Crd], None]) -> None:
    old = custom_resource_definition()
    new = copy.deepcopy(old)
    change(new)
    assert narrowed_crd(old, new) == []


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_the_crd_takes_nothing_from_a_release(release: Release) -> None:
    found = {worded_as_before(one) for one in narrowed_crd(release.crd, custom_resource_definition())}
    left = found - rules_of(release.crd) - REVIEWED.keys()
    assert [sentence for sentence in left if not untouched(sentence, release.crd)] == []


# -------------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_a_release_has_an_object_of_every_phase(release: Release) -> None:
    phases = {stored["status"]["phase"] for stored in release.stored.values()}
    assert phases == set(schema(release.crd, "status.phase")["enum"])


def with_unknown_fields(value: Any) -> Any:
    """Return an object as a newer release might have stored it: every object in it has a field more."""
    if isinstance(value, dict):
        return {key: with_unknown_fields(one) for key, one in value.items()} | {"ofLater": {"releases": [1]}}
    if isinstance(value, list):
        return [with_unknown_fields(one) for one in value]
    return value


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_stored_objects_of_a_release_are_read_whole(release: Release) -> None:
    for name, stored in release.stored.items():
        read = ProcessingTask.model_validate(stored).manifest()
        for part in ("spec", "status"):
            missing = _missing(part, stored[part], read[part])
            assert not missing, f"{name}: {missing}"


def _missing(path: str, stored: Any, read: Any) -> list[str]:
    """Return what stands in a stored object and was not read, or was read as something else."""
    if isinstance(stored, dict) and isinstance(read, dict):
        return [line for key, value in stored.items() for line in _missing(f"{path}.{key}", value, read.get(key))]
    if isinstance(stored, list) and isinstance(read, list) and len(stored) == len(read):
        pairs = enumerate(zip(stored, read, strict=True))
        return [line for index, (a, b) in pairs for line in _missing(f"{path}[{index}]", a, b)]
    return [] if stored == read else [f"{path}: {read!r} and not {stored!r}"]


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_after_a_rollback_objects_of_a_newer_release_are_read(release: Release) -> None:
    for name, stored in release.stored.items():
        newer = {**stored, "spec": with_unknown_fields(stored["spec"]), "status": with_unknown_fields(stored["status"])}
        metadata = newer["spec"].get("payload", {}).get("metadata")
        if metadata is not None:  # a map of texts: what is in it is the caller's, and no field
            metadata.pop("ofLater")
        newer["status"].get("result", {}).get("seconds", {}).pop("ofLater", None)  # a map of numbers
        assert ProcessingTask.model_validate(newer) == ProcessingTask.model_validate(stored), name


@pytest.mark.parametrize(("field", "value"), [("stage", "enrich"), ("executor", "serverless")])
def test_after_a_rollback_words_of_a_newer_release_are_read_as_nothing(field: str, value: str) -> None:
    stored = next(iter(RELEASES[-1].stored.values()))
    newer = {**stored, "status": {**stored["status"], field: value}}
    assert getattr(ProcessingTask.model_validate(newer).status, field) is None


# ----------------------------------------------------------------------------------------------------------- migrations


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("ALTER TABLE tasks DROP COLUMN job", "drops what"),
        ("ALTER TABLE tasks DROP job", "drops what"),
        ("DROP TABLE task_results", "drops what"),
        ("drop index tasks_live", "drops an index"),
        ("ALTER TABLE tasks RENAME COLUMN job TO job_name", "renames"),
        ("ALTER TABLE tasks RENAME TO jobs", "renames"),
        ("ALTER TABLE tasks ALTER COLUMN attempt TYPE bigint", "changes the type"),
        ("ALTER TABLE tasks ALTER attempt SET DATA TYPE bigint", "changes the type"),
        ("ALTER TABLE tasks ALTER COLUMN kb_id SET NOT NULL", "refuses rows"),
        ("ALTER TABLE tasks ALTER COLUMN attempt DROP DEFAULT", "drops what"),
        ("ALTER TABLE tasks ADD COLUMN pool text NOT NULL", "column pool is NOT NULL without a default"),
        ("ALTER TABLE tasks ADD COLUMN IF NOT EXISTS pool text NOT NULL", "column pool is NOT NULL without a default"),
        ("ALTER TABLE tasks ADD pool text NOT NULL, ADD lane text DEFAULT 'x'", "column pool is NOT NULL without a default"),
        ("ALTER TABLE tasks ADD COLUMN pool text UNIQUE", "column pool has a constraint"),
        ("ALTER TABLE tasks ADD CONSTRAINT x CHECK (attempt < 9)", "adds a constraint"),
        ("CREATE UNIQUE INDEX x ON tasks (name)", "adds a constraint"),
        ("DELETE FROM tasks", "removes rows"),
        ("TRUNCATE tasks", "removes rows"),
        ("CREATE OR REPLACE TRIGGER x BEFORE INSERT ON tasks EXECUTE FUNCTION f()", "changes what writes do"),
        ("ALTER TABLE tasks ENABLE ROW LEVEL SECURITY", "changes who may write"),
        ("CREATE TABLE a (b text);\nALTER TABLE tasks\n  DROP COLUMN\n  job;", "drops what"),
    ],
)
def test_a_migration_that_takes_something_away_is_found(sql: str, sentence: str) -> None:
    assert any(one.startswith(sentence) for one in contracting(sql)), contracting(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE outbox (id uuid PRIMARY KEY, body jsonb NOT NULL, UNIQUE (id))",
        "CREATE INDEX x ON tasks (name) WHERE finished_at IS NULL",
        "ALTER TABLE tasks ADD COLUMN pool text",
        "ALTER TABLE tasks ADD COLUMN weight numeric(10, 2) NOT NULL DEFAULT 1, ADD COLUMN lane text",
        "COMMENT ON TABLE tasks IS 'x'",
        "-- DROP TABLE tasks;\n/* RENAME */ CREATE TABLE a (b text)",
        "UPDATE tasks SET priority = 'normal' WHERE priority = ''",
    ],
)
def test_a_migration_that_only_adds_is_fine(sql: str) -> None:
    assert contracting(sql) == []


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_migrations_of_a_release_are_never_changed(release: Release) -> None:
    """A database that has run them would not run them again."""
    present = present_migrations()
    for name, text in release.migrations.items():
        assert present.get(name) == text, f"{name} was released in {release}: undo the change, and add a migration"


def test_migrations_since_the_last_release_only_add() -> None:
    released = len(RELEASES[-1].migrations)
    found = {number: contracting(sql) for number, sql in migrations()[released:]}
    assert {number: what for number, what in found.items() if what and number not in CONTRACT_STEPS} == {}


def test_every_migration_has_its_revision() -> None:
    configuration = Config()
    configuration.set_main_option("script_location", str(Path(task_operator.schema.__file__).parent))
    revisions = [*ScriptDirectory.from_config(configuration).walk_revisions()][::-1]
    assert [revision.revision for revision in revisions] == [f"{number:04}" for number, _ in migrations()]
    names = [Path(revision.path).name.removeprefix("r").removesuffix(".py") for revision in revisions]
    for name, revision in zip(names, revisions, strict=True):
        assert f'run("{name}.sql")' in Path(revision.path).read_text()
