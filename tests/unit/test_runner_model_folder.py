"""What is read from a model's folder, and how it is to be run, without any library of models."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from job_runner.embed import make_embedder
from job_runner.embed_onnx import providers_of, recipe_of
from job_runner.embed_torch import device_of
from job_runner.model_folder import batch_tokens, digest_of, has_weights, onnx_file, settings_files, weights_files
from task_contract.errors import ModelUnavailable

MINILM: dict[str, Any] = {
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "config.json": {"hidden_size": 384, "max_position_embeddings": 512},
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
    "1_Pooling/config.json": {
        "word_embedding_dimension": 384,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": False,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a-model"


def write(folder: Path, changed: dict[str, Any]) -> Path:
    """Write a model's settings, some of them changed or left out."""
    for name, content in (MINILM | changed).items():
        if content is None:
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param({}, ("mean", 384, 256, False, "", ""), id="as all-MiniLM-L6-v2"),
        pytest.param({"modules.json": None}, ("mean", 384, 256, False, "", ""), id="a bare transformer"),
        pytest.param(
            {"1_Pooling/config.json": {"embedding_dimension": 384, "pooling_mode": "cls"}},
            ("cls", 384, 256, False, "", ""),
            id="the keys of later releases",
        ),
        pytest.param(
            {"sentence_bert_config.json": {"max_seq_length": None, "do_lower_case": True}},
            ("mean", 384, 512, True, "", ""),
            id="the limit of the transformer",
        ),
        pytest.param(
            {"config_sentence_transformers.json": {"prompts": {"query": "query: ", "document": "passage: "}}},
            ("mean", 384, 256, False, "query: ", "passage: "),
            id="prefixes",
        ),
    ],
)
def test_what_is_done_around_the_transformer_is_in_the_settings(
    folder: Path, changed: dict[str, Any], expected: tuple[object, ...]
) -> None:
    found = recipe_of(write(folder, changed))
    told = (found.pooling, found.dimension, found.max_length, found.lower, found.query_prompt, found.document_prompt)
    assert told == expected


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"modules.json": [*MINILM["modules.json"], {"path": "3_Dense", "type": "models.Dense"}]}, "it has a module Dense"),
        (
            {"1_Pooling/config.json": {"embedding_dimension": 9, "pooling_mode": ["cls", "max"]}},
            "its pooling is cls and max",
        ),
        ({"1_Pooling/config.json": {"embedding_dimension": 9, "pooling_mode": "max"}}, "its pooling is max"),
        (
            {"1_Pooling/config.json": {"embedding_dimension": 9, "pooling_mode": "mean", "include_prompt": False}},
            "its pooling leaves prompts out",
        ),
        ({"config_sentence_transformers.json": {"truncate_dim": 64}}, "it cuts its vectors"),
        ({"modules.json": None, "config.json": {}}, "its files do not tell the length of its vectors"),
    ],
)
def test_what_onnx_runtime_would_leave_out_is_refused_with_the_remedy(
    folder: Path, changed: dict[str, Any], why: str
) -> None:
    with pytest.raises(ModelUnavailable, match=rf"'a-model' with ONNX Runtime: {why}.*, which .*requirements/torch\.txt"):
        recipe_of(write(folder, changed))


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is not None, reason="the library is there")
def test_a_folder_for_onnx_runtime_in_an_image_without_it_is_named(folder: Path) -> None:
    (write(folder, {}) / "model.onnx").write_bytes(b"weights")
    with pytest.raises(ModelUnavailable, match=r"'a-model': this image has no ONNX Runtime; .*requirements/onnx\.txt"):
        make_embedder(str(folder))


def test_files_of_a_folder_by_what_they_are_for(folder: Path) -> None:
    write(folder, {})
    assert not has_weights(folder)
    assert onnx_file(folder) is None
    for name in ("pytorch_model.bin", "README.md", "model.onnx", "onnx/config.json", "openvino/model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    assert [path.name for path in weights_files(folder)] == ["pytorch_model.bin"]
    (folder / "model.safetensors").write_bytes(b"1")
    assert [path.name for path in weights_files(folder)] == ["model.safetensors"], "the library prefers it"
    assert has_weights(folder)
    assert [str(path.relative_to(folder)) for path in settings_files(folder)] == sorted(MINILM)
    assert onnx_file(folder) == folder / "model.onnx"
    (folder / "onnx/model.onnx").write_bytes(b"1")
    assert onnx_file(folder) == folder / "onnx/model.onnx"
    before = digest_of(folder, settings_files(folder))
    (folder / "1_Pooling/config.json").rename(folder / "1_Pooling/other.json")
    assert digest_of(folder, settings_files(folder)) != before, "a name counts too"


def test_a_gpu_is_used_where_there_is_one() -> None:
    for available, device in ((True, "cuda"), (False, "cpu")):
        assert device_of(SimpleNamespace(cuda=SimpleNamespace(is_available=lambda answer=available: answer))) == device
    every = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "AzureExecutionProvider", "CPUExecutionProvider"]
    assert providers_of(every) == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert providers_of(every[2:]) == ["CPUExecutionProvider"]


def test_a_batch_takes_about_a_second_whatever_the_size_of_the_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")

    def tokens(size: int, *, threads: int = 1, on_gpu: bool = False) -> int:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(size)  # a hole: it takes no room
        return batch_tokens([folder / "model.safetensors"], threads=threads, on_gpu=on_gpu)

    assert 3_500 < tokens(91_000_000) < 4_500  # as measured
    assert tokens(91_000_000, threads=4) == pytest.approx(4 * tokens(91_000_000), rel=0.01)
    assert tokens(2_300_000_000) == 512, "a text or two of a large model"
    assert tokens(2_300_000_000, on_gpu=True) == tokens(91_000_000, on_gpu=True) > 16_000
