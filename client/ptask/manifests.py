"""Tasks that are to be created: out of files, standard input and flags. What is wrong is told by file and field."""

import glob
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from ptask.outcomes import CommandError, Exit
from task_contract import names
from task_contract.errors import InvalidTask
from task_contract.models import Spec, parse_manifest

_ALPHABET: Final = "bcdfghjklmnpqrstvwxz2456789"  # that of Kubernetes: no words come out of it
_SUFFIX: Final = 5
_LARGEST: Final = 64 * 1024 * 1024  # bytes of one file; a task has 64 KiB at most
_SPEC_FIELDS: Final = {info.alias or name for name, info in Spec.model_fields.items()}


@dataclass(frozen=True, slots=True)
class Draft:
    """A task that is to be created."""

    where: str
    """For messages: ``tasks.yaml: document 2``."""
    name: str
    namespace: str | None
    """None: that of the command."""
    spec: Mapping[str, Any]
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    def manifest(self, namespace: str) -> dict[str, Any]:
        """Return it as a manifest."""
        metadata: dict[str, Any] = {"name": self.name, "namespace": self.namespace or namespace}
        metadata |= {"labels": dict(self.labels)} if self.labels else {}
        metadata |= {"annotations": dict(self.annotations)} if self.annotations else {}
        return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": metadata, "spec": dict(self.spec)}


def refused(message: str) -> CommandError:
    """Return the error of a command line or file that is wrong."""
    return CommandError(message, code=Exit.USAGE)


# -------------------------------------------------------------------------------------------------------------- files


def read(sources: Sequence[str]) -> list[Draft]:
    """Return the tasks of files, folders, patterns and ``-`` for standard input. Raises :class:`CommandError`."""
    drafts = [draft for path, text in _texts(sources) for draft in parse(text, where=path)]
    _unique(drafts)
    return drafts


def _texts(sources: Sequence[str]) -> Iterator[tuple[str, str]]:
    for source in sources:
        if source == "-":
            yield "standard input", sys.stdin.read()
            continue
        for path in _paths(source):
            try:
                if path.stat().st_size > _LARGEST:
                    raise refused(f"cannot read {path}: it has more than {_LARGEST // 2**20} MiB; is it a manifest?")
                yield str(path), path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise refused(f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the path") from error


def _paths(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        found = sorted(one for one in path.iterdir() if one.suffix in {".yaml", ".yml", ".json"} and one.is_file())
        if not found:
            raise refused(f"cannot submit {source}: the folder holds no .yaml, .yml or .json file")
        return found
    if path.exists() or not glob.has_magic(source):
        return [path]
    # A pattern that the shell did not expand: it was quoted, or matches nothing.
    matches = sorted(Path(match) for match in glob.glob(source, recursive=True))  # noqa: PTH207 - ** and absolute patterns
    if not matches:
        raise refused(f"cannot submit {source}: no file matches the pattern")
    return matches


def parse(text: str, *, where: str) -> list[Draft]:
    """Return the tasks of a text: YAML with any number of documents, JSON, Lists. Raises :class:`CommandError`."""
    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" at line {mark.line + 1}, column {mark.column + 1}"
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise refused(f"cannot read {where}: it is neither YAML nor JSON{place}: {what}") from error
    drafts = []
    for number, document in enumerate(documents, 1):
        place = where if len(documents) == 1 else f"{where}: document {number}"
        if isinstance(document, dict) and str(document.get("kind", "")).endswith("List") and "items" in document:
            items = document["items"] if isinstance(document["items"], list) else []
            drafts += [_draft(item, f"{place}: item {index}") for index, item in enumerate(items, 1)]
        else:
            drafts.append(_draft(document, place))
    if not drafts:
        raise refused(f"cannot submit {where}: it holds no task; see `ptask submit --help`")
    return drafts


def _draft(document: Any, where: str) -> Draft:
    if not isinstance(document, dict):
        raise refused(f"cannot read {where}: it is no manifest but a {type(document).__name__}; give a ProcessingTask")
    if (document.get("apiVersion"), document.get("kind")) != (names.API_VERSION, names.KIND):
        said = f"apiVersion {document.get('apiVersion')}, kind {document.get('kind')}"
        raise refused(
            f"cannot submit {where}: it has {said}; ptask takes {names.API_VERSION} {names.KIND}, kubectl the rest"
        )
    if unknown := document.keys() - {"apiVersion", "kind", "metadata", "spec", "status"}:
        raise refused(f"cannot read {where}: {min(map(str, unknown))}: is no field of a task; correct or remove it")
    metadata = document.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise refused(f"cannot read {where}: metadata: is no object")
    spec = document.get("spec") or {}
    if not isinstance(spec, dict):
        raise refused(f"cannot read {where}: spec: is no object")
    name = metadata.get("name") or _generated(metadata.get("generateName"))
    if name is None:
        raise refused(f"cannot submit {where}: metadata.name: is missing; set it, or metadata.generateName")
    texts = {part: {str(key): str(value) for key, value in (metadata.get(part) or {}).items()} for part in _TEXTS}
    draft = Draft(
        where=where,
        name=str(name),
        namespace=metadata.get("namespace"),
        spec=spec,
        labels=texts["labels"],
        annotations=texts["annotations"],
    )
    return checked(draft)


_TEXTS: Final = ("labels", "annotations")


def labelled(draft: Draft, labels: Mapping[str, str]) -> Draft:
    """Return a draft with labels of the command line, which go before its own."""
    return replace(draft, labels={**draft.labels, **labels})


def checked(draft: Draft) -> Draft:
    """Return a draft whose fields are those of the contract. Raises :class:`CommandError` that names each bad one."""
    try:
        parse_manifest(draft.manifest("default"))
    except InvalidTask as error:
        raise refused(f"cannot submit {draft.where}: {error.message.removeprefix('cannot read the task: ')}") from error
    return draft


def _generated(prefix: Any) -> str | None:
    return None if not prefix else f"{prefix}{suffix()}"


def suffix() -> str:
    """Return the end of a generated name. Chosen here and not by the cluster, so that a create may be repeated."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_SUFFIX))


def _unique(drafts: Sequence[Draft]) -> None:
    seen: dict[tuple[str | None, str], str] = {}
    for draft in drafts:
        if other := seen.get((draft.namespace, draft.name)):
            raise refused(f"cannot submit {draft.where}: {other} has a task {draft.name} too; names are unique")
        seen[draft.namespace, draft.name] = draft.where


# -------------------------------------------------------------------------------------------------------------- flags


def from_flags(
    *,
    kind: str | None,
    kb: str | None,
    documents: Sequence[str],
    name: str | None,
    priority: str | None,
    sets: Sequence[str],
    labels: Mapping[str, str],
) -> list[Draft]:
    """Return a task, or one for each document. Raises :class:`CommandError`."""
    kind = kind or ("document_processing" if documents else None)
    if kind is None:
        raise refused("cannot submit nothing: give manifests with --filename, or --document, or --type")
    if name is not None and len(documents) > 1:
        raise refused(f"cannot give {len(documents)} tasks the name {name}: leave --name out, or give one --document")
    spec: dict[str, Any] = {"type": kind}
    spec |= {"kbId": kb} if kb else {}
    spec |= {"priority": priority} if priority else {}
    for one in sets:
        _set(spec, one)
    drafts = []
    for document in documents or (None,):
        own = spec
        if document is not None:
            own = spec | {"payload": {"filePath": document, **spec.get("payload", {})}}
        drafts.append(
            checked(
                Draft(
                    where=f"--document {document}" if document is not None else f"--type {kind}",
                    name=name or f"{readable(document or kind)}-{suffix()}",
                    namespace=None,
                    spec=own,
                    labels=labels,
                )
            )
        )
    return drafts


def _set(spec: dict[str, Any], assignment: str) -> None:
    """Enter ``payload.chunkSize=500``; without a dot, and no field of the spec, it is one of the payload."""
    path, found, text = assignment.partition("=")
    if not found or not path:
        raise refused(f"cannot use --set {assignment}: write FIELD=VALUE, such as chunkSize=500 or timeout=10m")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise refused(f"cannot use --set {assignment}: {text!r} is no YAML value; quote it") from error
    *folders, last = path.removeprefix("spec.").split(".")
    if not folders and last not in _SPEC_FIELDS:
        folders = ["payload"]
    place = spec
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise refused(f"cannot use --set {assignment}: {folder} is set to a value already")
    place[last] = value


def labels_of(given: Sequence[str]) -> dict[str, str]:
    """Return ``KEY=VALUE`` as labels. Raises :class:`CommandError`."""
    labels = {}
    for one in given:
        key, found, value = one.partition("=")
        if not found or not key:
            raise refused(f"cannot use --label {one}: write KEY=VALUE")
        labels[key] = value
    return labels


def readable(text: str) -> str:
    """Return the part of a name that tells what it is about."""
    stem = text.rstrip("/").rpartition("/")[2]
    stem = stem.rpartition(".")[0] or stem
    kept = "".join(char if char.isascii() and char.isalnum() else "-" for char in stem.lower())
    return "-".join(part for part in kept.split("-") if part)[:40] or "task"
