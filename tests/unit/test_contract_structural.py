"""The converter from pydantic to structural schemas, on small models of its own."""

from datetime import timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from task_contract.models import Duration, Model
from task_contract.structural import UnsupportedSchema, structural_schema


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Inner(Model):
    size_in_cm: Annotated[int, Field(ge=1, le=9)] = 3
    """How  large
    it is, as ``cm``."""
    wait: Duration = timedelta(minutes=90)


class Outer(BaseModel):
    inner: Inner = Inner()
    colour: Colour
    maybe: Annotated[str, Field(max_length=4, pattern="^a")] | None = None
    names: Annotated[list[Annotated[str, Field(max_length=2)]], Field(max_length=3)] = []
    labels: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=5)], Annotated[str, Field(max_length=6)]], Field(max_length=2)
    ] = {}
    fixed: Literal["x"] = "x"
    share: float = 0.5


def test_optional_fields_become_plain_types_that_are_not_required() -> None:
    schema = structural_schema(Outer)
    assert schema["properties"]["maybe"] == {"type": "string", "maxLength": 4, "pattern": "^a"}
    assert schema["required"] == ["colour"]


def test_references_are_inlined_and_fields_are_camel_case() -> None:
    schema = structural_schema(Outer)
    assert schema["properties"]["inner"]["properties"]["sizeInCm"] == {
        "type": "integer",
        "format": "int64",
        "minimum": 1,
        "maximum": 9,
        "description": "How large it is, as `cm`.",
    }
    assert "$ref" not in repr(schema)
    assert "$defs" not in repr(schema)


def test_enums_and_constants_become_enums() -> None:
    schema = structural_schema(Outer)
    assert schema["properties"]["colour"]["enum"] == ["red", "blue"]
    assert schema["properties"]["fixed"] == {"type": "string", "enum": ["x"]}


def test_bounds_of_map_keys_become_a_rule() -> None:
    labels = structural_schema(Outer)["properties"]["labels"]
    assert labels["additionalProperties"] == {"type": "string", "maxLength": 6}
    assert labels["maxProperties"] == 2
    assert labels["x-kubernetes-validations"] == [
        {"rule": "self.all(key, key.size() >= 1 && key.size() <= 5)", "message": "keys must have 1 to 5 characters"}
    ]


def test_defaults_are_left_out_unless_asked_for() -> None:
    assert "default" not in repr(structural_schema(Outer))


def test_defaults_stand_in_the_form_that_the_api_server_stores() -> None:
    schema = structural_schema(Outer, defaults=True)
    assert schema["properties"]["inner"]["default"] == {}
    assert schema["properties"]["inner"]["properties"]["wait"]["default"] == "1h30m"
    assert schema["properties"]["inner"]["properties"]["sizeInCm"]["default"] == 3
    assert schema["properties"]["share"]["default"] == 0.5
    assert "default" not in schema["properties"]["maybe"]


class Unbounded(BaseModel):
    text: str


class UnboundedList(BaseModel):
    texts: list[Annotated[str, Field(max_length=1)]]


class UnboundedMap(BaseModel):
    texts: dict[str, Annotated[str, Field(max_length=1)]]


class Untyped(BaseModel):
    anything: Annotated[dict[str, Any], Field(max_length=1)]


class Union(BaseModel):
    either: int | bool


class Exclusive(BaseModel):
    number: Annotated[int, Field(gt=0)]


class Tuple(BaseModel):
    pair: tuple[int, int]


class PatternedKeys(BaseModel):
    texts: Annotated[dict[Annotated[str, Field(pattern="^a")], Annotated[str, Field(max_length=1)]], Field(max_length=1)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unbounded, r"Unbounded\.text: a string needs max_length"),
        (UnboundedList, r"UnboundedList\.texts: a list needs max_length"),
        (UnboundedMap, r"UnboundedMap\.texts: a map needs max_length"),
        (Untyped, r"Untyped\.anything: an object without properties needs a type"),
        (Union, r"Union\.either: a union of 2 types"),
        (Exclusive, r"Exclusive\.number: no structural form for exclusiveMinimum"),
        (Tuple, r"Tuple\.pair: no structural form for prefixItems"),
        (PatternedKeys, r"PatternedKeys\.texts: no structural form for patternProperties"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_has_no_structural_form_is_named(model: type[BaseModel], message: str) -> None:
    with pytest.raises(UnsupportedSchema, match=message):
        structural_schema(model)
