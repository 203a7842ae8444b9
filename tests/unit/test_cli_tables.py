"""Tables of `ptask`: widths, what goes first where there is no room, forms for machines."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from rich.cells import cell_len

from ptask import top
from ptask.knowledge import of_tasks
from ptask.tables import (
    TASK_COLUMNS,
    as_text,
    as_yaml,
    bar,
    clipped,
    columns_for,
    detail,
    document,
    newest_first,
    plain,
    resource_name,
    span,
    table,
)
from tests.support.cli_tasks import NOW, ago, task

WAIT = {"reason": "KnowledgeBaseLimit", "position": 3}
TASKS = [
    task("handbook", "Processing", stage="embed", progress=62, attempt=1),
    task("操作手册-第二版", queue=WAIT, spec={"kbId": "知识库"}),
    task("health", "Completed", spec={"type": "health_check", "kbId": None, "priority": "high"}, attempt=1),
]


def drawn(width: int | None, *, wide: bool = False, namespaces: bool = False) -> list[str]:
    columns = columns_for(TASK_COLUMNS, wide=wide, namespaces=namespaces)
    return as_text(table(columns, TASKS, now=NOW, width=width)).splitlines()


def test_a_table_for_a_pipe_is_that_of_kubectl() -> None:
    titles, first, second, third = drawn(None)
    assert titles.split() == ["NAME", "TYPE", "KB", "PRIORITY", "PHASE", "STAGE", "PROGRESS", "ATTEMPT", "WAITING", "AGE"]
    assert first.split() == ["handbook", "document_processing", "kb-42", "normal", "Processing", "embed", "62%", "1", "5m"]
    assert second.split()[0] == "操作手册-第二版"
    assert second.split()[2:] == ["知识库", "normal", "Queued", "KnowledgeBaseLimit", "5m"]
    assert third.split() == ["health", "health_check", "high", "Completed", "100%", "1", "5m"]


@pytest.mark.parametrize("wide", [False, True])
def test_columns_stand_below_their_titles_with_chinese_in_them_too(wide: bool) -> None:
    lines = drawn(None, wide=wide)
    start = cell_len(lines[0][: lines[0].index("PHASE")])
    for line, phase in zip(lines[1:], ("Processing", "Queued", "Completed"), strict=True):
        assert cell_len(line[: line.index(phase)]) == start


@pytest.mark.parametrize("namespaces", [False, True])
@pytest.mark.parametrize("width", [200, 132, 100, 80, 60, 40])
def test_a_table_for_a_terminal_fits_it_and_keeps_name_and_phase(width: int, namespaces: bool) -> None:
    lines = drawn(width, wide=True, namespaces=namespaces)
    assert max(map(cell_len, lines)) <= width
    assert "NAME" in lines[0]
    assert "PHASE" in lines[0]
    assert [line for line in lines if "Processing" in line]


def test_why_a_task_waits_stays_longer_than_its_attempt() -> None:
    titles = drawn(80)[0].split()
    assert "WAITING" in titles
    assert "ATTEMPT" not in titles


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("short", 10, "short"),
        ("handbook.pdf", 6, "handb…"),
        ("操作手册", 8, "操作手册"),
        ("操作手册", 7, "操作手…"),
        ("a", 0, ""),
    ],
)
def test_a_text_is_cut_by_cells_and_not_through_a_character(text: str, width: int, shown: str) -> None:
    assert clipped(text, width) == shown
    assert cell_len(shown) <= width


def test_names_cannot_command_a_terminal() -> None:
    assert plain("a\x1b[31mb\x9bc\nd\te\x7f") == "a[31mbc d e"
    line = as_text(table(TASK_COLUMNS, [task("x", queue={"reason": "\x1b[2J"})], now=NOW, width=None))
    assert "\x1b" not in line


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-3, "0s"), (0, "0s"), (119, "119s"), (120, "2m"), (192, "3m12s"), (3600, "60m"), (179 * 60, "179m"),
        (10_860, "3h1m"),
        (8 * 3600 + 60, "8h"), (49 * 3600, "2d1h"), (9 * 86_400 + 7200, "9d"),
    ],
)  # fmt: skip
def test_ages_are_those_of_kubectl(seconds: float, shown: str) -> None:
    assert span(seconds) == shown


@pytest.mark.parametrize("percent", [0, 1, 62, 99, 100])
def test_a_bar_has_one_width(percent: int) -> None:
    assert cell_len(bar(percent).text.partition(" ")[0]) == 10


def test_the_youngest_is_first_and_names_decide_in_a_second() -> None:
    tasks = [task("b"), task("a"), task("new", created=ago(seconds=1))]
    assert [one["metadata"]["name"] for one in newest_first(tasks)] == ["new", "a", "b"]


def test_machines_get_the_manifest_without_managed_fields() -> None:
    stored = task("手册")
    stored["metadata"]["managedFields"] = [{"manager": "x"}]
    one: Any = yaml.safe_load(as_yaml(document([stored], single=True)))
    assert one["metadata"].keys() == {"name", "namespace", "uid", "creationTimestamp"}
    assert one["spec"] == stored["spec"]
    assert "手册" in as_yaml(one)
    several = json.loads(json.dumps(document([stored, stored], single=False)))
    assert (several["kind"], len(several["items"])) == ("List", 2)
    assert resource_name(stored) == "processingtask.tasks.zzdsj.io/手册"


def test_a_task_in_full_says_how_it_ended_and_leaves_out_what_it_has_not() -> None:
    failed = task(
        "broken",
        "Failed",
        reason="DocumentUnreadable",
        startedAt=ago(minutes=3),
        finishedAt=ago(minutes=1),
        error={"reason": "DocumentUnreadable", "message": "cannot read it"},
        attempts=[
            {"number": 1, "job": "broken-1", "startedAt": ago(minutes=3), "finishedAt": ago(minutes=1), "reason": "X"}
        ],
        result={"components": [{"name": "redis", "healthy": False, "milliseconds": 7, "message": "refused"}]},
    )
    lines = {name: cell.text for name, cell in detail(failed, now=NOW)}
    assert lines["Phase"] == "Failed (DocumentUnreadable) 60s ago, took 2m"
    assert lines["Error"] == "DocumentUnreadable: cannot read it"
    assert lines["Attempts"] == "1: X after 2m (broken-1)"
    assert lines["Components"] == "redis: UNHEALTHY (7 ms) refused"
    assert "Callback" not in lines
    assert "None" not in " ".join(lines.values())


def test_the_queue_is_by_priority_and_the_most_frequent_reason() -> None:
    low = {"priority": "low"}
    tasks = [
        *(task(f"a{n}", queue={"reason": "TotalLimit"}, spec=low) for n in range(3)),
        task("b", queue={"reason": "StoreUnavailable"}, spec=low),
        task("c", spec={"priority": "high"}),
        task("d", "Retrying"),
        task("e", "Processing"),
        task("f", "Failed"),
    ]
    assert top.queue(tasks) == [
        ("high", "Next", 1), ("normal", "RetryLater", 1), ("low", "TotalLimit", 3), ("low", "StoreUnavailable", 1)
    ]  # fmt: skip
    assert [one["metadata"]["name"] for one in top.running(tasks)] == ["e"]
    assert top.summary(tasks) == "5 Queued, 1 Processing, 1 Retrying, 1 Failed"
    assert top.summary([]) == "no tasks"


def test_a_pool_that_nobody_has_looked_at_has_a_line() -> None:
    pool = {"metadata": {"name": "texts"}, "spec": {"types": ["health_check"], "min": 0, "max": 4}}
    line = as_text(table(top.POOL_COLUMNS, [pool], now=datetime.now(UTC))).splitlines()[1]
    assert line.split() == ["texts", "0", "0", "0", "0", "0", "0", "4", "Unseen", "health_check"]


def test_knowledge_bases_as_far_as_tasks_tell() -> None:
    def done(name: str, kb: str, minutes: float, **payload: Any) -> dict[str, Any]:
        return task(
            name, "Completed", spec={"kbId": kb, "payload": payload}, finishedAt=ago(minutes=minutes), result={"chunks": 7}
        )

    rows = of_tasks(
        [
            done("a", "kept", 9, filePath="a.pdf"),
            done("again", "kept", 8, filePath="a.pdf"),
            done("b", "kept", 7, filePath="b.pdf"),
            done("gone", "kept", 6, filePath="b.pdf", action="delete"),
            done("c", "emptied", 9, filePath="c.pdf"),
            done("all", "emptied", 8, action="delete_knowledge_base", confirm="emptied"),
            task("d", "Failed", spec={"kbId": "new"}),
            task("e", "Processing", spec={"kbId": "new"}),
        ]
    )
    figures = [(row["kb_id"], row["state"], row["documents"], row["chunks"], row["tasks"], row["failed"]) for row in rows]
    assert figures == [("emptied", "empty", 0, 0, 2, 0), ("kept", "ready", 1, 7, 4, 0), ("new", "indexing", 0, 0, 2, 1)]
