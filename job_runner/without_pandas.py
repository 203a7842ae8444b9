"""Spares a process the import of pandas, which pymilvus asks for and needs for DataFrames alone.

pymilvus imports pandas in the modules of its schemas: a third of a CPU second, as much as all the rest of pymilvus, in each
pod and for nothing, since no DataFrame is ever handed to it. Of pandas it uses the class, in annotations and to ask whether
something is one; and a few functions that tell the type of a value, when it is given default values of columns.
"""

import builtins
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

_lock = threading.Lock()


class _NoFrame:
    """What ``pandas.DataFrame`` is while nobody has imported pandas: there can be no instance of it."""


class _Pandas:
    """Stands in for the package; what it has beyond the class, it takes from pandas at the first use."""

    def __getattr__(self, name: str) -> Any:
        if name == "DataFrame" and "pandas" not in sys.modules:
            return _NoFrame
        return getattr(importlib.import_module("pandas"), name)


class _Types:
    """Stands in for ``pandas.api.types``, all of whose names are functions: one that is called imports pandas."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            return getattr(importlib.import_module("pandas.api.types"), name)(*arguments)

        return call


_STAND_INS: Final[dict[str, Any]] = {"pandas": _Pandas(), "pandas.api.types": _Types()}


@contextmanager
def without_pandas(package: str) -> Iterator[None]:
    """Have the modules of PACKAGE that are imported within the block get stand-ins where they ask for pandas.

    Nobody else gets them, whatever other threads import meanwhile: hence not by way of ``sys.modules``.
    """

    def spared(
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - theirs
        locals: Mapping[str, object] | None = None,  # noqa: A002 - theirs
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name in _STAND_INS and str((globals or {}).get("__name__")).startswith(f"{package}."):
            return _STAND_INS[name]
        return imported(name, globals, locals, fromlist, level)

    with _lock:
        imported = builtins.__import__
        builtins.__import__ = spared
        try:
            yield
        finally:
            builtins.__import__ = imported
