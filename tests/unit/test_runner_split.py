"""What the splitter promises: exact offsets, ends at sentences, bounds kept, an end for any settings."""

import time
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from job_runner import split as splitter
from job_runner.document import Chunk, Heading, Kind, Page, ParsedDocument, language_of_most
from job_runner.split import SplitSettings, language_of, split
from task_contract.models import ProcessingMode

CHINESE = "知识库把文档切成片段。每个片段都有页码！“真的吗？”他问。是的；片段还带有标题路径……最后一句没有句号"
ENGLISH = "The runner reads a file. It has 3.14 pages, e.g. none. Dr. Smith agrees! Does it end? Yes."


def document(
    text: str, *, headings: tuple[Heading, ...] = (), pages: tuple[Page, ...] = (Page(number=1, start=0),)
) -> ParsedDocument:
    return ParsedDocument(kind=Kind.TEXT, text=text, pages=pages, headings=headings)


def chunks(text: str, **settings: object) -> list[Chunk]:
    headings, embed = settings.pop("headings", ()), settings.pop("embed", None)
    return list(split(document(text, headings=headings), SplitSettings(**settings), embed=embed))  # type: ignore[arg-type]  # a table


def markdown(text: str) -> tuple[Heading, ...]:
    """Headings of lines that start with ``#``."""
    headings, offset = [], 0
    for line in text.splitlines(keepends=True):
        if line.startswith("#"):
            title = line.lstrip("#")
            headings.append(Heading(start=offset, end=offset + len(line), level=len(line) - len(title), title=title.strip()))
        offset += len(line)
    return tuple(headings)


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [
        pytest.param("", 10, [], id="nothing"),
        pytest.param(" \n\u3000\t ", 10, [], id="white space only"),
        pytest.param("短。", 10, ["短。"], id="one short sentence"),
        pytest.param("一二三。四五六。七八九。", 8, ["一二三。四五六。", "七八九。"], id="chinese full stops"),
        pytest.param(
            "他说：“好的。”她走了。", 8, ["他说：“好的。”", "她走了。"], id="closing quote stays with its sentence"
        ),
        pytest.param("「はい。」と言った。次です。", 10, ["「はい。」と言った。", "次です。"], id="japanese brackets"),
        pytest.param("One two. Three four. Five.", 20, ["One two. Three four.", "Five."], id="latin"),
        pytest.param("See Dr. Smith now. Then go.", 20, ["See Dr. Smith now.", "Then go."], id="abbreviation"),
        pytest.param("Pi is 3.14 about. It is so.", 18, ["Pi is 3.14 about.", "It is so."], id="decimal point"),
        pytest.param("J. R. Tolkien wrote. I read.", 21, ["J. R. Tolkien wrote.", "I read."], id="initials"),
        pytest.param("alpha beta\n\ngamma delta", 15, ["alpha beta", "gamma delta"], id="paragraphs without full stops"),
        pytest.param("- alpha beta\n- gamma delta", 15, ["- alpha beta", "- gamma delta"], id="list items"),
        pytest.param("甲乙丙，丁戊己，庚辛壬", 8, ["甲乙丙，丁戊己，", "庚辛壬"], id="commas where a sentence is too long"),
        pytest.param("alpha beta gamma delta", 12, ["alpha beta", "gamma delta"], id="spaces where there are no commas"),
        pytest.param("abcdefghij" * 2, 8, ["abcdefgh", "ijabcdef", "ghij"], id="characters where there is nothing else"),
        pytest.param("one.   \n\n   two.", 5, ["one.", "two."], id="white space at edges does not count"),
    ],
)
def test_chunks_end_at_the_best_border_that_fits(text: str, size: int, expected: list[str]) -> None:
    assert [chunk.text for chunk in chunks(text, chunk_size=size, chunk_overlap=0)] == expected


@pytest.mark.parametrize("text", [CHINESE * 30, (ENGLISH + " ") * 30], ids=["chinese without line ends", "english"])
def test_every_chunk_but_the_last_ends_with_a_sentence(text: str) -> None:
    found = chunks(text, chunk_size=200, chunk_overlap=40)
    assert len(found) > 5
    assert all(chunk.text.endswith(("。", "！", "？", "”", "；", "…", ".", "!", "?")) for chunk in found[:-1])
    assert all(not chunk.text.endswith(("e.g.", "Dr.")) for chunk in found)


def test_overlap_is_whole_sentences_and_within_its_bound() -> None:
    found = chunks("".join(f"第{number:03}句话在这里。" for number in range(100)), chunk_size=60, chunk_overlap=25)
    for before, after in pairwise(found):
        assert before.end - after.start == 20
        assert after.text.startswith("第")


def test_a_chunk_does_not_cross_a_heading_and_knows_its_path() -> None:
    text = "# 手册\n\n引言在此处写得足够长了。\n\n## 备份\n\n每天备份一次数据库才安全。\n\n"
    text += "## 恢复\n\n先停机再恢复数据才稳妥。\n"
    found = chunks(text, chunk_size=40, chunk_overlap=10, headings=markdown(text))
    assert [(chunk.text.split("\n")[0], chunk.heading_path) for chunk in found] == [
        ("# 手册", ("手册",)),
        ("## 备份", ("手册", "备份")),
        ("## 恢复", ("手册", "恢复")),
    ]


def test_a_heading_never_ends_a_chunk_and_tiny_sections_share_one() -> None:
    text = "# A\n\nx.\n\n# B\n\ny.\n\n# Cccc\n\n" + "Long sentence here. " * 4
    found = chunks(text, chunk_size=60, chunk_overlap=0, headings=markdown(text))
    assert found[0].text == "# A\n\nx.\n\n# B\n\ny."
    assert found[1].text.startswith("# Cccc\n\nLong")
    assert found[1].heading_path == ("Cccc",)


def test_a_bookmark_inside_a_page_starts_a_section() -> None:
    text = "Part one is here and long enough. Part two is here and long enough."
    at = text.index("Part two")
    found = chunks(text, chunk_size=100, chunk_overlap=0, headings=(Heading(start=at, end=at, level=1, title="Two"),))
    assert [(chunk.text[:8], chunk.heading_path) for chunk in found] == [("Part one", ()), ("Part two", ("Two",))]


def test_pages_of_a_chunk_that_spans_several() -> None:
    pages = (Page(number=1, start=0), Page(number=2, start=6), Page(number=4, start=12))
    whole = document("aaaaa\nbbbbb\nccccc", pages=pages)
    found = list(split(whole, SplitSettings(chunk_size=11, chunk_overlap=0)))
    assert [(chunk.page_start, chunk.page_end) for chunk in found] == [(1, 2), (4, 4)]


# ------------------------------------------------------------------------------------------------------------ semantic

TOPICS = "甲乙丙丁"


def by_topic(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
    """A model that knows four topics, and reads off how sure it is: 甲9 is about the first one and nothing else."""
    vectors = np.full((len(sentences), len(TOPICS) + 1), 0.01, dtype=np.float32)
    for vector, sentence in zip(vectors, sentences, strict=True):
        for position, character in enumerate(sentence):
            if character in TOPICS:
                sure = sentence[position + 1 : position + 2]
                vector[TOPICS.index(character)] = int(sure) / 9 if sure.isdigit() else 1
                vector[-1] = 1 - int(sure) / 9 if sure.isdigit() else 0
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


def about(topic: str, count: int) -> str:
    """Sentences of ten characters."""
    return "".join(f"{topic}第{number:02}句话写在这"[:9] + "。" for number in range(count))


def semantic(text: str, **settings: object) -> list[str]:
    found = chunks(text, mode=ProcessingMode.SEMANTIC, embed=by_topic, **{"chunk_overlap": 0, **settings})
    return ["".join(dict.fromkeys(c for c in chunk.text if c in TOPICS)) + f" {len(chunk.text)}" for chunk in found]


@pytest.mark.parametrize(
    ("text", "settings", "expected"),
    [
        pytest.param(about("甲", 9), {}, ["甲 90"], id="one topic that fits is one chunk"),
        pytest.param(about("甲", 12) + about("乙", 8), {}, ["甲 120", "乙 80"], id="a change of topic ends a chunk"),
        pytest.param(
            about("甲", 8) + about("乙", 8) + about("丙", 14), {}, ["甲 80", "乙 80", "丙 140"], id="so does every change"
        ),
        pytest.param(about("甲", 4) + about("乙", 14), {}, ["甲乙 180"], id="not where it would leave a crumb before it"),
        pytest.param(about("甲", 14) + about("乙", 4), {}, ["甲乙 180"], id="nor at the end of the document"),
        pytest.param(
            "# 一\n" + about("甲", 14) + about("乙", 4) + "\n# 二\n" + about("丙", 6),
            {},
            ["甲乙 184", "丙 64"],
            id="nor at the end of a section",
        ),
        pytest.param(
            "# 一\n" + about("甲", 8) + "\n# 二\n" + about("甲", 8),
            {"chunk_size": 300},
            ["甲 84", "甲 84"],
            id="a heading ends a chunk whatever the topic",
        ),
        pytest.param(about("甲", 30), {}, ["甲 200", "甲 100"], id="a topic that does not fit is cut at chunkSize"),
        pytest.param(
            about("甲", 12) + about("甲5", 6) + about("乙", 30),
            {"max_tokens": 100, "count_tokens": len},
            ["甲 100", "甲 80", "乙 100", "乙 100", "乙 100"],
            id="or at the model's limit",
        ),
        pytest.param(
            about("甲", 14) + about("甲6", 30),
            {},
            ["甲 140", "甲 200", "甲 100"],
            id="where neighbours have least in common",
        ),
        pytest.param("甲。乙。", {}, ["甲乙 4"], id="two sentences are no two topics"),
        pytest.param(" \n ", {}, [], id="nothing"),
    ],
)
def test_semantic_mode_cuts_where_the_topic_changes(text: str, settings: dict[str, Any], expected: list[str]) -> None:
    assert semantic(text, **{"chunk_size": 200, "headings": markdown(text), **settings}) == expected


def test_topics_do_not_overlap_and_cuts_within_one_do() -> None:
    text = about("甲", 30) + about("乙", 30)
    found = chunks(text, mode=ProcessingMode.SEMANTIC, embed=by_topic, chunk_size=200, chunk_overlap=20)
    overlaps = {(before.text[0], after.text[0]): before.end - after.start for before, after in pairwise(found)}
    assert overlaps == {("甲", "甲"): 20, ("甲", "乙"): 0, ("乙", "乙"): 20}


def test_semantic_mode_asks_for_each_sentence_once_and_needs_a_model() -> None:
    text = "# 题\n\n一句。二句！Third one. Fourth. \n\n- item\n"
    asked: list[str] = []

    def embed(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        asked.extend(sentences)
        return by_topic(sentences)

    chunks(text, mode=ProcessingMode.SEMANTIC, embed=embed, headings=markdown(text), chunk_size=20, chunk_overlap=2)
    assert asked == ["# 题", "一句。", "二句！", "Third one.", "Fourth.", "- item"]
    with pytest.raises(ValueError, match="cannot split by meaning without an embedding model"):
        chunks(text, mode=ProcessingMode.SEMANTIC)


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 8, 12, 13, 40])
def test_a_long_document_is_compared_piece_by_piece_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    sentences = [f"{TOPICS[number * 7 % 4]}{number % 10}" for number in range(count)]
    whole = splitter._distances(sentences, by_topic)
    assert len(whole) == max(0, count - 1)
    vectors = by_topic(sentences).astype(float) * 2  # the length of each
    for border in range(3, count - 2):
        left, right = vectors[border - 3 : border].sum(axis=0), vectors[border : border + 3].sum(axis=0)
        cosine = left @ right / np.linalg.norm(left) / np.linalg.norm(right)
        assert whole[border - 1] == pytest.approx(1 - cosine, abs=1e-4)
    monkeypatch.setattr(splitter, "_EMBEDDED_AT_ONCE", 7)
    assert splitter._distances(sentences, by_topic) == whole


def test_a_chunk_knows_its_tokens_and_each_sentence_is_counted_once() -> None:
    counted: list[str] = []

    def count(piece: str) -> int:
        counted.append(piece)
        return len(piece.split())

    text = "One two three. Four five. Six. " * 50
    found = chunks(text, chunk_size=100, chunk_overlap=20, count_tokens=count)
    assert [chunk.tokens for chunk in found] == [len(chunk.text.split()) for chunk in found]
    assert counted == [chunk.text for chunk in found]
    counted.clear()
    limited = chunks(text, chunk_size=100, chunk_overlap=20, count_tokens=count, max_tokens=15)
    assert [chunk.tokens for chunk in limited] == [len(chunk.text.split()) for chunk in limited]
    assert "".join(counted) == text


def test_fixed_mode_cuts_windows() -> None:
    found = chunks("abcdefghij", chunk_size=4, chunk_overlap=1, mode=ProcessingMode.FIXED)
    assert [(chunk.start, chunk.text) for chunk in found] == [(0, "abcd"), (3, "defg"), (6, "ghij")]


def test_tokens_cap_a_chunk_whatever_its_characters() -> None:
    found = chunks("一二三四。五六七八。" * 20, chunk_size=100, chunk_overlap=20, max_tokens=12, count_tokens=len)
    assert max(len(chunk.text) for chunk in found) <= 12
    assert all(chunk.text.endswith("。") for chunk in found)
    long = chunks("字" * 50, chunk_size=100, chunk_overlap=0, max_tokens=12, count_tokens=len)
    assert [len(chunk.text) for chunk in long] == [12, 12, 12, 12, 2] or max(len(c.text) for c in long) <= 12


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("知识库运维手册", "zh"),
        ("用 Kubernetes 部署 operator 的步骤", "zh"),
        ("Plain English.", "en"),
        ("Économie française", "en"),
        ("これは日本語の文章です", "other"),
        ("한국어 문장입니다", "other"),
        ("12345 %%", "other"),
        ("Привет мир", "other"),
    ],
)
def test_language_by_script(text: str, language: str) -> None:
    assert language_of(text) == language


@given(
    st.lists(
        st.sampled_from(["知识", "㐀鿿", "𠀀", "、。", "，", "あカ", "한", "abc", "éŁ", "12 ", "😀", "\ud800"]), max_size=40
    )
)
def test_the_language_is_that_of_the_scripts_counted_one_by_one(pieces: list[str]) -> None:
    text = "".join(pieces)
    han = sum(len(piece) for piece in pieces if piece in {"知识", "㐀鿿", "𠀀"})
    kana_hangul = sum(len(piece) for piece in pieces if piece in {"あカ", "한"})
    latin = sum(len(piece) for piece in pieces if piece in {"abc", "éŁ"})
    other = kana_hangul > han // 10 and kana_hangul * 4 > latin
    assert language_of(text) == ("other" if other else "zh" if han * 4 > latin else "en" if latin else "other")


def test_the_language_of_a_document_is_that_of_most_of_its_text() -> None:
    assert language_of_most([]) is None
    text = "A short line.\n\n" + "知识库把文档切成片段。" * 20
    assert language_of_most(chunks(text, chunk_size=40, chunk_overlap=0)) == "zh"
    assert language_of_most(chunks(text[:15] * 3 + "短句。", chunk_size=14, chunk_overlap=0)) == "en"


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 0, "chunk_overlap": 0},
        {"chunk_size": 10, "chunk_overlap": 10},
        {"chunk_size": 10, "chunk_overlap": -1},
        {"max_tokens": 5},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot"):
        SplitSettings(**settings)


PIECES = st.sampled_from(
    [
        "知识",
        "库。",
        "！",
        "”",
        "word ",
        "end. ",
        "Dr. ",
        "3.14",
        "\n",
        "\n\n",
        "# h\n",
        "- ",
        "，",
        ", ",
        " ",
        "\u3000",
        "é",
        "e\u0301",
        "😀",
        "\U00020000",
        "1. ",
    ]
)


def by_hash(sentences: Sequence[str]) -> npt.NDArray[np.float32]:
    """A model without sense."""
    drawn = [np.random.default_rng(zlib.crc32(sentence.encode())).normal(size=4) for sentence in sentences]
    return np.array([vector / np.linalg.norm(vector) for vector in drawn], dtype=np.float32)


@given(
    text=st.lists(PIECES, max_size=80).map("".join),
    size=st.integers(1, 40),
    share=st.floats(0, 0.999),
    mode=st.sampled_from(list(ProcessingMode)),
    max_tokens=st.none() | st.integers(1, 30),
)
def test_any_text_and_settings_give_exact_chunks(
    text: str, size: int, share: float, mode: ProcessingMode, max_tokens: int | None
) -> None:
    headings = markdown(text)
    settings = SplitSettings(
        chunk_size=size,
        chunk_overlap=int(size * share),
        mode=mode,
        max_tokens=max_tokens,
        count_tokens=None if max_tokens is None else lambda piece: len(piece.encode()),
    )
    found = list(split(document(text, headings=headings), settings, embed=by_hash))
    covered: set[int] = set()
    for ordinal, chunk in enumerate(found):
        assert chunk.ordinal == ordinal
        assert chunk.text == text[chunk.start : chunk.end]
        assert chunk.text.strip() == chunk.text != ""
        assert len(chunk.text) <= size
        whole = 0 if max_tokens is None else len(chunk.text.encode())
        space = len(text.encode()) - len("".join(text.split()).encode())
        assert whole <= chunk.tokens <= whole + space  # the white space around its sentences is counted with them
        if max_tokens is not None and len(chunk.text) > 1:
            assert len(chunk.text.encode()) <= max_tokens
        covered.update(range(chunk.start, chunk.end))
    assert all(a.start <= b.start and a.end < b.end for a, b in pairwise(found))
    assert all(text[at].isspace() for at in set(range(len(text))) - covered), "text was lost"
    assert list(split(document(text, headings=headings), settings, embed=by_hash)) == found


@pytest.mark.parametrize(
    "text", ["a" * 200_000, " " * 200_000, "字" * 200_000, ". " * 100_000, "\n" * 200_000, "'" * 200_000, "。" * 200_000]
)
def test_monotonous_text_takes_no_time(text: str) -> None:
    started = time.process_time()
    list(split(document(text), SplitSettings()))
    assert time.process_time() - started < 2
