"""Rules of a schema in CEL, written one by one and evaluated many at once.

The API server evaluates each rule of a schema with each write of an object, that of a status as well, and for each field
that a rule reads of ``self`` it builds the schemas of all fields beside it anew (``Structural.Properties``). A hundred rules
of a line each cost more CPU than the rest of a write (docs/performance.md). So rules of one place become one rule
(:func:`all_of`), those of a single field stand at the field, and those about what cannot change are evaluated when it is
created (:func:`at_creation`). Each keeps its message. :func:`parts_of` takes a rule apart again, for the reference and for
whoever compares two releases.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

from task_contract.structural import Schema

Rule = dict[str, Any]

VALIDATIONS: Final = "x-kubernetes-validations"
_AND: Final = "\n&& "
_NEW: Final = "oldSelf.hasValue() || (\n"
_ANSWER: Final = " ? "


def rule(expression: str, message: str, *, field: str | None = None, reason: str = "FieldValueInvalid") -> Rule:
    """Return a rule of a schema: an expression in CEL, and what a violation is answered with."""
    where = {} if field is None else {"fieldPath": field}
    return {"rule": expression, "message": message, "reason": reason, **where}


def all_of(
    rules: Sequence[Rule], message: str, *, field: str | None = None, unless: str = "", bound: Sequence[tuple[str, str]] = ()
) -> Rule:
    """Return one rule instead of many of one reason: it is answered with the message of the first that is violated.

    ``message`` stands for them where the API server cannot compute the answer; ``unless`` is an expression under which all
    of them hold. ``bound`` are (name, expression): names that the rules use for what would be read again and again.

    >>> print(all_of([rule("a.x < 1", "x: too large"), rule("a.y", "y: unset")], "bad", bound=[("a", "self.a")])["rule"])
    [self.a].all(a,
    (a.x < 1)
    && (a.y)
    )
    """
    [reason] = {one["reason"] for one in rules}
    opening = "".join(f"[{value}].all({name}, " for name, value in bound).rstrip()
    mapping = "".join(f"[{value}].map({name}, " for name, value in bound).rstrip()
    tests = _AND.join(f"({one['rule']})" for one in rules)
    answers = "\n: ".join(f"!({one['rule']}){_ANSWER}{json.dumps(one['message'], ensure_ascii=False)}" for one in rules)
    merged = rule(
        (f"{unless} || " if unless else "") + f"{opening}\n{tests}\n" + ")" * len(bound), message, field=field, reason=reason
    )
    merged["rule"] = merged["rule"].strip("\n")
    merged["messageExpression"] = (f"{mapping}\n{answers}\n: ''" + ")[0]" * len(bound)).strip("\n")
    return merged


def parts_of(merged: Rule) -> list[Rule]:
    """Return the rules that were made one by :func:`all_of` and :func:`at_creation`; any other rule is its own only part.

    >>> rules = [rule("self < 9", "too large"), rule("self > 1", "too small")]
    >>> parts_of(all_of(rules, "out of bounds")) == rules
    True
    """
    expression: str = merged["rule"].removeprefix(_NEW)
    kept = {key: value for key, value in merged.items() if key not in {"rule", "messageExpression", "optionalOldSelf"}}
    if "messageExpression" not in merged:
        return [kept | {"rule": expression.removesuffix("\n)") if expression != merged["rule"] else expression}]
    parts = []
    for line in merged["messageExpression"].splitlines():
        if not line.startswith(("!(", ": !(")):
            continue
        test, _, answer = line.removeprefix(": ").rpartition(_ANSWER)
        parts.append(kept | {"rule": test.removeprefix("!(").removesuffix(")"), "message": json.loads(answer)})
    return parts


def at_creation(schema: Schema) -> Schema:
    """Return the schema with rules that are evaluated only when its object is created, in it and below it.

    For an object that never changes: other rules see to that. Those of map keys and values that lists hold stay as they
    are: the API server does not tell them apart from those that were there before.
    """
    changed = dict(schema)
    if VALIDATIONS in schema:
        changed[VALIDATIONS] = [
            {**one, "rule": f"{_NEW}{one['rule']}\n)", "optionalOldSelf": True} for one in schema[VALIDATIONS]
        ]
    if "properties" in schema:
        changed["properties"] = {name: at_creation(part) for name, part in schema["properties"].items()}
    return changed
