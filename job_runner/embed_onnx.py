"""Usual models of sentence-transformers by ONNX Runtime, from a folder: the only module that knows that library.

It is an extra (``requirements/onnx.txt``) of a twentieth of PyTorch's size. The folder is that of the model with
``model.onnx`` in it, or in its folder ``onnx``, as model hubs, optimum and :mod:`job_runner.export_onnx` write it: token
vectors come out of it, and what sentence-transformers does before and after is done here, from the same files of settings.
What the files ask for beyond that (dense layers, other pooling) is refused rather than left out.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from job_runner.embed import normalized
from job_runner.model_folder import (
    REMEDY,
    batch_tokens,
    counter,
    damaged,
    digest_of,
    max_tokens_with_special,
    onnx_file,
    pooling,
    read,
    settings_files,
)
from task_contract.errors import ModelUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_POOLINGS: Final = ("mean", "cls")
_TOKEN_VECTORS: Final = ("token_embeddings", "last_hidden_state")
_PROVIDERS: Final = ("CUDAExecutionProvider", "CPUExecutionProvider")
_INPUTS: Final = frozenset({"input_ids", "attention_mask", "token_type_ids"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done around the transformer."""

    pooling: str
    """``mean`` or ``cls``."""
    dimension: int
    max_length: int | None
    """Tokens that are read, with those added around a text; ``None``: no limit."""
    lower: bool
    query_prompt: str
    document_prompt: str
    """Prefixes; those of other names are no business of documents and questions, as for sentence-transformers."""


class OnnxEmbedder:
    """The model in a folder. Its name is the folder's.

    Raises ModelUnavailable, at the latest when it is loaded, for a folder that is damaged or asks for what is not done here.
    """

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        self._folder = folder
        self.name = folder.name
        self._threads = threads
        model = onnx_file(folder)
        if model is None:
            raise ModelUnavailable(
                f"cannot load the embedding model {self.name!r}: no onnx/model.onnx or model.onnx in {folder}; make one "
                f"with python -m job_runner.export_onnx (docs/images.md), or {REMEDY}"
            )
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModelUnavailable(
                f"cannot load the embedding model {self.name!r}: this image has no ONNX Runtime; build the runner's image "
                f"with requirements/onnx.txt (docs/images.md), or {REMEDY}"
            )
        self._file = model
        self._loaded: _Loaded | None = None
        self._loading = threading.Lock()

    @cached_property
    def _recipe(self) -> Recipe:
        try:
            return recipe_of(self._folder)
        except ModelUnavailable:
            raise
        except Exception as error:  # files of others may lack or hold anything
            raise damaged(self.name, self._folder, error) from error

    @property
    def dimension(self) -> int:
        """Length of a vector, from the files."""
        return self._recipe.dimension

    @cached_property
    def max_tokens(self) -> int | None:
        """Longest text that is read whole, likewise; what is longer is cut."""
        if self._recipe.max_length is None:
            return None
        try:
            special: int = _tokenizer(self._folder).num_special_tokens_to_add(is_pair=False)
        except Exception as error:
            raise damaged(self.name, self._folder, error) from error
        return self._recipe.max_length - special

    @cached_property
    def fingerprint(self) -> str:
        """Hash over the model, configuration and tokenizer, so that copies of a folder are comparable.

        Descriptions do not count. Not that of the same model under sentence-transformers: both round differently.
        """
        return f"onnx-{digest_of(self._folder, [*self._weights(), *settings_files(self._folder)])}"

    def _weights(self) -> list[Path]:
        """Return the model's file and those with the weights that did not fit into it (model.onnx.data, model.onnx_data)."""
        return sorted(self._file.parent.glob(f"{self._file.name}*"))

    @property
    def batch_tokens(self) -> int:
        """By the size of the weights. Asked of a loaded model, where it takes in whether there is a GPU."""
        on_gpu = self._loaded is not None and self._loaded.session.get_providers()[0] != _PROVIDERS[-1]
        return batch_tokens(self._weights(), threads=self._threads, on_gpu=on_gpu)

    def warm_up(self) -> None:
        """Load model and tokenizer: a second and less, 80 MB and the weights."""
        with self._loading:
            if self._loaded is not None:
                return
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            try:
                self._loaded = _load(self._folder, self._file, threads=self._threads, recipe=self._recipe)
            except (MemoryError, ModelUnavailable):
                raise  # the first says nothing about the model, the second all
            except Exception as error:
                raise damaged(self.name, self._folder, error) from error

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens that the model's own tokenizer makes of a text, however long."""
        return self._ready().count(self._prepared(text, prompt=""))

    def embed(self, texts: Sequence[str]) -> "npt.NDArray[np.float32]":
        """Return one vector a text, with the prefix for documents where the model has one ("passage: ")."""
        return self._encode(texts, prompt=self._recipe.document_prompt)

    def embed_query(self, text: str) -> "npt.NDArray[np.float32]":
        """Return the vector of a question, with the prefix for questions where the model has one ("query: ")."""
        vector: npt.NDArray[np.float32] = self._encode([text], prompt=self._recipe.query_prompt)[0]
        return vector

    def _ready(self) -> "_Loaded":
        self.warm_up()
        assert self._loaded is not None  # noqa: S101 - for the type checker: warm_up has set it
        return self._loaded

    def _prepared(self, text: str, *, prompt: str) -> str:
        text = f"{prompt}{text}".strip()  # as sentence-transformers does
        return text.lower() if self._recipe.lower else text

    def _encode(self, texts: Sequence[str], *, prompt: str) -> "npt.NDArray[np.float32]":
        import numpy as np

        loaded = self._ready()
        if not texts:
            return np.empty((0, self.dimension), dtype=np.float32)
        found = loaded.tokenizer.encode_batch([self._prepared(text, prompt=prompt) for text in texts])
        columns = {
            "input_ids": np.array([one.ids for one in found], dtype=np.int64),
            "attention_mask": np.array([one.attention_mask for one in found], dtype=np.int64),
            "token_type_ids": np.array([one.type_ids for one in found], dtype=np.int64),
        }
        [tokens] = loaded.session.run([loaded.output], {name: columns[name] for name in loaded.inputs})
        if self._recipe.pooling == "cls":
            pooled = tokens[:, 0].astype(np.float32)
        else:
            weights = columns["attention_mask"][:, :, None].astype(np.float32)
            pooled = (tokens.astype(np.float32) * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1e-9)
        return normalized(pooled, dimension=self.dimension)


@dataclass(frozen=True, slots=True)
class _Loaded:
    session: Any
    output: str
    inputs: tuple[str, ...]
    tokenizer: Any
    """Cuts at the model's limit and pads to the longest text."""
    count: Callable[[str], int]


def _load(folder: Path, file: Path, *, threads: int, recipe: Recipe) -> _Loaded:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # it would report its use to its maker from the moment it is imported
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what fails is raised; standard error is for logs, in JSON
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other pods want the CPU
    providers = providers_of(onnxruntime.get_available_providers())
    session = onnxruntime.InferenceSession(str(file), options, providers=providers)
    inputs = tuple(one.name for one in session.get_inputs())
    outputs = [one.name for one in session.get_outputs()]
    output = next((name for name in _TOKEN_VECTORS if name in outputs), outputs[0])
    if unknown := set(inputs) - _INPUTS:
        raise ValueError(f"{file.name} asks for {', '.join(sorted(unknown))}, which only its own library knows")
    tokenizer = _tokenizer(folder)
    count = counter(_tokenizer(folder))
    if recipe.max_length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(recipe.max_length)
    number, token = _padding(folder, tokenizer)
    tokenizer.enable_padding(pad_id=number, pad_token=token)
    return _Loaded(session, output, inputs, tokenizer, count)


def providers_of(available: Collection[str]) -> list[str]:
    """Return what ONNX Runtime is to compute with, of what it can: a GPU before the CPU."""
    return [name for name in _PROVIDERS if name in available]


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _padding(folder: Path, tokenizer: Any) -> tuple[int, str]:
    """Return number and text of the token that fills up shorter texts."""
    if (present := tokenizer.padding) is not None:
        return present["pad_id"], present["pad_token"]
    settings = folder / "tokenizer_config.json"
    token = read(settings).get("pad_token") if settings.is_file() else None
    token = token["content"] if isinstance(token, dict) else token or "[PAD]"
    return tokenizer.token_to_id(token) or 0, token  # what it is does not matter: it is masked


def recipe_of(folder: Path) -> Recipe:
    """Read the files of a folder. Raises ModelUnavailable for what they ask for and is not done here."""
    transformer, width, modes = folder, read(folder / "config.json").get("hidden_size"), ["mean"]
    modules = folder / "modules.json"  # without it, sentence-transformers takes the mean too
    for module in read(modules) if modules.is_file() else ():
        kind, place = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Transformer":
            transformer = place
        elif kind == "Pooling":
            width, modes = pooling(place)
            if read(place / "config.json").get("include_prompt") is False:
                raise _not_done(folder, "its pooling leaves prompts out")
        elif kind != "Normalize":
            raise _not_done(folder, f"it has a module {kind}")
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _not_done(folder, f"its pooling is {' and '.join(modes)}")
    if not isinstance(width, int):
        raise _not_done(folder, "its files do not tell the length of its vectors")
    overall = folder / "config_sentence_transformers.json"
    settings = read(overall) if overall.is_file() else {}
    if settings.get("truncate_dim") is not None:
        raise _not_done(folder, "it cuts its vectors")
    bert = transformer / "sentence_bert_config.json"
    prompts = settings.get("prompts") or {}
    return Recipe(
        pooling=modes[0],
        dimension=width,
        max_length=max_tokens_with_special(transformer),
        lower=bool(bert.is_file() and read(bert).get("do_lower_case")),
        query_prompt=prompts.get("query") or "",
        document_prompt=prompts.get("document") or "",
    )


def _not_done(folder: Path, why: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"cannot load the embedding model {folder.name!r} with ONNX Runtime: {why}, which sentence-transformers alone does; "
        f"build the runner's image with requirements/torch.txt (docs/images.md), or {REMEDY}"
    )
