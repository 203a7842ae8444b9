"""Models of sentence-transformers in all their shapes, whole and damaged. The contract of all models is in tests/unit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling

from job_runner.embed import Embedder, make_embedder
from job_runner.embed_torch import SentenceTransformerEmbedder
from job_runner.model_folder import described
from task_contract.errors import ModelUnavailable
from tests.torch.conftest import NAME, carried, change_json

TEXTS = ["A failed task is tried three times.", "知识库", "The meeting is on Monday."]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the model that a test may change."""
    return Path(shutil.copytree(carried(), tmp_path / "a-model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------------ whole


def test_vectors_are_those_of_the_library(original: Embedder) -> None:
    plain = SentenceTransformer(str(carried())).encode(TEXTS, normalize_embeddings=True)
    assert np.allclose(original.embed(TEXTS), plain, atol=1e-5)
    assert (original.name, original.dimension, original.max_tokens) == (NAME, 384, 254)  # 256 with begin and end


def test_a_folder_is_named_by_its_last_part_and_a_copy_is_the_same_model(original: Embedder, copy: Path) -> None:
    (copy / "README.md").write_text("something else")
    (copy / "pytorch_model.bin").write_bytes(b"the same weights in a format that is not loaded")
    (copy / "onnx").mkdir()
    (copy / "onnx" / "config.json").write_text("{}")
    linked = copy.with_name("snapshot")  # as the cache of a model hub: links to files elsewhere
    shutil.copytree(copy, linked, copy_function=lambda source, target: Path(target).symlink_to(source))
    for folder in (copy, linked):
        embedder = make_embedder(str(folder))
        assert (embedder.name, embedder.fingerprint) == (folder.name, original.fingerprint)
        assert np.array_equal(embedder.embed(TEXTS), original.embed(TEXTS))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: change_weights(folder, lambda it: it["pooler.dense.bias"].add_(1)), id="weights"),
        pytest.param(lambda folder: change_json(folder / "sentence_bert_config.json", max_seq_length=128), id="length"),
        pytest.param(
            lambda folder: change_json(folder / "1_Pooling/config.json", pooling_mode_cls_token=True), id="pooling"
        ),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{}"), id="tokenizer"),
        pytest.param(lambda folder: (folder / "vocab.txt").rename(folder / "other.txt"), id="a file's name"),
    ],
)
def test_whatever_changes_vectors_changes_the_fingerprint(
    original: Embedder, copy: Path, change: Callable[[Path], None]
) -> None:
    change(copy)
    assert SentenceTransformerEmbedder(copy).fingerprint != original.fingerprint


@pytest.mark.parametrize(
    ("modules", "dimension"),
    [
        ([], 384),
        ([Pooling(384, pooling_mode="cls")], 384),
        ([Pooling(384, pooling_mode=("cls", "mean", "max"))], 3 * 384),
        ([Pooling(384), Dense(384, 96)], 96),
    ],
)
def test_the_shape_that_the_files_tell_is_that_of_the_loaded_model(
    tmp_path: Path, modules: list[Any], dimension: int
) -> None:
    """Saved by the library as it is now, whose keys are others than those of the older files of the carried model."""
    model = SentenceTransformer(str(carried()))
    changed = SentenceTransformer(modules=[model[0], *modules]) if modules else model
    changed.save(str(tmp_path / "saved"))
    shape = described(tmp_path / "saved")
    assert shape is not None
    assert (shape.dimension, shape.max_tokens) == (dimension, 254)
    embedder = make_embedder(str(tmp_path / "saved"))
    assert embedder.embed(TEXTS).shape == (len(TEXTS), dimension)  # loading compares


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: (folder / "modules.json").unlink(), id="a bare transformer"),
        pytest.param(lambda folder: (folder / "tokenizer.json").unlink(), id="an old tokenizer"),
        pytest.param(
            lambda folder: change_json(folder / "config_sentence_transformers.json", truncate_dim=64), id="truncated"
        ),
    ],
)
def test_an_unusual_model_is_loaded_for_its_shape(original: Embedder, copy: Path, change: Callable[[Path], None]) -> None:
    change(copy)
    assert described(copy) is None
    embedder = make_embedder(str(copy))
    assert embedder.embed(TEXTS).shape == (len(TEXTS), embedder.dimension)
    assert embedder.max_tokens in (254, 510)
    assert embedder.count_tokens(TEXTS[0]) == original.count_tokens(TEXTS[0])


def test_questions_and_documents_get_the_prefix_of_their_kind(original: Embedder, copy: Path) -> None:
    prompts = {"query": "query: ", "document": "passage: "}
    change_json(copy / "config_sentence_transformers.json", prompts=prompts)
    embedder = make_embedder(str(copy))
    [question, passage] = original.embed([f"query: {TEXTS[0]}", f"passage: {TEXTS[0]}"])
    assert np.allclose(embedder.embed_query(TEXTS[0]), question, atol=1e-5)
    assert np.allclose(embedder.embed(TEXTS[:1])[0], passage, atol=1e-5)


def test_weights_in_half_precision_give_float32(original: Embedder, copy: Path) -> None:
    change_weights(
        copy,
        lambda tensors: tensors.update({key: value.half() for key, value in tensors.items() if value.is_floating_point()}),
    )
    vectors = make_embedder(str(copy)).embed(TEXTS)
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, original.embed(TEXTS), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------- damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda folder: change_weights(folder, lambda it: it["encoder.layer.0.output.dense.bias"].fill_(float("nan"))),
            "cannot use vectors that are zero or not finite: the model is damaged",
            id="not a number",
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_bytes(
                (folder / "model.safetensors").read_bytes()[:1_000_000]
            ),
            "cannot load the embedding model 'a-model' from .*/a-model",
            id="cut short",
        ),
        pytest.param(
            lambda folder: (folder / "model.safetensors").unlink(), "cannot load the embedding model", id="no weights"
        ),
        pytest.param(lambda folder: (folder / "modules.json").write_text("["), "JSONDecodeError", id="not JSON"),
        pytest.param(lambda folder: (folder / "1_Pooling/config.json").write_text("{}"), "cannot load", id="no width"),
        pytest.param(
            lambda folder: change_json(folder / "1_Pooling/config.json", word_embedding_dimension=100),
            "cannot ",
            id="a width that is not the model's",
        ),
    ],
)
def test_a_damaged_model_is_a_permanent_error_with_the_remedy(
    copy: Path, change: Callable[[Path], None], message: str
) -> None:
    change(copy)
    with pytest.raises(ModelUnavailable, match=f"{message}.*TASKS_EMBEDDING_MODEL"):
        make_embedder(str(copy)).embed(TEXTS)


def test_code_that_a_model_brings_along_is_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / "custom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Model: pass\n")
    change_json(copy / "config.json", auto_map={"AutoModel": "custom.Model"}, model_type="custom")
    with pytest.raises(ModelUnavailable, match="cannot load the embedding model 'a-model'"):
        make_embedder(str(copy)).embed(TEXTS)
    assert not (tmp_path / "ran").exists()
