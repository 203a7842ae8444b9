"""Vectors as files: ``.npy`` (float32 of shape (n, dimension)), ``.jsonl`` (a line each) and ``.parquet``.

A file is written from front to back and read in windows: memory does not grow with the number of vectors.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from job_runner.fetch import Opened
from job_runner.outputs import Output
from job_runner.rows import records
from task_contract.errors import DocumentRefused, DocumentUnreadable

if TYPE_CHECKING:
    import numpy.typing as npt

_OPTIONS: Final = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
_READ: Final = 1024
"""Vectors that are read at once."""


Sink = Callable[[Sequence[str | None], "npt.NDArray[np.float32]"], None]
"""Takes vectors in their order, of shape (n, dimension), with the n ids of their rows."""


def writing(output: Output, *, count: int, dimension: int) -> AbstractContextManager[Sink]:
    """Return what writes so many vectors in the format of the file's suffix; all is written when the block ends well.

    Raises DocumentRefused for Parquet without pyarrow, as early as the block begins.
    """
    suffix = output.path.rpartition(".")[2]
    if suffix == "parquet":
        return _parquet(output, dimension=dimension)
    return _npy(output, count=count, dimension=dimension) if suffix == "npy" else _lines(output)


@contextmanager
def _npy(output: Output, *, count: int, dimension: int) -> Iterator[Sink]:
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, dimension)}
    np.lib.format.write_array_header_1_0(header, shape)
    output.write(header.getvalue())

    def write(_: Sequence[str | None], vectors: "npt.NDArray[np.float32]") -> None:
        output.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())

    yield write


@contextmanager
def _lines(output: Output) -> Iterator[Sink]:
    row = 0

    def write(ids: Sequence[str | None], vectors: "npt.NDArray[np.float32]") -> None:
        nonlocal row
        lines = []
        for key, vector in zip(ids, np.ascontiguousarray(vectors), strict=True):
            row += 1
            named = {"row": row} if key is None else {"row": row, "id": key}
            lines.append(orjson.dumps(named | {"vector": vector}, option=_OPTIONS))
        output.write(b"".join(lines))

    yield write


class _File(io.RawIOBase):
    """An output as pyarrow wants a file to be."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._output.write(bytes(data))


@contextmanager
def _parquet(output: Output, *, dimension: int) -> Iterator[Sink]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DocumentRefused(
            f"cannot write {output.path}: this runner's image has no pyarrow; choose .npy or .jsonl, or an image with the "
            "extra 'parquet'"
        ) from None
    schema = pyarrow.schema([("id", pyarrow.string()), ("vector", pyarrow.list_(pyarrow.float32(), dimension))])
    with parquet.ParquetWriter(_File(output), schema, compression="none", use_dictionary=False) as writer:

        def write(ids: Sequence[str | None], vectors: "npt.NDArray[np.float32]") -> None:
            numbers = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
            columns = [
                pyarrow.array(list(ids), pyarrow.string()),
                pyarrow.FixedSizeListArray.from_arrays(numbers, dimension),
            ]
            writer.write_batch(pyarrow.record_batch(columns, schema=schema))

        yield write


def reading(file: Opened, *, count: int, dimension: int) -> Iterator["npt.NDArray[np.float32]"]:
    """Yield the vectors that :func:`writing` has written. Raises DocumentUnreadable for another number of them."""
    found = 0
    for vector in _npy_vectors(file, dimension) if file.name.endswith(".npy") else _record_vectors(file):
        found += 1
        yield vector
    if found != count:
        raise DocumentUnreadable(f"cannot read {file.name}: it has {found} vectors and not {count}; make it again")


def _npy_vectors(file: Opened, dimension: int) -> Iterator["npt.NDArray[np.float32]"]:
    with open(file.descriptor, "rb", closefd=False) as opened:
        opened.seek(0)
        np.lib.format.read_magic(opened)
        np.lib.format.read_array_header_1_0(opened)
        while data := opened.read(_READ * dimension * 4):
            yield from np.frombuffer(data, dtype="<f4").reshape(-1, dimension).astype(np.float32)


def _record_vectors(file: Opened) -> Iterator["npt.NDArray[np.float32]"]:
    for record in records(file, ["vector"]):
        yield np.asarray(record.fields["vector"], dtype=np.float32)
