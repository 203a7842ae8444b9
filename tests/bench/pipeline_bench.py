"""One document through the runner: parse, split, embed, both stores, crashes; beside it what the same work costs without us.

Real stores (the devstack's, or those that TASKS_* variables name), the packaged model, generated documents. Where wall time
counts, ours and the baseline take turns and the median of the ratios is given: other work on the machine then meets both.
"""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import devstack
from devstack.progress import DevstackError
from job_runner.document import Kind, Page, ParsedDocument
from job_runner.embed import PackagedEmbedder, batches
from job_runner.fetch import opened
from job_runner.index import Generation, Row
from job_runner.parse import ParserLimits, parse
from job_runner.split import SplitSettings, split
from task_contract.models import ProcessingTask
from tests.bench import corpus, pipeline_process, side_by_side
from tests.bench.measurement import Measurement
from tests.bench.usage import Stopwatch, Used, used_by
from tests.support.databases import fresh_database
from tests.support.runner_lab import NAMESPACE, KnowledgeBases, rows_of, run_pipeline

ROOT: Final = Path(__file__).resolve().parents[2]
NOON: Final = datetime(2026, 1, 1, 12, tzinfo=UTC)
LIMITS: Final = ParserLimits(memory_bytes=2**30, seconds=600, cpu_seconds=300, output_bytes=2**28)
ROUNDS: Final = 3
WRITE_ROUNDS: Final = 5
WRITE_ROWS: Final = 2_000
STARTS: Final = 5
KILLS: Final = 10
_PATIENCE: Final = 180.0  # seconds for one runner


def run(only: Sequence[str] = ()) -> list[Measurement]:
    """Measure everything, 5 minutes on two CPUs that carry the stores too, or some parts of it. Raises DevstackError."""
    all_parts = (_parsing, _splitting, _throughput, _writing, _starting, _repeating, _memory, _killing)
    parts = {part.__name__.strip("_"): part for part in all_parts}
    if unknown := [name for name in only if name not in {*parts, "side_by_side"}]:
        raise DevstackError(f"no part {', '.join(unknown)}: the parts are {', '.join(parts)}, side_by_side")
    with tempfile.TemporaryDirectory(prefix="pipeline-bench-") as folder, running(Path(folder)) as bench:
        measured = []
        for name, part in parts.items():
            if only and name not in only:
                continue
            print(f"    {name}: {(part.__doc__ or '').splitlines()[0]}", flush=True)
            found = part(bench)
            for one in found:
                print(f"      {one.metric}: {one.value:.3f} {one.unit}", flush=True)
            measured += found
        if only and "side_by_side" not in only:
            return measured
        print("    side by side: the same files through other libraries", flush=True)
        return measured + side_by_side.measure(bench.documents)


# ------------------------------------------------------------------------------------------------------------ the bench


class Bench:
    """Documents, tasks, and a database and knowledge bases that go with it."""

    def __init__(self, folder: Path, urls: dict[str, str], database: str) -> None:
        self.folder = folder
        self.documents = folder / "documents"
        self.documents.mkdir()
        self.counter = folder / "embedded"
        self.counter.touch()
        self.knowledge_bases = KnowledgeBases(urls)
        self.embedder = PackagedEmbedder()
        self.embedder.warm_up()
        self._urls = {**urls, "TASKS_POSTGRES_URL": database}
        self._made = 0

    def new_knowledge_base(self) -> str:
        return self.knowledge_bases.new(self.embedder.dimension)

    def settings(self) -> Any:
        from job_runner.settings import Settings

        values = {name.removeprefix("TASKS_").lower(): value for name, value in self._urls.items()}
        return Settings.model_validate({**values, "document_root": self.documents, "log_level": "warning"})

    def task(self, file: str, kb_id: str, *, uid: str | None = None, **payload: object) -> ProcessingTask:
        """Return a task; each is a second younger than the one before."""
        self._made += 1
        metadata = {
            "name": "bench",
            "namespace": NAMESPACE,
            "uid": uid or str(uuid.uuid4()),
            "creationTimestamp": (NOON + timedelta(seconds=self._made)).isoformat(),
        }
        spec = {
            "type": "document_processing",
            "kbId": kb_id,
            "timeout": "10m",
            "payload": {"filePath": file, "chunkOverlap": 0, **payload},
        }
        return ProcessingTask.model_validate({"metadata": metadata, "spec": spec})

    def command(self, task: ProcessingTask, *, attempt: int = 1) -> tuple[list[str], dict[str, str]]:
        """Return command and environment of a runner whose batches are counted."""
        path = self.folder / f"{uuid.uuid4().hex}.json"
        path.write_text(json.dumps(task.manifest()))
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'crds'}",
            **self._urls,
            "TASKS_DOCUMENT_ROOT": str(self.documents),
            "TASKS_ATTEMPT": str(attempt),
            pipeline_process.VARIABLE: str(self.counter),
        }
        return [sys.executable, "-m", "tests.bench.pipeline_process", "run", str(path)], environment

    def run(self, task: ProcessingTask, *, watch: bool = False) -> tuple[Used, dict[str, Any]]:
        """Run a runner that must succeed; return what it used and its result."""
        command, environment = self.command(task)
        used = used_by(command, environment=environment, cwd=self.folder, watch=watch)
        return used, used.answer["result"]

    @property
    def batches(self) -> list[tuple[float, int, float]]:
        """When each batch was computed, of how many texts, and the CPU seconds of its runner, over all runners so far."""
        lines = self.counter.read_text().splitlines()
        return [(float(when), int(count), float(cpu)) for when, count, cpu in (line.split() for line in lines)]

    @property
    def embedded(self) -> int:
        return sum(count for _, count, _ in self.batches)

    def stores(self, kb_id: str) -> Any:
        from job_runner.stores import opener

        return opener(self.settings(), dimension=self.embedder.dimension)(Generation(NAMESPACE, kb_id, 1))


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Bench]:
    """Yield a bench on the devstack's stores, or those of the environment, with a database of its own."""
    needed = ("TASKS_POSTGRES_URL", "TASKS_MILVUS_URL", "TASKS_ELASTICSEARCH_URL")
    if all(name in os.environ for name in needed):
        urls = {name: value for name, value in os.environ.items() if name.startswith("TASKS_")}
    else:
        urls = devstack.up(["stores"]).host_urls
    with fresh_database(urls["TASKS_POSTGRES_URL"], prefix="bench") as database:
        bench = Bench(folder, urls, database)
        try:
            yield bench
        finally:
            asyncio.run(bench.knowledge_bases.drop())


# ---------------------------------------------------------------------------------------------------- parse and split


async def _read(bench: Bench, file: str) -> ParsedDocument:
    with opened(file, root=bench.documents, max_bytes=2**30) as source:
        return await parse(source, limits=LIMITS, on_progress=lambda *_: None)


def _parsing(bench: Bench) -> list[Measurement]:
    """Parse and split a Chinese PDF of 300 pages."""
    corpus.chinese_pdf(bench.documents / "zh.pdf", pages=300)
    cpu, bare = [], []
    for _ in range(ROUNDS):
        watch = Stopwatch()
        document = asyncio.run(_read(bench, "zh.pdf"))
        chunks = list(split(document, SplitSettings()))
        cpu.append(watch.stop().cpu)
        bare.append(used_by([sys.executable, "-c", _PDFIUM, bench.documents / "zh.pdf"], cwd=bench.folder, watch=False).cpu)
    how = (
        f"median of {ROUNDS}; the child process with its start, JSON between the two, headings; {len(document.text)} "
        f"characters, {len(chunks)} chunks; baseline: a process that takes the text of all pages with pypdfium2"
    )
    return [
        Measurement(
            metric="parse and split, 300-page Chinese PDF",
            value=statistics.median(cpu),
            unit="CPU-s",
            target=1.5,
            baseline=statistics.median(bare),
            how=how,
        )
    ]


_PDFIUM: Final = (
    "import sys, pypdfium2\n"
    "pdf = pypdfium2.PdfDocument(sys.argv[1])\n"
    "for page in pdf: page.get_textpage().get_text_bounded()\n"
)


def _splitting(bench: Bench) -> list[Measurement]:
    """Split Chinese and English text, without and with counting the model's tokens."""
    texts = {"Chinese": "\n\n".join(corpus.chinese(5_000_000)), "English": "\n\n".join(corpus.english(5_000_000))}
    kinds = (
        ("without tokens", SplitSettings(), 1.0, 20.0),
        ("with tokens", SplitSettings(max_tokens=512, count_tokens=bench.embedder.count_tokens), 0.2, 2.0),
    )
    measured = []
    for name, settings, share, target in kinds:
        for language, whole in texts.items():
            text = whole[: int(len(whole) * share)]
            document = ParsedDocument(kind=Kind.TEXT, text=text, pages=(Page(1, 0),))
            watch = Stopwatch()
            count = sum(1 for _ in split(document, settings))
            rate = len(text) / 1e6 / watch.stop().cpu
            watch = Stopwatch()
            if settings.count_tokens is not None:
                for start in range(0, len(text), 1000):
                    settings.count_tokens(text[start : start + 1000])
            plain = len(text) / 1e6 / watch.stop().cpu if settings.count_tokens is not None else None
            how = f"{len(text) / 1e6:.1f} M characters in one text, {count} chunks of 1,000 with an overlap of 200"
            if plain is not None:
                how += ", at most 512 tokens of the packaged model; baseline: its tokenizer alone over windows of 1,000"
            measured.append(
                Measurement(
                    metric=f"splitter {name}, {language}",
                    value=rate,
                    unit="Mch/CPU-s",
                    target=target,
                    better="higher",
                    baseline=plain,
                    how=how,
                )
            )
    return measured


# --------------------------------------------------------------------------------------------------------- throughput


def _throughput(bench: Bench) -> list[Measurement]:
    """The whole pipeline beside a loop over the same model and the same batches."""
    kb_id = bench.new_knowledge_base()
    stores = bench.stores(kb_id)
    asyncio.run(_prepare(stores))
    ratios, ours, bare, stages = [], [], [], []
    for number in range(ROUNDS):
        file = f"throughput-{number}.md"
        corpus.markdown(bench.documents / file, corpus.chinese(450_000, seed=10 + number))
        document = asyncio.run(_read(bench, file))
        texts = [chunk.text for chunk in split(document, SplitSettings(chunk_overlap=0))]
        loop, pipeline = partial(_loop, bench, texts), partial(_pipeline, bench, file, kb_id)
        first, second = (loop, pipeline) if number % 2 else (pipeline, loop)
        results = {one: one() for one in (first, second)}
        seconds, result = results[pipeline]
        plain, _ = results[loop]
        assert result["embedded"] == len(set(texts)) == len(texts), result
        ours.append(len(texts) / seconds)
        bare.append(len(texts) / plain)
        ratios.append(plain / seconds)
        stages.append(result["seconds"])
    shown = "; ".join(" ".join(f"{name} {spent:.2f}" for name, spent in one.items()) for one in stages)
    how = (
        f"median of {ROUNDS} documents of {len(texts)} chunks, in one process with the model loaded and the knowledge base "
        f"there; from the intent to the end of publication; ours and the loop take turns; seconds of stages: {shown}"
    )
    return [
        Measurement(
            metric="pipeline beside a bare loop of the model",
            value=statistics.median(ratios) * 100,
            unit="%",
            target=90,
            better="higher",
            baseline=100,
            how=how,
        ),
        Measurement(
            metric="pipeline, texts",
            value=statistics.median(ours),
            unit="texts/s",
            better="higher",
            baseline=statistics.median(bare),
            how=how,
        ),
    ]


async def _prepare(stores: Any) -> None:
    await asyncio.gather(stores.vectors.ensure(), stores.texts.ensure())
    await stores.aclose()


def _loop(bench: Bench, texts: Sequence[str]) -> tuple[float, dict[str, Any]]:
    counts = [bench.embedder.count_tokens(text) for text in texts]
    planned = list(batches(counts, budget=bench.embedder.batch_tokens))
    began = time.monotonic()
    for batch in planned:
        bench.embedder.embed([texts[index] for index in batch])
    return time.monotonic() - began, {}


def _pipeline(bench: Bench, file: str, kb_id: str) -> tuple[float, dict[str, Any]]:
    began = time.monotonic()
    done = asyncio.run(run_pipeline(bench.task(file, kb_id), bench.settings(), bench.embedder))
    return time.monotonic() - began, done.result.manifest()


# -------------------------------------------------------------------------------------------------------------- writing


def _writing(bench: Bench) -> list[Measurement]:
    """Rows of 512 dimensions and 1,000 characters into each store alone, and the same by the client's own bulk call."""
    return asyncio.run(_write_both(bench))


async def _write_both(bench: Bench) -> list[Measurement]:
    from elasticsearch.helpers import async_bulk

    texts = [paragraph[:1000] for paragraph in _thousands(WRITE_ROWS)]
    drawn = np.random.default_rng(1).normal(size=(WRITE_ROWS, bench.embedder.dimension)).astype(np.float32)
    vectors = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    ours, theirs = bench.stores(bench.new_knowledge_base()), bench.stores(bench.new_knowledge_base())
    for stores in (ours, theirs):
        await asyncio.gather(stores.vectors.ensure(), stores.texts.ensure())

    async def milvus_ours(rows: list[Row]) -> None:
        await ours.vectors.write(rows, vectors)

    async def milvus_theirs(data: list[dict[str, Any]]) -> None:
        await asyncio.to_thread(theirs.vectors._client.upsert, theirs.vectors._name, data)

    async def elasticsearch_ours(rows: list[Row]) -> None:
        await ours.texts.write(rows)

    async def elasticsearch_theirs(data: list[dict[str, Any]]) -> None:
        await async_bulk(theirs.texts._client, data, index=theirs.texts._name)

    measured = []
    calls: tuple[tuple[str, Any, Any, str], ...] = (
        ("Milvus", milvus_ours, milvus_theirs, "one MilvusClient.upsert() of all rows"),
        ("Elasticsearch", elasticsearch_ours, elasticsearch_theirs, "helpers.async_bulk() with its defaults"),
    )
    for store, mine, other, what in calls:
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(WRITE_ROUNDS + 1):
            rows = [pipeline_row(number * WRITE_ROWS + index, text) for index, text in enumerate(texts)]
            plain = [_plain(row, store, vectors[index]) for index, row in enumerate(rows)]
            turns = [("ours", partial(mine, rows)), ("theirs", partial(other, plain))]
            for name, call in turns if number % 2 else reversed(turns):
                began = time.monotonic()
                await call()
                if number:  # the first round warms caches, connections and the JVM
                    rates[name].append(WRITE_ROWS / (time.monotonic() - began))
        ratio = statistics.median(one / two for one, two in zip(rates["ours"], rates["theirs"], strict=True))
        how = (
            f"median of {WRITE_ROUNDS} rounds of {WRITE_ROWS} new rows each, taking turns: {what}; ours "
            f"{statistics.median(rates['ours']):.0f} rows/s from our rows, theirs {statistics.median(rates['theirs']):.0f} "
            "rows/s from dictionaries made beforehand"
        )
        measured.append(
            Measurement(
                metric=f"rows into {store} beside the client's bulk call",
                value=ratio * 100,
                unit="%",
                target=85,
                better="higher",
                baseline=100,
                how=how,
            )
        )
    for stores in (ours, theirs):
        await stores.aclose()
    return measured


def _thousands(count: int) -> Iterator[str]:
    text = "".join(corpus.chinese(count * 1000))
    return (text[start : start + 1000] for start in range(0, count * 1000, 1000))


def pipeline_row(number: int, text: str) -> Row:
    """Return a row as the pipeline makes them."""
    return Row(
        **{
            **_COLUMNS,
            "id": f"{number:032x}",
            "ordinal": number,
            "text": text,
        }
    )


_COLUMNS: Final[dict[str, Any]] = {
    "document_id": "manuals/guide.md",
    "version": 1,
    "text_hash": "0" * 32,
    "page_start": 1,
    "page_end": 2,
    "heading_path": "Part 1\n第二章",
    "char_start": 0,
    "char_end": 1000,
    "language": "zh",
    "metadata": {"team": "harbour"},
    "source_sha256": "0" * 64,
    "content_hash": "0" * 64,
    "task_uid": str(uuid.UUID(int=0)),
    "chunk_count": WRITE_ROWS,
    "tokens": 700,
    "pipeline": "0" * 32,
}


def _plain(row: Row, store: str, vector: Any) -> dict[str, Any]:
    from dataclasses import asdict

    columns = asdict(row)
    if store == "Milvus":
        return {**columns, "embedding": vector}
    # Under _source: the helper takes a column named "version" for its own.
    return {"_id": columns.pop("id"), "_source": {**columns, "metadata_pairs": ["team=harbour"]}}


# ------------------------------------------------------------------------------------------------------------- starting


def _starting(bench: Bench) -> list[Measurement]:
    """From the start of the runner's process to its first vector."""
    kb_id = bench.new_knowledge_base()
    first, cpu = [], []
    for number in range(STARTS):
        (bench.documents / f"start-{number}.txt").write_text(next(corpus.chinese(100, seed=number)))
        began = time.monotonic()
        before = len(bench.batches)
        bench.run(bench.task(f"start-{number}.txt", kb_id))
        when, _, so_far = bench.batches[before]
        first.append(when - began)
        cpu.append(so_far)
    how = f"median of {STARTS} processes, each with a text of one chunk: fetched, entered in the ledger, parsed, embedded"
    return [
        Measurement(
            metric="start of the runner to the first vector",
            value=statistics.median(first),
            unit="s",
            target=2,
            how=f"{how}; all of them {', '.join(f'{one:.2f}' for one in first)} s",
        ),
        Measurement(
            metric="start of the runner to the first vector, CPU",
            value=statistics.median(cpu),
            unit="CPU-s",
            target=2,
            how=f"{how}; all threads and the parsing child: on a machine that is busy with other things this says more",
        ),
    ]


# ------------------------------------------------------------------------------------------------------------ repeating


def _repeating(bench: Bench) -> list[Measurement]:
    """A document of 200 chunks again: unchanged, and with one paragraph edited."""
    kb_id, path = bench.new_knowledge_base(), bench.documents / "edited.md"
    paragraphs = list(corpus.chinese(195_000, seed=77))
    path.write_text("\n\n".join(paragraphs))
    _, result = bench.run(bench.task(path.name, kb_id))
    chunks, before = result["chunks"], bench.embedded
    unchanged = [bench.run(bench.task(path.name, kb_id)) for _ in range(ROUNDS)]
    computed = bench.embedded - before
    parsed = sum("parse" in one["seconds"] for _, one in unchanged)
    middle = len(paragraphs) // 2
    paragraphs[middle] = paragraphs[middle].replace("，", "，明天", 1)
    path.write_text("\n\n".join(paragraphs))
    _, edited = bench.run(bench.task(path.name, kb_id))
    how = f"{chunks} chunks, {ROUNDS} runs of whole processes"
    return [
        Measurement(metric="unchanged document, embeddings", value=computed, unit="", target=0, how=how),
        Measurement(metric="unchanged document, times parsed", value=parsed, unit="", target=0, how=how),
        Measurement(
            metric="unchanged document, CPU of the whole process",
            value=statistics.median(used.cpu for used, _ in unchanged),
            unit="CPU-s",
            how=f"{how}, median",
        ),
        Measurement(
            metric="unchanged document, after start",
            value=statistics.median(sum(one["seconds"].values()) for _, one in unchanged),
            unit="s",
            target=1,
            baseline=statistics.median(used.wall for used, _ in unchanged),
            how=f"{how}: the attempt's own seconds, median; baseline: wall time of the whole process with its imports",
        ),
        Measurement(
            metric="one paragraph edited, embeddings",
            value=edited["embedded"],
            unit="",
            target=3,
            baseline=edited["chunks"],
            how=f"one word put into one paragraph in the middle of {chunks} chunks; baseline: all chunks",
        ),
    ]


# --------------------------------------------------------------------------------------------------------------- memory


def _memory(bench: Bench) -> list[Measurement]:
    """The whole runner with a Chinese PDF of 100 and of 1,000 pages."""
    kb_id = bench.new_knowledge_base()
    most = {}
    for pages in (100, 1000):
        corpus.chinese_pdf(bench.documents / f"{pages}.pdf", pages=pages, seed=pages)
        used, result = bench.run(bench.task(f"{pages}.pdf", kb_id), watch=True)
        most[pages] = used.memory
        print(f"      {pages} pages: {used.memory:.0f} MB, {result['chunks']} chunks, {used.wall:.0f} s", flush=True)
    how = (
        "one run each, from PDF to publication; sum of PSS of the runner and its parsing child, looked at 50 times a second"
    )
    return [
        Measurement(
            metric="memory, 1,000 pages beside 100",
            value=most[1000] / most[100],
            unit="times",
            target=1.3,
            baseline=1,
            how=how,
        ),
        Measurement(
            metric="memory, most, 1,000-page Chinese PDF",
            value=most[1000],
            unit="MB",
            target=400,
            baseline=most[100],
            how=how,
        ),
    ]


# -------------------------------------------------------------------------------------------------------------- killing


def _killing(bench: Bench) -> list[Measurement]:
    """Kill -9 at ten points of a document of 500 chunks, and compare with a run without faults."""
    kb_id, path = bench.new_knowledge_base(), bench.documents / "killed.md"
    corpus.markdown(path, corpus.chinese(442_000, seed=99))
    _, clean = bench.run(bench.task(path.name, kb_id, documentId="clean"))
    before, uid = bench.embedded, str(uuid.uuid4())
    task = bench.task(path.name, kb_id, uid=uid, documentId="killed")
    for attempt in range(1, KILLS + 1):
        _run_and_kill(bench, task, attempt=attempt)
    command, environment = bench.command(task, attempt=KILLS + 1)
    used = used_by(command, environment=environment, cwd=bench.folder, watch=False)
    result = used.answer["result"]
    computed = bench.embedded - before
    largest = max(count for _, count, _ in bench.batches)
    equal = asyncio.run(_equal(bench, kb_id))
    how = (
        f"{clean['chunks']} chunks; killed at the intent, when three batches had been computed (eight times) and when all "
        f"rows were stored; the next attempt goes on; a batch has up to {largest} texts; the last attempt tells "
        f"{result['chunks']} chunks, {result['milvusCount']} and {result['elasticsearchCount']} in the stores"
    )
    return [
        Measurement(
            metric=f"embeddings in all, killed {KILLS} times",
            value=computed,
            unit="texts",
            target=clean["chunks"] + KILLS * largest,
            baseline=clean["embedded"],
            how=how,
        ),
        Measurement(
            metric="rows that differ from the run without faults",
            value=equal,
            unit="rows",
            target=0,
            how=f"{how}; both stores, every column but the identities of document and task, vectors to 1e-5",
        ),
    ]


def _run_and_kill(bench: Bench, task: ProcessingTask, *, attempt: int) -> None:
    """Start a runner and kill it at the point of this attempt."""
    command, environment = bench.command(task, attempt=attempt)
    log, already = bench.folder / f"killed-{attempt}.log", len(bench.batches)
    points: dict[int, Callable[[], bool]] = {
        1: lambda: '"intent"' in log.read_text(),
        KILLS: lambda: '"stage": "store"' in log.read_text(),
    }
    reached = points.get(attempt, lambda: len(bench.batches) >= already + 3)
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment, cwd=bench.folder, stdout=subprocess.DEVNULL, stderr=out) as process,
    ):
        deadline = time.monotonic() + _PATIENCE
        while not reached():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise DevstackError(f"the runner did not reach the point of kill {attempt}:\n{log.read_text()[-2000:]}")
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)


async def _equal(bench: Bench, kb_id: str) -> int:
    """Return how many rows of either store differ between the two documents."""
    stores = bench.stores(kb_id)
    try:
        clean, killed = [await rows_of(stores, name) for name in ("clean", "killed")]
    finally:
        await stores.aclose()
    different = 0
    for one, other in zip(clean, killed, strict=True):
        pairs = list(zip(*(sorted(rows, key=lambda row: int(row["ordinal"])) for rows in (one, other)), strict=False))
        different += abs(len(one) - len(other)) + sum(not _same(left, right) for left, right in pairs)
    return different


def _same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    names = left.keys() - {"id", "document_id", "task_uid", "version", "content_hash", "embedding"}
    if left.keys() != right.keys() or any(left[name] != right[name] for name in names):
        return False
    return "embedding" not in left or bool(np.allclose(left["embedding"], right["embedding"], atol=1e-5))
