"""Options and output of the commands that ask a knowledge base."""

import argparse
import json

import pytest

from job_runner import search_command
from job_runner.index import Filters, Hit
from job_runner.quality import Quality, Question
from job_runner.search import Answers, Mode, fuse


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="x")
    search_command.add_commands(parser.add_subparsers(dest="command"))
    return parser.parse_args(["search", "--kb-id", "kb", "--query", "q", *arguments])


@pytest.mark.parametrize(
    ("arguments", "filters"),
    [
        ([], None),
        (["--document", "a", "--document", "b"], Filters(document_ids=("a", "b"))),
        (["--metadata", "team=a=b", "--metadata", "x="], Filters(metadata=(("team", "a=b"), ("x", "")))),
        (["--heading", "Guide > Backup"], Filters(headings=("Guide", "Backup"))),
        (["--pages", "3"], Filters(pages=(3, 3))),
        (["--pages", "3-5", "--language", "zh"], Filters(pages=(3, 5), language="zh")),
        (["--keyword", "retry", "--without-duplicates"], Filters(keywords=("retry",), without_duplicates=True)),
    ],
)
def test_filters(arguments: list[str], filters: Filters | None) -> None:
    assert search_command._filters(parsed(*arguments)) == filters


@pytest.mark.parametrize(
    "arguments",
    [
        ["--metadata", "team"],
        ["--metadata", "=x"],
        ["--pages", "0"],
        ["--pages", "5-3"],
        ["--pages", "x"],
        ["--pages", "1-99999999999"],
        ["--top-k", "0"],
        ["--top-k", "101"],
        ["--mode", "both"],
    ],
)
def test_bad_options_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*arguments)
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def hit(key: str, score: float) -> Hit:
    return Hit(
        score=score,
        id=key,
        document_id=f"{key}.pdf",
        version=2,
        ordinal=0,
        text=f"Text of {key}.",
        page_start=3,
        page_end=4,
        heading_path="Guide\nBackup",
    )


DENSE, WORDS = [hit("a", 0.7), hit("b", 0.6)], [hit("b", 12.5)]


def ranking(mode: Mode, *arguments: str) -> list[str]:
    dense = [] if mode is Mode.KEYWORD else DENSE
    words = [] if mode is Mode.DENSE else WORDS
    return search_command._ranking(Answers(dense, words, fuse(dense, words)), mode, parsed(*arguments))


def test_one_ranking_of_both_with_where_each_score_comes_from() -> None:
    assert ranking(Mode.HYBRID, "--explain") == [
        "Both, by reciprocal-rank fusion",
        "  1. 0.0325  b.pdf (version 2, page 3-4)",
        "     Milvus: rank 2 (cosine 0.600), Elasticsearch: rank 1 (BM25 12.500); 1/62 + 1/61 = 0.0325",
        "     Guide > Backup",
        "     Text of b.",
        "  2. 0.0164  a.pdf (version 2, page 3-4)",
        "     Milvus: rank 1 (cosine 0.700), Elasticsearch: not among its best; 1/61 = 0.0164",
        "     Guide > Backup",
        "     Text of a.",
    ]
    first, second = map(json.loads, ranking(Mode.HYBRID, "--explain", "--json"))
    assert (first["store"], first["documentId"], first["headingPath"]) == ("fusion", "b.pdf", ["Guide", "Backup"])
    assert first["milvus"] == {"rank": 2, "score": 0.6}
    assert first["elasticsearch"] == {"rank": 1, "score": 12.5}
    assert second["elasticsearch"] is None
    assert "milvus" not in json.loads(ranking(Mode.HYBRID, "--json")[0])


@pytest.mark.parametrize(
    ("mode", "title", "score", "why"),
    [
        (Mode.DENSE, "Milvus, by meaning", "0.700  a.pdf", "cosine of question and chunk"),
        (Mode.KEYWORD, "Elasticsearch, by words", "12.500  b.pdf", "BM25 over text and headings"),
    ],
)
def test_a_ranking_of_one_store(mode: Mode, title: str, score: str, why: str) -> None:
    lines = ranking(mode, "--explain")
    assert lines[0] == title
    assert score in lines[1]
    assert why in lines[2]
    assert search_command._ranking(Answers([], [], []), mode, parsed()) == [f"{title}: nothing found"]


def test_quality_names_what_is_not_answered() -> None:
    recall = {"dense": 0.5, "keyword": 0.0, "fusion": 0.5}
    measured = Quality(questions=2, recall=recall, mrr=recall, missed=(Question("who?", "a.pdf"),))
    assert search_command._quality_table(measured, top_k=5).splitlines() == [
        "2 questions",
        "             recall@5      MRR",
        "dense           0.500    0.500",
        "keyword         0.000    0.000",
        "fusion          0.500    0.500",
        "not answered by the fusion:",
        "  a.pdf: who?",
    ]
    assert json.loads(search_command._quality_json(measured))["missed"] == [{"question": "who?", "documentId": "a.pdf"}]
