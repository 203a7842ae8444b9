"""What of the chart can be told without helm: documented values, a schema that covers them, one version for all."""

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from task_contract.crd import custom_resource_definition
from task_contract.models import ProcessingTask
from task_contract.pool_crd import pool_definition
from task_contract.pools import WorkerPool
from task_contract.schedule_crd import schedule_definition
from task_contract.schedules import ProcessingSchedule

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/processing-tasks"
VALUES = (CHART / "values.yaml").read_text(encoding="utf-8")
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return SCHEMA["definitions"][reference.removeprefix("#/definitions/")] if reference else schema


def missing_from_schema(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> list[str]:
    """Return the paths of values that the schema does not name; objects of free keys are not looked into."""
    schema = resolve(schema)
    if schema.get("additionalProperties") is not False:
        return []
    found = []
    for name, value in values.items():
        if name not in schema["properties"]:
            found.append(f"{path}.{name}")
        elif isinstance(value, dict):
            found += missing_from_schema(value, schema["properties"][name], f"{path}.{name}")
    return found


def missing_from_values(schema: dict[str, Any], values: Any, path: str = "") -> list[str]:
    """Return the paths that the schema allows and values.yaml does not show."""
    schema = resolve(schema)
    found = []
    for name, part in schema.get("properties", {}).items():
        if not isinstance(values, dict) or name not in values:
            found.append(f"{path}.{name}")
        else:
            found += missing_from_values(part, values[name], f"{path}.{name}")
    return found


def test_schema_is_valid_and_accepts_the_defaults() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.Draft7Validator(SCHEMA).validate(yaml.safe_load(VALUES))


def test_schema_and_values_name_the_same() -> None:
    values = yaml.safe_load(VALUES)
    assert missing_from_schema(values, SCHEMA) == []
    missing = missing_from_values(SCHEMA, values)
    assert [path for path in missing if not path.startswith(".operator.limits.perType.")] == [".global"]


def test_every_value_has_a_comment() -> None:
    pairs = pairwise(VALUES.splitlines())
    bare = [line for before, line in pairs if re.match(r" *\w+: \S", line) and not before.strip().startswith("# --")]
    # Part of the example entry of taskNamespaces, which is explained at length.
    assert bare == ["    create: true"]


@pytest.mark.parametrize("field", ["version", "appVersion"])
def test_chart_has_the_version_of_the_distribution(field: str) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert chart[field] == project["version"]


@pytest.mark.parametrize("name", ["operator", "runner"])
def test_image_has_the_version_of_the_distribution(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / f"Dockerfile.{name}").read_text(encoding="utf-8").splitlines()
    assert f"ARG VERSION={project['version']}" in lines
    assert "USER 65532:65532" in lines


def test_what_artifact_hub_shows_is_what_the_chart_installs() -> None:
    annotations = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))["annotations"]
    installed = {
        definition["metadata"]["name"]
        for definition in (custom_resource_definition(), pool_definition(), schedule_definition())
    }
    assert {shown["name"] for shown in yaml.safe_load(annotations["artifacthub.io/crds"])} == installed
    for example in yaml.safe_load(annotations["artifacthub.io/crdsExamples"]):
        kinds: tuple[type[BaseModel], ...] = (ProcessingTask, WorkerPool, ProcessingSchedule)
        kind = {one.__name__: one for one in kinds}[example["kind"]]
        kind.model_validate(example)
