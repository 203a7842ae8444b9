"""Any model of sentence-transformers, from a folder: the only module that knows that library and PyTorch.

Both are an extra (``requirements/torch.txt``), take seconds to import, and are imported when the model is loaded: what the
pipeline asks before that is read from the model's own files. Nothing here speaks to a network: a model is a folder, and
code that a model brings along is not run.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from job_runner.embed import normalized
from job_runner.model_folder import (
    REMEDY,
    Shape,
    batch_tokens,
    counter,
    damaged,
    described,
    digest_of,
    settings_files,
    weights_files,
)
from task_contract.errors import ModelUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


class SentenceTransformerEmbedder:
    """The model in a folder, as ``SentenceTransformer.save`` and the model hubs lay it out. Its name is the folder's.

    Raises ModelUnavailable, at the latest when it is loaded, for a folder that is not there, damaged, or of a kind of model
    that the library does not load by itself.
    """

    def __init__(self, folder: Path, *, name: str | None = None, threads: int = 1) -> None:
        self._folder = folder
        self._threads = threads
        self.name = name or folder.name
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ModelUnavailable(
                f"cannot load the embedding model {self.name!r}: this image has no sentence-transformers; build the "
                f"runner's image with requirements/torch.txt (docs/images.md), or {REMEDY}"
            )
        if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
            raise ModelUnavailable(
                f"cannot load the embedding model {self.name!r}: no modules.json or config.json in {folder}; put the "
                f"model's folder there (it is never downloaded), or {REMEDY}"
            )
        self._model: Any = None
        self._count: Callable[[str], int] | None = None
        self._loading = threading.Lock()

    @cached_property
    def _shape(self) -> Shape:
        try:
            found = described(self._folder)
        except Exception as error:  # files of others may lack or hold anything
            raise self._damaged(error) from error
        if found is None:
            self.warm_up()
            found = _shape_of(self._model)
        return found

    @property
    def dimension(self) -> int:
        """Length of a vector. From the files of usual models; others are loaded for it."""
        return self._shape.dimension

    @property
    def max_tokens(self) -> int | None:
        """Longest text that is read whole, likewise; what is longer is cut by the model."""
        return self._shape.max_tokens

    @cached_property
    def fingerprint(self) -> str:
        """Hash over weights, configuration and tokenizer, so that copies of a model are comparable.

        Descriptions, and the same weights in formats that are not loaded, do not count. Reads all weights: a second a GB.
        """
        return f"st-{digest_of(self._folder, [*weights_files(self._folder), *settings_files(self._folder)])}"

    @property
    def batch_tokens(self) -> int:
        """By the size of the weights. Asked of a loaded model, where it takes in whether there is a GPU."""
        on_gpu = self._model is not None and self._model.device.type != "cpu"
        return batch_tokens(weights_files(self._folder), threads=self._threads, on_gpu=on_gpu)

    def warm_up(self) -> None:
        """Import the libraries and load the model: 4 seconds and more of CPU, 700 MB and the weights."""
        with self._loading:
            if self._model is not None:
                return
            os.environ.update(_OFFLINE)  # read when huggingface_hub is imported
            try:
                import torch
                from sentence_transformers import SentenceTransformer
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()  # standard error is for logs, in JSON
                torch.set_num_threads(self._threads)
                model = SentenceTransformer(
                    str(self._folder), device=device_of(torch), local_files_only=True, trust_remote_code=False
                )
                found, expected = _shape_of(model), described(self._folder)
            except MemoryError:
                raise  # says nothing about the model
            except Exception as error:
                raise self._damaged(error) from error
            if expected not in (None, found):
                raise self._damaged(ValueError(f"its files say {expected}, the loaded model {found}"))
            self._count = _counter(model.tokenizer)
            self._model = model

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens that the model's own tokenizer makes of a text, however long."""
        self.warm_up()
        assert self._count is not None  # noqa: S101 - for the type checker: warm_up has set it
        return self._count(text)

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return one vector a text, with the prefix for documents where the model has one ("passage: ")."""
        return self._encode(list(texts), "encode_document")

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question, with the prefix for questions where the model has one ("query: ")."""
        vector: npt.NDArray[np.float32] = self._encode([text], "encode_query")[0]
        return vector

    def _encode(self, texts: list[str], method: str) -> "npt.NDArray[np.float32]":
        import numpy as np

        self.warm_up()
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        found = getattr(self._model, method)(texts, batch_size=len(texts), convert_to_numpy=True, show_progress_bar=False)
        return normalized(np.asarray(found, dtype=np.float32), dimension=self.dimension)

    def _damaged(self, error: Exception) -> ModelUnavailable:
        return damaged(self.name, self._folder, error)


def device_of(torch: Any) -> str:
    """Return where the model computes: the GPU where there is one that PyTorch can use."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _counter(tokenizer: Any) -> Callable[[str], int]:
    """Return what counts tokens: a copy of the tokenizer below the library's, which takes as long again for a sentence.

    A tokenizer that is in Python alone has nothing below.
    """
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        from tokenizers import Tokenizer

        return counter(Tokenizer.from_str(fast.to_str()))
    # verbose=False: not a warning for each text that is longer than the model reads, which is what is being found out.
    return lambda text: len(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def _shape_of(model: Any) -> Shape:
    """Return the shape of a loaded model."""
    limit = model.max_seq_length
    special = model.tokenizer.num_special_tokens_to_add(pair=False)
    # A tokenizer without a limit says 10^30.
    max_tokens = None if limit is None or limit > 1 << 31 else int(limit) - special
    return Shape(int(model.get_embedding_dimension()), max_tokens)
