"""Whole documents on real stores: what is published, what is computed, and what is left when processes die or meet."""

import asyncio
import json
import shutil
import signal
import uuid
from email.message import EmailMessage
from typing import Any

import pytest

from job_runner.embed import PackagedEmbedder
from job_runner.ledger import Ledger
from job_runner.readers import PARSER_VERSION
from job_runner.search import search
from job_runner.split import SPLITTER_VERSION
from job_runner.stores import opener
from task_contract.errors import Fenced, ModelMismatch
from task_contract.lifecycle import ExitCode
from task_contract.messages import AttemptOutcome, Outcome
from tests.support.docx import make_docx, paragraph, part
from tests.support.pdf import PdfPage, make_pdf
from tests.support.runner_lab import NAMESPACE, ROOT, HashEmbedder, Lab, Reached, run_watched
from tests.support.workbooks import Value, make_xlsx, sheet

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

EXAMPLES = ROOT / "examples/documents"
COUNT = 100
"""Sentences, and chunks, of the test document: more than three batches."""


def sentences(count: int = COUNT, *, changed: int | None = None) -> list[str]:
    return [f"Sentence {number}{' was changed' if number == changed else ''}" for number in range(count)]


def counts(outcome: AttemptOutcome) -> tuple[int | None, int | None, int | None]:
    """Return (chunks, embedded, reused)."""
    assert outcome.result is not None, outcome
    return outcome.result.chunks, outcome.result.embedded, outcome.result.reused


# ---------------------------------------------------------------------------------------------------- documents, whole


async def test_real_documents_are_found_by_meaning_and_by_words(lab: Lab) -> None:
    embedder = lab.embedder = PackagedEmbedder()
    lab.take_own_knowledge_base()
    questions = json.loads((EXAMPLES / "questions.json").read_text())
    for name in dict.fromkeys(case["document"] for case in questions):
        shutil.copy(EXAMPLES / name, lab.documents)
        task = lab.task(f"/data/{name}", documentId=name, chunkSize=1000, chunkOverlap=200, metadata={"team": "知识库"})
        outcome, code = await lab.run(task)
        assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Completed"), outcome
        assert outcome.result is not None
        assert outcome.result.chunks == outcome.result.milvus_count == outcome.result.elasticsearch_count
        assert outcome.result.pages == (10 if name.endswith("pdf") else None)
        assert set(outcome.result.seconds or ()) == {"fetch", "parse", "split", "embed", "store", "verify", "publish"}
    settings = lab.settings()
    ledger = Ledger(settings.postgres_url.get_secret_value())
    for case in questions:
        answers = await search(
            case["question"],
            namespace=NAMESPACE,
            kb_id=lab.kb_id,
            top_k=3,
            ledger=ledger,
            embedder=embedder,
            open_stores=opener(settings, dimension=embedder.dimension),
        )
        by_words = [] if case["question"].isascii() == (".zh." in case["document"]) else [answers.elasticsearch]
        for hits in [answers.milvus, *by_words]:
            [best, *_] = [hit for hit in hits if case["answer"] in hit.text] or pytest.fail(f"{case}: {hits}")
            assert best.document_id == lab.document_id(case["document"])
            assert case["heading"] in best.text or case["heading"] in best.heading_path
            if case["page"]:
                assert best.page_start <= case["page"] <= best.page_end
            else:
                assert best.page_start == 0
    await ledger.aclose()


async def test_both_stores_hold_the_same_rows(lab: Lab) -> None:
    (lab.documents / "a.md").write_text("# 一\n\n第一段。\n\n# 二\n\n第二段有更多的字。\n" * 10)
    outcome, _ = await lab.run(lab.task("a.md", metadata={"k": "v"}))
    in_vectors, in_texts = await lab.contents("a.md")
    assert in_vectors == in_texts
    assert len(in_vectors) == counts(outcome)[0]
    text = (lab.documents / "a.md").read_text()
    assert all(row["text"] == text[row["char_start"] : row["char_end"]] for row in in_vectors)
    assert {row["language"] for row in in_vectors} == {"zh"}
    assert {row["metadata"]["k"] for row in in_vectors} == {"v"}
    assert {row["heading_path"] for row in in_vectors} <= {"一", "二"}
    assert {row["chunk_count"] for row in in_vectors} == {len(in_vectors)}
    assert all(row["tokens"] == lab.embedder.count_tokens(row["text"]) > 0 for row in in_vectors)
    made_by = f"parser {PARSER_VERSION}, splitter {SPLITTER_VERSION} intelligent_split 100/0, model hash-1"
    assert {row["pipeline"] for row in in_vectors} == {made_by}


async def test_what_an_attempt_used_is_entered_however_it_ended(lab: Lab) -> None:
    (lab.documents / "a.md").write_text("# One\n\nA first paragraph.\n\n# Two\n\nA second one with more words.\n" * 10)
    outcome, _ = await lab.run(task := lab.task("a.md"))
    failed, _ = await lab.run(other := lab.task("missing.md"))
    assert (outcome.outcome, failed.outcome) == (Outcome.SUCCEEDED, Outcome.FAILED)
    assert outcome.result is not None
    used = json.loads(
        await lab.fetch("SELECT to_json(u) FROM task_usage u WHERE task_uid = $1", uuid.UUID(task.metadata.uid))
    )
    assert (used["kb_id"], used["type"], used["outcome"]) == (lab.kb_id, "document_processing", "Succeeded")
    assert used["texts"] == outcome.result.embedded
    assert used["tokens"] >= used["texts"] > 0
    assert used["cpu_seconds"] > 0
    assert used["memory_peak_bytes"] > 30 << 20
    assert used["memory_byte_seconds"] > 0
    assert set(used["stages"]) == set(outcome.result.seconds or {})
    assert {store: number > 0 for store, (number, _) in used["stores"].items()} == dict.fromkeys(
        ("postgresql", "milvus", "elasticsearch"), True
    )
    used = json.loads(
        await lab.fetch("SELECT to_json(c) FROM task_costs c WHERE task_uid = $1", uuid.UUID(other.metadata.uid))
    )
    assert (used["attempts"], used["processes"], used["texts"]) == (1, 1, 0)


async def test_without_its_table_an_attempt_goes_on_without_accounts(lab: Lab) -> None:
    """A pod of this release before the tables are migrated."""
    (lab.documents / "a.md").write_text("One paragraph.\n")
    await lab.fetch("ALTER TABLE task_usage RENAME TO task_usage_away")
    try:
        outcome, code = await lab.run(task := lab.task("a.md"))
    finally:
        await lab.fetch("ALTER TABLE task_usage_away RENAME TO task_usage")
    assert (outcome.outcome, code) == (Outcome.SUCCEEDED, 0)
    assert await lab.fetch("SELECT count(*) FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid)) == 1


async def test_a_bad_page_is_recorded_and_the_rest_is_published(lab: Lab) -> None:
    pages = [PdfPage([(11, "First page.")]), PdfPage(damaged=True), PdfPage([(11, "Third page.")])]
    (lab.documents / "a.pdf").write_bytes(make_pdf(pages))
    outcome, _ = await lab.run(lab.task("a.pdf"))
    assert outcome.result is not None
    assert (outcome.result.pages, outcome.result.failed_pages) == (3, 1)
    assert (outcome.result.failed_page_numbers, outcome.result.language) == ([2], "en")
    assert outcome.result.chunks


async def test_a_mail_reaches_both_stores_with_the_pages_of_its_attachments(lab: Lab) -> None:
    mail = EmailMessage()
    mail["Subject"] = "潮位站的报告"
    mail.set_content("报告在附件里。")
    pages = [PdfPage([(11, "First page of the report.")]), PdfPage([(11, "Second page of the report.")])]
    mail.add_attachment(make_pdf(pages), maintype="application", subtype="pdf", filename="报告.pdf")
    mail.add_attachment(b"%PDF-1.7 nothing", maintype="application", subtype="pdf", filename="broken.pdf")
    (lab.documents / "a.eml").write_bytes(mail.as_bytes())
    outcome, _ = await lab.run(lab.task("a.eml", chunkSize=100, chunkOverlap=0))
    assert outcome.result is not None
    assert (outcome.result.pages, outcome.result.failed_page_numbers) == (4, [4])
    in_vectors, in_texts = await lab.contents("a.eml")
    assert in_vectors == in_texts
    [row] = [row for row in in_vectors if "Second page" in row["text"]]
    assert row["heading_path"].split("\n") == ["潮位站的报告", "Attachment: 报告.pdf"]
    assert row["page_end"] == 3


async def test_semantic_mode_publishes_as_the_others_do(lab: Lab) -> None:
    (lab.documents / "a.txt").write_text("".join(f"第{number}句话讲的是第{number // 9}件事。" for number in range(90)))
    task = lab.task("a.txt", chunkSize=200, chunkOverlap=20, processingMode="semantic")
    outcome, _ = await lab.run(task)
    assert outcome.result is not None
    assert counts(outcome)[0] == outcome.result.embedded == outcome.result.chunks
    in_vectors, in_texts = await lab.contents("a.txt")
    assert in_vectors == in_texts
    assert all("splitter 1 semantic 200/20" in row["pipeline"] for row in in_vectors)
    again, _ = await lab.run(lab.task("a.txt", chunkSize=200, chunkOverlap=20, processingMode="semantic"))
    assert again.reason == "Unchanged"
    assert again.result is not None
    assert again.result.language == outcome.result.language == "zh"  # without reading it again


async def test_pages_and_headings_of_a_word_document_reach_both_stores(lab: Lab) -> None:
    turn = "<w:p><w:r><w:lastRenderedPageBreak/><w:t>{}</w:t></w:r></w:p>"
    body = "".join(
        paragraph(f"第{number}章", style="1") + turn.format(f"第{number}章的正文，字数足够成为一个片段。" * 12)
        for number in "一二三"
    )
    (lab.documents / "a.docx").write_bytes(make_docx(body))
    outcome, _ = await lab.run(lab.task("a.docx", chunkSize=300, chunkOverlap=0))
    assert outcome.result is not None
    assert (outcome.result.pages, outcome.result.failed_pages) == (4, 0)
    in_vectors, in_texts = await lab.contents("a.docx")
    assert in_vectors == in_texts
    places = {row["heading_path"]: (row["page_start"], row["page_end"]) for row in in_vectors}
    assert places == {"第一章": (1, 2), "第二章": (2, 3), "第三章": (3, 4)}


async def test_sheets_that_can_be_read_reach_both_stores(lab: Lab) -> None:
    levels: list[list[Value]] = [[f"Dock {row}", row, row * 3] for row in range(1, 20)]
    tides = sheet(["Site", "Tank", "Level"], *levels)
    sheets = {"Tides": tides, "Bad": "<worksheet><sheetData><row", "Hidden": sheet(["x"]), "Notes": sheet(["Oil it."])}
    (lab.documents / "a.xlsx").write_bytes(make_xlsx(sheets, hidden=["Hidden"]))
    outcome, _ = await lab.run(lab.task("a.xlsx", chunkSize=200, chunkOverlap=0))
    assert outcome.result is not None
    assert (outcome.result.pages, outcome.result.failed_pages) == (3, 1)
    in_vectors, in_texts = await lab.contents("a.xlsx")
    assert in_vectors == in_texts
    places = {(row["heading_path"], row["page_start"], row["page_end"]) for row in in_vectors}
    assert places == {("Tides", 1, 1), ("Notes", 4, 4)}
    rows = [line for row in in_vectors for line in row["text"].split("\n") if line.startswith("| Site: ")]
    assert len(rows) == 19
    assert all(" | Tank: " in line and " | Level: " in line for line in rows)


# ------------------------------------------------------------------------------------------------------------- updates


async def test_an_update_replaces_and_computes_only_what_is_new(lab: Lab) -> None:
    lab.write(sentences())
    assert counts((await lab.run(lab.task(at=0)))[0]) == (COUNT, COUNT, 0)
    lab.write(sentences(changed=40))
    outcome, _ = await lab.run(lab.task(at=1))
    assert counts(outcome) == (COUNT, 1, COUNT - 1)
    assert await lab.versions() == {2: (COUNT, COUNT)}
    assert await lab.published() == 2
    assert lab.embedded == COUNT + 1
    lab.write(sentences())  # and back
    assert counts((await lab.run(lab.task(at=2)))[0]) == (COUNT, 1, COUNT - 1)
    assert await lab.versions() == {3: (COUNT, COUNT)}


async def test_unchanged_content_costs_nothing(lab: Lab) -> None:
    lab.write(sentences())
    await lab.run(lab.task(at=0))
    outcome, code = await lab.run(lab.task(at=1))
    assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Unchanged")
    assert counts(outcome) == (COUNT, 0, COUNT)
    assert outcome.result is not None
    assert outcome.result.version == 1
    assert "parse" not in (outcome.result.seconds or {})


@pytest.mark.parametrize("change", [{"chunkSize": 150}, {"metadata": {"a": "b"}}, {"processingMode": "fixed"}])
async def test_other_settings_are_another_content(lab: Lab, change: dict[str, Any]) -> None:
    lab.write(sentences(5))
    await lab.run(lab.task(at=0))
    assert (await lab.run(lab.task(at=1, **change)))[0].reason == "Completed"
    assert await lab.published() == 2


@pytest.mark.parametrize("store", ["vectors", "texts"])
async def test_unchanged_content_is_written_again_where_a_store_has_lost_it(lab: Lab, store: str) -> None:
    lab.write(sentences(10))
    await lab.run(lab.task(at=0))
    lost: Any = getattr(lab.stores, store)
    await lost.ensure()
    await lost.delete(list(await lost.stored(lab.document_id("a.txt"), 1))[:3])
    outcome, _ = await lab.run(lab.task(at=1))
    assert outcome.reason == "Completed"
    assert counts(outcome) == (10, 3 if store == "vectors" else 0, 7 if store == "vectors" else 10)
    assert await lab.versions() == {2: (10, 10)}


async def test_an_older_task_that_comes_last_changes_nothing(lab: Lab) -> None:
    lab.write(sentences(5))
    await lab.run(lab.task(at=10))
    lab.write(sentences(6))
    outcome, code = await lab.run(lab.task(at=5))
    assert (code, outcome.reason) == (ExitCode.SUCCEEDED, "Superseded")
    assert await lab.versions() == {1: (5, 5)}
    assert await lab.published() == 1


# -------------------------------------------------------------------------------------------------------- competition


async def test_of_two_pods_of_one_attempt_one_commits(lab: Lab) -> None:
    lab.write(sentences())
    task = lab.task()
    slow = HashEmbedder(seconds=0.2)
    ended = await asyncio.gather(lab.run(task, embedder=slow), lab.run(task, embedder=slow))
    assert sorted(outcome.outcome for outcome, _ in ended) == [Outcome.FENCED, Outcome.SUCCEEDED]
    assert sorted(code for _, code in ended) == [ExitCode.SUCCEEDED, ExitCode.FENCED]
    assert await lab.versions() == {1: (COUNT, COUNT)}
    recorded = await lab.fetch(
        "SELECT outcome->>'outcome' FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid)
    )
    assert recorded == "Succeeded"


@pytest.mark.parametrize("point", ["ledger.begin 1 before", "vectors.write 1 after", "ledger.commit 1 before"])
async def test_a_fence_that_is_raised_before_the_commit_stops_it(lab: Lab, point: str) -> None:
    lab.write(sentences(40))
    task = lab.task()

    async def raise_fence() -> None:
        await lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", uuid.UUID(task.metadata.uid))

    with pytest.raises(Fenced):
        await run_watched(task, lab.settings(), lab.embedder, Reached(point, raise_fence))
    assert await lab.published() is None
    outcome, code = await lab.run(task, attempt=2)
    assert (outcome.outcome, code) == (Outcome.FENCED, ExitCode.FENCED)


async def test_a_fence_that_comes_after_the_commit_is_late(lab: Lab) -> None:
    lab.write(sentences(5))
    task = lab.task()

    async def raise_fence() -> None:
        await lab.fetch("INSERT INTO task_fences (task_uid, reason) VALUES ($1, 'Canceled')", uuid.UUID(task.metadata.uid))

    done = await run_watched(task, lab.settings(), lab.embedder, Reached("ledger.commit 1 after", raise_fence))
    assert done.reason == "Completed"
    assert await lab.published() == 1


@pytest.mark.parametrize("point", ["vectors.write 1 after", "texts.stored 1 after", "ledger.commit 1 before"])
async def test_a_newer_task_that_is_overtaken_still_wins(lab: Lab, point: str) -> None:
    """The older task begins later, publishes first, and removes the rows of the newer one, which has the lower number."""
    lab.write(sentences(40), "new.txt")
    lab.write(sentences(30), "old.txt")

    async def overtake() -> None:
        outcome, _ = await lab.run(lab.task("old.txt", at=5, documentId="a.txt"))
        assert outcome.reason == "Completed"

    task = lab.task("new.txt", at=10, documentId="a.txt")
    done = await run_watched(task, lab.settings(verify_seconds=5), lab.embedder, Reached(point, overtake))
    assert done.reason == "Completed"
    assert await lab.versions() == {3: (40, 40)}
    assert await lab.published() == 3


@pytest.mark.parametrize("point", ["vectors.write 1 after", "texts.stored 1 after", "ledger.commit 1 before"])
async def test_an_older_task_that_is_overtaken_is_superseded(lab: Lab, point: str) -> None:
    lab.write(sentences(40), "new.txt")
    lab.write(sentences(30), "old.txt")

    async def overtake() -> None:
        outcome, _ = await lab.run(lab.task("new.txt", at=10, documentId="a.txt"))
        assert outcome.reason == "Completed"

    task = lab.task("old.txt", at=5, documentId="a.txt")
    done = await run_watched(task, lab.settings(verify_seconds=5), lab.embedder, Reached(point, overtake))
    assert done.reason == "Superseded"
    assert (await lab.versions())[2] == (40, 40)
    assert await lab.published() == 2


async def test_eight_tasks_on_one_knowledge_base_and_two_on_one_document(lab: Lab) -> None:
    for number in range(4):
        lab.write(sentences(20 + number), f"{number}.txt")
    tasks = [lab.task(f"{number}.txt", at=at, documentId=f"d{number}") for number in range(4) for at in (0, 1)]
    ended = await asyncio.gather(*(lab.run(task) for task in tasks))
    assert all(code is ExitCode.SUCCEEDED for _, code in ended), ended
    for number in range(4):
        published = await lab.published(f"d{number}")
        versions = await lab.versions(f"d{number}")
        assert versions[published or 0] == (20 + number, 20 + number)


# --------------------------------------------------------------------------------------------------------- ends of all


async def test_a_stop_hands_the_attempt_back_and_the_next_one_goes_on(lab: Lab) -> None:
    lab.embedder = PackagedEmbedder()
    (lab.documents / "a.txt").write_text(
        "".join(f"这是第{number}句，讲的是知识库的备份与恢复办法。" for number in range(6000))
    )
    task = lab.task(chunkSize=300)
    process = lab.command("job_runner", "run", lab.task_file(task))
    await lab.stores.vectors.ensure()
    async with asyncio.timeout(60):
        while len(await lab.stores.vectors.stored(lab.document_id("a.txt"), 1)) < 64:
            assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, errors = await asyncio.to_thread(process.communicate, timeout=5)
    assert process.returncode == ExitCode.HANDED_BACK, errors
    assert AttemptOutcome.parse(output).reason == "HandedBack"  # type: ignore[union-attr]  # None fails the test
    assert await lab.published() is None
    outcome, _ = await lab.run(task)
    assert (counts(outcome)[2] or 0) >= 64


@pytest.mark.parametrize("point", ["ledger.commit 1 before", "ledger.commit 1 after", "vectors.remove 1 after"])
async def test_what_is_being_published_is_not_interrupted(lab: Lab, point: str) -> None:
    lab.write(sentences(5))
    work: asyncio.Task[Any]

    async def cancel() -> None:
        for _ in range(3):  # a stop, a timeout, and once more
            work.cancel()
            await asyncio.sleep(0)

    work = asyncio.create_task(run_watched(lab.task(), lab.settings(), lab.embedder, Reached(point, cancel)))
    assert (await work).reason == "Completed"
    assert await lab.versions() == {1: (5, 5)}
    assert await lab.published() == 1


@pytest.mark.parametrize("point", ["ledger.begin 1 after", "vectors.write 1 before", "texts.stored 1 after"])
async def test_before_that_it_is_interrupted_at_once(lab: Lab, point: str) -> None:
    lab.write(sentences(40))
    work: asyncio.Task[Any]

    async def cancel() -> None:
        work.cancel()

    work = asyncio.create_task(run_watched(lab.task(), lab.settings(), lab.embedder, Reached(point, cancel)))
    with pytest.raises(asyncio.CancelledError):
        await work
    assert await lab.published() is None


async def test_an_attempt_ends_at_its_timeout(lab: Lab) -> None:
    lab.write(sentences(1000))
    outcome, code = await lab.run(lab.task(timeout="2s"), embedder=HashEmbedder(seconds=0.5))
    assert (code, outcome.reason) == (ExitCode.RETRYABLE, "Timeout")
    assert outcome.error is not None
    assert "cannot finish within 2s" in outcome.error.message


@pytest.mark.parametrize("variable", ["TASKS_POSTGRES_URL", "TASKS_MILVUS_URL", "TASKS_ELASTICSEARCH_URL"])
async def test_a_store_that_is_down_gives_the_attempt_back(lab: Lab, variable: str) -> None:
    lab.embedder = PackagedEmbedder()
    lab.write(sentences(3))
    down = {"TASKS_POSTGRES_URL": "postgresql://nobody@127.0.0.1:9/none"}.get(variable, "http://127.0.0.1:9")
    process = lab.command("job_runner", "run", lab.task_file(lab.task()), environment={variable: down})
    output, errors = await asyncio.to_thread(process.communicate, timeout=60)
    assert process.returncode == ExitCode.STORE_UNAVAILABLE, errors
    outcome = AttemptOutcome.parse(output)
    assert outcome is not None
    assert (outcome.outcome, outcome.reason) == (Outcome.GIVEN_BACK, "StoreUnavailable")
    assert outcome.error is not None
    assert f"check {variable}" in outcome.error.message


async def test_a_broken_pdf_fails_at_once_and_says_why(lab: Lab) -> None:
    lab.embedder = PackagedEmbedder()
    shutil.copy(EXAMPLES / "broken.pdf", lab.documents)
    task = lab.task("broken.pdf")
    process = lab.command("job_runner", "run", lab.task_file(task))
    output, errors = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode == ExitCode.PERMANENT, errors
    outcome = AttemptOutcome.parse(output)
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.reason, outcome.error.stage, outcome.error.retryable) == ("DocumentUnreadable", "parse", False)
    # The kubelet and the operator's fall-back say the same.
    assert AttemptOutcome.parse((lab.folder / "termination-log").read_text()) == outcome
    row = await lab.fetch("SELECT outcome FROM task_results WHERE task_uid = $1", uuid.UUID(task.metadata.uid))
    assert AttemptOutcome.parse(row) == outcome


@pytest.mark.parametrize(
    ("name", "data", "stage", "reason", "message"),
    [
        ("a.docx", make_docx(paragraph("word " * 99))[:-300], "fetch", "DocumentUnreadable", "is damaged or cut short"),
        (
            "a.docx",
            make_docx(parts={"word/document.xml": "<!DOCTYPE x [<!ENTITY a 'b'>]><x/>"}),
            "parse",
            "DocumentRefused",
            "entities",
        ),
        (
            "a.docx",
            make_docx(parts={"word/document.xml": part(" " * (20 << 20))}),
            "parse",
            "DocumentRefused",
            "as zip bombs do",
        ),
        ("a.html", b"<html>" + b"<div>" * 100_000, "parse", "DocumentRefused", "open in one another"),
        ("a.html", b"<html><script>fill()</script>", "parse", "DocumentEmpty", "the page shows no text"),
    ],
)
async def test_hostile_files_fail_at_once_and_say_why(
    lab: Lab, name: str, data: bytes, stage: str, reason: str, message: str
) -> None:
    (lab.documents / name).write_bytes(data)
    outcome, code = await lab.run(lab.task(name))
    assert (code, outcome.reason) == (ExitCode.PERMANENT, reason)
    assert outcome.error is not None
    assert (outcome.error.stage, outcome.error.retryable) == (stage, False)
    assert message in outcome.error.message


@pytest.mark.parametrize(
    ("payload", "reason", "message"),
    [
        ({"filePath": "missing.txt"}, "DocumentNotFound", "cannot find missing.txt"),
        ({"filePath": "../a.txt"}, "DocumentRefused", "not below the document volume"),
        ({"embeddingModel": "other"}, "InvalidTask", "cannot embed with 'other'"),
        ({"chunkSize": 100, "chunkOverlap": 100}, "InvalidTask", "overlap must be"),
        ({"metadata": {"k": "\x00" * 1000} | {str(n): "\x01" * 1000 for n in range(12)}}, "InvalidTask", "payload.metadata"),
    ],
)
async def test_tasks_that_cannot_succeed_say_why(lab: Lab, payload: dict[str, Any], reason: str, message: str) -> None:
    lab.write(sentences(3))
    task = lab.task(**{"file": payload.pop("filePath", "a.txt"), **payload})
    outcome, code = await lab.run(task)
    assert (code, outcome.reason) == (ExitCode.PERMANENT, reason)
    assert outcome.error is not None
    assert message in outcome.error.message


async def test_too_many_chunks_are_refused_before_any_work(lab: Lab) -> None:
    lab.write(sentences(20))
    outcome, code = await lab.run(lab.task(), max_chunks=10)
    assert (code, outcome.reason) == (ExitCode.PERMANENT, "DocumentRefused")
    assert lab.embedded == 0


async def everything(lab: Lab) -> dict[str, Any]:
    """Return what the stores and the ledger hold of the knowledge base, whole, but for results of attempts."""
    scans = {
        "Milvus": {row async for page in lab.stores.vectors.scan() for row in page},
        "Elasticsearch": {row async for page in lab.stores.texts.scan() for row in page},
    }
    tables = ("knowledge_bases", "generations", "documents", "document_versions")
    row = "SELECT coalesce(json_agg(one ORDER BY one::text), '[]')::text FROM {} AS one WHERE (namespace, kb_id) = ($1, $2)"
    return scans | {one: await lab.fetch(row.format(one), NAMESPACE, lab.kb_id) for one in tables}


async def test_a_knowledge_base_of_another_model_is_refused_and_stays_as_it_is(lab: Lab) -> None:
    """Filled with the packaged model, opened with others, by a new and by a known document, and by a question."""
    lab.embedder = PackagedEmbedder()
    lab.take_own_knowledge_base()
    lab.write(sentences(3))
    assert (await lab.run(lab.task(at=0)))[0].reason == "Completed"
    before = await everything(lab)
    assert len(before["Milvus"]) == len(before["Elasticsearch"]) == 3
    lab.write(sentences(4))
    for dimension in (lab.embedder.dimension, 16):
        other = HashEmbedder(lab.counter)
        other.dimension = dimension
        for document in ("a.txt", "b.txt"):
            outcome, code = await lab.run(lab.task(at=1, documentId=document), embedder=other)
            assert (code, outcome.reason) == (ExitCode.PERMANENT, "ModelMismatch")
            assert outcome.error is not None
            assert outcome.error.message == (
                f"cannot add to knowledge base {lab.kb_id}: it was filled with model {lab.embedder.fingerprint} "
                f"({lab.embedder.dimension} dimensions), the runner has hash-1 ({dimension}); "
                "use the first model, or another knowledge base"
            )
        ledger = Ledger(lab.environment["TASKS_POSTGRES_URL"])
        opening = opener(lab.settings(), dimension=dimension)
        with pytest.raises(ModelMismatch, match=rf"cannot search {lab.kb_id}: .* model usem3-.*set TASKS_EMB"):
            await search(
                "x", namespace=NAMESPACE, kb_id=lab.kb_id, top_k=1, ledger=ledger, embedder=other, open_stores=opening
            )
        await ledger.aclose()
    assert await everything(lab) == before
    assert lab.embedded == 0, "and nothing was computed"
    assert (await lab.run(lab.task(at=2)))[0].reason == "Completed", "with its own model it goes on"


# -------------------------------------------------------------------------------------------- without a cluster, by hand


async def test_the_command_line_from_a_file_to_an_answer(lab: Lab) -> None:
    lab.embedder = PackagedEmbedder()
    lab.take_own_knowledge_base()
    shutil.copy(EXAMPLES / "operations-guide.zh.md", lab.documents)
    manifest = lab.folder / "task.yaml"
    manifest.write_text(f"""
apiVersion: tasks.zzdsj.io/v1
kind: ProcessingTask
metadata: {{name: guide, namespace: {NAMESPACE}}}
spec:
  type: document_processing
  kbId: {lab.kb_id}
  payload: {{filePath: operations-guide.zh.md}}
""")

    async def call(*arguments: str) -> tuple[int, str, str]:
        process = lab.command("job_runner", *arguments)
        output, errors = await asyncio.to_thread(process.communicate, timeout=60)
        return process.returncode, output, errors

    code, output, errors = await call("run", str(manifest))
    assert code == 0, errors
    assert all(json.loads(line) for line in errors.splitlines()), "logs are JSON"
    lab.environment["PYTHONPROFILEIMPORTTIME"] = "1"  # has each import told on standard error
    code, output, errors = await call("run", str(manifest))
    del lab.environment["PYTHONPROFILEIMPORTTIME"]
    assert json.loads(output)["reason"] == "Unchanged"
    imported = {line.rpartition("|")[2].strip() for line in errors.splitlines() if line.startswith("import time:")}
    assert {"pymilvus", "elasticsearch"} <= imported
    assert not {"pandas", "job_runner.readers.text"} & imported, "what an unchanged document does not need"
    where = ("--namespace", NAMESPACE, "--kb-id", lab.kb_id, "--query", "柴油发电机多久启动", "--top-k", "1")
    code, output, errors = await call("search", "--json", *where)
    assert code == 0, errors
    hits = [json.loads(line) for line in output.splitlines()]
    assert [hit["store"] for hit in hits] == ["milvus", "elasticsearch"]
    for hit in hits:
        assert (hit["documentId"], hit["version"], hit["pageStart"]) == ("operations-guide.zh.md", 1, None)
        assert "七、应急处理" in " ".join(hit["headingPath"]) or hit["headingPath"]
        assert "九十秒" in hit["text"]
    code, output, errors = await call("search", "--json", "--mode", "hybrid", "--explain", *where)
    assert code == 0, errors
    [fused] = [json.loads(line) for line in output.splitlines()]
    assert (fused["store"], fused["score"], fused["text"]) == ("fusion", round(2 / 61, 4), hits[0]["text"])
    assert (fused["milvus"]["rank"], fused["elasticsearch"]["rank"]) == (1, 1)
    filters = (
        "--mode",
        "keyword",
        "--language",
        "zh",
        "--heading",
        "知识库平台运维手册 > 七、应急处理",
        "--metadata",
        "team=none",
    )
    code, output, errors = await call("search", *filters, *where)
    assert (code, output) == (0, "Elasticsearch, by words: nothing found\n"), errors
    questions = lab.folder / "questions.jsonl"
    questions.write_text(
        '{"question": "柴油发电机多久启动", "documentId": "operations-guide.zh.md", "contains": "九十秒"}\n'
    )
    asked = ("--namespace", NAMESPACE, "--kb-id", lab.kb_id, "--questions", str(questions))
    code, output, errors = await call("quality", *asked)
    assert (code, output.splitlines()[2:]) == (
        0,
        ["dense           1.000    1.000", "keyword         1.000    1.000", "fusion          1.000    1.000"],
    ), errors
    code, output, _ = await call("search", *where)
    assert "Milvus, by meaning" in output
    assert "operations-guide.zh.md (version 1)" in output
    assert await call("search", "--kb-id", "nothing", "--query", "x") == (
        65,
        "",
        "cannot search nothing: namespace default has no such knowledge base; check both names\n",
    )
    code, output, _ = await call("health")
    assert code == 0
    assert output.count("healthy") >= 5
