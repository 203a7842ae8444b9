"""The manifests of docs/api-routing.md lead every path of the gateway to it."""

import re
from typing import Any

import pytest
import yaml

from tests.docs.blocks import ROOT, blocks

PAGE = ROOT / "docs/api-routing.md"
SHOWN = {block.file: yaml.safe_load(block.text) for block in blocks(PAGE) if block.file}


def served() -> set[str]:
    """Return the paths that callers use, as the gateway's modules have them; probes and metrics are no matter of theirs."""
    found: set[str] = set()
    for module in (ROOT / "operator/task_gateway").glob("*.py"):
        found |= set(re.findall(r'"(/(?:api/v1|ws)/[a-z0-9/{}_]+)"', module.read_text(encoding="utf-8")))
    return found | {"/openapi.json"}


def leads(kind: str, prefix: str, path: str) -> bool:
    return path == prefix or (kind != "Exact" and path.startswith(f"{prefix}/"))


def of_ingress(manifest: Any) -> list[tuple[str, str, str]]:
    [rule] = manifest["spec"]["rules"]
    return [(one["pathType"], one["path"], one["backend"]["service"]["name"]) for one in rule["http"]["paths"]]


def of_route(manifest: Any) -> list[tuple[str, str, str]]:
    return [
        (match["path"]["type"], match["path"]["value"], rule["backendRefs"][0]["name"])
        for rule in manifest["spec"]["rules"]
        for match in rule["matches"]
    ]


@pytest.mark.parametrize(("file", "read"), [("ingress.yaml", of_ingress), ("httproute.yaml", of_route)])
def test_every_path_of_the_gateway_leads_to_it(file: str, read: Any) -> None:
    paths = served()
    assert {"/api/v1/tasks", "/api/v1/tasks/{id}"} <= paths, "paths are no longer recognised"
    rules = read(SHOWN[file])
    for path in paths:
        assert {name for kind, prefix, name in rules if leads(kind, prefix, path)} == {"gateway-service"}, path


def test_what_stays_open_has_no_limit_of_time() -> None:
    [endless] = [rule for rule in SHOWN["httproute.yaml"]["spec"]["rules"] if rule.get("timeouts") == {"request": "0s"}]
    assert {"/ws/tasks", "/api/v1/tasks/events"} <= {match["path"]["value"] for match in endless["matches"]}


def test_a_reference_to_another_namespace_is_granted() -> None:
    grant = SHOWN["referencegrant.yaml"]
    names = {
        (ref["name"], ref["namespace"])
        for rule in SHOWN["httproute.yaml"]["spec"]["rules"]
        for ref in rule["backendRefs"]
        if "namespace" in ref
    }
    assert (grant["spec"]["to"][0]["name"], grant["metadata"]["namespace"]) in names
