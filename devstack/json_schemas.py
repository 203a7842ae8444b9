"""JSON Schemas of Kubernetes' kinds and of ours, as kubeconform and editors read them: a file for each kind and version.

The paths are those of the usual catalogs, ``{{.Group}}/{{.ResourceKind}}_{{.ResourceAPIVersion}}.json``. Unknown fields are
refused, as by the API server under strict validation. CEL rules are not in them: JSON Schema cannot say what they do.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

_DIALECT: Final = "http://json-schema.org/draft-07/schema#"
_DEFINITIONS: Final = "_definitions.json"
_MAPS: Final = frozenset({"properties", "definitions"})
"""Keywords whose value is no schema, but one for each name: in the schema of CRDs "format" is a name too."""
_QUANTITY: Final = "io.k8s.apimachinery.pkg.api.resource.Quantity"


def strictly(schema: Any) -> Any:
    """Return a schema that takes no field which it does not name, as the API server under strict validation."""
    if isinstance(schema, list):
        return [strictly(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["integer", "string"]}
    known = {name: _named(part) if name in _MAPS else strictly(part) for name, part in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not is_open:
        known["additionalProperties"] = False
    return known


def _named(schemas: Mapping[str, Any]) -> dict[str, Any]:
    return {name: strictly(part) for name, part in schemas.items()}


def of_crd(definition: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of a CustomResourceDefinition: path → text."""
    spec = definition["spec"]
    group, kind = spec["group"], spec["names"]["kind"]
    files = {}
    for version in spec["versions"]:
        schema = strictly(version["schema"]["openAPIV3Schema"])
        schema["properties"] |= {
            "apiVersion": {"const": f"{group}/{version['name']}"},
            "kind": {"const": kind},
            "metadata": {"type": "object"},
        }
        whole = {"$schema": _DIALECT, "title": kind, **schema}
        files[_path(group, kind, version["name"])] = json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
    return files


def of_openapi(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the files of all kinds that an API server serves, from its ``/openapi/v2``: path → text."""
    definitions = _named(document["definitions"])
    definitions[_QUANTITY] = {"type": ["string", "number"]}
    files = {_DEFINITIONS: json.dumps({"definitions": definitions})}
    for name, definition in document["definitions"].items():
        for one in _served(definition):
            reference = {"$schema": _DIALECT, "$ref": f"../{_DEFINITIONS}#/definitions/{name}"}
            files[_path(one["group"], one["kind"], one["version"])] = json.dumps(reference)
    return files


def _served(definition: Mapping[str, Any]) -> Iterator[Mapping[str, str]]:
    if "properties" in definition:
        yield from definition.get("x-kubernetes-group-version-kind", ())


def _path(group: str, kind: str, version: str) -> str:
    return f"{group or version}/{kind.lower()}_{version}.json"  # of the core group, kubeconform takes the version for it
