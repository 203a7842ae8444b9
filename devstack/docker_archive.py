"""Container images as files, as `docker save` writes them: made without a container tool, and weighed by package."""

import csv
import hashlib
import io
import json
import platform
import posixpath
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ENVIRONMENT = "/opt/venv/"
BASE = "(base)"
"""What :func:`weigh` calls everything outside the virtual environment."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def write_image(archive: Path, reference: str, files: Mapping[str, Path], *, entrypoint: Sequence[str]) -> None:
    """Write the image REFERENCE of the executable FILES (path in the image: file) to ARCHIVE."""
    layer = archive.with_name(archive.name + ".layer")
    with tarfile.open(layer, "w") as tar:
        for name, file in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = file.stat().st_size, 0o755
            with file.open("rb") as content:
                tar.addfile(info, content)
    write_archive(archive, reference, layer, config={"Entrypoint": list(entrypoint)})
    layer.unlink()


def write_archive(archive: Path, reference: str, layer: Path, *, config: Mapping[str, Any]) -> None:
    """Write the image REFERENCE of one LAYER (a tar file) to ARCHIVE, with CONFIG added to what runs in it."""
    with layer.open("rb") as content:
        layer_digest = hashlib.file_digest(content, "sha256").hexdigest()
    machine = platform.machine()
    image = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {"Env": [f"PATH={_PATH}", "LANG=C.UTF-8"], "WorkingDir": "/", **config},
            # buildah refuses to cache the layers of an image whose history does not tell of each.
            "history": [{"created_by": "devstack"}],
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        }
    ).encode()
    name = hashlib.sha256(image).hexdigest() + ".json"
    manifest = json.dumps([{"Config": name, "RepoTags": [reference], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(archive, "w") as tar:
        for path, data in ((name, image), ("manifest.json", manifest)):
            info = tarfile.TarInfo(path)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.add(layer, "layer.tar")


def weigh(archive: Path) -> dict[str, int]:
    """Return the bytes of each Python distribution in the image's virtual environment, and of the rest (:data:`BASE`).

    A file belongs to the distribution whose RECORD lists it, compiled or not; files of the environment that none lists
    are under "(environment)". What a later layer replaces or deletes does not count.
    """
    sizes, records = read(archive, lambda path: path.name == "RECORD" and path.parent.name.endswith(".dist-info"))
    owners = _owners(records)
    weights: dict[str, int] = {}
    for name, size in sizes.items():
        owner = owners.get(_source(name), "(environment)") if name.startswith(_ENVIRONMENT) else BASE
        weights[owner] = weights.get(owner, 0) + size
    return weights


def read(archive: Path, wanted: Callable[[PurePosixPath], bool]) -> tuple[dict[str, int], dict[str, str]]:
    """Return path -> bytes of all files of the image, and path -> text of those that are WANTED.

    What a later layer replaces or deletes is not there.
    """
    sizes: dict[str, int] = {}
    texts: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        manifest = json.load(_member(tar, "manifest.json"))
        for layer_name in manifest[0]["Layers"]:
            with tarfile.open(fileobj=_member(tar, layer_name)) as layer:
                for entry in layer:
                    path = PurePosixPath("/", entry.name)
                    if path.name == ".wh..wh..opq":
                        _forget(sizes, path.parent)
                    elif path.name.startswith(".wh."):
                        _forget(sizes, path.with_name(path.name.removeprefix(".wh.")))
                    elif entry.isfile():
                        sizes[str(path)] = entry.size
                        if wanted(path):
                            content = layer.extractfile(entry)
                            texts[str(path)] = content.read().decode() if content else ""
    return sizes, {path: text for path, text in texts.items() if path in sizes}


def _owners(records: Mapping[str, str]) -> dict[str, str]:
    """Return file -> distribution for the RECORD files given as path -> text."""
    owners = {}
    for record, text in records.items():
        folder = PurePosixPath(record).parent
        distribution = folder.name.removesuffix(".dist-info").rsplit("-", 1)[0]
        for row in csv.reader(text.splitlines()):
            owners[posixpath.normpath(folder.parent / row[0])] = distribution
    return owners


def _source(path: str) -> str:
    """Return the module that PATH was compiled from, or PATH itself."""
    file = PurePosixPath(path)
    if file.suffix == ".pyc" and file.parent.name == "__pycache__":
        return str(file.parent.parent / (file.name.split(".", 1)[0] + ".py"))
    return path


def _forget(sizes: dict[str, int], deleted: PurePosixPath) -> None:
    """Drop DELETED, a file or folder, from SIZES."""
    for path in [path for path in sizes if PurePosixPath(path).is_relative_to(deleted)]:
        del sizes[path]


def _member(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    content = tar.extractfile(name)
    if content is None:
        raise ValueError(f"cannot read {name} in the image's archive: it is no file")
    return content
