"""From a pydantic model to a Kubernetes structural schema.

Pydantic writes JSON Schema 2020-12; a CRD takes the *structural* subset of OpenAPI 3.0: no ``$ref``, no ``anyOf`` with
types in it, no ``const``, no ``propertyNames``, no ``title``. Everything else that the API server would ignore or refuse
raises here, at build time, with the path of the field.
"""

from collections.abc import Mapping
from typing import Any, Final

from pydantic import BaseModel

Schema = dict[str, Any]

_COPIED: Final = (
    "description",
    "enum",
    "format",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minItems",
    "minLength",
    "minProperties",
    "minimum",
    "pattern",
    "type",
)
_DROPPED: Final = frozenset({"title", "default", "$defs"})
_HANDLED: Final = frozenset(
    {"$ref", "allOf", "anyOf", "const", "properties", "required", "items", "additionalProperties", "propertyNames"}
)


class UnsupportedSchema(TypeError):
    """A model uses something that has no structural form; the message names the field and the keyword."""


def structural_schema(model: type[BaseModel], *, defaults: bool = False) -> Schema:
    """Return the structural schema of ``model``.

    With ``defaults``, fields with a default other than None carry it, in the form in which the model serializes it: the
    API server then stores the default with the object. An object whose fields have defaults gets ``{}``, so that they
    apply when it is absent. Descriptions are the docstrings of the fields.

    Raises :class:`UnsupportedSchema` where a field has no structural form or no bound (strings, lists and maps need one:
    the cost of CEL rules is estimated from them).
    """
    source = model.model_json_schema(by_alias=True, mode="validation")
    values = model.model_construct().model_dump(mode="json", by_alias=True, exclude_none=True) if defaults else None
    return _convert(source, definitions=source.get("$defs", {}), path=model.__name__, default=values, top=True)


def _convert(
    source: Mapping[str, Any], *, definitions: Mapping[str, Any], path: str, default: Any = None, top: bool = False
) -> Schema:
    merged = _resolve(source, definitions=definitions, path=path)
    unknown = merged.keys() - set(_COPIED) - _DROPPED - _HANDLED
    unknown = {key for key in unknown if not key.startswith("x-kubernetes-")}
    if unknown:
        raise UnsupportedSchema(f"cannot convert {path}: no structural form for {', '.join(sorted(unknown))}")

    result: Schema = {key: merged[key] for key in _COPIED if key in merged}
    result |= {key: value for key, value in merged.items() if key.startswith("x-kubernetes-")}
    if "const" in merged:
        result |= {"type": merged.get("type", "string"), "enum": [merged["const"]]}
    if "description" in result:
        result["description"] = " ".join(result["description"].replace("``", "`").split())
    if default is not None and not top:
        result["default"] = {} if result.get("type") == "object" else default
    match result.get("type"):
        case "object" if "properties" in merged:
            result["properties"] = {
                name: _convert(value, definitions=definitions, path=f"{path}.{name}", default=(default or {}).get(name))
                for name, value in merged["properties"].items()
            }
            if merged.get("required"):
                result["required"] = sorted(merged["required"])
        case "object":
            _map(result, merged, definitions=definitions, path=path)
        case "array":
            if "maxItems" not in result:
                raise UnsupportedSchema(f"cannot convert {path}: a list needs max_length")
            result["items"] = _convert(merged["items"], definitions=definitions, path=f"{path}[]")
        case "string":
            if not {"enum", "maxLength"} & result.keys() and result.get("format") != "date-time":
                raise UnsupportedSchema(f"cannot convert {path}: a string needs max_length")
        case "integer":
            result.setdefault("format", "int64")
        case "boolean" | "number":
            pass
        case other:
            raise UnsupportedSchema(f"cannot convert {path}: type {other!r}")
    return result


def _map(result: Schema, merged: Mapping[str, Any], *, definitions: Mapping[str, Any], path: str) -> None:
    """Fill in a map from string to something; bounds of its keys become a CEL rule, as there is no propertyNames."""
    values = merged.get("additionalProperties")
    if not isinstance(values, Mapping):
        raise UnsupportedSchema(f"cannot convert {path}: an object without properties needs a type of its values")
    if "maxProperties" not in result:
        raise UnsupportedSchema(f"cannot convert {path}: a map needs max_length")
    result["additionalProperties"] = _convert(values, definitions=definitions, path=f"{path}{{}}")
    keys = merged.get("propertyNames", {})
    low, high = keys.get("minLength", 0), keys.get("maxLength")
    if high is not None:
        rule = {
            "rule": f"self.all(key, key.size() >= {low} && key.size() <= {high})",
            "message": f"keys must have {low} to {high} characters",
        }
        result["x-kubernetes-validations"] = [*result.get("x-kubernetes-validations", []), rule]


def _resolve(source: Mapping[str, Any], *, definitions: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Inline references and the ``X | None`` of optional fields; what stands beside a reference wins."""
    rest = {key: value for key, value in source.items() if key not in {"$ref", "allOf", "anyOf"}}
    parts: list[Mapping[str, Any]] = list(source.get("allOf", []))
    if "$ref" in source:
        parts.append(definitions[source["$ref"].rsplit("/", 1)[-1]])
    if "anyOf" in source:
        kinds = [kind for kind in source["anyOf"] if kind.get("type") != "null"]
        if len(kinds) != 1:
            raise UnsupportedSchema(f"cannot convert {path}: a union of {len(kinds)} types")
        parts += kinds
    merged: dict[str, Any] = {}
    for part in parts:
        merged |= _resolve(part, definitions=definitions, path=path)
    return merged | rest
