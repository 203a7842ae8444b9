"""Models exported to ONNX, beside the same ones under sentence-transformers."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from job_runner import export_onnx
from job_runner.embed import Embedder, make_embedder
from job_runner.embed_onnx import OnnxEmbedder
from task_contract.errors import ModelUnavailable
from tests.torch.conftest import NAME, carried, change_json

TEXTS = [
    "A failed task is tried three times.",
    "The meeting is on Monday; bring the minutes of the last one, please.",
    "知识库把文档切成片段，每个片段都有页码。",
    "任务失败后会自动重试三次",
    "Mixed: 用 Kubernetes 部署 operator 的步骤",
    "",
    "x",
    "A text beyond what the model reads. " * 60,
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "minilm-onnx"
    assert export_onnx.main([NAME, str(folder)]) == 0
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "a-model"))


def test_vectors_are_those_of_sentence_transformers(original: Embedder, exported: Path) -> None:
    embedder = make_embedder(str(exported))
    assert isinstance(embedder, OnnxEmbedder)
    assert (embedder.name, embedder.dimension, embedder.max_tokens) == ("minilm-onnx", 384, original.max_tokens)
    expected, found = original.embed(TEXTS), embedder.embed(TEXTS)
    assert (expected * found).sum(axis=1).min() > 0.999
    assert [embedder.count_tokens(text) for text in TEXTS] == [original.count_tokens(text) for text in TEXTS]
    assert embedder.fingerprint != original.fingerprint  # they round differently: a knowledge base keeps to one of them
    assert 512 <= embedder.batch_tokens <= original.batch_tokens * 1.1


def test_what_stands_around_the_transformer_is_read_from_the_settings(original: Embedder, copy: Path) -> None:
    prompts = {"query": "Query: ", "document": "Passage: ", "passage": "not used"}
    change_json(copy / "config_sentence_transformers.json", prompts=prompts)
    change_json(copy / "1_Pooling/config.json", pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    change_json(copy / "sentence_bert_config.json", max_seq_length=32, do_lower_case=True)
    folder = copy.with_name("torch")  # the same with weights for PyTorch
    shutil.copytree(copy, folder)
    shutil.rmtree(folder / "onnx")
    shutil.copy(carried() / "model.safetensors", folder)
    expected, found = make_embedder(str(folder)), make_embedder(str(copy))
    assert found.max_tokens == expected.max_tokens == 30
    assert np.allclose(found.embed(TEXTS), expected.embed(TEXTS), atol=1e-4)
    assert np.allclose(found.embed_query(TEXTS[0]), expected.embed_query(TEXTS[0]), atol=1e-4)
    assert not np.allclose(found.embed_query(TEXTS[0]), found.embed(TEXTS[:1])[0], atol=1e-3)
    assert not np.allclose(found.embed(TEXTS[:1]), original.embed(TEXTS[:1]), atol=1e-3)


def test_a_model_saved_by_the_library_as_it_is_now_is_exported_too(tmp_path: Path) -> None:
    parts = SentenceTransformer(str(carried()))
    SentenceTransformer(modules=[parts[0], Pooling(384, pooling_mode="cls"), Normalize()]).save(str(tmp_path / "saved"))
    assert export_onnx.export(tmp_path / "saved", tmp_path / "exported") > 0.999


def test_a_folder_with_both_is_run_by_sentence_transformers(original: Embedder, copy: Path) -> None:
    shutil.copy(carried() / "model.safetensors", copy)
    assert make_embedder(str(copy)).fingerprint == original.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda folder: (folder / "onnx/model.onnx").write_bytes(b"other"), id="weights"),
        pytest.param(lambda folder: (folder / "onnx/model.onnx.data").write_bytes(b"other"), id="weights in a second file"),
        pytest.param(lambda folder: change_json(folder / "sentence_bert_config.json", max_seq_length=128), id="length"),
        pytest.param(lambda folder: (folder / "tokenizer.json").write_text("{}"), id="tokenizer"),
    ],
)
def test_whatever_changes_vectors_changes_the_fingerprint(copy: Path, change: Callable[[Path], None]) -> None:
    before = OnnxEmbedder(copy).fingerprint
    (copy / "README.md").write_text("something else")
    assert OnnxEmbedder(copy).fingerprint == before
    change(copy)
    assert OnnxEmbedder(copy).fingerprint != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda folder: (folder / "onnx/model.onnx").write_bytes(b"other"), "cannot load the embedding model", id="other"
        ),
        pytest.param(
            lambda folder: (folder / "onnx/model.onnx").write_bytes((folder / "onnx/model.onnx").read_bytes()[:9_000_000]),
            "cannot load the embedding model 'a-model' from .*/a-model",
            id="cut short",
        ),
        pytest.param(lambda folder: (folder / "tokenizer.json").unlink(), "cannot load", id="no tokenizer"),
        pytest.param(lambda folder: (folder / "modules.json").write_text("["), "JSONDecodeError", id="not JSON"),
        pytest.param(lambda folder: (folder / "config.json").write_text("{}"), None, id="a width in the pooling alone"),
        pytest.param(
            lambda folder: change_json(folder / "1_Pooling/config.json", word_embedding_dimension=100),
            r"cannot use vectors of shape \(1, 384\)",
            id="a width that is not the model's",
        ),
    ],
)
def test_a_damaged_model_is_a_permanent_error_with_the_remedy(
    copy: Path, change: Callable[[Path], None], message: str | None
) -> None:
    change(copy)
    if message is None:
        assert make_embedder(str(copy)).embed(TEXTS[:1]).shape == (1, 384)
        return
    with pytest.raises(ModelUnavailable, match=f"{message}.*TASKS_EMBEDDING_MODEL"):
        make_embedder(str(copy)).embed(TEXTS[:1])


def test_an_export_that_is_refused_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(shutil.copytree(carried(), tmp_path / "source"))
    change_json(source / "1_Pooling/config.json", pooling_mode_max_tokens=True)
    assert export_onnx.main([str(source), str(tmp_path / "target")]) == 1
    assert "its pooling is mean and max, which sentence-transformers alone does" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert export_onnx.main([str(source), str(source)]) == 1
    assert "it exists; name a new folder" in capsys.readouterr().err
