"""The contract of ProcessingTasks: models, names, life cycle, errors and messages that every process shares.

Imports only the standard library and pydantic. Operator, runner, gateway and clients meet here and nowhere else.
"""

from task_contract.lifecycle import ExitCode, conditions, exit_code, retry_delay
from task_contract.messages import AttemptOutcome, Outcome, ProgressEvent
from task_contract.models import (
    Condition,
    Payload,
    Phase,
    Priority,
    ProcessingTask,
    RetryPolicy,
    Spec,
    Stage,
    Status,
    TaskType,
    parse_manifest,
)

__all__ = [
    "AttemptOutcome",
    "Condition",
    "ExitCode",
    "Outcome",
    "Payload",
    "Phase",
    "Priority",
    "ProcessingTask",
    "ProgressEvent",
    "RetryPolicy",
    "Spec",
    "Stage",
    "Status",
    "TaskType",
    "conditions",
    "exit_code",
    "parse_manifest",
    "retry_delay",
]
