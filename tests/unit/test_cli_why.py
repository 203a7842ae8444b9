"""What `ptask why` says: a table over statuses."""

from typing import Any

import pytest

from ptask.why import MEANINGS, Known, explain
from tests.support.cli_tasks import NOW, ago, event, pod, task, waiting
from tests.unit.test_docs import reasons_of_the_contract, reasons_of_the_operator

QUEUE = {"since": ago(minutes=4)}
POOL = {
    "metadata": {"name": "texts"},
    "spec": {"types": ["embedding_generation"], "max": 4},
    "status": {"ready": 2, "busy": 2, "queued": 14, "conditions": [{"type": "Ready", "status": "True"}]},
}
OPERATOR: dict[str, Any] = {"metadata": {"namespace": "system", "name": "op-operator"}, "status": {"readyReplicas": 1}}


def said(manifest: dict[str, Any], **known: Any) -> str:
    return explain(Known(manifest, now=NOW, **known))


@pytest.mark.parametrize(
    ("manifest", "known", "words"),
    [
        pytest.param(
            task(queue={**QUEUE, "reason": "KnowledgeBaseLimit", "message": "2 tasks of kb-42 run", "position": 3}),
            {},
            ["Queued for 5m", "(KnowledgeBaseLimit)", "2 tasks of kb-42 run.", "number 3 in line", "operator.limits"],
            id="a limit",
        ),
        pytest.param(
            task(queue={**QUEUE, "reason": "StoreUnavailable", "message": "cannot reach Milvus at http://milvus:19530"}),
            {},
            ["a store, or the document volume", "Cannot reach Milvus", "Bring it back", "nothing is counted"],
            id="a store that is down",
        ),
        pytest.param(
            task(spec={"suspend": True}, queue={**QUEUE, "reason": "Suspended", "message": "spec.suspend is true"}),
            {},
            ["spec.suspend is true (Suspended)", "kubectl patch ptask handbook", '{"spec":{"suspend":false}}'],
            id="suspended",
        ),
        pytest.param(
            task(phase=None, spec={"suspend": True}, created=ago(seconds=2)),
            {},
            ["does not run since spec.suspend is true"],
            id="suspended, and not looked at yet",
        ),
        pytest.param(
            task(
                spec={"type": "vector_storage", "payload": {"fromTask": "vectors"}},
                queue={**QUEUE, "reason": "TaskUnfinished", "message": "task vectors has not ended"},
            ),
            {"needed": {"vectors": task("vectors", "Processing", progress=40)}},
            ["the task whose vectors it stores", "Task vectors that it needs is Processing (40 %)", "cancel this one"],
            id="a dependency that runs",
        ),
        pytest.param(
            task(
                spec={"type": "vector_storage", "payload": {"fromTask": "vectors"}},
                queue={**QUEUE, "reason": "TaskUnfinished"},
            ),
            {"needed": {"vectors": None}},
            ["Task vectors that it needs is not there"],
            id="a dependency that is not there",
        ),
        pytest.param(
            task(spec={"dependsOn": ["a", "b", "c"]}, queue={**QUEUE, "reason": "DependsOn", "message": "waits for b, c"}),
            {"needed": {"a": task("a", "Completed"), "b": task("b"), "c": None}},
            ["spec.dependsOn names", "Task b that it needs is Queued", "Task c that it needs is not there", "Create those"],
            id="several dependencies",
        ),
        pytest.param(
            task(spec={"notBefore": "2026-01-31T10:30:00Z"}, queue={**QUEUE, "reason": "NotBefore"}),
            {},
            ["spec.notBefore is still to come", "That is in 60m."],
            id="its time",
        ),
        pytest.param(
            task(queue={**QUEUE, "reason": "Unschedulable", "message": "0/3 nodes are available"}, job="handbook-1"),
            {"pods": [pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "3 Insufficient memory"}])]},
            [
                "no node has room",
                "0/3 nodes are available.",
                "Pod handbook-1 has no node: 3 Insufficient memory",
                "Add a node",
            ],
            id="no room",
        ),
        pytest.param(
            task(queue={**QUEUE, "reason": "ImagePullBackOff", "message": "Back-off pulling image"}, job="handbook-1"),
            {
                "pods": [pod(**waiting("ImagePullBackOff", "no such host"))],
                "events": [event("Failed", "old", minutes=90), event("Failed", "pull access denied")],
            },
            ["image cannot be pulled", "ImagePullBackOff: no such host", "Failed, pull access denied", "pull secrets"],
            id="an image that cannot be pulled",
        ),
        pytest.param(
            task(phase=None),
            {"operators": []},
            ["No operator has looked at it yet.", "There is no operator in the cluster"],
            id="no operator",
        ),
        pytest.param(
            task(phase=None),
            {"operators": [OPERATOR | {"status": {}}]},
            ["system/op-operator has no ready pod", "kubectl -n system describe pod"],
            id="an operator that is down",
        ),
        pytest.param(
            task(phase=None),
            {"operators": [OPERATOR]},
            ["knowledge is probably not one of its taskNamespaces"],
            id="a namespace that nobody looks after",
        ),
        pytest.param(task(phase=None), {}, ["ptask doctor", "taskNamespaces"], id="an operator that may not be seen"),
        pytest.param(task(phase=None, created=ago(seconds=3)), {}, ["created just now"], id="just created"),
        pytest.param(task(), {}, ["about to start"], id="next"),
        pytest.param(
            task(spec={"type": "embedding_generation", "executor": "pool"}),
            {"pools": [POOL]},
            ["WorkerPool texts has 2 of at most 4 workers ready, 2 of them busy, 14 tasks waiting."],
            id="a pool that is busy",
        ),
        pytest.param(
            task(spec={"type": "health_check", "executor": "pool"}),
            {"pools": [POOL]},
            ["No WorkerPool of the namespace serves health_check", "executor auto"],
            id="a pool that there is not",
        ),
        pytest.param(
            task(queue={**QUEUE, "reason": "SomethingNew", "message": "the moon is full"}),
            {},
            ["because of SomethingNew (SomethingNew)", "The moon is full."],
            id="a reason of a newer release",
        ),
        pytest.param(
            task(phase="Processing", stage="embed", progress=62, attempt=1, startedAt=ago(minutes=2)),
            {"pods": [pod(phase="Running")]},
            ["Processing at stage embed, 62 % of attempt 1", "began 2m ago", "nothing but its own work", "on node node-a"],
            id="one that runs",
        ),
        pytest.param(
            task(spec={"cancel": True}, phase="Processing"),
            {},
            ["It was canceled: it ends once its pod has stopped"],
            id="one that is being canceled",
        ),
        pytest.param(
            task(
                spec={"retry": {"limit": 3}},
                phase="Retrying",
                attempt=2,
                retryAt="2026-01-31T09:30:42Z",
                error={"reason": "OOMKilled", "message": "", "retryable": True},
            ),
            {},
            ["attempt 2 of 4 failed with OOMKilled", "more memory than its limit", "begins in 42s", "twice as much"],
            id="one that is tried again",
        ),
        pytest.param(
            task(
                phase="Failed",
                finishedAt=ago(hours=1),
                reason="DocumentUnreadable",
                attempt=1,
                error={
                    "reason": "DocumentUnreadable",
                    "message": "cannot read /data/broken.pdf: the PDF is damaged; export it again",
                    "retryable": False,
                    "log": "…",
                },
            ),
            {},
            ["Failed (DocumentUnreadable)", "export it again.", "ptask logs handbook", "ptask retry handbook"],
            id="one that has failed",
        ),
        pytest.param(
            task(phase="Completed", finishedAt=ago(hours=1), reason="Unchanged", message="the same bytes are published"),
            {},
            ["Completed (Unchanged)", "The same bytes are published.", "It waits for nothing."],
            id="one that is completed",
        ),
        pytest.param(
            task(phase="Canceled", finishedAt=ago(hours=1), reason="Duplicate", duplicateOf="first"),
            {},
            ["Canceled (Duplicate)", "Task first does its work"],
            id="a duplicate",
        ),
        pytest.param(
            task(spec={"deadline": "10m"}, queue={**QUEUE, "reason": "StoreUnavailable"}),
            {"unread": ["pods", "events"]},
            ["Its deadline is in 5m.", "You may not read pods and events here"],
            id="a deadline, and rights that are missing",
        ),
        pytest.param(task(spec={"deadline": "1m"}), {}, ["deadline has passed"], id="a deadline that is over"),
    ],
)
def test_one_paragraph_says_what_a_task_waits_for(manifest: dict[str, Any], known: dict[str, Any], words: list[str]) -> None:
    paragraph = said(manifest, **known)
    assert not [word for word in words if word not in paragraph], paragraph
    assert "\n" not in paragraph
    assert "None" not in paragraph
    assert ".." not in paragraph


def test_what_documents_put_into_messages_reaches_no_terminal() -> None:
    wait = {"reason": "SourceUnavailable", "message": "cannot read \x1b]0;owned\x07a.pdf\x9b2J\nnow"}
    paragraph = said(task(queue=QUEUE | wait))
    assert not [char for char in paragraph if ord(char) < 32 or 127 <= ord(char) < 160], paragraph


def test_an_event_that_the_status_tells_already_is_not_told_twice() -> None:
    wait = {"reason": "QuotaExceeded", "message": "exceeded quota: pods=2"}
    assert (
        said(task(queue=QUEUE | wait), events=[event("Failed", "exceeded quota: pods=2")]).lower().count("exceeded quota")
        == 1
    )


def test_every_reason_for_which_a_task_waits_has_a_meaning() -> None:
    """So that a reason that is new in the code is explained here as well; messages of failures say it themselves."""
    from task_operator.dispatch import Limit
    from task_operator.waits import _REMEDIES, _ROOM, _WANTED

    assert {*_WANTED, *_ROOM, *_REMEDIES, *map(str, Limit)} <= MEANINGS.keys()


def test_no_meaning_is_of_a_reason_that_does_not_exist() -> None:
    kubelet = {"ContainerCreating", "ErrImagePull", "CreateContainerConfigError", "SchedulingGated"}
    own = {"Queued", "WorkerLost"}
    known = reasons_of_the_contract() | reasons_of_the_operator() | kubelet | own
    assert MEANINGS.keys() <= known, MEANINGS.keys() - known
