"""From the bytes of a file to :class:`~job_runner.document.ParsedDocument`: one module for each kind of file.

These functions run in the child process of :mod:`job_runner.parse_child`, because a file may crash a library or ask for
any amount of memory. They import nothing of the contract, and each is imported for its own kind alone, so that the child
starts in a fraction of a second; what goes wrong is a :class:`ReadingFailed` whose ``reason`` names an error of
:mod:`task_contract.errors`.
"""

from functools import partial
from typing import TYPE_CHECKING, BinaryIO, Final

from job_runner.document import Kind, ParsedDocument
from job_runner.readers.charset import decode
from job_runner.readers.failure import OnProgress, ReadingFailed
from job_runner.readers.ocr import PICTURED, Recognize
from job_runner.readers.ocr import version as ocr_version

if TYPE_CHECKING:
    from job_runner.readers.mail import Allowance

__all__ = ["PARSER_VERSION", "OnProgress", "ReadingFailed", "decode", "parser_version", "read"]

PARSER_VERSION: Final = "2"
"""Raise it whenever the same bytes would give another text, page or heading."""


def parser_version(kind: Kind) -> str:
    """Return what stands for these readers in the fingerprint of a document: equal versions give equal texts.

    Where OCR is installed, its version is part of it for the kinds that may hold pictures.
    """
    recognition = ocr_version() if kind in PICTURED else None
    return f"{PARSER_VERSION} with {recognition}" if recognition else PARSER_VERSION


def read(
    file: BinaryIO,
    *,
    kind: Kind,
    name: str,
    on_progress: OnProgress = lambda done, total: None,
    allowance: "Allowance | None" = None,
    recognize: Recognize | None = None,
) -> ParsedDocument:
    """Read an open file of a known kind, from its beginning; ``name`` is what messages call it.

    ``allowance`` is what attachments of mails may still be, for a file that is one itself;
    ``recognize`` reads pictures and scanned pages, which have no text without it.

    Raises :class:`ReadingFailed`.
    """
    match kind:
        case Kind.PDF:
            from job_runner.readers.pdf import read_pdf

            document = read_pdf(file, name=name, on_progress=on_progress, recognize=recognize)
        case Kind.MARKDOWN:
            from job_runner.readers.text import read_markdown

            document = read_markdown(decode(file.read(), name=name))
        case Kind.TEXT:
            from job_runner.readers.text import read_plain

            document = read_plain(decode(file.read(), name=name))
        case Kind.DOCX:
            from job_runner.readers.docx import read_docx

            document = read_docx(file, name=name)
        case Kind.HTML:
            from job_runner.readers.html import read_html

            document = read_html(file.read(), name=name)
        case Kind.XLSX:
            from job_runner.readers.xlsx import read_xlsx

            document = read_xlsx(file, name=name, on_progress=on_progress)
        case Kind.XLS:
            from job_runner.readers.xlsx import read_xls

            document = read_xls(file, name=name, on_progress=on_progress)
        case Kind.ODS:
            from job_runner.readers.ods import read_ods

            document = read_ods(file, name=name, on_progress=on_progress)
        case Kind.CSV:
            from job_runner.readers.delimited import read_delimited

            document = read_delimited(file.read(), name=name)
        case Kind.JSON:
            from job_runner.readers.json_data import read_json

            document = read_json(file.read(), name=name)
        case Kind.JSONL:
            from job_runner.readers.json_data import read_json_lines

            document = read_json_lines(file.read(), name=name)
        case Kind.PPTX:
            from job_runner.readers.pptx import read_pptx

            document = read_pptx(file, name=name, on_progress=on_progress)
        case Kind.EPUB:
            from job_runner.readers.epub import read_epub

            document = read_epub(file, name=name, on_progress=on_progress)
        case Kind.EML:
            from job_runner.readers.mail import Allowance, read_mail

            document = read_mail(
                file, name=name, allowance=allowance or Allowance(), read=partial(read, recognize=recognize)
            )
        case Kind.IMAGE:
            from job_runner.readers.image import read_image

            document = read_image(file, name=name, on_progress=on_progress, recognize=recognize)
    if not document.text.strip():
        raise ReadingFailed("DocumentEmpty", f"cannot index {name}: there is no text in it")
    return document
