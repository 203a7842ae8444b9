"""One ranking of two, and how well a ranking answers."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_runner.index import Hit, Row
from job_runner.quality import Question, evaluate, questions_from_headings, read_questions
from job_runner.search import Answers, Place, fuse
from task_contract.errors import InvalidTask, StoreUnavailable


def hit(key: str, *, score: float = 1, document_id: str = "a", text: str = "") -> Hit:
    return Hit(
        score=score,
        id=key,
        document_id=document_id,
        version=1,
        ordinal=0,
        text=text,
        page_start=0,
        page_end=0,
        heading_path="",
    )


def ids(keys: Sequence[str]) -> list[Hit]:
    return [hit(key) for key in keys]


# -------------------------------------------------------------------------------------------------------------- fusion


@pytest.mark.parametrize(
    ("milvus", "elasticsearch", "fused"),
    [
        pytest.param("", "", "", id="nothing found"),
        pytest.param("abc", "", "abc", id="one store alone keeps its order"),
        pytest.param("", "cba", "cba", id="the other one too"),
        pytest.param("abc", "cba", "acb", id="first and third beat two second places by a hair"),
        pytest.param("axb", "cxd", "xacbd", id="what both have comes before what one has first"),
        pytest.param("ba", "ab", "ba", id="of equal scores the better one by meaning is first"),
    ],
)
def test_fusion(milvus: str, elasticsearch: str, fused: str) -> None:
    assert "".join(one.hit.id for one in fuse(ids(milvus), ids(elasticsearch))) == fused


def test_fusion_tells_where_a_row_comes_from() -> None:
    found = {one.hit.id: one for one in fuse([hit("x", score=0.8), hit("y", score=0.7)], [hit("y", score=12)])}
    assert (found["y"].milvus, found["y"].elasticsearch) == (Place(2, 0.7), Place(1, 12))
    assert (found["x"].milvus, found["x"].elasticsearch) == (Place(1, 0.8), None)
    assert found["y"].hit.score == pytest.approx(1 / 62 + 1 / 61)


RANKING = st.lists(st.sampled_from("abcdefghijklmnop"), unique=True).map(ids)


@given(RANKING, RANKING)
def test_fusion_keeps_what_there_is_and_prefers_what_stands_higher_in_both(left: list[Hit], right: list[Hit]) -> None:
    fused = fuse(left, right)
    order = [one.hit.id for one in fused]
    assert sorted(order) == sorted({one.id for one in (*left, *right)}), "each row once, none lost, none made up"
    scores = [one.hit.score for one in fused]
    assert scores == pytest.approx([one.hit.score for one in fuse(right, left)]), "no store counts more than the other"
    places = {one.hit.id: (one.milvus, one.elasticsearch) for one in fused}

    def rank(place: Place | None) -> float:
        return float("inf") if place is None else place.rank

    for better in order:
        for worse in order:
            pairs = list(zip(places[better], places[worse], strict=True))
            if better != worse and all(rank(one) <= rank(other) for one, other in pairs) and places[better] != places[worse]:
                assert order.index(better) < order.index(worse)


# ----------------------------------------------------------------------------------------------------------- questions


def test_questions_of_a_file() -> None:
    lines = [
        '{"question": " who? ", "documentId": "a.md"}',
        "",
        '{"question": "何时", "documentId": "b", "contains": "三点"}',
    ]
    assert read_questions(lines) == [Question("who?", "a.md"), Question("何时", "b", "三点")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "Expecting property name"),
        ("[]", "it is no object"),
        ('{"documentId": "a"}', "question is missing"),
        ('{"question": " ", "documentId": "a"}', "question is missing"),
        ('{"question": "q", "documentId": 7}', "documentId is missing or no text"),
        ('{"question": "q", "documentId": "a", "contains": ""}', "contains is no text"),
        ('{"question": "q", "documentId": "a", "answer": ""}', "there is no field answer"),
    ],
)
def test_a_bad_question_is_named_by_its_line(line: str, problem: str) -> None:
    with pytest.raises(InvalidTask, match=f"line 3 of the questions: {problem}"):
        read_questions(['{"question": "q", "documentId": "a"}', "", line])


def test_a_file_without_questions_is_refused() -> None:
    with pytest.raises(InvalidTask, match="no questions"):
        read_questions(["", " "])
    with pytest.raises(InvalidTask, match="more than 10000 questions"):
        read_questions([json.dumps({"question": "q", "documentId": "a"})] * 10_001)


def row(document_id: str, ordinal: int, heading_path: str, text: str) -> Row:
    return Row(
        id=f"{document_id}-{ordinal}",
        document_id=document_id,
        version=1,
        ordinal=ordinal,
        text=text,
        text_hash="",
        page_start=0,
        page_end=0,
        heading_path=heading_path,
        char_start=0,
        char_end=0,
        language="en",
        metadata={},
        source_sha256="",
        content_hash="",
        task_uid="",
        chunk_count=1,
        tokens=1,
        pipeline="",
    )


def test_questions_from_headings() -> None:
    rows = [
        row("a", 0, "Guide\nBackup", "## Backup\n\nEvery night at three the  tables are copied."),
        row("a", 1, "Guide\nBackup", "More of the same section."),
        row("a", 2, "Guide\nRestore", "## Restore"),
        row("b", 0, "Summary", "Of b."),
        row("c", 0, "Summary", "Of c."),
        row("d", 0, "", "Words without a heading."),
    ]
    found = questions_from_headings(rows)
    assert sorted(found, key=lambda one: one.question) == [
        Question("Guide Backup", "a", "Every night at three the"),
        Question("Guide Restore", "a", None),
    ]
    assert questions_from_headings(reversed(rows)) == [
        one if one.contains is None else Question("Guide Backup", "a", "More of the same section") for one in found
    ], "the choice and its order are the same whatever the order of documents"
    assert questions_from_headings(rows[-1:]) == [Question("Words without a heading.", "d", "Words without a heading.")], (
        "without any headings the beginnings are asked for"
    )
    assert questions_from_headings([]) == []


def test_of_many_headings_the_same_ones_are_chosen() -> None:
    rows = [row(f"d{number}", 0, f"Heading {number}", f"Text {number}") for number in range(1000)]
    found = questions_from_headings(rows, most=50)
    assert len(found) == 50
    assert found == questions_from_headings(rows[::-1], most=50)


# ---------------------------------------------------------------------------------------------------------- evaluation


def answers(dense: Sequence[Hit], keyword: Sequence[Hit]) -> Answers:
    return Answers(milvus=list(dense), elasticsearch=list(keyword), fused=fuse(dense, keyword))


RIGHT = hit("right", document_id="guide", text="The backup\nruns at THREE every night.")
WRONG = [hit(f"wrong{number}", document_id="guide", text="Something else.") for number in range(6)]


@pytest.mark.parametrize(
    ("dense", "keyword", "recall", "mrr"),
    [
        pytest.param([RIGHT], [RIGHT], (1, 1, 1), (1, 1, 1), id="first in both"),
        pytest.param([*WRONG[:1], RIGHT], [], (1, 0, 1), (0.5, 0, 0.5), id="second in one"),
        pytest.param([*WRONG[:5], RIGHT], [RIGHT], (0, 1, 1), (0, 1, 1), id="sixth is not among the first five"),
        pytest.param(WRONG, WRONG, (0, 0, 0), (0, 0, 0), id="nowhere"),
    ],
)
async def test_recall_and_reciprocal_rank(
    dense: list[Hit], keyword: list[Hit], recall: tuple[float, ...], mrr: tuple[float, ...]
) -> None:
    question = Question("when", "guide", "runs at three")

    async def ask(query: str) -> Answers:
        return answers(dense, keyword)

    quality = await evaluate([question], ask)
    assert tuple(quality.recall.values()) == recall
    assert tuple(quality.mrr.values()) == mrr
    assert quality.missed == (() if recall[2] else (question,))


async def test_quality_is_a_mean_over_questions_and_needs_some() -> None:
    async def ask(query: str) -> Answers:
        return answers([RIGHT] if query == "known" else WRONG, [])

    quality = await evaluate([Question("known", "guide"), Question("unknown", "other")], ask)
    assert quality.questions == 2
    assert quality.recall == {"dense": 0.5, "keyword": 0, "fusion": 0.5}
    with pytest.raises(InvalidTask, match="no questions"):
        await evaluate([], ask)


async def test_questions_are_asked_several_at_once_and_the_first_error_is_told_as_it_is() -> None:
    under_way, most = 0, 0

    async def ask(query: str) -> Answers:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        if query == "question 11":
            raise StoreUnavailable("cannot search: gone")
        return answers([], [])

    questions = [Question(f"question {number}", "guide") for number in range(11)]
    assert (await evaluate(questions, ask)).missed == tuple(questions)
    assert most == 8
    with pytest.raises(StoreUnavailable, match="gone"):
        await evaluate([*questions, Question("question 11", "guide")], ask)
