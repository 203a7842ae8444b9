"""A real document with a real model of sentence-transformers into the real stores, by the command line, as in a pod.

On the devstack's stores, always: they are the ones that `make test` has used just before, and a store in memory would hide
what this is about, another dimension and another limit of tokens.
"""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job_runner import export_onnx
from job_runner.embed import make_embedder
from job_runner.model_folder import folder_of
from tests.support.runner_lab import NAMESPACE, ROOT, Lab
from tests.torch.conftest import NAME


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the carried model, as ONNX."""
    folder = str(tmp_path_factory.mktemp("models") / "minilm-onnx")
    assert export_onnx.main([NAME, folder]) == 0
    return folder


async def test_a_document_is_found_by_meaning_and_other_models_are_kept_apart(
    lab: Lab, tmp_path: Path, exported: str
) -> None:
    embedder = lab.embedder = make_embedder(NAME)
    lab.take_own_knowledge_base()
    shutil.copy(ROOT / "examples/documents/handbook.pdf", lab.documents)

    async def call(*arguments: str, model: str = NAME) -> tuple[int, str, str]:
        process = lab.command("job_runner", *arguments, environment={"TASKS_EMBEDDING_MODEL": model})
        output, errors = await asyncio.to_thread(process.communicate, timeout=120)
        return process.returncode, output, errors

    def task(**payload: Any) -> str:
        return lab.task_file(lab.task("handbook.pdf", chunkSize=4000, chunkOverlap=200, **payload))

    code, output, errors = await call("run", task(embeddingModel=NAME))
    assert code == 0, errors
    assert all(json.loads(line) for line in errors.splitlines()), "logs are JSON"
    result = json.loads(output)["result"]
    assert result["chunks"] == result["embedded"] == result["milvusCount"] == result["elasticsearchCount"] > 10

    # Chunks of 4,000 characters would be 800 tokens: none is longer than what the model reads.
    rows, _ = await lab.contents("handbook.pdf")
    tokens = [embedder.count_tokens(row["text"]) for row in rows]
    assert embedder.max_tokens is not None
    assert 150 < max(tokens) <= embedder.max_tokens

    [case, *_] = [
        it for it in json.loads((ROOT / "examples/documents/questions.json").read_text()) if it["question"].isascii()
    ]
    where = ("--namespace", NAMESPACE, "--kb-id", lab.kb_id, "--query", case["question"])
    code, output, errors = await call("search", "--json", *where)
    assert code == 0, errors
    hits = [json.loads(line) for line in output.splitlines()]
    assert any(hit["store"] == "milvus" and case["answer"] in hit["text"] for hit in hits), hits

    # The same model from another place: nothing is computed again. Another model: refused, and nothing is changed.
    shutil.copytree(folder_of(NAME) or Path(), tmp_path / "minilm")
    code, output, errors = await call("run", task(), model=str(tmp_path / "minilm"))
    assert (code, json.loads(output)["reason"]) == (0, "Unchanged"), errors
    for model, payload, reason in (
        ("universal-sentence-encoder-multilingual-v3", {}, "ModelMismatch"),
        (exported, {}, "ModelMismatch"),
        ("universal-sentence-encoder-multilingual-v3", {"embeddingModel": NAME}, "InvalidTask"),
        (str(tmp_path / "absent"), {}, "ModelUnavailable"),
        ("BAAI/bge-m3", {}, "ModelUnavailable"),
    ):
        code, output, _ = await call("run", task(**payload), model=model)
        assert (code, json.loads(output)["reason"]) == (65, reason), output
    assert await lab.published("handbook.pdf") == 1
    code, _, errors = await call("search", *where, model="universal-sentence-encoder-multilingual-v3")
    assert (code, "with the fingerprint st-" in errors, "TASKS_EMBEDDING_MODELS" in errors) == (65, True, True), errors

    # The other way round: a knowledge base that ONNX Runtime has filled is for neither of the other two.
    lab.take_own_knowledge_base()
    code, output, errors = await call("run", task(), model=exported)
    assert code == 0, errors
    assert all(json.loads(line) for line in errors.splitlines()), "logs are JSON"
    result = json.loads(output)["result"]
    assert result["chunks"] == result["embedded"] == result["milvusCount"] == result["elasticsearchCount"] > 10
    for model in (NAME, "universal-sentence-encoder-multilingual-v3"):
        code, output, _ = await call("run", task(), model=model)
        assert (code, json.loads(output)["reason"]) == (65, "ModelMismatch"), output


async def test_a_knowledge_base_moves_from_one_model_to_another_and_back(lab: Lab, exported: str) -> None:
    """From the packaged model's vectors to those of ONNX Runtime, of another dimension, by one runner that has both."""
    first, second = "universal-sentence-encoder-multilingual-v3", exported
    lab.take_own_knowledge_base()
    shutil.copy(ROOT / "examples/documents/handbook.pdf", lab.documents)
    both = {"TASKS_EMBEDDING_MODEL": first, "TASKS_EMBEDDING_MODELS": second}

    async def call(*arguments: str, environment: dict[str, str] = both) -> tuple[int, str, str]:
        process = lab.command("job_runner", *arguments, environment=environment)
        output, errors = await asyncio.to_thread(process.communicate, timeout=120)
        return process.returncode, output, errors

    async def asked(environment: dict[str, str] = both) -> tuple[int, str, str]:
        query = ("--namespace", NAMESPACE, "--kb-id", lab.kb_id, "--query", case["question"])
        return await call("search", "--json", "--mode", "dense", *query, environment=environment)

    [case, *_] = [
        it for it in json.loads((ROOT / "examples/documents/questions.json").read_text()) if it["question"].isascii()
    ]
    task = lab.task("handbook.pdf", chunkSize=600, chunkOverlap=100)
    assert (await call("run", lab.task_file(task)))[0] == 0
    for model, action, generation, dimension in (
        (second, {"rebuildIndex": True, "embeddingModel": second, "maxRecallDrop": 100}, 2, 384),
        (first, {"action": "rollback"}, 1, 512),
    ):
        code, output, errors = await call("run", lab.task_file(lab.indexing(**action)))
        assert code == 0, errors
        result = json.loads(output)["result"]
        assert result["generation"] == generation
        assert result["chunks"] == result["milvusCount"] == result["elasticsearchCount"] > 10
        serving = "SELECT g.dimension FROM generations g JOIN knowledge_bases USING (namespace, kb_id, generation)"
        assert await lab.fetch(f"{serving} WHERE kb_id = $1", lab.kb_id) == dimension
        code, output, errors = await asked()
        assert code == 0, errors
        hits = [json.loads(line) for line in output.splitlines()]
        assert any(case["answer"] in hit["text"] for hit in hits), hits
        # A runner that has the other model alone is told so.
        other = {first: second, second: first}[model]
        code, _, errors = await asked({"TASKS_EMBEDDING_MODEL": other})
        assert (code, "TASKS_EMBEDDING_MODEL" in errors) == (65, True), errors
