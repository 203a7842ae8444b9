"""What an attempt gets of memory and CPU: a class by what the task works on, more memory after it ran out. Pure functions.

A class is chosen by the kind of the file, which its name tells well enough, and by its size where the caller knows it
(``payload.fileBytes``); ``spec.resourceClass`` overrides. What a class is worth is a setting.

The bounds of :data:`_FILES` come from measurements of the largest resident sizes. Runner, packaged model, clients of the
stores and parser take 252 MB together with a small document (docs/performance.md). To that a document adds, in parser,
runner and rows, a byte of its file: 5 bytes where it is text (60 MiB), 10 where it is a table (42 MiB of CSV), 12 of a
workbook (20 MB of XLSX), 43 of DOCX (8.5 MB), whose text is compressed, and less than 1 of PDF (1,000 pages: 30 MB). So of
the requests that are the default, 256Mi are enough for 1 MiB of text and 512Mi for 24 MiB.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

from task_contract.models import Action, ProcessingTask, TaskType

OOM_KILLED: Final = "OOMKilled"
"""Reason of an attempt that used more memory than its limit; also the kubelet's word for it."""

# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(?:([KMGTPE]i)|([mkMGTPE])|[eE]([+-]?\d{1,2}))?")
_BINARY: Final = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)}
_DECIMAL: Final = {"m": Decimal("0.001")} | {
    letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", start=1)
}

Resources = Mapping[str, Mapping[str, str]]
"""Requests and limits of a container, as Kubernetes writes them."""


class Size(StrEnum):
    """The classes that are chosen by what the task works on. Settings may add others, by name."""

    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class _File(NamedTuple):
    """How many bytes of a kind of file are small, and how many are medium; and what it is where nobody says."""

    small: int
    medium: int
    unknown: Size


_MIB: Final = 2**20
_TEXT: Final = _File(_MIB, 24 * _MIB, Size.SMALL)
_PDF: Final = _File(_MIB, 256 * _MIB, Size.MEDIUM)
_OFFICE: Final = _File(_MIB // 4, 6 * _MIB, Size.MEDIUM)
_OTHER: Final = _OFFICE
"""Mails, which have files of all kinds in them, and what has another name or none."""
_PICTURE: Final = _File(0, 0, Size.LARGE)
"""Recognising a page takes 0.95 GB, whatever the size of its file (docs/pipeline.md)."""
_FILES: Final[Mapping[str, _File]] = {
    **dict.fromkeys(["txt", "text", "log", "md", "markdown", "html", "htm", "xhtml"], _TEXT),
    **dict.fromkeys(["csv", "tsv", "json", "jsonl", "ndjson"], _TEXT),
    **dict.fromkeys(["pdf"], _PDF),
    **dict.fromkeys(["docx", "dotx", "docm", "pptx", "pptm", "ppsx", "xlsx", "xlsm", "xls", "ods", "epub"], _OFFICE),
    **dict.fromkeys(["png", "jpg", "jpeg", "tif", "tiff", "webp", "bmp"], _PICTURE),
}


@dataclass(frozen=True, slots=True)
class MemoryGrowth:
    """What follows on an attempt that ran out of memory."""

    factor: float = 2
    """The next attempt gets this many times the memory; 1: as much as before."""
    limit: str = "8Gi"
    """And never more than this, unless the settings begin above it."""


def class_of(task: ProcessingTask) -> str:
    """Return the name of the task's class: the same for every attempt."""
    spec, payload = task.spec, task.spec.payload
    if spec.resource_class is not None:
        return spec.resource_class
    if spec.type is TaskType.HEALTH_CHECK or spec.effective_action in {
        Action.DELETE,
        Action.DELETE_KNOWLEDGE_BASE,
        Action.PURGE,
    }:
        return Size.SMALL
    if spec.type is not TaskType.DOCUMENT_PROCESSING:
        return Size.MEDIUM  # they stream: the model is the largest thing in memory
    suffix = PurePosixPath(payload.file_path or "").suffix.removeprefix(".").lower()
    file = _FILES.get(suffix, _OTHER)
    if payload.file_bytes is None:
        return file.unknown
    if payload.file_bytes <= file.small:
        return Size.SMALL
    return Size.MEDIUM if payload.file_bytes <= file.medium else Size.LARGE


def classes(medium: Resources, *, configured: Mapping[str, Resources]) -> dict[str, Resources]:
    """Return all classes. What is not configured follows from ``medium``, whatever the model in it needs.

    Small requests half of it and has the same limits: nothing that it is chosen for runs out of memory earlier than
    before. Large has twice as much of both. Only CPU and memory differ.
    """
    small = {kind: _scaled(values, Decimal("0.5")) if kind == "requests" else values for kind, values in medium.items()}
    large = {kind: _scaled(values, Decimal(2)) for kind, values in medium.items()}
    return {Size.SMALL: small, Size.MEDIUM: medium, Size.LARGE: large, **configured}


def resources_of(task: ProcessingTask, classes: Mapping[str, Resources], growth: MemoryGrowth) -> dict[str, Any]:
    """Return the resources of the task's next attempt: request and limit of memory grow together after OOMKilled.

    The same task gives the same answer, so that a Job that is created again after a crash is the same Job. Of a class that
    is not there they are those of medium; see :func:`unknown_class`.
    """
    resources = classes.get(class_of(task)) or classes.get(Size.MEDIUM) or {}
    killed = sum(attempt.reason == OOM_KILLED for attempt in task.status.attempts)
    if not killed or growth.factor == 1:
        return dict(resources)
    return {kind: _grown(values, killed, growth) for kind, values in resources.items()}


def unknown_class(task: ProcessingTask, classes: Collection[str]) -> str | None:
    """Return why a task cannot have its class; None if it can."""
    if (name := task.spec.resource_class) is None or name in classes:
        return None
    return (
        f"cannot give the pod resourceClass {name}: the operator's settings have {', '.join(sorted(classes))}; "
        "create a task with one of these, or add it to runner.resourceClasses in the chart's values"
    )


def in_bytes(quantity: str | float) -> int:
    """Return a quantity of Kubernetes in bytes, rounded up. Raises ValueError for what is none."""
    return math.ceil(_number(quantity))


@lru_cache(maxsize=256)
def _number(quantity: str | float) -> Decimal:
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        raise ValueError(f"{quantity!r} is no quantity of memory; write it as 512Mi or 2Gi")
    number, binary, decimal, exponent = found.groups()
    scale = Decimal(_BINARY[binary]) if binary else _DECIMAL[decimal] if decimal else Decimal(10) ** int(exponent or 0)
    return Decimal(number) * scale


def _grown(values: Mapping[str, Any], times: int, growth: MemoryGrowth) -> dict[str, Any]:
    if "memory" not in values:
        return dict(values)
    before = in_bytes(values["memory"])
    return {**values, "memory": _mebibytes(min(before * growth.factor**times, max(before, in_bytes(growth.limit))))}


def _scaled(values: Mapping[str, str], factor: Decimal) -> dict[str, str]:
    scaled = dict(values)
    if "memory" in values:
        scaled["memory"] = _mebibytes(_number(values["memory"]) * factor)
    if "cpu" in values:
        scaled["cpu"] = f"{math.ceil(_number(values['cpu']) * factor * 1000)}m"
    return scaled


def _mebibytes(size: float | Decimal) -> str:
    return f"{math.ceil(size / 2**20)}Mi"
