"""Passwords of the stores: random, made at first use, and kept in the state folder, readable by its owner alone."""

import os
import secrets
from pathlib import Path

from devstack.cache import state_dir
from devstack.stores.common import write_private


def password(name: str) -> str:
    """Return the password called NAME: 32 hexadecimal digits, so that it needs no quoting in a URL or a file.

    It is made on first use and is on disk before anyone gets to see it; two that make it at once get the same.
    """
    path = _folder() / name
    try:
        return path.read_text()
    except FileNotFoundError:
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    new = _folder() / f".{name}.{secrets.token_hex(4)}"
    write_private(new, secrets.token_hex(16))
    try:
        os.link(new, path)  # unlike a rename it never replaces a password that may be in use already
    except FileExistsError:
        pass
    finally:
        new.unlink()
    return path.read_text()


def _folder() -> Path:
    return state_dir() / "passwords"
