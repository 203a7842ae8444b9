"""How well a knowledge base answers questions of which it is known where the answer stands.

A question counts as answered at a rank if the row at that rank is of the right document and, where the question says it,
contains the piece of text that answers. Recall@k is the share of questions answered among the first k rows; MRR is the mean
of 1 / rank of the first row that answers, 0 where none of the k does.
"""

import asyncio
import heapq
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from job_runner.index import Hit, Row
from job_runner.search import Answers
from job_runner.watchdog import beat
from task_contract.errors import InvalidTask
from task_contract.names import digest

RANKINGS: Final = ("dense", "keyword", "fusion")
_FIELDS: Final = frozenset({"question", "documentId", "contains"})
_MOST_QUESTIONS: Final = 10_000
"""Of one file: each is a search."""
_AT_ONCE: Final = 8
"""Questions under way: Milvus lets each search wait until what was written before it can be seen, up to 0.2 s."""
_PIECE: Final = 24
"""Characters of a chunk that say that it is the one: few, so that another splitter hardly ever cuts them in two."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and what answers it."""

    question: str
    document_id: str
    contains: str | None = None
    """A piece of the text that answers; white space and case do not count."""

    def is_answered_by(self, hit: Hit) -> bool:
        """Tell whether a row answers."""
        return hit.document_id == self.document_id and (self.contains is None or _plain(self.contains) in _plain(hit.text))


@dataclass(frozen=True, slots=True)
class Quality:
    """What came of asking; by ranking: ``dense``, ``keyword``, ``fusion``."""

    questions: int
    recall: Mapping[str, float]
    """Share of questions answered among the first rows, 0 to 1."""
    mrr: Mapping[str, float]
    """Mean reciprocal rank within the same rows, 0 to 1."""
    missed: tuple[Question, ...]
    """Those that the fusion does not answer."""


def read_questions(lines: Iterable[str]) -> list[Question]:
    """Read a JSON object a line, with question, documentId and, optionally, contains; empty lines are left out.

    Raises InvalidTask, which names the line.
    """
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_read(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InvalidTask(
                f"cannot read line {number} of the questions: {error}; each line is a JSON object such as "
                '{"question": "...", "documentId": "...", "contains": "..."}'
            ) from error
        if len(questions) > _MOST_QUESTIONS:
            raise InvalidTask(f"cannot ask more than {_MOST_QUESTIONS} questions; leave out some")
    if not questions:
        raise InvalidTask("cannot ask: there are no questions in the file; write one a line")
    return questions


def _read(fields: Any) -> Question:
    if not isinstance(fields, dict):
        raise TypeError("it is no object")
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"there is no field {unknown[0]}")
    for name in ("question", "documentId"):
        if not isinstance(value := fields.get(name), str) or not value.strip():
            raise ValueError(f"{name} is missing or no text")
    contains = fields.get("contains")
    if contains is not None and (not isinstance(contains, str) or not contains.strip()):
        raise ValueError("contains is no text; leave it out where the document is enough")
    return Question(fields["question"].strip(), fields["documentId"], contains)


def questions_from_headings(rows: Iterable[Row], *, most: int = 50) -> list[Question]:
    """Make questions of the headings of published rows: each heading path is to find the first chunk below it.

    Rows of a document follow each other in the order of ordinals. Where no row has a heading the beginnings of chunks are
    the questions. A question of which two chunks would be the answer is none. The choice among many depends on the questions
    alone, not on the order of documents; it takes memory for 16 bytes a question. Without rows there are none.
    """
    headed = _Chosen(most)
    plain = _Chosen(most)
    before: tuple[str, str] | None = None
    for row in rows:
        place = row.document_id, row.heading_path
        if row.heading_path and place != before:
            titles = row.heading_path.split("\n")
            headed.add(Question(" ".join(titles), row.document_id, _below(row.text, titles)))
        elif not row.heading_path:
            beginning = " ".join(row.text.split())
            plain.add(Question(beginning[: 4 * _PIECE], row.document_id, beginning[:_PIECE]))
        before = place
    return headed.questions() or plain.questions()


def _below(text: str, titles: Sequence[str]) -> str | None:
    """Return the first words below the headings that a chunk begins with."""
    lines = (line.strip(" #*\t") for line in text.splitlines())
    body = " ".join(" ".join(line for line in lines if line and line not in titles).split())
    return body[:_PIECE] or None


class _Chosen:
    """The ``most`` questions with the lowest digests, of those that came once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: dict[bytes, bool] = {}
        """Digest of a question → whether it came again."""
        self._kept: list[tuple[int, Question]] = []

    def add(self, question: Question) -> None:
        key = bytes.fromhex(digest(question.question, length=32))
        self._seen[key] = key in self._seen
        if not self._seen[key]:
            # As many again are kept for those that turn out to come twice.
            entry = (-int.from_bytes(key), question)
            push = heapq.heappush if len(self._kept) < 4 * self._most else heapq.heappushpop
            push(self._kept, entry)

    def questions(self) -> list[Question]:
        once = [(-key, question) for key, question in self._kept if not self._seen[(-key).to_bytes(16)]]
        return [question for _, question in sorted(once, key=lambda pair: pair[0])[: self._most]]


async def evaluate(questions: Sequence[Question], ask: Callable[[str], Awaitable[Answers]], *, top_k: int = 5) -> Quality:
    """Ask every question; ``ask`` returns at least ``top_k`` rows of each ranking, where there are as many.

    Raises InvalidTask without questions: nothing can be said of a knowledge base that nobody asked.
    """
    if not questions:
        raise InvalidTask("cannot measure the answers: there are no questions; give some, or documents with text")
    found = dict.fromkeys(RANKINGS, 0)
    reciprocal = dict.fromkeys(RANKINGS, 0.0)
    missed = []

    for question, answers in zip(questions, await _asked(questions, ask), strict=True):
        for name, hits in _rankings(answers):
            rank = next((rank for rank, hit in enumerate(hits[:top_k], start=1) if question.is_answered_by(hit)), None)
            if rank is not None:
                found[name] += 1
                reciprocal[name] += 1 / rank
            elif name == "fusion":
                missed.append(question)
    total = len(questions)
    return Quality(
        questions=total,
        recall={name: count / total for name, count in found.items()},
        mrr={name: summed / total for name, summed in reciprocal.items()},
        missed=tuple(missed),
    )


async def _asked(questions: Sequence[Question], ask: Callable[[str], Awaitable[Answers]]) -> list[Answers]:
    """Return the answers in the order of their questions. The first error ends all."""
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(question: Question) -> Answers:
        async with room:
            answers = await ask(question.question)
        beat()
        return answers

    try:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(one(question)) for question in questions]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in asked]


def _rankings(answers: Answers) -> Iterator[tuple[str, Sequence[Hit]]]:
    rankings = (answers.milvus, answers.elasticsearch, [one.hit for one in answers.fused])
    yield from zip(RANKINGS, rankings, strict=True)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
