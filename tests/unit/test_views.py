"""A task as services see it."""

from typing import Any

import pytest

from task_contract.models import Result
from task_contract.views import snake_case, task_view
from tests.support.operator_values import manifest

DONE = {
    "phase": "Completed",
    "attempt": 2,
    "progress": 62,
    "finishedAt": "2026-01-31T09:30:00Z",
    "result": {"milvusCount": 87, "seconds": {"embed": 1.5}},
    "attempts": [{"number": 2, "startedAt": "2026-01-31T09:29:00Z"}],
    "conditions": [{"type": "Succeeded", "reason": "Other"}, {"type": "Ready", "reason": "Completed", "message": ""}],
}


def test_names_and_states_are_those_of_the_platforms_services() -> None:
    view = task_view(manifest(status=DONE))
    assert (view["id"], view["task_id"]) == ("handbook", "handbook")
    assert view["status"] == "completed"
    assert view["progress"] == 100
    assert view["completed_at"] == "2026-01-31T09:30:00Z"
    assert view["result"] == {"milvus_count": 87, "seconds": {"embed": 1.5}}
    assert view["attempts"] == [{"number": 2, "started_at": "2026-01-31T09:29:00Z"}]
    assert (view["reason"], view["message"]) == ("Completed", None)


def test_a_task_that_nobody_has_looked_at_is_queued() -> None:
    task = manifest()
    del task["status"]
    view = task_view(task)
    assert (view["status"], view["progress"], view["attempt"], view["attempts"]) == ("queued", 0, 0, [])


@pytest.mark.parametrize(
    ("phase", "progress", "shown"),
    [("Queued", 40, 0), ("Processing", None, 0), ("Processing", 40, 40), ("Failed", 40, 40), ("Completed", None, 100)],
)
def test_progress_is_a_number_in_every_state(phase: str, progress: int | None, shown: int) -> None:
    status: dict[str, Any] = {"phase": phase} | ({} if progress is None else {"progress": progress})
    assert task_view(manifest(status=status))["progress"] == shown


@pytest.mark.parametrize(
    ("callback", "shown"),
    [
        (None, None),
        (
            {"state": "Delivered", "statusCode": 204, "attempts": 1},
            {"state": "delivered", "status_code": 204, "attempts": 1},
        ),
        ({"attempts": 1}, {"attempts": 1}),
    ],
)
def test_the_delivery_of_a_callback_has_states_in_lower_case(callback: Any, shown: Any) -> None:
    status = DONE | ({} if callback is None else {"callback": callback})
    assert task_view(manifest(status=status))["callback"] == shown


def test_keys_that_are_data_stay_as_they_are() -> None:
    spec = {"filePath": "a.pdf", "metadata": {"signedBy": "Ada", "ISBN-13": "x"}}
    assert snake_case(spec) == {"file_path": "a.pdf", "metadata": {"signedBy": "Ada", "ISBN-13": "x"}}


def test_every_name_of_a_result_is_that_of_its_field() -> None:
    assert {*snake_case(dict.fromkeys(field.alias or name for name, field in Result.model_fields.items()))} == {
        *Result.model_fields
    }
