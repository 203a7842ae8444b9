"""Container images: the base made of Debian packages, and the product's images built from their Dockerfiles.

Where Docker runs it builds, from the base images that the Dockerfiles name. Elsewhere buildah builds, as root and
without a daemon, on a base of Debian packages; no container registry is needed. Either way an image ends as a
docker-archive file in the cache, named by a hash of what it is built from.
"""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from devstack import machine, node
from devstack.cache import cache_dir, cached, digest
from devstack.docker_archive import BASE, weigh, write_archive
from devstack.process import run, running
from devstack.progress import step

NAMES = ("operator", "runner")
VARIANTS = ("onnx", "ocr", "parquet")
"""What the runner may be built with beside its own libraries: each has a lock file of this name."""

_ROOT = Path(__file__).parent.parent
_REPOSITORY = "localhost/processing-tasks"
# The release whose Python the lock files are for: 3.11, as in the Dockerfiles' own base.
_SUITE = "bookworm"
_BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates", "usr-is-merged")
# /usr is merged by links from the start: the package usrmerge, which would merge it later, brings all of Perl, 47 MB.
_BASE_HOOKS = "/usr/share/mmdebstrap/hooks/merged-usr"
_UNWANTED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
_BUILD_STORAGE_LIMIT = 12 << 30  # bytes


@dataclass(frozen=True)
class Image:
    """An image by its reference, and the docker-archive file that holds it."""

    reference: str
    archive: Path


def base() -> Image:
    """Return the base image: Debian with Python, venv and CA certificates; built once, in about a minute."""
    mirror = os.environ.get("DEVSTACK_DEBIAN_MIRROR", "")
    inputs = [text.encode() for text in (_SUITE, *_BASE_PACKAGES, *_UNWANTED, _BASE_HOOKS, mirror)]
    reference = f"{_REPOSITORY}/base:{digest(inputs)}"

    def build(archive: Path) -> None:
        machine.require(["images"])
        layer = archive.with_name("layer.tar")
        with step("making the base image from Debian packages (about a minute)"):
            run(
                # Mounts that an interrupted run leaves go with their namespace.
                ["unshare", "--mount", "mmdebstrap", "--variant=minbase", f"--include={','.join(_BASE_PACKAGES)}"]
                + [f"--hook-dir={_BASE_HOOKS}"]
                + [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNWANTED]
                + [_SUITE, layer, *([mirror] if mirror else [])],
                doing="make the base image from Debian packages",
            )
        write_archive(archive, reference, layer, config={"Cmd": ["python3"]})
        layer.unlink()

    return Image(reference, cached("base", inputs, build, keep=2))


def build(tag: str | None = None) -> dict[str, Image]:
    """Build the images `operator` and `runner`; TAG is by default a hash of what each is built from.

    Raises DevstackError with the end of the build's output.
    """
    docker = docker_runs()
    return {name: _build(name, tag, docker=docker) for name in NAMES}


def build_variant(variant: str, tag: str | None = None) -> Image:
    """Build the runner with the libraries of one of VARIANTS. Raises DevstackError as :func:`build`."""
    return _build("runner", tag, docker=docker_runs(), variant=variant)


def build_images(tag: str | None = None) -> dict[str, str]:
    """Build the images, load them into the node when it runs, and return name -> reference for pods."""
    images = build(tag)
    if running("containerd"):
        for image in images.values():
            import_image(image)
    return {name: image.reference for name, image in images.items()}


def import_image(image: Image) -> None:
    """Load IMAGE into the running node, unless it is there."""
    node.import_image(image.archive, image.reference)


def docker_runs() -> bool:
    """Whether a Docker daemon answers."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0


def table(images: Mapping[str, Image]) -> str:
    """Return what each image weighs, by Python distribution, in MB (10^6 bytes) of uncompressed files."""
    lines = []
    for name, image in images.items():
        weights = weigh(image.archive)
        lines.append(f"{name}: {image.reference}")
        for package, size in sorted(weights.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {package:<36}{size / 1e6:>9.1f} MB")
        total = sum(weights.values())
        lines.append(f"  {'above the base':<36}{(total - weights.get(BASE, 0)) / 1e6:>9.1f} MB")
        lines.append(f"  {'total':<36}{total / 1e6:>9.1f} MB")
    return "\n".join(lines)


def _build(name: str, tag: str | None, *, docker: bool, variant: str | None = None) -> Image:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    title = f"{name}-{variant}" if variant else name
    requirements = f"requirements/{variant or name}.txt"
    files = [f"Dockerfile.{name}", ".dockerignore", "pyproject.toml", "requirements/build.txt", requirements]
    base_argument = os.environ.get("BASE_IMAGE", "") if docker else base().reference
    inputs = [*(_ROOT / file for file in files), *(_ROOT / package for package in packages)]
    inputs_and_base = [*inputs, base_argument.encode(), b"docker" if docker else b"buildah", (tag or "").encode()]
    reference = f"{_REPOSITORY}/{title}:{tag or digest(inputs_and_base)}"
    arguments = [f"--build-arg=REQUIREMENTS={requirements}"] if variant else []

    def build(archive: Path) -> None:
        with step(f"building the image {title} (the first time: a minute or two)"):
            if docker:
                base_arguments = [f"--build-arg=BASE_IMAGE={base_argument}"] if base_argument else []
                _docker_build(name, reference, [*base_arguments, *arguments], archive)
            else:
                machine.require(["images"])
                _buildah_build(name, reference, base(), arguments, archive)

    return Image(reference, cached(f"image-{title}", inputs_and_base, build, keep=3))


def _docker_build(name: str, reference: str, arguments: Sequence[str], archive: Path) -> None:
    command = ["docker", "build", *arguments, f"--file=Dockerfile.{name}", f"--tag={reference}", "."]
    run(command, doing=f"build the image of the {name}", cwd=_ROOT)
    run(["docker", "save", f"--output={archive}", reference], doing=f"save the image of the {name}")


def _buildah_build(name: str, reference: str, base_image: Image, given: Sequence[str], archive: Path) -> None:
    storage = cache_dir() / "buildah"
    if storage.exists() and _size(storage) > _BUILD_STORAGE_LIMIT:
        shutil.rmtree(storage)  # layers of old builds; the next build makes those it needs again
    storage.mkdir(parents=True, exist_ok=True)
    # Storage of our own: nothing of another user of buildah or podman is touched. Its mounts go with their namespace.
    buildah: list[str | Path] = ["unshare", "--mount", "buildah", "--root", storage / "root", "--runroot", storage / "run"]
    buildah += ["--storage-driver=overlay"]
    doing = f"build the image of the {name}"
    arguments = [f"--build-arg=BASE_IMAGE={base_image.reference}", *given]
    if bundle := machine.ca_bundle():
        # A company's own CA, if it has one, is needed while packages are fetched; it does not reach the image.
        arguments += [f"--volume={bundle}:{bundle}:ro", f"--build-arg=PIP_CERT={bundle}"]
    run([*buildah, "pull", "--quiet", f"docker-archive:{base_image.archive}"], doing=doing)
    bud = ["bud", "--isolation=chroot", "--pull-never", "--layers", *arguments, f"--file=Dockerfile.{name}"]
    run([*buildah, *bud, f"--tag={reference}", "."], doing=doing, cwd=_ROOT)
    run([*buildah, "push", "--quiet", reference, f"docker-archive:{archive}:{reference}"], doing=doing)


def _size(folder: Path) -> int:
    listed = run(["du", "--summarize", "--block-size=1", folder], doing="measure the storage of builds")
    return int(listed.split()[0])
