"""The CustomResourceDefinition of WorkerPool: schema from the models, and the rules over several fields as CEL."""

from typing import Any, Final

from task_contract.crd import column, metadata_of
from task_contract.models import TaskType
from task_contract.names import GROUP, POOL_KIND, POOL_PLURAL, POOL_SHORT_NAME, VERSION
from task_contract.pools import PoolSpec, PoolStatus
from task_contract.rules import VALIDATIONS, Rule, rule
from task_contract.structural import Schema, structural_schema

_DURATIONS: Final = {
    "lease": ("5s", "10m"),
    "idleTimeout": ("0s", "24h"),
    "scaleDownAfter": ("0s", "1h"),
    "gracePeriod": ("1s", "1h"),
}
"""Shortest and longest. A lease is renewed three times in its length; one under 5 s would end by a pause of the network."""


def _spec_rules() -> list[Rule]:
    return [
        rule("self.min <= self.max", "spec.min: must not be larger than spec.max", field=".min"),
        rule(
            f"!('{TaskType.BATCH_PROCESSING}' in self.types)",
            f"spec.types: {TaskType.BATCH_PROCESSING} has Jobs of its own; leave it out",
            field=".types",
        ),
        rule(
            "self.types.all(one, self.types.exists_one(other, other == one))",
            "spec.types: name each type once",
            field=".types",
        ),
        *(
            rule(
                f"duration(self.{field}) >= duration('{low}') && duration(self.{field}) <= duration('{high}')",
                f"spec.{field}: must be between {low} and {high}",
                field=f".{field}",
            )
            for field, (low, high) in _DURATIONS.items()
        ),
    ]


def _spec_schema() -> Schema:
    spec = structural_schema(PoolSpec, defaults=True)
    spec[VALIDATIONS] = _spec_rules()
    return spec


def pool_definition() -> dict[str, Any]:
    """Return the CRD as a manifest."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata_of(POOL_PLURAL),
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": POOL_KIND,
                "listKind": f"{POOL_KIND}List",
                "plural": POOL_PLURAL,
                "singular": "workerpool",
                "shortNames": [POOL_SHORT_NAME],
                "categories": ["knowledge"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [
                        column("Ready", ".status.ready", kind="integer", description="Workers that take tasks"),
                        column("Busy", ".status.busy", kind="integer", description="Of these, with a task"),
                        column("Idle", ".status.idle", kind="integer", description="Of these, without one"),
                        column("Queued", ".status.queued", kind="integer", description="Tasks that wait for a worker"),
                        column("Min", ".spec.min", kind="integer"),
                        column("Max", ".spec.max", kind="integer"),
                        column("Age", ".metadata.creationTimestamp", kind="date"),
                        column("Types", ".spec.types", wide=True),
                        column("Desired", ".status.desired", kind="integer", wide=True),
                        column("Reason", '.status.conditions[?(@.type=="Ready")].reason', wide=True),
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "description": "Warm workers that carry out the tasks of a namespace without a pod start.",
                            "type": "object",
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                # Part of the names and labels of its workers, which have 63 characters.
                                "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 40}}},
                                "spec": _spec_schema(),
                                "status": structural_schema(PoolStatus),
                            },
                        }
                    },
                }
            ],
        },
    }
