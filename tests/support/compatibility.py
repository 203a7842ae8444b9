"""What a change of a contract takes away from those who hold on to the release before: CRD by CRD, migration by migration.

Both are pure functions that return sentences; an empty list is a change that may be made. What cannot be judged from the
texts alone (a new rule, another pattern) counts as taken away until somebody has looked at it and said why it is not.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from task_contract.rules import VALIDATIONS, parts_of

Schema = Mapping[str, Any]

_UPPER: Final = ("maximum", "maxLength", "maxItems", "maxProperties")
_LOWER: Final = ("minimum", "minLength", "minItems", "minProperties")
_SAME: Final = (
    "type",
    "format",
    "pattern",
    "default",
    "multipleOf",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "uniqueItems",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
    "x-kubernetes-map-type",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-embedded-resource",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
)
"""Where any other value may mean less: a looser pattern cannot be told from a tighter one."""
_JUDGED: Final = frozenset(
    {
        *_UPPER,
        *_LOWER,
        *_SAME,
        "properties",
        "items",
        "additionalProperties",
        "required",
        "enum",
        "nullable",
        "x-kubernetes-validations",
        "description",
    }
)


def narrowed_crd(old: Mapping[str, Any], new: Mapping[str, Any], *, reviewed: Iterable[str] = ()) -> list[str]:
    """Return what callers of OLD, a CRD, lose by NEW.

    ``reviewed`` are sentences of this function that were looked at and found harmless, with a reason beside them.
    """
    found = [*_names(old["spec"], new["spec"])]
    versions = {version["name"]: version for version in new["spec"]["versions"]}
    for version in old["spec"]["versions"]:
        name = version["name"]
        if name not in versions:
            found.append(f"version {name} is gone")
            continue
        found += _version(name, version, versions[name])
    return [sentence for sentence in found if sentence not in set(reviewed)]


def _names(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for field in ("group", "scope"):
        if old[field] != new[field]:
            yield f"{field} is {new[field]} and was {old[field]}"
    for field, was in old["names"].items():
        now = new["names"].get(field)
        if isinstance(was, list):
            for one in was:
                if one not in (now or ()):
                    yield f"names.{field}: {one} is gone"
        elif now != was:
            yield f"names.{field} is {now} and was {was}"


def _version(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    if old["served"] and not new["served"]:
        yield f"version {name} is not served any more"
    if old["storage"] and not new["storage"]:
        yield f"version {name} is not the stored one any more: stored objects need a migration"
    for one in (old.get("subresources") or {}).keys() - (new.get("subresources") or {}).keys():
        yield f"subresource {one} is gone"
    paths = [one["jsonPath"] for one in new.get("selectableFields", ())]
    for one in old.get("selectableFields", ()):
        if one["jsonPath"] not in paths:
            yield f"{one['jsonPath']} cannot be selected by any more"
    columns = new.get("additionalPrinterColumns", [])
    kept = [
        column["name"] for column in columns if column["name"] in [one["name"] for one in old["additionalPrinterColumns"]]
    ]
    if kept != [one["name"] for one in old["additionalPrinterColumns"] if one["name"] in kept]:
        yield "printer columns stand in another order"
    for column in old["additionalPrinterColumns"]:
        same = next((one for one in columns if one["name"] == column["name"]), None)
        if same is None:
            yield f"printer column {column['name']} is gone"
            continue
        for field in ("jsonPath", "type"):
            if same[field] != column[field]:
                yield f"printer column {column['name']}: {field} is {same[field]} and was {column[field]}"
        if same.get("priority", 0) > column.get("priority", 0):
            yield f"printer column {column['name']} is shown with -o wide only"
    yield from _schema("", old["schema"]["openAPIV3Schema"], new["schema"]["openAPIV3Schema"])


def _schema(path: str, old: Schema, new: Schema) -> Iterator[str]:
    """Compare two structural schemas of one place."""
    where = path or "the object"
    for keyword in sorted((old.keys() | new.keys()) - _JUDGED):
        if old.get(keyword) != new.get(keyword):
            yield f"{where}: {keyword} has changed, and nobody here knows what that means"
    for keyword in _SAME:
        if old.get(keyword) != new.get(keyword):
            yield f"{where}: {keyword} is {new.get(keyword)!r} and was {old.get(keyword)!r}"
    for keyword in _UPPER:
        if keyword in new and (keyword not in old or new[keyword] < old[keyword]):
            yield f"{where}: {keyword} is {new[keyword]} and was {old.get(keyword, 'not limited')}"
    for keyword in _LOWER:
        if keyword in new and (keyword not in old or new[keyword] > old[keyword]):
            yield f"{where}: {keyword} is {new[keyword]} and was {old.get(keyword, 'not limited')}"
    if old.get("nullable") and not new.get("nullable"):
        yield f"{where}: null is refused"
    yield from _enum(where, old.get("enum"), new.get("enum"))
    for field in sorted(set(new.get("required", ())) - set(old.get("required", ()))):
        yield f"{where}: {field} is required"
    before = [rule["rule"] for one in old.get(VALIDATIONS, ()) for rule in parts_of(one)]
    for rule in (rule for one in new.get(VALIDATIONS, ()) for rule in parts_of(one)):
        if rule["rule"] not in before:
            yield f"{where}: a new rule: {rule['rule']}"
    here, there = old.get("properties", {}), new.get("properties", {})
    for field, schema in here.items():
        if field not in there:
            yield f"{path}.{field} is gone"
        else:
            yield from _schema(f"{path}.{field}", schema, there[field])
    yield from _values(path, "items", "[]", old, new)
    yield from _values(path, "additionalProperties", ".*", old, new)


def _values(path: str, keyword: str, sign: str, old: Schema, new: Schema) -> Iterator[str]:
    was, now = old.get(keyword), new.get(keyword)
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        yield from _schema(f"{path}{sign}", was, now)
    elif was != now:
        yield f"{path}: {keyword} is {now!r} and was {was!r}"


def _enum(where: str, old: Sequence[object] | None, new: Sequence[object] | None) -> Iterator[str]:
    if new is not None and old is None:
        yield f"{where}: only {', '.join(map(str, new))} is allowed"
    for value in old or ():
        if new is not None and value not in new:
            yield f"{where}: {value} is refused"
    if where.startswith(".status"):
        # The release before reads what this one writes, after a rollback: it must know the value a release earlier.
        for value in new or ():
            if old is not None and value not in old:
                yield f"{where}: {value} is new, and the release before cannot read it"


# ---------------------------------------------------------------------------------------------------------- migrations

_COMMENT: Final = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_CONTRACTS: Final = (
    (re.compile(r"\bDROP\s+(?!INDEX\b)", re.IGNORECASE), "drops what the release before uses"),
    (re.compile(r"\bDROP\s+INDEX\b", re.IGNORECASE), "drops an index that queries of the release before need"),
    (re.compile(r"\bRENAME\b", re.IGNORECASE), "renames what the release before uses"),
    (re.compile(r"\bALTER\s+(?:COLUMN\s+)?\w+\s+(?:SET\s+DATA\s+)?TYPE\b", re.IGNORECASE), "changes the type of a column"),
    (re.compile(r"\bSET\s+NOT\s+NULL\b", re.IGNORECASE), "refuses rows that the release before writes"),
    (
        re.compile(r"\bADD\s+(?:CONSTRAINT\b|CHECK\b|UNIQUE\b|PRIMARY\b|FOREIGN\b|EXCLUDE\b)", re.IGNORECASE),
        "adds a constraint",
    ),
    (re.compile(r"\bCREATE\s+UNIQUE\s+INDEX\b", re.IGNORECASE), "adds a constraint"),
    (re.compile(r"\b(?:TRUNCATE|DELETE\s+FROM)\b", re.IGNORECASE), "removes rows"),
    (
        re.compile(r"\bCREATE\s+(?:OR\s+REPLACE\s+)?(?:CONSTRAINT\s+)?(?:TRIGGER|RULE|POLICY)\b", re.IGNORECASE),
        "changes what writes do",
    ),
    (re.compile(r"\b(?:DISABLE|ENABLE|FORCE)\s+ROW\b|\bREVOKE\b", re.IGNORECASE), "changes who may write"),
)
_ADD_COLUMN: Final = re.compile(
    r"\bADD\s+(?:COLUMN\s+)?(?:IF\s+NOT\s+EXISTS\s+)?(?!CONSTRAINT|CHECK|UNIQUE|PRIMARY|FOREIGN|EXCLUDE)(\w+)\s+([^;]*)",
    re.IGNORECASE,
)


def contracting(sql: str) -> list[str]:
    """Return what a migration takes away from the release before, which goes on running while it is applied.

    Expand, then contract: a release adds, moves its code over, and the next one removes (such a migration is listed as a
    contract step where this is called).
    """
    found = []
    for statement in _COMMENT.sub(" ", sql).split(";"):
        text = " ".join(statement.split())
        for pattern, meaning in _CONTRACTS:
            if pattern.search(text):
                found.append(f"{meaning}: {text[:120]}")
        if re.match(r"ALTER TABLE\b", text, re.IGNORECASE):
            for column, rest in ((one.group(1), one.group(2)) for one in _added(text)):
                if re.search(r"\bNOT\s+NULL\b", rest, re.IGNORECASE) and not re.search(r"\bDEFAULT\b", rest, re.IGNORECASE):
                    found.append(f"column {column} is NOT NULL without a default, so rows of the release before are refused")
                if re.search(r"\b(?:UNIQUE|CHECK|REFERENCES)\b", rest, re.IGNORECASE):
                    found.append(f"column {column} has a constraint that rows of the release before may break")
    return found


def _added(statement: str) -> Iterator[re.Match[str]]:
    """Yield each ADD COLUMN of an ALTER TABLE, with what belongs to that column alone."""
    depth, start, parts = 0, 0, []
    for position, character in enumerate(statement):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            parts.append(statement[start:position])
            start = position + 1
    for part in [*parts, statement[start:]]:
        if match := _ADD_COLUMN.search(part):
            yield match
