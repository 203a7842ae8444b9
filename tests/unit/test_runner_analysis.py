"""What a semantic analysis finds in a text, and which texts say nearly the same."""

import pytest

from job_runner.analysis import Analyzer, Duplicates, fingerprint, phrases, summary_line
from job_runner.index import Row
from task_contract.names import digest

BACKUP = (
    "The backup copies the ledger every night at three. A restore drill takes the backup of the night before and fills an "
    "empty cluster with it. The retry limit of the backup is three."
)
CHINESE = "柴油发电机在断电后九十秒内启动。值班员每周检查柴油发电机，并记录燃油的油位。"
FRENCH = "La sauvegarde copie le registre chaque nuit à trois heures, et l'exercice de restauration remplit un serveur vide."


@pytest.fixture(scope="module")
def analyzer() -> Analyzer:
    return Analyzer()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (BACKUP, "en"),
        (CHINESE, "zh"),
        (FRENCH, "fr"),
        ("Die Sicherung kopiert jede Nacht um drei Uhr das Hauptbuch auf einen zweiten Rechner im Keller.", "de"),
        ("OK", "en"),
        ("17 / 42", "other"),
        ("", "other"),
    ],
)
def test_language(analyzer: Analyzer, text: str, language: str) -> None:
    assert analyzer.enhance(text, "").language == language


@pytest.mark.parametrize(
    ("text", "some", "none"),
    [
        (BACKUP, {"backup", "retry limit"}, {"the", "every", "at"}),
        (CHINESE, {"柴油", "发电机"}, {"在", "并", "，", "。"}),
        ("", set(), set()),
        ("   \n 123 456 \n", set(), {"123", "456"}),
    ],
)
def test_keywords(analyzer: Analyzer, text: str, some: set[str], none: set[str]) -> None:
    found = analyzer.enhance(text, "").keywords
    assert some <= set(found)
    assert not none & set(found)
    assert len(found) <= 8
    assert all(keyword == keyword.lower() and 2 <= len(keyword) <= 64 for keyword in found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the retry limit, the retry", ["retry limit", "retry"]),
        ("one two three four five", ["one two three", "four five"]),
        ("Full-text index\nof the owner's documents", ["full-text index", "owner's documents"]),
        ("42 x 7th the", ["7th"]),
        ("the", []),
        ("", []),
    ],
)
def test_phrases_stand_between_stop_words_and_punctuation(text: str, found: list[str]) -> None:
    assert phrases(text, {"the", "of"}) == found


def test_keywords_are_the_same_each_time(analyzer: Analyzer) -> None:
    assert len({analyzer.enhance(BACKUP, "").keywords for _ in range(5)}) == 1
    assert Analyzer().enhance(CHINESE, "") == analyzer.enhance(CHINESE, "")


@pytest.mark.parametrize(
    ("text", "titles", "line"),
    [
        ("## Backup\n\nEvery night at three. Then more.", ["Guide", "Backup"], "Guide > Backup: Every night at three."),
        ("每天凌晨三点备份。然后校验。", ["备份"], "备份: 每天凌晨三点备份。"),
        ("No end of a sentence", [], "No end of a sentence"),
        ("Version 2.5 is out. More.", [], "Version 2.5 is out."),
        ("Backup", ["Backup"], "Backup"),
        ("", [], ""),
    ],
)
def test_summary_line(text: str, titles: list[str], line: str) -> None:
    assert summary_line(text, titles) == line


def test_a_long_summary_is_cut() -> None:
    line = summary_line("word " * 200, ["A heading"])
    assert len(line) <= 240
    assert line.startswith("A heading: word")
    assert line.endswith("…")


def row(key: str, text: str, heading_path: str = "") -> Row:
    return Row(
        id=key,
        document_id="a",
        version=1,
        ordinal=0,
        text=text,
        text_hash=digest(text),
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


@pytest.mark.parametrize(
    ("texts", "repeated"),
    [
        pytest.param([BACKUP, BACKUP], ["", "0"], id="the same"),
        pytest.param([BACKUP, BACKUP.replace("three. A", "four. A")], ["", "0"], id="one word of another kind"),
        pytest.param([BACKUP, BACKUP.upper().replace(" ", "\n ")], ["", "0"], id="case and white space"),
        pytest.param([CHINESE, CHINESE.replace("每周", "每天")], ["", "0"], id="Chinese with another character"),
        pytest.param([BACKUP, CHINESE, FRENCH], ["", "", ""], id="different texts"),
        pytest.param([BACKUP, BACKUP[: len(BACKUP) // 2]], ["", ""], id="the first half of it"),
        pytest.param([CHINESE, BACKUP, CHINESE, BACKUP, CHINESE], ["", "", "0", "1", "0"], id="two groups"),
        pytest.param(["", "", "a", "a"], ["", "0", "", "2"], id="next to nothing"),
    ],
)
def test_duplicates_are_those_of_the_first(texts: list[str], repeated: list[str]) -> None:
    duplicates = Duplicates()
    assert [duplicates.first(row(str(number), text)) for number, text in enumerate(texts)] == repeated


def test_a_row_is_analyzed_anew_when_text_or_headings_are_others() -> None:
    assert fingerprint(row("1", "a", "h")) == fingerprint(row("2", "a", "h"))
    assert len({fingerprint(row("1", text, path)) for text in "ab" for path in "xy"}) == 4
