"""The manifests and documents that users copy from: they parse, they fit together, and they say what they promise."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pypdfium2
import pytest
import yaml

from devstack.demo import EXPECTED
from job_runner.document import ParsedDocument
from job_runner.fetch import opened
from job_runner.quality import Question
from job_runner.readers import read
from job_runner.split import language_of
from task_contract.crd import PAYLOAD_FIELDS
from task_contract.models import ProcessingTask, Spec, TaskType, parse_manifest
from tests.support import golden

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ROOT / "examples/documents"
OTHER_KINDS = ("pool-", "schedule-")
MANIFESTS = sorted(path for path in (ROOT / "manifests/examples").rglob("*.yaml") if not path.name.startswith(OTHER_KINDS))
QUESTIONS: list[dict[str, Any]] = json.loads((DOCUMENTS / "questions.json").read_text(encoding="utf-8"))


def task(path: Path) -> ProcessingTask:
    return parse_manifest(yaml.safe_load(path.read_text(encoding="utf-8")))


@cache
def pages() -> list[str]:
    with pypdfium2.PdfDocument(DOCUMENTS / "handbook.pdf") as document:
        return [" ".join(document[number].get_textpage().get_text_range().split()) for number in range(len(document))]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_is_a_task_whose_document_ships_with_the_examples(path: Path) -> None:
    payload = task(path).spec.payload
    for file_path in filter(None, (payload.file_path, *(payload.file_paths or ()))):
        assert (DOCUMENTS / Path(file_path).relative_to("/data")).is_file()


def test_every_type_that_is_carried_out_has_an_example() -> None:
    assert {task(path).spec.type for path in MANIFESTS} == {*TaskType}


def test_names_are_unique_so_that_all_can_be_applied_together() -> None:
    names = [task(path).metadata.name for path in MANIFESTS]
    assert len(names) == len(set(names))


def test_full_example_shows_every_field_of_the_spec() -> None:
    text = (ROOT / "manifests/examples/document-full.yaml").read_text(encoding="utf-8")
    fields = {str(field.alias) for field in Spec.model_fields.values()}
    assert [field for field in sorted(fields) if f" {field}:" not in text] == []
    assert fields & set(yaml.safe_load(text)["spec"]) == fields


@pytest.mark.parametrize("kind", TaskType)
def test_examples_of_a_type_show_every_field_of_its_payload(kind: TaskType) -> None:
    """As a field or in a comment: some exclude each other."""
    text = "".join(path.read_text(encoding="utf-8") for path in MANIFESTS if task(path).spec.type is kind)
    assert [field for field in PAYLOAD_FIELDS[kind] if f" {field}:" not in text] == []


def test_demo_expects_what_the_kustomization_has() -> None:
    resources = yaml.safe_load((ROOT / "manifests/examples/kustomization.yml").read_text())["resources"]
    assert set(EXPECTED) == {task(ROOT / "manifests/examples" / name).metadata.name for name in resources}
    assert set(EXPECTED.values()) == {"Completed", "Failed"}


def test_kustomization_lists_only_files_that_exist() -> None:
    folder = ROOT / "manifests/examples"
    resources = yaml.safe_load((folder / "kustomization.yml").read_text())["resources"]
    assert [name for name in resources if not (folder / name).is_file()] == []


def test_handbook_has_ten_pages_and_a_bookmark_for_each_heading() -> None:
    source = (DOCUMENTS / "src/handbook.md").read_text(encoding="utf-8")
    headings = [line.lstrip("# ") for line in source.splitlines() if line.startswith("##")]
    with pypdfium2.PdfDocument(DOCUMENTS / "handbook.pdf") as document:
        assert [entry.get_title() for entry in document.get_toc()] == headings
        assert len(document) == 10


def test_handbook_was_rendered_from_its_source() -> None:
    source = (DOCUMENTS / "src/handbook.md").read_text(encoding="utf-8")
    plain = source.replace("**", "").replace("`", "")
    paragraphs = [line for line in plain.splitlines() if line and not line.startswith("#")]
    # Page numbers stand between the pages of a paragraph that runs over; the beginnings are on one page.
    starts = [" ".join(paragraph.split()[:6]) for paragraph in paragraphs]
    text = " ".join(pages())
    assert [start for start in starts if start not in text] == []


def test_broken_document_is_the_beginning_of_a_good_one_and_does_not_open() -> None:
    whole, broken = ((DOCUMENTS / name).read_bytes() for name in ("handbook.pdf", "broken.pdf"))
    assert whole.startswith(broken)
    assert broken.startswith(b"%PDF-")
    with pytest.raises(pypdfium2.PdfiumError):
        pypdfium2.PdfDocument(broken)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["question"])
def test_question_is_answered_below_its_heading_on_its_page(question: dict[str, Any]) -> None:
    if question["page"] is None:
        document = parsed(question["document"])
        at = document.text.index(question["answer"])
        assert at == document.text.rindex(question["answer"])
        assert [one.title for one in document.headings if one.start <= at][-1] == question["heading"]
        return
    found = [number for number, text in enumerate(pages(), start=1) if question["answer"] in text]
    assert found == [question["page"]]
    source = (DOCUMENTS / "src/handbook.md").read_text(encoding="utf-8")
    assert question["answer"] in source.split(f"### {question['heading']}\n")[1].split("\n#")[0]


GOLDEN = ROOT / "tests/data/documents"


def parsed(name: str) -> ParsedDocument:
    """A document as a task on it would read it."""
    with opened(name, root=DOCUMENTS, max_bytes=1 << 20) as source, (DOCUMENTS / name).open("rb") as file:
        return read(file, kind=source.kind, name=name)


@pytest.mark.parametrize(
    ("name", "pages"),
    [
        ("laboratory-rules.zh.docx", None),
        ("tide-station.html", None),
        ("tide-tables.xlsx", 2),
        ("observers-evening.zh.pptx", 4),
        ("instruments.csv", None),
    ],
)
def test_text_and_headings_are_the_ones_that_were_looked_at(name: str, pages: int | None) -> None:
    """The golden file is the text, with the level of a heading as Markdown has it.

    What is meant to change it also raises PARSER_VERSION, and is looked at in the difference that the commit shows.
    """
    document = parsed(name)
    lines = document.text
    for heading in reversed(document.headings):
        assert lines[heading.start : heading.end] == heading.title
        lines = f"{lines[: heading.start]}{'#' * heading.level} {lines[heading.start :]}"
    assert (lines + "\n") == (GOLDEN / f"{name}.md").read_text(encoding="utf-8")
    assert (len(document.pages) if document.paged else None) == pages


def test_laboratory_rules_say_what_their_source_says() -> None:
    source = (DOCUMENTS / "src/laboratory-rules.zh.md").read_text(encoding="utf-8")
    text = "".join(parsed("laboratory-rules.zh.docx").text.split())
    pieces = re.split(r"[\n|]|\[\^\d\]", re.sub(r"^(?:#+ |- |\d\. |> |注\d：)", "", source, flags=re.MULTILINE))
    assert [piece for piece in pieces if "".join(piece.split()) not in text] == []
    assert "第三版" not in text
    assert "内部文件" not in text


def test_readme_lists_the_questions() -> None:
    text = (DOCUMENTS / "README.md").read_text(encoding="utf-8")
    assert [question["question"] for question in QUESTIONS if question["question"] not in text] == []


ASKED = golden.questions()


@pytest.mark.parametrize("question", ASKED, ids=lambda question: question.question)
def test_a_golden_question_is_answered_by_its_document(question: Question) -> None:
    assert question.contains is not None
    text = " ".join(parsed(question.document_id).text.split())
    assert " ".join(question.contains.split()) in text


def test_the_golden_set_is_large_enough_to_tell_and_bilingual() -> None:
    chinese = [one for one in ASKED if language_of(one.question) == "zh"]
    assert len(ASKED) >= 60
    assert min(len(chinese), len(ASKED) - len(chinese)) >= 30
    assert len({one.question for one in ASKED}) == len(ASKED)
    assert len({one.document_id for one in ASKED}) >= 5
