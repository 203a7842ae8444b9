"""``make test-torch``: the tests of sentence-transformers, in an environment of its own beside ``.venv``.

PyTorch is a download of 3 GB and 6 GB on disk, which nobody should need for ``make test``. The environment lies in the
cache, named by a hash of `requirements/torch.txt`. What the tests need besides is added on each run, which takes a second
where it is there; `requirements/torch.txt` is locked within the versions of `requirements/dev.txt`.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from devstack.cache import cache_dir, cached, locked
from devstack.process import run
from devstack.progress import DevstackError, step

ROOT = Path(__file__).resolve().parents[2]
TORCH, TOOLS = ROOT / "requirements/torch.txt", ROOT / "requirements/dev.txt"
TESTS = ("tests/unit/test_runner_embed.py", "tests/torch")
NEEDED = 7 * 10**9
"""Bytes: 5.9 GB of files, and what the download of one of them takes meanwhile."""


def environment() -> Path:
    """Return the interpreter of the environment, made if it is not there. Raises DevstackError."""
    uv = Path(sys.executable).with_name("uv")

    def build(folder: Path) -> None:
        downloads = Path(run([uv, "cache", "dir"], doing="find uv's cache").strip())
        for place in {cache_dir(), downloads}:
            require_space(place, free=shutil.disk_usage(existing(place)).free)
        # uv links files from its cache where it can: an environment that follows another costs seconds and little space.
        run([uv, "venv", "--relocatable", "--python", sys.executable, folder], doing="make an environment for PyTorch")
        with step("installing PyTorch and sentence-transformers (the first time: 3 GB to download)"):
            install(uv, folder, TORCH)

    folder = cached("torch", [TORCH], build, keep=1)
    with locked(
        folder.parent / ".lock" / "torch-tools", "another process adds to the environment of PyTorch: waiting for it"
    ):
        install(uv, folder, TORCH, TOOLS)
    return folder / "bin/python"


def install(uv: Path, folder: Path, *locks: Path) -> None:
    """Install the libraries of LOCKS where they are missing; uv says itself what it downloads."""
    requirements = [part for lock in locks for part in ("--requirements", str(lock))]
    command = [str(uv), "pip", "install", "--require-hashes", f"--python={folder}/bin/python", *requirements]
    if subprocess.run(command, check=False).returncode != 0:
        raise DevstackError(
            "cannot install PyTorch: uv says why above; check the network, the package index (UV_DEFAULT_INDEX) and the "
            "room on the disk, and run this again: what was downloaded is kept"
        )


def require_space(place: Path, *, free: int) -> None:
    """Raise DevstackError if there are fewer bytes FREE at PLACE than the environment takes."""
    if free < NEEDED:
        raise DevstackError(
            f"cannot install PyTorch: it takes {NEEDED / 1e9:.0f} GB in {place}, and {free / 1e9:.1f} GB are free; make "
            "room, or name a folder on another disk with DEVSTACK_CACHE and UV_CACHE_DIR"
        )


def existing(path: Path) -> Path:
    """Return the nearest folder above PATH that exists, or PATH."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def main(arguments: Sequence[str]) -> int:
    """Run pytest there, with ARGUMENTS as options, on the tests of this package and the contract of all models."""
    try:
        python = environment()
    except DevstackError as error:
        print(error, file=sys.stderr)
        return 1
    return subprocess.run([str(python), "-m", "pytest", *arguments, *TESTS], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
