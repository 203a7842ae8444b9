"""The container of DOCX, XLSX and PPTX: an archive whose parts are related to each other (ECMA-376 part 2).

A relationship that leads out of the archive is not followed.
"""

import io
import posixpath
from dataclasses import dataclass
from typing import ClassVar, Final

from job_runner.readers.archive import Archive, Attributes
from job_runner.readers.failure import ReadingFailed

__all__ = ["COMMON_PREFIXES", "Attributes", "Package", "Relationship"]

COMMON_PREFIXES: Final[dict[str, str]] = {
    "http://schemas.openxmlformats.org/markup-compatibility/2006": "mc:",
    "http://schemas.openxmlformats.org/officeDocument/2006/relationships": "r:",
    "http://purl.oclc.org/ooxml/officeDocument/relationships": "r:",
    "http://schemas.openxmlformats.org/package/2006/content-types": "ct:",
    "http://schemas.openxmlformats.org/package/2006/relationships": "rel:",
    "http://www.w3.org/XML/1998/namespace": "xml:",
}
"""Prefixes of the namespaces that all these formats have."""


@dataclass(frozen=True, slots=True)
class Relationship:
    """What one part has to do with another."""

    kind: str
    """The last part of its type: ``officeDocument``, ``styles``."""
    target: str
    """The other part."""


class Package(Archive):
    """An open archive of this kind; a subclass for each format."""

    MARKS: ClassVar[tuple[str, ...]] = ()
    """What the content type of the main part has one of."""
    PREFIXES: ClassVar = COMMON_PREFIXES

    def __init__(self, file: io.BufferedReader, *, name: str) -> None:
        super().__init__(file, name=name)
        self.main = self._main_part()
        self._related = {related.kind: related.target for related in self.relationships(self.main).values()}

    def related(self, kind: str) -> str | None:
        """Return the part that the main part has as its ``styles``, ``numbering`` and so on; ``None``: it has none."""
        part = self._related.get(kind)
        return part if part is not None and part in self else None

    def relationships(self, part: str) -> dict[str, Relationship]:
        """Return the relationships of a part, or with ``""`` of the package, that stay within the archive, by their ids."""
        folder, base = posixpath.split(part)
        found: dict[str, Relationship] = {}

        def start(name: str, attributes: Attributes) -> None:
            if name == "rel:Relationship" and attributes.get("TargetMode") != "External":
                target = posixpath.normpath(posixpath.join("/", folder, attributes.get("Target", ""))).lstrip("/")
                kind = posixpath.basename(attributes.get("Type", ""))
                found[attributes.get("Id", "")] = Relationship(kind=kind, target=target.lower())

        relationships = posixpath.join(folder, "_rels", f"{base}.rels")
        if relationships in self:
            self.parse(relationships, start=start)
        return found

    def _main_part(self) -> str:
        found = self.relationships("").values()
        target = next((related.target for related in found if related.kind == "officeDocument"), None)
        if target is None or target not in self:
            raise self.damaged(target or "the main part")
        content_type = self._content_types().get(f"/{target}") or ""
        if not any(mark in content_type for mark in self.MARKS):
            message = (
                f"cannot read {self.name}: its main part is of the type {content_type[:100]!r}, which is that of no "
                f"{self.FORMAT}; save it again with the program that made it"
            )
            raise ReadingFailed("DocumentRefused", message)
        return target

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
