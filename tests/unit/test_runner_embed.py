"""What every embedding model has to do, held against all that are installed; and how texts are put into batches.

Everywhere that is the packaged model; `make test-torch` runs the same tests where sentence-transformers is installed too.
"""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from job_runner.embed import (
    BATCH_CHARACTERS,
    BATCH_TEXTS,
    PACKAGED_MODEL,
    Embedder,
    batches,
    check_model,
    make_embedder,
    normalized,
)
from task_contract.errors import InvalidTask, ModelUnavailable
from task_contract.lifecycle import ExitCode, exit_code

HAS_TORCH = importlib.util.find_spec("sentence_transformers") is not None
MODELS = [PACKAGED_MODEL, *(["all-MiniLM-L6-v2"] if HAS_TORCH else [])]
ROOT = Path(__file__).parents[2]

SENTENCE = "A failed task is tried three times."
NO_NETWORK = """
import os, socket
def refuse(*arguments):
    print("spoke to the network:", arguments, flush=True)
    os._exit(3)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


@pytest.fixture(scope="module", params=MODELS)
def embedder(request: pytest.FixtureRequest) -> Embedder:
    name: str = request.param
    return make_embedder(name)


# ------------------------------------------------------------------------------------------- the contract of every model


def test_vectors_are_finite_float32_of_length_one_in_the_order_of_the_texts(embedder: Embedder) -> None:
    texts = ["知识库", "a knowledge base", "", SENTENCE, "x" * 3_000]
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), embedder.dimension)
    assert vectors.dtype == np.float32
    assert np.isfinite(vectors).all()
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    assert np.allclose(alone, vectors, atol=1e-5)
    assert np.allclose(embedder.embed(texts[::-1]), vectors[::-1], atol=1e-5)


def test_the_same_texts_give_the_same_bits(embedder: Embedder) -> None:
    texts = [SENTENCE, "知识库"]
    assert embedder.embed(texts).tobytes() == embedder.embed(texts).tobytes()


def test_no_texts_give_no_vectors(embedder: Embedder) -> None:
    empty = embedder.embed([])
    assert empty.shape == (0, embedder.dimension)
    assert empty.dtype == np.float32


def test_a_question_is_near_its_answer(embedder: Embedder) -> None:
    answers = embedder.embed(["I like apples and bananas", SENTENCE, "The meeting is on Monday"])
    question = embedder.embed_query("How often is a failed task retried?")
    assert question.shape == (embedder.dimension,)
    assert question.dtype == np.float32
    assert int(np.argmax(answers @ question)) == 1


def test_tokens_are_counted_and_what_is_beyond_the_limit_is_left_out(embedder: Embedder) -> None:
    assert 5 <= embedder.count_tokens(SENTENCE) <= 12
    twice = embedder.count_tokens(f"{SENTENCE} {SENTENCE}")
    assert abs(twice - 2 * embedder.count_tokens(SENTENCE)) <= 1  # what the splitter relies on
    word, other = "task ", "apple "
    if embedder.max_tokens is None:
        start, whole = embedder.embed([word * 1_000, word * 1_000 + other * 100])
        assert not np.allclose(start, whole, atol=1e-3)
        return
    text = word * embedder.max_tokens
    assert embedder.count_tokens(text) == embedder.max_tokens
    assert embedder.count_tokens(text * 3) == embedder.max_tokens * 3
    shorter, exact, longer = embedder.embed([word * (embedder.max_tokens - 1) + other, text, text + other * 100])
    assert np.allclose(exact, longer, atol=1e-5)  # max_tokens are all that is read
    assert not np.allclose(exact, shorter, atol=1e-4)  # and the last of them is


def test_two_threads_load_a_model_once(embedder: Embedder) -> None:
    fresh = make_embedder(MODELS[MODELS.index(embedder.name)])
    found: list[int] = []
    # As in the pipeline: the model is loaded while the first sentences are counted.
    threads = [
        threading.Thread(target=fresh.warm_up),
        threading.Thread(target=lambda: found.append(fresh.count_tokens(SENTENCE))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [embedder.count_tokens(SENTENCE)]


def test_the_fingerprint_is_that_of_the_weights(embedder: Embedder) -> None:
    assert embedder.fingerprint == make_embedder(embedder.name).fingerprint
    assert len({make_embedder(name).fingerprint for name in MODELS}) == len(MODELS)


def test_what_the_pipeline_asks_first_loads_no_model(embedder: Embedder) -> None:
    code = (
        "import sys\n"
        "from job_runner.embed import make_embedder\n"
        f"embedder = make_embedder({embedder.name!r})\n"
        "print(embedder.dimension, embedder.max_tokens, embedder.fingerprint)\n"
        "print(*{'torch', 'transformers'} & set(sys.modules))\n"
    )
    said = run_python(code)
    assert said == f"{embedder.dimension} {embedder.max_tokens} {embedder.fingerprint}\n\n"


def test_no_model_speaks_to_a_network(embedder: Embedder) -> None:
    code = (
        f"{NO_NETWORK}\n"
        "from job_runner.embed import make_embedder\n"
        f"embedder = make_embedder({embedder.name!r})\n"
        "print(embedder.embed(['text']).shape, embedder.embed_query('text').shape, embedder.count_tokens('text'))\n"
    )
    assert run_python(code) == f"(1, {embedder.dimension}) ({embedder.dimension},) 1\n"


def run_python(code: str) -> str:
    """Run CODE in a process of its own, without settings of model hubs in its environment; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'crds'}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------ bad models


@pytest.mark.parametrize("vectors", [np.zeros((1, 3)), np.full((1, 3), np.nan), np.ones((1, 4)), np.ones(3)])
def test_useless_vectors_are_refused(vectors: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> None:
    with pytest.raises(ModelUnavailable, match=r"cannot use vectors.*TASKS_EMBEDDING_MODEL"):
        normalized(vectors.astype(np.float32), dimension=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "other",
            f"'other': it is not one that a package carries .{PACKAGED_MODEL}, all-MiniLM-L6-v2. and no absolute path",
        ),
        ("BAAI/bge-m3", "models are never downloaded"),
        ("models/bge-m3", "no absolute path"),
        pytest.param("/nowhere/bge-m3", "'bge-m3': no modules.json or config.json in /nowhere/bge-m3", id="absent folder"),
        pytest.param(str(ROOT / "docs"), "'docs': no modules.json or config.json", id="a folder of something else"),
    ],
)
def test_a_model_that_is_not_there_is_a_permanent_error_with_the_remedy(setting: str, message: str) -> None:
    if setting.startswith("/") and not HAS_TORCH:
        message = "this image has no sentence-transformers; build the runner's image with requirements/torch.txt"
    with pytest.raises(
        ModelUnavailable, match=f"cannot load the embedding model .*{message}.*correct TASKS_EMBEDDING_MODEL"
    ) as raised:
        make_embedder(setting)
    assert exit_code(raised.value) is ExitCode.PERMANENT


@pytest.mark.skipif(HAS_TORCH, reason="the package that carries the model is there")
def test_a_carried_model_without_its_package_is_named() -> None:
    with pytest.raises(ModelUnavailable, match=r"'all-MiniLM-L6-v2'.*requirements/torch\.txt"):
        make_embedder("all-MiniLM-L6-v2")


def test_a_task_may_name_the_model_that_the_runner_has(embedder: Embedder) -> None:
    check_model(None, embedder)
    check_model(embedder.name, embedder)
    with pytest.raises(InvalidTask, match="cannot embed with 'other'"):
        check_model("other", embedder)


# --------------------------------------------------------------------------------------------------------- batches


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


def test_the_packaged_model_finds_answers_across_languages() -> None:
    embedder = make_embedder(PACKAGED_MODEL)
    answers = embedder.embed(["任务失败后会自动重试三次", "I like apples and bananas", "The meeting is on Monday"])
    for question in ("How often is a failed task retried?", "失败的任务会重试几次？"):
        assert int(np.argmax(answers @ embedder.embed_query(question))) == 0
