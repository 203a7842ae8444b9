"""Environments of their own beside ``.venv``, for tests of libraries that nobody should need for ``make test``.

One lies in the cache, named by a hash of its lock file in `requirements`. What the tests need besides is added on each run,
which takes a second where it is there; its lock file is made within the versions of `requirements/dev.txt`.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devstack.cache import cache_dir, cached, locked
from devstack.process import run
from devstack.progress import DevstackError, step

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "requirements/dev.txt"


@dataclass(frozen=True)
class Environment:
    """An environment and the tests that run in it."""

    name: str
    """In the cache, and of its lock file."""
    what: str
    """What messages call it."""
    installing: str
    """What is installed, and how large the download is."""
    needed: int
    """Bytes on the disk: its files, and what the download of one of them takes meanwhile."""
    tests: tuple[str, ...]

    @property
    def lock(self) -> Path:
        """Its lock file."""
        return ROOT / f"requirements/{self.name}.txt"

    def python(self) -> Path:
        """Return the interpreter of the environment, made if it is not there. Raises DevstackError."""
        uv = Path(sys.executable).with_name("uv")

        def build(folder: Path) -> None:
            downloads = Path(run([uv, "cache", "dir"], doing="find uv's cache").strip())
            for place in {cache_dir(), downloads}:
                self.require_space(place, free=shutil.disk_usage(existing(place)).free)
            # uv links files from its cache where it can: an environment that follows another costs seconds and little space.
            making = f"make an environment for {self.what}"
            run([uv, "venv", "--relocatable", "--python", sys.executable, folder], doing=making)
            with step(f"installing {self.installing}"):
                self._install(uv, folder, self.lock)

        folder = cached(self.name, [self.lock], build, keep=1)
        waiting = f"another process adds to the environment of {self.what}: waiting for it"
        with locked(folder.parent / ".lock" / f"{self.name}-tools", waiting):
            self._install(uv, folder, self.lock, TOOLS)
        return folder / "bin/python"

    def require_space(self, place: Path, *, free: int) -> None:
        """Raise DevstackError if there are fewer bytes FREE at PLACE than the environment takes."""
        if free < self.needed:
            raise DevstackError(
                f"cannot install {self.what}: it takes {self.needed / 1e9:.0f} GB in {place}, and {free / 1e9:.1f} GB are "
                "free; make room, or name a folder on another disk with DEVSTACK_CACHE and UV_CACHE_DIR"
            )

    def run_tests(self, arguments: Sequence[str]) -> int:
        """Run pytest there, with ARGUMENTS as options; return its exit status."""
        try:
            python = self.python()
        except DevstackError as error:
            print(error, file=sys.stderr)
            return 1
        return subprocess.run([str(python), "-m", "pytest", *arguments, *self.tests], cwd=ROOT, check=False).returncode

    def _install(self, uv: Path, folder: Path, *locks: Path) -> None:
        """Install the libraries of LOCKS where they are missing; uv says itself what it downloads."""
        requirements = [part for lock in locks for part in ("--requirements", str(lock))]
        command = [str(uv), "pip", "install", "--require-hashes", f"--python={folder}/bin/python", *requirements]
        if subprocess.run(command, check=False).returncode != 0:
            raise DevstackError(
                f"cannot install {self.what}: uv says why above; check the network, the package index "
                "(UV_DEFAULT_INDEX) and the room on the disk, and run this again: what was downloaded is kept"
            )


def existing(path: Path) -> Path:
    """Return the nearest folder above PATH that exists, or PATH."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
