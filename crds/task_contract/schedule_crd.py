"""The CustomResourceDefinition of ProcessingSchedule: schema from the models, and the rules over several fields as CEL."""

from typing import Any, Final

from task_contract.crd import column, metadata_of, task_spec_schema
from task_contract.names import GROUP, SCHEDULE_KIND, SCHEDULE_PLURAL, SCHEDULE_SHORT_NAME, VERSION
from task_contract.rules import VALIDATIONS, Rule, rule
from task_contract.schedules import ScheduleSpec, ScheduleStatus
from task_contract.structural import Schema, structural_schema

_FIELD: Final = "[0-9A-Za-z*,/#-]+"
_SCHEDULE: Final = f"^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|{_FIELD}( +{_FIELD}){{4}})$"
"""The form alone; what cron makes of it (minute 61, 31 February) the operator says in the condition Stalled."""
_ONE_TASK: Final = ("dependsOn", "idempotencyKey", "notBefore")
"""Fields of a spec that are about one task: made again and again, it would be a duplicate, or wait for what is gone."""


def _spec_rules() -> list[Rule]:
    return [
        rule(
            f"self.schedule.matches('{_SCHEDULE}')",
            "spec.schedule: five fields (minute, hour, day of month, month, day of week) such as '30 2 * * 1-5', "
            "or @hourly, @daily, @weekly, @monthly, @yearly; the time zone is spec.timeZone",
            field=".schedule",
        ),
        rule(
            "self.timeZone.matches('^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$')",
            "spec.timeZone: the IANA name of a time zone, such as UTC or Asia/Shanghai",
            field=".timeZone",
        ),
        *(
            rule(
                f"!has(self.taskTemplate.spec.{field})",
                f"spec.taskTemplate.spec.{field}: is about one task alone; leave it out",
                field=".taskTemplate",
                reason="FieldValueForbidden",
            )
            for field in _ONE_TASK
        ),
        rule(
            "!self.taskTemplate.spec.cancel",
            "spec.taskTemplate.spec.cancel: tasks would be canceled at once; set spec.suspend for none",
            field=".taskTemplate",
            reason="FieldValueForbidden",
        ),
    ]


def _spec_schema() -> Schema:
    spec = structural_schema(ScheduleSpec, defaults=True)
    template = spec["properties"]["taskTemplate"]
    described = template["properties"]["spec"]["description"]
    template["properties"]["spec"] = task_spec_schema() | {"description": described}
    spec[VALIDATIONS] = _spec_rules()
    return spec


def _status_schema() -> Schema:
    status = structural_schema(ScheduleStatus)
    # As of a task: from the first moment on it is told that nobody has looked at it yet.
    status["default"] = {
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "Pending",
                "message": "waiting for the operator",
                "lastTransitionTime": "1970-01-01T00:00:00Z",
            }
        ]
    }
    return status


def schedule_definition() -> dict[str, Any]:
    """Return the CRD as a manifest."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": metadata_of(SCHEDULE_PLURAL),
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": SCHEDULE_KIND,
                "listKind": f"{SCHEDULE_KIND}List",
                "plural": SCHEDULE_PLURAL,
                "singular": "processingschedule",
                "shortNames": [SCHEDULE_SHORT_NAME],
                "categories": ["knowledge"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        column("Schedule", ".spec.schedule"),
                        column("Time Zone", ".spec.timeZone"),
                        column("Suspend", ".spec.suspend", kind="boolean"),
                        column("Active", ".status.activeCount", kind="integer", description="Tasks that have not finished"),
                        column("Last", ".status.lastScheduleTime", kind="date", description="Time of the latest task"),
                        column("Next", ".status.nextScheduleTime", description="Time of the next task, in UTC"),
                        column("Age", ".metadata.creationTimestamp", kind="date"),
                        column("Type", ".spec.taskTemplate.spec.type", wide=True),
                        column("Policy", ".spec.concurrencyPolicy", wide=True),
                        column("Missed", ".status.missed", kind="integer", wide=True),
                        column("Reason", '.status.conditions[?(@.type=="Ready")].reason', wide=True),
                    ],
                    "schema": {
                        "openAPIV3Schema": {
                            "description": "Makes tasks at the times of a cron schedule.",
                            "type": "object",
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                # The value of a label of its tasks.
                                "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 63}}},
                                "spec": _spec_schema(),
                                "status": _status_schema(),
                            },
                        }
                    },
                }
            ],
        },
    }
