"""The container of a DOCX: an archive whose parts are related to each other (Open Packaging Conventions, ECMA-376 part 2).

A relationship that leads out of the archive is not followed.
"""

import io
import posixpath
from dataclasses import dataclass
from typing import ClassVar, Final

from job_runner.document import READABLE
from job_runner.readers.archive import Archive, Attributes
from job_runner.readers.failure import ReadingFailed

__all__ = ["Attributes", "Package"]

_SUPPORTED: Final = f"this version reads {READABLE}"
_MAIN_PARTS: Final = (
    ("wordprocessingml", ""),  # .docx, .dotx, and the same by the strict standard
    ("ms-word", ""),  # .docm, .dotm: macros are one more part that is not read
    ("spreadsheetml", "an Excel workbook (XLSX)"),
    ("ms-excel", "an Excel workbook (XLSX)"),
    ("presentationml", "a PowerPoint file (PPTX)"),
    ("ms-powerpoint", "a PowerPoint file (PPTX)"),
)


@dataclass(frozen=True, slots=True)
class _Relationship:
    kind: str
    """The last part of its type: ``officeDocument``, ``styles``."""
    target: str


class Package(Archive):
    """An open DOCX.

    Names of XML have no prefix in WordprocessingML's namespaces, transitional or strict.
    """

    FORMAT: ClassVar = "DOCX"
    PREFIXES: ClassVar = {
        "http://schemas.openxmlformats.org/wordprocessingml/2006/main": "",
        "http://purl.oclc.org/ooxml/wordprocessingml/main": "",
        "http://schemas.openxmlformats.org/markup-compatibility/2006": "mc:",
        "http://schemas.openxmlformats.org/officeDocument/2006/math": "m:",
        "http://purl.oclc.org/ooxml/officeDocument/math": "m:",
        "http://schemas.openxmlformats.org/package/2006/content-types": "ct:",
        "http://schemas.openxmlformats.org/package/2006/relationships": "rel:",
        "http://www.w3.org/XML/1998/namespace": "xml:",
    }

    def __init__(self, file: io.BufferedReader, *, name: str) -> None:
        super().__init__(file, name=name)
        if "[content_types].xml" not in self:
            raise ReadingFailed("DocumentRefused", f"cannot read {name}: it is a ZIP archive; {_SUPPORTED}")
        self.main = self._main_part()
        self._related = {related.kind: related.target for related in self._relationships(self.main)}

    def related(self, kind: str) -> str | None:
        """Return the part that the main part has as its ``styles``, ``numbering`` and so on; ``None``: it has none."""
        part = self._related.get(kind)
        return part if part is not None and part in self else None

    def _main_part(self) -> str:
        target = next((related.target for related in self._relationships("") if related.kind == "officeDocument"), None)
        if target is None or target not in self:
            raise self.damaged(target or "the main part")
        content_type = self._content_types().get(f"/{target}") or ""
        for mark, other in _MAIN_PARTS:
            if mark in content_type:
                if other:
                    raise ReadingFailed("DocumentRefused", f"cannot read {self.name}: it is {other}; {_SUPPORTED}")
                return target
        message = f"cannot read {self.name}: it is an archive of the type {content_type[:100]!r}; {_SUPPORTED}"
        raise ReadingFailed("DocumentRefused", message)

    def _content_types(self) -> dict[str, str]:
        """Return the content type of each part that the archive tells it of, by its name in lower case with a slash."""
        by_extension: dict[str, str] = {}
        by_name: dict[str, str] = {}

        def start(name: str, attributes: Attributes) -> None:
            content_type = attributes.get("ContentType", "")
            if name == "ct:Default":
                by_extension[attributes.get("Extension", "").lower()] = content_type
            elif name == "ct:Override":
                by_name[attributes.get("PartName", "").lower()] = content_type

        self.parse("[content_types].xml", start=start)
        defaults = {f"/{part}": by_extension.get(part.rpartition(".")[2], "") for part in self}
        return defaults | by_name

    def _relationships(self, part: str) -> list[_Relationship]:
        """Return the relationships of a part, or with ``""`` of the package, that stay within the archive."""
        folder, base = posixpath.split(part)
        found: list[_Relationship] = []

        def start(name: str, attributes: Attributes) -> None:
            if name == "rel:Relationship" and attributes.get("TargetMode") != "External":
                target = posixpath.normpath(posixpath.join("/", folder, attributes.get("Target", ""))).lstrip("/")
                found.append(_Relationship(kind=posixpath.basename(attributes.get("Type", "")), target=target.lower()))

        relationships = posixpath.join(folder, "_rels", f"{base}.rels")
        if relationships in self:
            self.parse(relationships, start=start)
        return found
