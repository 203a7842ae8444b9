"""Where the devstack keeps things: a cache of builds, keyed by what they are built from, and the state of what runs.

Nothing here is lost or half done when a process dies: a build appears in the cache by one rename, after it is
complete and on disk; before that it lies under a temporary name that the next builder of the same thing removes.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from devstack.progress import say


def cache_dir() -> Path:
    """Folder of everything that can be built again: `DEVSTACK_CACHE`, by default `~/.cache/processing-tasks`."""
    return Path(os.environ.get("DEVSTACK_CACHE") or Path.home() / ".cache" / "processing-tasks").absolute()


def state_dir() -> Path:
    """Folder of what runs now: `DEVSTACK_STATE`, by default `/var/lib/processing-tasks-devstack`. `down` empties it.

    An ordinary user's is `~/.local/state/processing-tasks-devstack`.
    """
    own = Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local" / "state"
    return Path(os.environ.get("DEVSTACK_STATE") or own / "processing-tasks-devstack").absolute()


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Hold the lock file PATH; say WAITING once when another process holds it. The kernel frees it when we die."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:  # Python opens close-on-exec: no daemon started below inherits the lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"    {waiting}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(inputs: Iterable[bytes | Path]) -> str:
    """Sixteen hex digits that change when any input does: bytes, a file's content, or a folder's names and contents.

    Every item is framed by its length, so that no two different lists of inputs read the same. What Python compiles
    (`__pycache__`) is not part of a folder's content.
    """
    total = hashlib.sha256()

    def add(item: bytes) -> None:
        total.update(len(item).to_bytes(8, "big"))
        total.update(item)

    for entry in inputs:
        if isinstance(entry, bytes):
            add(entry)
        elif entry.is_dir():
            files = sorted(p for p in entry.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            add(b"folder %d" % len(files))
            for file in files:
                add(os.fsencode(file.relative_to(entry)))
                add(file.read_bytes())
        else:
            add(entry.read_bytes())
    return total.hexdigest()[:16]


def cached(name: str, inputs: Iterable[bytes | Path], build: Callable[[Path], None], *, keep: int | None = None) -> Path:
    """Return the file or folder `CACHE/build/NAME-HASH`, calling BUILD with the path to create when it is not there.

    One process at a time builds a thing; others wait for it. What an interrupted builder left is removed by the next.
    With KEEP only the newest so many things of this name stay in the cache, the returned one among them.
    """
    folder = cache_dir() / "build"
    final = folder / f"{name}-{digest(inputs)}"
    if not final.exists():
        with locked(folder / ".lock" / final.name, f"another process is building {name}: waiting for it"):
            if not final.exists():
                for left in folder.glob(f".{final.name}.*"):
                    _remove(left)
                # A fresh name each time: a build's child process may outlive its killed parent and go on writing.
                temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=folder))
                try:
                    build(temporary / "it")
                    os.sync()  # a rename may reach the disk before the data that it names
                    (temporary / "it").rename(final)
                finally:
                    _remove(temporary)
    if keep is not None:
        os.utime(final)
        hashed = (p for p in folder.glob(f"{name}-*") if len(p.name) == len(name) + 17)
        for old in sorted(hashed, key=_last_used, reverse=True)[keep:]:
            _remove(old)
    return final


def _last_used(path: Path) -> float:
    """When a thing was last asked for; one that another process has removed since it was listed is the oldest."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def _remove(path: Path) -> None:
    """Delete a file or folder; one that is gone already is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
