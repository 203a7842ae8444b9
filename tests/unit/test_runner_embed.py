"""The packaged model, its bounds, and how texts are put into batches."""

import numpy as np
import pytest

from job_runner.embed import (
    BATCH_CHARACTERS,
    BATCH_TEXTS,
    PACKAGED_MODEL,
    PackagedEmbedder,
    batches,
    check_model,
    make_embedder,
    normalized,
)
from task_contract.errors import InvalidTask, StoreUnavailable


@pytest.fixture(scope="module")
def embedder() -> PackagedEmbedder:
    return PackagedEmbedder()


def test_vectors_are_finite_normalized_and_the_same_each_time(embedder: PackagedEmbedder) -> None:
    texts = ["知识库", "a knowledge base", "", "x" * 10_000]
    vectors = embedder.embed(texts)
    assert vectors.shape == (4, embedder.dimension)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    assert np.allclose(alone, vectors, atol=1e-5)


def test_an_answer_is_near_its_question_across_languages(embedder: PackagedEmbedder) -> None:
    answers = embedder.embed(["任务失败后会自动重试三次", "I like apples and bananas", "The meeting is on Monday"])
    for question in ("How often is a failed task retried?", "失败的任务会重试几次？"):
        assert int(np.argmax(answers @ embedder.embed([question])[0])) == 0


def test_the_fingerprint_tells_the_weights(embedder: PackagedEmbedder) -> None:
    assert embedder.fingerprint == PackagedEmbedder().fingerprint
    assert embedder.fingerprint.startswith("usem3-")
    assert embedder.count_tokens("知识库") >= 1


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], []),
        ([10], [1]),
        ([10] * (BATCH_TEXTS * 2 + 1), [BATCH_TEXTS, BATCH_TEXTS, 1]),
        ([BATCH_CHARACTERS // 2] * 3, [2, 1]),
        ([1, BATCH_CHARACTERS * 2, 1], [1, 1, 1]),
    ],
)
def test_batches_are_bounded_in_texts_and_characters(lengths: list[int], expected: list[int]) -> None:
    texts = ["x" * length for length in lengths]
    found = list(batches(texts))
    assert [part.stop - part.start for part in found] == expected
    assert [text for part in found for text in texts[part]] == texts


@pytest.mark.parametrize("vectors", [np.zeros((1, 3)), np.full((1, 3), np.nan), np.ones((1, 4)), np.ones(3)])
def test_useless_vectors_are_refused(vectors: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> None:
    with pytest.raises(ValueError, match="cannot use vectors"):
        normalized(vectors.astype(np.float32), dimension=3)


def test_models_that_are_not_there_are_named(embedder: PackagedEmbedder) -> None:
    assert make_embedder(PACKAGED_MODEL).name == PACKAGED_MODEL
    with pytest.raises(StoreUnavailable, match=r"'other'.*TASKS_EMBEDDING_MODEL"):
        make_embedder("other")
    check_model(None, embedder)
    check_model(PACKAGED_MODEL, embedder)
    with pytest.raises(InvalidTask, match="cannot embed with 'other'"):
        check_model("other", embedder)
