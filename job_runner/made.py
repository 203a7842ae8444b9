"""What has made the rows of a document: versions and settings, as rows say it and as the content hash has it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from job_runner.document import Kind
from task_contract.models import ProcessingMode
from task_contract.names import digest

_TEXT: Final = re.compile(
    r"parser (?P<parser>.*), splitter (?P<splitter>\S+) (?P<mode>\w+) (?P<size>\d+)/(?P<overlap>\d+), model (?P<model>.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Made:
    """Parser, splitter and model."""

    parser: str
    splitter: str
    """Its version."""
    mode: ProcessingMode
    chunk_size: int
    chunk_overlap: int
    model: str
    """Fingerprint."""

    @property
    def text(self) -> str:
        """As it stands in a row, for people and for filters."""
        splitter = f"splitter {self.splitter} {self.mode} {self.chunk_size}/{self.chunk_overlap}"
        return f"parser {self.parser}, {splitter}, model {self.model}"

    @classmethod
    def read(cls, text: str) -> "Made | None":
        """Read it back; ``None`` of rows that no splitter of ours has made, or of release 0.1.0, which did not say it."""
        found = _TEXT.fullmatch(text)
        if found is None or found["mode"] not in {*ProcessingMode}:
            return None
        return cls(
            found["parser"],
            found["splitter"],
            ProcessingMode(found["mode"]),
            int(found["size"]),
            int(found["overlap"]),
            found["model"],
        )

    def content_hash(self, kind: Kind, source_sha256: str, metadata: Mapping[str, str]) -> str:
        """Return the identity of the rows that this makes of a file: equal hashes give equal rows, but for the version."""
        pipeline = (
            self.parser,
            self.splitter,
            kind,
            self.mode,
            str(self.chunk_size),
            str(self.chunk_overlap),
            self.model,
        )
        pairs = [part for pair in sorted(metadata.items()) for part in pair]
        return digest(source_sha256, *pipeline, *pairs, length=64)


def rehashed(content_hash: str, before: str, after: str, *, source_sha256: str, metadata: Mapping[str, str]) -> str:
    """Return the content hash of rows that were made anew; ``before`` and ``after`` as in :attr:`Made.text`.

    It is the one that processing the file in the new way would give, so that the same file is found unchanged. Rows do not
    say the kind of the file: it is the one that gives the hash they have. Where none does, the hash is one of its own.
    """
    old, new = Made.read(before), Made.read(after)
    if old is not None and new is not None:
        for kind in Kind:
            if old.content_hash(kind, source_sha256, metadata) == content_hash:
                return new.content_hash(kind, source_sha256, metadata)
    return digest(content_hash, after, length=64)


def with_model(text: str, model: str) -> str:
    """Return what rows say that have other vectors."""
    made = Made.read(text)
    return text.rpartition(", model ")[0] + f", model {model}" if made is None else replace(made, model=model).text
