"""Rules of the CRD: many in one, at creation alone, and taken apart again."""

from collections.abc import Iterator
from typing import Any

import pytest

from task_contract.crd import custom_resource_definition
from task_contract.rules import VALIDATIONS, all_of, at_creation, parts_of, rule

RULES = [rule("a.x < 9", 'x: over "9"'), rule("a.y ? a.z : true", "z: wrong; why (not)"), rule("(a.x) == (1)", "x: 1")]


@pytest.mark.parametrize("unless", ["", "!has(self.a)"])
@pytest.mark.parametrize("bound", [[], [("a", "self.a")], [("a", "self.a"), ("b", "self.b")]], ids=len)
def test_what_was_made_one_is_taken_apart_with_its_messages(unless: str, bound: list[tuple[str, str]]) -> None:
    merged = all_of(RULES, "a: wrong", unless=unless, bound=bound)
    assert parts_of(merged) == RULES
    [guarded] = at_creation({VALIDATIONS: [merged]})[VALIDATIONS]
    assert guarded["optionalOldSelf"] is True
    assert parts_of(guarded) == RULES


def test_rules_of_different_reasons_are_not_made_one() -> None:
    with pytest.raises(ValueError, match="too many values"):
        all_of([RULES[0], rule("b", "b", reason="FieldValueForbidden")], "wrong")


def test_a_rule_alone_is_its_only_part_at_creation_too() -> None:
    schema = {"properties": {"a": {VALIDATIONS: [RULES[0]]}}}
    [guarded] = at_creation(schema)["properties"]["a"][VALIDATIONS]
    assert guarded["rule"] == "oldSelf.hasValue() || (\na.x < 9\n)"
    assert parts_of(guarded) == [RULES[0]] == parts_of(RULES[0])
    assert schema["properties"]["a"][VALIDATIONS] == [RULES[0]]


def _rules(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from schema.get(VALIDATIONS, ())
    for part in (*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])):
        yield from _rules(part)


def test_every_rule_of_the_crd_has_its_message_and_few_are_evaluated_with_every_write() -> None:
    [version] = custom_resource_definition()["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    parts = [part for one in _rules(schema) for part in parts_of(one) if "reason" in part]
    assert len(parts) > 90
    assert all(part["message"].startswith("spec.") and "\n" not in part["message"] for part in parts)
    always = [one for one in _rules(schema["properties"]["spec"]) if not one.get("optionalOldSelf")]
    assert always == [], "rules of what cannot change are evaluated at creation alone"
